"""Laws of shards: whole or absent, the same bytes every time, every byte covered, and readable by offset."""

import hashlib
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from data_samples import make_sample, write_dataset

from laid_ds.data.dataset import Dataset
from laid_ds.data.index import DATASET, INDEX, ShardIndex
from laid_ds.data.record import DataError, Sample, Turn
from laid_ds.data.tar import parse_tar_header, tar_header
from laid_ds.data.writer import LOCK, ShardWriter

SAMPLES = [make_sample(i, i % 4) for i in range(25)]


def test_every_sample_comes_back_by_index(dataset):
    for i, sample in enumerate(SAMPLES):
        got = dataset.read(i)
        assert (got.key, got.turns, got.images, got.meta) == (sample.key, sample.turns, sample.images, sample.meta)
        assert dataset.find(sample.key) == i
        assert dataset.num_images[i] == len(sample.images)
    assert dataset.shard_sizes.tolist() == [7, 7, 7, 4]


def test_the_same_samples_give_the_same_bytes(dataset, tmp_path):
    write_dataset(tmp_path / "again", SAMPLES, samples_per_shard=7)
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / name).iterdir()} for name in ("set", "again")
    ]
    assert digests[0] == digests[1]
    assert len(digests[0]) == 10


FILES_OF_VERSION_1 = {  # sha256 of what the first release of the format wrote of `handmade`
    "dataset.json": "1fe7643f295b1e6da83a2160f4fcec96ff18f5b924f97a3afc2b97d654e6275e",
    "index.jsonl": "3784bf0a2a38a39e07155f34261308c7cdbb7d6ccd3b5293a1b6c3f170233c14",
    "shard-000000.tar": "08d7a5bafb9a41172d1141ec252b94739a56874995e816a66015859db36ab245",
    "shard-000000.tar.idx": "5979cb5335e329cf9a0c5eeb67637a6003b4203167b87a172f718541c8b4fd47",
    "shard-000001.tar": "14abb4eb058d8fa6bc2956a4e71a751da3a9d84b84a9511d65fda47d4904de08",
    "shard-000001.tar.idx": "057bee64b811d4ed9caed91d0d170fbf65384b6fb9f3e433bc624842d188333e",
    "shard-000002.tar": "fb1e6e3d4e83ac1e68685db58633fad64e19c121c0e62d25e8733da8ea1ded61",
    "shard-000002.tar.idx": "de2177fa4304729df4d339ba66a827e6374bc4fc14da63a9091045b8a9338b13",
}


def handmade(number: int) -> Sample:
    """A sample whose every byte stands here: no encoder of images may change it."""
    sizes = [10 * number + k for k in range(number % 4)]
    images = tuple(
        b"\x89PNG\r\n\x1a\n" + bytes(4) + b"IHDR" + (20 + n).to_bytes(4) + (300).to_bytes(4) + bytes(range(7 * n % 200)) + b"end"
        for n in sizes
    )
    question = Turn("user", (*range(len(images)), f"Frage {number}: wo?"), needles=(0,) if images else ())
    tokens = {"exact": 50 + number, "odd": number} if number % 3 else {"exact": 9}
    return Sample(f"k-{number}", (question, Turn("assistant", ("dört",))), images, "hand", "CC0", tokens, {"n": number})


def test_the_files_of_a_set_are_those_of_the_first_release(tmp_path):
    write_dataset(tmp_path / "set", map(handmade, range(7)), samples_per_shard=3)
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "set").iterdir()} == FILES_OF_VERSION_1


def test_columns_are_arrays_that_give_the_line_back(dataset):
    for shard, line in zip(dataset.shards, (dataset.folders[0].path / INDEX).read_bytes().splitlines(keepends=True), strict=True):
        columns = [shard.keys, shard.offsets, shard.crc32, shard.images, *shard.tokens.values()]
        assert all(isinstance(column, np.ndarray) and column.dtype != object for column in columns)
        assert ShardIndex.from_line(shard.line()).line() == shard.line() == line


def test_a_pickled_dataset_reads_the_same(dataset):
    dataset.read(3)
    assert pickle.loads(pickle.dumps(dataset)).read(3) == dataset.read(3)


def test_more_shards_than_open_files_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("laid_ds.data.dataset.MAX_OPEN_SHARDS", 2)
    dataset = write_dataset(tmp_path / "many", SAMPLES, samples_per_shard=1)
    for i in (0, 5, 9, 0, 24):
        assert dataset.read(i).key == SAMPLES[i].key
    assert len(dataset._descriptors) == 2


def test_shards_are_bounded_by_bytes_too(tmp_path):
    dataset = write_dataset(tmp_path / "small", SAMPLES, bytes_per_shard=8192)
    assert len(dataset.shards) > 4
    assert all(shard.num_bytes <= 8192 + 1024 or len(shard) == 1 for shard in dataset.shards)


def test_exact_token_counts_are_a_column_when_every_sample_has_them(tmp_path):
    samples = [replace(sample, tokens={"fp": 100 + i} | ({"odd": 1} if i % 2 else {})) for i, sample in enumerate(SAMPLES)]
    dataset = write_dataset(tmp_path / "set", samples, samples_per_shard=7)
    assert dataset.token_counts("fp").tolist() == [100 + i for i in range(25)]
    with pytest.raises(DataError, match="no token counts named 'odd'"):
        dataset.token_counts("odd")


def test_several_folders_are_one_sequence_and_keys_are_unique_over_all(dataset, tmp_path):
    more = write_dataset(tmp_path / "more", [make_sample(i, 1) for i in range(100, 103)])
    both = Dataset.open([tmp_path / "set", tmp_path / "more"])
    assert len(both) == 28
    assert both.read(26).key == more.read(1).key
    assert [sizes.sum() for sizes in both.source_shard_sizes] == [25, 3]
    with pytest.raises(DataError, match="the key is also in shard"):
        Dataset.open([tmp_path / "set", tmp_path / "set"])


def test_a_key_is_written_once(tmp_path):
    with pytest.raises(DataError, match=r"already in this data set .key sample-00003"):
        write_dataset(tmp_path / "set", [SAMPLES[3], SAMPLES[4], SAMPLES[3]])
    assert not list((tmp_path / "set").glob("*.tar*"))


@pytest.mark.parametrize("name", [INDEX, DATASET])
def test_any_changed_byte_of_the_index_files_is_refused(dataset, tmp_path, name):
    path = tmp_path / "set" / name
    whole = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(whole), 60):
        broken = bytearray(whole)
        broken[place] ^= 1 << int(place % 7)
        path.write_bytes(broken)
        with pytest.raises(DataError, match="do not agree"):
            Dataset.open(tmp_path / "set")
    path.write_bytes(whole[:-40])
    with pytest.raises(DataError, match="do not agree"):
        Dataset.open(tmp_path / "set")


def test_a_missing_or_cut_shard_is_refused_with_the_first_lost_sample(dataset, tmp_path):
    shard = tmp_path / "set" / "shard-000001.tar"
    os.truncate(shard, dataset.origin(9).offset + 100)
    with pytest.raises(DataError, match=r"shard-000001.tar, key sample-00009, offset"):
        Dataset.open(tmp_path / "set")
    shard.unlink()
    with pytest.raises(DataError, match=r"missing .shard .*shard-000001.tar, key sample-00007"):
        Dataset.open(tmp_path / "set")


def test_a_shard_cut_while_it_is_read_is_noticed(dataset, tmp_path):
    os.truncate(tmp_path / "set" / "shard-000001.tar", dataset.origin(9).offset + 100)
    assert dataset.read(8).key == "sample-00008"
    with pytest.raises(DataError, match="before the sample does") as caught:
        dataset.read(9)
    assert (caught.value.shard, caught.value.key) == ("shard-000001.tar", "sample-00009")


@pytest.mark.parametrize("folder", ["empty", "missing"])
def test_no_data_set_is_one_sentence(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"it has no dataset\.json"):
        Dataset.open(tmp_path / folder)


def test_a_header_with_any_changed_byte_is_refused():
    header = tar_header("sample-00001.000.jpg", 12345, 0xDEADBEEF)
    assert parse_tar_header(header) == ("sample-00001.000.jpg", 12345, 0xDEADBEEF)
    for place in range(512):
        broken = bytearray(header)
        broken[place] ^= 0x10
        with pytest.raises(DataError, match="tar header"):
            parse_tar_header(bytes(broken))


WRITER = """
import itertools, os, signal, sys; sys.path[:0] = [{tests!r}, {root!r}]
from data_samples import make_sample
from laid_ds.data.writer import LOCK, ShardWriter
samples, calls = [make_sample(i, 1) for i in range(60)], itertools.count(1)
def die_at_call(frame, event, argument):
    if next(calls) == {death}:
        os.kill(os.getpid(), signal.SIGKILL)
with ShardWriter({folder!r}, samples_per_shard=3, resume=True) as writer:
    sys.setprofile(die_at_call)
    for sample in samples[writer.samples_done:]:
        writer.write(sample)
sys.setprofile(None)
print(next(calls))
"""


def run_writer(folder, death: int = 0) -> int | None:
    """Write 60 samples; how many function calls that took. It dies by SIGKILL at the death-th of them: None."""
    code = WRITER.format(tests=os.path.dirname(__file__), root=os.getcwd(), folder=str(folder), death=death)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if found.returncode == -signal.SIGKILL:
        return None
    assert found.returncode == 0, found.stderr
    return int(found.stdout)


def test_a_killed_writer_leaves_only_whole_shards_and_resumes_to_the_same_bytes(tmp_path):
    calls = run_writer(tmp_path / "whole")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert len(whole) == 42

    for trial, death in enumerate(np.random.default_rng(0).integers(1, calls * 0.98, 20)):
        folder = tmp_path / f"killed-{trial}"
        assert run_writer(folder, death) is None
        for path in folder.glob("*.tar"):
            assert path.read_bytes() == whole[path.name]
        assert not (folder / DATASET).exists()
    run_writer(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_a_writer_refuses_a_folder_in_use(dataset, tmp_path):
    with pytest.raises(DataError, match="already holds a finished data set"):
        ShardWriter(tmp_path / "set")
    (tmp_path / "set" / DATASET).unlink()
    with pytest.raises(DataError, match="unfinished data set"):
        ShardWriter(tmp_path / "set")


def test_two_writers_of_one_folder_are_told(tmp_path):
    """The lock is of a process: it ends with it, however it ends, and nothing stays in a finished set."""
    hold = "\n".join(
        (WRITER.split("def die")[0], f"writer = ShardWriter({str(tmp_path)!r})", "writer.write(samples[0])", "print(flush=True)", "input()")
    )
    code = hold.format(tests=os.path.dirname(__file__), root=os.getcwd())
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        with pytest.raises(DataError, match="is being written by another process"):
            ShardWriter(tmp_path, resume=True)
        other.kill()
    with ShardWriter(tmp_path, resume=True) as writer:
        writer.write(make_sample(0, 1))
    assert not (tmp_path / LOCK).exists()
    assert len(Dataset.open(tmp_path)) == 1

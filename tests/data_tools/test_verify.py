"""Law: any damage is found and named with shard, key and offset; nothing is lost silently; repair keeps every whole sample."""

import io
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from data_samples import make_sample, write_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools.scan import scan
from data_tools.verify import reindex, repair, verify
from laid_ds.data.dataset import Dataset
from laid_ds.data.index import DATASET, INDEX
from laid_ds.data.record import DataError
from laid_ds.data.tar import END_OF_ARCHIVE
from laid_ds.data.writer import ShardWriter

SAMPLES = [make_sample(i, i % 3) for i in range(12)]
FIRST, SECOND = "shard-000000.tar", "shard-000001.tar"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """Two shards of six samples."""
    folder = tmp_path_factory.mktemp("sound") / "set"
    write_dataset(folder, SAMPLES, samples_per_shard=6)
    return folder


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sound, tmp_path / "set"))


def flip(path: Path, offset: int, mask: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= mask
    path.write_bytes(data)


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def keys_of(shard):
    return [key.decode() for key in shard.keys.tolist()]


def contents(folder: Path) -> dict[str, tuple]:
    return {sample.key: (sample.turns, sample.images, sample.meta) for sample in Dataset.open(folder)}


def places(report) -> set[tuple]:
    return {(problem["shard"], problem["key"], problem["offset"]) for problem in report["problems"]}


def shard_of(folder: Path, name: str = FIRST):
    return next(shard for shard in Dataset.open(folder).shards if shard.name == name)


def test_a_sound_set_is_sound(folder):
    for deep in (False, True):
        assert verify(folder, deep, 2) == {"sound": True, "shards": 2, "whole_samples": 12, "problems": []}
    assert scan(folder / FIRST).problems == []


def cut_in_data(path, shard):
    cut(path, shard.offsets[5] + 700)
    return 5


def cut_on_a_block(path, shard):
    cut(path, shard.offsets[5] + 512)
    return 5


def cut_on_a_sample(path, shard):
    cut(path, shard.offsets[4])
    return 4


def flip_in_a_header(path, shard):
    flip(path, shard.offsets[4] + 3)
    return 4


def flip_in_a_size(path, shard):
    flip(path, shard.offsets[4] + 130)
    return 4


def flip_in_an_image(path, shard):
    flip(path, shard.offsets[5] - 700)
    return 4


def remove_the_shard(path, shard):
    path.unlink()
    return 0


def empty_the_shard(path, shard):
    cut(path, 0)
    return 0


@pytest.mark.parametrize(
    "damage",
    [cut_in_data, cut_on_a_block, cut_on_a_sample, flip_in_a_header, flip_in_a_size, flip_in_an_image, remove_the_shard, empty_the_shard],
)
def test_every_known_fault_is_found_refused_and_repaired(folder, damage):
    shard = shard_of(folder)
    whole = contents(folder)
    first_bad = damage(folder / FIRST, shard)

    report = verify(folder, False, 1)
    assert not report["sound"]
    assert (FIRST, keys_of(shard)[first_bad], shard.offsets[first_bad]) in places(report)

    with pytest.raises(DataError) as caught:
        list(Dataset.open(folder))
    assert Path(caught.value.shard).name == FIRST
    assert (caught.value.key, caught.value.offset) == (keys_of(shard)[first_bad], shard.offsets[first_bad])

    if damage is not remove_the_shard:
        assert scan(folder / FIRST).problems

    lost = {entry["key"] for entry in repair(folder, 1)["lost"]}
    assert verify(folder, True, 1)["sound"]
    kept = contents(folder)
    assert all(kept[key] == whole[key] for key in kept)
    assert whole.keys() - kept.keys() == lost
    is_cut = damage in (cut_in_data, cut_on_a_block, cut_on_a_sample, remove_the_shard, empty_the_shard)
    assert lost == set(keys_of(shard)[first_bad:] if is_cut else [keys_of(shard)[first_bad]])


def test_two_halves_of_one_key_are_never_one_sample(folder):
    """Shard A cut inside the sample with key K, shard B beginning with another sample of the same key: the splice of stock readers."""
    shard = shard_of(folder)
    cut(folder / FIRST, shard.offsets[5] + 512)
    twin = replace(SAMPLES[5], images=tuple(reversed(SAMPLES[5].images)))
    write_dataset(folder / "b", [twin], samples_per_shard=6)
    shutil.copy(folder / "b" / FIRST, folder / SECOND)
    shutil.rmtree(folder / "b")

    report = verify(folder, False, 1)
    assert {(FIRST, SAMPLES[5].key), (SECOND, SAMPLES[6].key)} <= {place[:2] for place in places(report)}
    repair(folder, 1)
    assert contents(folder)[twin.key] == (twin.turns, twin.images, twin.meta)


def test_half_a_picture_that_was_written_so_is_found_by_deep_verify(tmp_path):
    whole = make_sample(4, 2)
    half = replace(whole, images=(whole.images[0], whole.images[1][: len(whole.images[1]) // 2]))
    write_dataset(tmp_path / "set", [make_sample(0), half])
    assert verify(tmp_path / "set", False, 1)["sound"]
    (problem,) = verify(tmp_path / "set", True, 1)["problems"]
    assert problem["key"] == half.key
    assert "image 1" in problem["reason"]


def test_repeated_keys_over_shards_are_refused(folder):
    shutil.copy(folder / FIRST, folder / "shard-000002.tar")
    with pytest.raises(DataError, match=r"also in shard shard-000000.tar .shard shard-000002.tar, key sample-00000, offset 0"):
        reindex(folder, 1)


def test_a_damaged_shard_is_not_indexed(folder):
    flip(folder / SECOND, 700)
    with pytest.raises(DataError, match=r"shard shard-000001.tar, key sample-00006, offset 0"):
        reindex(folder, 1)


def test_an_index_made_anew_is_the_same(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in (INDEX, DATASET, FIRST + ".idx"):
        (folder / name).unlink()
    assert not verify(folder, False, 1)["sound"]
    assert reindex(folder, 2) == {"shards": 2, "samples": 12}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_files_that_no_reader_would_see_are_reported(folder):
    shutil.copy(folder / FIRST, folder / "shard-000009.tar")
    (folder / "shard-000003.tar.tmp").write_bytes(b"")
    (folder / (FIRST + ".idx")).write_bytes(b"")
    reasons = " ".join(f"{problem['shard']}: {problem['reason']}" for problem in verify(folder, False, 1)["problems"])
    for name in ("shard-000009.tar: the shard is not", "shard-000003.tar.tmp: the shard is not", "shard-000000.tar.idx is missing or"):
        assert name in reasons


def test_bytes_lost_in_the_middle_cost_only_their_sample(folder):
    """Everything behind is no longer on a block boundary; stock readers see the end of the archive."""
    shard = shard_of(folder)
    data = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(data[: shard.offsets[2] + 600] + data[shard.offsets[2] + 613 :])
    repair(folder, 1)
    assert contents(folder).keys() == {sample.key for sample in SAMPLES} - {keys_of(shard)[2]}


def test_repair_keeps_the_damaged_file_and_leaves_sound_ones_alone(folder):
    flip(folder / FIRST, 700)
    damaged, other = (folder / FIRST).read_bytes(), (folder / SECOND).stat().st_mtime_ns
    repair(folder, 1)
    assert (folder / (FIRST + ".damaged")).read_bytes() == damaged
    assert (folder / SECOND).stat().st_mtime_ns == other
    assert repair(folder, 1) == {"shards": 2, "samples": 11, "lost": []}


def test_a_shard_without_one_whole_sample_goes(folder):
    cut(folder / SECOND, 100)
    assert repair(folder, 1)["shards"] == 1
    assert len(Dataset.open(folder)) == 6


@given(is_cut=st.booleans(), where=st.integers(0, (1 << 32) - 1), mask=st.integers(1, 255))
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_damage_is_found_named_and_repaired(sound, tmp_path, is_cut, where, mask):
    folder = tmp_path / "set"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound, folder)
    shard = shard_of(folder)
    offset = where * shard.num_bytes >> 32
    (cut(folder / FIRST, offset) if is_cut else flip(folder / FIRST, offset, mask))
    hit = next((i for i, end in enumerate(shard.offsets[1:]) if offset < end), None)  # None: the end-of-archive blocks
    expected = (keys_of(shard)[-1], shard.offsets[-1]) if hit is None else (keys_of(shard)[hit], shard.offsets[hit])

    report = verify(folder, False, 1)
    named = {(key, place) for _, key, place in places(report)}
    assert expected in named
    lost = set() if hit is None else set(keys_of(shard)[hit:] if is_cut else [keys_of(shard)[hit]])
    assert {key for key, place in named if place != shard.offsets[-1]} == lost
    assert report["whole_samples"] == 12 - len(lost)

    unindexed = scan(folder / FIRST)
    assert unindexed.problems
    assert {problem.key for problem in unindexed.problems} <= lost | {None}
    assert [found.key for found in unindexed.whole] == [key for key in keys_of(shard) if key not in lost]

    if hit is not None:
        with pytest.raises(DataError) as caught:
            list(Dataset.open(folder))
        assert (caught.value.key, caught.value.offset) == expected

    report = repair(folder, 1)
    assert {entry["key"] for entry in report["lost"]} == lost
    assert set(Dataset.open(folder).keys.astype(str)) == {sample.key for sample in SAMPLES} - lost


def test_the_end_is_checked_to_its_last_byte(folder):
    for position in range(len(END_OF_ARCHIVE)):
        damaged = bytearray((folder / FIRST).read_bytes())
        damaged[-1 - position] = 7
        if position % 64 == 0:
            (folder / "other.tar").write_bytes(damaged)
            assert scan(folder / "other.tar").problems
    with tarfile.open(fileobj=io.BytesIO((folder / FIRST).read_bytes())) as stock:
        assert len(stock.getmembers()) == 6 + sum(len(sample.images) for sample in SAMPLES[:6])


def write_as_webdataset(path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in (("k0.webp", b"RIFF"), ("k0.txt", b"a cat"), ("k0.json", b"{}")):
            info = tarfile.TarInfo(name)
            info.size, info.uname = len(data), "bigdata"
            archive.addfile(info, io.BytesIO(data))


def write_as_pax(path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "ä"}) as archive:
        info = tarfile.TarInfo("ä" * 90 + ".json")
        archive.addfile(info, io.BytesIO())


def write_compressed(path: Path) -> None:
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("k0.json"), io.BytesIO())


def write_around_ours(path: Path) -> None:
    """A tar of others with one of our shards in it."""
    with tarfile.open(path, "w") as archive:
        archive.add(path.parent.parent / "ours" / FIRST, "backup.tar")


def write_no_tar(path: Path) -> None:
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")


def write_nothing(path: Path) -> None:
    path.write_bytes(b"")


OTHERS = [write_as_webdataset, write_as_pax, write_compressed, write_around_ours, write_no_tar, write_nothing]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("write", OTHERS)
def test_what_others_wrote_is_left_alone_with_a_sentence(sound, tmp_path, write):
    shutil.copytree(sound, tmp_path / "ours")
    (tmp_path / "theirs").mkdir()
    write(tmp_path / "theirs" / "shard-000000.tar")
    before = bytes_of(tmp_path / "theirs")
    for verb in (repair, reindex):
        with pytest.raises(DataError, match=r"this project has not written the file, so it is left as it is; .*shard-000000.tar"):
            verb(tmp_path / "theirs", 1)
    (problem, _) = verify(tmp_path / "theirs", True, 1)["problems"][::-1]
    assert "has not written the file" in problem["reason"]
    with pytest.raises(DataError, match="lies where a shard would be written"):
        ShardWriter(tmp_path / "theirs")
    with pytest.raises(DataError, match="lies where a shard would be written"):
        ShardWriter(tmp_path / "theirs", resume=True)
    assert bytes_of(tmp_path / "theirs") == before


@pytest.mark.parametrize("write", OTHERS)
def test_beside_ours_what_others_wrote_is_named_and_left_alone(sound, tmp_path, write):
    folder = Path(shutil.copytree(sound, tmp_path / "ours"))
    write(folder / "theirs.tar")
    before = bytes_of(folder)
    (problem,) = verify(folder, False, 1)["problems"]
    assert (problem["shard"], "has not written" in problem["reason"]) == ("theirs.tar", True)
    assert reindex(folder, 1) == {"shards": 2, "samples": 12, "left_alone": ["theirs.tar"]}
    assert bytes_of(folder) == before
    flip(folder / FIRST, 700)
    assert repair(folder, 1)["left_alone"] == ["theirs.tar"]
    assert (folder / "theirs.tar").read_bytes() == before["theirs.tar"]
    assert len(Dataset.open(folder)) == 11


def test_a_file_of_others_in_a_shards_place_is_left_alone(folder):
    write_as_webdataset(folder / SECOND)
    before = (folder / SECOND).read_bytes()
    assert all("in the shard's place lies another file" in problem["reason"] for problem in verify(folder, False, 1)["problems"])
    assert len(repair(folder, 1)["lost"]) == 6
    assert (folder / SECOND).read_bytes() == before
    assert len(Dataset.open(folder)) == 6


def test_an_index_of_others_is_left_alone(folder):
    (folder / DATASET).write_text('{"__kind__": "wids-shard-index-v1", "shardlist": []}')
    before = bytes_of(folder)
    for verb in (repair, reindex):
        with pytest.raises(DataError, match=r"dataset\.json was not written by this project and is left as it is"):
            verb(folder, 1)
    assert bytes_of(folder) == before


def test_hidden_files_beside_shards_are_nobodys_shards(folder):
    for name in ("._shard-000000.tar", ".DS_Store", ".nfs000000000001.tar", "._x.tar.tmp"):
        (folder / name).write_bytes(b"\0\5\x16\7" + bytes(200))
    before = bytes_of(folder)
    assert verify(folder, True, 1)["sound"]
    assert reindex(folder, 1) == {"shards": 2, "samples": 12}
    assert repair(folder, 1) == {"shards": 2, "samples": 12, "lost": []}
    assert len(list(Dataset.open(folder))) == 12
    assert bytes_of(folder) == before


def test_a_second_repair_keeps_what_the_first_put_aside(folder):
    for name in (f"{FIRST}.damaged", f"{FIRST}.damaged.2"):
        flip(folder / FIRST, 700)
        damaged = (folder / FIRST).read_bytes()
        repair(folder, 1)
        assert (folder / name).read_bytes() == damaged


def test_a_record_that_declares_another_size_than_its_image_has_is_found(tmp_path, monkeypatch):
    """As sets do that were written before turned pictures were upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.new("RGB", (20, 10)).save(file, "JPEG", exif=exif)
    monkeypatch.setattr("laid_ds.data.header.QUARTER_TURNS", ())
    write_dataset(tmp_path / "set", [replace(SAMPLES[2], images=(file.getvalue(), file.getvalue()))])
    monkeypatch.undo()
    assert verify(tmp_path / "set", False, 1)["sound"]
    (problem,) = verify(tmp_path / "set", True, 1)["problems"]
    assert "image 0 is declared as" in problem["reason"]

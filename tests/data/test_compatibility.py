"""Law: stock webdataset, wids, megatron-energon and tar read what we write, byte for byte."""

import io
import json
import subprocess
import sys
import tarfile

import pytest
from data_samples import make_sample

from laid_ds.data.record import encode

SAMPLES = [make_sample(i, i % 4) for i in range(25)]  # as in the fixture `dataset`


def members(sample) -> dict[str, bytes]:
    """Suffix -> bytes, as every reader of such tars should see the sample."""
    fmt = ("jpg", "png", "webp")[int(sample.key[-5:]) % 3]
    return {"json": encode(sample)} | {f"{index:03d}.{fmt}": image for index, image in enumerate(sample.images)}


def test_tar_reads_each_member(dataset, tmp_path):
    found = {}
    for path in sorted((tmp_path / "set").glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
        subprocess.run(["tar", "tf", path], check=True, stdout=subprocess.DEVNULL)
    assert found == {f"{sample.key}.{suffix}": data for sample in SAMPLES for suffix, data in members(sample).items()}


def test_webdataset_reads_each_sample(dataset, tmp_path):
    import webdataset

    urls = sorted(str(path) for path in (tmp_path / "set").glob("*.tar"))
    read = {sample["__key__"]: sample for sample in webdataset.WebDataset(urls, shardshuffle=False)}
    assert list(read) == [sample.key for sample in SAMPLES]
    for sample in SAMPLES:
        assert {name: data for name, data in read[sample.key].items() if not name.startswith("__")} == members(sample)


def test_wids_reads_each_sample_by_index(dataset, tmp_path):
    wids = pytest.importorskip("wids", reason="wids is not installed (the extra `dev`)")
    read = wids.ShardListDataset(str(tmp_path / "set" / "dataset.json"), cache_dir=str(tmp_path / "cache"), keep=True, transformations=[])
    assert len(read) == 25
    for i in (24, 3, 0, 8):
        found = {name.removeprefix("."): data for name, data in read[i].items() if not name.startswith("__")}
        assert read[i]["__key__"] == SAMPLES[i].key
        assert {name: data.read() for name, data in found.items()} == members(SAMPLES[i])


def test_energon_makes_the_same_offsets_and_reads_each_sample(dataset, tmp_path):
    energon = pytest.importorskip("megatron.energon", reason="megatron-energon is not installed (`make test-energon` installs it)")
    offsets = {path: path.read_bytes() for path in (tmp_path / "set").glob("*.idx")}
    for path in offsets:
        path.unlink()
    command = [sys.executable, "-m", "megatron.energon.cli.main", "prepare", "--non-interactive", "--split-ratio", "1,0,0"]
    subprocess.run([*command, "--sample-type", "CrudeWebdataset", tmp_path / "set"], check=True, capture_output=True)
    assert {path: path.read_bytes() for path in offsets} == offsets

    @energon.stateless
    def cook(sample):
        parts = {name: sample[name] for name in sample if not name.startswith("__")}
        return energon.TextSample(**energon.basic_sample_keys(sample), text=parts)

    class Encoder(energon.DefaultTaskEncoder):
        cookers = (energon.Cooker(cook),)
        decoder = None

        def batch(self, samples):
            return samples

    stream = energon.get_train_dataset(
        str(tmp_path / "set"),
        batch_size=1,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=Encoder(),
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
        repeat=False,
    )
    read = {sample.__key__.rpartition("/")[2]: sample.text for (sample,) in energon.get_loader(stream)}
    assert read.keys() == {sample.key for sample in SAMPLES}
    assert read[SAMPLES[3].key] == members(SAMPLES[3])


def test_the_record_is_plain_json(dataset):
    text, *_ = dataset.parts(5)
    record = json.load(io.BytesIO(text))
    assert record["v"] == 1
    assert record["turns"][0]["segments"] == [{"i": 0}, {"t": "which one?"}]
    assert record["turns"][0]["needles"] == [0]
    assert record["images"][0].keys() == {"w", "h", "fmt", "bytes", "crc32"}

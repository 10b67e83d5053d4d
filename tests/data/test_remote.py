"""Law: bytes from a URL are used only if they are those that were written, and the cache stays within its bound."""

import http.server
import threading
from pathlib import Path
from typing import ClassVar

import pytest
from data_samples import make_sample, write_dataset

from laid_ds.data.dataset import Dataset
from laid_ds.data.index import ShardIndex
from laid_ds.data.record import DataError
from laid_ds.data.stream import Stream


class Unreliable(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; cuts the connection in the middle of the next `cuts` shards, and flips a byte in the next `flips`."""

    cuts = 0
    flips = 0
    asked: ClassVar[list[str]] = []

    def do_GET(self):
        type(self).asked.append(self.path)
        data = Path(self.translate_path(self.path)).read_bytes()
        is_shard = self.path.endswith(".tar")
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if is_shard and type(self).cuts > 0:
            type(self).cuts -= 1
            data = data[: len(data) // 2]
        elif is_shard and type(self).flips > 0:
            type(self).flips -= 1
            data = data[:700] + bytes([data[700] ^ 1]) + data[701:]
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """(handler class, URL of a set of 12 samples in four shards, the local set)."""
    local = write_dataset(tmp_path / "set", [make_sample(i, 1) for i in range(12)], samples_per_shard=3)
    monkeypatch.setattr("laid_ds.data.remote.PAUSE_SECONDS", 0.01)
    handler = type("Handler", (Unreliable,), {"asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: handler(*args, directory=str(tmp_path / "set"))) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield handler, f"http://127.0.0.1:{running.server_port}", local
        running.shutdown()


def shards_asked(handler) -> int:
    return sum(path.endswith(".tar") for path in handler.asked)


def same_samples(remote: Dataset, local: Dataset) -> bool:
    return [(sample.key, sample.images) for sample in remote] == [(sample.key, sample.images) for sample in local]


def test_a_remote_set_reads_the_same_and_each_shard_comes_once(server, tmp_path):
    handler, url, local = server
    remote = Dataset.open(url, cache_folder=tmp_path / "cache")
    assert remote.fingerprint == local.fingerprint
    for _ in range(2):
        assert same_samples(remote, local)
    assert same_samples(Dataset.open(url, cache_folder=tmp_path / "cache"), local)
    assert shards_asked(handler) == 4


def test_a_cut_connection_and_a_changed_byte_are_noticed_and_tried_again(server, tmp_path, caplog):
    handler, url, local = server
    handler.cuts, handler.flips = 1, 1
    assert same_samples(Dataset.open(url, cache_folder=tmp_path / "cache"), local)
    assert shards_asked(handler) == 6
    assert "attempt 1 failed" in caplog.text


def test_a_source_that_stays_broken_is_given_up_with_the_shard_named(server, tmp_path):
    handler, url, _ = server
    handler.cuts = 99
    remote = Dataset.open(url, cache_folder=tmp_path / "cache")
    with pytest.raises(DataError, match=r"given up after 3 attempts"):
        remote.read(0)
    handler.cuts, handler.flips = 0, 99
    with pytest.raises(DataError, match=r"others than the index says .shard shard-000000.tar"):
        remote.read(0)
    assert not list((tmp_path / "cache").rglob("*.tar"))


def test_the_cache_keeps_to_its_bound(server, tmp_path):
    _, url, local = server
    bound = 2 * max(shard.num_bytes for shard in local.shards)
    remote = Dataset.open(url, cache_folder=tmp_path / "cache", cache_bytes=bound)
    for sample in remote:
        assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.tar")) <= bound, sample.key
    with pytest.raises(DataError, match=r"a cache of 1000"):
        Dataset.open(url, cache_folder=tmp_path / "other", cache_bytes=1000)


def test_a_stream_over_a_remote_set_is_the_local_one(server, tmp_path):
    _, url, local = server

    def batches(dataset, workers):
        stream = Stream(dataset, micro_batch=4, rank=0, world_size=1, seed=1, shuffle=6, workers=workers, prepare=keys)
        return [batch for _, batch in zip(range(5), stream, strict=False)]

    assert batches(Dataset.open(url, cache_folder=tmp_path / "cache"), 2) == batches(local, 0)


def keys(batch):
    return [(position, sample.key) for position, sample in batch]


def test_a_pipe_and_a_missing_set(server, tmp_path):
    _, _, local = server
    assert same_samples(Dataset.open(f"pipe:cat {tmp_path}/set/{{}}", cache_folder=tmp_path / "cache"), local)
    with pytest.raises(DataError, match=r"given up after 3 attempts"):
        Dataset.open(f"pipe:cat {tmp_path}/none/{{}}", cache_folder=tmp_path / "cache")


def test_s3_goes_through_the_aws_command(server, tmp_path, monkeypatch):
    _, _, local = server
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "aws"
    fake.write_text(f'#!/bin/sh\n[ "$1 $2 $3 $5" = "s3 cp --quiet -" ] && cat "{tmp_path}/set/${{4##*/}}"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    assert same_samples(Dataset.open("s3://bucket/set", cache_folder=tmp_path / "cache"), local)


@pytest.mark.parametrize("name", ["../evil.tar", "a'; touch x; '.tar", ".hidden.tar", "x"])
def test_a_shard_name_cannot_leave_the_folder_or_reach_a_shell(name):
    with pytest.raises(DataError, match="cannot be the name of a shard"):
        ShardIndex.from_line(ShardIndex.of(name, 1024, "", []).line())

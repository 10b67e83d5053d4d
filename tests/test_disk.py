"""A disk that takes no more is one sentence that names it, whoever was writing; what was whole stays whole, nothing half-written stays."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from laid_ds import disk
from laid_ds.config import Checkpoint
from laid_ds.data.writer import write_whole
from laid_ds.disk import DiskError, no_room, whole_folder, writing
from laid_ds.runtime import checkpoint

HAS_NAMESPACES = bool(shutil.which("unshare")) and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
SMALL_DISK = pytest.mark.skipif(not HAS_NAMESPACES, reason="a mount namespace of its own cannot be made here (unshare -m needs root)")


@pytest.mark.parametrize(
    "number, words",
    [
        (errno.ENOSPC, "is full, "),
        (errno.EDQUOT, "is full for you: your quota is used up, "),
        (errno.EROFS, "is read-only; choose another place"),
    ],
)
def test_the_disk_is_named_with_what_is_needed_and_what_is_left(tmp_path, number, words):
    with pytest.raises(DiskError) as error:
        with writing(tmp_path / "not" / "yet", "checkpoint step_000002", 3_200_000_000):
            raise OSError(number, os.strerror(number))
    mount = next(path for path in (tmp_path, *tmp_path.parents) if os.path.ismount(path))
    said = str(error.value)
    assert said.startswith(f"checkpoint step_000002 (3.2 GB) cannot be written to {tmp_path / 'not' / 'yet'}: the disk at {mount} {words}")
    assert (" left; make room there" in said) == (number != errno.EROFS)


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "no"), RuntimeError("unexpected pos 64 vs 0"), ValueError("no disk")])
def test_what_is_not_the_disks_fault_is_passed_on(tmp_path, error):
    with pytest.raises(type(error)) as found:
        with writing(tmp_path, "it"):
            raise error
    assert found.value is error


def test_a_folder_that_is_made_beside_another_of_the_user_leaves_it_alone(tmp_path):
    """Also where it is called as a partial folder might be; what a killed process left is removed, what a living one has is not."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    mine, left, living = tmp_path / "set.partial", disk._place(tmp_path / "set", dead.pid), disk._place(tmp_path / "set", os.getppid())
    for folder in (mine, left, living):
        folder.mkdir()
        (folder / "notes.txt").write_text("precious")
    with whole_folder(tmp_path / "set", "it") as partial:
        partial.mkdir()
        (partial / "file").write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([living.name, "set", "set.partial"])
    assert (mine / "notes.txt").read_text() == "precious"


def test_two_that_make_the_same_folder_are_told(tmp_path):
    def write() -> None:
        with whole_folder(tmp_path / "set", "it") as partial:
            partial.mkdir()
            (tmp_path / "set").mkdir()
            (tmp_path / "set" / "file").write_text("the other's")

    with pytest.raises(ValueError, match="set has been written by another process meanwhile"):
        write()
    assert [path.name for path in tmp_path.rglob("*")] == ["set", "file"]


def test_room_is_looked_for(tmp_path):
    assert no_room(tmp_path, "it", 1) == ""
    assert "it (1,000,000,000.0 GB) cannot be written" in no_room(tmp_path, "it", 10**18)


class Engine:
    """Saves one file, or fails in the middle."""

    failure: Exception | None = None

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        (Path(folder) / tag).mkdir(parents=True)
        (Path(folder) / tag / "model_states.pt").write_bytes(b"model" * 1000)
        if self.failure:
            raise self.failure


@pytest.mark.parametrize(
    "granted, room", [("000001ffffffffff", 900), ("000001fffeffffff", 100), ("0000000000000000", 100)], ids=["root", "container", "user"]
)
def test_what_a_disk_keeps_for_root_is_no_room_for_others(tmp_path, monkeypatch, granted, room):
    """Root in a container has user id 0 and mostly not the right to the reserve."""
    (tmp_path / "status").write_text(f"Name:\tpython\nCapEff:\t{granted}\n")
    monkeypatch.setattr(disk, "STATUS", tmp_path / "status")
    told = SimpleNamespace(f_frsize=10**8, f_blocks=1000, f_bfree=90, f_bavail=10, f_files=5, f_favail=5)
    monkeypatch.setattr(disk.os, "statvfs", lambda path: told)
    assert no_room(tmp_path, "a file", room * 10**7) == ""
    assert f"has too little room, {room / 100:.1f} GB left" in no_room(tmp_path, "a file", room * 10**7 + 1)


def test_a_checkpoint_without_room_is_refused_before_it_is_begun(tmp_path, monkeypatch):
    checkpoint.save(Engine(), tmp_path, {"step": 2}, Checkpoint())
    monkeypatch.setattr(disk, "_left", lambda folder: 4000)
    with pytest.raises(ValueError, match=r"checkpoint step_000004 \(0\.0 MB\) cannot be written to .*: the disk .* has too little room, "):
        checkpoint.save(Engine(), tmp_path, {"step": 4}, Checkpoint())
    assert checkpoint.latest(tmp_path).name == "step_000002"
    assert not (tmp_path / "checkpoints" / "step_000004").exists()


def test_a_checkpoint_that_fills_the_disk_leaves_the_one_before_it(tmp_path):
    engine = Engine()
    checkpoint.save(engine, tmp_path, {"step": 2}, Checkpoint())
    engine.failure = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(DiskError, match="is full"):
        checkpoint.save(engine, tmp_path, {"step": 4}, Checkpoint())
    assert checkpoint.latest(tmp_path).name == "step_000002"
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_000002"]


def test_a_file_is_there_with_all_its_bytes_or_as_it_was(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError):
        write_whole(tmp_path / "a", b"new")
    with pytest.raises(DiskError):
        checkpoint.write_durably(tmp_path / "a", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    def write(number_of_error: int = 0) -> None:
        with whole_folder(tmp_path / "model", "the model") as partial:
            partial.mkdir()
            (partial / "half").write_text("x")
            if number_of_error:
                raise OSError(number_of_error, os.strerror(number_of_error))

    with pytest.raises(DiskError):
        write(errno.ENOSPC)
    assert not list(tmp_path.iterdir())
    write()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


WRITERS = {
    "torch": 'torch.save(torch.zeros(1 << 20), folder / "x.pt")',
    "safetensors": 'safetensors.torch.save_file({"x": torch.zeros(1 << 20)}, folder / "x.safetensors")',
    "numpy": 'numpy.save(folder / "x.npy", numpy.zeros(1 << 20))',
    "json": '(folder / "x.json").write_text("x" * (1 << 22))',
}
SAVE = """
import sys
from pathlib import Path
import numpy, safetensors.torch, torch
from laid_ds.disk import DiskError, writing
folder = Path(sys.argv[1])
try:
    with writing(folder, "the file"):
        {act}
except DiskError as error:
    print(error)
"""
ON_SMALL_DISK = 'mount -t tmpfs -o size=1m none "$0" && exec "$@"'


@SMALL_DISK
@pytest.mark.parametrize("library", WRITERS)
def test_on_a_full_disk_every_library_gives_the_same_sentence(tmp_path, library):
    python = [sys.executable, "-c", SAVE.format(act=WRITERS[library]), str(tmp_path)]
    found = subprocess.run(["unshare", "-m", "sh", "-c", ON_SMALL_DISK, str(tmp_path), *python], capture_output=True, text=True)
    assert found.stdout.startswith(f"the file cannot be written to {tmp_path}: the disk at {tmp_path} is full, "), found.stderr


WRITE = """
import sys; sys.path[:0] = [{tests!r}, {root!r}]
from data_samples import make_sample
from laid_ds.data.writer import ShardWriter
from laid_ds.disk import DiskError
try:
    with ShardWriter({folder!r}, samples_per_shard=60) as writer:
        for number in range(2000):
            writer.write(make_sample(number, 2))
except DiskError as error:
    print(error)
import os
print(sorted(os.listdir({folder!r})))
"""


@SMALL_DISK
def test_on_a_full_disk_a_writer_leaves_whole_shards_alone(tmp_path):
    code = WRITE.format(tests=str(Path(__file__).parent / "data"), root=os.getcwd(), folder=str(tmp_path / "set"))
    words = ["unshare", "-m", "sh", "-c", ON_SMALL_DISK, str(tmp_path), sys.executable, "-c", code]
    found = subprocess.run(words, capture_output=True, text=True)
    assert f"cannot be written to {tmp_path / 'set'}: the disk at {tmp_path} is full" in found.stdout, found.stderr
    assert "shard-000000.tar" in found.stdout
    assert ".tmp" not in found.stdout

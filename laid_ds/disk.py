"""A disk that takes no more: one sentence for the user, whatever the error of the library that was writing."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

REASONS = {
    errno.ENOSPC: "is full",
    errno.EDQUOT: "is full for you: your quota is used up",
    errno.EROFS: "is read-only",
    errno.EFBIG: "takes no file of this size",
}
TRIAL_BYTES = 1 << 20
STATUS, CAP_SYS_RESOURCE = Path("/proc/self/status"), 24
"""Where Linux says what a process may do, and the number of the right to a disk's reserve."""


class DiskError(ValueError):
    """What was to be written has no place on its disk."""


@contextmanager
def writing(folder: Path, what: str, needed_bytes: int | None = None) -> Iterator[None]:
    """Inside the block, `what` is written below `folder`. Raises DiskError when the disk is why that fails.

    Some libraries that write files themselves (torch, numpy) do not say why they fail: after their errors it is tried whether the disk
    takes a file.
    """
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        number = _number_of(error) or _tried(folder, needed_bytes)
        if number not in REASONS:
            raise
        raise DiskError(_sentence(folder, what, needed_bytes, number)) from error


@contextmanager
def whole_folder(output: Path, what: str, needed_bytes: int | None = None) -> Iterator[Path]:
    """A folder that appears whole or not at all: yields the place to write it. Raises DiskError as `writing`, and ValueError where another
    process has written the folder meanwhile.

    The place is this process's own, hidden beside the folder; what a killed process of this machine has left there is removed.
    """
    mine = _place(output, os.getpid())
    for left in output.parent.glob(_place(output, "*").name):
        if left == mine or not psutil.pid_exists(int(left.name.split(".")[-2])):
            shutil.rmtree(left, ignore_errors=True)
    try:
        with writing(output.parent, what, needed_bytes):
            mine.mkdir(parents=True)
            yield mine / output.name
            try:
                os.replace(mine / output.name, output)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                raise ValueError(f"{output} has been written by another process meanwhile; look at it, or choose another folder") from None
    finally:
        shutil.rmtree(mine, ignore_errors=True)


def _place(output: Path, process: int | str) -> Path:
    return output.with_name(f".{output.name}.{socket.gethostname()}.{process}.partial")


def _number_of(error: Exception) -> int | None:
    """The errno that an error tells; those of libraries in Rust tell it in their text."""
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else getattr(error, "errno", None)


def no_room(folder: Path, what: str, needed_bytes: int) -> str:
    """The sentence when fewer bytes are left, else "". A file system that does not say, such as a mounted bucket, passes."""
    left = _left(folder)
    lacks = left is not None and left < needed_bytes
    return _sentence(folder, what, needed_bytes, errno.ENOSPC, "has too little room") if lacks else ""


def nearest(path: Path) -> Path:
    """The path itself, or the nearest of the folders above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _sentence(folder: Path, what: str, needed_bytes: int | None, number: int, reason: str = "") -> str:
    place = nearest(folder)
    mount = next(path for path in (place, *place.parents) if os.path.ismount(path))
    left = _left(place)
    room = "" if left is None or number == errno.EROFS else f", {_size(left)} left"
    if number == errno.ENOSPC and os.statvfs(place).f_files and not os.statvfs(place).f_favail:
        room = ", no room for another file (inodes)"
    need = "" if needed_bytes is None else f" ({_size(needed_bytes)})"
    return f"{what}{need} cannot be written to {folder}: the disk at {mount} {reason or REASONS[number]}{room}; {_way_out(number)}"


def _way_out(number: int) -> str:
    make_room = "make room there, and the same command goes on from what is whole"
    return make_room if number in (errno.ENOSPC, errno.EDQUOT) else "choose another place, or mount it otherwise"


def _left(folder: Path) -> int | None:
    """Bytes that this user may still write; None where the file system does not say."""
    disk = os.statvfs(nearest(folder))
    return disk.f_frsize * (disk.f_bfree if _takes_reserve() else disk.f_bavail) if disk.f_blocks else None


def _takes_reserve() -> bool:
    """Whether this process may write to blocks that a file system keeps for root: root in a container mostly may not."""
    told = STATUS.read_text().splitlines() if STATUS.is_file() else []
    granted = [int(line.split()[1], 16) for line in told if line.startswith("CapEff:")]
    return bool(granted[0] >> CAP_SYS_RESOURCE & 1) if granted else os.geteuid() == 0


def _tried(folder: Path, needed_bytes: int | None) -> int | None:
    """The errno that a file meets there, or None."""
    left = _left(folder)
    if needed_bytes is not None and left is not None and left < needed_bytes:
        return errno.ENOSPC
    try:
        with tempfile.TemporaryFile(dir=nearest(folder)) as file:
            file.write(bytes(TRIAL_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno if error.errno in REASONS else None
    return None


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"

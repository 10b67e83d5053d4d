"""One training in a run folder: every rank locks its part of RUN/lock for as long as its process lives, rank r the byte r.

These are POSIX record locks (fcntl): the kernel lets go of them when the process ends, however it ends, and forked processes have no part
in them. On a network file system the server keeps them, for all nodes, until a dead node's lease has run out. The file itself stays and
blocks nobody; it says who held it last. Who begins locks all bytes at once: while a rank of another training lives it waits a little, since
that one may be ending, and is then refused.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from laid_ds.disk import writing

FILE = "lock"
HERE_SECONDS = 20.0
"""So long a holder on this machine may take to end: ranks notice a dead one after 10 s if not before, devices are given back."""
ELSEWHERE_SECONDS = 120.0
"""So long one on another machine may: an NFS server keeps what a dead node had locked for a lease, usually of 90 s."""
POLL_SECONDS = 0.2
BUSY = (errno.EACCES, errno.EAGAIN)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, pid


def take(folder: Path) -> int:
    """Lock the folder against all others, for rank 0; returns the handle, which nobody may close: that would give the lock up.

    Raises ValueError, saying who holds it. A file system without locks is told of, and nothing is locked.
    """
    handle = _open(folder)
    with _locks(folder, tell=True):
        _wait(folder, handle, lambda: _locked(handle))
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID"), "since": time.strftime("%F %T %z")}
    with writing(folder, FILE):
        text = json.dumps(holder).encode()
        os.ftruncate(handle, os.pwrite(handle, text, 0))
    return handle


def let_ranks_in(folder: Path, handle: int) -> None:
    """Rank 0 keeps its own byte of what it took."""
    with _locks(folder):
        fcntl.lockf(handle, fcntl.LOCK_UN, 0, 1)


def join(folder: Path, rank: int) -> None:
    """Lock this rank's byte, after rank 0 has let the ranks in; the handle stays open as long as the process."""
    handle = _open(folder)
    with _locks(folder):
        assert _locked(handle, 1, rank), f"byte {rank} of {folder / FILE} is another's"


def wait_until_free(folder: Path) -> None:
    """Return when nobody holds the folder; nothing is taken. Raises ValueError, saying who does hold it, if that lasts."""
    if (folder / FILE).is_file():
        handle = _open(folder, os.O_RDONLY)
        try:
            with _locks(folder):
                _wait(folder, handle, lambda: _is_free(handle))
        finally:
            os.close(handle)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No training runs in the folder, and none begins there until the end of the block. Raises ValueError, saying who holds it."""
    handle = _open(folder)
    try:
        with _locks(folder, tell=True):
            if not _locked(handle):
                raise ValueError(_in_use(folder, _holder(handle)) + f"; `touch {folder}/stop` makes it save and end")
        yield
    finally:
        os.close(handle)


def _open(folder: Path, flags: int = os.O_RDWR | os.O_CREAT) -> int:
    path = folder / FILE
    try:
        with writing(folder, FILE):
            if flags & os.O_CREAT:  # a node of a shared file system may not see for a while what another has made: this asks the server
                folder.mkdir(parents=True, exist_ok=True)
            return os.open(path, flags, 0o666)
    except OSError as error:
        raise ValueError(f"{path} cannot be opened: {error.strerror}; whoever trains in a folder must be allowed to write it") from None


def _wait(folder: Path, handle: int, is_free: Callable[[], bool]) -> None:
    """Until it is free. Raises ValueError when the holder does not end in the time that its end may take."""
    began, told = time.monotonic(), False
    while not is_free():
        holder = _holder(handle)
        elsewhere = holder.get("host", socket.gethostname()) != socket.gethostname()
        seconds = ELSEWHERE_SECONDS if elsewhere else HERE_SECONDS
        if time.monotonic() - began > seconds:
            way_out = f"stop it (`touch {folder}/stop`), or give another output=..."
            if elsewhere:
                way_out += f"; if {holder['host']} is dead and its file server does not let go, remove {folder / FILE}"
            raise ValueError(f"{_in_use(folder, holder)}; {way_out}")
        if not told:
            sys.stderr.write(f"laid: {_in_use(folder, holder)}; waiting up to {seconds:g} s for its end\n")
            told = True
        time.sleep(POLL_SECONDS)


def _in_use(folder: Path, holder: dict[str, Any]) -> str:
    if not holder:
        return f"{folder} is in use by another training"
    job = f" of SLURM job {holder['job']}" if holder["job"] else ""
    return f"{folder} is in use by the training of process {holder['pid']}{job} on {holder['host']}, since {holder['since']}"


def _holder(handle: int) -> dict[str, Any]:
    """What the last holder wrote; empty while one is about to."""
    try:
        holder = json.loads(os.pread(handle, 4096, 0))
        return holder if holder.keys() >= {"host", "pid", "job", "since"} else {}
    except (ValueError, AttributeError):
        return {}


def _locked(handle: int, length: int = 0, start: int = 0) -> bool:
    """Whether the bytes (length 0: all from `start` on) are ours now."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
    except OSError as error:
        if error.errno not in BUSY:
            raise
        return False
    return True


def _is_free(handle: int) -> bool:
    """Whether all bytes could be locked; asking disturbs nobody who does lock them."""
    asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    return struct.unpack(FLOCK, fcntl.fcntl(handle, fcntl.F_GETLK, asked))[0] == fcntl.F_UNLCK


@contextmanager
def _locks(folder: Path, tell: bool = False) -> Iterator[None]:
    """Locks are used in the block: without effect where the file system has none, which can be told of."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise ValueError(f"{folder / FILE} cannot be locked: {error.strerror}; give another output=...") from None
        if tell:
            reason = f"the file system of {folder} has no locks ({error.strerror})"
            sys.stderr.write(f"laid: {reason}: see to it yourself that nothing else trains there at the same time\n")

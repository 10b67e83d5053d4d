"""How processes end: when the one that started them is gone, however it ended (Linux sees to it, by prctl: nothing polls, nothing is left),
and with the status they have, whatever their libraries would do at the last moment."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import threading
from typing import NoReturn

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_libc = ctypes.CDLL(None, use_errno=True)


def end_with(parent: int) -> None:
    """From now on this process is killed when `parent`, its parent's pid, ends; at once where it has ended already.

    To be called in the child, before it starts others of its own: it outlives exec, and is not inherited by fork.
    """
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def adopt_orphans() -> None:
    """From now on processes below this one whose parent ends become its own children, so that it can find them."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def end(status: int) -> NoReturn:
    """End this process with `status`: as Python does it, its threads are waited for, and what was registered for its exit is done; but
    nothing is torn down after that. A rank's native threads may abort a process that is tearing down ("terminate called without an active
    exception"), and -6 would take the place of `status`."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)):
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}, {value}): {os.strerror(number)}")

"""A rank ends with the launchers that started it: none trains on unseen, with nobody to stop it.

It ends at once, without a save: how long one may take nobody has said, and what follows may already wait for the folder and the devices.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

import psutil

from laid_ds.parent import end_with

MODULE = "laid_ds.train"
STARTED_BY = "LAID_STARTED_BY"  # the pid of `laid train`
SECONDS = 1.0


def end_with_launchers(environ: Mapping[str, str]) -> None:
    """Call it first in a rank. Launchers are the processes above this one whose command line names laid_ds.train: torchrun, both of
    DeepSpeed's, whoever started them; and `laid train`. A rank of srun has none, it ends with its job.
    """
    parent = os.getppid()
    if STARTED_BY in environ and not psutil.pid_exists(int(environ[STARTED_BY])):
        os.kill(os.getpid(), signal.SIGKILL)  # it went before we could ask to be told
    launchers = [process for process in psutil.Process().parents() if _names_us(process)]
    if any(process.pid == parent for process in launchers):
        end_with(parent)
    others = [process for process in launchers if process.pid != parent]
    if others:
        threading.Thread(target=_watch, args=(others,), daemon=True).start()


def _watch(launchers: Sequence[psutil.Process]) -> None:
    """Linux tells a process of its parent's end, and of nobody else's."""
    while all(map(_lives, launchers)):
        time.sleep(SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _names_us(process: psutil.Process) -> bool:
    with suppress(psutil.Error):  # gone, or another user's
        return MODULE in process.cmdline()
    return False

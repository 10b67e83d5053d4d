"""A rank ends with the launchers that started it, and with the other ranks of its launcher: none trains on unseen, or waits for the dead.

When its own launcher is gone it ends without a save: how long one may take nobody has said, and what follows may already wait for the
folder and the devices. DeepSpeed's outer launcher is another thing: at Ctrl-C it goes first, while the inner one lets the ranks save.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from contextlib import suppress

import psutil

from laid_ds.parent import end_with

MODULE = "laid_ds.train"
STARTED_BY = "LAID_STARTED_BY"  # the pid of `laid train`
POLL_SECONDS = 1.0
GRACE_SECONDS = 10.0
"""After another rank's end, for what a rank then has to say and to keep. A GPU that waits for a dead one does not notice by itself, and the
launchers give it 30 s."""
SAVE_SECONDS = 30.0
"""After an outer launcher's end, for the step and the save; so much the inner one gives, too."""
_leaving = threading.Event()


def end_with_launchers(environ: Mapping[str, str]) -> None:
    """Call it first in a rank. Launchers are the processes above this one whose command line names laid_ds.train: torchrun, both of
    DeepSpeed's, whoever started them; and `laid train`. A rank of srun has none: its job ends it.
    """
    if STARTED_BY in environ and not psutil.pid_exists(int(environ[STARTED_BY])):
        _end()  # it went before we could ask to be told
    launchers = [process for process in psutil.Process().parents() if _names_us(process)]
    if not launchers:
        return
    if launchers[0].pid == os.getppid():
        end_with(launchers[0].pid)
    ranks = int(environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or 1)
    threading.Thread(target=_watch, args=(launchers, ranks), daemon=True).start()


def leave() -> None:
    """This rank is ending by itself: the others' ends do not concern it any more."""
    _leaving.set()


def _watch(launchers: list[psutil.Process], number: int) -> None:
    """Linux tells a process of its parent's end, and of nobody else's."""
    ranks: dict[int, psutil.Process] = {}
    while not _leaving.wait(POLL_SECONDS):
        if not all(map(_lives, launchers)):
            os.kill(os.getpid(), signal.SIGTERM)  # which asks for a save (stop.py)
            return _end_after(SAVE_SECONDS)
        if len(ranks) < number:
            ranks |= _ranks_of(launchers[0])
        if not all(map(_lives, ranks.values())):
            return _end_after(GRACE_SECONDS)


def _ranks_of(launcher: psutil.Process) -> dict[int, psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return {process.pid: process for process in launcher.children() if _names_us(process)}
    return {}


def _end_after(seconds: float) -> None:
    if not _leaving.wait(seconds):
        _end()


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _names_us(process: psutil.Process) -> bool:
    with suppress(psutil.Error):  # gone, or another user's
        return MODULE in process.cmdline()
    return False

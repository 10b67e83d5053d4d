"""`laid eval` inside a job of `laid-launch eval`: how an attempt ended is a file in the job's folder, as of a training (runtime/stop.py).

An evaluation has nothing to save, since each answer is on the disk: whoever is asked to stop says so there and ends at once. SIGTERM alone
does not ask: launchers send it to the ranks that are left of a step which has lost one, and that is a failure. The job that means it makes
the file `stop`, too.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from laid_ds.runtime.stop import DONE, FILE, REQUEUE, SIGNALS, STOP

FOLDER = "LAID_JOB_FOLDER"
EVERY_SECONDS = 0.5
PATIENCE_SECONDS = 5.0
"""From SIGTERM on, for the file that says that it was meant; a warned process and its job hear of it at about the same time."""


def leave_when_asked(environ: Mapping[str, str]) -> None:
    """From now on a signal of runtime/stop.py, or the file `stop`, ends this process, in a job; elsewhere nothing changes."""
    if FOLDER not in environ:
        return
    folder = Path(environ[FOLDER])
    for number in SIGNALS:
        signal.signal(number, partial(_hear, folder))
    threading.Thread(target=_watch, args=(folder,), daemon=True).start()


def note_done(environ: Mapping[str, str]) -> None:
    """Every question is answered: a job that starts once more leaves at once."""
    if FOLDER in environ:
        _write(Path(environ[FOLDER]) / DONE, {"time": time.time()})


def _hear(folder: Path, number: int, frame: object) -> None:
    if number == signal.SIGTERM:
        time.sleep(PATIENCE_SECONDS)  # while the other thread looks for the file
        os._exit(1)  # what is done stays done: the job looks at the file alone
    _leave(folder, signal.Signals(number).name)


def _watch(folder: Path) -> None:
    while not (folder / STOP).exists():
        time.sleep(EVERY_SECONDS)
    _leave(folder, FILE)


def _leave(folder: Path, reason: str) -> None:
    """With a status that makes launchers end the other ranks, too."""
    if not (folder / DONE).exists():
        _write(folder / REQUEUE, {"reason": reason})
        os._exit(1)


def _write(path: Path, content: dict[str, object]) -> None:
    """Whole or not at all, whichever ranks do it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content) + "\n")
    os.replace(partial, path)

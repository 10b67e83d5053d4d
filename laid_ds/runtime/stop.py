"""Stopping cleanly: a signal, a file or the clock asks; the step in progress is finished, all ranks agree, the run is saved.

How an attempt ended is a file in the run folder, the only thing a job script has to look at: done.json (finished) or requeue.json (saved
and stopped: the same command goes on). Exit codes do not survive launchers. Heavy imports are left out: a rank listens before it has any.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

DONE, REQUEUE, STOP = "done.json", "requeue.json", "stop"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
FILE, CLOCK = "the file 'stop'", "stop.after_minutes"
REASONS = ("", *(number.name for number in SIGNALS), signal.SIGINT.name, FILE, CLOCK)


class StopRequest:
    """Remembers the first reason to stop."""

    def __init__(self) -> None:
        self.reason = ""
        self.started = time.time()

    def listen(self) -> StopRequest:
        """From the start of the process on: a warning that comes while models load must not kill it."""
        for number in SIGNALS:
            signal.signal(number, self._remember)
        return self

    def listen_to_ctrl_c(self) -> None:
        """Once the run can save; before that Ctrl-C ends the process."""
        signal.signal(signal.SIGINT, self._remember)

    def _remember(self, number: int, frame) -> None:
        self.reason = self.reason or signal.Signals(number).name

    def agreed(self, folder: Path, after_minutes: float | None) -> str:
        """Why all ranks stop now, or "". Collective: every rank calls it after every step."""
        from laid_ds.runtime import distributed

        if not self.reason and distributed.rank() == 0:
            late = after_minutes is not None and time.time() - self.started > 60 * after_minutes
            self.reason = FILE if (folder / STOP).exists() else CLOCK if late else ""
        (reason,) = distributed.largest([REASONS.index(self.reason)])
        return REASONS[int(reason)]


def clear(folder: Path, started: float) -> None:
    """Remove what earlier attempts said of their end. A stop file made since `started` (Unix time) asks this attempt, and stays."""
    (folder / REQUEUE).unlink(missing_ok=True)
    stop = folder / STOP
    if stop.exists() and stop.stat().st_mtime < started:
        stop.unlink()


def ignore_signals() -> None:
    """For the last moments of a process: a late signal must not change how a finished attempt ended."""
    for number in (*SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)

"""Stopping cleanly: a signal is remembered, the step in progress is finished, all ranks agree, the run is saved."""

from __future__ import annotations

import signal

from laid_ds import distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers the first signal. Install it once the process can save; before that the default action is right."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def install(self) -> StopRequest:
        for number in SIGNALS:
            signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, frame) -> None:
        self.signal = self.signal or number

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. Collective: every rank calls it after every step."""
        (asked,) = distributed.largest([float(self.signal is not None)])
        return asked > 0

"""A signal only sets a flag; the ranks agree on it at the step boundary.

SIGTERM (a scheduler, a launcher), SIGUSR1 (Slurm's --signal) and SIGINT (Ctrl-C) ask for a checkpoint and an end.
Nothing is done in the handler itself: a rank that saved alone would leave the others waiting in a collective.
"""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Remembers the first signal. Call `listen` once; then `requested` tells whether this rank was asked to stop."""

    def __init__(self) -> None:
        self.signal_name = ""

    def listen(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._remember)

    @property
    def requested(self) -> bool:
        return bool(self.signal_name)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name

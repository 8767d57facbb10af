"""SIGTERM and SIGINT, taken over before anything that is slow to load."""

from __future__ import annotations

import signal
import sys
from types import FrameType


class Stopping:
    """Counts the signals that ask a process to stop. Until `serving` is set, the first one ends it,
    with exit code 0: nothing was promised to anybody yet."""

    def __init__(self) -> None:
        self.signals = 0
        self.serving = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._take)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.signals += 1
        if not self.serving:
            sys.exit(0)

    def serve(self) -> None:
        """From now on signals are only counted. Ends the process where one came already: Python
        drops what is raised inside of some callbacks of an import."""
        self.serving = True
        if self.signals:
            sys.exit(0)

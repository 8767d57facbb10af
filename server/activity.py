"""What an engine's threads are at: whoever watches tells a step that hangs from a long one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Activity:
    """One piece of work for each thread, with the seconds that it is expected to take."""

    def __init__(self) -> None:
        self._present: dict[int, tuple[float, float]] = {}

    @contextmanager
    def working(self, expected_s: float) -> Iterator[None]:
        """This thread works inside, and may say so once; 0 seconds are unknown ones."""
        thread = threading.get_ident()
        assert thread not in self._present
        self._present[thread] = (time.perf_counter(), expected_s)
        try:
            yield
        finally:
            del self._present[thread]

    def longest(self) -> tuple[float, float]:
        """Seconds since the oldest work began, and those expected of it; zeros where none is."""
        # A copy in one go: the threads begin and end while this one looks.
        started, expected_s = min(self._present.copy().values(), default=(0.0, 0.0))
        return (time.perf_counter() - started, expected_s) if started else (0.0, 0.0)

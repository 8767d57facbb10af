"""Steps that were sent to the device: how far ahead of it the host is, how long each one takes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

# Steps that the host may be ahead of the device. Two keep it busy; more would make a request that
# arrives wait for steps that it cannot join.
RUN_AHEAD = 2


class StepTiming(NamedTuple):
    """A step that is over: its rows, pads not counted, and how long the device took."""

    model_rows: int
    guide_rows: int
    seconds: float


class InFlight:
    """On CUDA at most RUN_AHEAD steps; anywhere else a step is over once it was sent."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._sent: deque[tuple[torch.cuda.Event, torch.cuda.Event, int, int]] = deque()
        self._over: StepTiming | None = None

    @contextmanager
    def step(self, model_rows: int, guide_rows: int) -> Iterator[None]:
        """What is sent inside is one step; none where that raises."""
        if self._is_cuda:
            begin = recorded()
            yield
            self._sent.append((begin, recorded(), model_rows, guide_rows))
        else:
            started = time.perf_counter()
            yield
            self._over = StepTiming(model_rows, guide_rows, time.perf_counter() - started)

    def wait(self) -> StepTiming | None:
        """Wait until another step may be sent. The step that ended with that, if one did."""
        over, self._over = self._over, None
        if len(self._sent) == RUN_AHEAD:
            begin, end, model_rows, guide_rows = self._sent.popleft()
            end.synchronize()
            over = StepTiming(model_rows, guide_rows, begin.elapsed_time(end) / 1000)
        return over


def recorded() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event

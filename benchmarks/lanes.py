"""Arms that are timed in turns, each with its figures, its memory and its own errors."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from arms import Arm, Task, Times, timed

GIB = 2**30
# The grid points of the turn that is not counted.
SHORT = 3


class Lane:
    """One arm. Whatever it raises, and compilers raise anything, is its `error` and nobody else's.

    `peak` bytes are what it took at most, on CUDA, over what the others had.
    """

    def __init__(self, name: str, make: Callable[[], Arm], device: torch.device) -> None:
        self.name, self.device = name, device
        self.arm: Arm | None = None
        self.error = ""
        self.times: list[Times] = []
        self._resident = self.peak = 0
        self._attempt(lambda: self._make(make))

    def _make(self, make: Callable[[], Arm]) -> None:
        before = allocated(self.device)
        self.arm = make()
        self._resident = allocated(self.device) - before
        self.peak = peak(self.device) - before

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}".strip()[:500]
        if self.error:
            gc.collect()

    def begin(self, task: Task, batch: int, deadline: float) -> None:
        """A turn that is not counted, so that the next ones find everything compiled."""
        self.times = []
        if self.arm is not None:
            self.error = ""
            self._attempt(lambda: self._begin(task, batch, deadline))

    def _begin(self, task: Task, batch: int, deadline: float) -> None:
        assert self.arm is not None
        short = replace(task, steps=SHORT)
        timed(self.arm, short, batch, self.device)
        times = timed(self.arm, short, batch, self.device)
        needed_s = times.total_s + times.evaluate_s * (task.steps - SHORT) / (SHORT - 1)
        left_s = deadline - time.monotonic()
        if needed_s > left_s:
            raise TimeoutError(f"takes {needed_s:.0f} s, and {max(left_s, 0):.0f} s are left")

    def turn(self, task: Task, batch: int, deadline: float) -> None:
        """Nothing where the arm has failed, or the time is up and it has its figures."""
        late = self.times and time.monotonic() + self.times[-1].total_s > deadline
        if self.arm is not None and not self.error and not late:
            self._attempt(lambda: self._turn(task, batch))

    def _turn(self, task: Task, batch: int) -> None:
        assert self.arm is not None
        before = allocated(self.device)
        self.times.append(timed(self.arm, task, batch, self.device))
        self.peak = max(self.peak, self._resident + peak(self.device) - before)

    def figures(self, task: Task, batch: int) -> dict[str, Any]:
        """Of the turns so far, and the error."""
        figures: dict[str, Any] = {"arm": self.name, "batch": batch, "turns": len(self.times)}
        if self.times:
            steps = task.steps - 1
            figures |= {
                "images_per_s": batch / median(t.total_s for t in self.times),
                "ms_per_step": 1000 * median(t.evaluate_s for t in self.times) / steps,
                "decode_ms": 1000 * median(t.decode_s for t in self.times),
            }
        if self.device.type == "cuda":
            figures["peak_gib"] = self.peak / GIB
        return figures | ({"error": self.error} if self.error else {})


def in_turns(
    runs: Sequence[tuple[Lane, int]],
    task: Task,
    turns: int,
    deadline: float,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Fill the times of lanes with their batches. `between` is called after a turn of all."""
    for lane, batch in runs:
        lane.begin(task, batch, deadline)
    for _ in range(turns):
        for lane, batch in runs:
            lane.turn(task, batch, deadline)
        between()


def allocated(device: torch.device) -> int:
    """Bytes of tensors on a GPU, and the peak starts anew."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0

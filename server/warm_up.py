"""From a loaded runner to one that is fast: compile, capture, and measure every bucket."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from statistics import median

import torch

from rae.server.graphs import Buckets, Replayed
from rae.server.runner import Runner
from rae.server.step_times import StepTimes

log = logging.getLogger(__name__)

Say = Callable[[str], None]

# How long numbers of rows may be measured that need no preparation: 64 rows of the published XL
# take two CPU cores 30 s.
MEASURED_S = 1.0
REPEATS = 3
POWERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@torch.inference_mode()
def warm_up(runner: Runner, say: Say) -> StepTimes:
    """Make every bucket ready, the largest first, and say how it goes. A bucket that does not fit
    into the memory is given up, and `runner.buckets` is then smaller. `say` may raise to end it.

    Raises torch.OutOfMemoryError where not even the smallest fits.
    """
    evaluations = {"model": runner.model.rows}
    if runner.guide is not None:
        evaluations["guide"] = runner.guide.rows
    for name, rows in evaluations.items():
        runner.buckets = make_ready(rows, runner.buckets, name, say)
    runner.decoder.buckets = make_ready(runner.decoder.rows, runner.decoder.buckets, "decoder", say)
    tables = {name: measure(rows, runner.buckets, say) for name, rows in evaluations.items()}
    return StepTimes(
        tables["model"], tables.get("guide", {}), pads=runner.buckets.sizes is not None
    )


def make_ready(rows: Replayed, buckets: Buckets, name: str, say: Say) -> Buckets:
    """The buckets that fit into the memory; without any, one row is as good as all."""
    ready: list[int] = []
    for size in reversed(buckets.sizes or (1,)):
        say(f"{name}, {size} rows")
        try:
            rows(size)
            ready.append(size)
        except torch.OutOfMemoryError:
            if size <= 2 or buckets.sizes == (size,):
                raise
            torch.cuda.empty_cache()
            log.warning("%s: %d rows do not fit into the memory", name, size)
    return Buckets(ready[0], tuple(reversed(ready))) if buckets.sizes else buckets


def measure(rows: Replayed, buckets: Buckets, say: Say) -> dict[int, float]:
    """Seconds of an evaluation by number of rows: medians of every bucket, or of what goes in
    MEASURED_S where any number goes."""
    seconds: dict[int, float] = {}
    started = time.perf_counter()
    for size in buckets.sizes or (n for n in POWERS if n <= buckets.largest):
        say(f"measuring {size} rows")
        rows(size)
        seconds[size] = median(timed(rows, size) for _ in range(REPEATS))
        elapsed = time.perf_counter() - started
        if buckets.sizes is None and elapsed + 2 * (REPEATS + 1) * seconds[size] > MEASURED_S:
            break
    return seconds


def timed(rows: Replayed, size: int) -> float:
    synchronize()
    started = time.perf_counter()
    rows(size)
    synchronize()
    return time.perf_counter() - started


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

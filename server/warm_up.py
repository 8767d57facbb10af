"""From a loaded runner to one that is fast: compile, capture, and measure every bucket."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median

import torch

from rae.models.cache import cache_folder
from rae.models.checkpoint import Checkpoint
from rae.server.graphs import Buckets, Replayed, allow_compilations
from rae.server.memory import NoMemoryError, memory_errors
from rae.server.request import ImageSpec
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
def warm_up(runner: Runner, say: Say, before: StepTimes | None = None) -> StepTimes:
    """Make every bucket ready, the largest first, and say how it goes. A bucket that does not fit
    into the memory is given up, and `runner.buckets` is then smaller. `say` may raise to end it.
    Numbers of rows that would take long to measure are taken from `before`.

    Raises torch.OutOfMemoryError where not even the smallest fits.
    """
    allow_compilations()
    decoder, model, guide = runner.decoder, runner.model, runner.guide
    decoder.buckets = make_ready(decoder.rows, decoder.buckets, "decoder", say)
    smallest = runner.buckets(2)  # an image with CFG takes two rows
    runner.buckets = make_ready(model.rows, runner.buckets, "model", say, smallest)
    if guide is not None:
        runner.buckets = make_ready(guide.rows, runner.buckets, "guide", say, smallest)
        model.rows.keep(runner.buckets.sizes or ())
    exercise(runner, say)
    pads = runner.buckets.sizes is not None
    if before is None or pads:  # every bucket is measured, and no other number is evaluated
        before = StepTimes()
    return StepTimes(
        before.model | measure(model.rows, runner.buckets, say),
        before.guide | measure(guide.rows, runner.buckets, say) if guide is not None else {},
        pads=pads,
    )


def make_ready(rows: Replayed, buckets: Buckets, name: str, say: Say, smallest: int = 1) -> Buckets:
    """The buckets that fit into the memory; without any, one row is as good as all."""
    ready: list[int] = []
    sizes = buckets.sizes or (1,)
    for number, size in enumerate(reversed(sizes), 1):
        say(f"{name}, {size} rows ({number} of {len(sizes)})")
        if fits(rows, size):
            ready.append(size)
        elif size <= smallest:
            raise torch.OutOfMemoryError(f"{name}: {size} rows do not fit into the memory")
        else:
            log.warning("%s: %d rows do not fit into the memory", name, size)
    return Buckets(ready[0], tuple(reversed(ready))) if buckets.sizes else buckets


def fits(rows: Replayed, size: int) -> bool:
    try:
        with memory_errors():
            rows(size)
    except NoMemoryError:
        pass
    else:
        return True
    torch.cuda.empty_cache()  # out here: the exception held what had been computed
    return False


def exercise(runner: Runner, say: Say) -> None:
    """Steps of every kind and size, and a decoding: what is compiled or allocated at its first use
    is so before anybody waits."""
    for size in runner.buckets.sizes or (1,):
        say(f"steps of {size} rows")
        for method in (None, *runner.config.guidance_methods):
            spec = ImageSpec(
                class_label=0,
                seed=0,
                steps=2,
                cfg=1.0 if method is None else 2.0,
                guidance_method=method or "cfg",
            )
            num_images = max(1, size // runner.plan(spec).model_rows(0))
            slots = range(min(runner.num_slots, num_images))
            for slot in slots:
                runner.start(slot, spec)
            runner.step([(slot, 0) for slot in slots])
    runner.decode([0]).images()


def step_times_file(checkpoint: Checkpoint, runner: Runner) -> Path:
    """Where the times of this model on this machine are kept, in this form and precision."""
    kind = f"{runner.device.type}-{torch.get_num_threads()}-{runner.precision}-{runner.layers}"
    return cache_folder() / "step-times" / f"{checkpoint.sha256}-{kind}.json"


def remembered(path: Path) -> StepTimes:
    """What `remember` wrote for the same model and device; nothing where it did not."""
    try:
        return StepTimes.from_json(path.read_text())
    except (OSError, ValueError):
        return StepTimes()


def remember(path: Path, step_times: StepTimes) -> None:
    """For the next start; a home that cannot be written to is no reason to fail."""
    with suppress(OSError):
        write_atomically(path, step_times.to_json())


def write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(text)
    partial.replace(path)


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

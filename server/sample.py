"""`rae sample`: the images of a job, made in batches by one process or by several, into one .npz.

The format is that of ADM's samplers, which its evaluator reads: github openai/guided-diffusion.
"""

from __future__ import annotations

import platform
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from rae.models.checkpoint import Checkpoint, load_checkpoint
from rae.models.checkpoint_config import read_config
from rae.models.staging import require_empty, staging
from rae.server.command_settings import SampleSettings
from rae.server.decoding import NonFiniteError
from rae.server.devices import resolve_device, resolve_precision
from rae.server.images import describe, encode
from rae.server.job import Job
from rae.server.partial import (
    OutExistsError,
    Partial,
    is_assembled,
    opened,
    read_json,
    refuse_existing,
    report_path,
)
from rae.server.runner import Runner, RunnerOptions
from rae.server.settings import server_version

Say = Callable[[str], None]

LINE_EVERY_S = 30


def run(settings: SampleSettings, say: Say) -> int:
    """Sample, or go on sampling, this process's share; whoever finds all done assembles `out`.

    Returns the exit code: 0, or 128 and the signal that stopped it. Raises InvalidRequestError for
    sampler settings as a request over HTTP would, else ValueError (or OSError) in one line.
    """
    if settings.rank >= settings.world_size:
        raise ValueError(
            f"--rank is {settings.rank}; allowed: 0 to {settings.world_size - 1} with --world-size "
            f"{settings.world_size}"
        )
    if settings.world_size > 1:
        tell, say = say, lambda text: tell(f"rank {settings.rank}: {text}")
    folder = settings.find_folder(say)
    config, sha256 = read_config(folder)
    device = resolve_device(settings.device, settings.local_rank)
    name, _ = resolve_precision(settings.precision, device)
    job = Job.of(settings, config, checkpoint_sha256=sha256, device=device.type, precision=name)
    if is_assembled(settings.out):
        say(f"{settings.out} was complete; what was left of its making is removed")
        return 0
    shape = (job.num, config.decoder.image_size, config.decoder.image_size, 3)
    if settings.png is not None:
        require_empty(settings.png)
    try:
        refuse_existing(settings.out)
        checkpoint = load_checkpoint(folder, keep_bf16=True)
        with noted_signals() as signals, opened(settings.out, asdict(job), shape, say) as work:
            # An image may take two rows.
            options = RunnerOptions(
                max_rows=2 * settings.batch,
                slots=settings.batch,
                precision=settings.precision,
                kernels=job.kernels,
                attention=job.attention,
                compile=job.compile,
            )
            runner = Runner(checkpoint, device, options)
            fill(work, runner, job, settings, signals, say)
            if signals:
                made = job.num - len(work.missing)
                say(f"Stopped with {made:,} of {job.num:,} images; the same command goes on")
                return 128 + signals[0]
            finish(work, checkpoint, job, settings, say)
    except OutExistsError:
        # Of several processes the first may be through before the last has begun.
        if settings.world_size == 1 or not is_output_of(settings.out, job):
            raise
        say(f"{settings.out} has been assembled by another process")
    return 0


def fill(
    work: Partial,
    runner: Runner,
    job: Job,
    settings: SampleSettings,
    signals: Sequence[int],
    say: Say,
) -> None:
    """Make what is missing of this process's share, until a signal is noted."""
    share = range(settings.rank, job.num, settings.world_size)
    pending = [i for i in share if not work.done[i]]
    if there := len(share) - len(pending):
        say(f"Going on: {there:,} of {len(share):,} images are there")
    # The bars of several processes on one terminal would draw over each other.
    wants_bar = settings.world_size == 1 and Console(stderr=True).is_terminal
    # Only a CPU's rows do not depend on how many there are. A GPU takes other kernels for a smaller
    # batch, and the last bits would depend on where a run was cut.
    is_padded = runner.device.type != "cpu"
    with progress(there, len(share), say, wants_bar=wants_bar) as advance:
        for first in range(0, len(pending), settings.batch):
            if signals:
                return
            started = time.perf_counter()
            indices = pending[first : first + settings.batch]
            images = make(runner, indices, job, settings.batch if is_padded else len(indices))
            work.write(indices, images, time.perf_counter() - started)
            advance(len(indices))


def make(runner: Runner, indices: Sequence[int], job: Job, num_rows: int) -> list[np.ndarray]:
    """Images (H, W, 3) uint8 of a batch, filled up to `num_rows` with its last image.

    Raises ValueError that names an image that is not finite.
    """
    slots, last = range(num_rows), len(indices) - 1
    for slot in slots:
        runner.start(slot, job.spec(indices[min(slot, last)]))
    if job.solver == "euler":
        for step in range(job.num_evaluations):
            runner.step([(slot, step) for slot in slots])
    else:
        runner.solve(slots, job.solver)
    try:
        decoding = runner.decode(slots, truncate=job.pixels == "truncate")
        images = decoding.images(must_be_finite=True)
    except NonFiniteError as error:
        index = indices[min(error.slots[0], last)]
        spec = job.spec(index)
        raise ValueError(
            f"image {index} of class {spec.class_label} and seed {spec.seed} is not finite: it and "
            "its batch are not written"
        ) from error
    return images[: len(indices)]


def finish(
    work: Partial,
    checkpoint: Checkpoint,
    job: Job,
    settings: SampleSettings,
    say: Say,
) -> None:
    """Assemble where all is done and nobody else does; otherwise say who is waited for."""
    missing = work.missing
    if missing:
        ranks = sorted({i % settings.world_size for i in missing})
        say(
            f"done; {len(missing):,} of {job.num:,} images are to come from rank "
            f"{', '.join(map(str, ranks))}, and the last to end assembles {work.out}"
        )
        return
    with work.assembling() as is_mine:
        if not is_mine:
            say(f"done; another process assembles {work.out}")
            return
        if settings.png is not None:
            write_pngs(settings.png, work.images, checkpoint, job)
        work.assemble(job.class_labels, report(work, checkpoint, job))
    how = "truncated to 8 bits as published" if job.pixels == "truncate" else "rounded to 8 bits"
    say(f"{work.out}: {job.num:,} images, {job.num_evaluations} evaluations each, pixels {how}")


def report(work: Partial, checkpoint: Checkpoint, job: Job) -> dict[str, Any]:
    """What stays beside the .npz. Seconds are those of all runs and processes together."""
    return {
        "job": asdict(job),
        "checkpoint": checkpoint.config.name,
        "evaluations_per_image": job.num_evaluations,
        "seconds": round(float(work.seconds.sum(dtype=np.float64)), 3),
        "versions": {
            "rae-server": server_version(),
            "torch": version("torch"),
            "numpy": version("numpy"),
            "python": platform.python_version(),
        },
    }


def is_output_of(out: Path, job: Job) -> bool:
    path = report_path(out)
    return out.exists() and path.exists() and read_json(path).get("job") == asdict(job)


def write_pngs(folder: Path, images: np.ndarray, checkpoint: Checkpoint, job: Job) -> None:
    """000000.png and so on, from images (N, H, W, 3) uint8; all of them or no folder."""
    with staging(folder) as staged:

        def write(index: int) -> None:
            description = describe(
                job.spec(index), checkpoint.config, checkpoint.sha256, job.precision
            )
            description |= {"solver": job.solver, "pixels": job.pixels}
            (staged / f"{index:06}.png").write_bytes(encode(images[index], "png", description))

        with ThreadPoolExecutor() as pool:
            list(pool.map(write, range(job.num)))


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """The SIGINT or SIGTERM that came; a second one ends the process as it would have before."""
    noted: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        noted.append(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        restore()


@contextmanager
def progress(
    there: int, total: int, say: Say, *, wants_bar: bool
) -> Iterator[Callable[[int], None]]:
    """Yields what to tell how many images were just made, for a bar on stderr or a line now and
    then. The pace is this run's."""
    bar = Progress(
        BarColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        disable=not wants_bar,
    )
    task = bar.add_task(f"{there:,} of {total:,} images", total=total, completed=there)
    made, started, said = 0, time.perf_counter(), -float(LINE_EVERY_S)

    def advance(count: int) -> None:
        nonlocal made, said
        made += count
        elapsed = time.perf_counter() - started
        left = timedelta(seconds=round((total - there - made) * elapsed / made))
        text = f"{there + made:,} of {total:,} images, {made / elapsed:.2f} images/s, {left} left"
        bar.update(task, completed=there + made, description=text)
        if not wants_bar and (elapsed - said >= LINE_EVERY_S or there + made == total):
            said = elapsed
            say(text)

    with bar:
        yield advance

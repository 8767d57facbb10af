"""Measures which implementation of an op is the fastest on this GPU, for `dispatch`'s table.

For each op at the published models' sizes, and some numbers of rows, our kernel's candidates and
the libraries are timed; what fails, spills or is wrong does not count.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rae.kernels.dispatch import (
    TABLES,
    Choice,
    Entry,
    Table,
    architecture,
    gpu_file_stem,
    table_of,
)
from rae.kernels.lang import HAS_TRITON, triton
from rae.kernels.tune_problems import CANDIDATES, PROBLEMS, SHAPES, Config, Op, Problem, Shape

# Of a result's error, relative to the reference's norm.
TOLERANCE = 2e-2
CALLS, UNCOUNTED = 40, 5
# Cycles, half a millisecond: longer than a host takes for any call's launches.
HEAD_START = 1_000_000

logger = logging.getLogger(__name__)


@contextmanager
def launched() -> Iterator[list[Any]]:
    """The compiled kernels that are launched inside; none from the interpreter."""
    kernels: list[Any] = []
    original = triton.JITFunction.run

    def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - Triton's has no types
        kernels.append(original(*args, **kwargs))
        return kernels[-1]

    triton.JITFunction.run = run
    try:
        yield kernels
    finally:
        triton.JITFunction.run = original


def measure(name: str, call: Callable[[], Tensor], problem: Problem, right: Tensor) -> float | None:
    """The p50 in microseconds; None, and a warning, for what cannot be taken."""
    try:
        problem.reset()
        with launched() as kernels:
            out = call().float()
        if any(kernel.n_spills for kernel in kernels):
            raise ValueError("it spills registers")
        error = float((out - right).norm() / right.norm())
        if not error < TOLERANCE:
            raise ValueError(f"its relative error is {error:.2g}")
        return median_us(call, right.device)
    except Exception as failure:  # compilers and libraries raise anything
        logger.warning("%s is left out: %s", name, failure)
        return None


def median_us(call: Callable[[], Tensor], device: torch.device) -> float:
    if device.type == "cuda":
        return statistics.median(gpu_times_us(call))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1e6 * statistics.median(seconds)


def gpu_times_us(call: Callable[[], object]) -> list[float]:
    """Of calls by the GPU alone, the L2 cache flushed before: it starts when all is launched.
    Triton's `do_bench` counts the launching, too, of what takes less; graphs launch nothing."""
    driver: Any = triton.runtime.driver.active
    cache = driver.get_empty_cache_for_benchmark()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(CALLS)]
    for start, end in events:
        driver.clear_cache(cache)
        torch.cuda._sleep(HEAD_START)
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [1000 * start.elapsed_time(end) for start, end in events[UNCOUNTED:]]


def fastest(
    shape: Shape, configs: Sequence[Config], fallback: Table, device: torch.device
) -> Entry:
    """The entry of one shape. Raises RuntimeError where nothing could be measured."""
    problem, dtype = PROBLEMS[shape.op](shape, device), str(shape.dtype).removeprefix("torch.")
    name = f"{shape.op}, {dtype}, {dict(shape.dims)}"
    right = problem.reference().float().clone()
    times: dict[Choice, float] = {}
    best = fallback.find(shape.op, dtype, shape.dims).config
    for config in configs:
        call = partial(problem.kernel, **config)
        p50 = measure(f"{name}: {dict(config)}", call, problem, right)
        if p50 is not None and p50 < times.get("triton", float("inf")):
            times["triton"], best = p50, config
    for library, call in problem.libraries.items():
        p50 = measure(f"{name}: {library}", call, problem, right)
        if p50 is not None:
            times[library] = p50
    if not times:
        raise RuntimeError(f"{name}: no implementation could be measured")
    p50_us = {choice: round(p50, 2) for choice, p50 in times.items()}
    return Entry(shape.op, dtype, shape.dims, min(times, key=times.__getitem__), best, p50_us)


@torch.inference_mode()
def tune(
    device: torch.device,
    shapes: Sequence[Shape] = SHAPES,
    candidates: Mapping[Op, Sequence[Config]] = CANDIDATES,
    say: Callable[[str], object] = logger.info,
    keep: Callable[[Table], object] = lambda table: None,
) -> Table:
    """The table of `device` as measured, with the architecture's entries for other shapes. `keep`
    gets it after each shape.

    On a CPU, where TRITON_INTERPRET=1 makes the kernels run, its figures mean nothing.
    """
    name, fallback = "cpu", table_of(device)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        fallback = Table.read(TABLES / f"{architecture(capability)}.json")
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    measured = {"gpu": name, **versions, "date": date.today().isoformat()}
    rest = tuple(entry for entry in fallback.entries if not entry.dims)
    table = Table(name, rest, measured)
    entries: list[Entry] = []
    for shape in shapes:
        try:
            entry = fastest(shape, candidates[shape.op], fallback, device)
        except RuntimeError as error:  # no memory, or nothing that can run
            logger.warning("%s is left out: %s", shape, error)
            continue
        say(f"{entry.op} {entry.dtype} {dict(entry.dims)}: {entry.choice}, {dict(entry.p50_us)} µs")
        entries.append(entry)
        table = Table(name, (*entries, *rest), measured)
        keep(table)
    return table


def write(table: Table, path: Path) -> None:
    """An entry to a line, as `Table.read` takes it; as a whole, for whoever is ended meanwhile."""
    lines = ",\n".join(json.dumps(asdict(entry)) for entry in table.entries)
    partial = path.with_suffix(".tmp")
    partial.write_text(f'{{"measured": {json.dumps(table.measured)}, "entries": [\n{lines}\n]}}\n')
    partial.replace(path)


def tune_gpu(out: Path | None, say: Callable[[str], object]) -> Path:
    """Writes the table of this machine's GPU to `out`, or where `dispatch` looks for it, with each
    shape that was measured.

    Raises ValueError where there is no GPU.
    """
    if not (torch.cuda.is_available() and HAS_TRITON):
        raise ValueError("a tuning table is measured on a CUDA GPU with Triton: none here")
    device = torch.device("cuda", torch.cuda.current_device())
    path = out or TABLES / f"{gpu_file_stem(device)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write(tune(device, say=say, keep=lambda table: write(table, path)), path)
    return path

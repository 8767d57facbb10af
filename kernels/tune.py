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
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rae.kernels import adaln, attention, guided_euler, swiglu
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

Config = Mapping[str, int]
Op = Literal["adaln", "swiglu", "attention", "guided_euler"]

# Relative to the reference's norm. bf16 alone makes 0.004.
TOLERANCE = 2e-2

logger = logging.getLogger(__name__)


def _configs(names: str, *values: tuple[int, ...]) -> tuple[Config, ...]:
    return tuple(dict(zip(names.split(), row, strict=False)) for row in values)


# A last name without a value is left out.
CANDIDATES: Mapping[Op, Sequence[Config]] = {
    "adaln": _configs(
        "block_rows num_warps", *((rows, warps) for rows in (1, 2, 4) for warps in (2, 4, 8))
    ),
    "swiglu": _configs(
        "block_m block_n block_k group_m flatten programs_per_sm num_warps num_stages",
        (128, 256, 64, 8, 0, 1, 8, 3),
        (128, 256, 64, 8, 0, 1, 8, 4),
        (128, 256, 64, 8, 1, 1, 8, 3),
        (128, 256, 64, 8, 1, 1, 8, 4),
        (256, 128, 64, 8, 0, 1, 8, 3),
        (128, 128, 64, 8, 0, 2, 8, 3),
        (128, 128, 64, 8, 1, 1, 8, 4),
        (64, 128, 64, 8, 0, 2, 4, 4),
        (64, 64, 128, 8, 0, 1, 4, 4),
        (64, 256, 64, 8, 0, 1, 8, 4),
    ),
    "attention": _configs(
        "block_m block_n num_warps num_stages maxnreg",
        (64, 32, 4, 1),
        (64, 64, 4, 1),
        (64, 64, 4, 2),
        (128, 64, 8, 1),
        (128, 64, 8, 1, 128),
        (128, 128, 8, 1),
        (128, 128, 8, 2),
        (256, 64, 8, 1),
    ),
    "guided_euler": _configs(
        "block num_warps", *((block, warps) for block in (1024, 2048, 4096) for warps in (4, 8))
    ),
}


@dataclass(frozen=True)
class Shape:
    """An op's operands: `dims` are those that it gives to `select`, "rows" among them."""

    op: Op
    dtype: torch.dtype
    dims: Mapping[str, int]


SHAPES = (
    *(
        Shape("adaln", dtype, {"dim": dim, "rows": rows})
        for dtype in (torch.float32, torch.bfloat16)
        for dim in (384, 768, 1024, 1152, 2048)
        for rows in (256, 2048, 16384, 65536)
    ),
    *(
        Shape("swiglu", torch.bfloat16, {"dim": dim, "hidden": hidden, "rows": rows})
        for dim, hidden in ((384, 1024), (768, 2048), (1024, 2816), (1152, 3072), (2048, 5504))
        for rows in (16, 256, 2048, 16384, 65536)
    ),
    *(
        Shape("attention", torch.bfloat16, {"head_dim": dim, "tokens": tokens, "rows": rows})
        for dim in (64, 72, 128)
        for tokens in (256, 257, 1024)
        for rows in (16, 128, 1024)
    ),
    *(
        Shape("guided_euler", dtype, {"size": 768 * tokens, "rows": rows})
        for dtype in (torch.float32, torch.bfloat16)
        for tokens in (256, 1024)
        for rows in (1, 16, 128)
    ),
)
# Samples have a class token in front there, and their positions no rotation: the decoder.
UNROTATED_TOKENS = 257


@dataclass(frozen=True)
class Problem:
    """One shape's operands, bound to what computes them; `reset` undoes what a call changed."""

    kernel: Callable[..., Tensor]
    libraries: Mapping[Choice, Callable[[], Tensor]]
    reference: Callable[[], Tensor]
    reset: Callable[[], object] = lambda: None


def adaln_problem(shape: Shape, device: torch.device) -> Problem:
    rows, dim = shape.dims["rows"], shape.dims["dim"]
    x = torch.randn(1, rows, dim, dtype=shape.dtype, device=device)
    y = torch.randn(1, rows, dim, dtype=torch.bfloat16, device=device)
    gate, shift, scale = torch.randn(1, 1, 3 * dim, dtype=y.dtype, device=device).chunk(3, -1)
    operands = (x, y, gate, None, shift, scale, 1e-6, "rms", True, y.dtype)
    reference = lambda: adaln.adaln_ref(*operands)[1]  # noqa: E731
    kernel = lambda **config: adaln.launch(*operands, **config)[1]  # noqa: E731
    return Problem(kernel, {"library": reference}, reference)


def swiglu_problem(shape: Shape, device: torch.device) -> Problem:
    rows, dim, hidden = (shape.dims[name] for name in ("rows", "dim", "hidden"))
    x = torch.randn(rows, dim, dtype=shape.dtype, device=device)
    weight = torch.randn(2 * hidden, dim, dtype=shape.dtype, device=device) / dim**0.5
    bias = torch.randn(2 * hidden, dtype=shape.dtype, device=device)
    library = lambda: swiglu.swiglu(x, weight, bias, "library")  # noqa: E731
    reference = lambda: swiglu.swiglu_ref(x, weight, bias)  # noqa: E731
    return Problem(partial(swiglu.launch, x, weight, bias), {"library": library}, reference)


def attention_problem(shape: Shape, device: torch.device) -> Problem:
    rows, tokens, dim = (shape.dims[name] for name in ("rows", "tokens", "head_dim"))
    heads = min(16, rows)
    qkv = torch.randn(rows // heads, tokens, 3 * heads * dim, dtype=shape.dtype, device=device)
    angles = torch.randn(tokens, dim // 2, device=device).repeat_interleave(2, -1)
    is_rotated = tokens != UNROTATED_TOKENS
    tables = (angles.cos(), angles.sin()) if is_rotated else (None, None)
    operands = (qkv, heads, *tables)
    libraries: dict[Choice, Callable[[], Tensor]] = {
        name: partial(attention.attention_library, *operands, name)
        for name in ("cudnn", "flash", "flash-attn")
    }
    return Problem(
        partial(attention.launch, *operands), libraries, partial(attention.attention_ref, *operands)
    )


def guided_euler_problem(shape: Shape, device: torch.device) -> Problem:
    rows, size = shape.dims["rows"], shape.dims["size"]
    latents = torch.zeros(rows, size, device=device)
    velocity = torch.randn(2 * rows, size, dtype=shape.dtype, device=device)
    row = torch.arange(rows, device=device)
    step = torch.full((rows,), -0.02, device=device)
    scales = torch.full((rows,), 1.5, device=device)
    operands = (latents, row, step, velocity, row + rows, scales, None)

    def advance(run: Callable[..., None], **config: int) -> Tensor:
        run(*operands, **config)
        return latents

    reference = partial(advance, guided_euler.guided_euler_ref)
    kernel = partial(advance, guided_euler.launch)
    return Problem(kernel, {"library": reference}, reference, latents.zero_)


PROBLEMS: Mapping[Op, Callable[[Shape, torch.device], Problem]] = {
    "adaln": adaln_problem,
    "swiglu": swiglu_problem,
    "attention": attention_problem,
    "guided_euler": guided_euler_problem,
}


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
    except (RuntimeError, ValueError, triton.TritonError) as failure:
        logger.warning("%s is left out: %s", name, failure)
        return None


def median_us(call: Callable[[], Tensor], device: torch.device) -> float:
    if device.type == "cuda":
        return 1000 * float(triton.testing.do_bench(call, quantiles=[0.5]))  # type: ignore[arg-type]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1e6 * statistics.median(seconds)


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
) -> Table:
    """The table of `device` as measured, with the architecture's entries for other shapes.

    On a CPU, where TRITON_INTERPRET=1 makes the kernels run, its figures mean nothing.
    """
    name, fallback = "cpu", table_of(device)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        fallback = Table.read(TABLES / f"{architecture(capability)}.json")
    entries = []
    for shape in shapes:
        entry = fastest(shape, candidates[shape.op], fallback, device)
        say(f"{entry.op} {entry.dtype} {dict(entry.dims)}: {entry.choice}, {dict(entry.p50_us)} µs")
        entries.append(entry)
    entries += [entry for entry in fallback.entries if not entry.dims]
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    measured = {"gpu": name, **versions, "date": date.today().isoformat()}
    return Table(name, tuple(entries), measured)


def write(table: Table, path: Path) -> None:
    """An entry to a line, as `Table.read` takes it."""
    lines = ",\n".join(json.dumps(asdict(entry)) for entry in table.entries)
    path.write_text(f'{{"measured": {json.dumps(table.measured)}, "entries": [\n{lines}\n]}}\n')


def tune_gpu(out: Path | None, say: Callable[[str], object]) -> Path:
    """Writes the table of this machine's GPU to `out`, or where `dispatch` looks for it.

    Raises ValueError where there is no GPU.
    """
    if not (torch.cuda.is_available() and HAS_TRITON):
        raise ValueError("a tuning table is measured on a CUDA GPU with Triton: none here")
    device = torch.device("cuda", torch.cuda.current_device())
    path = out or TABLES / f"{gpu_file_stem(device)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write(tune(device, say=say), path)
    return path

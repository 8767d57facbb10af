"""What the compiler says of the kernels, without a GPU: registers, spills, shared memory.

Every entry of every tuning table is compiled through the kernel's own launcher, on tensors of the
meta device, for the table's architecture and the published shapes; so what is checked is what
would run there.

    python benchmarks/compile_kernels.py [--csv FILE] [--architecture 90]

One line per kernel, shape and configuration; exits 1 where a kernel spills, takes more shared
memory than there is, or multiplies matrices without their units.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from rae.kernels import adaln, attention, guided_euler, swiglu
from rae.kernels.dispatch import TABLES, Entry, Table

T = TypeVar("T")

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Instructions of the matrix units: mma of Ampere, wgmma of Hopper, tcgen05 of Blackwell.
MATRIX_INSTRUCTIONS = re.compile(r"\b(?:HMMA|HGMMA|UTCHMMA|UTCQMMA|OMMA)\b")
# Bytes of shared memory that a program may take.
SHARED_LIMITS = {80: 101_376, 90: 232_448, 100: 232_448}


# The published shapes: widths; (K, padded hidden size); (head_dim, tokens, rotated).
WIDTHS = (384, 768, 1024, 1152, 2048)
MLPS = ((384, 1024), (1152, 3072), (2048, 5504))
HEADS = ((64, 256, True), (72, 256, True), (72, 1024, True), (128, 256, True), (72, 257, False))
LATENTS = (768, 16, 16)
ROWS = (16, 256, 2048, 16384)


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled for one architecture. Spills are bytes per thread."""

    kernel: str
    registers: int
    spills: int
    shared: int
    matrix_instructions: int


@dataclass(frozen=True)
class Case:
    """One shape of an op, and how its launcher is called for it."""

    op: str
    dtype: torch.dtype
    dims: dict[str, int]
    launch: Callable[..., object]
    has_dot: bool

    def __str__(self) -> str:
        dims = " ".join(f"{name} {size}" for name, size in self.dims.items())
        return f"{self.op}, {str(self.dtype).removeprefix('torch.')}, {dims}"


class CompileOnlyDriver:
    """Stands where Triton asks which GPU it is on."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_device(self) -> object:
        return self.target.arch  # Triton keeps compiled kernels by device.

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextmanager
def compiling(architecture: int, seen: Callable[[Any], T]) -> Iterator[list[T]]:
    """Inside, kernels that are launched are compiled for sm_`architecture`, and do not run; what
    `seen` makes of each."""
    compiled: list[T] = []

    def launcher(kernel: Any, grid: object) -> Callable[..., None]:  # noqa: ANN401
        def compile_it(*args: object, **kwargs: object) -> None:
            compiled.append(seen(kernel.warmup(*args, grid=grid, **kwargs)))

        return compile_it

    original = JITFunction.__getitem__
    JITFunction.__getitem__ = launcher  # type: ignore[method-assign]
    before = driver._active
    driver._active = CompileOnlyDriver(architecture)  # type: ignore[assignment]
    try:
        yield compiled
    finally:
        JITFunction.__getitem__ = original
        driver._active = before


def inspect(kernel: Any) -> Compiled:  # noqa: ANN401 - Triton's CompiledKernel has no types
    with NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", cubin.name)
        sass = tool("nvdisasm", "-c", cubin.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    spills = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    return Compiled(
        kernel=kernel.metadata.name,
        registers=int(found[1]),
        spills=int(found[2]) if spills else 0,
        shared=kernel.metadata.shared,
        matrix_instructions=len(MATRIX_INSTRUCTIONS.findall(sass)),
    )


def tool(name: str, *args: str) -> str:
    return subprocess.run(
        [BINARIES / name, *args], capture_output=True, text=True, check=True
    ).stdout


def cases() -> Iterator[Case]:
    """Every op at every published shape and number of rows, in both dtypes."""
    for dtype, rows in product((torch.bfloat16, torch.float32), ROWS):
        for dim in WIDTHS:
            yield Case(
                "adaln", dtype, {"rows": rows, "dim": dim}, norm_site(rows, dim, dtype), False
            )
        for dim, hidden in MLPS:
            dims = {"rows": rows, "dim": dim, "hidden": hidden}
            yield Case("swiglu", dtype, dims, mlp(rows, dim, hidden, dtype), True)
        for head_dim, tokens, rotated in HEADS:
            dims = {"rows": rows, "tokens": tokens, "head_dim": head_dim}
            yield Case("attention", dtype, dims, heads(head_dim, tokens, rotated, dtype), True)
        size = math.prod(LATENTS)
        yield Case("guided_euler", dtype, {"rows": rows, "size": size}, euler(dtype), False)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def norm_site(rows: int, dim: int, dtype: torch.dtype) -> Callable[..., object]:
    """A stream's first site, one between two layers, its last, and its end without a norm, on a
    residual in fp32."""
    x = meta(rows // 16, 16, dim)
    shift, scale, gate, *_ = meta(rows // 16, 1, 6 * dim, dtype=dtype).chunk(6, dim=-1)
    y, weight = x.to(dtype), meta(dim)
    sites = (
        (x, None, None, weight, shift, scale, 1e-6, "rms", False, dtype),
        (x, y, gate, weight, shift, scale, 1e-6, "rms", True, dtype),
        (x, y, gate, None, shift, scale, 1e-6, "layer", False, dtype),
        (x, y, gate, None, None, None, 0.0, "none", True, torch.float32),
    )
    return all_of(*(partial(adaln.launch, *site) for site in sites))


def all_of(*launches: Callable[..., object]) -> Callable[..., None]:
    """With the same configuration."""

    def launch(**config: int) -> None:
        for each in launches:
            each(**config)

    return launch


def mlp(rows: int, dim: int, hidden: int, dtype: torch.dtype) -> Callable[..., object]:
    x, weight = meta(rows, dim, dtype=dtype), meta(2 * hidden, dim, dtype=dtype)
    return partial(swiglu.launch, x, weight, meta(2 * hidden, dtype=dtype))


def heads(head_dim: int, tokens: int, rotated: bool, dtype: torch.dtype) -> Callable[..., object]:
    table = meta(tokens, head_dim) if rotated else None
    qkv = meta(2, tokens, 3 * 16 * head_dim, dtype=dtype)
    return partial(attention.launch, qkv, 16, table, table)


def euler(dtype: torch.dtype) -> Callable[..., object]:
    """With a guide, and without."""
    latents, velocity = meta(8, *LATENTS), meta(8, *LATENTS, dtype=dtype)
    index, scalar = meta(8, dtype=torch.int64), meta(8)
    run = partial(guided_euler.launch, latents, index, scalar, velocity, index, scalar)
    return all_of(partial(run, velocity), partial(run, None))


def compile_table(architecture: int) -> Iterator[tuple[Case, Entry, Compiled]]:
    """What each entry of an architecture's table compiles to, at the shapes that it serves."""
    table = Table.read(TABLES / f"sm_{architecture}.json")
    seen: set[tuple[object, ...]] = set()
    for case in cases():
        entry = table.find(case.op, str(case.dtype).removeprefix("torch."), case.dims)
        fixed = {name: size for name, size in case.dims.items() if name != "rows"}
        key = (case.op, case.dtype, *fixed.items(), *entry.config.items())
        if key in seen:
            continue
        seen.add(key)
        with compiling(architecture, inspect) as compiled:
            case.launch(**entry.config)
        for kernel in compiled:
            yield case, entry, kernel


def problem_of(case: Case, kernel: Compiled, architecture: int) -> str:
    """What is wrong with a compiled kernel, or nothing."""
    limit = SHARED_LIMITS[architecture]
    needs_units = case.has_dot and case.dtype == torch.bfloat16
    problems = {
        f"{kernel.spills} bytes are spilled": kernel.spills > 0,
        f"{kernel.shared} bytes of shared memory, {limit} allowed": kernel.shared > limit,
        "no instruction of the matrix units": needs_units and not kernel.matrix_instructions,
    }
    return "; ".join(text for text, applies in problems.items() if applies)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--architecture", type=int, choices=SHARED_LIMITS, action="append")
    parser.add_argument("--csv", type=Path, help="where to write the table")
    args = parser.parse_args()
    rows, failed = [], 0
    for architecture in args.architecture or SHARED_LIMITS:
        for case, entry, kernel in compile_table(architecture):
            problem = problem_of(case, kernel, architecture)
            failed += bool(problem)
            config = " ".join(f"{name} {value}" for name, value in entry.config.items())
            rows.append(
                {"triton": triton.__version__, "architecture": f"sm_{architecture}"}
                | {"case": str(case), "config": config}
                | asdict(kernel)
                | {"problem": problem}
            )
            sys.stdout.write(", ".join(map(str, rows[-1].values())) + "\n")
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    sys.stdout.write(f"Triton {triton.__version__}: {len(rows)} kernels, {failed} with a problem\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

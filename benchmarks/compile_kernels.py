"""What the compiler says of the kernels, without a GPU: registers, spills, shared memory.

Every entry of every tuning table is compiled through the kernel's own launcher, on tensors of the
meta device, for the table's architecture; so what is checked is what would run there.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Instructions of the matrix units: mma of Ampere, wgmma of Hopper, tcgen05 of Blackwell.
MATRIX_INSTRUCTIONS = re.compile(r"\b(?:HMMA|HGMMA|UTCHMMA|UTCQMMA|OMMA)\b")
# Bytes of shared memory that a program may take.
SHARED_LIMITS = {80: 101_376, 90: 232_448, 100: 232_448}


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled for one architecture. Spills are bytes per thread."""

    kernel: str
    registers: int
    spills: int
    shared: int
    matrix_instructions: int


class CompileOnlyDriver:
    """Stands where Triton asks which GPU it is on."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_device(self) -> int:
        return self.target.arch  # Triton keeps compiled kernels by device.

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextmanager
def compiling(architecture: int) -> Iterator[list[Compiled]]:
    """Inside, kernels that are launched are compiled for sm_`architecture`, and do not run."""
    compiled: list[Compiled] = []

    def launcher(kernel: JITFunction, grid: object) -> Callable[..., None]:
        def compile_it(*args: Any, **kwargs: Any) -> None:
            compiled.append(inspect(kernel.warmup(*args, grid=grid, **kwargs)))

        return compile_it

    original = JITFunction.__getitem__
    JITFunction.__getitem__ = launcher  # type: ignore[method-assign]
    before, driver._active = driver._active, CompileOnlyDriver(architecture)
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

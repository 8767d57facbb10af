"""Functions of fixed buffers, evaluated for a number of rows: eagerly, or as CUDA graphs.

The authors' eager forward is some 1,650 operations, more time for a CPU to launch than for a GPU
to do below 8 images; a graph is one launch. Layers are compiled region by region: the blocks of a
kind are one compilation for each number of rows.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

# A kind of block is compiled once for each bucket: beyond this number torch would give up.
COMPILATIONS = 512
WARM_UP_CALLS = 3


@dataclass(frozen=True)
class Buckets:
    """Numbers of rows that are evaluated, ascending; None: any, up to `largest`, unpadded."""

    largest: int
    sizes: tuple[int, ...] | None

    @classmethod
    def upto(cls, largest: int) -> Buckets:
        """Powers of two and, from 16 on, the halves between them: a step is padded by at most a
        third of its rows."""
        sizes = {size for size in (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192) if size < largest}
        return cls(largest, tuple(sorted(sizes | {largest})))

    def __call__(self, rows: int) -> int:
        """How many rows are evaluated for `rows` of them."""
        if self.sizes is None:
            return rows
        return self.sizes[bisect_left(self.sizes, rows)]


class Replayed:
    """`function(rows)` of fixed buffers; with `captures` a CUDA graph for each number of rows, made
    at its first call, whose output stays at its place and is valid until the next one.

    The largest number should come first: the others then fit into its memory.
    """

    def __init__(
        self, function: Callable[[int], Tensor], device: torch.device, *, captures: bool
    ) -> None:
        self._function, self._device = function, device
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._captures = captures
        # Graphs that share memory must not run side by side: each function has a pool of its own.
        self._pool = torch.cuda.graph_pool_handle() if captures else None

    def __call__(self, rows: int) -> Tensor:
        if not self._captures:
            return self._function(rows)
        if rows not in self._graphs:
            self._graphs[rows] = self._capture(rows)
        graph, output = self._graphs[rows]
        graph.replay()
        return output

    def _capture(self, rows: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                self._function(rows)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = self._function(rows)
        return graph, output


def compile_regions(model: nn.Module, names: Sequence[str]) -> None:
    """Compile the modules inside the lists called `names` of a model, each kind of them once."""
    torch._dynamo.config.recompile_limit = COMPILATIONS
    torch._dynamo.config.accumulated_recompile_limit = COMPILATIONS
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in names:
            assert isinstance(module, nn.ModuleList)
            for region in module:
                # Not `region.compile()`: all kinds would be one code object's compilations.
                region.forward = torch.compile(region.forward, fullgraph=True, dynamic=False)


def keep_compiled(folder: Path) -> None:
    """Keep what torch compiles in `folder`, so that the next start finds it. Its own keys hold the
    code, the versions of torch and Triton, and the GPU. A user's setting is left as it is, and
    torch's own temporary folder where `folder` cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))

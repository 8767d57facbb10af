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
VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


@dataclass(frozen=True)
class Buckets:
    """Numbers of rows that are evaluated, ascending; None: any, up to `largest`, unpadded."""

    largest: int
    sizes: tuple[int, ...] | None

    @classmethod
    def upto(cls, largest: int) -> Buckets:
        """Powers of two and, from 16 to 192, the halves between them."""
        sizes = {size for size in (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192) if size < largest}
        return cls(largest, tuple(sorted(sizes | {largest})))

    def __call__(self, rows: int) -> int:
        """How many rows are evaluated for `rows` of them."""
        if self.sizes is None:
            return rows
        return self.sizes[bisect_left(self.sizes, rows)]

    def below(self, rows: int) -> Buckets | None:
        """Those in which less is evaluated than for `rows`: half of them where any number goes."""
        if self.sizes is None:
            return Buckets(rows // 2, None) if rows > 1 else None
        sizes = self.sizes[: bisect_left(self.sizes, rows)]
        return Buckets(sizes[-1], sizes) if sizes else None


class Replayed:
    """`function(rows)` of fixed buffers; with `captures` a CUDA graph for each number of rows, made
    at its first call, whose output stays at its place and is valid until the next one.

    The largest number should come first: the others then fit into its memory. A function's graphs
    share that and must not run side by side; those of two functions may.
    """

    def __init__(
        self, function: Callable[[int], Tensor], device: torch.device, *, captures: bool
    ) -> None:
        self._function, self._captures = function, captures
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        if captures:
            # A graph keeps the cuBLAS workspace of the stream it was captured on, so on torch's
            # own stream for captures all functions would share one.
            self._stream = torch.cuda.Stream(device)
            self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, rows: int) -> Tensor:
        if not self._captures:
            return self._function(rows)
        if rows not in self._graphs:
            self._graphs[rows] = self._capture(rows)
        graph, output = self._graphs[rows]
        graph.replay()
        return output

    def _capture(self, rows: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            self._function(rows)  # what is compiled, allocated or looked up once
        torch.cuda.synchronize(stream.device)
        graph = torch.cuda.CUDAGraph()
        # Another thread may read the GPU's memory for /metrics meanwhile.
        with torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"):
            output = self._function(rows)
        return graph, output

    def keep(self, sizes: Sequence[int]) -> None:
        """Let go the graphs of other sizes."""
        for size in self._graphs.keys() - set(sizes):
            del self._graphs[size]


def compile_regions(model: nn.Module, names: Sequence[str]) -> None:
    """Compile the modules inside the lists called `names` of a model, each kind of them once."""
    allow_compilations()
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in names:
            assert isinstance(module, nn.ModuleList)
            for region in module:
                # Not `region.compile()`: all kinds would be one code object's compilations.
                region.forward = torch.compile(region.forward, fullgraph=True, dynamic=False)


def allow_compilations() -> None:
    """Let this thread compile a region for every bucket: torch's limit is 8, and newer versions
    have it by thread."""
    torch._dynamo.config.recompile_limit = COMPILATIONS
    torch._dynamo.config.accumulated_recompile_limit = COMPILATIONS


def keep_compiled(folder: Path) -> None:
    """Keep what torch compiles in `folder`, so that the next start finds it. Its own keys hold the
    code, the versions of torch and Triton, and the GPU. A user's setting is left as it is, and
    torch's own temporary folder where `folder` cannot be written to."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # takes a second

    if os.environ.get(VARIABLE) not in (None, default_cache_dir()):  # torch may have set its own
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    os.environ[VARIABLE] = str(folder)

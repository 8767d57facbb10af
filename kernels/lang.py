"""Triton, where there is one, and what the kernels need beside it.

Triton has wheels for Linux alone. Elsewhere the kernels are plain functions that nobody calls:
the references run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import triton
    import triton.language as tl
    from triton import knobs
    from triton.tools.tensor_descriptor import TensorDescriptor
else:
    try:
        import triton
        import triton.language as tl
        from triton import knobs
        from triton.tools.tensor_descriptor import TensorDescriptor
    except ImportError:
        triton = tl = TensorDescriptor = None

HAS_TRITON = triton is not None
# As triton.jit reads it, once: with TRITON_INTERPRET=1 the kernels run on a CPU, in numpy.
INTERPRETED = tl.constexpr(knobs.runtime.interpret) if HAS_TRITON else None


def interprets() -> bool:
    """Whether the kernels run on CPU tensors: TRITON_INTERPRET was 1 when this was imported."""
    return INTERPRETED is not None and bool(INTERPRETED.value)


def jit(function: Callable[..., Any]) -> Any:  # noqa: ANN401 - subscripted to be launched
    """`triton.jit`, or the function alone without Triton."""
    return triton.jit(function) if HAS_TRITON else function


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """The kernels' name of float32 or bfloat16."""
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}[dtype]


@jit
def narrow(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """fp32 `x` in `dtype`, rounded to the nearest, ties to even."""
    if INTERPRETED:
        # The interpreter cuts the low bits off, which doubles bf16's error.
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits += 0x7FFF + ((bits >> 16) & 1)
            x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)  # type: ignore[arg-type]


@jit
def operand(x: tl.tensor) -> tl.tensor:
    """What `tl.dot` takes: the interpreter's product of bf16 numbers is one of their bits."""
    if INTERPRETED:
        x = x.to(tl.float32)
    return x

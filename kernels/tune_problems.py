"""What `tune` measures: the candidates of every op's kernel, the shapes, and operands for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rae.kernels import adaln, attention, guided_euler, swiglu
from rae.kernels.dispatch import Choice

Config = Mapping[str, int]
Op = Literal["adaln", "swiglu", "attention", "guided_euler"]


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
# Of a sample; a kernel is compiled for their number.
TOKENS = 256
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
    tokens = min(rows, TOKENS)
    x = torch.randn(rows // tokens, tokens, dim, dtype=shape.dtype, device=device)
    y = torch.randn(x.shape, dtype=torch.bfloat16, device=device)
    modulation = torch.randn(len(x), 1, 3 * dim, dtype=y.dtype, device=device)
    gate, shift, scale = modulation.chunk(3, -1)
    operands = (x, y, gate, None, shift, scale, 1e-6, "rms", True, y.dtype)

    def kernel(**config: int) -> Tensor:
        return adaln.launch(*operands, **config)[1]

    def reference() -> Tensor:
        return adaln.adaln_ref(*operands)[1]

    return Problem(kernel, {"library": reference}, reference)


def swiglu_problem(shape: Shape, device: torch.device) -> Problem:
    rows, dim, hidden = (shape.dims[name] for name in ("rows", "dim", "hidden"))
    x = torch.randn(rows, dim, dtype=shape.dtype, device=device)
    weight = torch.randn(2 * hidden, dim, dtype=shape.dtype, device=device) / dim**0.5
    bias = torch.randn(2 * hidden, dtype=shape.dtype, device=device)

    def library() -> Tensor:
        return swiglu.silu_mul(F.linear(x, weight, bias))

    kernel, reference = (
        partial(run, x, weight, bias) for run in (swiglu.launch, swiglu.swiglu_ref)
    )
    return Problem(kernel, {"library": library}, reference)


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

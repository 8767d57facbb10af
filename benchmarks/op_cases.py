"""The ops of kernels/, and the linears between them, at the published models' shapes, next to what
else could do their work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rae.kernels.adaln import residual_adaln
from rae.kernels.attention import attention
from rae.kernels.guided_euler import guided_euler
from rae.kernels.swiglu import pack_weights, swiglu
from rae.models.layers import RMSNorm, RotaryEmbedding, modulate

TOKENS = 256
HEADS = 16
LATENT = 768 * TOKENS
# The head's hidden size as published, and as `pack_weights` pads it.
HEAD_HIDDEN, PADDED_HEAD_HIDDEN = 5461, 5504
Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    op: str
    dims: dict[str, int | str]
    bytes: int
    flop: int
    eager: Callable[..., object]
    inputs: tuple[Any, ...]
    others: dict[str, Run]

    @property
    def shape(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.dims.items())


def draw(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=device)


def eager_adaln(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, norm: RMSNorm
) -> tuple[Tensor, Tensor]:
    x = x + gate * y
    return x, modulate(norm(x), shift, scale)


def adaln_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    all_rows = [8] if quick else [256, 1024, 2048, 4096, 8192, 16384]
    for rows in all_rows:
        for dim in [64] if quick else [1152, 2048]:
            for per in ("sample", "token"):
                tokens = min(rows, TOKENS)
                batch, mod_tokens = rows // tokens, tokens if per == "token" else 1
                x, y = draw(device, batch, tokens, dim), draw(device, batch, tokens, dim)
                shift, scale, gate = draw(device, batch, mod_tokens, 6 * dim).chunk(6, -1)[:3]
                norm = RMSNorm(dim).to(device, torch.bfloat16)
                call = partial(
                    residual_adaln, x, y, gate, shift, scale, norm.weight.detach(), eps=norm.eps
                )
                dims: dict[str, int | str] = {"rows": rows, "dim": dim, "per": per}
                moved = 2 * dim * (4 * rows + 3 * batch * mod_tokens + 1)
                ours = partial(call, dtype=torch.bfloat16, kernels="triton")
                inputs = (x, y, gate, shift, scale, norm)
                yield Case("adaln", dims, moved, 0, eager_adaln, inputs, {"ours": ours})


def eager_swiglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x1, x2 = F.linear(x, weight, bias).chunk(2, dim=-1)
    return F.silu(x1) * x2


def swiglu_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    sizes = [(64, 128)] if quick else [(1152, 3072), (2048, PADDED_HEAD_HIDDEN), (384, 1024)]
    for dim, padded in sizes:
        hidden = HEAD_HIDDEN if padded == PADDED_HEAD_HIDDEN else padded
        weight = draw(device, 2 * hidden, dim) / math.sqrt(dim)
        bias, w3 = draw(device, 2 * hidden), draw(device, 8, hidden)
        packed, packed_bias, _ = pack_weights(weight, bias, w3)
        # The same sizes as the packed ones, in the published order.
        halves, halves_bias = packed.clone(), packed_bias.clone()
        for rows in [32] if quick else [256, 2048, 8192, 16384]:
            x = draw(device, rows, dim)
            others: dict[str, Run] = {
                name: partial(swiglu, x, packed, packed_bias, kernels=kernels)
                for name, kernels in (("ours", "triton"), ("library", "library"))
            }
            if hidden != padded:
                others["authors"] = partial(eager_swiglu, x, weight, bias)
            flop = 4 * rows * dim * hidden
            moved = 2 * (rows * dim + 2 * hidden * dim + 2 * hidden + rows * hidden)
            dims: dict[str, int | str] = {"rows": rows, "dim": dim, "hidden": padded}
            inputs = (x, halves, halves_bias)
            yield Case("swiglu", dims, moved, flop, eager_swiglu, inputs, others)


# Inner size and columns of XL's linears with a hundredth of its FLOPs or more; the last two with
# the head's hidden size, which is odd: `padded` is how the server runs them.
LINEARS = [(1152, 3456), (1152, 1152), (1152, 6144), (3072, 1152)]
LINEARS += [(2048, 6144), (2048, 2048), (2048, 12288), (2048, 4096)]
LINEARS += [(2048, 2 * HEAD_HIDDEN), (HEAD_HIDDEN, 2048)]
PADDED = {2 * HEAD_HIDDEN: 2 * PADDED_HEAD_HIDDEN, HEAD_HIDDEN: PADDED_HEAD_HIDDEN}


def linear_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for inner, columns in [(64, 2 * HEAD_HIDDEN)] if quick else LINEARS:
        for rows in [8] if quick else [256, 2048, 8192, 16384]:

            def operands(inner: int, columns: int, rows: int = rows) -> tuple[Tensor, ...]:
                weight = draw(device, columns, inner) / math.sqrt(inner)
                return draw(device, rows, inner), weight, draw(device, columns)

            others: dict[str, Run] = {}
            if {inner, columns} & PADDED.keys():
                padded = operands(PADDED.get(inner, inner), PADDED.get(columns, columns))
                others["padded"] = partial(F.linear, *padded)
            flop = 2 * rows * inner * columns
            moved = 2 * (rows * inner + columns * inner + columns + rows * columns)
            dims: dict[str, int | str] = {"rows": rows, "inner": inner, "columns": columns}
            inputs = operands(inner, columns)
            yield Case("linear", dims, moved, flop, F.linear, inputs, others)


def eager_attention(qkv: Tensor, rope: RotaryEmbedding | None) -> Tensor:
    q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    if rope is not None:
        q, k = rope(q).to(v.dtype), rope(k).to(v.dtype)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def attention_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    sizes = [(72, 256, 16), (64, 256, 16), (128, 256, 16), (72, 257, 0)]
    sizes += [(72, 1024, 32), (128, 1024, 32)]
    for head_dim, tokens, grid in [(16, 16, 4)] if quick else sizes:
        rope = RotaryEmbedding(head_dim, grid).to(device) if grid else None
        tables = (rope.freqs_cos, rope.freqs_sin) if rope else (None, None)
        for batch in [1] if quick else [1, 8, 32]:
            qkv = draw(device, batch, tokens, 3 * HEADS * head_dim)
            others: dict[str, Run] = {
                name: partial(attention, qkv, HEADS, *tables, kernels=kernels)
                for name, kernels in (("ours", "triton"), ("cudnn", "cudnn"), ("flash", "flash"))
            }
            moved = 2 * 4 * batch * tokens * HEADS * head_dim + (8 * tokens * head_dim) * bool(rope)
            flop = 4 * batch * HEADS * tokens * tokens * head_dim
            dims: dict[str, int | str] = {"batch": batch, "tokens": tokens, "head_dim": head_dim}
            dims["rope"] = "yes" if rope else "no"
            yield Case("attention", dims, moved, flop, eager_attention, (qkv, rope), others)


def eager_euler(latents: Tensor, velocity: Tensor, dt: Tensor, scales: Tensor) -> Tensor:
    strong, weak = velocity.chunk(2)
    return latents + dt[:, None] * (weak + scales[:, None] * (strong - weak))


def guided_euler_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for rows in [2] if quick else [1, 8, 64]:
        size = 96 if quick else LATENT
        latents, velocity = draw(device, rows, size).float(), draw(device, 2 * rows, size)
        slots = torch.arange(rows, device=device)
        # Every call moves the latents: so small a step keeps them in range.
        dt, scales = torch.full((2, rows), -1e-4, device=device)
        others: dict[str, Run] = {
            "ours": partial(
                guided_euler, latents, slots, dt, velocity, slots + rows, scales, kernels="triton"
            )
        }
        inputs = (latents.clone(), velocity, dt, scales)
        dims: dict[str, int | str] = {"rows": rows, "size": size}
        moved = rows * (size * (4 + 4 + 2 * 2) + 8 + 4 + 8 + 4)
        yield Case("guided_euler", dims, moved, 0, eager_euler, inputs, others)


CASES = {
    "linear": linear_cases,
    "adaln": adaln_cases,
    "swiglu": swiglu_cases,
    "attention": attention_cases,
    "guided_euler": guided_euler_cases,
}

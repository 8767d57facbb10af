"""The layers that DiT^DH and the decoder are made of. Parameter names are the published ones."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Fewer rows take another GEMM kernel on a CPU, whose last bits differ: fp32 below 12 rows, bf16
# at 1 (measured, avx512). Padded to 16, a row's result does not depend on its neighbours; but in
# bf16 with fewer than 32 features in or out, 1 row in 10,000 still rounds otherwise.
MIN_CPU_ROWS = 16


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` whose rows do not depend on how many there are. x (..., K), weight (N, K)."""
    rows = x.numel() // x.shape[-1]
    if rows >= MIN_CPU_ROWS or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    padded = F.pad(x.reshape(rows, -1), (0, 0, 0, MIN_CPU_ROWS - rows))
    return F.linear(padded, weight, bias)[:rows].unflatten(0, x.shape[:-1])


class Linear(nn.Linear):
    """`nn.Linear` through `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def store_matmul_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep matmul weights in `dtype`; under autocast fp32 ones would be cast at every call."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype)


def silu(x: Tensor) -> Tensor:
    """`F.silu` whose elements do not depend on their neighbours.

    The CPU kernels of silu and gelu treat the last elements of a thread's share with another exp
    or erf than the others (5 of 100,000 values differ in the last bit); exp and erf themselves
    do not. Twice the time of `F.silu`, 1 % of a step. Not for training: exp overflows backward.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return F.silu(x)
    x_float = x.float()
    return (x_float / (1 + torch.exp(-x_float))).to(x.dtype)


def gelu(x: Tensor, approximate: Literal["none", "tanh"] = "none") -> Tensor:
    """`F.gelu` whose elements do not depend on their neighbours: see `silu`."""
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return F.gelu(x, approximate=approximate)
    x_float = x.float()
    if approximate == "tanh":
        inner = x_float + 0.044715 * x_float * x_float * x_float
        bell = torch.tanh(math.sqrt(2 / math.pi) * inner)
    else:
        bell = torch.erf(x_float * math.sqrt(0.5))
    return (0.5 * x_float * (1 + bell)).to(x.dtype)


class SiLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return silu(x)


class RMSNorm(nn.Module):
    """RMSNorm with weight: normalised in fp32, cast to the input's dtype, times the weight."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x_float = x.float()
        scale = torch.rsqrt(x_float.square().mean(-1, keepdim=True) + self.eps)
        return (x_float * scale).type_as(x) * self.weight


def block_norm(dim: int, use_rmsnorm: bool) -> nn.Module:
    return RMSNorm(dim) if use_rmsnorm else nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class RotaryEmbedding(nn.Module):
    """2-D rotary tables (N, head_dim): the first half turns with the row, the second with the
    column, in interleaved pairs, at integer positions."""

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, head_dim: int, grid: int) -> None:
        super().__init__()
        half = head_dim // 2
        freqs = 10000.0 ** -(torch.arange(0, half, 2).float() / half)
        angles = torch.outer(torch.arange(grid).float(), freqs).repeat_interleave(2, dim=-1)
        rows = angles[:, None].expand(grid, grid, half)
        columns = angles[None, :].expand(grid, grid, half)
        angles = torch.cat([rows, columns], dim=-1).reshape(grid * grid, head_dim)
        self.register_buffer("freqs_cos", angles.cos())
        self.register_buffer("freqs_sin", angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        """Rotate x (B, heads, N, head_dim), in fp32."""
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = torch.stack((-odd, even), dim=-1).flatten(-2)
        return x * self.freqs_cos + turned * self.freqs_sin


class Attention(nn.Module):
    """Self-attention on packed qkv (3, heads, head_dim), q and k rotated."""

    def __init__(self, dim: int, num_heads: int, use_qknorm: bool, use_rmsnorm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_dim = dim // num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        # The authors' LayerNorm variant of qk-norm has torch's defaults: affine, eps 1e-5.
        norm = RMSNorm if use_rmsnorm else nn.LayerNorm
        self.q_norm = norm(head_dim) if use_qknorm else nn.Identity()
        self.k_norm = norm(head_dim) if use_qknorm else nn.Identity()

    def forward(self, x: Tensor, rope: RotaryEmbedding) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, heads, head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = rope(self.q_norm(q)).to(v.dtype), rope(self.k_norm(k)).to(v.dtype)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """w3(silu(x1)·x2), (x1, x2) = w12(x). The head's hidden size is odd: 5461 at width 2048."""

    def __init__(self, dim: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(2 / 3 * int(dim * mlp_ratio))
        self.w12 = Linear(dim, 2 * hidden)
        self.w3 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = self.w12(x).chunk(2, dim=-1)
        return self.w3(silu(x1) * x2)


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))), the tanh approximation: the authors' `use_swiglu=False`."""

    def __init__(self, dim: int, mlp_ratio: float) -> None:
        super().__init__()
        self.fc1 = Linear(dim, int(dim * mlp_ratio))
        self.fc2 = Linear(int(dim * mlp_ratio), dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x), approximate="tanh"))

"""The layers as a CPU runs them fastest: weights in oneDNN's layout, fewer passes over memory.

`pack` puts them in the place of a loaded model's plain layers. layers.py stays the reference:
these give its numbers within rounding, and like it a row's result does not depend on its
neighbours. Measured on 2 cores with avx512_bf16, torch 2.14.1, DiTDH-XL-256, batch 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rae.models.dit_dh import Block
from rae.models.layers import Attention, Linear, RotaryEmbedding, SwiGLU

# Of how many tokens attention is faster as products of whole matrices than as torch's fused
# kernel, in bf16: 16 tokens take 3 times as long, 256 take 0.58, 1024 take 1.7. Never in fp32.
PRODUCTS = range(64, 513)
# At 256 px one image's scores, 4 MB in fp32: those of more would leave the cache.
SCORES_AT_ONCE = 2**20
# The setting is the process's: two engines that overlapped would leave it changed.
WIDENING = Lock()


def can_pack() -> bool:
    """Whether torch has oneDNN's packed linear, which takes avx512 (bf16 is emulated below
    avx512_bf16). Without it the plain layers run."""
    ops = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and hasattr(ops, "_linear_pointwise")
        and hasattr(ops, "_reorder_linear_weight")
        and ops._is_mkldnn_bf16_supported()
    )


def pack(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace the layers inside `module`, in place, by ones that multiply in `dtype`.

    Each layer's plain weights are let go as it is packed: the module runs as before, without
    gradients, but its state dict is no longer the published one.
    """
    for name, child in module.named_children():
        match child:
            case Block():
                setattr(module, name, PackedBlock(child, dtype))
            case Attention():
                setattr(module, name, PackedAttention(child, dtype))
            case SwiGLU():
                setattr(module, name, PackedSwiGLU(child, dtype))
            case Linear():
                setattr(module, name, PackedLinear.of(child, dtype))
            case nn.Conv2d():
                child.to(dtype)
            case PackedLinear():
                assert child.dtype == dtype, "this model is packed already, in another precision"
            case _:
                pack(child, dtype)


class PackedBlock(nn.Module):
    """`Block` with its residual and what happens between matmuls in fp32, without temporaries:
    2 % less time than the plain one's chain of casts, and a tenth less error in bf16."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.attn, self.mlp = block.attn, block.mlp
        self.adaLN_modulation = block.adaLN_modulation
        pack(self, dtype)

    def forward(self, x: Tensor, modulation: Tensor, rope: RotaryEmbedding) -> Tensor:
        modulation = modulation.float()
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, -1)
        x = x.float()
        y = self.norm1(x).mul_(1 + scale_msa).add_(shift_msa).to(self.dtype)
        x = torch.addcmul(x, gate_msa, self.attn(y, rope))
        y = self.norm2(x).mul_(1 + scale_mlp).add_(shift_mlp).to(self.dtype)
        return torch.addcmul(x, gate_mlp, self.mlp(y))


class PackedLinear(nn.Module):
    """`Linear` in `dtype` on a weight (N, K) that is brought into the GEMM's own layout once:
    F.linear in bf16 does so at every call, 9 % of its time at 256 rows; in fp32 it goes to MKL,
    which takes twice as long on this processor."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        activation: Literal["none", "swish"] = "none",
    ) -> None:
        super().__init__()
        self.dtype, self.activation = dtype, activation
        # Not buffers: an opaque layout can be neither saved nor moved.
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype))
        self.bias = None if bias is None else bias.detach().to(dtype)

    @classmethod
    def of(cls, layer: nn.Linear, dtype: torch.dtype) -> PackedLinear:
        return cls(layer.weight, layer.bias, dtype)

    def forward(self, x: Tensor, times: Tensor | None = None) -> Tensor:
        """activation(x·Wᵀ + b), or (x·Wᵀ + b)·times: x (..., K), times and result (..., N)."""
        if x.numel() == x.shape[-1]:
            # One row takes another kernel, whose last bits differ; from two on they are the same
            # (all shapes of XL and digits, 44 numbers of rows to 1280, 1, 2, 3 threads).
            twice = None if times is None else times.reshape(1, -1).repeat(2, 1)
            return self(x.reshape(1, -1).repeat(2, 1), twice)[:1].view(*x.shape[:-1], -1)
        x = x.to(self.dtype)
        linear = torch.ops.mkldnn._linear_pointwise
        if times is None:
            return linear.default(x, self.weight, self.bias, self.activation, [], "")
        return linear.binary(x, times, self.weight, self.bias, "mul")


class PackedSwiGLU(nn.Module):
    """`SwiGLU` with silu and the product in the GEMMs, before they round to `dtype`."""

    def __init__(self, mlp: SwiGLU, dtype: torch.dtype) -> None:
        super().__init__()
        (w1, w2), (b1, b2) = mlp.w12.weight.chunk(2), mlp.w12.bias.chunk(2)
        self.w1 = PackedLinear(w1, b1, dtype, "swish")
        self.w2 = PackedLinear(w2, b2, dtype)
        self.w3 = PackedLinear.of(mlp.w3, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(self.w2(x, times=self.w1(x)))


class PackedAttention(nn.Module):
    """`Attention` with RoPE in one pass and, where that is faster, as products of whole matrices
    with scores and softmax in fp32: 5 % less of a forward than the fused kernel. Scores in bf16
    would save another 5 %, for 1.2 to 1.6 times the error of a layer."""

    def __init__(self, attention: Attention, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.qkv = PackedLinear.of(attention.qkv, dtype)
        self.proj = PackedLinear.of(attention.proj, dtype)
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm

    def forward(self, x: Tensor, rope: RotaryEmbedding) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, heads, head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        turns = torch.complex(rope.freqs_cos[:, ::2], rope.freqs_sin[:, ::2])
        q = rotate(self.q_norm(q), turns * q.shape[-1] ** -0.5)
        return self.proj(attend(q, rotate(self.k_norm(k), turns), v))


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """`RotaryEmbedding` as a product of complex numbers, in fp32: a fifth of the time.

    x (B, heads, N, head_dim), turns (N, head_dim / 2) complex; the result is contiguous.
    """
    x = x.to(torch.float32, memory_format=torch.contiguous_format)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·kᵀ)·v of (B, heads, N, head_dim), q scaled, q and k fp32: (B, N, D) as v."""
    batch, heads, tokens, head_dim = q.shape
    if tokens not in PRODUCTS or v.dtype != torch.bfloat16:
        x = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, scale=1.0)
        return x.transpose(1, 2).flatten(2)
    output = v.new_empty(batch, tokens, heads, head_dim)
    samples = max(1, SCORES_AT_ONCE // (heads * tokens**2))
    parts = zip(*(x.split(samples) for x in (q, k, v, output)), strict=True)
    with torch.autocast("cpu", enabled=False), wide_products():
        for q, k, v, part in parts:
            weights = (q @ k.transpose(-1, -2)).softmax(-1).to(v.dtype)
            part.copy_((weights @ v).transpose(1, 2))
    return output.flatten(2)


@contextmanager
def wide_products() -> Iterator[None]:
    """Let oneDNN multiply fp32 matrices, which may round what goes in to bf16, as torch's fused
    attention does, but never what comes out. Here it does not, and takes 40 % of MKL's time."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with WIDENING:
        before = matmul.fp32_precision
        matmul.fp32_precision = "bf16"
        try:
            yield
        finally:
            matmul.fp32_precision = before

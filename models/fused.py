"""The layers as the kernels run them: one pass over memory between two matmuls.

`fuse` puts them in the place of a loaded model's plain layers, as `cpu.pack` does for CPUs.
layers.py stays the reference: these give its numbers within rounding. Both residual streams and
all that happens between matmuls are fp32, where the authors' autocast has the head's in bf16.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rae.kernels.adaln import adaln, gated_residual, last_adaln, residual_adaln
from rae.kernels.attention import attention
from rae.kernels.swiglu import pack_weights, swiglu
from rae.models.decoder import DecoderAttention, DecoderLayer
from rae.models.dit_dh import Block, DiTDH, FinalLayer
from rae.models.layers import (
    Attention,
    Linear,
    RMSNorm,
    RotaryEmbedding,
    SwiGLU,
    store_matmul_weights,
)


class Pending(NamedTuple):
    """A stream whose last layer is not added yet: x + gate·y. The next norm site adds it."""

    x: Tensor
    y: Tensor
    gate: Tensor


def fuse(module: nn.Module, dtype: torch.dtype, kernels: str, attention: str) -> None:
    """Replace the layers inside `module`, in place, by ones that run on the kernels.

    Matmul weights are stored in `dtype`; the module then runs, under autocast if that is bf16,
    without gradients, and its state dict is no longer the published one. `kernels` and, for that
    op, `attention` say what runs, as `dispatch.select` takes it.
    """
    for part in list(module.modules()):
        if isinstance(part, DiTDH):
            for index, block in enumerate(part.blocks):
                assert isinstance(block, Block)
                ends_stream = index == part.config.depth - 1
                part.blocks[index] = FusedBlock(block, dtype, kernels, attention, ends_stream)
            final = FusedFinalLayer(part.final_layer, dtype, kernels)
            setattr(part, "final_layer", final)  # noqa: B010 - of another class than the plain one
        elif isinstance(part, DecoderLayer):
            fused = FusedDecoderAttention(part.attention, attention)
            setattr(part, "attention", fused)  # noqa: B010
    store_matmul_weights(module, dtype)


class FusedBlock(nn.Module):
    """`Block` on a stream in fp32, whose end is left to the next block's first norm site."""

    def __init__(
        self, block: Block, dtype: torch.dtype, kernels: str, attention: str, ends_stream: bool
    ) -> None:
        super().__init__()
        self.kernels, self.ends_stream = kernels, ends_stream
        self.norm1 = NormSite(block.norm1, dtype, kernels)
        self.norm2 = NormSite(block.norm2, dtype, kernels)
        self.attn = FusedAttention(block.attn, attention)
        mlp = block.mlp
        self.mlp = FusedSwiGLU(mlp, kernels) if isinstance(mlp, SwiGLU) else mlp
        self.adaLN_modulation = block.adaLN_modulation

    def forward(
        self, x: Tensor | Pending, modulation: Tensor, rope: RotaryEmbedding
    ) -> Tensor | Pending:
        """x (B, N, D); modulation (B, 1, 6D) or (B, N, 6D), by `adaLN_modulation`."""
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, -1)
        stream, h = self.norm1(x, shift_msa, scale_msa)
        pending = Pending(stream, self.attn(h, rope), gate_msa)
        stream, h = self.norm2(pending, shift_mlp, scale_mlp)
        pending = Pending(stream, self.mlp(h), gate_mlp)
        return gated_residual(*pending, kernels=self.kernels) if self.ends_stream else pending


class NormSite(nn.Module):
    """A block's norm with what is done around it, by `rae.kernels.adaln`."""

    def __init__(self, norm: nn.Module, dtype: torch.dtype, kernels: str) -> None:
        super().__init__()
        assert isinstance(norm, RMSNorm | nn.LayerNorm)
        self.weight = norm.weight
        self.options: dict[str, Any] = {
            "eps": norm.eps,
            "norm": "rms" if isinstance(norm, RMSNorm) else "layer",
            "dtype": dtype,
            "kernels": kernels,
        }

    def forward(self, x: Tensor | Pending, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The stream (B, N, D) in fp32, and norm(stream)·(1 + scale) + shift in `dtype`."""
        if isinstance(x, Pending):
            return residual_adaln(*x, shift, scale, self.weight, **self.options)
        x = x.float()
        return x, adaln(x, shift, scale, self.weight, **self.options)

    def last(self, x: Pending, shift: Tensor, scale: Tensor) -> Tensor:
        """The activations alone, where the stream ends."""
        return last_adaln(*x, shift, scale, self.weight, **self.options)


class FusedFinalLayer(nn.Module):
    """`FinalLayer`; the stream ends here, so it is not written."""

    def __init__(self, layer: FinalLayer, dtype: torch.dtype, kernels: str) -> None:
        super().__init__()
        self.norm_final = NormSite(layer.norm_final, dtype, kernels)
        self.linear = layer.linear
        self.adaLN_modulation = layer.adaLN_modulation

    def forward(self, x: Pending, modulation: Tensor) -> Tensor:
        shift, scale = modulation.chunk(2, dim=-1)
        return self.linear(self.norm_final.last(x, shift, scale))


class FusedAttention(nn.Module):
    """`Attention` with RoPE and the products in one op on the packed qkv."""

    def __init__(self, layer: Attention, kernels: str) -> None:
        super().__init__()
        self.num_heads, self.kernels = layer.num_heads, kernels
        self.qkv, self.proj = layer.qkv, layer.proj
        self.q_norm, self.k_norm = layer.q_norm, layer.k_norm
        self.has_qknorm = not isinstance(layer.q_norm, nn.Identity)

    def forward(self, x: Tensor, rope: RotaryEmbedding) -> Tensor:
        qkv = self.qkv(x)
        if self.has_qknorm:
            qkv = qkv.unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, heads, head_dim)
            q, k, v = qkv.unbind(2)
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
            qkv = torch.stack([q, k, v], dim=2).flatten(2)
        cos, sin = rope.freqs_cos, rope.freqs_sin
        return self.proj(attention(qkv, self.num_heads, cos, sin, kernels=self.kernels))


class FusedDecoderAttention(nn.Module):
    """`DecoderAttention` with one projection for q, k and v."""

    def __init__(self, layer: DecoderAttention, kernels: str) -> None:
        super().__init__()
        self.num_heads, self.kernels = layer.num_heads, kernels
        parts = (layer.attention.query, layer.attention.key, layer.attention.value)
        weight = torch.cat([part.weight for part in parts])
        self.qkv = linear_of(weight, torch.cat([part.bias for part in parts]))
        self.output = layer.output

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        return self.output(attention(qkv, self.num_heads, None, None, kernels=self.kernels))


class FusedSwiGLU(nn.Module):
    """`SwiGLU` on weights that are packed for the kernel; their hidden size is padded."""

    def __init__(self, layer: SwiGLU, kernels: str) -> None:
        super().__init__()
        self.kernels = kernels
        weight, bias, w3 = pack_weights(layer.w12.weight, layer.w12.bias, layer.w3.weight)
        self.w12, self.w3 = linear_of(weight, bias), linear_of(w3, layer.w3.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(swiglu(x, self.w12.weight, self.w12.bias, kernels=self.kernels))


def linear_of(weight: Tensor, bias: Tensor) -> Linear:
    """A linear layer on a given weight (out, in) and bias (out,)."""
    layer = Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    return layer.requires_grad_(False)

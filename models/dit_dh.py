"""DiT^DH: a diffusion transformer with a wide, shallow head (arXiv 2510.11690, section 5).

The semantics are those of github bytetriper/RAE, `src/stage2/models/DDT.py`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rae.models.config import DiTDHConfig
from rae.models.embedders import LabelEmbedder, TimeEmbedder, TokenEmbedder, sincos_2d
from rae.models.layers import (
    Attention,
    Linear,
    Mlp,
    RotaryEmbedding,
    SwiGLU,
    block_norm,
    modulate,
    silu,
)

NORMAL_INIT = (
    "y_embedder.embedding_table.weight",
    "t_embedder.mlp.0.weight",
    "t_embedder.mlp.2.weight",
)


class Conditioning(NamedTuple):
    """What a velocity depends on beside the tokens: the time and the label, of B samples.

    `time` (B, E) is the time's embedding; `modulations` (B, depth, 6E) are shift, scale and gate of
    attention, then of the MLP, for each block of the backbone, as its linear gives them.
    """

    time: Tensor
    modulations: Tensor


def modulation_layer(dim: int, num_outputs: int) -> nn.Sequential:
    """The adaLN linear of a block, for a condition that `silu` was already applied to: once for
    all blocks. Published checkpoints know the linear as number 1 after their own SiLU."""
    return nn.Sequential(nn.Identity(), Linear(dim, num_outputs * dim))


class BlockConfig(Protocol):
    """What a block takes of its model's configuration."""

    @property
    def use_rmsnorm(self) -> bool: ...
    @property
    def use_qknorm(self) -> bool: ...
    @property
    def use_swiglu(self) -> bool: ...
    @property
    def mlp_ratio(self) -> float: ...


class Block(nn.Module):
    """A transformer block with adaLN: one modulation per sample (backbone) or per token (head)."""

    def __init__(self, config: BlockConfig, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = block_norm(dim, config.use_rmsnorm)
        self.norm2 = block_norm(dim, config.use_rmsnorm)
        self.attn = Attention(dim, num_heads, config.use_qknorm, config.use_rmsnorm)
        self.mlp = (SwiGLU if config.use_swiglu else Mlp)(dim, config.mlp_ratio)
        self.adaLN_modulation = modulation_layer(dim, 6)

    def forward(self, x: Tensor, modulation: Tensor, rope: RotaryEmbedding) -> Tensor:
        """x (B, N, D); modulation (B, 1, 6D) or (B, N, 6D), by `adaLN_modulation`."""
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, -1)
        x = x + gate_msa * self.attn(modulate(self.norm1(x), shift_msa, scale_msa), rope)
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, dim: int, latent_channels: int, use_rmsnorm: bool) -> None:
        super().__init__()
        self.norm_final = block_norm(dim, use_rmsnorm)
        self.linear = Linear(dim, latent_channels)
        self.adaLN_modulation = modulation_layer(dim, 2)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x (B, N, D); modulation (B, N, 2D), by `adaLN_modulation`; the result is (B, N, C)."""
        shift, scale = modulation.chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiTDH(nn.Module):
    """Predicts the velocity, noise − latents, from noised latents, time and label."""

    pos_embed: Tensor | None

    def __init__(self, config: DiTDHConfig) -> None:
        super().__init__()
        self.config = config
        dim, head_dim = config.hidden_size, config.head_hidden_size
        self.x_embedder = TokenEmbedder(config.latent_channels, head_dim)
        self.s_embedder = TokenEmbedder(config.latent_channels, dim)
        self.s_projector = Linear(dim, head_dim) if dim != head_dim else nn.Identity()
        self.t_embedder = TimeEmbedder(dim)
        self.y_embedder = LabelEmbedder(config.num_classes + config.has_null_label, dim)
        table = sincos_2d(dim, config.latent_size)[None] if config.use_pos_embed else None
        self.register_buffer("pos_embed", table)
        self.enc_feat_rope = RotaryEmbedding(dim // config.num_heads, config.latent_size)
        self.dec_feat_rope = RotaryEmbedding(head_dim // config.head_num_heads, config.latent_size)
        backbone = [Block(config, dim, config.num_heads) for _ in range(config.depth)]
        head = [Block(config, head_dim, config.head_num_heads) for _ in range(config.head_depth)]
        self.blocks = nn.ModuleList(backbone + head)
        self.final_layer = FinalLayer(head_dim, config.latent_channels, config.use_rmsnorm)

    def init_weights(self) -> None:
        """The published initialisation, over torch's defaults: the first velocity is zero."""
        for embedder in (self.x_embedder, self.s_embedder):
            nn.init.xavier_uniform_(embedder.proj.weight.data.flatten(1))
            nn.init.zeros_(embedder.proj.bias)  # type: ignore[arg-type]
        for name, parameter in self.named_parameters():
            if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)
            elif name in NORMAL_INIT:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, latents: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        """Velocity at time t.

        Args:
            latents: (B, C, H, W), x_t = (1−t)·data + t·noise.
            t: (B,) in [0, 1], shifted; 1 is noise.
            class_labels: (B,) int64 in [0, num_classes); num_classes is the null label.

        Returns:
            (B, C, H, W), in the dtype of the last matmul.
        """
        tokens = latents.flatten(2).transpose(1, 2)
        velocity = self.velocity(tokens, self.condition(t, class_labels))
        return velocity.transpose(1, 2).reshape(latents.shape)

    def condition(self, t: Tensor, class_labels: Tensor) -> Conditioning:
        """What `velocity` needs of times (B,) and labels (B,), both as `forward` takes them."""
        time = self.t_embedder(t)
        c = silu(time + self.y_embedder(class_labels))
        # A second SiLU, as published: each block there applies its own to c.
        c = silu(c)
        layers = [b.get_submodule("adaLN_modulation") for b in self.blocks[: self.config.depth]]
        return Conditioning(time, torch.stack([layer(c) for layer in layers], dim=1))

    def velocity(self, tokens: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity of tokens (B, N, C), which are the latents row by row: (B, N, C), contiguous."""
        # Strided tokens take another GEMM, in bf16 with a second rounding, before the bias: errors
        # of a CPU's s_embedder are .0033 with it and .0029 without (XL).
        tokens = tokens.contiguous()
        depth, time = self.config.depth, conditioning.time[:, None]  # (B, 1, E)
        s = self.s_embedder(tokens)  # (B, N, E)
        if self.pos_embed is not None:
            s = s + self.pos_embed
        modulations = conditioning.modulations[:, :, None].unbind(1)  # (B, 1, 6E) each, views
        for block, modulation in zip(self.blocks[:depth], modulations, strict=True):
            s = block(s, modulation, self.enc_feat_rope)
        s = silu(self.s_projector(silu(time + s)))  # (B, N, D); twice, as above
        h = self.x_embedder(tokens)
        for block in self.blocks[depth:]:
            h = block(h, block.get_submodule("adaLN_modulation")(s), self.dec_feat_rope)
        return self.final_layer(h, self.final_layer.adaLN_modulation(s))

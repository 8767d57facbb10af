"""DiT^DH: a diffusion transformer with a wide, shallow head (arXiv 2510.11690, section 5).

The semantics are those of github bytetriper/RAE, `src/stage2/models/DDT.py`.
"""

from __future__ import annotations

from torch import Tensor, nn

from rae.models.config import DiTDHConfig
from rae.models.embedders import LabelEmbedder, TimeEmbedder, TokenEmbedder, sincos_2d
from rae.models.layers import (
    Attention,
    Linear,
    Mlp,
    RotaryEmbedding,
    SiLU,
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


class Block(nn.Module):
    """A transformer block with adaLN: one modulation per sample (backbone) or per token (head)."""

    def __init__(self, config: DiTDHConfig, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = block_norm(dim, config.use_rmsnorm)
        self.norm2 = block_norm(dim, config.use_rmsnorm)
        self.attn = Attention(dim, num_heads, config.use_qknorm, config.use_rmsnorm)
        self.mlp = (SwiGLU if config.use_swiglu else Mlp)(dim, config.mlp_ratio)
        self.adaLN_modulation = nn.Sequential(SiLU(), Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor, rope: RotaryEmbedding) -> Tensor:
        """x (B, N, D); c (B, 1, D) or (B, N, D)."""
        modulation = self.adaLN_modulation(c).chunk(6, dim=-1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        x = x + gate_msa * self.attn(modulate(self.norm1(x), shift_msa, scale_msa), rope)
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, dim: int, latent_channels: int, use_rmsnorm: bool) -> None:
        super().__init__()
        self.norm_final = block_norm(dim, use_rmsnorm)
        self.linear = Linear(dim, latent_channels)
        self.adaLN_modulation = nn.Sequential(SiLU(), Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
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
        depth = self.config.depth
        time = self.t_embedder(t)[:, None]  # (B, 1, E)
        c = silu(time + self.y_embedder(class_labels)[:, None])
        s = self.s_embedder(latents)  # (B, N, E)
        if self.pos_embed is not None:
            s = s + self.pos_embed
        for block in self.blocks[:depth]:
            s = block(s, c, self.enc_feat_rope)
        s = self.s_projector(silu(time + s))  # (B, N, D)
        h = self.x_embedder(latents)
        for block in self.blocks[depth:]:
            h = block(h, s, self.dec_feat_rope)
        velocity = self.final_layer(h, s)  # (B, N, C)
        return velocity.transpose(1, 2).reshape(latents.shape)

"""The plain diffusion transformer that DiT^DH is held against: one width from end to end.

The semantics are those of github bytetriper/RAE, `src/stage2/models/lightningDiT.py`. It is trained
and evaluated; the server serves DiT^DH.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from rae.models.config import require_types
from rae.models.dit_dh import NORMAL_INIT, Block, FinalLayer
from rae.models.embedders import LabelEmbedder, TimeEmbedder, TokenEmbedder, sincos_2d
from rae.models.layers import Linear, RotaryEmbedding, silu


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """The fields mean what `DiTDHConfig`'s do."""

    latent_channels: int = 768
    latent_size: int = 16
    hidden_size: int
    depth: int
    num_heads: int
    num_classes: int = 1000
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    use_qknorm: bool = False
    use_rmsnorm: bool = True
    use_swiglu: bool = True

    def __post_init__(self) -> None:
        require_types(self, may_be_zero=("class_dropout_prob",))
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be num_heads {self.num_heads} times a "
                "multiple of 4 (rotary pairs in two halves)"
            )
        if self.class_dropout_prob >= 1:
            raise ValueError(f"class_dropout_prob {self.class_dropout_prob} is not in [0, 1)")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image's latents."""
        return (self.latent_channels, self.latent_size, self.latent_size)

    @property
    def has_null_label(self) -> bool:
        return self.class_dropout_prob > 0

    @property
    def null_label(self) -> int:
        return self.num_classes


class DiT(nn.Module):
    """Predicts the velocity, noise − latents, as `DiTDH` does."""

    pos_embed: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.hidden_size
        self.x_embedder = TokenEmbedder(config.latent_channels, dim)
        self.t_embedder = TimeEmbedder(dim)
        self.y_embedder = LabelEmbedder(config.num_classes + config.has_null_label, dim)
        self.register_buffer("pos_embed", sincos_2d(dim, config.latent_size)[None])
        self.feat_rope = RotaryEmbedding(dim // config.num_heads, config.latent_size)
        blocks = [Block(config, dim, config.num_heads) for _ in range(config.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(dim, config.latent_channels, config.use_rmsnorm)

    def init_weights(self) -> None:
        """The published initialisation: xavier in every linear, which DiT^DH has not."""
        for module in self.modules():
            if isinstance(module, Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)  # type: ignore[arg-type]
        for name, parameter in self.named_parameters():
            if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)
            elif name in NORMAL_INIT:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, latents: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        """Velocity (B, C, H, W) at times (B,) of latents (B, C, H, W) with labels (B,)."""
        c = silu(self.t_embedder(t) + self.y_embedder(class_labels))[:, None]  # (B, 1, D)
        x = self.x_embedder(latents.flatten(2).transpose(1, 2)) + self.pos_embed
        for block in self.blocks:
            x = block(x, block.get_submodule("adaLN_modulation")(c), self.feat_rope)
        velocity = self.final_layer(x, self.final_layer.adaLN_modulation(c))
        return velocity.transpose(1, 2).reshape(latents.shape)

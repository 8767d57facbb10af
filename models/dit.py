"""The plain diffusion transformer that DiT^DH is held against: one width from end to end.

The semantics are those of github bytetriper/RAE, `src/stage2/models/lightningDiT.py`. It is trained
and evaluated; the server serves DiT^DH.
"""

from __future__ import annotations

from torch import Tensor, nn

from rae.models.config import DiTConfig
from rae.models.dit_dh import NORMAL_INIT, Block, FinalLayer
from rae.models.embedders import LabelEmbedder, TimeEmbedder, TokenEmbedder, sincos_2d
from rae.models.layers import Linear, RotaryEmbedding, silu


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

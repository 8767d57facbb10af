"""The ViT decoder of an RAE: latent tokens to pixels (github bytetriper/RAE, `src/stage1`).

Module names repeat the published parameter names, which are transformers' ViTMAE's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rae.models.config import DecoderConfig
from rae.models.embedders import sincos_2d
from rae.models.layers import Linear, gelu


class _QKV(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query, self.key, self.value = Linear(dim, dim), Linear(dim, dim), Linear(dim, dim)


class _Dense(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.dense = Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x)


class DecoderAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention = _QKV(dim)
        self.output = _Dense(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.attention.query, self.attention.key, self.attention.value)
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in layers)
        return self.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Pre-LN attention and an MLP with the exact GELU."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.attention = DecoderAttention(dim, config.num_heads)
        self.intermediate = _Dense(dim, config.intermediate_size)
        self.output = _Dense(config.intermediate_size, dim)
        self.layernorm_before = nn.LayerNorm(dim, eps=eps)
        self.layernorm_after = nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.layernorm_before(x))
        return x + self.output(gelu(self.intermediate(self.layernorm_after(x))))


class Decoder(nn.Module):
    """Tokens (B, grid², C) to images (B, 3, S, S), S = patch_size·grid, in normalised pixels."""

    decoder_pos_embed: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.hidden_size
        self.decoder_embed = Linear(config.latent_channels, dim)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        table = torch.cat([torch.zeros(1, dim), sincos_2d(dim, config.grid)])[None]
        self.register_buffer("decoder_pos_embed", table)
        self.decoder_layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.depth))
        self.decoder_norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.decoder_pred = Linear(dim, 3 * config.patch_size**2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Raises ValueError for another number of tokens than the position table's: the authors'
        code interpolates the latents then, without a word."""
        config = self.config
        if tokens.shape[1] != config.grid**2:
            raise ValueError(f"{tokens.shape[1]} tokens; this decoder takes {config.grid**2}")
        x = self.decoder_embed(tokens)
        x = torch.cat([self.trainable_cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.decoder_pos_embed
        for layer in self.decoder_layers:
            x = layer(x)
        x = self.decoder_pred(self.decoder_norm(x))[:, 1:]  # (B, N, p·p·3)
        p, grid = config.patch_size, config.grid
        x = x.unflatten(-1, (p, p, 3)).unflatten(1, (grid, grid))  # (B, h, w, p, q, 3)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), 3, config.image_size, config.image_size)

"""Embedders of tokens, time and label, and the sin-cos initialisation of position tables."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rae.models.layers import Linear, SiLU, linear


class TokenEmbedder(nn.Module):
    """A 1×1 convolution, as a linear of tokens (B, N, C): (B, N, D)."""

    def __init__(self, latent_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(latent_channels, dim, kernel_size=1)

    def forward(self, tokens: Tensor) -> Tensor:
        return linear(tokens, self.proj.weight.flatten(1), self.proj.bias)


class TimeEmbedder(nn.Module):
    """MLP([sin, cos](2π·t·W)) with random, stored frequencies W (256,): t (B,) to (B, D)."""

    W: Tensor

    def __init__(self, dim: int, num_frequencies: int = 256) -> None:
        super().__init__()
        self.register_buffer("W", torch.randn(num_frequencies))
        self.mlp = nn.Sequential(Linear(2 * num_frequencies, dim), SiLU(), Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * self.W * 2 * math.pi
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1))


class LabelEmbedder(nn.Module):
    """A table of class embeddings, the null label's last where there is one."""

    def __init__(self, num_embeddings: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_embeddings, dim)

    def forward(self, class_labels: Tensor) -> Tensor:
        return self.embedding_table(class_labels)


def sincos_2d(dim: int, grid: int) -> Tensor:
    """Sin-cos position table (grid², dim): the first half of the dims holds the column."""
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.outer(torch.arange(grid, dtype=torch.float64), omega)
    table = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (grid, dim / 2)
    columns = table[None, :].expand(grid, grid, -1)
    rows = table[:, None].expand(grid, grid, -1)
    return torch.cat([columns, rows], dim=-1).reshape(grid * grid, dim).float()

"""The decoder's discriminator: small trained heads on the features of a frozen network.

Source: github bytetriper/RAE, `src/disc/dinodisc.py`, after StyleGAN-T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

KERNEL_SIZE = 9
SLOPE = 0.2
EPS = 1e-6


class SampleNorm(nn.InstanceNorm1d):
    """Each channel of each sample normalised over its tokens, in fp32; (B, C, N)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=EPS, affine=True)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float())


class Block(nn.Sequential):
    """A convolution around the ring of tokens, a norm and a leaky ReLU; (B, C, N) to the same."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        conv = nn.Conv1d(
            channels,
            channels,
            kernel_size,
            padding=kernel_size // 2,
            padding_mode="circular",
        )
        super().__init__(spectral_norm(conv), SampleNorm(channels), nn.LeakyReLU(SLOPE))


class Head(nn.Module):
    """Features (B, C, N) to a logit of each token (B, N)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.project = Block(channels, 1)
        self.mix = Block(channels, KERNEL_SIZE)
        self.classify = spectral_norm(nn.Conv1d(channels, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        x = self.project(features)
        x = (x + self.mix(x)) / math.sqrt(2)
        return self.classify(x).squeeze(1).float()


class DiscriminatorHeads(nn.Module):
    """One head for each feature map.

    In training every list of maps moves the spectral norms' estimates by one power iteration; in
    evaluation they stay.
    """

    def __init__(self, num_maps: int, channels: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(channels) for _ in range(num_maps))

    def forward(self, *batches: Sequence[Tensor]) -> list[Tensor]:
        """The logits (B, all tokens) of each of several lists of maps (B, C, N)."""
        return [
            torch.cat([head(maps) for head, maps in zip(self.heads, batch, strict=True)], dim=1)
            for batch in batches
        ]

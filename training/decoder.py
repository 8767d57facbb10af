"""Stage 1: the ViT decoder, trained on noised latents of a frozen encoder (arXiv 2510.11690, 4.2).

LPIPS and the adversarial term are not here: they need downloaded networks that expect photographs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rae.models.config import DecoderConfig
from rae.models.decoder import Decoder
from rae.training.loop import OnStep, Plan, fit

NOISE_TAU = 0.8


def add_noise(tokens: Tensor, generator: torch.Generator, tau: float = NOISE_TAU) -> Tensor:
    """z + σ·N(0, I), σ = τ·U(0, 1) per sample; tokens (B, N, C)."""
    sigma = tau * torch.rand(len(tokens), 1, 1, generator=generator)
    return tokens + sigma * torch.randn(tokens.shape, generator=generator)


def reconstruction_loss(pixels: Tensor, target: Tensor) -> Tensor:
    """Mean L1 plus mean squared error, in the encoder's pixels."""
    difference = pixels.float() - target
    return difference.abs().mean() + difference.square().mean()


def train_decoder(
    config: DecoderConfig,
    tokens: Tensor,
    pixels: Tensor,
    plan: Plan,
    generator: torch.Generator,
    *,
    bf16: bool,
    on_step: OnStep,
) -> Decoder:
    """From the encoder's tokens (M, N, C) to the pixels (M, 3, S, S) they were made of."""

    def batch_loss(decoder: Decoder) -> Tensor:
        rows = torch.randint(len(tokens), (plan.batch_size,), generator=generator)
        return reconstruction_loss(decoder(add_noise(tokens[rows], generator)), pixels[rows])

    return fit(Decoder(config), batch_loss, plan, bf16=bf16, on_step=on_step)

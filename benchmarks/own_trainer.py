"""Stage 2 as `rae train dit` trains it, for comparisons with `authors.py`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rae.models.config import DecoderConfig, DiTDHConfig
from rae.models.dit import DiTConfig
from rae.models.published import NORMALISATION
from rae.models.rae import RAE
from rae.training.distributed import World
from rae.training.learner import Learner
from rae.training.stage2.presets import DiTRecipe
from rae.training.stage2.run_dit import build


def make_learner(
    recipe: DiTRecipe, weights: Mapping[str, Tensor], device: torch.device, num_images: int
) -> Learner[nn.Module]:
    with device:
        model: nn.Module = build(recipe.model, 0)
    model.load_state_dict(weights)
    return recipe.learner(model, World(0, 1, device), num_images)


def make_rae(config: DiTDHConfig | DiTConfig) -> RAE:
    """Latents of mean 0 and variance 1, and a small decoder, which nobody runs."""
    decoder = DecoderConfig(
        latent_channels=config.latent_channels,
        hidden_size=4,
        depth=1,
        num_heads=1,
        intermediate_size=4,
        grid=config.latent_size,
    )
    mean, std = NORMALISATION["dinov2"]
    return RAE(decoder, image_mean=mean, image_std=std)

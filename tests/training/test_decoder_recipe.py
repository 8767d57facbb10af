"""The published numbers of stage 1, and what a recipe refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rae.models.config import DecoderConfig, EncoderConfig
from rae.models.rae import RAE
from rae.training.distributed import World
from rae.training.stage1.build_decoder import build_adversary, build_objective, build_perceptual
from rae.training.stage1.decoder_recipe import DECODER_PRESETS, DecoderRecipe

ALONE = World(0, 1, torch.device("cpu"))
TINY = DecoderConfig(
    latent_channels=8, hidden_size=8, depth=1, num_heads=2, intermediate_size=8, grid=2
)
RECIPE = DecoderRecipe(model=TINY, encoder=EncoderConfig(kind="mae", image_size=32))


def test_the_published_schedule() -> None:
    recipe = DECODER_PRESETS["DINOv2-B-256"]
    per_epoch = 1_281_167 // 512
    objective = build_objective(recipe, 1_281_167)
    starts = (
        objective.perceptual_start,
        objective.discriminator_start,
        objective.adversarial_start,
    )
    assert starts == (0, 6 * per_epoch, 8 * per_epoch)
    schedule = recipe.lr_schedule(1_281_167)
    rates = [recipe.lr * schedule.factor(int(epoch * per_epoch)) for epoch in (0, 1, 8.5, 10, 16)]
    # The middle of the cosine is between 2e-4 and 2e-5; the discriminator ends at epoch 10.
    assert rates == pytest.approx([2e-4 / per_epoch, 2e-4, 1.1e-4, 8.2186e-5, 2e-5], rel=1e-4)
    assert (recipe.adamw.betas, recipe.adamw.clip_norm, recipe.ema_decay) == (
        (0.9, 0.95),
        None,
        0.9978,
    )


def test_presets_are_of_the_published_sizes() -> None:
    sizes = {
        name: (preset.encoder.kind, preset.encoder.image_size, preset.model.image_size)
        for name, preset in DECODER_PRESETS.items()
    }
    assert sizes == {
        "DINOv2-B-256": ("dinov2", 224, 256),
        "DINOv2-B-512": ("dinov2", 448, 512),
        "SigLIP2-B-256": ("siglip2", 256, 256),
        "MAE-B-256": ("mae", 256, 256),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"perceptual": "vgg"}, "'vgg'; known: lpips, encoder, none"),
        ({"discriminator": "patch"}, "'patch'; known: dino, encoder, none"),
        ({"tau": -0.1}, "tau -0.1"),
        ({"adversarial_start_epoch": 2.0}, r"2\.0 is before discriminator_start_epoch 6\.0"),
    ],
)
def test_a_wrong_recipe_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(RECIPE, **changes)


def test_less_than_a_batch_is_no_epoch() -> None:
    with pytest.raises(ValueError, match="511 images are less than one batch of 512"):
        RECIPE.lr_schedule(511)


@pytest.mark.parametrize("name", ["", "absent.pth"])
def test_absent_weights_are_named_with_their_source(name: str, tmp_path: Path) -> None:
    rae = RAE(TINY, image_mean=(0, 0, 0), image_std=(1, 1, 1))
    path = tmp_path / name if name else None
    found = "absent.pth is not a file" if name else "no file is given"
    with pytest.raises(ValueError, match=rf"{found}.*vgg16-397923af\.pth.*with --vgg"):
        build_perceptual(RECIPE, rae, ALONE, path)
    with pytest.raises(ValueError, match=rf"{found}.*dino_vit_small_patch8_224\.pth.*with --dino"):
        build_adversary(RECIPE, rae, ALONE, 512, path)


def test_terms_can_be_left_out_and_need_an_encoder_where_they_look_through_it() -> None:
    rae = RAE(TINY, image_mean=(0, 0, 0), image_std=(1, 1, 1))
    without = replace(RECIPE, perceptual="none", discriminator="none")
    assert build_perceptual(without, rae, ALONE) is None
    assert build_adversary(without, rae, ALONE, 512) is None
    with pytest.raises(ValueError, match="no encoder"):
        build_perceptual(replace(RECIPE, perceptual="encoder"), rae, ALONE)

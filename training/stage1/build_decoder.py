"""From a recipe of stage 1 and an RAE to what a Trainer trains."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from rae.models.rae import RAE
from rae.training.distributed import Strategy, World
from rae.training.learner import Learner
from rae.training.precision import Precision
from rae.training.stage1.decoder import Adversary, DecoderObjective, DecoderTask
from rae.training.stage1.decoder_recipe import DecoderRecipe
from rae.training.stage1.discriminator import DiscriminatorHeads
from rae.training.stage1.features import (
    DINO_FILE,
    DinoFeatures,
    EncoderFeatures,
    FeatureMaps,
    build_dino,
    load_dino,
)
from rae.training.stage1.perceptual import VGG_FILE, PerceptualLoss, encoder_distance, load_lpips


class LossFiles(NamedTuple):
    """Published weights that a loss looks through: LPIPS' VGG, the discriminator's DINO."""

    vgg: Path | None = None
    dino: Path | None = None


NO_FILES = LossFiles()


def build_decoder_task(
    recipe: DecoderRecipe,
    rae: RAE,
    world: World,
    num_images: int,
    *,
    precision: Precision = "fp32",
    strategy: Strategy = "ddp",
    sample_images: Tensor | None = None,
    files: LossFiles = NO_FILES,
) -> DecoderTask:
    """For `num_images` in an epoch. The heads are small and always replicated.

    Every process must have seeded torch alike: the heads' first weights are drawn here.
    Raises ValueError where a file of weights is absent or another one.
    """
    rae = rae.to(world.device).requires_grad_(False)
    rae.decoder.requires_grad_(True)
    perceptual = build_perceptual(recipe, rae, world, files.vgg)
    adversary = build_adversary(recipe, rae, world, num_images, files.dino)
    decoder = recipe.learner(rae.decoder, world, num_images, strategy)
    return DecoderTask(
        rae,
        decoder,
        build_objective(recipe, num_images),
        world,
        perceptual=perceptual,
        adversary=adversary,
        precision=precision,
        sample_images=sample_images,
    )


def build_objective(recipe: DecoderRecipe, num_images: int) -> DecoderObjective:
    return DecoderObjective(
        tau=recipe.tau,
        perceptual_weight=recipe.perceptual_weight,
        perceptual_start=recipe.steps(recipe.perceptual_start_epoch, num_images),
        discriminator_start=recipe.steps(recipe.discriminator_start_epoch, num_images),
        adversarial_weight=recipe.adversarial_weight,
        adversarial_start=recipe.steps(recipe.adversarial_start_epoch, num_images),
        augment=recipe.augment,
        seed=recipe.seed,
    )


def build_perceptual(
    recipe: DecoderRecipe, rae: RAE, world: World, vgg: Path | None = None
) -> PerceptualLoss | None:
    match recipe.perceptual:
        case "lpips":
            path = weights_file(vgg, VGG_FILE, "--vgg", "perceptual")
            return load_lpips(path, world.device)
        case "encoder":
            return encoder_distance(EncoderFeatures(rae))
        case "none":
            return None


def build_adversary(
    recipe: DecoderRecipe, rae: RAE, world: World, num_images: int, dino: Path | None = None
) -> Adversary | None:
    features: FeatureMaps
    match recipe.discriminator:
        case "dino":
            path = weights_file(dino, DINO_FILE, "--dino", "discriminator")
            vit = build_dino()
            load_dino(vit, path)
            features = DinoFeatures(vit).to(world.device)
        case "encoder":
            features = EncoderFeatures(rae)
        case "none":
            return None
    heads = Learner(
        DiscriminatorHeads(features.num_maps, features.channels),
        world,
        recipe.adamw,
        recipe.lr_schedule(num_images),
        ema_decay=None,
    )
    return Adversary(features, heads)


def weights_file(path: Path | None, what: str, flag: str, key: str) -> Path:
    """Raises ValueError that says which file it is, where it is published and what takes it."""
    if path is None or not path.is_file():
        found = "no file is given" if path is None else f"{path} is not a file"
        raise ValueError(
            f"{found} for {what}. Download it and give its path with {flag}; "
            f"small runs can do with --set {key}=encoder, or none"
        )
    return path

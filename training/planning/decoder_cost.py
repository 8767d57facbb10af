"""What a decoder's losses take beside the decoder: operations, weights, activations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from rae.training.planning.flops import (
    DINO,
    ViTShape,
    discriminator_flops,
    encoder_flops,
    encoder_parameters,
    encoder_shape,
    head_parameters,
    lpips_flops,
    model_flops,
)
from rae.training.planning.memory import FP32, frozen_vit_bytes, lpips_bytes
from rae.training.stage1.decoder_recipe import DecoderRecipe

VGG16_PARAMETERS = 14_714_688


@dataclass(frozen=True)
class Phase:
    """Steps that cost the same."""

    name: str
    num_steps: int
    flops_per_image: int


def discriminator_of(recipe: DecoderRecipe) -> tuple[ViTShape, int]:
    """Its frozen trunk and the number of its heads: 0 where there is none."""
    if recipe.discriminator == "encoder":
        return encoder_shape(recipe.encoder), 4
    return DINO, 5 if recipe.discriminator == "dino" else 0


def network_bytes(recipe: DecoderRecipe) -> int:
    """Of the losses' networks, in fp32; the discriminator's heads have gradients and moments."""
    trunk, num_heads = discriminator_of(recipe)
    total = 4 * num_heads * head_parameters(trunk.hidden_size)
    total += VGG16_PARAMETERS if recipe.perceptual == "lpips" else 0
    total += encoder_parameters(DINO) if recipe.discriminator == "dino" else 0
    return total * FP32


def loss_bytes(recipe: DecoderRecipe) -> list[int]:
    """What the gradient of each term by one reconstruction needs."""
    encoder = frozen_vit_bytes(encoder_shape(recipe.encoder))
    lpips = lpips_bytes(recipe.model.image_size)
    trunk, num_heads = discriminator_of(recipe)
    return [
        {"lpips": lpips, "encoder": encoder, "none": 0}[recipe.perceptual],
        frozen_vit_bytes(trunk) if num_heads else 0,
    ]


def decoder_phases(recipe: DecoderRecipe, num_images: int, base: int) -> Iterator[Phase]:
    """A decoder costs more once the discriminator learns, and more again once it is heard. The
    discriminator sees a reconstruction of its own, by the weights after the step."""
    encoder = encoder_flops(encoder_shape(recipe.encoder))
    perceptual = {
        "lpips": lpips_flops(recipe.model.image_size).step,
        "encoder": 3 * encoder,
        "none": 0,
    }[recipe.perceptual]
    starts = {"perceptual": (recipe.perceptual_start_epoch, perceptual)}
    trunk, num_heads = discriminator_of(recipe)
    if num_heads:
        update, adversarial = discriminator_flops(trunk, num_heads)
        again = model_flops(recipe.model).forward
        starts["discriminator"] = (recipe.discriminator_start_epoch, update.step + again)
        starts["adversarial"] = (recipe.adversarial_start_epoch, adversarial.step)
    edges = sorted({0.0, recipe.epochs, *(min(at, recipe.epochs) for at, _ in starts.values())})
    bounds = [*(recipe.steps(at, num_images) for at in edges[:-1]), recipe.num_steps(num_images)]
    for start, (first, last) in zip(edges[:-1], pairwise(bounds), strict=True):
        running = [name for name, (at, cost) in starts.items() if at <= start and cost]
        costs = sum(starts[name][1] for name in running)
        yield Phase(" + ".join(["L1", *running]), last - first, base + costs)

"""A run of stage 1, from a recipe and images to the averaged decoder."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from rae.models.rae import RAE
from rae.training.data.samples import Samples
from rae.training.data.transforms import UnreadableError
from rae.training.distributed import World
from rae.training.precision import set_matmul_precision
from rae.training.run import compile_blocks, run_task
from rae.training.run_settings import RunSettings
from rae.training.stage1.build_decoder import NO_FILES, LossFiles, build_decoder_task
from rae.training.stage1.decoder_recipe import DecoderRecipe
from rae.training.trainer import Report

SHOWN = 8


def train_decoder(
    recipe: DecoderRecipe,
    samples: Samples,
    rae: RAE,
    settings: RunSettings,
    world: World,
    report: Report,
    files: LossFiles = NO_FILES,
) -> dict[str, Tensor]:
    """The averaged weights, in the first process; the others have none.

    `rae` has the encoder, and the decoder that is trained.
    Raises ValueError where images, RAE, recipe and files do not fit, and what `run_task` raises.
    """
    if samples.field != "images" or rae.encoder is None:
        raise ValueError("a decoder learns from images, by an encoder: both are needed")
    set_matmul_precision(settings.precision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        task = build_decoder_task(
            recipe,
            rae,
            world,
            len(samples),
            precision=settings.precision,
            strategy=settings.strategy,
            sample_images=shown(samples),
            files=files,
        )
    objective, num_steps = task.objective, recipe.num_steps(len(samples))
    if task.adversary is not None and objective.discriminator_start >= num_steps:
        report.event(
            f"the discriminator would start after {objective.discriminator_start:,} steps, the run "
            f"has {num_steps:,}: it does not learn. --set discriminator_start_epoch and "
            "adversarial_start_epoch change that"
        )
    if settings.compile:
        compile_blocks(rae.decoder)
    run_task(task, recipe, samples, settings, world, report)
    return task.decoder.averages()


def shown(samples: Samples) -> Tensor:
    """A few images (n, 3, S, S) uint8, spread over the data; unreadable ones are left out.

    Raises ValueError where none of them can be read.
    """
    count = min(SHOWN, len(samples))
    found = []
    for number in (index * len(samples) // count for index in range(count)):
        with suppress(UnreadableError):
            found.append(samples.load(number, 0, number).value)
    if not found:
        raise ValueError(f"none of {count} images, spread over the data, can be read")
    return torch.stack(found)

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
from rae.training.run import compile_blocks, step_batches, trainer_config
from rae.training.run_settings import RunSettings
from rae.training.stage1.build_decoder import build_decoder_task
from rae.training.stage1.decoder_recipe import DecoderRecipe
from rae.training.trainer import Report, Trainer

SHOWN = 8


def train_decoder(
    recipe: DecoderRecipe,
    samples: Samples,
    rae: RAE,
    settings: RunSettings,
    world: World,
    report: Report,
) -> dict[str, Tensor] | None:
    """The averaged weights, in the first process; None where a signal has ended the run, to be
    gone on with.

    `rae` has the encoder, and the decoder that is trained.
    Raises ValueError where images, RAE and recipe do not fit, DivergedError, OSError.
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
        )
    if settings.compile:
        compile_blocks(rae.decoder)
    trainer = Trainer(
        task,
        lambda start: step_batches(
            samples,
            settings,
            world,
            seed=recipe.seed,
            batch_size=recipe.batch_size,
            start_step=start,
        ),
        trainer_config(settings, recipe.num_steps(len(samples))),
        world,
        settings.out,
        report,
    )
    return task.decoder.averages() if trainer.run() else None


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

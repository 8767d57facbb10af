"""What runs of all stages share: their steps, their batches, their compiled blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from torch import nn

from rae.training.batch import Batch
from rae.training.distributed import World
from rae.training.recipe import Recipe
from rae.training.run_settings import RunSettings
from rae.training.trainer import Report, Task, Trainer, TrainerConfig

if TYPE_CHECKING:
    from rae.training.data.samples import Samples


def run_task(
    task: Task,
    recipe: Recipe,
    samples: Samples,
    settings: RunSettings,
    world: World,
    report: Report,
    *,
    milestone_epochs: Sequence[float] = (),
) -> None:
    """All steps of `recipe` on `samples`, from the last snapshot in `settings.out` on; those of
    `milestone_epochs` stay.

    Raises StoppedError after a signal, DivergedError, OSError, and ValueError where batch,
    processes and data do not fit.
    """
    config = TrainerConfig(
        num_steps=recipe.num_steps(len(samples)),
        log_every=settings.log_every,
        sample_every=settings.sample_every,
        snapshot_every=settings.snapshot_every,
        keep=settings.keep,
        milestones=frozenset(recipe.steps(epoch, len(samples)) for epoch in milestone_epochs),
        on_nonfinite=settings.on_nonfinite,
    )

    def make_batches(start: int) -> Iterator[Sequence[Batch]]:
        return step_batches(recipe, samples, settings, world, start)

    Trainer(task, make_batches, config, world, settings.out, report).run()


def step_batches(
    recipe: Recipe, samples: Samples, settings: RunSettings, world: World, start_step: int
) -> Iterator[Sequence[Batch]]:
    """The micro-batches of each step of this process, from `start_step` on.

    Raises ValueError for a batch that the processes and the micro-batch do not divide.
    """
    from rae.training.data.stream import batches

    micro_batch = settings.micro_batch or max(1, recipe.batch_size // world.size)
    one_by_one = batches(
        samples,
        seed=recipe.seed,
        batch_size=recipe.batch_size,
        micro_batch=micro_batch,
        world=world,
        start_step=start_step,
        num_workers=settings.num_workers,
    )
    while True:
        yield list(islice(one_by_one, recipe.batch_size // (world.size * micro_batch)))


def compile_blocks(module: nn.Module) -> None:
    """Each block by itself: blocks of one shape share what was compiled."""
    for child in module.modules():
        if isinstance(child, nn.ModuleList):
            for block in child:
                block.compile(dynamic=False)

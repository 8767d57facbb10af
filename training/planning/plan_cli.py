"""`rae train plan`: what a run takes, before anybody starts it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console

from rae.models.command_line import takes
from rae.training.console import NOTHING_WRITTEN, clear_errors
from rae.training.overrides import override, to_assignments
from rae.training.run_settings import (
    DECODERS,
    DITS,
    Changes,
    Precision,
    Strategy,
    preset_argument,
)
from rae.training.stage1.decoder_recipe import DECODER_PRESETS, DecoderRecipe
from rae.training.stage2.presets import DIT_PRESETS, DiTRecipe

PRESETS: dict[str, DiTRecipe | DecoderRecipe] = {**DECODER_PRESETS, **DIT_PRESETS}
PRESETS_HELP = f"Of stage 1: {', '.join(DECODERS)}. Of stage 2: {', '.join(DITS)}."


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    preset: Annotated[str, preset_argument((*DECODERS, *DITS), PRESETS_HELP)]
    gpus: Annotated[int, typer.Option(min=1, help="How many, over all machines.")] = 8
    gpu: Annotated[str, typer.Option(help="Their name: H200, A100 40GB, 4090.")] = "H200"
    mfu: Annotated[float, typer.Option(help="The assumed part of their peak.")] = 0.4
    micro_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Images of a forward.", show_default="the most that fit"),
    ] = None
    precision: Annotated[Precision, typer.Option(help="Of matmuls.")] = "tf32"
    strategy: Annotated[Strategy, typer.Option(help="What GPUs share.")] = "ddp"
    latents: Annotated[
        bool, typer.Option("--latents", help="Pre-encoded: the encoder does not run.")
    ] = False
    images: Annotated[
        int | None,
        typer.Option(min=1, help="Of an epoch.", show_default="ImageNet's, or the digits'"),
    ] = None
    changes: Changes = None
    only_recipe: Annotated[
        bool, typer.Option("--recipe", help="Print the recipe alone, as --set takes it.")
    ] = False


@takes(PlanSettings)
def plan_command(settings: PlanSettings) -> None:
    """Print steps, operations, memory and days of a run, and its command: nothing is started."""
    console, preset, changes = Console(), settings.preset, settings.changes or []
    with clear_errors(NOTHING_WRITTEN):
        recipe = override(PRESETS[preset], changes)
        if settings.only_recipe:
            show(console, *to_assignments(recipe))
            return
        from rae.training.planning.gpus import Cluster, find_gpu
        from rae.training.planning.plan import Plan, images_of
        from rae.training.planning.plan_sheet import command, sheet, verdict

        name, hardware = find_gpu(settings.gpu)
        plan = Plan(
            recipe=recipe,
            cluster=Cluster(
                gpu_name=name,
                gpu=hardware,
                num_gpus=settings.gpus,
                precision=settings.precision,
                strategy=settings.strategy,
                mfu=settings.mfu,
            ),
            num_images=settings.images or images_of(preset),
            pre_encoded=settings.latents,
            micro_batch=settings.micro_batch,
        )
    console.print(sheet(plan, preset))
    console.print(verdict(plan))
    if not plan.fits(plan.used_micro_batch):
        raise typer.Exit(1)
    show(console, command(plan, preset, changes))


def show(console: Console, *lines: str) -> None:
    """As they are, to be copied."""
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

"""`rae train plan`: what a run takes, before anybody starts it."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from rae.training.console import NOTHING_WRITTEN, clear_errors
from rae.training.run_settings import Precision, Strategy


def plan_command(
    preset: Annotated[str, typer.Argument(help="DiTDH-XL-256, decoder-DINOv2-B-256, …")],
    gpus: Annotated[int, typer.Option(help="How many, over all machines.")] = 8,
    gpu: Annotated[str, typer.Option(help="Their name: H200, A100 40GB, 4090.")] = "H200",
    mfu: Annotated[
        float, typer.Option(help="The assumed part of their peak that a run gets.")
    ] = 0.4,
    micro_batch: Annotated[
        int | None, typer.Option(help="Images of a forward; else the most that fit.")
    ] = None,
    precision: Annotated[Precision, typer.Option(help="Of matmuls.")] = "tf32",
    strategy: Annotated[Strategy, typer.Option(help="What GPUs share.")] = "ddp",
    latents: Annotated[bool, typer.Option(help="Pre-encoded: the encoder does not run.")] = False,
    images: Annotated[int, typer.Option(help="Of an epoch.")] = 1_281_167,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of the preset's recipe.")
    ] = None,
) -> None:
    """Print steps, operations, memory and days of a run: nothing is started."""
    from rae.training.overrides import override, suggestion
    from rae.training.planning.gpus import find_gpu
    from rae.training.planning.plan import Cluster, Plan, presets
    from rae.training.planning.plan_sheet import sheet, verdict

    console = Console()
    with clear_errors(NOTHING_WRITTEN):
        known = presets()
        if preset not in known:
            raise ValueError(f"unknown preset {preset!r}; {suggestion(preset, list(known))}")
        name, hardware = find_gpu(gpu)
        cluster = Cluster(
            gpu_name=name,
            gpu=hardware,
            num_gpus=gpus,
            precision=precision,
            strategy=strategy,
            mfu=mfu,
        )
        plan = Plan(
            recipe=override(known[preset], set_ or []),
            cluster=cluster,
            num_images=images,
            pre_encoded=latents,
            micro_batch=micro_batch,
        )
    console.print(sheet(plan, preset))
    console.print(verdict(plan))
    if not plan.fits(plan.used_micro_batch):
        raise typer.Exit(1)

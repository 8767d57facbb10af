"""`rae train plan`: what a run takes, before anybody starts it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from rae.training.distributed import Strategy
from rae.training.gpus import find_gpu
from rae.training.overrides import override, suggestion
from rae.training.plan import FRAGMENTATION, RESERVE_BYTES, Cluster, Plan, presets
from rae.training.precision import Precision
from rae.training.presets import IMAGENET_IMAGES

GIB = 2**30


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
    images: Annotated[int, typer.Option(help="Of an epoch.")] = IMAGENET_IMAGES,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of the preset's recipe.")
    ] = None,
) -> None:
    """Print steps, operations, memory and days of a run: nothing is started."""
    console = Console()
    try:
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
        plan.steps_per_epoch  # noqa: B018
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    for table in (work(plan, preset), memory(plan), time(plan), disk(plan)):
        console.print(table)
    console.print(verdict(plan))
    if not plan.fits(plan.used_micro_batch):
        raise typer.Exit(1)


def section(title: str, rows: Iterator[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, min_width=60)
    table.add_column()
    table.add_column(justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def work(plan: Plan, preset: str) -> Table:
    def rows() -> Iterator[tuple[str, str]]:
        yield "trained parameters", f"{plan.num_parameters / 1e6:,.1f} M"
        yield "batch", f"{plan.recipe.batch_size:,} images"
        yield "steps an epoch", f"{plan.steps_per_epoch:,}"
        yield "steps", f"{plan.num_steps:,} ({plan.recipe.epochs:g} epochs)"
        yield "images seen", f"{plan.images_seen / 1e6:,.1f} M"
        for phase in plan.phases:
            name = "an image" if len(plan.phases) == 1 else f"an image: {phase.name}"
            cost = f"{phase.flops_per_image / 1e9:,.1f} GFLOP"
            yield name, cost if len(plan.phases) == 1 else f"{phase.num_steps:,} steps of {cost}"
        yield "a step", f"{plan.step_flops / 1e12:,.1f} TFLOP"
        yield "the run", f"{plan.flops / 1e18:,.2f} EFLOP"

    encoder = "encoder included" if plan.encoder else "without the encoder"
    return section(f"{preset}: work ({encoder})", rows())


def memory(plan: Plan) -> Table:
    cluster, micro_batch = plan.cluster, plan.used_micro_batch

    def rows() -> Iterator[tuple[str, str]]:
        state = plan.state
        activations = micro_batch * plan.activation_bytes
        parts = {
            "weights, fp32": state.weights,
            "gradients, fp32": state.gradients,
            "AdamW's two moments": state.moments,
            "EMA": state.ema,
            "copies of weights and gradients": state.working,
            "encoder and networks of the loss": plan.frozen_bytes,
            f"activations of {micro_batch} images": activations,
        }
        for name, size in parts.items():
            yield name, gib(size)
        yield "in all", gib(plan.bytes_with(micro_batch))
        reserve = f"{gib(RESERVE_BYTES)} for CUDA and {FRAGMENTATION:.0%}"
        yield f"usable of {cluster.gpu.memory_gib:g} GiB, less {reserve}", gib(cluster.usable_bytes)

    sharing = {"ddp": "DDP", "fsdp": "FSDP"}[cluster.strategy] if cluster.num_gpus > 1 else "alone"
    return section(f"Memory of each {cluster.gpu_name} ({sharing}, {cluster.precision})", rows())


def time(plan: Plan) -> Table:
    cluster = plan.cluster

    def rows() -> Iterator[tuple[str, str]]:
        peak = cluster.gpu.peak_flops(cluster.precision) / 1e12
        yield f"peak of a GPU in {cluster.precision}, datasheet", f"{peak:,.0f} TFLOP/s"
        yield "MFU", f"{cluster.mfu:.0%}, an assumption: --mfu"
        yield (
            "images/s",
            f"{plan.images_per_s:,.0f} ({plan.images_per_s / cluster.num_gpus:,.0f} a GPU)",
        )
        yield "a step", f"{plan.seconds / plan.num_steps:.3f} s"
        yield "GPU-hours", f"{plan.gpu_hours:,.1f}"
        yield "days", f"{plan.days:,.2f}"

    return section(f"Time on {cluster.num_gpus} × {cluster.gpu_name}", rows())


def disk(plan: Plan) -> Table:
    def rows() -> Iterator[tuple[str, str]]:
        yield "snapshots/step-…: to go on from, each", gib(plan.snapshot_bytes)
        yield "the exported EMA weights", gib(plan.export_bytes)
        yield "log.jsonl, events.log, loss.png, samples/", "small"

    return section("Written", rows())


def verdict(plan: Plan) -> str:
    micro_batch, accumulation = plan.used_micro_batch, plan.accumulation
    shape = f"{plan.cluster.num_gpus} GPUs × {micro_batch} images × {accumulation} micro-batches"
    if plan.fits(micro_batch):
        return f"[green]Fits:[/] {shape} = a batch of {plan.recipe.batch_size}."
    largest = plan.largest_micro_batch
    if largest is None:
        hint = "" if plan.cluster.strategy == "fsdp" else " Try --strategy fsdp."
        return f"[red]Does not fit[/] even with a micro-batch of 1.{hint}"
    return f"[red]Does not fit:[/] {shape}. A micro-batch of {largest} does."


def gib(size: int) -> str:
    return f"{size / GIB:,.2f} GiB"

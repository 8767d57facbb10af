"""A plan as a person reads it."""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE
from rich.table import Table

from rae.training.planning.plan import FRAGMENTATION, RESERVE_BYTES, Plan

GIB = 2**30

Row = tuple[str, str]


def sheet(plan: Plan, preset: str) -> Table:
    cluster = plan.cluster
    encoder = "the encoder included" if plan.encoder else "without the encoder"
    sharing = {"ddp": "DDP", "fsdp": "FSDP"}[cluster.strategy] if cluster.num_gpus > 1 else "alone"
    table = Table(box=SIMPLE, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for title, rows in (
        (f"{preset}, {encoder}", work(plan)),
        (f"Memory of each {cluster.gpu_name} ({sharing}, {cluster.precision})", memory(plan)),
        (f"Time on {cluster.num_gpus} × {cluster.gpu_name}", time(plan)),
        ("Written", disk(plan)),
    ):
        table.add_section()
        table.add_row(f"[bold]{title}")
        for name, value in rows:
            table.add_row(f"  {name}", value)
    return table


def work(plan: Plan) -> Iterator[Row]:
    yield "trained parameters", f"{plan.num_parameters / 1e6:,.1f} M"
    yield "batch", f"{plan.recipe.batch_size:,} images"
    yield "steps an epoch", f"{plan.steps_per_epoch:,}"
    yield f"steps of {plan.recipe.epochs:g} epochs", f"{plan.num_steps:,}"
    yield "images seen", f"{plan.images_seen / 1e6:,.1f} M"
    for phase in plan.phases:
        cost = f"{phase.flops_per_image / 1e9:,.1f} GFLOP"
        if len(plan.phases) == 1:
            yield "an image", cost
        else:
            yield f"an image in {phase.num_steps:,} steps of {phase.name}", cost
    yield "a step", f"{plan.step_flops / 1e12:,.1f} TFLOP"
    yield "the run", f"{plan.flops / 1e18:,.2f} EFLOP"


def memory(plan: Plan) -> Iterator[Row]:
    state, micro_batch = plan.state, plan.used_micro_batch
    parts = {
        "weights, fp32": state.weights,
        "gradients, fp32": state.gradients,
        "AdamW's two moments": state.moments,
        "EMA": state.ema,
        "copies of weights and gradients": state.working,
        "encoder and networks of the loss": plan.frozen_bytes,
        f"activations of {micro_batch} images, not compiled": micro_batch * plan.activation_bytes,
        "in all": plan.bytes_with(micro_batch),
    }
    for name, size in parts.items():
        yield name, gib(size)
    reserve = f"{RESERVE_BYTES / GIB:g} GiB for CUDA and {FRAGMENTATION:.0%}"
    usable = gib(plan.cluster.usable_bytes)
    yield f"usable of {plan.cluster.gpu.memory_gib:g} GiB, less {reserve}", usable


def time(plan: Plan) -> Iterator[Row]:
    cluster = plan.cluster
    peak = cluster.gpu.peak_flops(cluster.precision) / 1e12
    yield f"peak of a GPU in {cluster.precision}, datasheet", f"{peak:,.0f} TFLOP/s"
    yield "MFU, an assumption (--mfu)", f"{cluster.mfu:.0%}"
    yield "images/s", f"{plan.images_per_s:,.0f}"
    yield "images/s that each GPU's data loader has to give", per_gpu(plan)
    yield "a step", f"{plan.seconds / plan.num_steps:.3f} s"
    yield "GPU-hours", f"{plan.gpu_hours:,.1f}"
    yield "days", f"{plan.days:,.2f}"


def per_gpu(plan: Plan) -> str:
    return f"{plan.images_per_s / plan.cluster.num_gpus:,.0f}"


def disk(plan: Plan) -> Iterator[Row]:
    yield "snapshots/, to go on from: each", gib(plan.snapshot_bytes)
    yield "the finished model, its EMA weights", gib(plan.export_bytes)
    yield "log.jsonl, events.log, loss.png, samples/", "little"


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

"""A plan as a person reads it, and the command that runs it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence

from rich.box import SIMPLE
from rich.table import Table

from rae.training.planning.gpus import FRAGMENTATION, RESERVE_BYTES
from rae.training.planning.plan import Plan
from rae.training.stage1.decoder_recipe import DecoderRecipe
from rae.training.wording import counted, duration, flop

GIB = 2**30
GPUS_PER_MACHINE = 8

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
    yield f"steps an epoch of {counted(plan.num_images, 'image')}", f"{plan.steps_per_epoch:,}"
    yield f"steps of {counted(plan.recipe.epochs, 'epoch')}", f"{plan.num_steps:,}"
    yield "images seen", f"{plan.images_seen / 1e6:,.1f} M"
    for phase in plan.phases:
        cost = f"{phase.flops_per_image / 1e9:,.1f} GFLOP"
        if len(plan.phases) == 1:
            yield "an image", cost
        else:
            yield f"an image in {counted(phase.num_steps, 'step')} of {phase.name}", cost
    yield "a step", flop(plan.step_flops)
    yield "the run", flop(plan.flops)


def memory(plan: Plan) -> Iterator[Row]:
    state, micro_batch = plan.state, plan.used_micro_batch
    images = counted(micro_batch, "image")
    parts = {
        "weights, fp32": state.weights,
        "gradients, fp32": state.gradients,
        "AdamW's two moments": state.moments,
        "EMA": state.ema,
        "copies of weights and gradients": state.working,
        "encoder and networks of the loss": plan.frozen_bytes,
        f"activations of {images}, not compiled": micro_batch * plan.activation_bytes,
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
    per_gpu = plan.images_per_s / cluster.num_gpus
    yield "images/s that each GPU's data loader has to give", f"{per_gpu:,.0f}"
    yield "a step", f"{plan.seconds / plan.num_steps:.3f} s"
    yield "GPU-hours", f"{plan.gpu_hours:,.1f}"
    yield "the run", duration(plan.seconds)


def disk(plan: Plan) -> Iterator[Row]:
    yield "snapshots/, to go on from: each", gib(plan.snapshot_bytes)
    yield "the finished model, its EMA weights", gib(plan.export_bytes)
    yield "log.jsonl, events.log, loss.png, samples/", "little"


def verdict(plan: Plan) -> str:
    shape = " × ".join(
        (
            counted(plan.cluster.num_gpus, "GPU"),
            counted(plan.used_micro_batch, "image"),
            f"{plan.accumulation:,} micro-batch{'' if plan.accumulation == 1 else 'es'}",
        )
    )
    if plan.fits(plan.used_micro_batch):
        return f"[green]Fits:[/] {shape} = a batch of {plan.recipe.batch_size:,}."
    largest = plan.largest_micro_batch
    if largest is None:
        can_share = plan.cluster.num_gpus > 1 and plan.cluster.strategy == "ddp"
        hint = " Try --strategy fsdp." if can_share else ""
        return f"[red]Does not fit[/] even with a micro-batch of 1.{hint}"
    return f"[red]Does not fit:[/] {shape}. A micro-batch of {largest} does."


def command(plan: Plan, preset: str, changes: Sequence[str]) -> str:
    """What to type for `plan`, whose recipe is `preset` with `changes`. In capitals: what no plan
    knows."""
    cluster = plan.cluster
    if isinstance(plan.recipe, DecoderRecipe):
        files = loss_files(plan.recipe)
        stage = ["decoder", preset, "--images", "IMAGES", "--encoder", "ENCODER", *files]
    else:
        data = ["--latents", "LATENTS"] if plan.pre_encoded else ["--images", "IMAGES"]
        stage = ["dit", preset, "--rae", "RAE", "--statistics", "STATISTICS", *data]
    how = ["--micro-batch", str(plan.used_micro_batch), "--precision", cluster.precision]
    if cluster.num_gpus > 1:
        how += ["--strategy", cluster.strategy]
    sets = [word for change in changes for word in ("--set", change)]
    return shlex.join([*launcher(cluster.num_gpus), "train", *stage, "--out", "RUN", *how, *sets])


def launcher(num_gpus: int) -> list[str]:
    """Of as many processes: on several machines where these have too few GPUs."""
    if num_gpus == 1:
        return ["rae"]
    own = num_gpus if num_gpus <= GPUS_PER_MACHINE else math.gcd(num_gpus, GPUS_PER_MACHINE)
    words = ["torchrun", "--nproc-per-node", str(own)]
    if own < num_gpus:
        words += ["--nnodes", str(num_gpus // own), "--rdzv-backend", "c10d"]
        words += ["--rdzv-endpoint", "HOST:PORT"]
    return [*words, "-m", "rae.server"]


def loss_files(recipe: DecoderRecipe) -> list[str]:
    """Flags of the files that a recipe's losses need."""
    vgg = ["--vgg", "VGG"] if recipe.perceptual == "lpips" else []
    return [*vgg, *(["--dino", "DINO"] if recipe.discriminator == "dino" else [])]


def gib(size: int) -> str:
    return f"{size / GIB:,.2f} GiB"

"""Throughput of a step of stage 2: our trainer against the authors', on the same model and data.

    python benchmarks/train_step.py --upstream DIR [--model DiTDH-S-256] [--batch 8]
        [--precision tf32 …] [--variant "ours compiled" …] [--encode] [--device cuda] [--json FILE]

DIR is a clone of github bytetriper/RAE; benchmarks/authors.py says what it needs. Each variant runs
in a process of its own, in `--rounds` turns, so that a busy machine slows all alike and memory is
its own; times are of whole steps after `--warm-up`, the loss read after each as both trainers do.

- authors: DDP of their model, their loss, clipping, fused AdamW, schedule and EMA, in the order of
  their src/train.py. They demand --compile: "authors compiled"; "authors" is without.
- ours: DiTTask.train_step, random draws of each sample by its position; "ours compiled" compiles
  the blocks as `rae train dit --compile` does.

- trials, where they are named: "whole" compiles all of the model at once; "aligned" pads the head's
  odd hidden size, 5461, with zeros to a multiple of 8, which tensor cores ask of a matrix.

Latents are given; with --encode a DINOv2-B with random weights makes them of 256 px images.
`cpu_ms` is the time of this process's threads on processors, which a neighbour does not lengthen;
`mfu` is of the device's datasheet where it is known; `of_matmul` is of one large product's rate,
measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import torch
import torch.nn.functional as F
from authors import AuthorsTrainer, add_clone, make_model
from forward import machine
from subjects import draw_weights
from torch import Tensor, nn

from rae.models.config import DecoderConfig, DiTDHConfig, EncoderConfig
from rae.models.dit import DiTConfig
from rae.models.encoder import Encoder
from rae.models.layers import SwiGLU
from rae.models.published import NORMALISATION
from rae.models.rae import RAE
from rae.training.batch import Batch
from rae.training.distributed import World
from rae.training.learner import Learner
from rae.training.planning.flops import model_flops
from rae.training.planning.gpus import peak_flops
from rae.training.precision import Precision, set_matmul_precision
from rae.training.recipe import IMAGENET_IMAGES
from rae.training.run import compile_blocks
from rae.training.stage2.dit_dh import DiTTask
from rae.training.stage2.presets import DIT_PRESETS, DiTRecipe
from rae.training.stage2.run_dit import build, objective

VARIANTS = ("authors", "authors compiled", "ours", "ours compiled")
TRIALS = ("ours whole", "ours aligned", "ours compiled aligned", "ours whole aligned")
RATIOS = {"faster": ("ours", "authors"), "faster_compiled": ("ours compiled", "authors compiled")}
ENCODER_SIZE, IMAGE_SIZE = 224, 256
Step = Callable[[int], float]


def make_weights(recipe: DiTRecipe) -> dict[str, Tensor]:
    model = build(recipe.model, 0)
    draw_weights(model)
    return model.state_dict()


def example(recipe: DiTRecipe, batch: int, device: torch.device, encodes: bool) -> Batch:
    torch.manual_seed(0)
    images = torch.randint(256, (batch, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    return Batch(
        positions=torch.arange(batch),
        class_labels=torch.randint(recipe.model.num_classes, (batch,)),
        images=images if encodes else None,
        latents=None if encodes else torch.randn(batch, *recipe.model.latent_shape),
    ).to(device)


def dinov2() -> nn.Module:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(patch_size=14, image_size=518)
    return Dinov2WithRegistersModel(config).eval()


def our_rae(config: DiTDHConfig | DiTConfig, encodes: bool) -> RAE:
    """Its decoder, which nobody runs, is a small one."""
    decoder = DecoderConfig(
        latent_channels=config.latent_channels,
        hidden_size=4,
        depth=1,
        num_heads=1,
        intermediate_size=4,
        grid=config.latent_size,
    )
    mean, std = NORMALISATION["dinov2"]
    rae = RAE(decoder, image_mean=mean, image_std=std)
    if encodes:
        rae.encoder = Encoder(EncoderConfig(kind="dinov2", image_size=ENCODER_SIZE), dinov2())
    return rae


def their_encode(recipe: DiTRecipe, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Their RAE.encode, without the decoder that their RAE would make."""
    from stage1.encoders.dinov2 import Dinov2withNorm  # type: ignore[import-not-found]
    from stage1.rae import RAE as TheirRAE  # type: ignore[import-not-found]

    encoder = Dinov2withNorm.__new__(Dinov2withNorm)
    nn.Module.__init__(encoder)
    encoder.encoder = dinov2().requires_grad_(False)
    encoder.encoder.layernorm = nn.LayerNorm(768, elementwise_affine=False, eps=1e-6)
    mean, std = NORMALISATION["dinov2"]
    rae = SimpleNamespace(
        encoder=encoder.to(device),
        encoder_input_size=ENCODER_SIZE,
        encoder_mean=torch.tensor(mean).view(1, 3, 1, 1),
        encoder_std=torch.tensor(std).view(1, 3, 1, 1),
        training=False,
        reshape_to_2d=True,
        do_normalization=True,
        latent_mean=torch.zeros(recipe.model.latent_shape),
        latent_var=torch.ones(recipe.model.latent_shape),
        eps=1e-5,
    )
    return partial(TheirRAE.encode, rae)


def authors_step(recipe: DiTRecipe, batch: Batch, precision: Precision, compiles: bool) -> Step:
    device = batch.class_labels.device
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{tempfile.mkdtemp()}/store",
        rank=0,
        world_size=1,
    )
    model = make_model(recipe.model)
    model.load_state_dict(make_weights(recipe))
    trainer = AuthorsTrainer(
        model.to(device),
        recipe,
        IMAGENET_IMAGES // recipe.batch_size,
        precision=precision,
        compiles=compiles,
        trains_tables=True,
    )
    if batch.images is None:
        assert batch.latents is not None
        return lambda _, latents=batch.latents: trainer.step(latents, batch.class_labels)
    encode = their_encode(recipe, device)
    encode = torch.compile(encode) if compiles else encode
    # Their loader gives floats in [0, 1].
    images = batch.images.float() / 255
    return lambda _: trainer.step(encode(images), batch.class_labels)


class AlignedSwiGLU(SwiGLU):
    """`SwiGLU` with zeros after its hidden units, which add nothing."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.w3.in_features
        padding = -hidden % 8
        weight = F.pad(self.w12.weight.unflatten(0, (2, hidden)), (0, 0, 0, padding))
        bias = F.pad(self.w12.bias.unflatten(0, (2, hidden)), (0, padding))
        x1, x2 = F.linear(x, weight.flatten(0, 1), bias.flatten()).chunk(2, dim=-1)
        return F.linear(F.silu(x1) * x2, F.pad(self.w3.weight, (0, padding)), self.w3.bias)


def align(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, SwiGLU) and module.w3.in_features % 8:
            module.__class__ = AlignedSwiGLU


def our_step(
    recipe: DiTRecipe, batch: Batch, precision: Precision, options: Collection[str]
) -> tuple[DiTTask, Step]:
    device = batch.class_labels.device
    model = build(recipe.model, 0)
    model.load_state_dict(make_weights(recipe))
    learner = Learner[nn.Module](
        model,
        World(0, 1, device),
        recipe.adamw,
        recipe.lr_schedule(IMAGENET_IMAGES),
        ema_decay=recipe.ema_decay,
    )
    if "aligned" in options:
        align(learner.module)
    if "compiled" in options:
        compile_blocks(learner.module)
    if "whole" in options:
        learner.module.compile(dynamic=False)
    rae = our_rae(recipe.model, batch.images is not None).to(device)
    task = DiTTask(learner, objective(recipe), rae, precision=precision)
    return task, lambda step: task.train_step([batch], step)["loss"].item()


def draw_seconds(task: DiTTask, batch: Batch, device: torch.device) -> float:
    """Of the random numbers of a batch, which are part of a step."""
    shape = task.latents(batch).shape[1:]
    times = []
    for _ in range(5):
        start = time.perf_counter()
        task.objective.draw(batch.positions, shape, device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One variant in this process: seconds of each step, memory, and the last loss."""
    add_clone(args.upstream)
    (variant,), (precision,) = args.variant, args.precision
    set_matmul_precision(precision)
    recipe, device = DIT_PRESETS[args.model], args.device
    batch = example(recipe, args.batch, device, args.encode)
    who, *options = variant.split()
    task = None
    if who == "ours":
        task, step = our_step(recipe, batch, precision, options)
    else:
        step = authors_step(recipe, batch, precision, "compiled" in options)
    times: list[float] = []
    cpu_times: list[float] = []
    loss = 0.0
    for index in range(args.warm_up + args.steps):
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = step(index)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        cpu_times.append(time.process_time() - cpu_start)
    memory = peak_memory(device)
    return {
        "seconds": times[args.warm_up :],
        "cpu_seconds": cpu_times[args.warm_up :],
        "memory_gib": memory / 2**30,
        "matmul_flops": matmul_rate(device, precision),
        "draw_seconds": draw_seconds(task, batch, device) if task else 0.0,
        "loss": loss,
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: of tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def matmul_rate(device: torch.device, precision: Precision) -> float:
    """FLOP/s of one large product, the best of ten."""
    size = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def run_child(variant: str, precision: str, args: argparse.Namespace) -> dict[str, Any]:
    """Raises CalledProcessError."""
    flags = [f"--{name}={getattr(args, name)}" for name in ("upstream", "model", "batch", "device")]
    flags += [f"--steps={args.steps}", f"--warm-up={args.warm_up}"]
    flags += [f"--variant={variant}", f"--precision={precision}", "--child"]
    flags += ["--encode"] if args.encode else []
    output = subprocess.run(
        [sys.executable, __file__, *flags], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    return json.loads(output.splitlines()[-1])


def summarise(rounds: list[dict[str, Any]], precision: Precision, args: Any) -> dict[str, Any]:  # noqa: ANN401
    seconds = statistics.median(s for one in rounds for s in one["seconds"])
    flops = model_flops(DIT_PRESETS[args.model].model).step * args.batch / seconds
    is_gpu = args.device.type == "cuda"
    peak = peak_flops(torch.cuda.get_device_name(args.device), precision) if is_gpu else None
    return {
        "ms": round(1000 * seconds, 1),
        "ms_fastest": round(1000 * min(s for one in rounds for s in one["seconds"]), 1),
        "cpu_ms": round(1000 * statistics.median(s for o in rounds for s in o["cpu_seconds"]), 1),
        "images_per_s": round(args.batch / seconds, 3),
        "gflop_per_s": round(flops / 1e9, 1),
        "mfu": flops / peak if peak else None,
        "of_matmul": flops / max(one["matmul_flops"] for one in rounds),
        "memory_gib": round(max(one["memory_gib"] for one in rounds), 2),
        "draw_ms": round(1000 * min(one["draw_seconds"] for one in rounds), 2),
        "loss": rounds[-1]["loss"],
    }


def compare(precision: Precision, args: argparse.Namespace) -> dict[str, Any]:
    rounds: dict[str, list[dict[str, Any]]] = {variant: [] for variant in args.variant}
    for _ in range(args.rounds):
        for variant in args.variant:
            rounds[variant].append(run_child(variant, precision, args))
            seconds = statistics.median(rounds[variant][-1]["seconds"])
            cpu_seconds = statistics.median(rounds[variant][-1]["cpu_seconds"])
            sys.stderr.write(
                f"{precision} {variant}: {1000 * seconds:.1f} ms, cpu {1000 * cpu_seconds:.1f} ms\n"
            )
    figures: dict[str, Any] = {
        variant: summarise(each, precision, args) for variant, each in rounds.items()
    }
    return figures | {
        f"{name}_{clock}": figures[theirs][clock] / figures[ours][clock]
        for name, (ours, theirs) in RATIOS.items()
        if {ours, theirs} <= figures.keys()
        for clock in ("ms", "cpu_ms")
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--upstream", type=Path, required=True, help="a clone of bytetriper/RAE")
    parser.add_argument("--model", default="DiTDH-S-256", choices=DIT_PRESETS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", action="append", choices=get_args(Precision))
    parser.add_argument(
        "--variant", action="append", choices=VARIANTS + TRIALS, help="the first four, if none"
    )
    parser.add_argument("--encode", action="store_true", help="of images, not of latents")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.variant = args.variant or list(VARIANTS)
    args.precision = args.precision or (["tf32"] if args.device.type == "cuda" else ["fp32"])
    return args


def main() -> int:
    args = parse()
    try:
        add_clone(args.upstream)
    except ImportError as error:
        sys.exit(f"train_step: {args.upstream} is no clone of bytetriper/RAE that can run: {error}")
    if args.child:
        sys.stdout.write(f"\n{json.dumps(measure(args))}\n")
        return 0
    figures: dict[str, Any] = {
        "model": args.model,
        "batch": args.batch,
        "from": "images" if args.encode else "latents",
        **machine(args.device),
    }
    for precision in args.precision:
        try:
            figures[precision] = compare(precision, args)
        except subprocess.CalledProcessError as error:
            sys.exit(f"train_step: {error}")
        if args.json:  # what is measured so far stays when the time is up
            args.json.write_text(json.dumps(figures, indent=1) + "\n")
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

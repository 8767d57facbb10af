"""What the scripts of the paper's claims share: the digits' latents, training, judging.

The encoder, its statistics and the decoder are the embedded checkpoint's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rae.models.checkpoint import Checkpoint, load_checkpoint
from rae.models.config import DiTDHConfig
from rae.models.dit import DiTConfig
from rae.models.rae import RAE
from rae.models.sampling import VelocityModel, denoise, draw_noise, timesteps, to_uint8
from rae.training.batch import Batch
from rae.training.digits.digits_data import (
    Digits,
    random_transforms,
    render,
    split_digits,
    to_scans,
)
from rae.training.digits.digits_judge import BATCH, Judge, decode, protocol_labels
from rae.training.distributed import World
from rae.training.draws import generator
from rae.training.evaluation.frechet import Gaussian, Moments, frechet_distance
from rae.training.learner import AdamWConfig, Learner
from rae.training.lr_schedule import LRSchedule
from rae.training.planning.flops import model_flops
from rae.training.precision import Precision
from rae.training.stage2.dit_dh import DiTTask, FlowMatching
from rae.training.stage2.run_dit import build
from rae.training.trainer import Task

ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = ROOT / "models" / "digits"

ROWS, AUGMENT = 31, 32
"""Purposes of random numbers, apart from those of training."""

Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a generator is trained; AdamW as everywhere, 2 % of `lr` at the end."""

    steps: int
    batch_size: int
    lr: float
    shift: float = 3.0
    class_dropout_prob: float = 0.1
    ema_decay: float = 0.998
    precision: Precision = "bf16"
    seed: int = 0

    @property
    def lr_schedule(self) -> LRSchedule:
        warmup = min(100, self.steps // 10)
        return LRSchedule(total_steps=self.steps, warmup_steps=warmup, final_factor=0.02)


@dataclass(frozen=True, kw_only=True)
class Lab:
    """Digits with their latents (M, C, h, w) as the encoder gives them; images (M, 3, S, S) uint8.

    `held_out` are images (N, 3, S, S) in [0, 1]; `real` are the training images' features.
    """

    checkpoint: Checkpoint
    judge: Judge
    images: Tensor
    latents: Tensor
    class_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor
    real: Gaussian

    @property
    def rae(self) -> RAE:
        return self.checkpoint.rae

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Without end: rows drawn anew for each batch."""
        step = 0
        while True:
            drawn = generator("cpu", seed, step, ROWS)
            rows = torch.randint(len(self.latents), (batch_size,), generator=drawn)
            yield Batch(
                positions=torch.arange(step * batch_size, (step + 1) * batch_size),
                class_labels=self.class_labels[rows],
                images=self.images[rows],
                latents=self.latents[rows],
            )
            step += 1

    def features(self, images: Tensor) -> Gaussian:
        """Of images in [0, 1]: the mean of the encoder's tokens."""
        return gaussian(encode(self.rae, images))

    def frechet(self, images: Tensor) -> float:
        """Fréchet distance of images to the training images."""
        return frechet_distance(self.features(images), self.real)

    def recognised(self, images: Tensor, class_labels: Tensor) -> float:
        return self.judge.recognised(to_scans(images), class_labels)

    def samples(
        self, model: VelocityModel, shift: float, *, per_class: int, num_steps: int = 25
    ) -> tuple[Tensor, Tensor]:
        """Unguided normalised latents, and their labels; sample i has seed i."""
        class_labels = protocol_labels(len(self.checkpoint.config.classes), per_class)
        shape, grid = self.latents.shape[1:], timesteps(num_steps, shift)
        latents = [
            denoise(model, draw_noise(shape, seeds.tolist()), class_labels[seeds], grid)
            for seeds in torch.arange(len(class_labels)).split(BATCH)
        ]
        return torch.cat(latents), class_labels

    def judged(
        self, model: VelocityModel, shift: float, *, per_class: int, num_steps: int = 25
    ) -> dict[str, float]:
        """Of `samples`, decoded: the fraction recognised and the Fréchet distance."""
        latents, class_labels = self.samples(model, shift, per_class=per_class, num_steps=num_steps)
        images = decode(self.rae, latents)
        return {
            "recognised": self.recognised(images, class_labels),
            "frechet": self.frechet(images),
        }

    def judged_real(self) -> dict[str, float]:
        """What the held-out digits themselves get."""
        return {
            "recognised": self.recognised(self.held_out, self.held_out_labels),
            "frechet": self.frechet(self.held_out),
        }


def open_lab(*, copies: int = 8, folder: Path = EMBEDDED) -> Lab:
    """The training scans and `copies` moved ones of each, encoded once."""
    checkpoint = load_checkpoint(folder, with_encoder=True)
    train, held_out = split_digits()
    images = to_uint8(torch.cat(list(moved(train, copies))))
    latents = encode(checkpoint.rae, images.float() / 255)
    return Lab(
        checkpoint=checkpoint,
        judge=Judge(train, held_out),
        images=images,
        latents=latents,
        class_labels=train.labels.repeat(1 + copies),
        held_out=render(held_out.scans),
        held_out_labels=held_out.labels,
        real=gaussian(latents),
    )


def moved(digits: Digits, copies: int) -> Iterator[Tensor]:
    yield render(digits.scans)
    for copy in range(copies):
        drawn = generator("cpu", 0, copy, AUGMENT)
        yield render(digits.scans, random_transforms(len(digits), drawn))


def encode(rae: RAE, images: Tensor) -> Tensor:
    """Latents of images (N, 3, S, S) in [0, 1], not normalised."""
    return torch.cat([rae.encode_raw(part) for part in images.split(500)])


def gaussian(latents: Tensor) -> Gaussian:
    """Of latents (N, C, h, w), averaged over their positions."""
    moments = Moments(latents.shape[1])
    moments.add(latents.mean((2, 3)))
    return moments.gaussian()


def forward_mflops(config: DiTConfig | DiTDHConfig) -> float:
    """Of one image."""
    return model_flops(config).forward / 1e6


def generator_task(rae: RAE, config: DiTConfig | DiTDHConfig, plan: Plan) -> DiTTask:
    learner: Learner[nn.Module] = Learner(
        build(config, plan.seed),
        World(0, 1, torch.device("cpu")),
        AdamWConfig(lr=plan.lr, clip_norm=1.0),
        plan.lr_schedule,
        ema_decay=plan.ema_decay,
        ema_rises=True,
    )
    objective = FlowMatching(
        shift=plan.shift,
        null_label=config.null_label,
        class_dropout_prob=plan.class_dropout_prob,
        seed=plan.seed,
    )
    return DiTTask(learner, objective, rae, precision=plan.precision)


def trained(task: Task, batches: Iterator[Batch], num_steps: int) -> Iterator[tuple[int, float]]:
    """Train; the number of steps done and the last one's loss, after each."""
    for step in range(num_steps):
        yield step + 1, task.train_step([next(batches)], step)["loss"].item()


def averages(losses: Sequence[float], width: int) -> list[tuple[float, float]]:
    """Means of `width` losses each, with the middle of their steps."""
    starts = range(0, len(losses) - width + 1, width)
    return [(i + (width + 1) / 2, sum(losses[i : i + width]) / width) for i in starts]


def run(
    description: str | None,
    measure: Callable[[bool], Figures],
    draw: Callable[[Figures, Path], None],
) -> int:
    """The command line of a script: measure, write, plot, and say so."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few steps: does it run?")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--plot", type=Path, help="where the plot goes, a PNG")
    args = parser.parse_args()
    sys.path.append(str(ROOT / "benchmarks"))
    from machine_facts import machine

    begin = time.perf_counter()
    figures = measure(args.quick)
    figures = {
        **machine(torch.device("cpu")),
        "seconds": round(time.perf_counter() - begin),
        **figures,
    }
    text = json.dumps(figures, indent=1) + "\n"
    for path in (args.json, args.plot):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if args.json is None:
        sys.stdout.write(text)
    else:
        args.json.write_text(text)
    if args.plot is not None:
        draw(figures, args.plot)
    return 0


def say(text: str) -> None:
    sys.stderr.write(text + "\n")

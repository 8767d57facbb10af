"""A run of stage 2 on made-up latents, as one process of several or alone; tests start it.

    train_tiny.py FOLDER [--steps 5] [--micro-batch 8] [--accumulate 1] [--strategies ddp fsdp] …

Every step has the 16 samples of its positions, whatever the processes; FOLDER/ddp is a run, and
FOLDER/ddp/weights.safetensors has its weights and averages at the end.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rae.models.config import DecoderConfig, DiTDHConfig
from rae.models.dit_dh import DiTDH
from rae.models.rae import RAE
from rae.training.batch import Batch
from rae.training.distributed import World, joined
from rae.training.draws import generator
from rae.training.learner import AdamWConfig, Learner
from rae.training.lr_schedule import LRSchedule
from rae.training.run_settings import Strategy
from rae.training.stage2.dit_dh import DiTTask, FlowMatching
from rae.training.trainer import Trainer, TrainerConfig

BATCH = 16
CONFIG = DiTDHConfig(
    latent_channels=8,
    latent_size=2,
    hidden_size=16,
    depth=2,
    num_heads=2,
    head_hidden_size=24,
    head_depth=1,
    head_num_heads=2,
    num_classes=4,
)
DECODER = DecoderConfig(
    latent_channels=8, hidden_size=8, depth=1, num_heads=2, intermediate_size=8, grid=2
)


class Lines:
    """A report that a test reads."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.seen: list[Tensor] = []
        self.metrics: list[tuple[int, Mapping[str, float]]] = []

    def start(self, step: int, num_steps: int) -> None:
        self.lines.append(f"start {step} of {num_steps}")

    def step(self, step: int, metrics: Mapping[str, float], num_images: int) -> None:
        self.metrics.append((step, metrics))
        sys.stdout.write(f"{step} {metrics}\n")
        sys.stdout.flush()

    def samples(self, step: int, images: Tensor) -> None:
        self.seen.append(images)

    def event(self, text: str) -> None:
        self.lines.append(text)

    def close(self) -> None: ...


def sample(position: int) -> Tensor:
    return torch.randn(CONFIG.latent_shape, generator=generator("cpu", 1, position))


def batches(
    start: int, world: World, micro_batch: int, accumulate: int, sleep_s: float = 0
) -> Iterator[Sequence[Batch]]:
    step = start
    while True:
        first = torch.arange(BATCH) + step * BATCH
        mine = first.view(accumulate, world.size, micro_batch)[:, world.rank]
        yield [
            Batch(
                positions=positions,
                class_labels=positions % CONFIG.num_classes,
                latents=torch.stack([sample(int(position)) for position in positions]),
            )
            for positions in mine
        ]
        time.sleep(sleep_s)
        step += 1


def make_learner(world: World, strategy: Strategy = "ddp") -> Learner[nn.Module]:
    torch.manual_seed(0)
    model = DiTDH(CONFIG)
    model.init_weights()
    for parameter in model.parameters():  # zeros of the first step would hide what is wrong
        nn.init.normal_(parameter, std=0.1)
    return Learner(
        model,
        world,
        AdamWConfig(lr=1e-2, clip_norm=1.0),
        LRSchedule(total_steps=20, warmup_steps=2, final_factor=0.1),
        ema_decay=0.9,
        strategy=strategy,
    )


def make_task(learner: Learner[nn.Module]) -> DiTTask:
    objective = FlowMatching(shift=2.0, null_label=4, class_dropout_prob=0.1, seed=3)
    rae = RAE(DECODER, image_mean=(0, 0, 0), image_std=(1, 1, 1))
    return DiTTask(learner, objective, rae, draw_samples=look)


@torch.no_grad()
def look(module: nn.Module) -> Tensor:
    return module(sample(0)[None], torch.ones(1), torch.zeros(1, dtype=torch.int64))


def weights(learner: Learner[nn.Module]) -> dict[str, Tensor]:
    state = learner.state_dict()
    tensors = {f"online.{name}": value for name, value in state["module"].items()}
    tensors |= {f"ema.{name}": value for name, value in state["ema"].items()}
    tensors |= {f"whole.{name}": value for name, value in learner.averages().items()}
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
        for name, value in tensors.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--micro-batch", type=int, default=BATCH)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--strategies", nargs="+", default=["ddp"])
    parser.add_argument("--snapshot-every", type=int, default=1000)
    parser.add_argument("--sleep", type=float, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with joined("cpu") as world:
        for strategy in args.strategies:
            run(args, world, strategy, args.folder / strategy)


def run(args: argparse.Namespace, world: World, strategy: Strategy, folder: Path) -> None:
    learner = make_learner(world, strategy)
    config = TrainerConfig(
        num_steps=args.steps, log_every=1, sample_every=1, snapshot_every=args.snapshot_every
    )
    trainer = Trainer(
        make_task(learner),
        lambda start: batches(start, world, args.micro_batch, args.accumulate, args.sleep),
        config,
        world,
        folder,
        Lines(),
    )
    trainer.run()
    final = weights(learner)
    if world.is_first:
        save_file(final, folder / "weights.safetensors")


if __name__ == "__main__":
    main()

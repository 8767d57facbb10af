"""A few steps of stage 1 on made-up latents, as one process of several or alone; a test starts it.

    train_tiny_decoder.py FOLDER

FOLDER/ddp.safetensors and fsdp.safetensors have the weights of the decoder and of the
discriminator's heads at the end.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rae.models.config import DecoderConfig
from rae.models.rae import RAE
from rae.training.batch import Batch
from rae.training.distributed import Strategy, World, joined
from rae.training.draws import generator
from rae.training.learner import AdamWConfig, Learner
from rae.training.lr_schedule import LRSchedule
from rae.training.stage1.decoder import Adversary, DecoderObjective, DecoderTask
from rae.training.stage1.discriminator import DiscriminatorHeads

BATCH = 8
STEPS = 3
CONFIG = DecoderConfig(
    latent_channels=8,
    hidden_size=16,
    depth=2,
    num_heads=2,
    intermediate_size=16,
    patch_size=2,
    grid=3,
)


class PatchFeatures:
    """Two maps of one frozen convolution."""

    num_maps = 2
    channels = 8

    def __init__(self) -> None:
        self.conv = nn.Conv2d(3, 8, 2, stride=2).requires_grad_(False)

    def __call__(self, images: Tensor) -> list[Tensor]:
        tokens = self.conv(images).flatten(2)
        return [tokens, tokens.tanh()]


def make_task(world: World, strategy: Strategy = "ddp") -> DecoderTask:
    torch.manual_seed(0)
    rae = RAE(CONFIG, image_mean=(0.5, 0.5, 0.5), image_std=(0.2, 0.3, 0.4))
    features = PatchFeatures()
    heads = DiscriminatorHeads(features.num_maps, features.channels)
    schedule = LRSchedule(total_steps=10)
    adamw = AdamWConfig(lr=1e-3, eps=1e-3)  # Adam makes steps of rounding errors otherwise
    objective = DecoderObjective(
        tau=0.8,
        perceptual_weight=0,
        perceptual_start=0,
        discriminator_start=0,
        adversarial_weight=0.75,
        adversarial_start=1,
        augment=True,
        seed=4,
    )
    return DecoderTask(
        rae,
        Learner(rae.decoder, world, adamw, schedule, ema_decay=0.9, strategy=strategy),
        objective,
        world,
        perceptual=None,
        adversary=Adversary(features, Learner(heads, world, adamw, schedule, ema_decay=None)),
    )


def batch(step: int, world: World) -> Batch:
    positions = (torch.arange(BATCH) + step * BATCH).view(world.size, -1)[world.rank]
    draws = [generator("cpu", 1, position) for position in positions.tolist()]
    size = CONFIG.image_size
    return Batch(
        positions=positions,
        class_labels=torch.zeros_like(positions),
        images=torch.stack(
            [torch.randint(0, 256, (3, size, size), generator=g) for g in draws]
        ).byte(),
        latents=torch.stack([torch.randn(8, 3, 3, generator=g) for g in draws]),
    )


def train(world: World, strategy: Strategy = "ddp") -> dict[str, Tensor]:
    task = make_task(world, strategy)
    for step in range(STEPS):
        task.train_step([batch(step, world)], step)
    weights = {
        f"{part}.{name}": value
        for part, learner in task.learners.items()
        for name, value in learner.state_dict()["module"].items()
    }
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
        for name, value in weights.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with joined("cpu") as world:
        for strategy in get_args(Strategy):
            weights = train(world, strategy)
            if world.is_first:
                save_file(weights, args.folder / f"{strategy}.safetensors")


if __name__ == "__main__":
    main()

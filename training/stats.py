"""Exact mean and variance of a stream of latents (Chan, Golub and LeVeque, 1979)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rae.models.checkpoint_config import CheckpointError
from rae.models.tensor_files import read_tensors
from rae.training.tensor_writing import write_whole

if TYPE_CHECKING:
    from rae.training.distributed import World

NAMES = ("latents_mean", "latents_var")  # as in a checkpoint's decoder file


class LatentStatistics:
    """Mean and population variance per position, merged batch by batch in float64.

    No momentum: the order and the size of the batches do not matter. `merge` joins the
    statistics of two workers, `over` those of all processes.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor = torch.zeros((), dtype=torch.float64)
        self.squares: Tensor = torch.zeros((), dtype=torch.float64)

    def update(self, latents: Tensor) -> None:
        """Add a batch (B, C, H, W)."""
        if not len(latents):
            return
        latents = latents.double()
        batch = LatentStatistics()
        batch.count, batch.mean = len(latents), latents.mean(0)
        batch.squares = (latents - batch.mean).square().sum(0)
        self.merge(batch)

    def merge(self, other: LatentStatistics) -> None:
        total = self.count + other.count
        if not total:
            return
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.count / total)
        weight = self.count * other.count / total
        self.squares = self.squares + other.squares + delta.square() * weight
        self.count = total

    def over(self, world: World, shape: tuple[int, ...]) -> LatentStatistics:
        """Of all processes, the same in each; `shape` (C, H, W) for one that saw nothing."""
        own = [self.mean.to(world.device), self.squares.to(world.device)]
        mean, squares = (tensor.expand(shape) for tensor in own)
        total = LatentStatistics()
        total.count = int(world.sum(torch.tensor(self.count, device=world.device)))
        if total.count:
            total.mean = world.sum(mean * self.count) / total.count
            total.squares = world.sum(squares + self.count * (mean - total.mean).square())
        return total

    @property
    def var(self) -> Tensor:
        """Population variance (C, H, W). Raises ValueError before the first batch."""
        if not self.count:
            raise ValueError("no latents seen: their variance is not known")
        return self.squares / self.count


def write_statistics(path: Path, statistics: LatentStatistics, facts: Mapping[str, Any]) -> str:
    """fp32 tensors, with `facts` of their encoder and data set; returns the file's sha256.

    Raises OSError, and leaves what was there, where it cannot be written, and ValueError for
    values that are not finite.
    """
    values = (statistics.mean, statistics.var)
    tensors = {name: value.float().cpu() for name, value in zip(NAMES, values, strict=True)}
    return write_whole(path, tensors, {**facts, "num_latents": statistics.count})


def read_statistics(path: Path, latent_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and variance (C, H, W), fp32. Raises ValueError for another file, and for statistics
    of other latents; `read_facts` gives what was written with them."""
    tensors = read_tensors(path)
    if tensors.keys() != set(NAMES):
        found = ", ".join(sorted(tensors)[:5])
        raise CheckpointError(f"{path} holds {found}: statistics are {' and '.join(NAMES)}")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != latent_shape:
            raise CheckpointError(f"{path}: {name} {tuple(tensor.shape)} for {latent_shape}")
    return tensors["latents_mean"].float(), tensors["latents_var"].float()

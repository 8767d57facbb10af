"""Exact mean and variance of a stream of latents (Chan, Golub and LeVeque, 1979)."""

from __future__ import annotations

import torch
from torch import Tensor


class LatentStatistics:
    """Mean and population variance per position, merged batch by batch in float64.

    No momentum: the order and the size of the batches do not matter. `merge` joins the
    statistics of two workers.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor = torch.zeros((), dtype=torch.float64)
        self.squares: Tensor = torch.zeros((), dtype=torch.float64)

    def update(self, latents: Tensor) -> None:
        """Add a batch (B, C, H, W)."""
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

    @property
    def var(self) -> Tensor:
        """Population variance (C, H, W). Raises ValueError before the first batch."""
        if not self.count:
            raise ValueError("no latents seen: their variance is not known")
        return self.squares / self.count

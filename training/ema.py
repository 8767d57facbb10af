"""The exponential moving average of a model's weights."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


class EMA(Generic[M]):
    """Owns an averaged copy of a model, in eval mode: `average`.

    The decay rises as (1 + n) / (10 + n) up to `decay`, so that the first weights are forgotten.
    """

    def __init__(self, model: M, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay {decay} is not in [0, 1)")
        self.decay = decay
        self.num_updates = 0
        self.average = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: M) -> None:
        """average += (1 − decay)·(model − average). Buffers are the copy's: they do not train."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        for average, value in zip(self.average.parameters(), model.parameters(), strict=True):
            average.lerp_(value, 1 - decay)

"""The exponential moving average of a module's trained weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """average += (1 − decay)·(weight − average) for every parameter that is trained, in fp32.

    With `rises` the decay is (1 + n) / (10 + n) where that is less, so that short runs forget
    their first weights; the published runs do not rise.
    Parameters may be sharded: the averages are then, too.
    """

    def __init__(self, module: nn.Module, decay: float, *, rises: bool = False) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay {decay} is not in [0, 1)")
        self.decay, self.rises = decay, rises
        self.weights = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.averages = {n: p.detach().clone() for n, p in self.weights.items()}

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """After `num_updates` updates of the weights before this one."""
        decay = self.decay
        if self.rises:
            decay = min(decay, (1 + num_updates) / (10 + num_updates))
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            list(self.averages.values()), list(self.weights.values()), weight=1 - decay
        )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module runs with the averages within."""
        online = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self._assign(self.averages)
        try:
            yield
        finally:
            self._assign(online)

    @torch.no_grad()
    def _assign(self, values: dict[str, Tensor]) -> None:
        for name, weight in self.weights.items():  # sharded ones have no foreach copy
            weight.copy_(values[name])

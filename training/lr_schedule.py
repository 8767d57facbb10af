"""The learning rate over a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LRSchedule:
    """A linear warm-up, a constant stretch, then a fall to `final_factor` at `total_steps`.

    `factor` is what the peak rate is multiplied with in step 0, 1, …; after the end it stays.
    """

    total_steps: int
    warmup_steps: int = 0
    constant_steps: int = 0
    final_factor: float = 1.0
    shape: Literal["linear", "cosine"] = "linear"

    def factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        begin = self.warmup_steps + self.constant_steps
        if step < begin or begin >= self.total_steps:
            return 1.0
        done = min(1.0, (step - begin) / (self.total_steps - begin))
        left = 1 - done if self.shape == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.final_factor + (1 - self.final_factor) * left

"""When a weaker velocity guides, and how much."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from rae.models.config import GuidanceMethod

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """v = v_weak + scale·(v − v_weak) where t is in the closed interval, else v.

    v_weak is the null label's velocity ("cfg") or a weaker model's, the guide's, for the same
    label ("autoguidance"). The interval is in shifted time. Scales of at most 1 turn it off.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    method: GuidanceMethod = "cfg"

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"guidance scale {self.scale} is not finite")
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance interval {self.interval} is not 0 <= low <= high <= 1")
        if self.method not in get_args(GuidanceMethod):
            raise ValueError(f"guidance method {self.method!r}; known: cfg, autoguidance")

    def active(self, t: Tensor) -> Tensor:
        """Whether guidance applies at t (B,), fp32: (B,) bool."""
        low, high = t.new_tensor(self.interval)
        return (t >= low) & (t <= high) & (self.scale > 1)

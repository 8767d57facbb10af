"""How an image is evaluated: at which times, and at which of them with a second branch."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

from rae.models.checkpoint_config import CheckpointConfig
from rae.models.config import GuidanceMethod
from rae.models.guidance import Guidance
from rae.models.sampling import timesteps
from rae.server.request import ImageSpec, Plan


class Planner:
    """The plan of an image, which all images of one setting share. `guide_cost` is that of a row of
    the guide, in rows of the model."""

    def __init__(self, config: CheckpointConfig, guide_cost: float) -> None:
        self._shift, self._null_label = config.shift, config.dit_dh.null_label
        self._guide_cost = guide_cost
        self._cached = lru_cache(maxsize=1024)(self._make)

    def __call__(self, spec: ImageSpec) -> Plan:
        """The null label has no use for CFG, whose branches would agree."""
        off = spec.guidance_method == "cfg" and spec.class_label == self._null_label
        return self._cached(
            spec.steps, 1.0 if off else spec.cfg, spec.guidance_interval, spec.guidance_method
        )

    def _make(
        self, steps: int, cfg: float, interval: tuple[float, float], method: GuidanceMethod
    ) -> Plan:
        grid = timesteps(steps, self._shift)
        guided = tuple(Guidance(cfg, interval, method).active(grid[:-1]).tolist())
        second = self._guide_cost if method == "autoguidance" else 1.0
        falling = accumulate((1 + second * flag for flag in reversed(guided)), initial=0.0)
        return Plan(
            times=tuple(grid.tolist()),
            scale=cfg,
            method=method,
            guided=guided,
            costs=tuple(falling)[::-1],
            second=second,
        )

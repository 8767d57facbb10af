"""What was asked for, on its way through the engine. No tensors, no HTTP."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from rae.models.config import GuidanceMethod

if TYPE_CHECKING:
    import numpy as np

Priority = Literal["low", "normal", "high"]


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """One image, all defaults filled in: the same spec gives the same pixels.

    `class_label` may be the null label; `steps` are grid points; `cfg` 1 is off; the closed
    `guidance_interval` is in shifted time.
    """

    class_label: int
    seed: int
    steps: int
    cfg: float = 1.0
    guidance_method: GuidanceMethod = "cfg"
    guidance_interval: tuple[float, float] = (0.0, 1.0)

    @property
    def num_evaluations(self) -> int:
        return self.steps - 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the images of one setting are evaluated; the numbers are those of fp32.

    `times` are the grid's points. `guided` says at which evaluations there is a second, weaker
    branch, of the model ("cfg") or of the guide, which costs `second`. `costs` is what remains
    before each evaluation, in rows of the model (a row of the guide counts by its parameters), and
    falls to 0 at the end.
    """

    times: tuple[float, ...]
    scale: float
    method: GuidanceMethod
    guided: tuple[bool, ...]
    costs: tuple[float, ...]
    second: float = 1.0

    def cost(self, step: int) -> float:
        """What this evaluation takes, in rows of the model."""
        return self.costs[step] - self.costs[step + 1]

    def saved(self, step: int) -> float:
        """What a second branch here would add, where an image with guidance goes without."""
        return 0.0 if self.guided[step] or self.scale <= 1 else self.second

    def model_rows(self, step: int) -> int:
        return 2 if self.guided[step] and self.method == "cfg" else 1

    def guide_rows(self, step: int) -> int:
        return 1 if self.guided[step] and self.method == "autoguidance" else 0


@dataclass(frozen=True, kw_only=True)
class Generated:
    """The images of one request, (H, W, 3) uint8 each, and where the time went, in seconds."""

    images: Sequence[np.ndarray]
    queue_s: float
    denoise_s: float
    decode_s: float


@dataclass(eq=False)
class Sample:
    """One image of a request: waiting without a slot, running with one."""

    spec: ImageSpec
    request: Request
    plan: Plan
    slot: int = -1
    step: int = 0
    image: np.ndarray | None = None

    @property
    def model_rows(self) -> int:
        """Of its next evaluation, as are `guide_rows` and `step_cost`."""
        return self.plan.model_rows(self.step)

    @property
    def guide_rows(self) -> int:
        return self.plan.guide_rows(self.step)

    @property
    def step_cost(self) -> float:
        return self.plan.cost(self.step)

    @property
    def remaining_cost(self) -> float:
        return self.plan.costs[self.step]

    @property
    def denoised(self) -> bool:
        return self.step == self.spec.num_evaluations


@dataclass(eq=False)
class Request:
    """The future exists before the work is queued, and is always resolved; cancelling it is how
    a request is cancelled. Times are of `perf_counter`, in seconds."""

    id: str
    client: str = ""
    weight: float = 1.0
    """The client's share of the device, against that of other clients."""
    priority: Priority = "normal"
    deadline: float = math.inf
    on_start: Callable[[], None] | None = None
    """Called in the engine's thread before the first of its samples is."""
    samples: list[Sample] = field(default_factory=list)
    future: Future[Generated] = field(default_factory=Future)
    submitted_at: float = field(default_factory=time.perf_counter)
    started_at: float = 0.0
    num_running: int = 0
    is_begun: bool = False
    """Whether a step of it is over."""

    @property
    def cost(self) -> float:
        """Of all its images from their start, in rows of the model."""
        return sum(sample.plan.costs[0] for sample in self.samples)

    @property
    def done(self) -> bool:
        return all(sample.image is not None for sample in self.samples)

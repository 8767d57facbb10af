"""What `rae sample` is to make: N images, each decided by the job and its index alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np

from rae.models.checkpoint_config import CheckpointConfig
from rae.models.config import GuidanceMethod, Solver
from rae.server.command_settings import Labels, Pixels, SampleSettings
from rae.server.errors import Detail, InvalidRequestError
from rae.server.limits import Limits
from rae.server.request import ImageSpec
from rae.server.schemas import read_request
from rae.server.settings import Attention, Compile, Kernels


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that decides the pixels; neither the batch nor the number of processes does.

    JSON holds it without loss: hence the list.
    """

    checkpoint_sha256: str
    num_classes: int
    num: int
    labels: Labels
    seed: int
    steps: int
    cfg: float
    guidance_method: GuidanceMethod
    guidance_interval: list[float]
    solver: Solver
    device: str
    precision: str
    kernels: Kernels
    attention: Attention
    compile: Compile
    pixels: Pixels

    @classmethod
    def of(
        cls,
        settings: SampleSettings,
        config: CheckpointConfig,
        *,
        checkpoint_sha256: str,
        device: str,
        precision: str,
    ) -> Self:
        """With the checkpoint's defaults filled in.

        Raises ValueError for a number of images that does not go, InvalidRequestError for sampler
        settings that a request over HTTP may not have either.
        """
        num_classes = len(config.classes)
        num = number_of_images(settings, num_classes)
        asked = {
            "class_id": 0,
            "seed": settings.seed,
            "cfg": settings.cfg,
            "steps": settings.steps,
            "guidance_method": settings.guidance_method,
            "guidance_interval": settings.guidance_interval,
        }
        limits = Limits.of(config, max_steps=1000, max_images=1)
        (first,) = read_request(asked, limits).specs(limits)
        if first.seed > limits.bounds("seed", num)[1]:
            problem = Detail("seed", str(first.seed), limits.allowed("seed", num))
            raise InvalidRequestError([problem])
        return cls(
            checkpoint_sha256=checkpoint_sha256,
            num_classes=num_classes,
            num=num,
            labels=settings.labels,
            seed=first.seed,
            steps=first.steps,
            cfg=first.cfg,
            guidance_method=first.guidance_method,
            guidance_interval=list(first.guidance_interval),
            solver=settings.solver,
            device=device,
            precision=precision,
            kernels=settings.kernels,
            attention=settings.attention,
            compile=settings.compile,
            pixels=settings.pixels,
        )

    @property
    def num_evaluations(self) -> int:
        """Of the model for each image, a guided one counted once."""
        return (self.steps - 1) * (1 if self.solver == "euler" else 2)

    @cached_property
    def class_labels(self) -> np.ndarray:
        """(num,) int64. Every prefix of the balanced ones is as balanced as can be."""
        if self.labels == "balanced":
            return np.arange(self.num, dtype=np.int64) % self.num_classes
        # numpy keeps the stream of RandomState for ever, and does not that of default_rng.
        seeds = np.random.SeedSequence((self.seed, self.num, self.num_classes))
        stream = np.random.RandomState(np.random.MT19937(seeds))
        return stream.randint(self.num_classes, size=self.num, dtype=np.int64)

    def spec(self, index: int) -> ImageSpec:
        low, high = self.guidance_interval
        return ImageSpec(
            class_label=int(self.class_labels[index]),
            seed=self.seed + index,
            steps=self.steps,
            cfg=self.cfg,
            guidance_method=self.guidance_method,
            guidance_interval=(low, high),
        )


def number_of_images(settings: SampleSettings, num_classes: int) -> int:
    """Raises ValueError where it is said twice or not at all, or is uneven over balanced labels."""
    per_class, num = settings.per_class, settings.num
    if per_class is not None and num is None:
        return per_class * num_classes
    if num is None or per_class is not None:
        both = "are both given" if num is not None else "are both absent"
        raise ValueError(f"--per-class and --num {both}; give one of them, as --per-class 50")
    if settings.labels == "balanced" and num % num_classes:
        raise ValueError(
            f"--num {num} is not divisible by the {num_classes} classes; give a multiple of "
            f"{num_classes}, or --labels random"
        )
    return num

"""What the recipes of all stages share: the optimizer, its schedule, the averages, the seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from rae.models.config import require_types
from rae.training.lr_schedule import LRSchedule

if TYPE_CHECKING:  # a recipe is refused before torch is imported
    from torch import nn

    from rae.training.distributed import Strategy, World
    from rae.training.learner import AdamWConfig, Learner

IMAGENET_IMAGES = 1_281_167

M = TypeVar("M", bound="nn.Module")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides the weights of a run, whatever it runs on.

    The learning rate rises to `lr` in `warmup_epochs`, stays for `constant_epochs`, and falls to
    `final_lr` at `epochs`. An epoch is the whole batches of one pass over the images, as the
    authors count; no image is left out for that.
    """

    batch_size: int
    epochs: float
    warmup_epochs: float = 0.0
    constant_epochs: float = 0.0
    lr: float = 2e-4
    final_lr: float = 2e-5
    lr_shape: Literal["linear", "cosine"] = "linear"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    adam_eps: float = 1e-8
    clip_norm: float | None = None
    ema_decay: float
    ema_rises: bool = False
    seed: int = 0

    may_be_zero: ClassVar[tuple[str, ...]] = (
        *("warmup_epochs", "constant_epochs", "final_lr", "weight_decay", "ema_decay", "seed"),
    )

    def __post_init__(self) -> None:
        require_types(self, may_be_zero=self.may_be_zero)
        if self.warmup_epochs + self.constant_epochs > self.epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs:g} and constant_epochs "
                f"{self.constant_epochs:g} are more than epochs {self.epochs:g}: a short run "
                "needs --set constant_epochs=0, or fewer"
            )

    @property
    def adamw(self) -> AdamWConfig:
        from rae.training.learner import AdamWConfig

        return AdamWConfig(
            lr=self.lr,
            betas=self.betas,
            weight_decay=self.weight_decay,
            eps=self.adam_eps,
            clip_norm=self.clip_norm,
        )

    def learner(
        self, module: M, world: World, num_images: int, strategy: Strategy = "ddp"
    ) -> Learner[M]:
        """Of `module`, for an epoch of `num_images`. Raises ValueError as `steps` does."""
        from rae.training.learner import Learner

        return Learner(
            module,
            world,
            self.adamw,
            self.lr_schedule(num_images),
            ema_decay=self.ema_decay,
            ema_rises=self.ema_rises,
            strategy=strategy,
        )

    def steps(self, epochs: float, num_images: int) -> int:
        """Of so many epochs. Raises ValueError for fewer images than one batch."""
        per_epoch = num_images // self.batch_size
        if not per_epoch:
            raise ValueError(
                f"{num_images} images are less than one batch of {self.batch_size}: "
                f"--set batch_size={num_images}"
            )
        return round(epochs * per_epoch)

    def num_steps(self, num_images: int) -> int:
        return max(1, self.steps(self.epochs, num_images))

    def lr_schedule(self, num_images: int) -> LRSchedule:
        return LRSchedule(
            total_steps=self.num_steps(num_images),
            warmup_steps=self.steps(self.warmup_epochs, num_images),
            constant_steps=self.steps(self.constant_epochs, num_images),
            final_factor=self.final_lr / self.lr,
            shape=self.lr_shape,
        )

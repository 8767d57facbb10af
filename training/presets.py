"""The recipes of stage 2 as published, and the embedded digits'.

Sources: arXiv 2510.11690, appendix; github bytetriper/RAE, `configs/stage2/training`.
"""

from __future__ import annotations

from dataclasses import dataclass

from rae.models.config import CONFIGS, DiTDHConfig, require_types
from rae.models.dit import DiTConfig
from rae.models.sampling import default_shift
from rae.training.learner import AdamWConfig
from rae.training.lr_schedule import LRSchedule

IMAGENET_IMAGES = 1_281_167


@dataclass(frozen=True, kw_only=True)
class DiTRecipe:
    """What decides the weights of a run; the defaults are the published ones.

    `constant_epochs` come after `warmup_epochs`; then the learning rate falls linearly to
    `final_lr` at `epochs`. `shift` None is the rule for the latents' size. `milestone_epochs`
    are those whose snapshots stay, as guides are early ones. An epoch is the whole batches of one
    pass over the images, as the authors count; no image is left out.
    """

    model: DiTDHConfig | DiTConfig
    image_size: int = 256
    horizontal_flip: bool = True
    batch_size: int = 1024
    epochs: float = 800.0
    warmup_epochs: float = 0.0
    constant_epochs: float = 40.0
    lr: float = 2e-4
    final_lr: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    adam_eps: float = 1e-8
    clip_norm: float | None = 1.0
    ema_decay: float = 0.9995
    ema_rises: bool = False
    shift: float | None = None
    milestone_epochs: tuple[float, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        zeros = ("warmup_epochs", "constant_epochs", "weight_decay", "seed", "ema_decay")
        require_types(self, may_be_zero=zeros)

    @property
    def time_shift(self) -> float:
        return default_shift(self.model.latent_shape) if self.shift is None else self.shift

    @property
    def adamw(self) -> AdamWConfig:
        return AdamWConfig(
            lr=self.lr,
            betas=self.betas,
            weight_decay=self.weight_decay,
            eps=self.adam_eps,
            clip_norm=self.clip_norm,
        )

    def steps(self, epochs: float, num_images: int) -> int:
        """Of so many epochs. Raises ValueError for fewer images than one batch."""
        per_epoch = num_images // self.batch_size
        if not per_epoch:
            raise ValueError(f"{num_images} images are less than one batch of {self.batch_size}")
        return round(epochs * per_epoch)

    def lr_schedule(self, num_images: int) -> LRSchedule:
        return LRSchedule(
            total_steps=self.steps(self.epochs, num_images),
            warmup_steps=self.steps(self.warmup_epochs, num_images),
            constant_steps=self.steps(self.constant_epochs, num_images),
            final_factor=self.final_lr / self.lr,
        )


_DIGITS = DiTDHConfig(
    latent_channels=96,
    latent_size=4,
    hidden_size=128,
    depth=4,
    num_heads=4,
    head_hidden_size=192,
    head_depth=2,
    head_num_heads=4,
    num_classes=10,
)
_DIGITS_GUIDE = DiTDHConfig(
    latent_channels=96,
    latent_size=4,
    hidden_size=64,
    depth=2,
    num_heads=4,
    head_hidden_size=128,
    head_depth=1,
    head_num_heads=4,
    num_classes=10,
)

DIGITS = DiTRecipe(
    model=_DIGITS,
    image_size=32,
    horizontal_flip=False,
    batch_size=128,
    epochs=22.6,
    warmup_epochs=0.5,
    constant_epochs=0.0,
    lr=2e-3,
    final_lr=4e-5,
    ema_decay=0.998,
    ema_rises=True,
    shift=3.0,
)

DIT_PRESETS: dict[str, DiTRecipe] = {
    **{
        name: DiTRecipe(model=config, image_size=16 * config.latent_size)
        for name, config in CONFIGS.items()
    },
    **{
        f"DiT-{size}-256": DiTRecipe(
            model=DiTConfig(
                hidden_size=CONFIGS[f"DiTDH-{size}-256"].hidden_size,
                depth=CONFIGS[f"DiTDH-{size}-256"].depth,
                num_heads=CONFIGS[f"DiTDH-{size}-256"].num_heads,
            )
        )
        for size in ("S", "B", "L", "XL")
    },
    "digits": DIGITS,
}

"""The recipes of stage 2 as published, and the embedded digits'.

Sources: arXiv 2510.11690, appendix; github bytetriper/RAE, `configs/stage2/training`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rae.models.config import CONFIGS, DiTConfig, DiTDHConfig
from rae.training.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class DiTRecipe(Recipe):
    """The defaults are the published ones. `shift` None is the rule for the latents' size; the
    snapshots of `milestone_epochs` stay, as guides are early ones."""

    model: DiTDHConfig | DiTConfig
    image_size: int = 256
    horizontal_flip: bool = True
    batch_size: int = 1024
    epochs: float = 800.0
    constant_epochs: float = 40.0
    clip_norm: float | None = 1.0
    ema_decay: float = 0.9995
    shift: float | None = None
    milestone_epochs: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if max(self.milestone_epochs, default=0) > self.epochs:
            raise ValueError(
                f"milestone_epochs {self.milestone_epochs}: the run has {self.epochs:g} epochs"
            )

    @property
    def time_shift(self) -> float:
        from rae.models.sampling import default_shift

        return default_shift(self.model.latent_shape) if self.shift is None else self.shift


def _plain(config: DiTDHConfig) -> DiTRecipe:
    """The DiT of a DiT^DH's backbone."""
    model = DiTConfig(
        hidden_size=config.hidden_size, depth=config.depth, num_heads=config.num_heads
    )
    return DiTRecipe(model=model)


DIGITS = DiTRecipe(
    model=DiTDHConfig(
        latent_channels=96,
        latent_size=4,
        hidden_size=128,
        depth=4,
        num_heads=4,
        head_hidden_size=192,
        head_depth=2,
        head_num_heads=4,
        num_classes=10,
    ),
    image_size=32,
    horizontal_flip=False,
    batch_size=128,
    epochs=25.0,
    warmup_epochs=0.5,
    constant_epochs=0.0,
    lr=2e-3,
    final_lr=4e-5,
    ema_decay=0.998,
    ema_rises=True,
    shift=3.0,
)
assert isinstance(DIGITS.model, DiTDHConfig)
DIGITS_GUIDE = replace(
    DIGITS,
    model=replace(DIGITS.model, hidden_size=64, depth=2, head_hidden_size=128, head_depth=1),
    epochs=2.5,
    warmup_epochs=0.25,
    ema_decay=0.99,
)

DIT_PRESETS: dict[str, DiTRecipe] = {
    **{
        name: DiTRecipe(model=config, image_size=16 * config.latent_size)
        for name, config in CONFIGS.items()
    },
    **{
        name.replace("DiTDH", "DiT"): _plain(config)
        for name, config in CONFIGS.items()
        if config.latent_size == 16
    },
    "digits": DIGITS,
    "digits-guide": DIGITS_GUIDE,
}

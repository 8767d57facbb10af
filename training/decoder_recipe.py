"""The recipes of stage 1 as published.

Sources: github bytetriper/RAE, `configs/stage1`; arXiv 2510.11690, appendix.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from rae.models.config import DECODER_CONFIGS, DecoderConfig, EncoderConfig, require_types
from rae.training.learner import AdamWConfig
from rae.training.lr_schedule import LRSchedule

Perceptual = Literal["lpips", "encoder", "none"]
Discriminator = Literal["dino", "encoder", "none"]

FROM_ZERO = (
    *("warmup_epochs", "perceptual_start_epoch", "discriminator_start_epoch"),
    *("adversarial_start_epoch", "weight_decay", "tau", "ema_decay", "seed"),
)


@dataclass(frozen=True, kw_only=True)
class DecoderRecipe:
    """What decides the weights of a run; the defaults are the published ones.

    The learning rate rises for `warmup_epochs`, then falls as a cosine to `final_lr` at `epochs`;
    the discriminator's does the same over its own updates. The paper and the authors' XLA branch
    say betas of .5 and .9, their GPU code .9 and .95. `tau` bounds the noise of the latents.

    `perceptual` "lpips" reads `vgg_weights` and `discriminator` "dino" `dino_weights`, both local
    files; "encoder" looks through the RAE's own encoder instead, and "none" leaves the term out.
    """

    model: DecoderConfig
    encoder: EncoderConfig
    batch_size: int = 512
    epochs: float = 16.0
    warmup_epochs: float = 1.0
    lr: float = 2e-4
    final_lr: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip_norm: float | None = None
    ema_decay: float = 0.9978
    ema_rises: bool = False
    tau: float = 0.8
    perceptual: Perceptual = "lpips"
    perceptual_weight: float = 1.0
    perceptual_start_epoch: float = 0.0
    vgg_weights: str | None = None
    discriminator: Discriminator = "dino"
    discriminator_start_epoch: float = 6.0
    adversarial_weight: float = 0.75
    adversarial_start_epoch: float = 8.0
    dino_weights: str | None = None
    augment: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        require_types(self, may_be_zero=FROM_ZERO)
        for name, kind in (("perceptual", Perceptual), ("discriminator", Discriminator)):
            if getattr(self, name) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise ValueError(f"{name} {getattr(self, name)!r}; known: {known}")
        if self.adversarial_start_epoch < self.discriminator_start_epoch:
            raise ValueError(
                f"adversarial_start_epoch {self.adversarial_start_epoch} is before "
                f"discriminator_start_epoch {self.discriminator_start_epoch}: "
                "the decoder would learn from a discriminator that has learnt nothing"
            )

    @property
    def adamw(self) -> AdamWConfig:
        return AdamWConfig(
            lr=self.lr,
            betas=self.betas,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
        )

    def steps(self, epochs: float, num_images: int) -> int:
        """Of so many epochs. Raises ValueError for fewer images than one batch."""
        per_epoch = num_images // self.batch_size
        if not per_epoch:
            raise ValueError(f"{num_images} images are less than one batch of {self.batch_size}")
        return round(epochs * per_epoch)

    def lr_schedule(self, num_images: int) -> LRSchedule:
        """Of the decoder, and of the discriminator: a Learner counts its own updates, so the
        published run's discriminator has warmed up in epoch 6 and ends 10/16 through."""
        return LRSchedule(
            total_steps=self.steps(self.epochs, num_images),
            warmup_steps=self.steps(self.warmup_epochs, num_images),
            final_factor=self.final_lr / self.lr,
            shape="cosine",
        )


def _published(**changes: Any) -> DecoderRecipe:  # noqa: ANN401
    name = "facebook/dinov2-with-registers-base"
    dinov2 = EncoderConfig(kind="dinov2", image_size=224, name=name)
    recipe = DecoderRecipe(model=DECODER_CONFIGS["decoder-ViT-XL-256"], encoder=dinov2)
    return replace(recipe, **changes)


DECODER_PRESETS: dict[str, DecoderRecipe] = {
    "DINOv2-B-256": _published(),
    "DINOv2-B-512": _published(
        model=DECODER_CONFIGS["decoder-ViT-XL-512"],
        encoder=EncoderConfig(
            kind="dinov2", image_size=448, name="facebook/dinov2-with-registers-base"
        ),
    ),
    "SigLIP2-B-256": _published(
        encoder=EncoderConfig(
            kind="siglip2", image_size=256, name="google/siglip2-base-patch16-256"
        )
    ),
    "MAE-B-256": _published(
        encoder=EncoderConfig(kind="mae", image_size=256, name="facebook/vit-mae-base")
    ),
}

"""The recipes of stage 1 as published.

Sources: github bytetriper/RAE, `configs/stage1`; arXiv 2510.11690, appendix.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

from rae.models.config import DECODER_CONFIGS, DecoderConfig, EncoderConfig
from rae.training.recipe import Recipe

Perceptual = Literal["lpips", "encoder", "none"]
Discriminator = Literal["dino", "encoder", "none"]


@dataclass(frozen=True, kw_only=True)
class DecoderRecipe(Recipe):
    """The defaults are the published ones.

    The discriminator has the decoder's schedule, over its own updates: published, it has warmed up
    in epoch 6 and ends 10/16 through. The paper and the authors' XLA branch say betas of .5 and
    .9, their GPU code .9 and .95. `tau` bounds the noise of the latents.

    `perceptual` "lpips" and `discriminator` "dino" read local files of weights; "encoder" looks
    through the RAE's own encoder instead, and "none" leaves the term out.
    """

    model: DecoderConfig
    encoder: EncoderConfig
    batch_size: int = 512
    epochs: float = 16.0
    warmup_epochs: float = 1.0
    lr_shape: Literal["linear", "cosine"] = "cosine"
    ema_decay: float = 0.9978
    tau: float = 0.8
    perceptual: Perceptual = "lpips"
    perceptual_weight: float = 1.0
    perceptual_start_epoch: float = 0.0
    discriminator: Discriminator = "dino"
    discriminator_start_epoch: float = 6.0
    adversarial_weight: float = 0.75
    adversarial_start_epoch: float = 8.0
    augment: bool = True

    may_be_zero: ClassVar[tuple[str, ...]] = (
        *Recipe.may_be_zero,
        *("perceptual_start_epoch", "discriminator_start_epoch", "adversarial_start_epoch", "tau"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
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

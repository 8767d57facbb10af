"""What a run will take, before anybody starts it: steps, operations, memory, days."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import nn

from rae.models.config import EncoderConfig
from rae.training.planning.decoder_cost import Phase, decoder_phases, loss_bytes, network_bytes
from rae.training.planning.flops import (
    ENCODERS,
    ViTShape,
    encoder_flops,
    encoder_parameters,
    encoder_shape,
    model_flops,
    num_parameters,
    on_meta,
)
from rae.training.planning.gpus import Cluster
from rae.training.planning.memory import FP32, StateMemory, activation_bytes, state_memory
from rae.training.recipe import IMAGENET_IMAGES
from rae.training.stage1.decoder_recipe import DecoderRecipe
from rae.training.stage2.presets import DiTRecipe
from rae.training.wording import counted

Recipe = DiTRecipe | DecoderRecipe

DIGITS_IMAGES = 25_500
"""What `rae train digits` writes: 1,500 scans and 16 moved copies of each."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Of `recipe` on `cluster`. `pre_encoded`: latents from a folder, so that no encoder runs.

    Raises ValueError for a batch that the GPUs, or GPUs and `micro_batch`, do not divide, fewer
    images than one batch, and a decoder that is to learn from latents alone.
    """

    recipe: Recipe
    cluster: Cluster
    num_images: int = IMAGENET_IMAGES
    pre_encoded: bool = False
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        self.recipe.steps(1, self.num_images)
        batch, gpus = self.recipe.batch_size, self.cluster.num_gpus
        if batch % gpus:
            raise ValueError(f"{gpus} GPUs do not divide a batch of {batch} images")
        if self.micro_batch is not None and (
            self.micro_batch < 1 or batch // gpus % self.micro_batch
        ):
            share = counted(batch // gpus, "image")
            raise ValueError(f"a micro-batch of {self.micro_batch} does not divide a GPU's {share}")
        if self.pre_encoded and isinstance(self.recipe, DecoderRecipe):
            raise ValueError("a decoder learns to make images: latents alone do not do")

    @property
    def steps_per_epoch(self) -> int:
        return self.recipe.steps(1, self.num_images)

    @property
    def num_steps(self) -> int:
        return self.recipe.num_steps(self.num_images)

    @property
    def images_seen(self) -> int:
        return self.num_steps * self.recipe.batch_size

    @cached_property
    def model(self) -> nn.Module:
        return on_meta(self.recipe.model)

    @cached_property
    def num_parameters(self) -> int:
        return num_parameters(self.recipe.model)

    @property
    def encoder(self) -> ViTShape | None:
        return None if self.pre_encoded else encoder_of(self.recipe)

    @property
    def phases(self) -> list[Phase]:
        base = model_flops(self.recipe.model).step
        base += 0 if self.encoder is None else encoder_flops(self.encoder)
        if isinstance(self.recipe, DiTRecipe):
            return [Phase("all", self.num_steps, base)]
        return list(decoder_phases(self.recipe, self.num_images, base))

    @property
    def flops(self) -> int:
        """Of the whole run."""
        images = self.recipe.batch_size
        return sum(phase.num_steps * phase.flops_per_image * images for phase in self.phases)

    @property
    def step_flops(self) -> float:
        """The mean step's."""
        return self.flops / self.num_steps

    @property
    def seconds(self) -> float:
        return self.flops / self.cluster.flops

    @property
    def gpu_hours(self) -> float:
        return self.seconds / 3600 * self.cluster.num_gpus

    @property
    def images_per_s(self) -> float:
        return self.images_seen / self.seconds

    @cached_property
    def state(self) -> StateMemory:
        return state_memory(
            self.num_parameters,
            largest_block(self.model),
            world_size=self.cluster.num_gpus,
            strategy=self.cluster.strategy,
            precision=self.cluster.precision,
        )

    @property
    def frozen_bytes(self) -> int:
        """The encoder and the losses' networks, in fp32 on every GPU."""
        total = 0 if self.encoder is None else FP32 * encoder_parameters(self.encoder)
        if isinstance(self.recipe, DecoderRecipe):
            total += network_bytes(self.recipe)
        return total

    @cached_property
    def activation_bytes(self) -> int:
        """Of one image, at the worst moment of a step: of the losses' networks one at a time."""
        total = activation_bytes(self.recipe.model, self.cluster.precision)
        if isinstance(self.recipe, DecoderRecipe):
            total += max(loss_bytes(self.recipe))
        return total

    def bytes_with(self, micro_batch: int) -> int:
        """Of one GPU."""
        return self.state.total + self.frozen_bytes + micro_batch * self.activation_bytes

    def fits(self, micro_batch: int) -> bool:
        return self.bytes_with(micro_batch) <= self.cluster.usable_bytes

    @property
    def images_per_gpu(self) -> int:
        """Of one step."""
        return self.recipe.batch_size // self.cluster.num_gpus

    @cached_property
    def largest_micro_batch(self) -> int | None:
        """That divides what a GPU has to do in a step and fits; None where not even one does."""
        sizes = [n for n in range(1, self.images_per_gpu + 1) if self.images_per_gpu % n == 0]
        return max((n for n in sizes if self.fits(n)), default=None)

    @property
    def used_micro_batch(self) -> int:
        """What was asked for, else the largest that fits, else one image."""
        return self.micro_batch or self.largest_micro_batch or 1

    @property
    def accumulation(self) -> int:
        return self.images_per_gpu // self.used_micro_batch

    @property
    def snapshot_bytes(self) -> int:
        """To go on from: weights, EMA, two moments."""
        return 4 * FP32 * self.num_parameters

    @property
    def export_bytes(self) -> int:
        """The EMA weights of the finished model."""
        return FP32 * self.num_parameters


def images_of(preset: str) -> int:
    """How many a preset is made for."""
    return DIGITS_IMAGES if preset in ("digits", "digits-guide") else IMAGENET_IMAGES


def encoder_of(recipe: Recipe) -> ViTShape | None:
    """Stage 2 is published with DINOv2-B, 14/16 of the images' size; None for other latents."""
    if isinstance(recipe, DecoderRecipe):
        return encoder_shape(recipe.encoder)
    if recipe.model.latent_channels != ENCODERS["dinov2"].hidden_size:
        return None
    size = recipe.model.latent_shape[1] * ENCODERS["dinov2"].patch_size
    return encoder_shape(EncoderConfig(kind="dinov2", image_size=size))


def largest_block(model: nn.Module) -> int:
    """Weights of the largest block that FSDP gathers."""
    lists = [child for child in model.children() if isinstance(child, nn.ModuleList)]
    return max(sum(p.numel() for p in block.parameters()) for blocks in lists for block in blocks)

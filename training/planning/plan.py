"""What a run will take, before anybody starts it: steps, operations, memory, days."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from torch import nn

from rae.models.config import EncoderConfig
from rae.training.distributed import Strategy
from rae.training.planning.flops import (
    DINO,
    ENCODERS,
    ViTShape,
    discriminator_flops,
    encoder_flops,
    encoder_parameters,
    head_parameters,
    lpips_flops,
    model_flops,
    num_parameters,
    on_meta,
)
from rae.training.planning.gpus import GPU
from rae.training.planning.memory import (
    FP32,
    StateMemory,
    activation_bytes,
    frozen_vit_bytes,
    lpips_bytes,
    state_memory,
)
from rae.training.precision import Precision
from rae.training.recipe import IMAGENET_IMAGES
from rae.training.stage1.decoder_recipe import DECODER_PRESETS, DecoderRecipe
from rae.training.stage2.presets import DIT_PRESETS, DiTRecipe

Recipe = DiTRecipe | DecoderRecipe

RESERVE_BYTES = 2 * 2**30
"""Of a GPU: the CUDA context, cuBLAS' and NCCL's buffers."""
FRAGMENTATION = 0.05
"""Of a GPU: what an allocator cannot use."""

VGG16_PARAMETERS = 14_714_688


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Whose `mfu` is assumed: no plan can know it."""

    gpu_name: str
    gpu: GPU
    num_gpus: int
    precision: Precision = "tf32"
    strategy: Strategy = "ddp"
    mfu: float = 0.4

    def __post_init__(self) -> None:
        if self.num_gpus < 1:
            raise ValueError(f"{self.num_gpus} GPUs: at least 1 is wanted")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"an MFU of {self.mfu} is not in (0, 1]")

    @property
    def flops(self) -> float:
        """FLOP/s that are assumed of all GPUs together."""
        return self.num_gpus * self.mfu * self.gpu.peak_flops(self.precision)

    @property
    def usable_bytes(self) -> int:
        """Of one GPU's memory."""
        return int(self.gpu.memory_gib * 2**30 * (1 - FRAGMENTATION)) - RESERVE_BYTES


@dataclass(frozen=True)
class Phase:
    """Steps that cost the same."""

    name: str
    num_steps: int
    flops_per_image: int


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
            raise ValueError(f"{gpus} GPUs do not divide a batch of {batch}")
        if self.micro_batch is not None and (
            self.micro_batch < 1 or batch // gpus % self.micro_batch
        ):
            raise ValueError(f"a micro-batch of {self.micro_batch} does not divide {batch // gpus}")
        if self.pre_encoded and isinstance(self.recipe, DecoderRecipe):
            raise ValueError("a decoder learns to make images: latents alone do not do")

    @property
    def steps_per_epoch(self) -> int:
        return self.recipe.steps(1, self.num_images)

    @property
    def num_steps(self) -> int:
        return self.recipe.steps(self.recipe.epochs, self.num_images)

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
    def days(self) -> float:
        return self.seconds / 86_400

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
        total = 0 if self.encoder is None else encoder_parameters(self.encoder)
        if isinstance(self.recipe, DecoderRecipe):
            total += VGG16_PARAMETERS if self.recipe.perceptual == "lpips" else 0
            total += encoder_parameters(DINO) if self.recipe.discriminator == "dino" else 0
            trunk, num_heads = discriminator_of(self.recipe)
            # With gradients and both moments.
            total += 4 * num_heads * head_parameters(trunk.hidden_size)
        return total * FP32

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


def presets() -> dict[str, Recipe]:
    """Of both stages. Stage 1's have the names of decoders: `decoder-DINOv2-B-256`."""
    decoders = {f"decoder-{name}": recipe for name, recipe in DECODER_PRESETS.items()}
    return {**DIT_PRESETS, **decoders}


def encoder_of(recipe: Recipe) -> ViTShape | None:
    """Stage 2 is published with DINOv2-B, 14/16 of the images' size; None for other latents."""
    if isinstance(recipe, DecoderRecipe):
        return shape_of(recipe.encoder)
    if recipe.model.latent_channels != ENCODERS["dinov2"].hidden_size:
        return None
    size = recipe.model.latent_shape[1] * ENCODERS["dinov2"].patch_size
    return shape_of(EncoderConfig(kind="dinov2", image_size=size))


def shape_of(encoder: EncoderConfig) -> ViTShape:
    """Of the base size, which all published recipes have."""
    base = ENCODERS[encoder.kind]
    return ViTShape(
        image_size=encoder.image_size,
        patch_size=base.patch_size,
        num_extra_tokens=base.num_extra_tokens,
    )


def discriminator_of(recipe: DecoderRecipe) -> tuple[ViTShape, int]:
    """Its frozen trunk and the number of its heads: 0 where there is none."""
    if recipe.discriminator == "encoder":
        return shape_of(recipe.encoder), 4
    return DINO, 5 if recipe.discriminator == "dino" else 0


def loss_bytes(recipe: DecoderRecipe) -> list[int]:
    """What the gradient of each term by one reconstruction needs."""
    encoder = frozen_vit_bytes(shape_of(recipe.encoder))
    lpips = lpips_bytes(recipe.model.image_size)
    trunk, num_heads = discriminator_of(recipe)
    return [
        {"lpips": lpips, "encoder": encoder, "none": 0}[recipe.perceptual],
        frozen_vit_bytes(trunk) if num_heads else 0,
    ]


def decoder_phases(recipe: DecoderRecipe, num_images: int, base: int) -> Iterator[Phase]:
    """A decoder costs more once the discriminator learns, and more again once it is heard. The
    discriminator sees a reconstruction of its own, by the weights after the step."""
    encoder = encoder_flops(shape_of(recipe.encoder))
    perceptual = {
        "lpips": lpips_flops(recipe.model.image_size).step,
        "encoder": 3 * encoder,
        "none": 0,
    }[recipe.perceptual]
    starts = {"perceptual": (recipe.perceptual_start_epoch, perceptual)}
    trunk, num_heads = discriminator_of(recipe)
    if num_heads:
        update, adversarial = discriminator_flops(trunk, num_heads)
        again = model_flops(recipe.model).forward
        starts["discriminator"] = (recipe.discriminator_start_epoch, update.step + again)
        starts["adversarial"] = (recipe.adversarial_start_epoch, adversarial.step)
    edges = sorted({0.0, recipe.epochs, *(min(at, recipe.epochs) for at, _ in starts.values())})
    for start, end in pairwise(edges):
        running = [name for name, (at, cost) in starts.items() if at <= start and cost]
        steps = recipe.steps(end, num_images) - recipe.steps(start, num_images)
        costs = sum(starts[name][1] for name in running)
        yield Phase(" + ".join(["L1", *running]), steps, base + costs)


def largest_block(model: nn.Module) -> int:
    """Weights of the largest block that FSDP gathers."""
    lists = [child for child in model.children() if isinstance(child, nn.ModuleList)]
    return max(sum(p.numel() for p in block.parameters()) for blocks in lists for block in blocks)

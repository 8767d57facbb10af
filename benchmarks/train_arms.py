"""What train_step.py times: a step of stage 2 by the authors' trainer, and by ours."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from authors import AuthorsTrainer, make_model
from own_trainer import make_learner, make_rae
from subjects import draw_weights
from torch import Tensor, nn

from rae.models.config import EncoderConfig
from rae.models.encoder import Encoder
from rae.models.layers import SwiGLU
from rae.models.published import NORMALISATION
from rae.training.batch import Batch
from rae.training.precision import Precision
from rae.training.recipe import IMAGENET_IMAGES
from rae.training.run import compile_blocks
from rae.training.stage2.dit_dh import DiTTask
from rae.training.stage2.presets import DiTRecipe
from rae.training.stage2.run_dit import build, objective

ENCODER_SIZE, IMAGE_SIZE = 224, 256
Step = Callable[[int], float]
"""Of a step's number: one update, and the loss, read from the device as both trainers do."""


def make_weights(recipe: DiTRecipe, device: torch.device) -> dict[str, Tensor]:
    with device:
        model = build(recipe.model, 0)
        torch.manual_seed(0)
        draw_weights(model)
    return model.state_dict()


def example(recipe: DiTRecipe, batch_size: int, device: torch.device, *, encodes: bool) -> Batch:
    torch.manual_seed(0)
    images = torch.randint(256, (batch_size, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    return Batch(
        positions=torch.arange(batch_size),
        class_labels=torch.randint(recipe.model.num_classes, (batch_size,)),
        images=images if encodes else None,
        latents=None if encodes else torch.randn(batch_size, *recipe.model.latent_shape),
    ).to(device)


def dinov2() -> nn.Module:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(patch_size=14, image_size=518)
    return Dinov2WithRegistersModel(config).eval()


def their_encode(recipe: DiTRecipe, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Their RAE.encode, without the decoder that their RAE would make."""
    from stage1.encoders.dinov2 import Dinov2withNorm  # type: ignore[import-not-found]
    from stage1.rae import RAE as TheirRAE  # type: ignore[import-not-found]

    encoder = Dinov2withNorm.__new__(Dinov2withNorm)
    nn.Module.__init__(encoder)
    encoder.encoder = dinov2().requires_grad_(False)
    encoder.encoder.layernorm = nn.LayerNorm(768, elementwise_affine=False, eps=1e-6)
    mean, std = NORMALISATION["dinov2"]
    rae = SimpleNamespace(
        encoder=encoder.to(device),
        encoder_input_size=ENCODER_SIZE,
        encoder_mean=torch.tensor(mean).view(1, 3, 1, 1),
        encoder_std=torch.tensor(std).view(1, 3, 1, 1),
        training=False,
        reshape_to_2d=True,
        do_normalization=True,
        latent_mean=torch.zeros(recipe.model.latent_shape),
        latent_var=torch.ones(recipe.model.latent_shape),
        eps=1e-5,
    )
    return partial(TheirRAE.encode, rae)


def authors_step(recipe: DiTRecipe, batch: Batch, precision: Precision, compiles: bool) -> Step:
    device = batch.class_labels.device
    join_a_group_of_one(device)
    with device:
        model = make_model(recipe.model)
    model.load_state_dict(make_weights(recipe, device))
    trainer = AuthorsTrainer(
        model,
        recipe,
        IMAGENET_IMAGES // recipe.batch_size,
        precision=precision,
        compiles=compiles,
        trains_tables=True,
    )
    if batch.images is None:
        assert batch.latents is not None
        return lambda _, latents=batch.latents: trainer.step(latents, batch.class_labels)
    encode = their_encode(recipe, device)
    encode = torch.compile(encode) if compiles else encode
    images = batch.images.float() / 255  # their loader gives floats in [0, 1]
    return lambda _: trainer.step(encode(images), batch.class_labels)


def join_a_group_of_one(device: torch.device) -> None:
    """What their DDP asks for."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{tempfile.mkdtemp()}/store",
            rank=0,
            world_size=1,
        )


class AlignedSwiGLU(SwiGLU):
    """`SwiGLU` with zeros after its hidden units, which add nothing."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.w3.in_features
        padding = -hidden % 8
        weight = F.pad(self.w12.weight.unflatten(0, (2, hidden)), (0, 0, 0, padding))
        bias = F.pad(self.w12.bias.unflatten(0, (2, hidden)), (0, padding))
        x1, x2 = F.linear(x, weight.flatten(0, 1), bias.flatten()).chunk(2, dim=-1)
        return F.linear(F.silu(x1) * x2, F.pad(self.w3.weight, (0, padding)), self.w3.bias)


def align(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, SwiGLU) and module.w3.in_features % 8:
            module.__class__ = AlignedSwiGLU


def our_step(
    recipe: DiTRecipe, batch: Batch, precision: Precision, options: Collection[str]
) -> tuple[DiTTask, Step]:
    """`options` are the words of a variant's name after "ours"."""
    device = batch.class_labels.device
    learner = make_learner(recipe, make_weights(recipe, device), device, IMAGENET_IMAGES)
    if "aligned" in options:
        align(learner.module)
    if "compiled" in options:
        compile_blocks(learner.module)
    if "whole" in options:
        learner.module.compile(dynamic=False)
    rae = make_rae(recipe.model)
    if batch.images is not None:
        rae.encoder = Encoder(EncoderConfig(kind="dinov2", image_size=ENCODER_SIZE), dinov2())
    task = DiTTask(learner, objective(recipe), rae.to(device), precision=precision)
    return task, lambda step: task.train_step([batch], step)["loss"].item()

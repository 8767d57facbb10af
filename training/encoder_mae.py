"""A small masked autoencoder (transformers' ViTMAE), pretrained here: the RAE's encoder."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from rae.models.config import EncoderConfig
from rae.models.embedders import sincos_2d
from rae.models.encoder import Encoder
from rae.training.data import Digits, random_transforms, render
from rae.training.loop import OnStep, Plan, fit

IMAGE_MEAN = (0.5, 0.5, 0.5)
IMAGE_STD = (0.5, 0.5, 0.5)


def normalise(images: Tensor) -> Tensor:
    """Pixels as the encoder sees them and the decoder makes them: [0, 1] to [−1, 1]."""
    return (images - IMAGE_MEAN[0]) / IMAGE_STD[0]


def build_mae(config: ViTMAEConfig) -> ViTMAEForPreTraining:
    """A masked autoencoder from scratch.

    transformers 5.23 leaves both position tables, the mask token and the class token at zero
    where no weights are loaded: such a model cannot know which patch to predict, and its loss
    stays that of a constant picture.
    """
    model = ViTMAEForPreTraining(config)
    grid = cast(int, config.image_size) // cast(int, config.patch_size)
    for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        table.data[0, 1:] = sincos_2d(table.shape[-1], grid)
    for token in (model.vit.embeddings.cls_token, model.decoder.mask_token):
        torch.nn.init.normal_(token, std=config.initializer_range)
    return model


def train_encoder(
    config: ViTMAEConfig,
    digits: Digits,
    plan: Plan,
    generator: torch.Generator,
    *,
    bf16: bool,
    on_step: OnStep,
) -> ViTMAEForPreTraining:
    """Reconstruct masked patches of moved and turned scans."""

    mae = build_mae(config)
    num_patches = mae.decoder.decoder_pos_embed.shape[1] - 1

    def batch_loss(model: ViTMAEForPreTraining) -> Tensor:
        rows = torch.randint(len(digits), (plan.batch_size,), generator=generator)
        images = render(digits.scans[rows], random_transforms(len(rows), generator))
        noise = torch.rand(len(rows), num_patches, generator=generator)
        return model(pixel_values=normalise(images), noise=noise).loss

    return fit(mae, batch_loss, plan, bf16=bf16, on_step=on_step)


def frozen_encoder(model: ViTMAEForPreTraining) -> Encoder:
    """The encoder as `load_encoder` would read it from disk: nothing masked."""
    vit = copy.deepcopy(model.vit)  # Encoder takes the affine part of its last norm away
    vit.embeddings.config.mask_ratio = 0.0
    return Encoder(EncoderConfig(kind="mae", image_size=cast(int, vit.config.image_size)), vit)

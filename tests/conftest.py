"""Fixtures shared by the four folders' tests."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from rae.models.checkpoint import save_checkpoint, write_config
from rae.models.checkpoint_config import CheckpointConfig, SamplerDefaults, read_config
from rae.models.config import DecoderConfig, DiTDHConfig, EncoderConfig
from rae.models.dit_dh import DiTDH
from rae.models.published import NORMALISATION
from rae.models.rae import RAE

# `pytest --hypothesis-profile=soak`: hours of examples where nobody waits for them.
settings.register_profile("soak", max_examples=5_000, deadline=None)

# The kernels read it when they are imported, which nothing above does.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What servers remember of one run is not found by the next."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


def random_model(config: DiTDHConfig, seed: int) -> DiTDH:
    """A DiT^DH whose every part matters: the zero initialisation would hide half of it."""
    torch.manual_seed(seed)
    model = DiTDH(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


def write_tiny_checkpoint(folder: Path) -> Path:
    """Four classes, 16 tokens of 32 channels, 16 px images, and a guide; random weights."""
    dit_dh = DiTDHConfig(
        latent_channels=32,
        latent_size=4,
        hidden_size=32,
        depth=2,
        num_heads=4,
        head_hidden_size=48,
        head_depth=1,
        head_num_heads=4,
        num_classes=4,
    )
    guide = replace(dit_dh, depth=1, num_heads=2, head_hidden_size=32, head_num_heads=2)
    decoder = DecoderConfig(
        latent_channels=32,
        hidden_size=32,
        depth=1,
        num_heads=2,
        intermediate_size=64,
        patch_size=4,
        grid=4,
    )
    config = CheckpointConfig(
        name="tiny",
        dit_dh=dit_dh,
        guide=guide,
        decoder=decoder,
        classes=("zero", "one", "two", "three"),
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        shift=1.5,
        defaults=SamplerDefaults(steps=10, cfg=1.5),
        license="MIT",
    )
    torch.manual_seed(0)
    rae = RAE(decoder, image_mean=config.image_mean, image_std=config.image_std)
    save_checkpoint(folder, config, random_model(dit_dh, 1), rae, random_model(guide, 2))
    return folder


@pytest.fixture(scope="session")
def tiny_encoder_checkpoint(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny checkpoint as one whose pixels are normalised for DINOv2, which is not there."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("dinov2") / "checkpoint")
    config, _ = read_config(folder)
    encoder = EncoderConfig(kind="dinov2", image_size=56, name="facebook/dinov2")
    mean, std = NORMALISATION["dinov2"]
    write_config(folder, replace(config, encoder=encoder, image_mean=mean, image_std=std))
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))

"""Every count against torch's own, of the real modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rae.models.config import (
    CONFIGS,
    DECODER_CONFIGS,
    DecoderConfig,
    DiTConfig,
    DiTDHConfig,
    EncoderConfig,
    EncoderKind,
)
from rae.models.encoder import Encoder
from rae.training.planning.flops import (
    DINO,
    ENCODERS,
    Flops,
    ModelConfig,
    ViTShape,
    discriminator_flops,
    encoder_flops,
    encoder_parameters,
    lpips_flops,
    model_flops,
    num_parameters,
    on_meta,
)
from rae.training.stage2.presets import DIGITS

NUM = 3

TINY = DiTDHConfig(
    latent_channels=24,
    latent_size=3,
    hidden_size=32,
    depth=3,
    num_heads=4,
    head_hidden_size=48,
    head_depth=2,
    head_num_heads=4,
    num_classes=5,
)
TINY_DIT = DiTConfig(
    latent_channels=24, latent_size=3, hidden_size=32, depth=3, num_heads=4, num_classes=5
)
TINY_DECODER = DecoderConfig(
    latent_channels=24,
    hidden_size=32,
    depth=2,
    num_heads=4,
    intermediate_size=72,
    patch_size=4,
    grid=3,
)


def counted(forward: Callable[[], Tensor]) -> Flops:
    """Of one of NUM images, on the meta device: nothing is computed, and nothing padded."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        output = forward()
    total = counter.get_total_flops()
    if not output.requires_grad:
        return Flops(total // NUM, 0)
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    return Flops(total // NUM, counter.get_total_flops() // NUM)


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        replace(TINY, head_hidden_size=32, use_swiglu=False),
        replace(TINY, use_qknorm=True, use_rmsnorm=False, mlp_ratio=3.7, class_dropout_prob=0),
        CONFIGS["DiTDH-S-256"],
        replace(CONFIGS["DiTDH-XL-512"], depth=2),
        TINY_DIT,
        replace(TINY_DIT, use_swiglu=False),
        TINY_DECODER,
        replace(DECODER_CONFIGS["decoder-ViT-XL-256"], depth=2),
    ],
)
def test_a_training_step_has_as_many_operations_as_torch_counts(config: ModelConfig) -> None:
    model = on_meta(config)

    def forward() -> Tensor:
        if isinstance(config, DecoderConfig):
            return model(torch.empty(NUM, config.grid**2, config.latent_channels))
        latents = torch.empty(NUM, *config.latent_shape)
        return model(latents, torch.empty(NUM), torch.zeros(NUM, dtype=torch.long))

    assert model_flops(config) == counted(forward)


def test_published_sizes_have_the_published_costs() -> None:
    xl = model_flops(CONFIGS["DiTDH-XL-256"])
    assert xl.forward == pytest.approx(323e9, rel=2e-3)
    assert xl.step == pytest.approx(968e9, rel=2e-3)
    assert num_parameters(CONFIGS["DiTDH-XL-256"]) == pytest.approx(839e6, rel=2e-3)
    assert num_parameters(CONFIGS["DiTDH-S-256"]) == pytest.approx(196e6, rel=2e-3)
    assert num_parameters(DECODER_CONFIGS["decoder-ViT-XL-256"]) == pytest.approx(415e6, rel=2e-3)
    assert model_flops(DIGITS.model).forward < 1e-3 * xl.forward


SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "attn_implementation": "sdpa",
}


def tiny_encoder(kind: str) -> tuple[Any, Encoder]:
    with torch.device("meta"):
        if kind == "dinov2":
            sizes = {**SMALL, "mlp_ratio": 3, "patch_size": 14, "num_register_tokens": 4}
            config = transformers.Dinov2WithRegistersConfig(image_size=56, **sizes)
            model = transformers.Dinov2WithRegistersModel(config)
        elif kind == "siglip2":
            sizes = {**SMALL, "patch_size": 8, "vision_use_head": False}
            config = transformers.SiglipVisionConfig(image_size=48, **sizes)
            model = transformers.SiglipVisionModel(config)
        else:
            config = transformers.ViTMAEConfig(image_size=32, patch_size=8, mask_ratio=0.0, **SMALL)
            model = transformers.ViTMAEModel(config)
        image_size = {"dinov2": 56, "siglip2": 48, "mae": 64}[kind]
        settings = EncoderConfig(kind=kind, image_size=image_size)  # type: ignore[arg-type]
        return config, Encoder(settings, getattr(model, "vision_model", model))


def shape_of(kind: EncoderKind, config: Any, image_size: int) -> ViTShape:  # noqa: ANN401
    """Of a vision config of transformers."""
    if kind == "dinov2":
        intermediate_size = config.hidden_size * config.mlp_ratio
        num_extra_tokens = 1 + config.num_register_tokens
    else:
        intermediate_size = config.intermediate_size
        num_extra_tokens = int(kind == "mae")
    return ViTShape(
        image_size=image_size,
        patch_size=config.patch_size,
        hidden_size=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        intermediate_size=intermediate_size,
        num_extra_tokens=num_extra_tokens,
    )


@pytest.mark.parametrize("kind", ["dinov2", "siglip2", "mae"])
def test_an_encoder_has_as_many_operations_as_torch_counts(kind: str) -> None:
    config, encoder = tiny_encoder(kind)
    size = encoder.config.image_size
    shape = shape_of(encoder.config.kind, config, size)
    assert counted(lambda: encoder(torch.empty(NUM, 3, size, size))) == Flops(
        encoder_flops(shape), 0
    )


def test_the_published_encoders_are_transformers_own() -> None:
    dinov2 = transformers.Dinov2WithRegistersConfig(patch_size=14)
    siglip2 = transformers.SiglipVisionConfig()
    assert shape_of("dinov2", dinov2, 224) == ENCODERS["dinov2"]
    assert shape_of("siglip2", siglip2, 256) == ENCODERS["siglip2"]
    assert shape_of("mae", transformers.ViTMAEConfig(), 256) == ENCODERS["mae"]
    with torch.device("meta"):
        real = transformers.Dinov2WithRegistersModel(dinov2)
    assert encoder_parameters(ENCODERS["dinov2"]) == pytest.approx(real.num_parameters(), rel=2e-2)


def test_the_losses_networks_have_as_many_operations_as_torch_counts() -> None:
    with torch.device("meta"):
        vgg = torchvision.models.vgg16().features.requires_grad_(False)
        heads = nn.ModuleList(stand_in_head(DINO.hidden_size) for _ in range(5))
        image = torch.empty(NUM, 3, 64, 64, requires_grad=True)
    both = lpips_flops(64)
    assert counted(lambda: vgg(image)) == Flops(both.forward // 2, both.backward)

    features = torch.empty(NUM, DINO.hidden_size, DINO.num_patches, device="meta")
    one = counted(lambda: torch.cat([head(features) for head in heads]))
    update, adversarial = discriminator_flops(DINO, len(heads))
    trunk = encoder_flops(DINO)
    assert update == Flops(2 * (trunk + one.forward), 2 * one.backward)
    assert adversarial == Flops(trunk + one.forward, trunk + one.forward)


def stand_in_head(dim: int) -> nn.Module:
    """The convolutions of one of the discriminator's heads."""
    return nn.Sequential(
        nn.Conv1d(dim, dim, 1), nn.Conv1d(dim, dim, 9, padding=4), nn.Conv1d(dim, 1, 1)
    )

"""Estimates of activations against what torch saves for a backward, of the real modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torchvision
import transformers
from torch import Tensor, nn

from rae.models.config import DecoderConfig, DiTConfig, DiTDHConfig
from rae.models.decoder import Decoder
from rae.models.dit import DiT
from rae.models.dit_dh import DiTDH
from rae.training.planning.flops import ModelConfig, ViTShape, num_parameters
from rae.training.planning.memory import (
    activation_bytes,
    frozen_vit_bytes,
    lpips_bytes,
    state_memory,
    tapped_bytes,
)
from rae.training.precision import Precision

SMALL = DiTDHConfig(
    latent_channels=48,
    latent_size=4,
    hidden_size=96,
    depth=3,
    num_heads=4,
    head_hidden_size=128,
    head_depth=2,
    head_num_heads=4,
    num_classes=5,
)
SMALL_DIT = DiTConfig(
    latent_channels=48, latent_size=4, hidden_size=96, depth=3, num_heads=4, num_classes=5
)
SMALL_DECODER = DecoderConfig(
    latent_channels=48,
    hidden_size=96,
    depth=3,
    num_heads=4,
    intermediate_size=320,
    patch_size=4,
    grid=4,
)


def build(config: ModelConfig) -> nn.Module:
    if isinstance(config, DecoderConfig):
        return Decoder(config)
    return DiTDH(config) if isinstance(config, DiTDHConfig) else DiT(config)


def saved_bytes(model: nn.Module, num: int, precision: Precision) -> int:
    config: ModelConfig = model.config  # type: ignore[assignment]

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            if isinstance(config, DecoderConfig):
                return model(torch.randn(num, config.grid**2, config.latent_channels))
            labels = torch.zeros(num, dtype=torch.long)
            return model(torch.randn(num, *config.latent_shape), torch.rand(num), labels)

    return saved_by(model, forward)


def saved_by(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of all storages that a backward needs, beside weights and tables."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, use_qknorm=True),
        replace(SMALL, use_swiglu=False, head_hidden_size=96),
        replace(SMALL, use_rmsnorm=False, use_qknorm=True),
        replace(SMALL, use_pos_embed=False),
        SMALL_DIT,
        replace(SMALL_DIT, use_rmsnorm=False),
        SMALL_DECODER,
        replace(SMALL_DECODER, depth=1, intermediate_size=96),
    ],
)
def test_activations_are_what_torch_saves(config: ModelConfig, precision: Precision) -> None:
    """The difference of 16 images and 32: with fewer a CPU's linears are padded, and autocast's
    copies of the weights are in both."""
    model = build(config)
    few, many = (saved_bytes(model, num, precision) for num in (16, 32))
    measured = (many - few) / 16
    assert activation_bytes(config, precision) == pytest.approx(measured, rel=0.05)
    copies = 2 * few - many
    assert copies == pytest.approx(
        2 * num_parameters(config) if precision == "bf16" else 0, rel=0.15
    )


def test_the_losses_networks_keep_what_torch_saves() -> None:
    """Their weights are frozen, so that a linear or a convolution does not keep its input."""
    with torch.device("meta"):  # without the memory of its 120 M weights of a classifier
        vgg = torchvision.models.vgg16(init_weights=False).features.requires_grad_(False)
    vgg.to_empty(device="cpu")
    image = torch.randn(1, 3, 64, 64, requires_grad=True)
    measured = saved_by(vgg, lambda: vgg(image)) - image.nbytes
    features = lpips_bytes(64) - tapped_bytes(64)
    assert features == pytest.approx(measured, rel=0.1)

    config = transformers.ViTConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        image_size=64,
        patch_size=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config._attn_implementation = "sdpa"
    trunk = transformers.ViTModel(config, add_pooling_layer=False).eval()
    trunk.requires_grad_(False)
    shape = ViTShape(
        image_size=64,
        patch_size=8,
        hidden_size=48,
        depth=3,
        num_heads=4,
        intermediate_size=192,
        num_extra_tokens=1,
    )
    measured = saved_by(trunk, lambda: trunk(image).last_hidden_state) - image.nbytes
    assert frozen_vit_bytes(shape) == pytest.approx(measured, rel=0.1)


def test_ddp_keeps_everything_everywhere_and_fsdp_a_share() -> None:
    alone = state_memory(1000, 100, world_size=1, strategy="ddp", precision="fp32")
    assert (alone.weights, alone.gradients, alone.moments, alone.ema) == (4000, 4000, 8000, 4000)
    assert alone.total == 20_000
    ddp = state_memory(1000, 100, world_size=8, strategy="ddp", precision="bf16")
    assert ddp.total == 20_000 + 4000 + 2000  # buckets, and weights in bf16
    fsdp = state_memory(1000, 100, world_size=8, strategy="fsdp", precision="fp32")
    assert fsdp.total == 20_000 // 8 + 800

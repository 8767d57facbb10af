"""The layers on the kernels: the plain ones' numbers, whatever implementation runs."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rae.kernels.attention import attention
from rae.kernels.swiglu import swiglu
from rae.models.config import DecoderConfig, DiTDHConfig
from rae.models.decoder import Decoder
from rae.models.dit_dh import DiTDH
from rae.models.fused import fuse

SMALL = DiTDHConfig(
    latent_channels=32,
    latent_size=4,
    hidden_size=96,
    depth=2,
    num_heads=4,
    head_hidden_size=128,  # SwiGLU's hidden size is 341 then, odd as at width 2048
    head_depth=2,
    head_num_heads=2,
    num_classes=4,
)
VARIANTS = {
    "published": SMALL,
    "qk-norm": replace(SMALL, use_qknorm=True),
    "LayerNorm": replace(SMALL, use_rmsnorm=False),
    "GELU": replace(SMALL, use_swiglu=False),
    "one backbone block": replace(SMALL, depth=1, head_depth=1),
}


def draw(config: DiTDHConfig) -> tuple[DiTDH, tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(0)
    model = DiTDH(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    inputs = torch.randn(2, *config.latent_shape), torch.rand(2), torch.tensor([1, 4])
    return model.eval().requires_grad_(False), inputs


def error(output: Tensor, exact: Tensor) -> float:
    assert output.shape == exact.shape
    return float((output.double() - exact).norm() / exact.norm())


@torch.inference_mode()
@pytest.mark.parametrize("kernels", ["triton", "library", "reference"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_model_gives_the_plain_layers_numbers(name: str, kernels: str) -> None:
    model, inputs = draw(VARIANTS[name])
    latents, t, labels = inputs
    exact = copy.deepcopy(model).double()(latents.double(), t.double(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        plain = error(copy.deepcopy(model)(*inputs), exact)
    fused = copy.deepcopy(model)
    fuse(fused, torch.float32, kernels, kernels)
    assert error(fused(*inputs), exact) < 2e-6
    fuse(model, torch.bfloat16, kernels, kernels)
    with torch.autocast("cpu", torch.bfloat16):
        # The streams are fp32 here: the head's is bf16 in the plain layers.
        assert error(model(*inputs), exact) < 1.05 * plain


@torch.inference_mode()
@pytest.mark.parametrize("kernels", ["triton", "library", "reference"])
def test_a_decoder_gives_the_plain_layers_numbers(kernels: str) -> None:
    torch.manual_seed(0)
    config = DecoderConfig(
        latent_channels=32,
        hidden_size=48,
        depth=2,
        num_heads=4,
        intermediate_size=64,
        patch_size=4,
        grid=4,
    )
    decoder = Decoder(config).eval().requires_grad_(False)
    tokens = torch.randn(2, 16, 32)
    exact = copy.deepcopy(decoder).double()(tokens.double())
    fuse(decoder, torch.float32, kernels, kernels)
    assert error(decoder(tokens), exact) < 1e-6


def test_the_references_are_fp32_under_autocast_too() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 16), torch.randn(256, 16), torch.randn(256)
    qkv = torch.randn(1, 5, 96)
    expected = swiglu(x, weight, bias, "reference"), attention(qkv, 4, None, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert swiglu(x, weight, bias, "reference").equal(expected[0])
        assert attention(qkv, 4, None, None).equal(expected[1])


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, about its compiler's caches
def test_the_compiled_model_is_the_eager_one() -> None:
    model, inputs = draw(replace(SMALL, depth=1, head_depth=1))
    fuse(model, torch.float32, "triton", "triton")
    with torch.inference_mode():
        expected = model(*inputs)
        compiled = torch.compile(model, fullgraph=True)(*inputs)
    assert error(compiled, expected.double()) < 1e-6

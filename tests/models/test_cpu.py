"""The packed layers: the numbers of the plain ones, and rows that do not meet."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rae.models import cpu
from rae.models.config import DiTDHConfig
from rae.models.cpu import PackedAttention, PackedLinear, PackedSwiGLU, can_pack, pack
from rae.models.dit_dh import DiTDH
from rae.models.layers import Attention, Linear, RotaryEmbedding, SwiGLU

pytestmark = pytest.mark.skipif(not can_pack(), reason="this CPU or torch has no packed linear")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SMALL = DiTDHConfig(
    latent_channels=32,
    latent_size=4,
    hidden_size=96,
    depth=2,
    num_heads=4,
    head_hidden_size=128,  # SwiGLU's hidden size is 341 then, odd as at width 2048
    head_depth=1,
    head_num_heads=4,
    num_classes=4,
)


def error(output: Tensor, exact: Tensor) -> float:
    assert output.shape == exact.shape
    return float((output.double() - exact).norm() / exact.norm())


def bound(plain: Tensor, exact: Tensor) -> float:
    """Of the error in bf16: the plain layer's; in fp32 that depends on the order of a sum."""
    return max(1e-6, 1.1 * error(plain, exact))


def bits_are_those_of_rows_alone(module: nn.Module, x: Tensor) -> bool:
    alone = torch.cat([module(row[None]) for row in x])
    return all(
        torch.equal(module(x[:rows]), alone[:rows]) for rows in (1, 2, 3, 5, 11, 16, 17, 33, 64)
    )


@DTYPES
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(1152, 3456), (96, 576), (341, 128), (128, 341), (32, 85), (48, 16)]
)
def test_linear_is_the_plain_one_and_rows_do_not_meet(
    inputs: int, outputs: int, threads: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(inputs, outputs), torch.randn(64, inputs)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            packed = PackedLinear.of(layer, dtype)
            assert packed(x).dtype == dtype
            exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
            plain = F.linear(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))
            assert error(packed(x), exact) < bound(plain, exact)
            assert bits_are_those_of_rows_alone(packed, x)
            assert packed(x.view(2, 4, 8, inputs)).equal(packed(x).view(2, 4, 8, outputs))
    finally:
        torch.set_num_threads(before)


@DTYPES
def test_swiglu_is_the_plain_one_which_stays_as_it_was(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    mlp, x = SwiGLU(128, 4.0), torch.randn(64, 128)
    published = copy.deepcopy(mlp.state_dict())
    with torch.no_grad():
        packed = PackedSwiGLU(mlp, dtype)
        exact = copy.deepcopy(mlp).double()(x.double())
        plain = copy.deepcopy(mlp).to(dtype)(x.to(dtype))
        assert error(packed(x), exact) < bound(plain, exact)
        assert bits_are_those_of_rows_alone(packed, x)
    assert published.keys() == mlp.state_dict().keys()
    assert all(mlp.state_dict()[key].equal(value) for key, value in published.items())


@DTYPES
@pytest.mark.parametrize("use_qknorm", [True, False])
@pytest.mark.parametrize("grid", [4, 9])  # in and out of PRODUCTS
def test_attention_is_the_plain_one_however_it_is_split(
    grid: int, use_qknorm: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    attention = Attention(96, 4, use_qknorm, use_rmsnorm=True)
    nn.init.normal_(attention.qkv.weight, std=0.3)  # sharp: scores of some 10
    rope, x = RotaryEmbedding(24, grid), torch.randn(12, grid**2, 96)
    with torch.no_grad():
        packed = PackedAttention(attention, dtype)
        exact = copy.deepcopy(attention).double()(x.double(), copy.deepcopy(rope).double())
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            plain = attention(x, rope)
            output = packed(x, rope)
        assert error(output, exact) < bound(plain, exact)
        assert torch.cat([packed(sample[None], rope) for sample in x]).equal(output)
        monkeypatch.setattr(cpu, "SCORES_AT_ONCE", 5 * 4 * grid**4)
        assert packed(x, rope).equal(output)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, use_qknorm=True, use_pos_embed=False),
        replace(SMALL, use_rmsnorm=False, use_qknorm=True),
        replace(SMALL, use_swiglu=False, head_hidden_size=96),
    ],
    ids=["published", "qknorm", "layernorm", "gelu"],
)
def test_model_is_the_plain_one(config: DiTDHConfig) -> None:
    torch.manual_seed(0)
    plain = DiTDH(config).requires_grad_(False)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.1)
    models = {dtype: copy.deepcopy(plain) for dtype in (torch.float32, torch.bfloat16)}
    for dtype, model in models.items():
        pack(model, dtype)
    inputs = torch.randn(3, *config.latent_shape), torch.rand(3), torch.tensor([0, 3, 4])
    with torch.inference_mode():
        exact = plain(*inputs).double()
        assert error(models[torch.float32](*inputs), exact) < 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            assert error(models[torch.bfloat16](*inputs), exact) < bound(plain(*inputs), exact)


def test_a_model_is_packed_in_one_precision_only() -> None:
    model = nn.Sequential(Linear(16, 16))
    pack(model, torch.bfloat16)
    with pytest.raises(AssertionError, match="packed already"):
        pack(model, torch.float32)

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rae.kernels import swiglu as module
from rae.kernels.dispatch import selected
from rae.kernels.swiglu import (
    describable,
    launch,
    launch_silu_mul,
    pack_weights,
    silu_mul_ref,
    swiglu,
    swiglu_ref,
)
from rae.models.layers import SwiGLU

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter takes 2 s for a million weights in bf16; a GPU has the real sizes.
SHAPES = [(1, 384, 1024), (257, 384, 256), (255, 1152, 128)]
if DEVICE == "cuda":
    SHAPES += [
        (rows, dim, hidden)
        for rows in (1, 255, 256, 257, 2048)
        for dim, hidden in [(384, 1024), (1152, 3072), (2048, 5504)]
    ]
# Of the eager chain's error. It rounds 4 times in bf16; in fp32 only the order of sums differs.
BOUNDS = {torch.bfloat16: 1.05, torch.float32: 2.0}
# Root mean square and largest. One sum of 2048 terms has four times the errors of 128 sums of 16,
# as cuBLAS may have them; TF32 would have 5e-4.
ALLOWED = {torch.bfloat16: (0.0, 0.0), torch.float32: (2e-6, 5e-5)}
CONFIG = {
    "block_m": 64,
    "block_n": 64,
    "block_k": 32,
    "group_m": 3,
    "flatten": 0,
    "programs_per_sm": 1,
    "num_warps": 4,
    "num_stages": 2,
}


def operands(
    rows: int, dim: int, hidden: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """x, packed weight and bias: both halves of the product have a spread of about 1."""
    torch.manual_seed(rows + dim + hidden)
    x = torch.randn(rows, dim)
    weight, bias = torch.randn(2 * hidden, dim) * dim**-0.5, torch.randn(2 * hidden)
    x, weight, bias = (tensor.to(DEVICE, dtype) for tensor in (x, weight, bias))
    return x, weight, bias


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As models/layers.py computes it: every operation rounds to x's dtype."""
    w12 = torch.cat([weight[0::2], weight[1::2]])
    x1, x2 = F.linear(x, w12, torch.cat([bias[0::2], bias[1::2]])).chunk(2, dim=-1)
    return F.silu(x1) * x2


def errors(result: Tensor, exact: Tensor) -> tuple[float, float]:
    """Root mean square and largest."""
    difference = result.double() - exact
    return difference.square().mean().sqrt().item(), difference.abs().max().item()


def assert_as_exact_as_eager(result: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    exact = swiglu_ref(x.double(), weight.double(), bias.double())
    for error, bound, allowed in zip(
        errors(result, exact),
        errors(eager(x, weight, bias), exact),
        ALLOWED[x.dtype],
        strict=True,
    ):
        assert error <= max(BOUNDS[x.dtype] * bound, allowed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows, dim, hidden", SHAPES)
def test_kernel_is_as_exact_as_the_eager_chain(
    rows: int, dim: int, hidden: int, dtype: torch.dtype
) -> None:
    x, weight, bias = operands(rows, dim, hidden, dtype)
    result = swiglu(x, weight, bias, kernels="triton")
    assert_as_exact_as_eager(result, x, weight, bias)


@pytest.mark.parametrize("kernels", ["library", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_others_are_as_exact_as_the_eager_chain(dtype: torch.dtype, kernels: str) -> None:
    x, weight, bias = operands(257, 384, 1024, dtype)
    assert_as_exact_as_eager(swiglu(x, weight, bias, kernels=kernels), x, weight, bias)


@pytest.mark.parametrize("sms", [1, 3, 132])
@pytest.mark.parametrize("changes", [{}, {"flatten": 1}, {"group_m": 1}, {"block_k": 64}], ids=str)
def test_every_tile_is_written_once(
    changes: dict[str, int], sms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 × 4 tiles, the last row of tiles of 44 rows and the last step of 8 columns."""
    monkeypatch.setattr(module, "num_sms", lambda device: sms)
    x, weight, bias = operands(300, 72, 128)
    result = launch(x, weight, bias, **{**CONFIG, **changes})
    torch.testing.assert_close(result, swiglu_ref(x, weight, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(DEVICE == "cuda", reason="only below sm_90, or interpreted")
def test_descriptors_made_in_the_kernel_read_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = operands(70, 72, 128)
    expected = launch(x, weight, bias, **CONFIG)
    monkeypatch.setattr(module, "makes_descriptors", lambda: True)
    result = launch(F.pad(x, (0, 8))[:, :72], weight, bias, **CONFIG)
    assert torch.equal(result, expected)


@pytest.mark.parametrize(
    "start, stop, samples, in_place",
    [(0, 64, 3, True), (8, 72, 3, True), (1, 65, 3, False), (0, 64, 1, True)],
)
def test_views_are_read_like_copies(start: int, stop: int, samples: int, in_place: bool) -> None:
    x, weight, bias = operands(3 * 20, 96, 128)
    view = x.unflatten(0, (3, 20))[:samples, :, start:stop]
    assert describable(view.reshape(-1, 64)) == in_place
    expected = swiglu(view.contiguous(), weight[:, :64].contiguous(), bias, kernels="triton")
    result = swiglu(view, weight[:, :64].contiguous(), bias, kernels="triton")
    assert result.shape == (samples, 20, 128)
    assert torch.equal(result, expected)


def test_repeated_rows_are_copied() -> None:
    x, weight, bias = operands(1, 64, 128)
    assert not describable(x.expand(40, 64))
    expected = swiglu(x, weight, bias, kernels="triton")
    result = swiglu(x.expand(40, 64), weight, bias, kernels="triton")
    torch.testing.assert_close(result, expected.expand(40, 128))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_silu_mul_kernel(dtype: torch.dtype) -> None:
    """Of 3·1025 pairs: no whole number of blocks. The first are as extreme as they get."""
    torch.manual_seed(0)
    pairs = (4 * torch.randn(3, 2 * 1025)).to(DEVICE, dtype)
    pairs[0, :8] = torch.tensor([-200.0, 1.0, 200.0, 1.0, 0.0, 3.0, -80.0, -1e30])
    result = launch_silu_mul(pairs)
    rtol = 1e-5 if dtype == torch.float32 else 1.01 * torch.finfo(dtype).eps / 2
    torch.testing.assert_close(result.double(), silu_mul_ref(pairs.double()), rtol=rtol, atol=1e-30)


def test_packing_a_layer_changes_nothing() -> None:
    torch.manual_seed(0)
    layer = SwiGLU(80, 4.0).double().to(DEVICE)
    assert layer.w3.in_features == 213
    weight, bias, w3_weight = pack_weights(layer.w12.weight, layer.w12.bias, layer.w3.weight)
    assert (weight.shape, bias.shape, w3_weight.shape) == ((512, 80), (512,), (80, 256))
    assert torch.equal(weight[2 * 7], layer.w12.weight[7])
    assert torch.equal(weight[2 * 7 + 1], layer.w12.weight[213 + 7])
    x = torch.randn(2, 9, 80, dtype=torch.float64, device=DEVICE)
    result = F.linear(swiglu(x, weight, bias, kernels="reference"), w3_weight, layer.w3.bias)
    x1, x2 = layer.w12(x).chunk(2, dim=-1)
    expected = layer.w3(F.silu(x1) * x2)  # The layer's own silu is fp32 on a CPU.
    torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("hidden, padded", [(5461, 5504), (213, 256), (1024, 1024), (3072, 3072)])
def test_padding_of_the_hidden_size(hidden: int, padded: int) -> None:
    packed = pack_weights(torch.ones(2 * hidden, 1), torch.ones(2 * hidden), torch.ones(1, hidden))
    assert [tensor.shape for tensor in packed] == [(2 * padded, 1), (2 * padded,), (1, padded)]
    assert [int(tensor.sum()) for tensor in packed] == [2 * hidden, 2 * hidden, hidden]


def test_packing_refuses_shapes_that_do_not_match() -> None:
    with pytest.raises(ValueError, match="do not match"):
        pack_weights(torch.ones(10, 4), torch.ones(10), torch.ones(4, 6))


def test_rows_of_broken_16_bytes_are_the_library_s() -> None:
    x, weight, bias = operands(5, 38, 128)
    with pytest.raises(ValueError, match="whole 16 bytes, not 38"):
        swiglu(x, weight, bias, kernels="triton")
    result = swiglu(x, weight, bias)
    assert selected()["swiglu float32 dim 38 hidden 128"] == ["library", "triton"]
    torch.testing.assert_close(result, swiglu_ref(x, weight, bias))


def test_operands_that_are_refused() -> None:
    x, weight, bias = operands(4, 64, 128)
    for wrong, message in [
        ((x[:, :32], weight, bias), "x \\(4, 32\\)"),
        ((x.T.contiguous().T, weight, bias), "contiguous rows"),
        ((x, weight[:200], bias[:200]), "not packed"),
        ((x, weight, bias[:128]), "not packed"),
        ((x, weight.T.contiguous().T, bias), "not contiguous"),
        ((x.double(), weight, bias), "x is torch.float64"),
    ]:
        with pytest.raises(ValueError, match=message):
            swiglu(*wrong)


@pytest.mark.parametrize("kernels", ["triton", "library", "reference"])
def test_operator_is_registered_as_torch_expects(kernels: str) -> None:
    x, weight, bias = operands(6, 64, 128)
    torch.library.opcheck(module._swiglu, (x.unflatten(0, (2, 3)), weight, bias, kernels))


def test_compiled_equals_eager() -> None:
    x, weight, bias = operands(6, 64, 128)
    compiled = torch.compile(swiglu, fullgraph=True)
    assert torch.equal(compiled(x, weight, bias), swiglu(x, weight, bias))

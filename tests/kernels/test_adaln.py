"""The norm site against fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rae.kernels import adaln as op
from rae.kernels.adaln import _adaln, adaln_ref, gated_residual, last_adaln, residual_adaln

EPS = 1e-6
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
RESIDUALS = pytest.mark.parametrize(
    "residual", [torch.float32, torch.bfloat16], ids=["fp32 residual", "bf16 residual"]
)
# Batch, tokens, width: the published widths, one token, samples that end within a block of rows.
SHAPES = [(1, 1, 384), (3, 5, 768), (2, 7, 1024), (1, 3, 1152), (2, 3, 2048), (2, 3, 213)]


def draw(
    shape: tuple[int, int, int], dtype: torch.dtype, residual: torch.dtype, *, per_token: bool
) -> tuple[Tensor, ...]:
    """x, y, gate, shift, scale, weight; the middle three lie in one (B, ·, 6D) buffer."""
    batch, tokens, dim = shape
    x = (3 * torch.randn(shape)).to(residual)
    y = torch.randn(shape).to(dtype)
    modulation = torch.randn(batch, tokens if per_token else 1, 6 * dim).to(dtype)
    shift, scale, gate, *_ = modulation.chunk(6, dim=-1)
    return x, y, gate, shift, scale, 0.5 + torch.rand(dim)


def exact(operands: tuple[Tensor, ...], norm: str = "rms") -> tuple[Tensor, Tensor]:
    x, y, gate, shift, scale, weight = (operand.double() for operand in operands)
    stream = x + gate * y
    if norm == "layer":
        return stream, F.layer_norm(stream, x.shape[-1:], eps=EPS) * (1 + scale) + shift
    normed = F.rms_norm(stream, x.shape[-1:], weight, EPS)
    return stream, normed * (1 + scale) + shift


def chain(operands: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The published code's, op by op in the tensors' own dtypes."""
    x, y, gate, shift, scale, weight = operands
    stream = (x + gate * y).to(x.dtype)
    wide = stream.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).type_as(stream)
    return stream, ((normed * weight.type_as(stream)) * (1 + scale) + shift).to(dtype)


def error(output: Tensor, truth: Tensor) -> float:
    assert output.shape == truth.shape
    return float((output.double() - truth).norm() / truth.norm())


@DTYPES
@RESIDUALS
@pytest.mark.parametrize("per_token", [False, True], ids=["per sample", "per token"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_that_of_the_eager_chain(
    shape: tuple[int, int, int], per_token: bool, residual: torch.dtype, dtype: torch.dtype
) -> None:
    operands = draw(shape, dtype, residual, per_token=per_token)
    x, y, gate, shift, scale, weight = operands
    stream, out = residual_adaln(
        x, y, gate, shift, scale, weight, eps=EPS, dtype=dtype, kernels="triton"
    )
    assert (stream.dtype, out.dtype) == (residual, dtype)
    for result, eager, truth in zip(
        (stream, out), chain(operands, dtype), exact(operands), strict=True
    ):
        # In fp32 the order of a sum decides, on a GPU the reciprocal root.
        assert error(result, truth) <= max(1.05 * error(eager, truth), 4e-7)
    ends = last_adaln(x, y, gate, shift, scale, weight, eps=EPS, dtype=dtype, kernels="triton")
    assert ends.equal(out)
    assert gated_residual(x, y, gate, kernels="triton").equal(stream)


@pytest.mark.parametrize("dim", [384, 1152, 2048])
@pytest.mark.parametrize("rows", [255, 256, 257, 2048])
def test_many_rows(rows: int, dim: int) -> None:
    operands = draw((1, rows, dim), torch.bfloat16, torch.float32, per_token=True)
    x, y, gate, shift, scale, weight = operands
    # Blocks of 64 rows, as the interpreter takes 10 ms for each.
    stream, out = op.launch(
        x,
        y,
        gate,
        weight,
        shift,
        scale,
        EPS,
        "rms",
        True,
        torch.bfloat16,
        block_rows=64,
        num_warps=8,
    )
    truth = exact(operands)
    assert error(stream, truth[0]) <= 2e-7
    assert error(out, truth[1]) <= 1.05 * error(chain(operands, torch.bfloat16)[1], truth[1])


@DTYPES
@pytest.mark.parametrize("block_rows", [1, 2, 4])
def test_first_site_and_layer_norm_with_blocks_of_rows(dtype: torch.dtype, block_rows: int) -> None:
    operands = draw((2, 5, 213), dtype, torch.float32, per_token=False)
    x, _, _, shift, scale, _ = operands
    for norm in ("rms", "layer"):
        (out,) = op.launch(
            x,
            None,
            None,
            None,
            shift,
            scale,
            EPS,
            norm,
            False,
            dtype,
            block_rows=block_rows,
            num_warps=1,
        )
        still = (x, torch.zeros_like(x), *operands[2:5], torch.ones_like(operands[5]))
        _, truth = exact(still, norm)
        assert error(out, truth) <= (4e-7 if dtype == torch.float32 else 2e-3)


def test_operands_are_read_where_they_lie() -> None:
    operands = draw((2, 6, 96), torch.bfloat16, torch.float32, per_token=True)
    x, y, gate, shift, scale, weight = operands
    wide = torch.randn(2, 12, 200)
    wide[:, ::2, 100:196] = x
    results = [
        residual_adaln(
            view, y, gate, shift, scale, weight, eps=EPS, dtype=torch.bfloat16, kernels="triton"
        )
        for view in (x, wide[:, ::2, 100:196])
    ]
    assert results[0][0].equal(results[1][0]) and results[0][1].equal(results[1][1])
    assert results[1][0].is_contiguous()


@DTYPES
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_reference_is_exact(norm: str, dtype: torch.dtype) -> None:
    operands = draw((2, 5, 64), dtype, torch.float32, per_token=True)
    x, y, gate, shift, scale, weight = (operand.double() for operand in operands)
    weight = None if norm == "layer" else weight
    results = adaln_ref(x, y, gate, weight, shift, scale, EPS, norm, True, torch.float64)
    for result, truth in zip(results, exact(operands, norm), strict=True):
        assert error(result, truth) < 1e-14


@pytest.mark.parametrize("kernels", ["triton", "reference"])
@pytest.mark.parametrize("variant", ["first", "middle", "last", "no norm"])
def test_opcheck(variant: str, kernels: str) -> None:
    x, y, gate, shift, scale, weight = draw(
        (2, 3, 32), torch.bfloat16, torch.float32, per_token=False
    )
    after, modulated = (y, gate), (weight, shift, scale)
    arguments = {
        "first": (x, None, None, *modulated, EPS, "rms", False),
        "middle": (x, *after, *modulated, EPS, "rms", True),
        "last": (x, *after, *modulated, EPS, "rms", False),
        "no norm": (x, *after, None, None, None, EPS, "none", True),
    }[variant]
    with torch.inference_mode(False):
        torch.library.opcheck(
            _adaln,
            tuple(
                a.clone() if isinstance(a, Tensor) and a.is_contiguous() else a for a in arguments
            )
            + (torch.bfloat16, kernels),
        )


def test_compiled_is_eager() -> None:
    x, y, gate, shift, scale, weight = draw(
        (2, 3, 32), torch.bfloat16, torch.float32, per_token=False
    )

    def site(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        stream, out = residual_adaln(
            x, y, gate, shift, scale, weight, eps=EPS, dtype=torch.bfloat16, kernels="triton"
        )
        return stream + out

    compiled = torch.compile(site, fullgraph=True)
    assert compiled(x, y, gate, shift, scale).equal(site(x, y, gate, shift, scale))


def test_wrong_operands_are_named() -> None:
    x, y, gate, shift, scale, weight = draw(
        (2, 3, 32), torch.float32, torch.float32, per_token=False
    )

    def call(**changed: Tensor | str) -> None:
        values = {"x": x, "y": y, "gate": gate, "shift": shift, "scale": scale, "weight": weight}
        residual_adaln(**{**values, **changed}, eps=EPS, dtype=torch.float32)

    wrong: list[tuple[dict[str, Tensor | str], str]] = [
        ({"x": x[0]}, r"x \(3, 32\) is not \(B, N, D\)"),
        ({"y": y[:1]}, r"y \(1, 3, 32\) for x \(2, 3, 32\)"),
        ({"y": y[:, :1]}, r"y \(2, 1, 32\)"),
        ({"gate": gate[:1]}, r"gate \(1, 1, 32\)"),
        ({"x": x.half()}, "x is torch.float16"),
        ({"x": x.mT.contiguous().mT}, "last dimension of x"),
        ({"scale": scale.contiguous()}, "strides of shift"),
        ({"weight": weight[:31]}, r"weight \(31,\)"),
        ({"norm": "batch"}, "norm 'batch' is not one of rms, layer, none"),
    ]
    for changed, message in wrong:
        with pytest.raises(ValueError, match=message):
            call(**changed)

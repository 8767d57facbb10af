"""Layers whose rows and elements do not depend on their neighbours."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rae.models.layers import Linear, RMSNorm, gelu, silu

WIDTHS = [1, 5, 31, 96, 1000, 70_001]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_activations_do_not_depend_on_position(threads: int) -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * 3
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            for function in (silu, gelu, lambda v: gelu(v, "tanh")):
                whole = function(x)
                for width in WIDTHS:
                    part = x[137 : 137 + width].clone()
                    assert torch.equal(function(part), whole[137 : 137 + width])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_torchs(dtype: torch.dtype) -> None:
    x = torch.linspace(-120, 120, 10_001).to(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 0.01
    with torch.no_grad():
        for ours, theirs in (
            (silu(x), F.silu(x)),
            (gelu(x), F.gelu(x)),
            (gelu(x, "tanh"), F.gelu(x, approximate="tanh")),
        ):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), [(96, 96), (96, 576), (512, 192), (128, 341)])
def test_linear_rows_do_not_depend_on_their_number(
    dtype: torch.dtype, inputs: int, outputs: int
) -> None:
    torch.manual_seed(0)
    layer = Linear(inputs, outputs).to(dtype)
    x = torch.randn(64, inputs, dtype=dtype)
    with torch.no_grad():
        alone = torch.cat([layer(row[None]) for row in x])
        for rows in (1, 2, 3, 5, 11, 12, 16, 17, 33, 64):
            assert torch.equal(layer(x[:rows]), alone[:rows]), rows
        assert layer(x[:6].view(2, 3, inputs)).shape == (2, 3, outputs)


def test_rms_norm_casts_before_the_weight() -> None:
    norm = RMSNorm(8)
    norm.weight.data.fill_(1.001)
    x = torch.arange(1, 9).bfloat16()[None]
    expected = (x.float() / x.float().square().mean().sqrt()).bfloat16() * torch.full((8,), 1.001)
    out = norm(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=0)

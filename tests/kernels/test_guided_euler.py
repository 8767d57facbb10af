"""Guidance and Euler update on the slots, against `guided_velocity`'s arithmetic in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rae.kernels.guided_euler import _guided_euler, guided_euler, guided_euler_ref

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# An element count that no block divides, over several blocks, and a small one.
SHAPES = [(5, 31, 33), (3, 2, 2)]
NO_SLOT = -1


def draw(dtype: torch.dtype, shape: tuple[int, ...] = SHAPES[0]) -> dict[str, Tensor]:
    """Four rows of seven slots: no guidance, CFG, AutoGuidance, and one that only pads."""
    return {
        "latents": torch.randn(7, *shape),
        "slots": torch.tensor([6, 0, 3, NO_SLOT]),
        "dt": torch.tensor([-0.1, -0.02, -0.003, -0.5]),
        "velocity": torch.randn(5, *shape).to(dtype),
        "weak_rows": torch.tensor([-1, 4, 6, -1]),
        "scales": torch.tensor([float("nan"), 1.5, 4.0, 1.0]),
        "guide_velocity": torch.randn(2, *shape).to(dtype),
    }


def expected(rows: dict[str, Tensor]) -> Tensor:
    """What slots hold afterwards, row by row in fp64."""
    latents = rows["latents"].double()
    velocity, guide = rows["velocity"].double(), rows["guide_velocity"].double()
    latents[6] += -0.1 * velocity[0]
    latents[0] += -0.02 * (velocity[4] + 1.5 * (velocity[1] - velocity[4]))
    latents[3] += -0.003 * (guide[1] + 4.0 * (velocity[2] - guide[1]))
    return latents


@DTYPES
@pytest.mark.parametrize("kernels", ["triton", "reference"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_paired_and_slots_updated(
    shape: tuple[int, ...], kernels: str, dtype: torch.dtype
) -> None:
    rows = draw(dtype, shape)
    truth = expected(rows)
    untouched = rows["latents"][[1, 2, 4, 5]].clone()
    guided_euler(**rows, kernels=kernels)
    assert float((rows["latents"].double() - truth).norm() / truth.norm()) < 1e-7
    assert rows["latents"][[1, 2, 4, 5]].equal(untouched)


def test_kernel_and_reference_agree_without_a_guide() -> None:
    rows = draw(torch.bfloat16) | {"weak_rows": torch.tensor([-1, 4, 3, -1])}
    del rows["guide_velocity"]
    other = rows | {"latents": rows["latents"].clone()}
    guided_euler(**rows, kernels="triton")
    guided_euler_ref(**other, guide_velocity=None)
    assert torch.allclose(rows["latents"], other["latents"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_opcheck(kernels: str) -> None:
    rows = draw(torch.bfloat16, (3, 2, 2)) | {"scales": torch.ones(4)}
    with torch.inference_mode(False):
        torch.library.opcheck(_guided_euler, (*(r.clone() for r in rows.values()), kernels))


def test_compiled_is_eager() -> None:
    rows, other = draw(torch.float32), draw(torch.float32)
    other = {name: rows[name].clone() for name in other}

    def step(rows: dict[str, Tensor]) -> Tensor:
        guided_euler(**rows, kernels="triton")
        return rows["latents"] * 2

    assert torch.compile(step, fullgraph=True)(rows).equal(step(other))
    assert rows["latents"].equal(other["latents"])


def test_no_row_is_no_step() -> None:
    rows = draw(torch.float32)
    before = rows["latents"].clone()
    none = {name: rows[name][:0] for name in ("slots", "dt", "weak_rows", "scales")}
    guided_euler(**rows | none, kernels="triton")
    assert rows["latents"].equal(before)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("latents", lambda x: x.bfloat16(), "latents are torch.bfloat16"),
        ("latents", lambda x: x.mT, "latents .* is not contiguous"),
        ("slots", lambda x: x.int(), "slots is torch.int32"),
        ("dt", lambda x: x[:2], r"dt is torch.float32 \(2,\)"),
        ("scales", lambda x: x.double(), "scales is torch.float64"),
        ("velocity", lambda x: x[:3], "velocity has 3 rows for 4 slots"),
        ("velocity", lambda x: x[:, :2].contiguous(), r"velocity \(5, 2, 31, 33\) for latents"),
        ("guide_velocity", lambda x: x.bfloat16(), "guide_velocity is torch.bfloat16"),
    ],
)
def test_wrong_operands_are_named(
    name: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    rows = draw(torch.float32)
    rows[name] = change(rows[name])
    with pytest.raises(ValueError, match=message):
        guided_euler(**rows, kernels="triton")

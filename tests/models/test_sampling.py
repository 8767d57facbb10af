"""The sampler's own arithmetic; that it is the published one is tests/benchmarks' to show."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rae.models.config import CONFIGS
from rae.models.guidance import Guidance
from rae.models.sampling import (
    default_shift,
    denoise,
    draw_noise,
    guided_velocity,
    timesteps,
    to_uint8,
)


def test_the_published_grid() -> None:
    shift = default_shift(CONFIGS["DiTDH-XL-256"].latent_shape)
    grid = timesteps(50, shift)
    assert shift == pytest.approx(6.92820, abs=1e-5)
    assert default_shift(CONFIGS["DiTDH-XL-512"].latent_shape) == pytest.approx(13.85641, abs=1e-5)
    assert default_shift((4, 8, 8)) == 1.0
    assert len(grid) == 50 and grid.dtype == torch.float32
    expected = torch.tensor([1, 0.99701, 0.99390])
    torch.testing.assert_close(grid[:3], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(grid[-1].item(), 0.00689, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_steps", [1, 0, -3])
def test_a_grid_has_two_points(num_steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_steps {num_steps}"):
        timesteps(num_steps, 1.0)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan, math.inf])
def test_a_shift_is_positive(shift: float) -> None:
    with pytest.raises(ValueError, match=f"shift {shift}"):
        timesteps(3, shift)


def test_solvers_integrate_an_exponential_to_their_order() -> None:
    """dx/dt = x from t = 1 to 0 is exp(−1)·x: halving the step divides the error by 2 or 4."""

    def model(latents: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        return latents

    noise, labels = torch.ones(1, 1, 1, 1, dtype=torch.float32), torch.zeros(1, dtype=torch.int64)
    errors = {}
    for solver in ("euler", "heun2", "midpoint"):
        for points in (11, 21):
            end = denoise(model, noise, labels, torch.linspace(1, 0, points), solver=solver)
            errors[solver, points] = abs(end.item() - math.exp(-1))
    for solver, factor in (("euler", 2), ("heun2", 4), ("midpoint", 4)):
        assert errors[solver, 11] / errors[solver, 21] == pytest.approx(factor, rel=0.1)
    with pytest.raises(ValueError, match="solver 'rk4'; known: euler, heun2, midpoint"):
        denoise(model, noise, labels, torch.linspace(1, 0, 3), solver="rk4")  # type: ignore[arg-type]


def test_guidance_is_closed_at_both_ends_in_fp32() -> None:
    guidance = Guidance(2.0, (0.3, 0.7))
    third = torch.tensor(0.3)
    t = torch.stack([third, torch.nextafter(third, torch.tensor(0.0)), torch.tensor(0.7)])
    assert guidance.active(t).tolist() == [True, False, True]
    assert not Guidance(1.0).active(t).any()


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_guidance_scale_is_finite(scale: float) -> None:
    with pytest.raises(ValueError, match="is not finite"):
        Guidance(scale)


@pytest.mark.parametrize("interval", [(0.5, 0.4), (-0.1, 1.0), (0.0, 1.1), (math.nan, 1.0)])
def test_a_guidance_interval_is_ordered(interval: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="guidance interval"):
        Guidance(2.0, interval)


def test_guidance_evaluates_only_rows_inside_and_says_what_is_missing() -> None:
    seen: list[list[float]] = []

    def model(latents: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        seen.append(t.tolist())
        return latents * (class_labels.view(-1, 1, 1, 1) + 1.0)

    x, t, labels = (
        torch.ones(3, 1, 1, 1),
        torch.tensor([0.125, 0.5, 0.875]),
        torch.tensor([1, 2, 3]),
    )
    guidance = Guidance(3.0, (0.25, 0.75))
    velocity = guided_velocity(model, x, t, labels, guidance, null_label=4)
    assert seen == [[0.125, 0.5, 0.875], [0.5]]
    assert velocity.flatten().tolist() == [2.0, 5 + 3 * (3 - 5), 4.0]
    with pytest.raises(ValueError, match="needs a model trained with a null label"):
        guided_velocity(model, x, t, labels, guidance)
    with pytest.raises(ValueError, match="needs a guide model"):
        guided_velocity(model, x, t, labels, Guidance(3.0, method="autoguidance"))


def test_noise_depends_on_its_seed_alone() -> None:
    one, two = draw_noise((2, 3, 3), [11]), draw_noise((2, 3, 3), [10, 11])
    assert torch.equal(one[0], two[1]) and not torch.equal(two[0], two[1])


def test_seeds_that_share_32_bits_have_noise_of_their_own() -> None:
    seeds = [5, 5 + 2**32, 5 + 2**33, 2**53 - 1]
    noise = draw_noise((64, 8, 8), seeds).flatten(1)
    assert noise.dtype == torch.float32
    torch.testing.assert_close(noise.std(1), torch.ones(4), rtol=0, atol=0.05)
    correlations = torch.corrcoef(noise) - torch.eye(4)
    assert correlations.abs().max() < 0.1


def test_uint8_rounds_or_truncates() -> None:
    images = torch.tensor([-0.2, 0.0, 0.5, 254.6 / 255, 1.0, 3.0])
    assert to_uint8(images).tolist() == [0, 0, 128, 255, 255, 255]
    assert to_uint8(images, truncate=True).tolist() == [0, 0, 127, 254, 255, 255]

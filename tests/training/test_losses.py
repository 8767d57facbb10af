"""Times and the velocity loss, against the paper's figures and a sum done by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rae.training.stage2.losses import (
    interpolate,
    logit_normal_quantile,
    sample_times,
    velocity_loss,
)


def test_quantiles_are_those_of_a_truncated_normal_through_a_sigmoid() -> None:
    tau = logit_normal_quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64))
    expected = [0.0, 0.33749, 0.5, 0.66251, 0.999]  # sigmoid(-0.67449) and so on
    assert tau.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("shift", "mean", "median"), [(1.0, 0.5, 0.5), (6.9282, 0.837, 0.874)])
def test_times_have_the_published_mean_and_median(shift: float, mean: float, median: float) -> None:
    t = sample_times(200_000, shift, torch.Generator().manual_seed(0))
    assert t.mean().item() == pytest.approx(mean, abs=2e-3)
    assert t.median().item() == pytest.approx(median, abs=2e-3)
    assert 0 <= t.min() and t.max() < 1


def test_loss_is_the_mean_square_per_sample() -> None:
    latents = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    noise = torch.tensor([4.0, 0.0]).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    t, labels = torch.tensor([0.25, 0.5]), torch.tensor([0, 1])

    def model(noised: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        return noised + class_labels.view(-1, 1, 1, 1)

    assert interpolate(latents, noise, t)[:, 0, 0, 0].tolist() == [1.75, 1.0]
    # (1.75 + 0 − 3)² and (1 + 1 + 2)²
    assert velocity_loss(model, latents, noise, t, labels).tolist() == [1.5625, 16.0]


def test_a_perfect_model_has_no_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 5, 3, 2, 2, generator=generator).unbind()
    t = sample_times(5, 2.0, generator)
    loss = velocity_loss(lambda *_: noise - latents, latents, noise, t, torch.zeros(5).long())
    assert loss.max().item() == 0 and math.isfinite(loss.sum().item())

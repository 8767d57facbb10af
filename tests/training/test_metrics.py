"""Scores and similarities against values made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rae.training.metrics import inception_score, precision_recall, psnr_db, ssim


def test_inception_score_of_certain_predictions_is_the_number_of_classes() -> None:
    # 8 classes in each of the 10 splits, whatever the order: each split of 800 holds all.
    labels = torch.arange(8).repeat_interleave(1000)
    logits = 100 * torch.nn.functional.one_hot(labels, 20).float()
    score, deviation = inception_score(logits)
    assert score == pytest.approx(8, rel=5e-3) and deviation < 0.05


def test_inception_score_of_equal_predictions_is_1() -> None:
    score, deviation = inception_score(torch.randn(1, 20).expand(50, 20))
    assert score == pytest.approx(1) and deviation == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="9 images cannot be split into 10"):
        inception_score(torch.zeros(9, 20))


def cluster(x: float, num: int = 40, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 3, generator=generator) * 0.1 + torch.tensor([x, 0, 0])


def test_precision_and_recall_of_clusters() -> None:
    real = torch.cat([cluster(0), cluster(10)])
    assert precision_recall(real, real) == (1, 1)
    # All that is generated lies within a real cluster, the other of which is missed.
    assert precision_recall(cluster(0), real) == (1, 0.5)
    # Of three clusters one is nowhere in the real ones; all of the real ones are met.
    precision, recall = precision_recall(torch.cat([real, cluster(20)]), real)
    assert precision == pytest.approx(2 / 3) and recall == 1
    with pytest.raises(ValueError, match="3 images have no neighbours number 3"):
        precision_recall(real[:3], real)


def test_precision_and_recall_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = torch.randn(2, 60, 4, generator=torch.Generator().manual_seed(0)).unbind()
    second = second[:40] * 0.7
    # Within the third neighbour's distance, by hand.
    radii = torch.cdist(second, second).sort(1).values[:, 3]
    expected = (torch.cdist(first, second) <= radii).any(1).float().mean().item()
    whole = precision_recall(first, second)
    assert whole[0] == pytest.approx(expected) and 0.2 < expected < 0.9
    monkeypatch.setattr("rae.training.metrics.DISTANCES", 60 * 7)
    assert precision_recall(first, second) == pytest.approx(whole)


def test_psnr_by_hand() -> None:
    image = torch.full((2, 3, 4, 4), 0.5)
    other = image.clone()
    other[0] += 0.1
    torch.testing.assert_close(psnr_db(other, image), torch.tensor([20.0, 100.0]).double())


def ssim_by_hand(first: np.ndarray, second: np.ndarray) -> float:
    """Wang et al.'s equation 13 on one channel, around every pixel."""
    first, second = np.pad(first, 5, mode="reflect"), np.pad(second, 5, mode="reflect")
    offsets = np.arange(11) - 5
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    values = []
    for y in range(first.shape[0] - 10):
        for x in range(first.shape[1] - 10):
            a, b = (image[y : y + 11, x : x + 11] for image in (first, second))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            both = (window * (a - mean_a) * (b - mean_b)).sum()
            c1, c2 = 0.01**2, 0.03**2
            values.append(
                (2 * mean_a * mean_b + c1)
                * (2 * both + c2)
                / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
            )
    return math.fsum(values) / len(values)


def test_ssim_by_hand() -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    noisy = (
        images + 0.2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    ).clamp(0, 1)
    expected = [
        np.mean([ssim_by_hand(*map(np.asarray, pair)) for pair in zip(a, b, strict=True)])
        for a, b in zip(noisy.double(), images.double(), strict=True)
    ]
    np.testing.assert_allclose(ssim(noisy, images), expected, atol=1e-4)
    torch.testing.assert_close(ssim(images, images), torch.ones(2))
    with pytest.raises(ValueError, match="8 × 8 px are smaller than SSIM's window of 11"):
        ssim(images[..., :8, :8], images[..., :8, :8])

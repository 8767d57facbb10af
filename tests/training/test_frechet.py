"""Fréchet distances against closed forms and SciPy; moments against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from rae.training.evaluation.frechet import Gaussian, Moments, frechet_distance


def features(num: int, dim: int, seed: int) -> Tensor:
    """Correlated, with means far from 0."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    values = torch.randn(num, dim, generator=generator, dtype=torch.float64)
    return values @ mixing + 1000


def moments(*batches: Tensor) -> Moments:
    result = Moments(batches[0].shape[1])
    for batch in batches:
        result.add(batch)
    return result


@pytest.mark.parametrize("sizes", [[50], [1, 48, 1], [7] * 7 + [1], [0, 50]])
def test_streamed_moments_are_those_of_all(sizes: list[int]) -> None:
    values = features(50, 6, 0)
    gaussian = moments(*values.split(sizes)).gaussian()
    np.testing.assert_allclose(gaussian.mean, values.mean(0), rtol=1e-14)
    np.testing.assert_allclose(gaussian.covariance, np.cov(values.T), rtol=1e-9)
    assert gaussian.count == 50


def test_gaussians_with_commuting_covariances() -> None:
    first = Gaussian(torch.tensor([1.0, 2.0, 3.0]), torch.diag(torch.tensor([4.0, 9.0, 0.0])))
    second = Gaussian(torch.tensor([1.0, 0.0, 3.0]), torch.diag(torch.tensor([1.0, 25.0, 4.0])))
    # 2² of the means; (2 − 1)² + (3 − 5)² + (0 − 2)² of the deviations
    assert frechet_distance(first, second) == pytest.approx(4 + 1 + 4 + 4, rel=1e-6)


def test_frechet_distance_is_scipys() -> None:
    first, second = (moments(features(200, 12, seed)).gaussian() for seed in (2, 3))
    product = scipy.linalg.sqrtm((first.covariance @ second.covariance).numpy())
    expected = (first.mean - second.mean).square().sum() + (
        first.covariance.trace() + second.covariance.trace() - 2 * np.trace(product).real
    )
    assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first))


def test_equal_sets_have_no_distance_even_with_a_singular_covariance() -> None:
    few = moments(features(5, 40, 4)).gaussian()
    assert frechet_distance(few, few) < 1e-9 * few.covariance.trace()


def test_what_has_no_distance_is_refused() -> None:
    with pytest.raises(ValueError, match="1 images have no covariance"):
        moments(torch.ones(1, 3)).gaussian()
    with pytest.raises(ValueError, match="3 and of 4 dimensions"):
        frechet_distance(*(moments(features(9, dim, 0)).gaussian() for dim in (3, 4)))
    with pytest.raises(ValueError, match=r"\(3,\) and a covariance \(2, 3\)"):
        Gaussian(torch.zeros(3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="not finite"):
        moments(torch.tensor([[1.0], [torch.nan]])).gaussian()

"""Means and covariances of a stream of features, and the Fréchet distance between two of them.

Source: arXiv 1706.08500, equation 6.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """`mean` (D,) and `covariance` (D, D), float64; of `count` features, where that is known."""

    mean: Tensor
    covariance: Tensor
    count: int | None = None

    def __post_init__(self) -> None:
        dim = len(self.mean) if self.mean.ndim == 1 else None
        if self.covariance.shape != (dim, dim):
            raise ValueError(
                f"a mean {tuple(self.mean.shape)} and a covariance "
                f"{tuple(self.covariance.shape)}: (D,) and (D, D) are wanted"
            )
        if not (self.mean.isfinite().all() and self.covariance.isfinite().all()):
            raise ValueError("a mean or a covariance has values that are not finite")

    @property
    def dim(self) -> int:
        return len(self.mean)


class Moments:
    """Exact mean and scatter of features that come in batches, in float64, merged as by Chan et al.

    The scatter is the sum of squared deviations from the mean: no large numbers cancel.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, features: Tensor) -> None:
        """Features (B, D) of any floating dtype."""
        if len(features) == 0:
            return
        features = features.double()
        mean = features.mean(0)
        centred = features - mean
        total = self.count + len(features)
        shift = mean - self.mean
        self.scatter += centred.T @ centred
        self.scatter += torch.outer(shift, shift) * (self.count * len(features) / total)
        self.mean += shift * (len(features) / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """With the unbiased covariance. Raises ValueError for fewer than two features."""
        if self.count < 2:
            raise ValueError(f"{self.count} images have no covariance: at least 2 are needed")
        return Gaussian(self.mean.cpu(), (self.scatter / (self.count - 1)).cpu(), self.count)


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|m₁ − m₂|² + Tr(S₁ + S₂ − 2 (S₁ S₂)^½), never below 0.

    The trace of the root is the sum of the singular values of S₁^½ S₂^½. Unlike the root of the
    product, which is not symmetric, it is real, and exact where a covariance is singular.
    Raises ValueError for features of other dimensions.
    """
    if first.dim != second.dim:
        raise ValueError(f"features of {first.dim} and of {second.dim} dimensions: no distance")
    product = root(first.covariance) @ root(second.covariance)
    overlap = torch.linalg.svdvals(product).sum()
    spread = first.covariance.trace() + second.covariance.trace() - 2 * overlap
    return max(0.0, ((first.mean - second.mean).square().sum() + spread).item())


def root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a positive semi-definite matrix (D, D)."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T

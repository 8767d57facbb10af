"""What a network makes of a stream of images: statistics of all, features of some."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rae.training.console import Advance
from rae.training.evaluation.feature_networks import FeatureNetwork, ImageFeatures
from rae.training.evaluation.frechet import Gaussian, Moments
from rae.training.evaluation.image_sources import Images


@dataclass(frozen=True)
class MeasuredImages:
    """Statistics of all images; `features` (M, D) float32 of all or of some, evenly chosen."""

    pooled: Gaussian
    spatial: Gaussian | None
    features: Tensor | None
    logits: Tensor | None = None
    note: str | None = None


class Collector:
    """Gathers what a network makes of images that come in batches."""

    def __init__(self, network: FeatureNetwork, device: torch.device) -> None:
        self.pooled = Moments(network.dim, device)
        self.spatial = Moments(network.spatial_dim, device) if network.spatial_dim else None
        self._features: list[Tensor] = []
        self._logits: list[Tensor] = []

    def add(self, features: ImageFeatures, kept: np.ndarray) -> None:
        """`kept` are the rows whose features stay."""
        self.pooled.add(features.pooled)
        if self.spatial is not None and features.spatial is not None:
            self.spatial.add(features.spatial)
        rows = torch.from_numpy(kept)
        self._features.append(features.pooled.cpu()[rows])
        if features.logits is not None:
            self._logits.append(features.logits.cpu()[rows])

    def measured(self) -> MeasuredImages:
        """Raises ValueError for fewer than two images, and values that are not finite."""
        return MeasuredImages(
            self.pooled.gaussian(),
            self.spatial.gaussian() if self.spatial else None,
            torch.cat(self._features),
            torch.cat(self._logits) if self._logits else None,
        )


def measure(
    images: Images,
    network: FeatureNetwork,
    *,
    device: torch.device,
    batch: int,
    advance: Advance,
    max_features: int | None = None,
    seen: Callable[[np.ndarray], object] | None = None,
) -> MeasuredImages:
    """Run all images through a network on `device`, and keep the features of `max_features`.

    `seen` is shown those images (B, H, W, 3) whose features are kept.
    """
    collector = Collector(network, device)
    chosen = evenly(images.num, max_features)
    first = 0
    with torch.inference_mode(), exact_convolutions():
        for pixels in images.batches(batch):
            rows = chosen[(chosen >= first) & (chosen < first + len(pixels))] - first
            if seen is not None:
                seen(pixels[rows])
            collector.add(network(channels_first(pixels, device)), rows)
            first += len(pixels)
            advance(len(pixels))
    return collector.measured()


def evenly(num: int, most: int | None) -> np.ndarray:
    """The indices of up to `most` of `num` images, at even distances."""
    count = num if most is None else min(num, most)
    return np.arange(count) * num // max(count, 1)


def channels_first(pixels: np.ndarray, device: torch.device) -> Tensor:
    """Images (B, H, W, 3) uint8 as (B, 3, H, W) uint8 on a device."""
    return torch.tensor(pixels, device=device).permute(0, 3, 1, 2)


def exact_convolutions() -> AbstractContextManager[None]:
    """cuDNN would round the inputs of fp32 convolutions to TF32's 10 bits."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)

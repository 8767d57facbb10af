"""DiffAugment's translation and colour, which gradients pass (Zhao et al., arXiv 2006.10738)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_MOVE = 0.125  # of a side
NUM_DRAWS = 5


def draw_augmentation(generators: Iterable[torch.Generator]) -> Tensor:
    """One row of uniform numbers in [0, 1) from each CPU generator: (B, 5)."""
    return torch.stack([torch.rand(NUM_DRAWS, generator=one) for one in generators])


def diff_augment(images: Tensor, draws: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [−1, 1], moved within gray and recoloured.

    A row of `draws` (B, 5) is the move down and right, brightness, saturation and contrast, as
    github bytetriper/RAE, `src/disc/diffaug.py`, takes them from its first five rows of numbers.
    """
    images = translate(images.float(), draws[:, :2])
    return recolour(images, draws[:, 2:].to(images.device))


def translate(images: Tensor, draws: Tensor) -> Tensor:
    """By up to an eighth of a side, whole pixels; what moves in is 0. Draws (B, 2)."""
    height, width = images.shape[-2:]
    limits = [round(side * MAX_MOVE) for side in (height, width)]
    # In fp32 a draw just below 1 could round up to one pixel too many.
    sizes = torch.tensor([2 * limit + 1 for limit in limits], dtype=torch.float64)
    corners = (draws.double().cpu() * sizes).floor().long().tolist()
    padded = F.pad(images, [limits[1], limits[1], limits[0], limits[0]])
    return torch.stack(
        [
            image[:, top : top + height, left : left + width]
            for image, (top, left) in zip(padded.unbind(), corners, strict=True)
        ]
    )


def recolour(images: Tensor, draws: Tensor) -> Tensor:
    """Brightness ± .5, then saturation and contrast times 0 to 2 and .5 to 1.5. Draws (B, 3)."""
    brightness, saturation, contrast = draws.view(-1, 3, 1, 1, 1).unbind(1)
    images = images + (brightness - 0.5)
    gray = images.mean(1, keepdim=True)
    images = gray + (images - gray) * (2 * saturation)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (contrast + 0.5)

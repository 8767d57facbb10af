"""Pictures of many samples."""

from __future__ import annotations

import math
from pathlib import Path

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from rae.models.sampling import to_uint8


def make_grid(images: Tensor, columns: int | None = None, scale: int = 1) -> Image.Image:
    """Images (N, 3, H, W) in [0, 1] as one, `columns` a row (about as many as rows where None),
    each pixel enlarged to scale × scale. Raises ValueError for no images."""
    if not len(images):
        raise ValueError("a grid of no images")
    columns = columns or math.ceil(math.sqrt(len(images)))
    missing = -len(images) % columns
    images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, missing))
    rows = to_uint8(images).unflatten(0, (-1, columns))  # (rows, columns, 3, H, W)
    sheet = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    sheet = sheet.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    return Image.fromarray(sheet.cpu().numpy())


def save_grid(
    images: Tensor,
    columns: int | None,
    path: Path,
    scale: int = 1,
    num_colours: int | None = None,
) -> None:
    """Write `make_grid` as PNG, its colours reduced where `num_colours` says to how many."""
    grid = make_grid(images, columns, scale)
    if num_colours is not None:
        grid = grid.quantize(num_colours)
    grid.save(path, format="PNG", optimize=num_colours is not None)

"""scikit-learn's handwritten digits: the split, the 32×32 pictures, and the way back to 8×8.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, CC BY 4.0.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from rae.models.sampling import to_uint8
from rae.training.draws import generator

CLASS_NAMES = (
    *("zero", "one", "two", "three", "four"),
    *("five", "six", "seven", "eight", "nine"),
)
IMAGE_SIZE = 32
SCAN_SIZE = 8
SCAN_MAX = 16
NUM_TRAIN = 1500
SPLIT_SEED = 0
MADE_FILE = "made"

# Twice as much of each makes the classifier of `digits_judge.py` read 95.5 % of the real digits,
# not 98.1: what is moved too far bounds what a model of it can reach.
MAX_TURN = math.radians(4)
MAX_ZOOM = 0.04
MAX_MOVE = 0.05  # of half a picture


@dataclass(frozen=True)
class Digits:
    """Scans (N, 8, 8) in [0, 1] and their labels (N,)."""

    scans: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def split_digits() -> tuple[Digits, Digits]:
    """The 1,500 training scans and the 297 held out: always the same."""
    bunch = load_digits()
    scans = torch.tensor(bunch.images, dtype=torch.float32) / SCAN_MAX  # type: ignore[union-attr]
    labels = torch.tensor(bunch.target)  # type: ignore[union-attr]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    train, held_out = order[:NUM_TRAIN], order[NUM_TRAIN:]
    return Digits(scans[train], labels[train]), Digits(scans[held_out], labels[held_out])


def render(scans: Tensor, transforms: Tensor | None = None) -> Tensor:
    """Pictures (N, 3, 32, 32) in [0, 1] of scans (N, 8, 8), bicubic, black around the scan.

    `transforms` (N, 2, 3) are affine, in the coordinates of `F.affine_grid`.
    """
    if transforms is None:
        transforms = torch.eye(2, 3).expand(len(scans), 2, 3)
    size = [len(scans), 1, IMAGE_SIZE, IMAGE_SIZE]
    grid = F.affine_grid(transforms, size, align_corners=False)
    pictures = F.grid_sample(scans[:, None], grid, mode="bicubic", align_corners=False)
    return pictures.clamp(0, 1).expand(-1, 3, -1, -1)


def random_transforms(num: int, generator: torch.Generator) -> Tensor:
    """Small turns, zooms (both axes on their own) and moves: (num, 2, 3)."""
    turn, zoom_x, zoom_y, x, y = (2 * torch.rand(5, num, generator=generator) - 1).unbind()
    cos, sin = torch.cos(MAX_TURN * turn), torch.sin(MAX_TURN * turn)
    zoom_x, zoom_y = torch.exp(MAX_ZOOM * zoom_x), torch.exp(MAX_ZOOM * zoom_y)
    rows = [zoom_x * cos, -zoom_y * sin, MAX_MOVE * x, zoom_x * sin, zoom_y * cos, MAX_MOVE * y]
    return torch.stack(rows, dim=-1).view(num, 2, 3)


def to_scans(images: Tensor) -> Tensor:
    """Pictures (N, 3, 32, 32) in [0, 1] to the scans' space (N, 64), 0 to 16: the mean of RGB,
    then of 4×4 pixels."""
    gray = images.mean(1, keepdim=True)
    return SCAN_MAX * F.avg_pool2d(gray, IMAGE_SIZE // SCAN_SIZE).flatten(1)


def write_digits(folder: Path, copies: int, seed: int) -> None:
    """The training scans as a data set: FOLDER/<label>/<scan>-<copy>.png, 32×32; copy 0 is the
    scan as it is, the `copies` others are moved and turned. A whole folder is left as it is, one of
    other copies or another seed replaced. Raises ValueError for any other."""
    made, partial = f"{copies} copies, seed {seed}\n", folder.with_suffix(".partial")
    if folder.exists():
        if not (folder / MADE_FILE).exists():
            raise ValueError(f"{folder} was not made here: remove it, or take a new folder")
        if (folder / MADE_FILE).read_text() == made:
            return
        shutil.rmtree(folder)
    if partial.exists():
        shutil.rmtree(partial)
    digits, _ = split_digits()
    for copy in range(copies + 1):
        moved = random_transforms(len(digits), generator("cpu", seed, copy)) if copy else None
        pictures = to_uint8(render(digits.scans, moved)).permute(0, 2, 3, 1).numpy()
        for scan, (picture, label) in enumerate(zip(pictures, digits.labels.tolist(), strict=True)):
            path = partial / f"{label}-{CLASS_NAMES[label]}" / f"{scan:04}-{copy:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path, compress_level=1)
    (partial / MADE_FILE).write_text(made)
    partial.replace(folder)

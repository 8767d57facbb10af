"""Pictures of a data set to images of one size: the crops of stage 1 and of stage 2.

What is random follows from the seed and the sample's position in the stream.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rae.models.reconstruct import center_crop, require_moderate, to_rgb
from rae.training.draws import mix

# Purposes of draws, beside those of the tasks.
FLIP, CROP_LEFT, CROP_TOP = 101, 102, 103


class UnreadableError(ValueError):
    """A sample that cannot be read, and why."""


class Transform(Protocol):
    """Image files to uint8 images (3, size, size)."""

    @property
    def size(self) -> int: ...

    def __call__(self, picture: Image.Image, seed: int, position: int) -> Tensor: ...


def decode(data: bytes, size: int) -> Image.Image:
    """An image file as 8-bit RGB, as torchvision loads it: not turned as its EXIF says.

    `size` is what its short side will become. Raises UnreadableError.

    JPEGs are decoded in full: the scaled decoding that Pillow calls draft, which is 6 times as
    fast at 12 megapixels, changes the crop by up to 6 of 255, 0.8 in the mean.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, of what is odd about a readable file
            with Image.open(io.BytesIO(data)) as image:
                require_moderate(image.size, size)
                return to_rgb(image)
    except Image.UnidentifiedImageError as error:
        raise UnreadableError("not an image that Pillow reads") from error
    except Exception as error:  # Pillow's readers raise what a damaged file makes them
        raise UnreadableError(" ".join(f"{type(error).__name__}: {error}".split())) from error


def is_flipped(seed: int, position: int) -> bool:
    return mix(seed, position, FLIP) % 2 == 1


@dataclass(frozen=True)
class CenterCrop:
    """ADM's crop, and with `flip` every second image mirrored: stage 2, and without evaluation."""

    size: int
    flip: bool = False

    def __call__(self, picture: Image.Image, seed: int, position: int) -> Tensor:
        picture = center_crop(picture, self.size)
        if self.flip and is_flipped(seed, position):
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_tensor(picture)


@dataclass(frozen=True)
class RandomCrop:
    """Stage 1: the short side bicubically to 1.5 × `size`, and any square of `size` out of it."""

    size: int

    def __call__(self, picture: Image.Image, seed: int, position: int) -> Tensor:
        short = self.size * 3 // 2
        # torchvision's Resize cuts the long side's fraction off.
        width, height = (short * side // min(picture.size) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        left = mix(seed, position, CROP_LEFT) % (width - self.size + 1)
        top = mix(seed, position, CROP_TOP) % (height - self.size + 1)
        return to_tensor(picture.crop((left, top, left + self.size, top + self.size)))


def to_tensor(picture: Image.Image) -> Tensor:
    """uint8 (3, H, W)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()

"""The crops against guided-diffusion's and torchvision's arithmetic."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, Resize

from rae.training.data.transforms import CenterCrop, RandomCrop, UnreadableError, decode


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def file_of(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def adm_crop(image: Image.Image, size: int) -> np.ndarray:
    """guided-diffusion's `center_crop_arr`, step by step."""
    width, height = image.size
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        image = image.resize((width, height), resample=Image.Resampling.BOX)
    scale = size / min(width, height)
    image = image.resize(
        (round(width * scale), round(height * scale)), resample=Image.Resampling.BICUBIC
    )
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(("width", "height"), [(31, 31), (63, 64), (64, 65), (150, 97), (20, 301)])
def test_center_crop_is_adm_s_and_half_of_the_images_are_mirrored(width: int, height: int) -> None:
    image = picture(width, height)
    expected = torch.from_numpy(adm_crop(image, 32).copy()).permute(2, 0, 1)
    assert torch.equal(CenterCrop(32)(image, 0, 0), expected)
    seen = []
    for position in range(200):
        result = CenterCrop(32, flip=True)(image, 7, position)
        seen.append(torch.equal(result, expected.flip(-1)))
        assert seen[-1] or torch.equal(result, expected)
        assert torch.equal(result, CenterCrop(32, flip=True)(image, 7, position))
    assert 70 < sum(seen) < 130


@pytest.mark.parametrize(("width", "height"), [(101, 57), (57, 101), (48, 48), (200, 31)])
def test_random_crop_is_a_square_of_torchvision_s_resize(width: int, height: int) -> None:
    image = picture(width, height)
    resized = Resize(48, InterpolationMode.BICUBIC)(image)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
    squares = pixels.unfold(1, 32, 1).unfold(2, 32, 1)  # (3, tops, lefts, 32, 32)
    for position in range(5):
        found = RandomCrop(32)(image, 3, position)
        assert (squares == found[:, None, None]).all(-1).all(-1).all(0).any()


def test_random_crops_are_anywhere() -> None:
    coordinates = np.stack([*np.meshgrid(range(48), range(48)), np.zeros((48, 48))], -1)
    image = Image.fromarray(coordinates.astype(np.uint8))
    crops = [RandomCrop(32)(image, 0, position)[:2, 0, 0].tolist() for position in range(4000)]
    for counts in map(Counter, zip(*crops, strict=True)):
        assert counts.keys() == set(range(17))
        assert min(counts.values()) > 160 and max(counts.values()) < 320  # 235 expected


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_decoding_is_pillow_s_conversion(mode: str) -> None:
    data = file_of(picture(40, 30).convert(mode), "JPEG")
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(np.asarray(decode(data, 32)), np.asarray(expected))


def test_what_cannot_be_read_says_so() -> None:
    whole = file_of(picture(64, 64))
    for data in (b"", b"not an image", whole[: len(whole) // 2]):
        with pytest.raises(UnreadableError):
            decode(data, 32)
    with pytest.raises(UnreadableError, match="30000 × 1"):
        decode(file_of(Image.new("L", (30_000, 1))), 256)

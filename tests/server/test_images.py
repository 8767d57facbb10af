from __future__ import annotations

import json
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from rae.server.images import encode
from rae.server.settings import ImageFormat

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 17, 3), dtype=np.uint8)
SMOOTH = np.broadcast_to(np.arange(24, dtype=np.uint8)[:, None, None] * 10, (24, 16, 3)).copy()
METADATA = {"class_name": "Käse 🧀", "cfg": 1.5, "seed": 2**53 - 1, "class_id": None}
EXIF_IMAGE_DESCRIPTION = 270


@pytest.mark.parametrize("format", ["png", "webp"])
def test_png_and_webp_keep_every_pixel(format: ImageFormat) -> None:
    with Image.open(BytesIO(encode(PIXELS, format, {}))) as picture:
        assert picture.format == format.upper()
        assert np.array_equal(np.asarray(picture), PIXELS)


def test_jpeg_is_near() -> None:
    with Image.open(BytesIO(encode(SMOOTH, "jpeg", {}))) as picture:
        assert picture.format == "JPEG"
        assert np.abs(np.asarray(picture).astype(int) - SMOOTH).max() <= 4


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_metadata_comes_back_and_bytes_repeat(format: ImageFormat) -> None:
    data = encode(SMOOTH, format, METADATA)
    with Image.open(BytesIO(data)) as picture:
        text = picture.info["rae"] if format == "png" else picture.getexif()[EXIF_IMAGE_DESCRIPTION]
    assert json.loads(text) == METADATA
    assert encode(SMOOTH, format, METADATA) == data

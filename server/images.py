"""Pixels to PNG, JPEG and WebP files that say how to make them again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from rae.server.settings import ImageFormat, server_version

JPEG_QUALITY = 95
EXIF_IMAGE_DESCRIPTION = 0x010E
PNG_KEY = "rae"


def mime_type(format: ImageFormat) -> str:
    return f"image/{format}"


def encode(image: np.ndarray, format: ImageFormat, metadata: Mapping[str, Any]) -> bytes:
    """A file of (H, W, 3) uint8 pixels; PNG and WebP are lossless.

    `metadata` is in the PNG's text "rae", else in the EXIF image description, as JSON. The same
    arguments give the same bytes.
    """
    text = json.dumps(metadata)
    picture, file = Image.fromarray(image), BytesIO()
    if format == "png":
        info = PngInfo()
        info.add_text("Software", f"rae-server {server_version()}")
        info.add_text(PNG_KEY, text)
        picture.save(file, "PNG", pnginfo=info)
        return file.getvalue()
    exif = Image.Exif()
    exif[EXIF_IMAGE_DESCRIPTION] = text
    if format == "jpeg":
        picture.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0, exif=exif)
    else:
        picture.save(file, "WEBP", lossless=True, exif=exif)
    return file.getvalue()

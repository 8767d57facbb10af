"""Pixels to PNG, JPEG and WebP files that say how to make them again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from rae.models.checkpoint_config import CheckpointConfig
from rae.server.request import ImageSpec
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


def describe(
    spec: ImageSpec, config: CheckpointConfig, sha256: str, precision: str
) -> dict[str, Any]:
    """What is needed to make an image again; `sha256` is config.json's."""
    is_null = spec.class_label == config.dit_dh.null_label
    return {
        "class_id": None if is_null else spec.class_label,
        "class_name": None if is_null else config.classes[spec.class_label],
        "cfg": spec.cfg,
        "steps": spec.steps,
        "seed": spec.seed,
        "guidance_method": spec.guidance_method,
        "guidance_interval": list(spec.guidance_interval),
        "solver": "euler",
        "checkpoint": config.name,
        "checkpoint_sha256": sha256,
        "precision": precision,
        "version": server_version(),
    }

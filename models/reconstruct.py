"""A picture through an RAE and back: what its latents keep, and what its decoder makes of them."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from rae.models.rae import RAE
from rae.models.sampling import to_uint8

MAX_PIXELS = 100_000_000
SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def read_picture(path: Path, size: int) -> np.ndarray:
    """A file as (size, size, 3) uint8: turned as its EXIF says, over white, cropped as in ADM.

    Raises ValueError that names the file for one that is no picture, is damaged or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, of what is odd about a readable file
            with Image.open(path) as image:
                require_moderate(image.size, size)
                return np.asarray(center_crop(to_rgb(ImageOps.exif_transpose(image)), size))
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{path} is not an image that Pillow reads") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: more than {MAX_PIXELS:,} pixels") from error
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # Pillow's readers raise what a damaged file makes them
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def require_moderate(shape: tuple[int, int], size: int) -> None:
    """Raises ValueError for more pixels, in the file or once it is resized, than memory is for."""
    short, long = sorted(shape)
    if short * long > MAX_PIXELS or long * size * size / short > MAX_PIXELS:
        raise ValueError(
            f"{shape[0]} × {shape[1]} pixels, at {size} px the short side, are more than "
            f"{MAX_PIXELS:,}"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: 16-bit greys scaled, transparency over white. Raises ValueError for floats."""
    if image.mode in SIXTEEN_BIT:
        scaled = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The crop of ADM's and the RAE's training data: the short side halved by area while it is
    twice `size` or more, made `size` bicubically, and the middle of the long side kept."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def reconstruct(rae: RAE, picture: np.ndarray) -> np.ndarray:
    """Decode what the encoder makes of a picture (S, S, 3) uint8; the same shape, rounded.

    Raises ValueError where no encoder is loaded, and for pixels that are not finite.
    """
    with torch.inference_mode():
        images = rae.decode(rae.encode(as_images(picture)))
    if not images.isfinite().all():
        count = int((~images.isfinite()).sum())
        raise ValueError(f"{count} of {images.numel()} reconstructed values are not finite")
    return to_uint8(images)[0].permute(1, 2, 0).numpy()


def as_images(picture: np.ndarray) -> torch.Tensor:
    """A picture (S, S, 3) uint8 as images (1, 3, S, S) in [0, 1]."""
    return torch.tensor(picture).permute(2, 0, 1)[None].float() / 255


def psnr_db(picture: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 pictures, in dB; infinite for equal ones."""
    error = np.square(picture / 255.0 - reference / 255.0).mean()
    return -10 * math.log10(error) if error else math.inf


def side_by_side(*pictures: np.ndarray) -> Image.Image:
    return Image.fromarray(np.concatenate(pictures, axis=1))


def drawn_picture(size: int) -> np.ndarray:
    """A picture (size, size, 3) uint8 of smooth colours, a disc and a bar with sharp edges."""
    y, x = np.mgrid[:size, :size] / size
    smooth = np.stack([x, y, 0.5 + 0.5 * np.sin(2 * np.pi * (x + y))], axis=-1)
    disc = (x - 0.35) ** 2 + (y - 0.4) ** 2 < 0.2**2
    smooth[disc] = (0.9, 0.2, 0.1)
    smooth[(abs(x - 0.75) < 0.08) & (y > 0.3)] = (0.1, 0.1, 0.2)
    return (smooth * 255).round().astype(np.uint8)

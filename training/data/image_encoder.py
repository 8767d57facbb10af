"""A frozen encoder by itself, from bytes of images to raw latents: no decoder is needed yet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rae.models.checkpoint_config import read_any_config
from rae.models.config import EncoderConfig, EncoderKind
from rae.models.encoder import MODEL_TYPES, Encoder, encode_images, load_encoder
from rae.models.published import NORMALISATION
from rae.models.tensor_files import file_sha256

TOKEN_SIZE = 16  # pixels of an image a token, a side, in every published RAE


class ImageEncoder(nn.Module):
    """uint8 images (B, 3, S, S) to latents (B, C, h, w) as `RAE.encode_raw` makes them."""

    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self, encoder: Encoder, *, image_mean: Sequence[float], image_std: Sequence[float]
    ) -> None:
        super().__init__()
        self.encoder = encoder
        for name, values in (("image_mean", image_mean), ("image_std", image_std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1))
        self.requires_grad_(False).eval()

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.encoder.latent_shape

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return encode_images(self.encoder, images.float() / 255, self.image_mean, self.image_std)


@dataclass(frozen=True, kw_only=True)
class LoadedEncoder:
    """`image_size` is of the images that are encoded; `facts` name the encoder by what it is, the
    sha256 of its files, so that its latents are known from another's."""

    module: ImageEncoder
    image_size: int
    facts: Mapping[str, Any] = field(default_factory=dict)


def load_image_encoder(folder: Path, image_size: int | None = None) -> LoadedEncoder:
    """The encoder of a checkpoint folder, or a published one alone in a transformers folder.

    The latter's pixels are normalised as its kind's were in training, and it gets a token for
    each 16 × 16 pixels of the image: DINOv2/14 sees 256 px at 224. Raises ValueError for a folder
    that holds neither, OSError for weights that cannot be read, ImportError.
    """
    values = read_encoder_config(folder)
    if "model_type" not in values:
        return _of_checkpoint(folder, image_size)
    kind = kind_of(values["model_type"], folder)
    image_size = image_size or 256
    patch_size = values.get("vision_config", values).get("patch_size", TOKEN_SIZE)
    config = EncoderConfig(
        kind=kind, image_size=image_size // TOKEN_SIZE * patch_size, name=folder.resolve().name
    )
    image_mean, image_std = NORMALISATION[kind]
    return _load(config, folder, image_mean, image_std, image_size)


def _of_checkpoint(folder: Path, image_size: int | None) -> LoadedEncoder:
    config, _ = read_any_config(folder)
    own = config.decoder.grid * config.decoder.patch_size
    if config.encoder is None:
        raise ValueError(f"{folder} holds no encoder, its config.json names none")
    if image_size not in (None, own):
        raise ValueError(f"size {image_size}: the images of {folder} have {own} pixels a side")
    return _load(config.encoder, folder / "encoder", config.image_mean, config.image_std, own)


def kind_of(model_type: object, folder: Path) -> EncoderKind:
    for kind, model_types in MODEL_TYPES.items():
        if model_type in model_types:
            return kind
    known = ", ".join(name for names in MODEL_TYPES.values() for name in names)
    raise ValueError(f"{folder} holds a {model_type!r}; encoders are {known}")


def read_encoder_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder or a transformers one. Raises ValueError for neither."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(
            f"{folder} holds no encoder: neither a checkpoint folder nor a transformers folder, "
            "for it has no config.json"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} does not hold an object")
    return values


def _load(
    config: EncoderConfig,
    folder: Path,
    image_mean: Sequence[float],
    image_std: Sequence[float],
    image_size: int,
) -> LoadedEncoder:
    try:
        encoder = load_encoder(config, folder)
    except SafetensorError as error:
        raise ValueError(f"{folder}: {error}") from error
    module = ImageEncoder(encoder, image_mean=image_mean, image_std=image_std)
    files = (folder / "config.json", *sorted(folder.glob("*.safetensors")))
    facts = {
        "kind": config.kind,
        "name": config.name,
        "image_size": config.image_size,
        "image_mean": list(image_mean),
        "image_std": list(image_std),
        "sha256": {path.name: file_sha256(path) for path in files},
    }
    return LoadedEncoder(module=module, image_size=image_size, facts=facts)

"""diffusers' `AutoencoderRAE` folders: the same decoder under other names, with its encoder.

Source: github huggingface/diffusers, `models/autoencoders/autoencoder_rae.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rae.models.checkpoint_config import CheckpointError
from rae.models.config import EncoderConfig, EncoderKind
from rae.models.embedders import sincos_2d
from rae.models.published import (
    DECODER_FIELDS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    RAEWeights,
    decoder_config,
)
from rae.models.tensor_files import read_tensors

WEIGHTS = "diffusion_pytorch_model.safetensors"
EPS = 1e-5
"""Of the published statistics; diffusers adds it again to a std that holds it already."""

NAMES = {
    r"attention\.to_q\.": "attention.attention.query.",
    r"attention\.to_k\.": "attention.attention.key.",
    r"attention\.to_v\.": "attention.attention.value.",
    r"attention\.to_out\.0\.": "attention.output.dense.",
}
TRANSFORMERS: dict[EncoderKind, dict[str, Any]] = {
    "dinov2": {"model_type": "dinov2_with_registers", "image_size": 518},
    "siglip2": {"model_type": "siglip_vision_model", "image_size": 256},
    "mae": {"model_type": "vit_mae", "image_size": 224},
}
SIZES = (
    "encoder_hidden_size",
    "encoder_patch_size",
    "encoder_num_hidden_layers",
    "encoder_input_size",
    "decoder_hidden_size",
)
MAX_SIZE = 65_536
ENCODER_NAMES = {
    ("dinov2", 384): "facebook/dinov2-with-registers-small",
    ("dinov2", 768): "facebook/dinov2-with-registers-base",
    ("dinov2", 1024): "facebook/dinov2-with-registers-large",
    ("siglip2", 768): "google/siglip2-base-patch16-256",
    ("mae", 768): "facebook/vit-mae-base",
}
HEAD_DIM = 64  # of every encoder, says diffusers
FINAL_NORMS: dict[EncoderKind, str] = {
    "dinov2": "layernorm",
    "siglip2": "post_layernorm",
    "mae": "layernorm",
}


@dataclass(frozen=True)
class DiffusersAutoencoder:
    """A folder that `AutoencoderRAE.save_pretrained` has written."""

    folder: Path

    @property
    def files(self) -> list[Path]:
        return [self.folder / "config.json", self.folder / WEIGHTS]

    def read(self) -> RAEWeights:
        """Raises CheckpointError that names what is not supported."""
        path = self.folder / "config.json"
        try:
            config = json.loads(path.read_text())
            if not isinstance(config, dict):
                raise ValueError("it does not hold an object")
            return self._read(config)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        except KeyError as error:
            raise CheckpointError(f"{path} or {WEIGHTS} has no {error}") from error
        except (ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path}: {error}") from error

    def _read(self, config: dict[str, Any]) -> RAEWeights:
        wanted = {
            "_class_name": "AutoencoderRAE",
            "num_channels": 3,
            "reshape_to_2d": True,
            "scaling_factor": 1.0,
        }
        for key, value in wanted.items():
            if config.get(key, value) != value:
                raise ValueError(f"{key} {config[key]!r} is not supported: only {value!r} is")
        kind = config["encoder_type"]
        if kind not in TRANSFORMERS:
            raise ValueError(f"encoder_type {kind!r}; known: {', '.join(TRANSFORMERS)}")
        for key in SIZES:
            if type(config[key]) is not int or not 0 < config[key] <= MAX_SIZE:
                raise ValueError(f"{key} {config[key]!r} is not an integer from 1 to {MAX_SIZE}")
        if config["decoder_hidden_size"] % 4:
            raise ValueError(f"decoder_hidden_size {config['decoder_hidden_size']} is not 4·n")
        tensors = read_tensors(self.folder / WEIGHTS)
        decoder = {_published_name(k): v for k, v in _below("decoder.", tensors).items()}
        encoder = _below("encoder.", tensors)
        # Buffers such as position_ids are integers, and made anew.
        encoder = {k: v for k, v in encoder.items() if v.is_floating_point()}
        channels = config["encoder_hidden_size"]
        # Before transformers 5 SigLIP's tower sat one attribute deeper.
        prefix = "vision_model." if any(k.startswith("vision_model.") for k in encoder) else ""
        for name, fill in (("weight", torch.ones), ("bias", torch.zeros)):
            # Stripped there, unused here; transformers wants it.
            encoder.setdefault(f"{prefix}{FINAL_NORMS[kind]}.{name}", fill(channels))
        grid = config["encoder_input_size"] // config["encoder_patch_size"]
        width = config["decoder_hidden_size"]
        # Not saved. The published one is at integer positions; diffusers makes one anew that it
        # scales to a grid of 16, which is another table at 512 px.
        table = torch.cat([torch.zeros(1, width), sincos_2d(width, grid)])[None]
        decoder.setdefault("decoder_pos_embed", table)
        params = {key: config[key] for key in (*DECODER_FIELDS, "patch_size")}
        return RAEWeights(
            decoder=decoder_config(params, decoder, self.folder / WEIGHTS),
            tensors={**decoder, **_statistics(tensors)},
            encoder=EncoderConfig(
                kind=kind,
                image_size=config["encoder_input_size"],
                name=ENCODER_NAMES.get((kind, channels), ""),
            ),
            image_mean=_triple(config.get("encoder_norm_mean") or IMAGENET_MEAN),
            image_std=_triple(config.get("encoder_norm_std") or IMAGENET_STD),
            encoder_tensors=encoder,
            encoder_config={
                **TRANSFORMERS[kind],
                "hidden_size": channels,
                "patch_size": config["encoder_patch_size"],
                "num_hidden_layers": config["encoder_num_hidden_layers"],
                "num_attention_heads": channels // HEAD_DIM,
            },
        )


def _statistics(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Its decode multiplies by std + 1e-5, up to 1.4e-4 more than the published sqrt(var + 1e-5),
    which its std is already."""
    std = tensors["_latents_std"].double()
    return {
        "latents_mean": tensors["_latents_mean"],
        "latents_var": (std.square() - EPS).float(),
        "eps": torch.tensor(EPS),
    }


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return (red, green, blue)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _published_name(name: str) -> str:
    for pattern, published in NAMES.items():
        name = re.sub(pattern, published, name)
    return name

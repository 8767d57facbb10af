"""Frozen pretrained encoders, run by transformers: DINOv2 with registers, SigLIP2, MAE.

What an RAE takes from each is read from github bytetriper/RAE, `src/stage1/encoders`: the last
layer's patch tokens after the final LayerNorm without its affine part.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from rae.models.config import EncoderConfig, EncoderKind
from rae.models.tensor_files import listed

# What transformers calls them; a published SigLIP2 is a whole SiglipModel, text tower and all.
MODEL_TYPES: dict[EncoderKind, tuple[str, ...]] = {
    "dinov2": ("dinov2_with_registers",),
    "siglip2": ("siglip", "siglip_vision_model"),
    "mae": ("vit_mae",),
}


class Encoder(nn.Module):
    """Normalised pixels (B, 3, S, S) to tokens (B, N, C)."""

    def __init__(self, config: EncoderConfig, backbone: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        name = "post_layernorm" if config.kind == "siglip2" else "layernorm"
        norm: Any = getattr(backbone, name)
        plain = nn.LayerNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False)
        setattr(backbone, name, plain)
        self.requires_grad_(False).eval()

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of an image of `image_size` pixels a side."""
        backbone: Any = self.backbone.config
        grid = self.config.image_size // backbone.patch_size
        return (backbone.hidden_size, grid, grid)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        output, num_prefix = self._run(pixels)
        return output.last_hidden_state[:, num_prefix:]

    def hidden_states(self, pixels: Tensor) -> list[Tensor]:
        """Tokens (B, N, C) after each layer, before the last norm; gradients reach `pixels`."""
        output, num_prefix = self._run(pixels, output_hidden_states=True)
        return [tokens[:, num_prefix:] for tokens in output.hidden_states[1:]]

    def _run(self, pixels: Tensor, **options: bool) -> tuple[Any, int]:
        """What transformers returns, and how many tokens come before those of patches."""
        backbone: Any = self.backbone
        match self.config.kind:
            case "dinov2":
                return backbone(pixels, **options), 1 + backbone.config.num_register_tokens
            case "siglip2":
                return backbone(pixels, interpolate_pos_encoding=True, **options), 0
            case "mae":
                num_tokens = (pixels.shape[-1] // backbone.config.patch_size) ** 2
                # Rising noise and a mask ratio of 0 keep every token, in order.
                order = torch.arange(num_tokens, device=pixels.device, dtype=torch.float32)
                order = order.expand(len(pixels), -1)
                options["interpolate_pos_encoding"] = True
                return backbone(pixels, noise=order, **options), 1


def encoder_pixels(
    encoder: Encoder, images: Tensor, image_mean: Tensor, image_std: Tensor
) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] in the encoder's size, bicubic without antialias, and
    normalised."""
    size = (encoder.config.image_size,) * 2
    if tuple(images.shape[-2:]) != size:
        images = F.interpolate(images, size=size, mode="bicubic", align_corners=False)
    return (images - image_mean) / image_std


def encode_images(
    encoder: Encoder, images: Tensor, image_mean: Tensor, image_std: Tensor
) -> Tensor:
    """The tokens of images (B, 3, H, W) in [0, 1] as raw latents (B, C, h, w)."""
    tokens = encoder(encoder_pixels(encoder, images, image_mean, image_std))  # (B, N, C)
    return tokens.transpose(1, 2).unflatten(-1, encoder.latent_shape[1:])


def load_encoder(config: EncoderConfig, folder: Path) -> Encoder:
    """From a local transformers folder as published, safetensors only, in fp32.

    Raises ImportError that names the extra to install, OSError or SafetensorError for a folder
    that cannot be read and ValueError for another model and missing or misshapen tensors.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("encoders need transformers: pip install 'rae-server[train]'") from error
    classes: dict[EncoderKind, Any] = {
        "dinov2": transformers.Dinov2WithRegistersModel,
        "siglip2": transformers.SiglipVisionModel,
        "mae": transformers.ViTMAEModel,
    }
    _require_model_type(config.kind, folder)
    unmasked = {"mask_ratio": 0.0} if config.kind == "mae" else {}
    try:
        with _quiet(transformers.utils.logging):
            # transformers only warns of a missing tensor, and takes an absent folder for a hub's
            # name.
            model, loading = classes[config.kind].from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are listed, and refused below
                dtype=torch.float32,
                attn_implementation="sdpa",  # config.json might name one that is fetched and run
                **unmasked,
            )
    except (OSError, ValueError, SafetensorError):
        raise
    except Exception as error:  # for a wrong config.json, any: ZeroDivisionError, KeyError, …
        raise ValueError(f"{type(error).__name__}: {error}") from error
    problems = [
        problem
        for kind in ("missing_keys", "mismatched_keys")
        for problem in listed(kind, [str(key) for key in loading[kind]])
    ]
    if problems:
        raise ValueError("; ".join(problems))
    # Before transformers 5 SigLIP's tower sat one attribute deeper.
    return Encoder(config, getattr(model, "vision_model", model))


def _require_model_type(kind: EncoderKind, folder: Path) -> None:
    """Another model's folder would be a list of all its tensors, missing or misshapen."""
    values = json.loads((folder / "config.json").read_text())
    values = values if isinstance(values, dict) else {}
    for key in ("auto_map", "quantization_config"):
        if values.get(key) is not None:
            raise ValueError(f"config.json has {key}: only plain weights of known models are read")
    found = values.get("model_type")
    if found not in MODEL_TYPES[kind]:
        raise ValueError(f"model_type {found!r}; {kind} is {' or '.join(MODEL_TYPES[kind])}")
    if (folder / "pytorch_model.bin").exists() and not list(folder.glob("*.safetensors")):
        raise ValueError(
            "pytorch_model.bin is not read, only safetensors are: load the folder with "
            "transformers' AutoModel.from_pretrained and write it with save_pretrained"
        )


@contextmanager
def _quiet(logging: ModuleType) -> Iterator[None]:
    """Without transformers' progress bar, and its list of a text tower's unexpected tensors."""
    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()

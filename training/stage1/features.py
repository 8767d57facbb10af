"""Frozen networks that the decoder's losses look through: images to lists of feature maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rae.models.checkpoint_config import CheckpointError
from rae.models.pickled import read_pickled, require_plain
from rae.models.rae import RAE
from rae.models.tensor_files import listed

DINO_FILE = (
    "the discriminator's DINO ViT-S/8, discs/dino_vit_small_patch8_224.pth of "
    "huggingface.co/nyu-visionx/RAE-collections"
)
DINO_DEPTHS = (2, 5, 8, 11)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class FeatureMaps(Protocol):
    """Images (B, 3, H, W) in [−1, 1] to `num_maps` maps (B, channels, N); gradients pass."""

    @property
    def num_maps(self) -> int: ...

    @property
    def channels(self) -> int: ...

    def __call__(self, images: Tensor) -> list[Tensor]: ...


class DinoFeatures(nn.Module):
    """Patch tokens after the blocks `depths` of a timm ViT, and after its last one.

    Images of any size are resized to the ViT's, bilinear without antialias, and never cropped.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vit: nn.Module, depths: Sequence[int] = DINO_DEPTHS) -> None:
        super().__init__()
        self.vit: Any = vit
        self.depths = [*depths, len(self.vit.blocks) - 1]
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @property
    def num_maps(self) -> int:
        return len(self.depths)

    @property
    def channels(self) -> int:
        return self.vit.embed_dim

    def forward(self, images: Tensor) -> list[Tensor]:
        size = self.vit.patch_embed.img_size
        images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        wanted = sorted(set(self.depths))
        tokens = self.vit.forward_intermediates(
            ((images + 1) / 2 - self.mean) / self.std,
            indices=wanted,
            output_fmt="NLC",
            intermediates_only=True,
        )
        maps = dict(zip(wanted, tokens, strict=True))
        return [maps[depth].transpose(1, 2) for depth in self.depths]


class EncoderFeatures:
    """Tokens at each quarter of the depth of an RAE's own encoder, before its last norm.

    They stand in where the published networks are not at hand, or know nothing of such images.
    Raises ValueError for an RAE without an encoder.
    """

    def __init__(self, rae: RAE) -> None:
        if rae.encoder is None:
            raise ValueError("this RAE has no encoder to take features of")
        self.rae, self.encoder = rae, rae.encoder
        backbone: Any = rae.encoder.backbone
        depth = backbone.config.num_hidden_layers
        self.depths = sorted({max(0, depth * quarter // 4 - 1) for quarter in (1, 2, 3, 4)})

    @property
    def num_maps(self) -> int:
        return len(self.depths)

    @property
    def channels(self) -> int:
        return self.encoder.latent_shape[0]

    def __call__(self, images: Tensor) -> list[Tensor]:
        states = self.encoder.hidden_states(self.rae.encoder_pixels((images + 1) / 2))
        return [states[depth].transpose(1, 2) for depth in self.depths]


def build_dino(
    *, image_size: int = 224, patch_size: int = 8, dim: int = 384, depth: int = 12, heads: int = 6
) -> nn.Module:
    """A ViT of random weights, by default DINO's ViT-S/8. The authors run it with the tanh GELU.

    Raises ImportError that names the extra to install.
    """
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ImportError as error:
        raise ImportError("DINO needs timm: pip install 'rae-server[train]'") from error
    return VisionTransformer(
        img_size=image_size,
        patch_size=patch_size,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        num_classes=0,
        act_layer=partial(nn.GELU, approximate="tanh"),
    )


def load_dino(vit: nn.Module, path: Path) -> None:
    """The published `.pth`, or safetensors, into `vit`; the biases of its keys are zeroed.

    Raises CheckpointError for what is not exactly those tensors.
    """
    load_tensors(vit, read_pickled(path), path, DINO_FILE)
    for key, value in vit.state_dict().items():
        if key.endswith(".attn.qkv.bias"):
            value[len(value) // 3 : 2 * len(value) // 3] = 0


def load_tensors(module: nn.Module, tensors: Mapping[str, Any], path: Path, what: str) -> None:
    """Copy them as fp32. Raises CheckpointError where they are not the module's, one for one."""
    expected = module.state_dict()
    problems = listed("missing", list(expected.keys() - tensors.keys()))
    problems += listed("unexpected", list(tensors.keys() - expected.keys()))
    if not problems:
        require_plain(tensors, path)
        wrong = [key for key, value in expected.items() if value.shape != tensors[key].shape]
        problems = listed("misshapen", wrong)
    if problems:
        raise CheckpointError(f"{path} is not {what}: {'; '.join(problems)}")
    module.load_state_dict({key: tensors[key].float() for key in expected})

"""Networks whose features stand for images: FID's Inception-v3, or a frozen encoder.

Nothing is ever downloaded: weights are files that the user has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rae.models.checkpoint import load_autoencoder
from rae.models.checkpoint_config import AutoencoderConfig
from rae.models.config import EncoderConfig
from rae.models.encoder import Encoder, encoder_pixels, load_encoder
from rae.models.pickled import read_pickled
from rae.models.published import NORMALISATION
from rae.models.rae import RAE
from rae.models.tensor_files import file_sha256
from rae.training.data.image_encoder import kind_of, read_encoder_config

# Both publish the same file, whose name holds the first digits of its sha256.
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"
INCEPTION_SOURCES = (
    f"{INCEPTION_FILE} of https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights, or "
    "weights-inception-2015-12-05-6726825d.pth of "
    "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0"
)
SPATIAL_CHANNELS = 7  # that ADM's sFID takes of a 17×17 map
DINOV2_SIZE = 224  # 16×16 patches; config.json names the size of its pretraining, 518


@dataclass(frozen=True)
class ImageFeatures:
    """`pooled` (B, D); of Inception also `spatial` (B, 2023), for sFID, and `logits` (B, 1008),
    for the Inception score."""

    pooled: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


class FeatureNetwork(Protocol):
    """`name` goes with every figure, `fingerprint` with every kept statistic. `is_fid` only where
    the weights are those that published FIDs are computed with."""

    name: str
    fingerprint: str
    is_fid: bool
    dim: int
    spatial_dim: int | None

    def __call__(self, images: Tensor) -> ImageFeatures:
        """Of images (B, 3, H, W) uint8 on the network's device."""
        ...

    def to(self, device: torch.device) -> Self: ...


class InceptionNetwork(nn.Module):
    """Inception-v3 of 2015-12-05 as FID takes it, by torch-fidelity, with TensorFlow's resizing.

    `pooled` is pool_3 (2048), `spatial` the first 7 channels of mixed_6/conv in TensorFlow's
    order, `logits` are those without the bias: what ADM's evaluator reads.
    """

    dim: int = 2048
    spatial_dim: int | None = SPATIAL_CHANNELS * 17 * 17

    def __init__(self, path: Path) -> None:
        """Raises ValueError for a file that is absent or holds other tensors."""
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        super().__init__()
        if not path.is_file():
            raise ValueError(f"{path} is no file: wanted is {INCEPTION_SOURCES}")
        read_pickled(path)  # torch-fidelity would execute what else than tensors the file holds
        try:
            network = FeatureExtractorInceptionV3(
                "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
        except RuntimeError as error:
            raise ValueError(
                f"{path} holds other tensors than FID's Inception-v3: wanted is {INCEPTION_SOURCES}"
            ) from error
        self.network = network
        sha256 = file_sha256(path)
        self.is_fid = sha256.startswith(INCEPTION_SHA256)
        self.name = "Inception-v3" if self.is_fid else f"Inception-v3 of {path.name}, not FID's"
        self.fingerprint = f"inception {sha256}"
        self._spatial: Tensor | None = None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, __: object, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS]  # (B, 7, 17, 17)

    @torch.no_grad()
    def forward(self, images: Tensor) -> ImageFeatures:
        pooled, logits = self.network(images)
        assert self._spatial is not None
        return ImageFeatures(pooled, self._spatial.permute(0, 2, 3, 1).flatten(1), logits)


class EncoderNetwork(nn.Module):
    """The mean of a frozen encoder's patch tokens, after their LayerNorm without affine part.

    Every kind of encoder has patch tokens; SigLIP2 has no class token, and an RAE uses none.
    Images are resized as `RAE.encode` does, bicubic without antialias.
    """

    is_fid: bool = False
    spatial_dim: int | None = None
    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        encoder: Encoder,
        *,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        name: str,
        sha256: str,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        for key, values in (("image_mean", image_mean), ("image_std", image_std)):
            self.register_buffer(key, torch.tensor(values).view(3, 1, 1))
        self.name = f"encoder {name}"
        normalisation = f"{tuple(image_mean)} {tuple(image_std)}"
        self.fingerprint = f"encoder {sha256} {encoder.config.image_size} px {normalisation}"
        self.dim = encoder.latent_shape[0]

    @torch.no_grad()
    def forward(self, images: Tensor) -> ImageFeatures:
        pixels = encoder_pixels(self.encoder, images.float() / 255, self.image_mean, self.image_std)
        return ImageFeatures(self.encoder(pixels).mean(1))


def checkpoint_encoder(folder: Path, config: AutoencoderConfig, rae: RAE) -> EncoderNetwork:
    """The encoder of a loaded autoencoder, which lies in the checkpoint `folder`."""
    assert rae.encoder is not None
    return EncoderNetwork(
        rae.encoder,
        image_mean=config.image_mean,
        image_std=config.image_std,
        name=rae.encoder.config.name or f"{rae.encoder.config.kind} of {config.name}",
        sha256=weights_sha256(folder / "encoder"),
    ).eval()


def load_encoder_network(folder: Path) -> EncoderNetwork:
    """The encoder of a checkpoint folder, or one alone in a transformers folder.

    The latter's pixels are normalised as its kind's were in training. Raises ValueError (or
    OSError, ImportError) for a folder that holds neither.
    """
    values = read_encoder_config(folder)
    if "model_type" not in values:
        return checkpoint_encoder(folder, *load_autoencoder(folder))
    kind = kind_of(values["model_type"], folder)
    size = DINOV2_SIZE
    if kind != "dinov2":
        size = values.get("vision_config", values).get("image_size", DINOV2_SIZE)
    name = folder.resolve().name
    try:
        encoder = load_encoder(EncoderConfig(kind=kind, image_size=size, name=name), folder)
    except SafetensorError as error:
        raise ValueError(f"{folder}: {error}") from error
    mean, std = NORMALISATION[kind]
    return EncoderNetwork(
        encoder, image_mean=mean, image_std=std, name=name, sha256=weights_sha256(folder)
    ).eval()


def weights_sha256(folder: Path) -> str:
    """Of all safetensors of a transformers folder."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return file_sha256(files[0])
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()

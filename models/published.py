"""What the RAE authors publish: the parts of a model, and the files of their hub repository.

Source: github bytetriper/RAE, hub nyu-visionx/RAE-collections.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rae.models.checkpoint_config import CheckpointError, SamplerDefaults
from rae.models.config import CONFIGS, DecoderConfig, DiTDHConfig, EncoderConfig
from rae.models.pickled import KINDS, read_pickled, read_state_dict, require_plain
from rae.models.sampling import default_shift

HUB_REPOSITORY = "nyu-visionx/RAE-collections"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
NORMALISATION = {
    "dinov2": (IMAGENET_MEAN, IMAGENET_STD),
    "mae": (IMAGENET_MEAN, IMAGENET_STD),
    "siglip2": (HALF, HALF),
}
DECODER_FIELDS = (
    "decoder_hidden_size",
    "decoder_num_hidden_layers",
    "decoder_num_attention_heads",
    "decoder_intermediate_size",
)


@dataclass(frozen=True, kw_only=True)
class RAEWeights:
    """What is read of a published RAE: the decoder's tensors by their published names, and the
    statistics of the latents by ours (`latents_mean`, `latents_var`, `eps`). `encoder_tensors`
    are a transformers model's, where the encoder comes along."""

    decoder: DecoderConfig
    tensors: dict[str, Tensor]
    encoder: EncoderConfig
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    encoder_tensors: dict[str, Tensor] = field(default_factory=dict)
    encoder_config: Any = None


class Network(NamedTuple):
    """A DiT^DH and the file of its weights."""

    config: DiTDHConfig
    file: Path


@dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """A published RAE. `decoder` has the authors' names; how many channels and tokens there are
    is read off the decoder's file."""

    decoder: Mapping[str, Any]
    decoder_file: Path
    statistics_file: Path | None
    eps: float = 1e-5
    encoder: EncoderConfig

    @property
    def files(self) -> list[Path]:
        return [self.decoder_file] + ([self.statistics_file] if self.statistics_file else [])

    def read(self) -> RAEWeights:
        """Raises CheckpointError."""
        tensors = read_state_dict(self.decoder_file, "an RAE decoder")
        image_mean, image_std = NORMALISATION[self.encoder.kind]
        return RAEWeights(
            decoder=decoder_config(self.decoder, tensors, self.decoder_file),
            tensors={**tensors, **self._statistics()},
            encoder=self.encoder,
            image_mean=image_mean,
            image_std=image_std,
        )

    def _statistics(self) -> dict[str, Tensor]:
        if self.statistics_file is None:  # published RAEs without normalisation
            return {"latents_var": torch.ones(1, 1, 1), "eps": torch.tensor(0.0)}
        values = read_pickled(self.statistics_file)
        mean, var = values.get("mean"), values.get("var")
        if not isinstance(var, Tensor) or not isinstance(mean, Tensor | None):
            raise CheckpointError(
                f"{self.statistics_file} should hold {KINDS['var']}, `var` and perhaps `mean`; it "
                f"holds {', '.join(map(str, list(values)[:3])) or 'nothing'}"
            )
        statistics = {"latents_var": var, "eps": torch.tensor(self.eps)}
        if mean is not None:
            statistics["latents_mean"] = mean
        require_plain(statistics, self.statistics_file)
        return statistics


class ReadableRAE(Protocol):
    """The authors' files or diffusers' folder."""

    @property
    def files(self) -> list[Path]: ...

    def read(self) -> RAEWeights: ...


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published model: an RAE, and the DiT^DH in its latent space where there is one."""

    name: str
    autoencoder: ReadableRAE
    dit_dh: Network | None = None
    guide: Network | None = None
    shift: float = 1.0
    defaults: SamplerDefaults = field(default_factory=SamplerDefaults)
    source: str = ""
    license: str = ""

    @property
    def files(self) -> list[Path]:
        return [n.file for n in (self.dit_dh, self.guide) if n] + self.autoencoder.files


def decoder_config(
    params: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path
) -> DecoderConfig:
    """The authors' names, with the channels and the grid that the tensors have."""
    try:
        channels = tensors["decoder_embed.weight"].shape[1]
        num_tokens = tensors["decoder_pos_embed"].shape[1] - 1
    except (KeyError, IndexError) as error:
        raise CheckpointError(
            f"{path}: decoder_embed.weight and decoder_pos_embed are not as they should be"
        ) from error
    grid = math.isqrt(max(num_tokens, 0))
    if grid**2 != num_tokens:
        raise CheckpointError(f"{path}: {num_tokens} tokens are no square")
    return DecoderConfig.from_published({**params, "hidden_size": channels, "grid": grid})


def _preset_autoencoder(decoder: str, statistics: str, encoder: EncoderConfig) -> Autoencoder:
    return Autoencoder(
        decoder=dict(zip(DECODER_FIELDS, (1152, 28, 16, 4096), strict=True)),
        decoder_file=Path("decoders", decoder, "model.pt"),
        statistics_file=Path("stats", statistics, "stat.pt"),
        encoder=encoder,
    )


def _preset_dit_dh(size: int, folder: str, guide: str, cfg: float) -> Published:
    weights = Path("DiTs/Dinov2/wReg_base", f"ImageNet{size}")
    config = CONFIGS[f"DiTDH-XL-{size}"]
    return Published(
        name=f"DiTDH-XL-{size}",
        autoencoder=_AUTOENCODERS[f"RAE-DINOv2-B-{size}"],
        dit_dh=Network(config, weights / folder / "stage2_model.pt"),
        guide=Network(CONFIGS[f"DiTDH-S-{size}"], weights / guide / "stage2_model.pt"),
        shift=default_shift(config.latent_shape),
        defaults=SamplerDefaults(cfg=cfg, guidance_method="autoguidance"),
    )


_DINOV2 = EncoderConfig(kind="dinov2", image_size=224, name="facebook/dinov2-with-registers-base")
_SIGLIP2 = EncoderConfig(kind="siglip2", image_size=256, name="google/siglip2-base-patch16-256")
_MAE = EncoderConfig(kind="mae", image_size=256, name="facebook/vit-mae-base")
_AUTOENCODERS = {
    name: _preset_autoencoder(*parts)
    for name, parts in {
        "RAE-DINOv2-B-256": (
            "dinov2/wReg_base/ViTXL_n08",
            "dinov2/wReg_base/imagenet1k",
            _DINOV2,
        ),
        "RAE-DINOv2-B-512": (
            "dinov2/wReg_base/ViTXL_n08_i512",
            "dinov2/wReg_base/imagenet1k_512",
            replace(_DINOV2, image_size=448),
        ),
        "RAE-SigLIP2-B-256": (
            "siglip2/base_p16_i256/ViTXL_n08",
            "siglip2/base_p16_i256/ImageNet1k",
            _SIGLIP2,
        ),
        "RAE-MAE-B-256": ("mae/base_p16/ViTXL_n08", "mae/base_p16/ImageNet1k", _MAE),
    }.items()
}
PRESETS: dict[str, Published] = {
    "DiTDH-XL-256": _preset_dit_dh(256, "DiTDH-XL", "DiTDH-S_ep14", 1.42),
    "DiTDH-XL-512": _preset_dit_dh(512, "DiTDH-XL_ep400", "DiTDH-S_ep20", 1.5),
    **{name: Published(name=name, autoencoder=rae) for name, rae in _AUTOENCODERS.items()},
}

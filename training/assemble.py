"""What training has made becomes the checkpoint folder that the server reads."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from torch import nn

from rae.models.checkpoint import save_autoencoder, save_checkpoint
from rae.models.checkpoint_config import AutoencoderConfig, CheckpointConfig, SamplerDefaults
from rae.models.dit_dh import DiTDH
from rae.models.labels import imagenet_classes
from rae.models.rae import RAE
from rae.models.verify import record_fingerprints
from rae.training.stage2.presets import DiTRecipe


def class_names(names: Sequence[str], num_classes: int) -> tuple[str, ...]:
    """ImageNet's for its 1,000 synset folders, `names` where there is one of each class, else
    numbers."""
    is_imagenet = len(names) == num_classes == len(imagenet_classes())
    if is_imagenet and all(name[0] == "n" and name[1:].isdigit() for name in names):
        return imagenet_classes()
    if len(names) == num_classes:
        return tuple(names)
    return tuple(str(label) for label in range(num_classes))


def assemble_checkpoint(
    folder: Path,
    autoencoder: AutoencoderConfig,
    rae: RAE,
    recipe: DiTRecipe,
    dit_dh: nn.Module,
    *,
    guide: nn.Module | None = None,
    classes: Sequence[str] = (),
    defaults: SamplerDefaults | None = None,
    encoder: Path | None = None,
    name: str = "",
) -> CheckpointConfig:
    """Write `folder` whole: the averaged DiT^DH, the RAE, an early guide, the encoder's folder.

    Raises ValueError for a plain DiT, which the server does not run, and for parts that do not
    fit.
    """
    for model in (dit_dh, *([guide] if guide is not None else [])):
        if not isinstance(model, DiTDH):
            raise ValueError(f"a checkpoint holds DiT^DH models, not {type(model).__name__}")
    assert isinstance(dit_dh, DiTDH)
    config = CheckpointConfig(
        **{
            **{key: getattr(autoencoder, key) for key in asdict(autoencoder)},
            "name": name or autoencoder.name,
            "sha256": {},
            "fingerprints": {},
        },
        dit_dh=dit_dh.config,
        guide=guide.config if isinstance(guide, DiTDH) else None,
        classes=class_names(classes, dit_dh.config.num_classes),
        shift=recipe.time_shift,
        defaults=defaults or SamplerDefaults(),
    )
    config = replace(config, notes={**config.notes, "dit_recipe": asdict(recipe)})
    put_encoder(folder, encoder)
    save_checkpoint(folder, config, dit_dh, rae, guide if isinstance(guide, DiTDH) else None)
    record_fingerprints(folder)
    return config


def assemble_autoencoder(
    folder: Path, config: AutoencoderConfig, rae: RAE, encoder: Path | None
) -> None:
    """Write `folder`: a decoder, its statistics and the encoder's folder."""
    put_encoder(folder, encoder)
    save_autoencoder(folder, replace(config, sha256={}, fingerprints={}), rae)
    record_fingerprints(folder)


def put_encoder(folder: Path, encoder: Path | None) -> None:
    if encoder is not None and encoder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copytree(encoder, folder / "encoder", dirs_exist_ok=True)

"""The checkpoint folder: what training and conversion write and the server reads.

`config.json` names everything; weights are safetensors, loaded strictly onto meta-device models.
Nothing is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError

from rae.models.checkpoint_config import (
    AutoencoderConfig,
    CheckpointConfig,
    CheckpointError,
    read_any_config,
    read_config,
)
from rae.models.config import DiTDHConfig
from rae.models.dit_dh import DiTDH
from rae.models.encoder import load_encoder
from rae.models.rae import RAE
from rae.models.tensor_files import (
    file_problem,
    file_sha256,
    load_strictly,
    read_tensors,
    write_tensors,
)

DIT_DH_FILE = "dit_dh.safetensors"
DECODER_FILE = "decoder.safetensors"
GUIDE_FILE = "guide.safetensors"
STATISTICS = ("latents_mean", "latents_var", "eps")

C = TypeVar("C", bound=AutoencoderConfig)


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint, on the CPU. `sha256` is config.json's, which holds the files' own.

    `num_parameters` of each network are counted here: a runner may pack the layers.
    """

    config: CheckpointConfig
    sha256: str
    dit_dh: DiTDH
    rae: RAE
    guide: DiTDH | None
    num_parameters: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        networks = {"dit_dh": self.dit_dh, "decoder": self.rae.decoder, "guide": self.guide}
        counts = {
            name: sum(parameter.numel() for parameter in network.parameters())
            for name, network in networks.items()
            if network is not None
        }
        object.__setattr__(self, "num_parameters", counts)


def networks(config: AutoencoderConfig) -> dict[str, str]:
    """The networks of a folder, and their files."""
    if not isinstance(config, CheckpointConfig):
        return {"decoder": DECODER_FILE}
    guide = {"guide": GUIDE_FILE} if config.guide else {}
    return {"dit_dh": DIT_DH_FILE, **guide, "decoder": DECODER_FILE}


def load_checkpoint(
    folder: Path, *, with_encoder: bool = False, keep_bf16: bool = False
) -> Checkpoint:
    """Load a checkpoint folder onto the CPU, memory-mapped, in eval mode.

    `keep_bf16` as in `load_strictly`. Raises CheckpointError that lists what is missing,
    unexpected, misshapen or unreadable, or names a file whose sha256 is not the recorded one.
    """
    config, sha256 = read_config(folder)
    with checked(config, folder, with_encoder=with_encoder):
        load = partial(load_dit_dh, keep_bf16=keep_bf16)
        dit_dh = load(config.dit_dh, folder / DIT_DH_FILE)
        guide = load(config.guide, folder / GUIDE_FILE) if config.guide else None
        rae = load_rae(config, folder / DECODER_FILE, keep_bf16=keep_bf16)
    if with_encoder:
        attach_encoder(rae, config, folder)
    return Checkpoint(config, sha256, dit_dh, rae, guide)


def load_autoencoder(folder: Path, encoder: Path | None = None) -> tuple[AutoencoderConfig, RAE]:
    """Only the RAE of a folder, with its encoder: the folder's own, or `encoder`, a transformers
    folder of the same kind. Raises CheckpointError."""
    config, _ = read_any_config(folder)
    names = [name for name in config.sha256 if name == DECODER_FILE or name.startswith("encoder/")]
    config = replace(config, sha256={name: config.sha256[name] for name in names})
    with checked(config, folder, with_encoder=encoder is None):
        rae = load_rae(config, folder / DECODER_FILE)
    attach_encoder(rae, config, folder, encoder)
    return config, rae


def attach_encoder(
    rae: RAE, config: AutoencoderConfig, folder: Path, encoder: Path | None = None
) -> None:
    """Load the encoder into `rae`. Raises CheckpointError where it is not there or is another."""
    if config.encoder is None:
        raise CheckpointError(
            f"{folder} holds no encoder, its config.json names none: it only decodes"
        )
    path = encoder or folder / "encoder"
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} holds no encoder: {config.encoder.name or config.encoder.kind} is wanted, a "
            "transformers folder (config.json, model.safetensors) that lies there or is given "
            "with --encoder"
        )
    try:
        loaded = load_encoder(config.encoder, path)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from error
    made, taken = loaded.latent_shape, (config.decoder.latent_channels, *[config.decoder.grid] * 2)
    if made != taken:
        raise CheckpointError(
            f"{path} makes latents {made} of {config.encoder.image_size} px, the decoder takes "
            f"{taken}: {config.encoder.name or 'another encoder'} is wanted"
        )
    rae.encoder = loaded


def save_checkpoint(
    folder: Path, config: CheckpointConfig, dit_dh: DiTDH, rae: RAE, guide: DiTDH | None = None
) -> CheckpointConfig:
    """Write a checkpoint folder; returns the configuration with the files' sha256.

    `encoder/` is a transformers folder that its owner has put there where the configuration has
    an encoder. config.json comes last: without it a folder is no checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sha256 = {DIT_DH_FILE: write_tensors(folder / DIT_DH_FILE, dit_dh.state_dict())}
    if guide is not None:
        sha256[GUIDE_FILE] = write_tensors(folder / GUIDE_FILE, guide.state_dict())
    return save_autoencoder(folder, replace(config, sha256=sha256), rae)


def save_autoencoder(folder: Path, config: C, rae: RAE) -> C:
    """The RAE's part of `save_checkpoint`: all of a folder that holds no DiT^DH."""
    folder.mkdir(parents=True, exist_ok=True)
    statistics = {key: getattr(rae, key) for key in STATISTICS if getattr(rae, key) is not None}
    tensors = {**rae.decoder.state_dict(), **statistics}
    sha256 = {**config.sha256, DECODER_FILE: write_tensors(folder / DECODER_FILE, tensors)}
    return write_config(folder, replace(config, sha256=sha256))


def write_config(folder: Path, config: C) -> C:
    """Write config.json, with the sha256 of what lies in encoder/ beside the given ones."""
    encoder = sorted(f"encoder/{path.name}" for path in folder.glob("encoder/*"))
    for name in encoder:
        (folder / name).chmod(0o644)  # safetensors leaves a file readable by its owner alone
    hashes = {name: file_sha256(folder / name) for name in encoder}
    config = replace(config, sha256={**config.sha256, **hashes})
    written = folder / "config.tmp"
    written.write_text(config.to_json())
    written.replace(folder / "config.json")
    return config


def load_dit_dh(config: DiTDHConfig, path: Path, *, keep_bf16: bool = False) -> DiTDH:
    """`keep_bf16` as in `load_strictly`. Raises CheckpointError."""
    with torch.device("meta"):
        dit_dh = DiTDH(config)
    load_strictly(dit_dh, read_tensors(path), path, keep_bf16=keep_bf16)
    return dit_dh


def load_rae(config: AutoencoderConfig, path: Path, *, keep_bf16: bool = False) -> RAE:
    """The RAE without its encoder; `keep_bf16` as in `load_strictly`. Raises CheckpointError."""
    tensors = read_tensors(path)
    with torch.device("meta"):
        rae = RAE(
            config.decoder,
            image_mean=config.image_mean,
            image_std=config.image_std,
            has_mean="latents_mean" in tensors,
        )
    statistics = {key: tensors.pop(key) for key in STATISTICS if key in tensors}
    missing = {"latents_var", "eps"} - statistics.keys()
    if missing:
        raise CheckpointError(f"{path}: missing {', '.join(sorted(missing))}")
    for key, value in statistics.items():
        shape = getattr(rae, key).shape
        try:
            # Statistics may be per channel: whatever broadcasts to the latents' shape.
            value = value.float().broadcast_to(shape)
        except RuntimeError as error:
            raise CheckpointError(
                f"{path}: {key} {tuple(value.shape)} for {tuple(shape)}"
            ) from error
        setattr(rae, key, value)
    load_strictly(rae.decoder, tensors, path, keep_bf16=keep_bf16)
    return rae.eval().requires_grad_(False)


@contextmanager
def checked(config: AutoencoderConfig, folder: Path, *, with_encoder: bool) -> Iterator[None]:
    """Hash the files beside what is done meanwhile; raises CheckpointError at the end.

    An image names its checkpoint by these hashes: other weights may not pass for it.
    """
    names = [name for name in config.sha256 if with_encoder or not name.startswith("encoder/")]
    with ThreadPoolExecutor(thread_name_prefix="sha256") as pool:
        problems = pool.map(lambda name: file_problem(folder / name, config.sha256[name]), names)
        yield
        for problem in problems:
            if problem:
                raise CheckpointError(problem)

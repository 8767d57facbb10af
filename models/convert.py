"""`rae convert`: published files to a checkpoint folder.

One tensor at a time goes from the mapped source to the disk, so the peak memory is one source
file and little more.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from rae.models.checkpoint import (
    DECODER_FILE,
    DIT_DH_FILE,
    GUIDE_FILE,
    STATISTICS,
    write_config,
)
from rae.models.checkpoint_config import AutoencoderConfig, CheckpointConfig, CheckpointError
from rae.models.decoder import Decoder
from rae.models.dit_dh import DiTDH
from rae.models.labels import imagenet_classes
from rae.models.pickled import is_legacy, read_state_dict
from rae.models.published import Network, Published, RAEWeights
from rae.models.staging import staging
from rae.models.tensor_files import file_sha256, matmul_weights, require_match, write_tensors
from rae.models.verify import record_fingerprints

StoredDtype = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NUM_IMAGENET_CLASSES = 1000
ENCODER_FILES = ("*.json", "*.safetensors")


def convert(
    published: Published,
    out: Path,
    *,
    dtype: StoredDtype = "fp32",
    classes: Sequence[str] | None = None,
    encoder: Path | None = None,
    notify: Callable[[str], None] = lambda _: None,
) -> AutoencoderConfig:
    """Write the checkpoint folder `out`, whole or not at all; returns its configuration.

    `dtype` is that of the matrix products' weights; all else stays fp32. `classes`
    are ImageNet's names where there are 1,000 and none are given. `encoder` is a transformers
    folder to copy. Raises CheckpointError that says in one line what is wrong.
    """
    missing = [str(file) for file in published.files if not file.is_file()]
    if missing:
        raise CheckpointError(f"missing: {', '.join(missing)} (--root says where they lie)")
    networks = [network for network in (published.dit_dh, published.guide) if network]
    for file in published.files:
        if is_legacy(file):
            notify(f"{file} is of a format that cannot be mapped: it is read into memory whole")
    if published.dit_dh and classes is not None:
        require_names(classes, published.dit_dh.config.num_classes)
    for network in networks:
        if not is_legacy(network.file):
            _read_network(network)
    if encoder is not None:
        require_transformers_folder(encoder)
    with staging(out) as folder, named(folder, out):
        notify("RAE decoder and statistics")
        config = _write_rae(published, folder, DTYPES[dtype])
        for network, name in ((published.dit_dh, DIT_DH_FILE), (published.guide, GUIDE_FILE)):
            if network is not None:
                notify(f"{name.removesuffix('.safetensors')}: {'/'.join(network.file.parts[-2:])}")
                sha256 = _write_network(network, folder / name, DTYPES[dtype])
                config = replace(config, sha256={**config.sha256, name: sha256})
        if published.dit_dh is not None:
            config = _with_dit_dh(config, published, published.dit_dh, classes)
        if encoder is not None:
            _copy_encoder(encoder, folder / "encoder")
        write_config(folder, config)
        # Every network is loaded for it, an encoder as well, and strictly.
        notify("Fingerprints: one evaluation of each network")
        return record_fingerprints(folder)


@contextmanager
def named(folder: Path, out: Path) -> Iterator[None]:
    """Errors name the folder that was asked for, not the one that is gone by then."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(folder), str(out))) from error


def stored_dtypes(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """`dtype` for what matrix products multiply and add, fp32 for norms, tables and embeddings:
    served in bf16, a folder of either kind gives the same bytes."""
    matmuls = matmul_weights(model)
    return {name: dtype if name in matmuls else torch.float32 for name in model.state_dict()}


def require_names(classes: Sequence[str], count: int) -> None:
    if len(classes) != count:
        raise CheckpointError(f"{len(classes)} class names for num_classes {count}")


def _read_network(network: Network) -> tuple[DiTDH, dict[str, Tensor]]:
    """The model on the meta device and its tensors, mapped. Raises CheckpointError."""
    with torch.device("meta"):
        model = DiTDH(network.config)
    tensors = read_state_dict(network.file, "a DiT^DH")
    require_match(model.state_dict(), tensors, network.file)
    return model, tensors


def _write_network(network: Network, path: Path, dtype: torch.dtype) -> str:
    model, tensors = _read_network(network)
    return _write_tensors(model, tensors, network.file, path, dtype)


def _write_tensors(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    source: Path,
    path: Path,
    dtype: torch.dtype,
    statistics: Mapping[str, Tensor] | None = None,
) -> str:
    statistics = statistics or {}
    dtypes = stored_dtypes(model, dtype) | dict.fromkeys(statistics, torch.float32)
    try:
        return write_tensors(path, {**tensors, **statistics}, dtypes)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error


def _write_rae(published: Published, folder: Path, dtype: torch.dtype) -> AutoencoderConfig:
    source = published.autoencoder.files[0]
    weights = published.autoencoder.read()
    statistics = _checked_statistics(weights, published.autoencoder.files[-1])
    with torch.device("meta"):
        decoder = Decoder(weights.decoder)
    tensors = {key: value for key, value in weights.tensors.items() if key not in STATISTICS}
    require_match(decoder.state_dict(), tensors, source)
    sha256 = _write_tensors(decoder, tensors, source, folder / DECODER_FILE, dtype, statistics)
    if weights.encoder_tensors:
        (folder / "encoder").mkdir()
        write_tensors(folder / "encoder" / "model.safetensors", weights.encoder_tensors)
        encoder_config = json.dumps(weights.encoder_config, indent=1)
        (folder / "encoder" / "config.json").write_text(encoder_config)
    sources = {"/".join(file.parts[-2:]): file_sha256(file) for file in published.files}
    return AutoencoderConfig(
        name=published.name,
        decoder=weights.decoder,
        encoder=weights.encoder,
        image_mean=weights.image_mean,
        image_std=weights.image_std,
        source=published.source,
        license=published.license,
        sha256={DECODER_FILE: sha256},
        notes={"converted_from": sources},
    )


def _checked_statistics(weights: RAEWeights, source: Path) -> dict[str, Tensor]:
    """The statistics, which may have the latents' shape or any that broadcasts to it."""
    config = weights.decoder
    shape = (config.latent_channels, config.grid, config.grid)
    statistics = {key: weights.tensors[key] for key in STATISTICS if key in weights.tensors}
    for key, value in statistics.items():
        if value.dtype not in (torch.float32, torch.bfloat16):
            raise CheckpointError(f"{source}: {key} is {value.dtype}, expected torch.float32")
        wanted = () if key == "eps" else shape
        squeezed = value[0] if value.ndim == 4 and len(value) == 1 else value
        try:
            squeezed.broadcast_to(wanted)
        except RuntimeError as error:
            raise CheckpointError(
                f"{source}: {key} is {list(value.shape)}, expected {list(wanted)} or what "
                "broadcasts to it"
            ) from error
        statistics[key] = squeezed
    low = float((statistics["latents_var"].double() + statistics["eps"].double()).min())
    if not low > 0:
        raise CheckpointError(f"{source}: the smallest variance, {low}, is not positive")
    return statistics


def _with_dit_dh(
    config: AutoencoderConfig,
    published: Published,
    dit_dh: Network,
    classes: Sequence[str] | None,
) -> CheckpointConfig:
    count = dit_dh.config.num_classes
    if classes is None:
        is_imagenet = count == NUM_IMAGENET_CLASSES
        classes = imagenet_classes() if is_imagenet else [f"class {i}" for i in range(count)]
    try:
        return CheckpointConfig(
            **vars(config),
            dit_dh=dit_dh.config,
            guide=published.guide.config if published.guide else None,
            classes=tuple(classes),
            shift=published.shift,
            defaults=published.defaults,
        )
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def require_transformers_folder(folder: Path) -> None:
    """Before gigabytes are written. Raises CheckpointError."""
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} is no transformers folder: config.json and *.safetensors are wanted"
        )
    if find_spec("transformers") is None:
        raise CheckpointError("encoders need transformers: pip install 'rae-server[train]'")


def _copy_encoder(source: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # diffusers' own
    folder.mkdir()
    for pattern in ENCODER_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)

"""State dicts of `.pt` files: mapped where they can be, never executed (`weights_only`)."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rae.models.checkpoint_config import CheckpointError
from rae.models.tensor_files import read_tensors

GIT_LFS = b"version https://git-lfs"
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
KINDS = {  # a tensor that tells what a file holds
    "x_embedder.proj.weight": "a DiT^DH",
    "decoder_embed.weight": "an RAE decoder",
    "var": "latent statistics",
}


def is_legacy(path: Path) -> bool:
    """Whether a file is of `torch.save`'s format before 1.6, which cannot be memory-mapped."""
    with path.open("rb") as file:
        return file.read(len(LEGACY)) == LEGACY


def read_state_dict(path: Path, kind: str) -> dict[str, Tensor]:
    """The tensors of a flat state dict, or of the `ema` weights of a training checkpoint.

    `kind` is one of KINDS' values, for the message. Prefixes of wrapped models are stripped, and
    a whole RAE's decoder is taken out of it. Raises CheckpointError in one line.
    """
    values = read_pickled(path)
    if "ema" in values:
        values = values["ema"]
    elif "model" in values and not isinstance(values["model"], Tensor):
        raise CheckpointError(f"{path} holds 'model' but no 'ema' weights; the ema ones are needed")
    items = _items(path, values)
    tensors = {_stripped(key): value for key, value in items}
    if len(tensors) != len(items):
        raise CheckpointError(f"{path} holds some names twice, with and without {PREFIXES}")
    if kind == KINDS["decoder_embed.weight"] and "decoder.decoder_embed.weight" in tensors:
        inside = "decoder."
        tensors = {k.removeprefix(inside): v for k, v in tensors.items() if k.startswith(inside)}
    found = [name for key, name in KINDS.items() if key in tensors]
    if kind not in found:
        other = found[0] if found else f"neither that nor another known kind: {_first(tensors)}"
        raise CheckpointError(f"{path} should hold {kind}; it holds {other}")
    require_plain(tensors, path)
    return tensors


def require_plain(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A compressed layout or another device has no bytes to copy: raises CheckpointError."""
    for key, value in tensors.items():
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise CheckpointError(f"{path}: {key} is not a plain tensor on the CPU")


def read_pickled(path: Path) -> Mapping[str, Any]:
    """The mapping that a file holds. Raises CheckpointError; nothing of the file is executed."""
    if path.suffix == ".safetensors":
        return read_tensors(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(GIT_LFS):
        raise CheckpointError(f"{path} is git-lfs' pointer to a file, not the file itself")
    is_zip = zipfile.is_zipfile(path)
    if not start or (start.startswith(b"PK") and not is_zip):
        raise CheckpointError(f"{path} is {'truncated' if start else 'empty'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols; what matters is raised
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is no file of tensors alone, and nothing of it was executed: {_reason(error)}"
        ) from error
    except Exception as error:  # what unpickling hostile bytes raises has no bound
        raise CheckpointError(
            f"{path} is truncated or not a torch file: {_reason(error)}"
        ) from error
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{path} holds {type(values).__name__}, not named tensors")
    return values


def _items(path: Path, values: Any) -> list[tuple[str, Tensor]]:  # noqa: ANN401
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{path}: its weights are {type(values).__name__}, no mapping")
    for key, value in values.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise CheckpointError(f"{path}: {key!r} is {kind}, where only tensors are expected")
    return list(values.items())


def _stripped(key: str) -> str:
    while key.startswith(PREFIXES):
        key = key.partition(".")[2]
    return key


def _first(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(list(tensors)[:3]) or "nothing"


def _reason(error: Exception) -> str:
    """What can be used of torch's message, which goes on with advice to switch the check off."""
    text = " ".join(str(error).split()) or type(error).__name__
    refused = re.search(r"(?i)unsupported (global: )?(global|operand|class) [\w.]+", text)
    return refused[0] if refused else text.partition(". ")[0][:200]

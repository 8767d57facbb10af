"""safetensors files that are there when they are whole, with facts about them inside."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

KEY = "facts"  # one key: the order of several is not always the same


class DamagedError(ValueError):
    """A file that is no whole safetensors file."""


def write_whole(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    """Write and name the file when it is on the disk; returns its sha256.

    Raises OSError, and leaves no part of a file, where it cannot be written; ValueError for values
    that are not finite.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise ValueError(
                f"{name} of {path.name}: {count} of {tensor.numel()} values are not finite in "
                f"{str(tensor.dtype).removeprefix('torch.')}"
            )
    partial = path.with_suffix(".tmp")
    try:
        packed = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(packed, partial, {KEY: json.dumps(facts, sort_keys=True)})
        partial.chmod(0o644)  # safetensors leaves a file readable by its owner alone
        with partial.open("rb") as file:
            os.fsync(file.fileno())
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        partial.replace(path)
    except SafetensorError as error:  # of a full disk
        raise OSError(f"{path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return sha256


def read_facts(path: Path) -> dict[str, Any]:
    """Raises DamagedError, ValueError for a file that `write_whole` did not write, OSError for
    none."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {})[KEY])
    except SafetensorError as error:
        raise DamagedError(f"{path} is damaged: {error}") from error
    except KeyError as error:
        raise ValueError(f"{path} is not one of rae's own files of latents: {error}") from error


def write_text(path: Path, text: str) -> None:
    """As a whole, or not at all. Raises OSError."""
    partial = path.with_suffix(".tmp")
    try:
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

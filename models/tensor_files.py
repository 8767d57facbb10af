"""Files of named tensors: safetensors, read mapped and strictly, written as a stream."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rae.models.checkpoint_config import CheckpointError

SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
LISTED_PROBLEMS = 8


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, memory-mapped. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is truncated or not safetensors: {error}") from error


def read_fp32(path: Path) -> dict[str, Tensor]:
    """As `read_tensors`, in fp32 whatever is stored."""
    return {key: value.float() for key, value in read_tensors(path).items()}


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype] | None = None
) -> str:
    """Write tensors as safetensors, one at a time; returns the file's sha256.

    `dtypes` are fp32 or bf16, the tensors' own where it has none.

    safetensors' own writer copies every tensor before it writes the first: 2 × the file. Raises
    CheckpointError, and leaves no file, where a value is not finite.
    """
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()} | dict(dtypes or {})
    for name, dtype in dtypes.items():
        if dtype not in SAFETENSORS_NAMES:
            raise CheckpointError(f"{name} is {dtype}, not torch.float32 or torch.bfloat16")
    names = sorted(tensors, key=lambda name: (-dtypes[name].itemsize, name))  # fp32 stays aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].numel() * dtypes[name].itemsize
        header[name] = {
            "dtype": SAFETENSORS_NAMES[dtypes[name]],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    sha256 = hashlib.sha256()
    # Not in place: the tensors may be mapped from the very file that is replaced.
    written = path.with_suffix(".tmp")
    try:
        with written.open("wb") as file:
            for chunk in (len(data).to_bytes(8, "little"), data):
                sha256.update(chunk)
                file.write(chunk)
            for name in names:
                tensor = tensors[name].detach().cpu().to(dtypes[name])
                count = int((~tensor.isfinite()).sum())
                if count:
                    raise CheckpointError(
                        f"{name}: {count} of {tensor.numel()} values are not finite"
                    )
                raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
                sha256.update(raw)
                file.write(raw)
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)
    return sha256.hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_problem(path: Path, recorded: str) -> str | None:
    """Why a file is not the one whose sha256 is recorded, or None."""
    if not path.is_file():
        return f"{path} is missing"
    actual = file_sha256(path)
    return (
        None if actual == recorded else f"{path} has sha256 {actual}, config.json says {recorded}"
    )


def load_strictly(
    model: nn.Module, tensors: Mapping[str, Tensor], path: Path, *, keep_bf16: bool = False
) -> None:
    """Assign `tensors` to a (meta-device) model, in fp32; raises what `require_match` raises.

    With `keep_bf16`, matmul weights that are stored in bf16 stay so, mapped: for autocast.
    """
    require_match(model.state_dict(), tensors, path)
    kept = matmul_weights(model) if keep_bf16 else set()
    model.load_state_dict(
        {key: value if key in kept else value.float() for key, value in tensors.items()},
        assign=True,
    )
    model.eval().requires_grad_(False)


def matmul_weights(model: nn.Module) -> set[str]:
    """Names of the weights and biases of matmuls: what is stored, and kept, in bf16."""
    return {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        for key in ("weight", "bias")
    }


def require_match(
    expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path
) -> None:
    """Raises CheckpointError that lists missing, unexpected and misshapen tensors, and those
    that are not fp32 or bf16; `path` is for the message."""
    both = [key for key in expected if key in tensors]
    problems = [
        *listed("missing", [f"{key} {_shape(expected[key])}" for key in expected.keys() - both]),
        *listed("unexpected", [f"{key} {_shape(tensors[key])}" for key in tensors.keys() - both]),
        *listed(
            "misshapen",
            [
                f"{key} is {_shape(tensors[key])}, expected {_shape(expected[key])}"
                for key in both
                if tensors[key].shape != expected[key].shape
            ],
        ),
        *(
            problem
            for dtype in {tensors[key].dtype for key in both} - SAFETENSORS_NAMES.keys()
            for problem in listed(
                f"{str(dtype).removeprefix('torch.')}, not float32 or bfloat16",
                [key for key in both if tensors[key].dtype == dtype],
            )
        ),
    ]
    if problems:
        raise CheckpointError(f"{path}: {'; '.join(problems)}")


def listed(kind: str, entries: list[str]) -> list[str]:
    """No sentence for no entries, else one that counts them and names the first."""
    if not entries:
        return []
    more = len(entries) - LISTED_PROBLEMS
    shown = ", ".join(sorted(entries)[:LISTED_PROBLEMS]) + (f" and {more} more" if more > 0 else "")
    return [f"{len(entries)} {kind}: {shown}"]


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)

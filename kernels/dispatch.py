"""Which implementation of an op runs: our Triton kernel, a library's, or the plain reference.

With kernels="auto" a table decides, by op and shape; a GPU has its own where `rae tune` measured
it (tuning/NVIDIA_H200.json), else that of its architecture (tuning/sm_90.json), which is no
measurement: a kernel is chosen there only where it saves passes over memory. Nothing is tuned
while requests wait.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from rae.kernels.lang import HAS_TRITON, interprets

Kernels = Literal["auto", "triton", "library", "reference"]
Choice = Literal["triton", "library", "cudnn", "flash", "flash-attn", "reference"]
Attention = Literal["auto", "triton", "library", "cudnn", "flash", "flash-attn", "reference"]
OPS = ("adaln", "swiglu", "attention", "guided_euler")

TABLES = Path(__file__).parent / "tuning"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """What runs for an op's shapes that agree with `dims`; "rows" is the largest of its bucket.

    `config` is our kernel's tile, warps and stages, also where another implementation is chosen.
    `p50_us` are the medians that decided, in microseconds; empty in a table that is not measured.
    """

    op: str
    dtype: str
    dims: Mapping[str, int]
    choice: Choice
    config: Mapping[str, int]
    p50_us: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ValueError(f"op {self.op!r} is not one of {', '.join(OPS)}")
        if self.choice not in get_args(Choice):
            raise ValueError(f"choice {self.choice!r} is not one of {', '.join(get_args(Choice))}")

    def agrees(self, op: str, dtype: str, dims: Mapping[str, int]) -> bool:
        return (self.op, self.dtype) == (op, dtype) and all(
            dims[name] == size for name, size in self.dims.items() if name != "rows"
        )

    def distance(self, rows: int) -> tuple[int, bool, int]:
        """Sorts the entries that agree: the most exact, then the smallest bucket that holds."""
        bucket = self.dims.get("rows", 2**62)
        return -len(self.dims.keys() - {"rows"}), bucket < rows, abs(bucket - rows)


@dataclass(frozen=True)
class Table:
    """The entries of one GPU or architecture. `measured` says on what and when, if it was."""

    name: str
    entries: tuple[Entry, ...]
    measured: Mapping[str, str] | None = None

    @classmethod
    def read(cls, path: Path) -> Table:
        """Raises ValueError for a file that is no table."""
        try:
            values: dict[str, Any] = json.loads(path.read_text())
            entries = tuple(Entry(**entry) for entry in values["entries"])
            return cls(path.stem, entries, values["measured"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is not a tuning table: {error!r}") from error

    def find(self, op: str, dtype: str, dims: Mapping[str, int]) -> Entry:
        """Raises ValueError where no entry agrees: a table ends with one per op for any shape."""
        entries = [entry for entry in self.entries if entry.agrees(op, dtype, dims)]
        if not entries:
            raise ValueError(f"tuning table {self.name} has nothing for {op} in {dtype}, {dims}")
        return min(entries, key=lambda entry: entry.distance(dims["rows"]))


@dataclass(frozen=True)
class Selection:
    choice: Choice
    config: Mapping[str, int]


# What was selected in this process, for /info: op, dtype and dims to choices.
_selected: dict[str, set[str]] = {}


def selected() -> dict[str, list[str]]:
    """The implementations that ops of this process took, by op and shape."""
    return {key: sorted(choices) for key, choices in sorted(_selected.items())}


def check_kernels(kernels: str, attention: str, device: torch.device) -> None:
    """Raises ValueError where what a user asks for is unknown or cannot run on `device`."""
    if kernels not in get_args(Kernels):
        raise ValueError(f"kernels {kernels!r} is not one of {', '.join(get_args(Kernels))}")
    if attention not in get_args(Attention):
        raise ValueError(f"attention {attention!r} is not one of {', '.join(get_args(Attention))}")
    for name, value in (("kernels", kernels), ("attention", attention)):
        if value == "triton" and not can_launch(device.type):
            raise ValueError(
                f"{name} 'triton' cannot run on {device.type!r}: it takes a CUDA GPU, or a CPU "
                "with TRITON_INTERPRET=1, where it is slow; allowed here: auto, library, reference"
            )
    if attention in ("cudnn", "flash", "flash-attn") and device.type != "cuda":
        raise ValueError(f"attention {attention!r} takes a CUDA GPU, not {device.type!r}")
    if attention not in ("auto", "library") and device.type != "cuda":
        if kernels in ("auto", "library"):
            raise ValueError(
                f"attention {attention!r} on {device.type!r} goes with kernels triton or "
                f"reference, not {kernels!r}, which has its own there"
            )


def can_launch(device_type: str) -> bool:
    return HAS_TRITON and (device_type == "cuda" or (device_type == "cpu" and interprets()))


def select(op: str, x: torch.Tensor, kernels: str, **dims: int) -> Selection:
    """What runs for an op on tensors like `x`. dims: "rows", which are bucketed, and the others.

    `kernels` is one of `Kernels`, or a `Choice`. Raises ValueError where it cannot run there.
    """
    return _select(op, x.dtype, x.device, kernels, tuple(dims.items()))


@cache
def _select(
    op: str,
    dtype: torch.dtype,
    device: torch.device,
    kernels: str,
    sizes: tuple[tuple[str, int], ...],
) -> Selection:
    dims, dtype_name = dict(sizes), str(dtype).removeprefix("torch.")
    if kernels == "auto" and not (device.type == "cuda" and HAS_TRITON):
        kernels = "library" if device.type == "cuda" else "reference"
    if kernels in ("auto", "triton"):
        if not can_launch(device.type):
            raise ValueError(f"{op}: Triton cannot run on {device.type!r} here")
        entry = table_of(device).find(op, dtype_name, dims)
        choice = entry.choice if kernels == "auto" else "triton"
        selection = Selection(choice, entry.config)
    else:
        selection = Selection(kernels, {})  # type: ignore[arg-type]
    shape = " ".join(f"{name} {size}" for name, size in dims.items() if name != "rows")
    choices = _selected.setdefault(f"{op} {dtype_name} {shape}".strip(), set())
    if selection.choice not in choices:
        choices.add(selection.choice)
        logger.info("%s, %s, %s: %s", op, dtype_name, shape or "any shape", selection.choice)
    return selection


@cache
def table_of(device: torch.device) -> Table:
    """The tuning table for a device; interpreted kernels have large blocks, as each program and
    each of its operations takes a tenth of a millisecond whatever its size."""
    if device.type != "cuda":
        return Table.read(TABLES / "interpreted.json")
    measured = TABLES / f"{gpu_file_stem(device)}.json"
    if measured.exists():
        return Table.read(measured)
    return Table.read(TABLES / f"{architecture(torch.cuda.get_device_capability(device))}.json")


def gpu_file_stem(device: torch.device) -> str:
    return torch.cuda.get_device_name(device).replace(" ", "_").replace("/", "_")


def architecture(capability: tuple[int, int]) -> str:
    """The table for GPUs without their own. sm_80's tiles fit the 99 KB of consumer GPUs too."""
    return {9: "sm_90", 10: "sm_100"}.get(capability[0], "sm_80")

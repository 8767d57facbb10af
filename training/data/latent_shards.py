"""Latents that were encoded before: a folder of safetensors shards and its index.json.

A shard holds `latents` (n, C, h, w), `class_labels` (n,), `indices` (n,) of the images in their
data set, and where both flips were encoded `flipped`, the latents of the mirrored images. They are
raw: their statistics' normalisation is up to who reads them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rae.models.config import from_dict
from rae.models.tensor_files import file_sha256
from rae.training.data.samples import Sample
from rae.training.data.tensor_writing import write_text
from rae.training.data.transforms import is_flipped

INDEX_FILE = "index.json"
FORMAT_VERSION = 1
MEND = "`rae train encode`, as it was called, makes it again"


class ShardEntry(NamedTuple):
    """A shard's file, its rows and sha256, and how many of its images could not be read."""

    file: str
    num_rows: int
    num_skipped: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class LatentIndex:
    """What index.json says. `encoder` and `dataset` are the facts that tell them from others;
    `image_size` is of the images that were encoded; `dtype` is how latents are stored;
    `class_names` are none where the data set has no names."""

    latent_shape: tuple[int, int, int]
    image_size: int
    has_flips: bool
    dtype: str
    shard_size: int
    num_images: int
    num_classes: int
    encoder: Mapping[str, Any]
    dataset: Mapping[str, Any]
    class_names: tuple[str, ...] = ()
    shards: tuple[ShardEntry, ...] = ()

    @property
    def facts(self) -> dict[str, Any]:
        """What every shard says, as JSON has it; `dataset` stands for the classes' names."""
        values = asdict(self)
        del values["shards"], values["class_names"]
        return json.loads(json.dumps(values))

    def write(self, folder: Path) -> None:
        values = {"format_version": FORMAT_VERSION, **asdict(self)}
        values["shards"] = [entry._asdict() for entry in self.shards]
        write_text(folder / INDEX_FILE, json.dumps(values, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> LatentIndex:
        """Raises ValueError where there is none, or one of another format."""
        path = folder / INDEX_FILE
        if not path.is_file():
            raise ValueError(f"{folder} holds no {INDEX_FILE}: `rae train encode` did not end")
        try:
            values = json.loads(path.read_text())
            version = values.pop("format_version")
            if version != FORMAT_VERSION:
                raise ValueError(f"format_version {version!r}, this reads {FORMAT_VERSION}")
            values["latent_shape"] = tuple(values["latent_shape"])
            values["class_names"] = tuple(values.get("class_names", ()))
            values["shards"] = tuple(ShardEntry(**entry) for entry in values["shards"])
            return from_dict(cls, values)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is damaged ({error}): remove it, then {MEND}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: {error}") from error


class LatentShards:
    """Samples of a folder that `rae train encode` wrote, read from the mapped files, in fp32.

    Where both flips were encoded, a position has the one that the image itself would have had.
    Raises ValueError for a folder that is not whole, by the sizes of its files: their bytes are
    only hashed by `verify`, where all of them are read anyway.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = LatentIndex.read(folder)
        self._ends = np.cumsum([entry.num_rows for entry in self.index.shards])
        for entry in self.index.shards:
            path = folder / entry.file
            size = path.stat().st_size if path.is_file() else None
            if size != entry.num_bytes:
                found = "missing" if size is None else f"{size} bytes"
                raise ValueError(
                    f"{path} is {found}, {INDEX_FILE} says {entry.num_bytes} bytes: {MEND}"
                )

    @property
    def field(self) -> Literal["latents"]:
        return "latents"

    @property
    def num_classes(self) -> int:
        return self.index.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.index.class_names

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, index: int) -> str:
        shard, row = self._place(index)
        return f"row {row} of {self.folder / self.index.shards[shard].file}"

    def load(self, index: int, seed: int, position: int) -> Sample:
        shard, row = self._place(index)
        flipped = self.index.has_flips and is_flipped(seed, position)
        name = "flipped" if flipped else "latents"
        rows = slice(row, row + 1)
        (latents,), (class_label,) = self._read(shard, (name, "class_labels"), rows)
        return Sample(latents.float(), int(class_label))

    def chunks(self, shard: int, num_rows: int, *, has_flips: bool) -> Iterator[Tensor]:
        """All latents of a shard, and with `has_flips` those of the mirrored images, in batches
        (b, C, h, w) of up to `num_rows`."""
        names = ("latents", "flipped") if has_flips else ("latents",)
        for start in range(0, self.index.shards[shard].num_rows, num_rows):
            yield from self._read(shard, names, slice(start, start + num_rows))

    def verify(self, shard: int) -> None:
        """Raises ValueError where the shard's sha256 is not the recorded one."""
        entry = self.index.shards[shard]
        path = self.folder / entry.file
        sha256 = file_sha256(path)
        if sha256 != entry.sha256:
            raise ValueError(
                f"{path} has sha256 {sha256}, {INDEX_FILE} says {entry.sha256}: {MEND}"
            )

    def _place(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard - 1] if shard else 0)

    def _read(self, shard: int, names: tuple[str, ...], rows: slice) -> list[Tensor]:
        path = self.folder / self.index.shards[shard].file
        try:
            with safe_open(path, "pt") as file:
                return [file.get_slice(name)[rows] for name in names]
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error

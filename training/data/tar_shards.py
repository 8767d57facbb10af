"""webdataset's tar shards, read at random: an index says where in which file an image lies."""

from __future__ import annotations

import hashlib
import logging
import os
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from secrets import token_hex
from typing import NamedTuple

import numpy as np

from rae.models.cache import cache_folder
from rae.training.locking import held_if_possible

logger = logging.getLogger(__name__)

SUFFIXES = ("jpg", "jpeg", "png", "webp")
NO_LABEL = -1


class Entry(NamedTuple):
    """An image in a shard: its key, where its bytes are, and what its .cls says."""

    key: bytes
    offset: int
    size: int
    class_label: int


class TarShards:
    """The images of `shards`, in the order of the list and of the files.

    Files of one sample share their name up to the first dot: an image and, for its label, .cls.
    Without any .cls all labels are 0. The index is kept in `cache` and made anew when a shard's
    size or date is another. Raises ValueError for what is no such tar file.
    """

    def __init__(self, shards: Sequence[Path], cache: Path | None = None) -> None:
        self.shards = [path.absolute() for path in shards]
        index = load_index(self.shards, cache or cache_folder())
        self._keys, self._offsets, self._sizes = index["key"], index["offset"], index["size"]
        self._shard = np.repeat(np.arange(len(shards)), index["count"])
        self.class_labels = index["class_label"]
        self.class_names: tuple[str, ...] = ()
        if not len(self):
            raise ValueError(f"{self.shards[0].parent}: no image in {len(shards)} tar files")
        unlabelled = np.flatnonzero(self.class_labels == NO_LABEL)
        if len(unlabelled) == len(self):
            self.class_labels = np.zeros_like(self.class_labels)
        elif len(unlabelled):
            name = self.name(unlabelled[0])
            raise ValueError(f"{len(unlabelled)} of {len(self)} images have no .cls, as {name}")

    def __len__(self) -> int:
        return len(self._keys)

    def name(self, index: int) -> str:
        return f"{self.shards[self._shard[index]]}:{os.fsdecode(self._keys[index].item())}"

    def read(self, index: int) -> bytes:
        # Opened each time: no descriptor is shared with a forked process, none runs out.
        with self.shards[self._shard[index]].open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), int(self._sizes[index]), int(self._offsets[index]))
        if len(data) < self._sizes[index]:
            raise OSError(f"the shard ends after {len(data)} of {self._sizes[index]} bytes")
        return data


def load_index(shards: Sequence[Path], cache: Path) -> dict[str, np.ndarray]:
    """Arrays of `Entry`'s fields, and `count` of each shard; from `cache` where they hold."""
    stats = [path.stat() for path in shards]
    state = np.array([(stat.st_size, stat.st_mtime_ns) for stat in stats])
    cache.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256("\0".join(map(str, shards)).encode(errors="replace")).hexdigest()[:16]
    path = cache / f"tar-index-{name}.npz"
    # One process of a machine makes it, the others wait.
    unprotected = "each process that finds no index makes one, and the last one's stays"
    with (
        path.with_suffix(".lock").open("w") as lock,
        held_if_possible(lock, wait=True, unprotected=unprotected),
    ):
        index = read_index(path, state)
        if index is None:
            logger.info("indexing %d tar files into %s", len(shards), path)
            index = {"state": state, **make_index(shards)}
            partial = path.with_suffix(f".{token_hex(8)}.tmp")  # a pid is also another machine's
            with partial.open("wb") as file:
                np.savez(file, **index)  # type: ignore[arg-type]
            partial.replace(path)
    return index


def read_index(path: Path, state: np.ndarray) -> dict[str, np.ndarray] | None:
    """None where there is none, or one of other files."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            index = dict(arrays)
        return index if np.array_equal(index["state"], state) else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def make_index(shards: Sequence[Path]) -> dict[str, np.ndarray]:
    found = [index_shard(path) for path in shards]
    entries = [entry for shard in found for entry in shard]
    return {
        "count": np.array([len(shard) for shard in found]),
        "key": np.array([entry.key for entry in entries], dtype=np.bytes_),
        "offset": np.array([entry.offset for entry in entries], dtype=np.int64),
        "size": np.array([entry.size for entry in entries], dtype=np.int64),
        "class_label": np.array([entry.class_label for entry in entries], dtype=np.int64),
    }


def index_shard(path: Path) -> list[Entry]:
    """Raises ValueError that names the file."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, slash, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                key = folder + slash + stem
                if not member.isfile():
                    continue
                if suffix.lower() in SUFFIXES:
                    if key in images:
                        raise ValueError(f"{path}: {key} has two images")
                    images[key] = member
                elif suffix == "cls":
                    labels[key] = read_label(archive, member, path)
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no whole, uncompressed tar file: {error}") from error
    return [
        Entry(os.fsencode(key), member.offset_data, member.size, labels.get(key, NO_LABEL))
        for key, member in images.items()
    ]


def read_label(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> int:
    file = archive.extractfile(member)
    assert file is not None  # it is a plain file
    text = file.read(32)
    if not text.strip().isdigit():
        raise ValueError(f"{path}: {member.name} is {text!r}, not a class's number")
    return int(text)

"""Data sets of image files: folders of classes, plain folders, webdataset's tar shards."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from rae.training.data.tar_shards import TarShards

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class ImageSource(Protocol):
    """Image files by their number. Small to pickle: each worker of a loader gets a copy."""

    class_labels: np.ndarray  # (N,) int64
    class_names: tuple[str, ...]  # none of images without classes, and of tar files

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def read(self, index: int) -> bytes:
        """The file as it is. Raises OSError."""
        ...


class ImageFolder:
    """ROOT/class/…/image in torchvision's order, or a folder of images without classes, label 0.

    Raises ValueError for a folder without images, a class without, and images beside classes.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        folders = sorted(
            entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != "."
        )
        images = sorted(name for name in os.listdir(root) if is_image(name))
        if images and folders:
            raise ValueError(f"{root} holds images, {images[0]}, beside folders, {folders[0]}")
        self.class_names: tuple[str, ...] = tuple(folders)
        found = [list(images_below(root, name)) for name in folders] or [images]
        empty = [name for name, files in zip(folders, found, strict=False) if not files]
        if empty or not any(found):
            where = f"{root}: no images in {', '.join(empty[:5])}" if empty else f"{root}: no image"
            raise ValueError(f"{where}; known are {', '.join(SUFFIXES)}")
        # One block of bytes: a list of a million strings would be copied by every worker.
        self._names = np.array([os.fsencode(name) for files in found for name in files])
        self.class_labels = np.repeat(np.arange(len(found)), [len(files) for files in found])

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return os.fsdecode(self._names[index].item())

    def read(self, index: int) -> bytes:
        return (self.root / self.name(index)).read_bytes()


def is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def images_below(root: Path, folder: str) -> Iterator[str]:
    """Paths from `root` on, folder by folder."""
    for parent, _, names in sorted(os.walk(root / folder, followlinks=True)):
        relative = os.path.relpath(parent, root)
        yield from (os.path.join(relative, name) for name in sorted(names) if is_image(name))


def open_dataset(path: str | Path, cache: Path | None = None) -> ImageSource:
    """What lies at `path`: a folder of images or of .tar files, one .tar file, or a pattern of
    such. `cache` is where the tar files' index is kept.

    Raises ValueError where there is nothing of this kind.
    """
    path = Path(path)
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
        return TarShards(shards, cache) if shards else ImageFolder(path)
    shards = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(str(path)))]
    if not shards or any(shard.suffix != ".tar" for shard in shards):
        raise ValueError(
            f"no data set at {path}: it is a folder of images or of .tar files, a .tar file, or "
            "a pattern of such"
        )
    return TarShards(shards, cache)


def fingerprint(source: ImageSource) -> str:
    """A sha256 of the files' names and labels, in their order; not of what is in the files."""
    digest = hashlib.sha256()
    for index in range(len(source)):
        digest.update(
            f"{source.name(index)}\0{source.class_labels[index]}\n".encode(errors="replace")
        )
    return digest.hexdigest()

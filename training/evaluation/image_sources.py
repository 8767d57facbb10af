"""Images to be measured: the .npz of ADM's samplers, read as a stream, or a data set."""

from __future__ import annotations

import glob
import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from PIL import Image

from rae.models.reconstruct import center_crop
from rae.training.data.image_data import open_dataset
from rae.training.data.transforms import UnreadableError, decode

IMAGES = "arr_0"
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)


class Images(Protocol):
    """`num` images of `height` × `width` pixels; `fingerprint` changes with what they show."""

    path: Path
    num: int
    height: int
    width: int
    fingerprint: str

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """Up to `size` images (B, H, W, 3) uint8 at a time, in order."""
        ...


class NpzImages:
    """`arr_0` (N, H, W, 3) uint8 of an .npz, stored or compressed; never more than a batch is read.

    Raises ValueError in one line for a file that is none, or holds another array.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                infos = {info.filename: info for info in archive.infolist()}
                if f"{IMAGES}.npy" not in infos:
                    held = ", ".join(name.removesuffix(".npy") for name in infos) or "nothing"
                    raise ValueError(f"{path} holds {held}, but no images {IMAGES}")
                info = infos[f"{IMAGES}.npy"]
                with archive.open(info) as file:
                    shape = self._read_header(file)
        except DAMAGED as error:
            raise ValueError(f"{path} is not an .npz, or is cut short: {error}") from error
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}") from error
        self.num, self.height, self.width, _ = shape
        self.fingerprint = f"npz {info.CRC:08x} {info.file_size}"

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """As in `Images`. Raises ValueError where the file is damaged."""
        image_bytes = self.height * self.width * 3
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{IMAGES}.npy") as file:
            self._read_header(file)
            for first in range(0, self.num, size):
                count = min(size, self.num - first)
                try:
                    data = file.read(count * image_bytes)
                except DAMAGED as error:
                    raise ValueError(f"{self.path} is damaged: {error}") from error
                if len(data) != count * image_bytes:
                    raise ValueError(f"{self.path} is cut short after image {first:,}")
                pixels = np.frombuffer(data, dtype=np.uint8)
                yield pixels.reshape(count, self.height, self.width, 3)

    def _read_header(self, file: IO[bytes]) -> tuple[int, int, int, int]:
        try:
            version = np.lib.format.read_magic(file)
            if version == (1, 0):
                header = np.lib.format.read_array_header_1_0(file)
            else:
                header = np.lib.format.read_array_header_2_0(file)
        except ValueError as error:
            raise ValueError(f"{self.path}: {IMAGES} is no array: {error}") from error
        shape, is_fortran, dtype = header
        if shape[:1] == (0,):
            raise ValueError(f"{self.path}: {IMAGES} has no images, it is {dtype} {shape}")
        is_images = len(shape) == 4 and shape[3] == 3 and 0 not in shape
        if dtype != np.uint8 or is_fortran or not is_images:
            order = " in Fortran's order" if is_fortran else ""
            raise ValueError(
                f"{self.path}: {IMAGES} is {dtype} {shape}{order}; images are uint8 (N, H, W, 3)"
            )
        return shape[0], shape[1], shape[2], 3


class DatasetImages:
    """The images of a data set, as `open_dataset` finds them, cropped as in ADM to `size`.

    Without a size the first image's is taken, and another one is refused. Raises ValueError in one
    line for no data set and, when it is reached, for an image that cannot be read: a figure is of
    all images or of none.
    """

    def __init__(self, path: Path, size: int | None = None) -> None:
        self.path = path
        self.source = open_dataset(path)
        self.num = len(self.source)
        self._must_fit = size is None
        self.height = self.width = size or self._common_size()
        self.fingerprint = f"files {state_of_files(path)} {self.height}"

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """As in `Images`; the next batch is decoded while this one is used."""
        with ThreadPoolExecutor(thread_name_prefix="images") as pool:
            starts = range(0, self.num, size)
            upcoming = self._submit(pool, 0, size)
            for first in starts:
                current, upcoming = upcoming, self._submit(pool, first + size, size)
                yield np.stack([future.result() for future in current])

    def _submit(self, pool: ThreadPoolExecutor, first: int, size: int) -> list[Future[np.ndarray]]:
        return [pool.submit(self._read, i) for i in range(first, min(first + size, self.num))]

    def _common_size(self) -> int:
        width, height = self._picture(0, 1).size
        if width != height:
            raise ValueError(
                f"{self.source.name(0)} is {width} × {height} px: without a size to crop to, "
                "images are square"
            )
        return width

    def _read(self, index: int) -> np.ndarray:
        picture = self._picture(index, self.width)
        if self._must_fit and picture.size != (self.width, self.height):
            width, height = picture.size
            raise ValueError(
                f"{self.source.name(index)} is {width} × {height} px, {self.source.name(0)} is "
                f"{self.width} × {self.height}: without a size to crop to, images are of one size"
            )
        return np.asarray(center_crop(picture, self.width))

    def _picture(self, index: int, size: int) -> Image.Image:
        try:
            return decode(self.source.read(index), size)
        except (OSError, UnreadableError) as error:
            raise ValueError(f"{self.path}: {self.source.name(index)}: {error}") from error


def state_of_files(path: Path) -> str:
    """A sha256 of names, sizes and dates of a data set's files, which are not read."""
    if path.is_dir():
        walk = os.walk(path, followlinks=True)
        files = [os.path.join(parent, name) for parent, _, names in walk for name in names]
    else:
        files = [str(path)] if path.is_file() else glob.glob(str(path))
    digest = hashlib.sha256()
    for file in sorted(files):
        stat = os.stat(file)
        name = os.path.relpath(file, path)
        digest.update(f"{name}\0{stat.st_size} {stat.st_mtime_ns}\n".encode(errors="replace"))
    return digest.hexdigest()


def is_npz(path: Path) -> bool:
    """Or meant as one: neither a folder, nor a .tar file, nor a pattern of such."""
    return not (path.is_dir() or path.suffix == ".tar" or glob.has_magic(str(path)))


def open_images(path: Path, size: int | None = None) -> Images:
    """A data set, its images cropped to `size`, or an .npz, whose images must have it.

    Raises ValueError in one line.
    """
    if not is_npz(path):
        return DatasetImages(path, size)
    images = NpzImages(path)
    if size is not None and (images.height, images.width) != (size, size):
        raise ValueError(
            f"{path} has images of {images.width} × {images.height} px; wanted are {size} × {size}"
        )
    return images

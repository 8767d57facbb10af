"""Images to be measured: the .npz of ADM's samplers, read as a stream, or a folder of files."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from PIL import Image

from rae.models.reconstruct import read_picture

IMAGES = "arr_0"
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
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
        is_images = len(shape) == 4 and shape[3] == 3 and 0 not in shape
        if dtype != np.uint8 or is_fortran or not is_images:
            order = " in Fortran's order" if is_fortran else ""
            raise ValueError(
                f"{self.path}: {IMAGES} is {dtype} {shape}{order}; images are uint8 (N, H, W, 3)"
            )
        return shape


class FolderImages:
    """The image files below a folder, in the order of their paths, cropped as in ADM to `size`.

    Without a size the first file's is taken, and another one is refused. Raises ValueError in one
    line for no images and, when it is reached, for a file that cannot be read.
    """

    def __init__(self, path: Path, size: int | None = None) -> None:
        self.path = path
        self.files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not self.files:
            raise ValueError(f"{path} holds no images ({', '.join(sorted(SUFFIXES))})")
        self.num = len(self.files)
        self._must_fit = size is None
        self.height = self.width = size or self._common_size()
        stats = [(file, file.stat()) for file in self.files]
        listing = [
            f"{file.relative_to(path)} {stat.st_size} {stat.st_mtime_ns}" for file, stat in stats
        ]
        digest = hashlib.sha256("\n".join(listing).encode()).hexdigest()
        self.fingerprint = f"folder {digest} {self.height}"

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """As in `Images`."""
        files = iter(self.files)
        with ThreadPoolExecutor(thread_name_prefix="images") as pool:
            while chunk := list(islice(files, size)):
                yield np.stack(list(pool.map(self._read, chunk)))

    def _common_size(self) -> int:
        width, height = size_of(self.files[0])
        if width != height:
            raise ValueError(
                f"{self.files[0]} is {width} × {height} px: images that are not square are cropped "
                "with --size only"
            )
        return width

    def _read(self, file: Path) -> np.ndarray:
        if self._must_fit and size_of(file) != (self.width, self.height):
            width, height = size_of(file)
            raise ValueError(
                f"{file} is {width} × {height} px, {self.files[0].name} is {self.width} × "
                f"{self.height}: images of one size are wanted, or --size to crop them"
            )
        return read_picture(file, self.width)


def size_of(file: Path) -> tuple[int, int]:
    try:
        with Image.open(file) as image:
            return image.size
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is not an image that Pillow reads") from error

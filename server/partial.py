"""The working folder of `rae sample`, safe to kill at any moment, and the .npz made of it."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from zipfile import ZipFile, ZipInfo

import numpy as np
from rich.filesize import decimal

from rae.models.locks import held

IMAGES, DONE, SECONDS = "images.npy", "done.npy", "seconds.npy"
JOB, ARCHIVE, LOCK = "job.json", "archive.npz", "lock"
COPIED_BYTES = 1 << 22


class OutExistsError(ValueError):
    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path} exists and is never overwritten; move it, or choose another --out"
        )


class Partial:
    """`<out>.partial`: images by index, which of them are done, and the job they belong to.

    Any process of one machine may write any image; the done map is set once pixels are on disk.
    """

    def __init__(self, out: Path, lock: IO[str]) -> None:
        self.out, self.folder, self._lock = out, partial_folder(out), lock
        self.images = np.lib.format.open_memmap(self.folder / IMAGES, "r+")
        self.done = np.lib.format.open_memmap(self.folder / DONE, "r+")
        self.seconds = np.lib.format.open_memmap(self.folder / SECONDS, "r+")

    @property
    def missing(self) -> list[int]:
        return np.flatnonzero(self.done == 0).tolist()

    def write(self, indices: Sequence[int], images: Sequence[np.ndarray], seconds: float) -> None:
        """Keep images (H, W, 3) uint8 that took `seconds` together."""
        self.images[indices] = np.stack(images)
        self.seconds[indices] = seconds / len(indices)
        self.images.flush()
        self.seconds.flush()
        self.done[indices] = 1
        self.done.flush()

    def require_space(self) -> None:
        """Raises ValueError where the .npz has no room."""
        require_space(self.folder, self.images.nbytes, "to assemble the .npz")

    @contextmanager
    def assembling(self) -> Iterator[bool]:
        """Whether it falls to this process to assemble; False where another does, or has."""
        with held(self._lock, wait=False) as is_mine:
            yield is_mine and (self.folder / JOB).exists()

    def assemble(self, labels: np.ndarray, report: Mapping[str, Any]) -> None:
        """Turn the folder into `out` and its report; in `assembling` and with nothing missing.

        Raises OSError where `out` has come to be meanwhile, ValueError where the disk is full.
        """
        archive = self.folder / ARCHIVE
        archive.unlink(missing_ok=True)  # rather than written to: somebody may have moved its link
        self.require_space()
        write_npz(archive, self.folder / IMAGES, labels)
        write_json(report_path(self.out), report)
        try:
            # Unlike a rename, a link never replaces a file, and shows whose `out` is.
            os.link(archive, self.out)
        except FileExistsError:
            raise
        except OSError:  # exFAT, SMB and others have no links
            refuse_existing(self.out)
            archive.rename(self.out)
        remove(self.folder)


def partial_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def report_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.json")


@contextmanager
def opened(
    out: Path, job: Mapping[str, Any], shape: tuple[int, ...], say: Callable[[str], None]
) -> Iterator[Partial]:
    """The working folder for `out`, made where there is none, of images `shape` (N, H, W, 3).

    Raises OutExistsError, or ValueError that says what to do where the folder is another job's
    or the disk has too little room.
    """
    folder = partial_folder(out)
    refuse_existing(out)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as lock:
        if not (folder / JOB).exists():
            with held(lock, wait=True):
                if not (folder / JOB).exists():
                    _create(out, job, shape, say)
        _check_job(folder, job)
        partial = Partial(out, lock)
        if partial.missing:
            partial.require_space()
        yield partial


def _create(
    out: Path, job: Mapping[str, Any], shape: tuple[int, ...], say: Callable[[str], None]
) -> None:
    """Fill the folder; the job comes last, so that its presence says that the rest is there."""
    folder = partial_folder(out)
    try:
        # Again, now that we hold the lock: whoever had it may have assembled.
        refuse_existing(out)
        refuse_existing(report_path(out))
        why = "for the images, twice while the .npz is assembled"
        say(require_space(folder, 2 * math.prod(shape), why))
    except ValueError:
        remove(folder)
        raise
    images = np.lib.format.open_memmap(folder / IMAGES, "w+", np.uint8, shape)
    images.flush()
    if hasattr(os, "posix_fallocate"):
        # Room in a mapped file that is not there when it is written ends a process by SIGBUS.
        with (folder / IMAGES).open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    for name, dtype in ((DONE, np.uint8), (SECONDS, np.float32)):
        np.lib.format.open_memmap(folder / name, "w+", dtype, shape[:1]).flush()
    write_json(folder / JOB, job)


def _check_job(folder: Path, job: Mapping[str, Any]) -> None:
    there = read_json(folder / JOB)
    differing = [
        f"{name} is {json.dumps(there.get(name))} there and {json.dumps(job.get(name))} here"
        for name in {**job, **there}
        if there.get(name) != job.get(name)
    ]
    if differing:
        raise ValueError(
            f"{folder} holds the images of another job: {'; '.join(differing)}; "
            "delete it to begin anew, or choose another --out"
        )


def refuse_existing(path: Path) -> None:
    if path.exists():
        raise OutExistsError(path)


def is_assembled(out: Path) -> bool:
    """Whether `out` is what the folder became. A process that was killed between the two leaves
    the folder; it is removed here."""
    folder = partial_folder(out)
    archive = folder / ARCHIVE
    if not (out.exists() and archive.exists() and archive.samefile(out)):
        return False
    with (folder / LOCK).open("a") as lock, held(lock, wait=True):
        remove(folder)
    return True


def remove(folder: Path) -> None:
    """Delete what we put there. The link by which `is_assembled` knows `out` goes late."""
    for name in (JOB, IMAGES, DONE, SECONDS, ARCHIVE, LOCK):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # somebody else's files are in it
        folder.rmdir()


def require_space(folder: Path, needed: int, why: str) -> str:
    """What is needed and free, for people. Raises ValueError with that if it is too little."""
    free = shutil.disk_usage(folder).free
    text = f"{decimal(needed)} of disk needed in {folder.parent} {why}; {decimal(free)} are free"
    if free < needed:
        raise ValueError(text)
    return text


def write_npz(path: Path, images: Path, labels: np.ndarray) -> None:
    """ADM's file of samples: arr_0 is the .npy file `images`, arr_1 are labels (N,) int64.

    Not compressed, of fixed times: the same images give the same bytes. Never all in memory.
    """
    with path.open("wb") as file:
        with ZipFile(file, "w") as archive:
            with (
                images.open("rb") as source,
                archive.open(_entry("arr_0.npy"), "w", force_zip64=True) as member,
            ):
                shutil.copyfileobj(source, member, COPIED_BYTES)
            with archive.open(_entry("arr_1.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, labels, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


def _entry(name: str) -> ZipInfo:
    entry = ZipInfo(name)  # of 1980-01-01
    entry.create_system = 3  # else it says which system wrote it
    return entry


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """All of it or nothing, whenever the process is killed."""
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(json.dumps(values, indent=2) + "\n")
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError that names the file."""
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} does not hold an object")
    return values

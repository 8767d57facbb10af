"""What has a lock where the file system has them, and a warning where not."""

from __future__ import annotations

import errno
import fcntl
import logging
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rae.training.claim import claimed, read_claim
from rae.training.data.tar_shards import TarShards
from rae.training.stage2.presets import DIT_PRESETS


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("no_locks")
def test_a_folder_without_locks_is_trained_in_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), claimed(tmp_path, DIT_PRESETS["digits"], {"images": 3}):
        assert read_claim(tmp_path)["data"] == {"images": 3}
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'lock'} cannot be locked (No locks available): a second training there would "
        "not be refused, and both would spoil the run"
    ]


@pytest.mark.usefixtures("no_locks")
def test_what_fails_within_is_no_lack_of_locks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(OSError, match="disk full"):
        with claimed(tmp_path, DIT_PRESETS["digits"], {}):
            raise OSError("disk full")
    assert len(caplog.records) == 1


def write_tar(folder: Path) -> None:
    image = folder / "a.png"
    image.write_bytes(b"pixels")
    with tarfile.open(folder / "0.tar", "w") as archive:
        archive.add(image, "a.png")


@pytest.mark.usefixtures("no_locks")
def test_tar_files_are_indexed_without_locks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert TarShards([tmp_path / "0.tar"], tmp_path / "cache").read(0) == b"pixels"
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.endswith(
        "cannot be locked (No locks available): each process that finds no index makes one, and "
        "the last one's stays"
    )
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock", ".npz"}


@pytest.mark.usefixtures("no_locks")
def test_an_index_that_two_make_at_once_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may have the same process id, on two machines with one home."""
    write_tar(tmp_path)
    savez, opened = np.savez, [False]

    def meanwhile(*arguments: Any, **arrays: Any) -> None:  # noqa: ANN401
        if not opened[0]:
            opened[0] = True
            TarShards([tmp_path / "0.tar"], tmp_path / "cache")
        savez(*arguments, **arrays)

    monkeypatch.setattr(np, "savez", meanwhile)
    for _ in range(2):
        assert TarShards([tmp_path / "0.tar"], tmp_path / "cache").read(0) == b"pixels"
    assert len(list((tmp_path / "cache").iterdir())) == 2

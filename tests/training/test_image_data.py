"""Folders and tar shards: which images, in which order, with which labels."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import ImageFolder as TorchvisionFolder

from rae.training.data.image_data import ImageFolder, fingerprint, open_dataset
from rae.training.data.tar_shards import TarShards


def fill(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(f"bytes of {name}".encode())
    return root


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def contents(source: ImageFolder | TarShards) -> list[tuple[bytes, int]]:
    return [(source.read(index), int(source.class_labels[index])) for index in range(len(source))]


def test_a_folder_of_classes_is_as_torchvision_reads_it(tmp_path: Path) -> None:
    names = ["b/2.png", "b/10.JPEG", "a/x.jpg", "a/deep/y.webp", "B/z.png", "b/é.png"]
    root = fill(tmp_path / "set", *names, ".cache/hidden.png", "a/notes.txt")
    expected = TorchvisionFolder(str(root), is_valid_file=None, loader=str)
    hidden = expected.class_to_idx[".cache"]
    source = ImageFolder(root)
    assert source.class_names == ("B", "a", "b")
    assert [str(root / source.name(index)) for index in range(len(source))] == [
        path for path, label in expected.samples if label != hidden
    ]
    assert source.class_labels.tolist() == [0, 1, 1, 2, 2, 2]
    assert source.read(0) == b"bytes of B/z.png"
    assert contents(pickle.loads(pickle.dumps(source))) == contents(source)


def test_a_plain_folder_has_label_0(tmp_path: Path) -> None:
    source = ImageFolder(fill(tmp_path, "2.png", "1.jpg"))
    assert contents(source) == [(b"bytes of 1.jpg", 0), (b"bytes of 2.png", 0)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/1.png", "0.png"], "holds images, 0.png, beside folders, a"),
        (["a/1.png", "b/none.txt"], "no images in b"),
        (["readme.txt"], "no image; known are .jpg"),
    ],
)
def test_folders_that_are_no_data_set(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_dataset(fill(tmp_path / "set", *names))


def test_what_is_no_data_set_is_told(tmp_path: Path) -> None:
    fill(tmp_path, "a.zip")
    for path in ("nowhere", "a.zip", "*.tar"):
        with pytest.raises(ValueError, match="no data set at"):
            open_dataset(tmp_path / path)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    first = {"n/1.cls": b"4\n", "n/1.jpg": b"one", "n/1.json": b"{}", "n/2.1.png": b"no image"}
    write_tar(tmp_path / "set" / "b-000.tar", {**first, "n/3.PNG": b"three", "n/3.cls": b"0"})
    write_tar(tmp_path / "set" / "b-001.tar", {"1.webp": b"x" * 3000, "1.cls": b"1"})
    return tmp_path / "set"


def test_tar_shards_hold_images_with_their_labels(shards: Path, tmp_path: Path) -> None:
    expected = [(b"one", 4), (b"three", 0), (b"x" * 3000, 1)]
    for path in (shards, shards / "b-*.tar"):
        source = open_dataset(path, tmp_path / "cache")
        assert isinstance(source, TarShards)
        assert contents(source) == expected
    assert source.name(1) == f"{shards}/b-000.tar:n/3"
    assert contents(pickle.loads(pickle.dumps(source))) == expected
    one = open_dataset(shards / "b-001.tar", tmp_path / "cache")
    assert len(one) == 1
    assert fingerprint(one) != fingerprint(source)


def test_the_index_is_made_once_and_anew_for_other_files(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    before = contents(TarShards([shards / "b-001.tar"], cache))
    opened = []
    original = tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *args: opened.append(args) or original(*args))
    assert contents(TarShards([shards / "b-001.tar"], cache)) == before
    assert not opened
    write_tar(shards / "b-001.tar", {"2.jpg": b"new", "2.cls": b"2"})
    opened.clear()
    assert contents(TarShards([shards / "b-001.tar"], cache)) == [(b"new", 2)]
    assert len(opened) == 1
    stat = (shards / "b-001.tar").stat()
    os.utime(shards / "b-001.tar", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    TarShards([shards / "b-001.tar"], cache)
    assert len(opened) == 2
    (index,) = cache.glob("*.npz")
    index.write_bytes(index.read_bytes()[:100])
    assert contents(TarShards([shards / "b-001.tar"], cache)) == [(b"new", 2)]


def test_tar_shards_without_labels_have_label_0(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"1.jpg": b"one", "2.jpg": b"two"})
    assert contents(TarShards([path], tmp_path)) == [(b"one", 0), (b"two", 0)]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"1.jpg": b"", "2.jpg": b"", "2.cls": b"1"}, "1 of 2 images have no .cls, as .*a.tar:1"),
        ({"1.jpg": b"", "1.cls": b"cat"}, "1.cls is b'cat', not a class's number"),
        ({"1.jpg": b"", "1.png": b""}, "1 has two images"),
        ({"1.txt": b""}, "no image in 1 tar files"),
    ],
)
def test_tar_files_that_are_no_shards(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TarShards([write_tar(tmp_path / "a.tar", files)], tmp_path)


def test_a_damaged_tar_file_is_told(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"1.jpg": bytes(5000), "2.jpg": bytes(5000)})
    whole = path.read_bytes()
    for data in (b"", b"no tar" * 200, whole[:3000]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.tar is no whole, uncompressed tar file"):
            TarShards([path], tmp_path)
    path.write_bytes(whole)
    source = TarShards([path], tmp_path)
    path.write_bytes(whole[:7000])
    assert len(source.read(0)) == 5000
    with pytest.raises(OSError, match="ends after"):
        source.read(1)


def test_labels_are_integers_of_numpy(tmp_path: Path) -> None:
    assert ImageFolder(fill(tmp_path, "a/1.png")).class_labels.dtype == np.int64

"""Images come out of .npz files and folders as they went in, a batch at a time."""

from __future__ import annotations

import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rae.models.reconstruct import center_crop
from rae.training.evaluation.image_sources import DatasetImages, NpzImages, open_images


def random_images(num: int = 7, size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num, size, size, 3), dtype=np.uint8)


def write_pngs(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:03}.png")
    return folder


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_stored_or_compressed(tmp_path: Path, save: Callable[..., None]) -> None:
    images = random_images()
    save(tmp_path / "a.npz", labels=np.arange(7), arr_0=images)
    source = open_images(tmp_path / "a.npz")
    assert (source.num, source.height, source.width) == (7, 8, 8)
    batches = list(source.batches(3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(batches), images)


def test_an_npz_is_never_read_whole(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", arr_0=np.zeros((500, 128, 128, 3), np.uint8))
    tracemalloc.start()
    total = sum(len(batch) for batch in NpzImages(tmp_path / "a.npz").batches(10))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == 500
    assert peak < 4e6  # of 24.6 MB; a batch has 0.5


def test_fingerprints_follow_the_pixels(tmp_path: Path) -> None:
    images = random_images()
    np.savez(tmp_path / "a.npz", arr_0=images)
    np.savez_compressed(tmp_path / "b.npz", arr_0=images)
    np.savez(tmp_path / "c.npz", arr_0=255 - images)
    a, b, c = (NpzImages(tmp_path / f"{name}.npz").fingerprint for name in "abc")
    assert a == b != c
    folder = write_pngs(tmp_path / "folder", images)
    first = DatasetImages(folder, 8).fingerprint
    assert first == DatasetImages(folder, 8).fingerprint != DatasetImages(folder, 4).fingerprint
    Image.fromarray(images[0, ::-1]).save(folder / "000.png")
    assert DatasetImages(folder, 8).fingerprint != first


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": random_images()}, "holds images, but no images arr_0"),
        ({"arr_0": random_images() / 255}, r"arr_0 is float64 \(7, 8, 8, 3\); images are uint8"),
        ({"arr_0": random_images()[..., 0]}, r"arr_0 is uint8 \(7, 8, 8\);"),
        ({"arr_0": random_images()[:0]}, r"arr_0 has no images, it is uint8 \(0, 8, 8, 3\)"),
        ({"arr_0": np.asfortranarray(random_images())}, "in Fortran's order"),
        ({"arr_0": np.array([None])}, "arr_0 is object"),
    ],
)
def test_another_npz_is_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        open_images(tmp_path / "a.npz")


def test_no_npz_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with pytest.raises(ValueError, match=r"a\.npz: No such file"):
        open_images(path)
    path.write_bytes(b"no zip")
    with pytest.raises(ValueError, match="is not an .npz, or is cut short"):
        open_images(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", b"no array")
    with pytest.raises(ValueError, match="arr_0 is no array"):
        open_images(path)
    np.savez_compressed(path, arr_0=random_images(50))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        list(open_images(path).batches(10))
    np.savez(path, arr_0=random_images())
    with pytest.raises(ValueError, match="images of 8 × 8 px; wanted are 16 × 16"):
        open_images(path, 16)


def test_an_npz_whose_array_ends_early(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.save(tmp_path / "a.npy", random_images())
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", (tmp_path / "a.npy").read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut short after image 6"):
        list(open_images(path).batches(2))


def test_a_folder_is_cropped_as_training_does(tmp_path: Path) -> None:
    picture = Image.fromarray(random_images(1, 40)[0][:, :30])
    (tmp_path / "data" / "class").mkdir(parents=True)
    for name in ("a.png", "b.png", "c.png"):
        picture.save(tmp_path / "data" / "class" / name)
    batches = list(open_images(tmp_path / "data", 16).batches(2))
    assert [len(batch) for batch in batches] == [2, 1]
    for image in np.concatenate(batches):
        np.testing.assert_array_equal(image, np.asarray(center_crop(picture, 16)))


def test_a_folder_without_a_size_holds_squares_of_one_size(tmp_path: Path) -> None:
    images = random_images()
    folder = write_pngs(tmp_path / "a", images)
    np.testing.assert_array_equal(next(open_images(folder).batches(7)), images)
    Image.fromarray(images[0, :4, :4]).save(folder / "009.png")
    with pytest.raises(ValueError, match=r"009\.png is 4 × 4 px, 000\.png is 8 × 8"):
        list(open_images(folder).batches(3))
    Image.fromarray(images[0, :4]).save(folder / "000.png")
    with pytest.raises(ValueError, match=r"000\.png is 8 × 4 px"):
        open_images(folder)


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "a", random_images())
    (folder / "003.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"003\.png: not an image"):
        list(open_images(folder, 8).batches(2))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image"):
        open_images(tmp_path / "empty")

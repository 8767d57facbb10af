"""Encoded latents: what is in them, what kills and full disks leave, what is refused."""

from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rae.training.data.encode import encode_dataset
from rae.training.data.image_data import ImageFolder
from rae.training.data.latent_shards import LatentIndex, LatentShards
from rae.training.data.latent_stats import measure_shards
from rae.training.data.samples import ImageSamples
from rae.training.data.stream import batches
from rae.training.data.transforms import CenterCrop
from rae.training.distributed import World

WORLD = World(0, 1, torch.device("cpu"))
BROKEN = 7


class Pool(nn.Module):
    """Stands for an encoder: 4 × 4 pixels' mean, of each colour."""

    latent_shape = (3, 4, 4)

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images.float() / 255, 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "set", 23)


def write_images(folder: Path, num: int) -> Path:
    generator = np.random.default_rng(0)
    for number in range(num):
        path = folder / str(number % 3) / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (18, 16, 3), dtype=np.uint8)).save(path)
    sorted(folder.rglob("*.png"))[BROKEN].write_bytes(b"broken")
    return folder


def images(folder: Path) -> ImageSamples:
    return ImageSamples(ImageFolder(folder), CenterCrop(16))


def index_of(samples: ImageSamples, **options: Any) -> LatentIndex:  # noqa: ANN401 - of any field
    values: dict[str, Any] = {
        "latent_shape": (3, 4, 4),
        "image_size": 16,
        "has_flips": True,
        "dtype": "fp32",
        "shard_size": 5,
        "num_images": len(samples),
        "num_classes": samples.num_classes,
        "class_names": samples.class_names,
        "encoder": {"kind": "pool"},
        "dataset": {"name": "set"},
    }
    return LatentIndex(**values | options)


def encode(
    folder: Path,
    out: Path,
    *,
    batch_size: int = 2,
    world: World = WORLD,
    on_batch: Callable[[int], None] = lambda num: None,
    **options: Any,  # noqa: ANN401 - as above
) -> LatentIndex:
    samples = images(folder)
    return encode_dataset(
        samples,
        Pool(),  # type: ignore[arg-type]
        out,
        index_of(samples, **options),
        world,
        batch_size=batch_size,
        num_workers=0,
        on_batch=on_batch,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_latents_are_those_of_the_images_in_the_stream(folder: Path, tmp_path: Path) -> None:
    index = encode(folder, tmp_path / "latents")
    assert [entry.num_rows for entry in index.shards] == [5, 4, 5, 5, 3]
    assert [entry.num_skipped for entry in index.shards] == [0, 1, 0, 0, 0]
    shards = LatentShards(tmp_path / "latents")
    assert shards.index == index
    (folder / images(folder).name(BROKEN)).unlink()  # the same 22 images
    augmented = ImageSamples(ImageFolder(folder), CenterCrop(16, flip=True))
    options: Any = {"seed": 3, "batch_size": 8, "micro_batch": 4, "world": WORLD, "num_workers": 0}
    streams = (batches(samples, **options) for samples in (augmented, shards))
    for of_images, of_latents in islice(zip(*streams, strict=True), 12):
        assert of_images.images is not None and of_latents.latents is not None
        assert torch.equal(Pool()(of_images.images), of_latents.latents)
        assert torch.equal(of_images.class_labels, of_latents.class_labels)
        assert torch.equal(of_images.positions, of_latents.positions)


def test_shards_say_which_images_they_hold(folder: Path, tmp_path: Path) -> None:
    encode(folder, tmp_path / "latents", has_flips=False)
    tensors = load_file(tmp_path / "latents" / "shard-00001.safetensors")
    assert tensors.keys() == {"latents", "class_labels", "indices"}
    assert tensors["indices"].tolist() == [5, 6, 8, 9]
    assert tensors["class_labels"].tolist() == [0, 0, 1, 1]
    shards = pickle.loads(pickle.dumps(LatentShards(tmp_path / "latents")))
    for row in range(4):
        for position in range(8):  # no flips: the same at each
            assert torch.equal(shards.load(5 + row, 0, position).value, tensors["latents"][row])
    assert shards.name(6) == f"row 1 of {tmp_path}/latents/shard-00001.safetensors"


@pytest.mark.parametrize(("dtype", "error"), [("bf16", 2**-8), ("fp16", 2**-11)])
def test_half_precision_rounds_once(folder: Path, tmp_path: Path, dtype: str, error: float) -> None:
    exact = encode(folder, tmp_path / "exact")
    rounded = encode(folder, tmp_path / "rounded", dtype=dtype)
    assert exact.shards[0].num_bytes > 1.3 * rounded.shards[0].num_bytes
    pairs = zip(
        LatentShards(tmp_path / "exact").chunks(0, 100, has_flips=True),
        LatentShards(tmp_path / "rounded").chunks(0, 100, has_flips=True),
        strict=True,
    )
    for one, other in pairs:
        assert other.dtype != torch.float32
        torch.testing.assert_close(other.float(), one, rtol=error, atol=0)
        assert not torch.equal(other.float(), one)


KILLED = """
import sys, time, torch
from pathlib import Path
from torch import nn
from rae.training.distributed import World
from rae.training.data.encode import encode_dataset
from rae.training.data.image_data import ImageFolder
from rae.training.data.latent_shards import LatentIndex
from rae.training.data.samples import ImageSamples
from rae.training.data.transforms import CenterCrop

class Pool(nn.Module):
    latent_shape = (3, 4, 4)
    def forward(self, images):
        time.sleep(0.02)
        return nn.functional.avg_pool2d(images.float() / 255, 4)

encode_dataset(
    ImageSamples(ImageFolder(Path(sys.argv[1])), CenterCrop(16)), Pool(), Path(sys.argv[2]),
    LatentIndex(**eval(sys.argv[3])), World(0, 1, torch.device("cpu")), batch_size=2,
    num_workers=0, on_batch=lambda num: None,
)
"""


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", 90)
    encode(folder, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    assert len(expected) == 19
    out = tmp_path / "killed"
    options = {**index_of(images(folder)).facts, "latent_shape": (3, 4, 4)}
    arguments = [sys.executable, "-c", KILLED, str(folder), str(out), repr(options)]
    with subprocess.Popen(arguments) as process:
        while process.poll() is None and len(list(out.glob("*.safetensors"))) < 6:
            time.sleep(0.005)
        process.kill()
    left = contents(out)
    assert 6 <= len(left) < 12 and "index.json" not in left
    assert all(expected[name] == data for name, data in left.items() if name.endswith("tensors"))
    with pytest.raises(ValueError, match=r"holds no index.json: `rae train encode` did not end"):
        LatentShards(out)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    encode(folder, out)
    assert contents(out) == expected
    assert all((out / name).stat().st_mtime_ns == time_ns for name, time_ns in before.items())


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond so much."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_whole_shards_alone(folder: Path, tmp_path: Path) -> None:
    encode(folder, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    out = tmp_path / "full"
    # The last shard has 3 rows: the first one does not fit.
    room = (len(expected["shard-00000.safetensors"]) + len(expected["shard-00004.safetensors"])) / 2
    with full_disk(int(room)), pytest.raises(OSError, match=r"shard-00000.safetensors: .*large"):
        encode(folder, out)
    assert contents(out) == {}
    encode(folder, out)
    assert contents(out) == expected


def test_a_run_that_is_whole_is_not_made_again(folder: Path, tmp_path: Path) -> None:
    index = encode(folder, tmp_path)
    folder.rename(tmp_path / "away")
    samples = images(tmp_path / "away")
    for path in (tmp_path / "away").rglob("*.png"):
        path.write_bytes(b"broken")
    again = encode_dataset(
        samples,
        Pool(),  # type: ignore[arg-type]
        tmp_path,
        replace(index, shards=()),
        WORLD,
        batch_size=2,
        num_workers=0,
        on_batch=lambda num: None,
    )
    assert again == index


def test_other_latents_in_the_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "latents"
    encode(folder, out)
    before = contents(out)
    with pytest.raises(ValueError, match="index.json has dtype 'fp32', not 'fp16'"):
        encode(folder, out, dtype="fp16")
    with pytest.raises(ValueError, match=r"has encoder \{'kind': 'pool'\}, not \{'kind': 'mae'\}"):
        encode(folder, out, encoder={"kind": "mae"})
    assert contents(out) == before
    (out / "index.json").unlink()
    with pytest.raises(ValueError, match="00000.safetensors has dtype 'fp32', not 'fp16'"):
        encode(folder, out, dtype="fp16")
    save_file({"latents": torch.zeros(1)}, out / "shard-00001.safetensors")
    with pytest.raises(ValueError, match="00001.safetensors is not one of rae's own"):
        encode(folder, out)


def flip_last_bit(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("has_index", [True, False])
def test_what_is_damaged_or_missing_is_made_again(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, has_index: bool
) -> None:
    out = tmp_path / "latents"
    encode(folder, out)
    expected = contents(out)
    os.truncate(out / "shard-00001.safetensors", 1000)
    (out / "shard-00003.safetensors").unlink()
    lost = ["shard-00001.safetensors (damaged)"]
    if has_index:  # which knows what a run that was killed does not
        flip_last_bit(out / "shard-00002.safetensors")
        lost += ["shard-00002.safetensors (damaged)", "shard-00003.safetensors (missing)"]
    else:
        (out / "index.json").unlink()
    kept = (out / "shard-00000.safetensors").stat().st_mtime_ns
    caplog.clear()
    index = encode(folder, out)
    assert contents(out) == expected
    assert LatentShards(out).index == index
    assert (out / "shard-00000.safetensors").stat().st_mtime_ns == kept
    told = [r.getMessage() for r in caplog.records if r.name == "rae.training.data.encode"]
    assert told == [f"{out}: made again: {', '.join(lost)}"]


def test_processes_share_what_is_to_be_made_again(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "latents"
    index = encode(folder, out)
    expected = contents(out)
    for number in (0, 2, 4):
        os.truncate(out / f"shard-0000{number}.safetensors", 1000)
    meeting, done = Barrier(2, timeout=60), list[int]()
    given: dict[int, Any] = {}

    class Thread(World):
        def barrier(self) -> None:
            meeting.wait()

        def gather(self, value: Any) -> list[Any]:  # noqa: ANN401
            given[self.rank] = value
            meeting.wait()
            values = [given[rank] for rank in range(self.size)]
            meeting.wait()
            return values

    def run(rank: int) -> LatentIndex:
        world = Thread(rank, 2, torch.device("cpu"))
        return encode(folder, out, world=world, on_batch=done.append)

    caplog.clear()
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, range(2))) == [index, index]
    assert contents(out) == expected
    assert sum(done) == 23
    assert [r.getMessage().count("(damaged)") for r in caplog.records if "again" in r.msg] == [3]


def test_nothing_readable_and_values_that_do_not_fit_are_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pool, "forward", lambda self, images: images[:, :, :4, :4] * 1000.0)
    with pytest.raises(ValueError, match=r"shard-00000.safetensors: \d+ of 240 .* in float16"):
        encode(folder, tmp_path / "fp16", dtype="fp16")
    assert not contents(tmp_path / "fp16")
    for path in folder.rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="none of the 23 images can be read"):
        encode(folder, tmp_path / "none")
    assert "index.json" not in contents(tmp_path / "none")


def test_a_folder_that_is_not_whole_is_refused(folder: Path, tmp_path: Path) -> None:
    encode(folder, tmp_path / "latents")
    path = tmp_path / "latents" / "shard-00002.safetensors"
    data = path.read_bytes()
    flip_last_bit(path)
    shards = LatentShards(tmp_path / "latents")
    shards.verify(1)
    options: Any = {"has_flips": True, "batch_size": 2, "on_batch": lambda num: None}
    with pytest.raises(ValueError, match=r"shard-00002.safetensors has sha256"):
        measure_shards(shards, WORLD, **options)
    path.write_bytes(data[:-1])
    message = f"is {len(data) - 1} bytes, index.json says {len(data)} bytes: `rae train encode`"
    with pytest.raises(ValueError, match=message):
        LatentShards(tmp_path / "latents")
    path.unlink()
    with pytest.raises(ValueError, match=r"shard-00002.safetensors is missing"):
        LatentShards(tmp_path / "latents")
    index = tmp_path / "latents" / "index.json"
    values = json.loads(index.read_text())
    for changed, message in (
        ({**values, "format_version": 2}, "format_version 2, this reads 1"),
        ({**values, "colour": 1}, "unknown key 'colour'"),
    ):
        index.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            LatentShards(tmp_path / "latents")
    os.truncate(index, 100)
    with pytest.raises(ValueError, match=r"index.json is damaged \(.*\): remove it, then `rae"):
        encode(folder, tmp_path / "latents")


def test_latents_know_the_names_of_their_classes(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "latents"
    encode(folder, out)
    assert LatentShards(out).class_names == images(folder).class_names == ("0", "1", "2")
    before = contents(out)
    values = json.loads((out / "index.json").read_text())
    del values["class_names"]  # as folders that were encoded before names were kept
    (out / "index.json").write_text(json.dumps(values))
    assert LatentShards(out).class_names == ()
    (out / "index.json").unlink()
    encode(folder, out)  # their shards hold for a run that keeps them
    assert contents(out) == before


def test_a_shard_that_is_damaged_while_it_is_read_ends_the_run(
    folder: Path, tmp_path: Path
) -> None:
    encode(folder, tmp_path / "latents")
    shards = LatentShards(tmp_path / "latents")
    for path in (tmp_path / "latents").glob("*.safetensors"):
        os.truncate(path, 100)
    stream = batches(shards, seed=0, batch_size=4, micro_batch=4, world=WORLD, num_workers=0)
    with pytest.raises(ValueError, match=r"shard-0000\d.safetensors is damaged"):
        next(stream)

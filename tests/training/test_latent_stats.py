"""Statistics of latents: equal to two passes, whatever the batches and the processes are."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from rae.models.checkpoint import load_autoencoder
from rae.training.data import data_cli
from rae.training.data.image_data import ImageFolder
from rae.training.data.image_encoder import load_image_encoder
from rae.training.data.latent_shards import LatentShards
from rae.training.data.samples import ImageSamples
from rae.training.data.stats import LatentStatistics, read_statistics, write_statistics
from rae.training.data.tensor_writing import read_facts
from rae.training.data.transforms import CenterCrop

DIGITS = Path(data_cli.__file__).parents[2] / "models" / "digits"
SHAPE = (96, 4, 4)

app = typer.Typer()
app.command()(data_cli.encode)
app.command()(data_cli.stats)


def run(*arguments: object, error: str | None = None) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == (0 if error is None else 2), result.output
    if error is not None:
        assert error in result.stderr and len(result.stderr.splitlines()) == 1
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number in range(13):
        path = folder / str(number % 2) / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (32, 40, 3), dtype=np.uint8)).save(path)
    (folder / "1" / "05.png").write_bytes(b"broken")
    return folder


@pytest.fixture(scope="module")
def latents(folder: Path) -> Tensor:
    """Of the 12 images that can be read, then of their mirror images."""
    samples = ImageSamples(ImageFolder(folder), CenterCrop(32))
    readable = [index for index in range(13) if samples.name(index) != "1/05.png"]
    images = torch.stack([samples.load(index, 0, 0).value for index in readable])
    _, rae = load_autoencoder(DIGITS)
    return rae.encode_raw(torch.cat([images, images.flip(-1)]) / 255)


def assert_statistics(path: Path, latents: Tensor) -> None:
    latents_mean, latents_var = read_statistics(path, SHAPE)
    two_passes = latents.double()
    mean = two_passes.mean(0)
    torch.testing.assert_close(latents_mean.double(), mean, rtol=1e-6, atol=1e-6)
    var = (two_passes - mean).square().mean(0)
    torch.testing.assert_close(latents_var.double(), var, rtol=1e-6, atol=1e-6)
    facts = read_facts(path)
    assert facts["num_latents"] == len(latents)
    assert facts["num_skipped"] == 1
    assert facts["encoder"]["sha256"].keys() == {"config.json", "model.safetensors"}


def test_an_encoder_alone_makes_what_an_rae_makes(folder: Path, tmp_path: Path) -> None:
    loaded = load_image_encoder(DIGITS)
    _, rae = load_autoencoder(DIGITS)
    images = torch.randint(256, (2, 3, 48, 48), dtype=torch.uint8)
    assert loaded.image_size == 32 and loaded.module.latent_shape == SHAPE
    assert torch.equal(loaded.module(images), rae.encode_raw(images / 255))
    # Without a decoder: ImageNet's normalisation, 8 pixels a token for 16 of the image.
    alone = load_image_encoder(DIGITS / "encoder", 64)
    assert alone.image_size == 64 and alone.module.encoder.config.image_size == 32
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    assert torch.equal(alone.module.image_mean, mean)
    assert alone.facts["sha256"] == loaded.facts["sha256"]
    with pytest.raises(ValueError, match="size 64: the images of .* have 32 pixels"):
        load_image_encoder(DIGITS, 64)


@pytest.mark.parametrize(("batch_size", "flips"), [(1, False), (5, True), (100, False)])
def test_images_have_the_statistics_of_two_passes(
    folder: Path, latents: Tensor, tmp_path: Path, batch_size: int, flips: bool
) -> None:
    out = tmp_path / "new" / "stats.safetensors"
    options = ["--batch", batch_size, "--flips" if flips else "--no-flips"]
    run("stats", "--images", folder, "--encoder", DIGITS, "--out", out, "--workers", 0, *options)
    assert_statistics(out, latents if flips else latents[:12])
    mean = load_file(out)["latents_mean"]
    assert mean.dtype == torch.float32 and mean.shape == SHAPE


@pytest.mark.parametrize("flips", [False, True])
def test_encoded_latents_have_the_same(
    folder: Path, latents: Tensor, tmp_path: Path, flips: bool
) -> None:
    data, out = tmp_path / "latents", tmp_path / "stats.safetensors"
    options = ["--shard-size", 4, "--batch", 3, "--flips" if flips else "--no-flips"]
    command = ["encode", "--images", folder, "--encoder", DIGITS, "--workers", 0, *options]
    assert "12 images; 1 could not be read" in run(*command, "--out", data)
    run("stats", "--latents", data, "--out", out, "--batch", 3)
    assert_statistics(out, latents[:12])
    run("stats", "--latents", data, "--out", out, error=f"{out} exists: take another name")
    both = tmp_path / "both.safetensors"
    command = ["stats", "--latents", data, "--out", both, "--flips"]
    error = "--encoder, --size: latents were encoded with theirs"
    run(*command, "--encoder", DIGITS, error=error)
    if flips:
        run(*command)
        assert_statistics(both, latents)
    else:
        run(*command, error="has no latents of mirror images")


def test_encoders_multiply_in_exact_fp32(folder: Path, tmp_path: Path) -> None:
    for command in ("encode", "stats"):
        torch.set_float32_matmul_precision("high")
        options = ["--encoder", DIGITS, "--out", tmp_path / command, "--workers", 0]
        run(command, "--images", folder, *options)
        assert torch.get_float32_matmul_precision() == "highest"


def test_two_processes_make_the_same(folder: Path, latents: Tensor, tmp_path: Path) -> None:
    command = ["encode", "--images", folder, "--encoder", DIGITS, "--workers", 0]
    run(*command, "--shard-size", 3, "--out", tmp_path / "one")
    two = tmp_path / "two"
    shutil.copytree(tmp_path / "one", two)
    for name in ("index.json", "shard-00000.safetensors", "shard-00003.safetensors"):
        (two / name).unlink()  # 2 and the half: one process has 3 whole and missing ones
    script = f"""
from rae.training.data.data_cli import encode, stats
from pathlib import Path
folder, tmp_path = Path({str(folder)!r}), Path({str(tmp_path)!r})
encoder = Path({str(DIGITS)!r})
shared = dict(num_workers=0, device="cpu")
options = dict(encoder=encoder, batch_size=4, flips=True)
stats(tmp_path / "images.safetensors", str(folder), **options, **shared)
encode(str(folder), encoder, tmp_path / "two", shard_size=3, **shared)
stats(tmp_path / "shards.safetensors", latents=tmp_path / "two", flips=True, **shared)
"""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    assert_statistics(tmp_path / "images.safetensors", latents)
    assert_statistics(tmp_path / "shards.safetensors", latents)
    one, other = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in other]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]


class TwoRanks:
    """Each sum of a process of two, with what the other one gives."""

    rank, size, device = 0, 2, torch.device("cpu")

    def __init__(self, other: list[Tensor]) -> None:
        self.other = other

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor + self.other.pop(0)


@pytest.mark.parametrize("num_other", [0, 3])
def test_processes_of_any_share_merge(num_other: int) -> None:
    """A mean ten thousand times the spread, which E[x²] − E[x]² would not survive in fp32."""
    values = 1e4 + torch.randn(7 + num_other, 2, 1, 1, dtype=torch.float64)
    own, other = LatentStatistics(), LatentStatistics()
    own.update(values[:7])
    other.update(values[7:])
    mean = values.mean(0)
    spread = num_other * (values[7:].sum(0) / max(num_other, 1) - mean).square()
    world = TwoRanks([torch.tensor(num_other), values[7:].sum(0), other.squares + spread])
    total = own.over(world, (2, 1, 1))  # type: ignore[arg-type]
    torch.testing.assert_close(total.mean, mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(total.var, values.var(0, correction=0), rtol=1e-9, atol=0)


def test_other_files_are_no_statistics(tmp_path: Path) -> None:
    path = tmp_path / "stats.safetensors"
    statistics = LatentStatistics()
    with pytest.raises(ValueError, match="no latents seen"):
        write_statistics(path, statistics, {})
    statistics.update(torch.full((2, *SHAPE), torch.inf))
    with pytest.raises(ValueError, match="latents_mean of stats.safetensors: 1536 of 1536"):
        write_statistics(path, statistics, {})
    assert not list(tmp_path.iterdir())
    statistics = LatentStatistics()
    statistics.update(torch.randn(3, *SHAPE))
    write_statistics(path, statistics, {"dataset": "none"})
    assert read_facts(path) == {"dataset": "none", "num_latents": 3}
    with pytest.raises(ValueError, match=r"latents_mean \(96, 4, 4\) for \(96, 4, 5\)"):
        read_statistics(path, (96, 4, 5))
    with pytest.raises(ValueError, match="statistics are latents_mean and latents_var"):
        read_statistics(DIGITS / "encoder" / "model.safetensors", SHAPE)


def test_what_commands_cannot_do_they_tell(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("stats", "--out", out, error="either --images or --latents is needed")
    run("stats", "--images", folder, "--out", out, error="--encoder is needed for --images")
    missing = tmp_path / "missing"
    options = ["--encoder", DIGITS, "--out", out]
    run("encode", "--images", missing, *options, error=f"no data set at {missing}")
    run(
        "encode",
        "--images",
        folder,
        "--encoder",
        missing,
        "--out",
        out,
        error="has no config.json",
    )
    wrong = tmp_path / "encoder"
    wrong.mkdir()
    (wrong / "config.json").write_text('{"model_type": "bert"}')
    run("stats", "--images", folder, "--encoder", wrong, "--out", out, error="holds a 'bert'")
    assert not out.exists()
    run("encode", "--images", folder, *options, "--workers", 0)
    run("encode", "--images", folder, *options, "--dtype", "bf16", error="has dtype 'fp32', not")
    assert len(LatentShards(out)) == 12

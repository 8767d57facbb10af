"""The published models at their true size, with random weights: `make test-slow`, 12 GB of disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from rae.models.checkpoint import load_checkpoint
from rae.models.config import CONFIGS, DECODER_CONFIGS
from rae.models.decoder import Decoder
from rae.models.dit_dh import DiTDH
from rae.models.published import PRESETS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

# VmHWM counts mapped pages as well.
RUN = """
import atexit, sys
from rae.server.cli import main
def peak():
    status = open("/proc/self/status").read()
    print("VmHWM", status.partition("VmHWM:")[2].split()[0], file=sys.stderr)
atexit.register(peak)
sys.argv[0] = "rae"
main()
"""
PRESET = PRESETS["DiTDH-XL-256"]
DIT_DH, GUIDE, DECODER, STATISTICS = PRESET.files


def rae(*arguments: object) -> int:
    """Run a command; returns its peak memory in bytes."""
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert result.returncode == 0, result.stderr
    return 1024 * int(result.stderr.rpartition("VmHWM")[2].split()[0])


def save_random(model: nn.Module, path: Path) -> int:
    """As the authors save; returns the number of keys."""
    for name, parameter in model.named_parameters():
        is_scale = parameter.ndim == 1 and name.endswith("weight")
        nn.init.normal_(parameter, mean=float(is_scale), std=0.02)
    path.parent.mkdir(parents=True)
    torch.save(model.state_dict(), path)
    return len(model.state_dict())


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("published")
    assert save_random(DiTDH(CONFIGS["DiTDH-XL-256"]), root / DIT_DH) == 382
    save_random(DiTDH(CONFIGS["DiTDH-S-256"]), root / GUIDE)
    assert save_random(Decoder(DECODER_CONFIGS["decoder-ViT-XL-256"]), root / DECODER) == 456
    (root / STATISTICS).parent.mkdir(parents=True)
    torch.save({"mean": None, "var": torch.rand(768, 16, 16) + 0.5}, root / STATISTICS)
    yield root
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def converted(published: Path) -> tuple[Path, float]:
    """The checkpoint folder, and conversion's peak memory over the largest file."""
    out = published / "checkpoint"
    peak = rae("convert", "--preset", "DiTDH-XL-256", "--root", published, "--out", out)
    return out, peak / (published / DIT_DH).stat().st_size


def test_conversion_takes_little_more_memory_than_the_largest_file(
    converted: tuple[Path, float], capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        sys.stdout.write(f"\nconvert: peak {converted[1]:.3f} × the largest source file\n")
    assert converted[1] <= 1.3


def test_it_loads_in_seconds_and_to_the_bit(
    published: Path, converted: tuple[Path, float], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = load_checkpoint(converted[0])  # warms the page cache
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        load_checkpoint(converted[0])
        seconds.append(time.perf_counter() - start)
    with capsys.disabled():
        shown = ", ".join(f"{value:.2f}" for value in seconds)
        sys.stdout.write(f"\nload_checkpoint: {shown} s, sha256 of 5.8 GB included\n")
    assert min(seconds) <= 5
    assert checkpoint.guide is not None
    for model, file in (
        (checkpoint.dit_dh, DIT_DH),
        (checkpoint.guide, GUIDE),
        (checkpoint.rae.decoder, DECODER),
    ):
        source = torch.load(published / file, weights_only=True, mmap=True)
        state = model.state_dict()
        assert state.keys() == source.keys()
        assert all(torch.equal(state[key], source[key]) for key in source)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_generates(
    converted: tuple[Path, float],
    tmp_path: Path,
    precision: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--steps", 3, "--seed", 1, "--precision", precision, "--device", "cpu")
    peak = rae(
        *("generate", "golden retriever", "--model", converted[0], "--out", tmp_path), *options
    )
    with capsys.disabled():
        sys.stdout.write(f"\nrae generate, {precision}: peak {peak / 1e9:.2f} GB\n")
    with Image.open(tmp_path / "207-golden-retriever-seed1.png") as image:
        assert image.size == (256, 256)
        low, high = image.convert("L").getextrema()
        assert isinstance(low, int) and isinstance(high, int) and high > low


def test_bf16_storage_serves_the_same_pixels_from_half_the_disk(
    published: Path, converted: tuple[Path, float], tmp_path: Path
) -> None:
    small = published / "bf16"
    root = ("--preset", "DiTDH-XL-256", "--root", published)
    rae("convert", *root, "--out", small, "--dtype", "bf16")
    sizes = [
        sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        for folder in (small, converted[0])
    ]
    assert sizes[0] < 0.51 * sizes[1]
    images = []
    for folder in (small, converted[0]):
        options = ("--steps", 2, "--seed", 1, "--precision", "bf16", "--device", "cpu")
        rae("generate", "207", "--model", folder, "--out", tmp_path / folder.name, *options)
        images.append(Image.open(next((tmp_path / folder.name).glob("*.png"))).tobytes())
    assert images[0] == images[1]

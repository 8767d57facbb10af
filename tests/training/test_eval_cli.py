"""The commands on small files: figures, JSON, and one line for what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from rae.training.cli import eval_app

DIGITS = str(Path(__file__).parents[2] / "models" / "digits")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for seed, name in enumerate(("made", "real")):
        images = np.random.default_rng(seed).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
        np.savez(f"{name}.npz", arr_0=images)
    np.savez("empty.npz", arr_0=np.empty((0, 32, 32, 3), dtype=np.uint8))
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(eval_app, arguments)


def test_samples_on_an_encoder(folder: Path) -> None:
    arguments = ("made.npz", "--reference", "real.npz", "--encoder", DIGITS, "--json", "out.json")
    result = run("samples", *arguments)
    assert result.exit_code == 0, result.output
    written = json.loads((folder / "out.json").read_text())
    assert written["samples"] == "made.npz" and written["reference"] == "real.npz"
    assert written["images"] == written["reference_images"] == 12
    names = [f"{name} (encoder mae of digits)" for name in ("FD", "precision", "recall")]
    assert list(written["figures"]) == names
    assert f"{written['figures'][names[0]]:.4f}" in result.output
    assert names[0] in result.output and "FID" not in result.output
    assert "Warning: 12 samples for 96 dimensions" in result.output
    # With statistics in the place of the images the figures are the same.
    assert run("stats", "real.npz", "--encoder", DIGITS, "--out", "ref.npz").exit_code == 0
    assert run("samples", arguments[0], "--reference", "ref.npz", *arguments[3:]).exit_code == 0
    again = json.loads((folder / "out.json").read_text())
    assert again["figures"] == pytest.approx(written["figures"])


def test_reconstruction_and_its_grid(folder: Path) -> None:
    result = run(
        *("reconstruction", DIGITS, "--images", "real.npz"),
        *("--grid", "grid.png", "--json", "out.json", "--device", "cpu"),
    )
    assert result.exit_code == 0, result.output
    written = json.loads((folder / "out.json").read_text())
    assert list(written["figures"]) == ["PSNR, dB", "SSIM", "rFD (encoder mae of digits)"]
    with Image.open("grid.png") as image:
        assert image.size == (4 * 64, 3 * 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("samples made.npz --reference real.npz", "an FID wants --inception FILE, pt_inception"),
        ("samples made.npz --reference real.npz --inception a --encoder b", "are both given"),
        ("samples made.npz --reference real.npz --inception a", "a is no file: wanted is pt_"),
        (f"samples none.npz --reference real.npz --encoder {DIGITS}", "No such file"),
        (f"samples made.npz --reference none.npz --encoder {DIGITS}", "No such file"),
        (f"samples made.npz --reference real.npz --encoder {DIGITS} --device tpu", "allowed: auto"),
        (f"samples made.npz --reference real.npz --encoder {DIGITS} --device cuda:99", "GPUs that"),
        (f"reconstruction {DIGITS} --images real.npz --lpips a", "a is missing"),
        (
            f"reconstruction {DIGITS}/encoder --images real.npz",
            "not a rae checkpoint's",
        ),
        ("reconstruction . --images real.npz", "not a checkpoint folder"),
        (f"stats . --encoder {DIGITS} --out ref.npz", "no image"),
        (f"stats empty.npz --encoder {DIGITS} --out ref.npz", "arr_0 has no images, it is uint8"),
        (f"stats real.npz --encoder {DIGITS} --out made.npz", "made.npz exists: take another"),
        ("samples made.npz --reference real.npz --encoder .", ". holds no encoder: neither a ch"),
    ],
)
def test_what_is_wrong_is_one_line(folder: Path, arguments: str, message: str) -> None:
    result = run(*arguments.split())
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("option", ["--json", "--grid"])
def test_where_nothing_can_be_written_nothing_is_measured(folder: Path, option: str) -> None:
    result = run("reconstruction", DIGITS, "--images", "real.npz", option, "none/out")
    assert result.exit_code == 2 and "none is not a folder" in result.stderr


def test_the_commands_load_without_torch() -> None:
    code = "import sys, rae.training.evaluation.eval_cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

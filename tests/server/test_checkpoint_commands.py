"""`rae verify` and `rae reconstruct`: what people see, and exit codes."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from rae.models.reconstruct import drawn_picture, psnr_db, read_picture
from rae.models.verify import record_fingerprints
from rae.server.cli import app

WIDE = {"COLUMNS": "80", "NO_COLOR": "1"}


def rae(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=WIDE)


def refused(result: Result) -> str:
    """The one line of a command that exits 1."""
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    record_fingerprints(folder)
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    Image.fromarray(drawn_picture(100)[:80]).save(path)
    return path


def test_verify_lists_what_passes(folder: Path) -> None:
    result = rae("verify", folder)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert all(re.match(r"(pass|skip)  \S.*: \S", line) for line in lines)
    assert "pass  dit_dh fingerprint: relative error 0.0e+00, bound 1e-04 in fp32" in lines
    assert "skip  reconstruction: config.json names none" in lines


def test_verify_lists_every_failure_and_exits_1(folder: Path) -> None:
    save_file({}, folder / "guide.safetensors")
    (folder / "decoder.safetensors").write_bytes(b"no")
    result = rae("verify", folder, "--reference", folder)
    assert refused(result) == "Error: 5 checks failed\n"
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAIL")]
    assert len(failed) == 5
    for name in ("guide.safetensors tensors", "decoder.safetensors sha256", "reference"):
        assert any(line.startswith(f"FAIL  {name}: ") for line in failed)
    assert "pass  dit_dh fingerprint" in result.stdout


def test_verify_without_a_checkpoint(tmp_path: Path) -> None:
    assert "does not exist" in refused(rae("verify", tmp_path / "nowhere"))
    result = rae("verify", tmp_path)
    assert refused(result) == "Error: 1 check failed\n"
    assert "no readable config.json" in result.stdout


def test_verify_reconstructs_the_image_that_is_given(photo: Path) -> None:
    drawn, given = (rae("verify", *flags) for flags in ([], ["--image", photo]))
    assert drawn.exit_code == given.exit_code == 0
    assert drawn.stdout.splitlines()[-1] != given.stdout.splitlines()[-1]
    result = rae("verify", "--image", photo.with_name("none.png"))
    assert result.exit_code == 1
    assert "FAIL  reconstruction: " in result.stdout and "No such file" in result.stdout


def test_reconstruct_writes_both_pictures_and_says_the_psnr(photo: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "both.png"
    result = rae("reconstruct", photo, "--out", file)
    assert result.exit_code == 0, result.output
    with Image.open(file) as image:
        pixels = np.asarray(image)
    assert pixels.shape == (32, 64, 3)
    np.testing.assert_array_equal(pixels[:, :32], read_picture(photo, 32))
    psnr = psnr_db(pixels[:, 32:], pixels[:, :32])
    assert 6 < psnr < 60
    assert result.stdout == f"{file} (PSNR {psnr:.2f} dB)\n"


def test_reconstruct_writes_a_file_for_each_image(photo: Path, tmp_path: Path) -> None:
    other = shutil.copy(photo, tmp_path / "other.jpg")
    result = rae("reconstruct", photo, other, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    names = ["photo-reconstruction.png", "other-reconstruction.png"]
    assert [line.split()[0] for line in result.stdout.splitlines()] == [
        str(tmp_path / "out" / name) for name in names
    ]
    for out, images in ((tmp_path / "a.png", [photo, other]), (tmp_path, [photo, photo])):
        message = refused(rae("reconstruct", *images, "--out", out))
        assert f"out {out} is not a folder in which 2 images" in message


def test_reconstruct_refuses_in_one_line(photo: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("text")
    assert "text.png is not an image" in refused(rae("reconstruct", tmp_path / "text.png"))
    message = refused(rae("reconstruct", photo, "--model", folder))
    assert f"{folder} holds no encoder" in message
    message = refused(rae("reconstruct", photo, "--encoder", tmp_path / "nowhere"))
    assert "nowhere holds no encoder: mae is wanted" in message
    assert rae("reconstruct").exit_code == 2


def test_reconstruct_without_transformers_says_the_pip_line(
    photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert refused(rae("reconstruct", photo)).endswith("pip install 'rae-server[train]'\n")
    result = rae("verify")
    assert result.exit_code == 0
    assert "skip  reconstruction: encoders need transformers" in result.stdout

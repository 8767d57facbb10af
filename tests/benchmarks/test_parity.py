"""The published implementation's numbers, through the command that people run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"


def run_parity(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "benchmarks" / "parity.py", folder, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200)


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--kernels", "library"),
        ("--precision", "bf16"),
        pytest.param(("--kernels", "triton"), marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
    ],
)
def test_every_golden_output_is_reproduced(flags: tuple[str, ...]) -> None:
    result = run_parity(GOLDEN, *flags)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[-1].endswith("0 above their bound")
    (decoder,) = (line for line in lines if line.startswith("decoder_a image "))
    assert (float(decoder.split()[2]) > 1e-4) == ("bf16" in flags)  # which rounds
    assert sum("manifest" in line for line in lines) == 14
    for output in (
        "euler_autoguidance_1.42",
        "heun2_final",
        "midpoint_final",
        "v_cfg_2.5_interval",
    ):
        assert any(f"ditdh_a {output}" in line for line in lines), output
    assert any("ditdh_qknorm v " in line for line in lines)


def test_the_kernels_reproduce_outputs(tmp_path: Path) -> None:
    """What takes the interpreter seconds; `make test-slow` runs all of it."""
    for name in ("ditdh_a.model", "ditdh_a.guide", "decoder_a.model", "decoder_a.io"):
        shutil.copy(GOLDEN / f"{name}.safetensors", tmp_path)
    kept = {"x", "t", "y", "shift", "num_steps", "v", "v_null"}
    with safe_open(GOLDEN / "ditdh_a.io.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in kept}
        save_file(tensors, tmp_path / "ditdh_a.io.safetensors", file.metadata())
    result = run_parity(tmp_path, "--kernels", "triton")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 outputs compared, 0 above their bound" in result.stdout


def test_a_wrong_number_is_found(tmp_path: Path) -> None:
    for name in ("decoder_a.model.safetensors", "decoder_a.io.safetensors"):
        shutil.copy(GOLDEN / name, tmp_path / name)
    path = tmp_path / "decoder_a.io.safetensors"
    with safe_open(path, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    tensors["image"] = tensors["image"] * (1 + 2e-5)
    save_file(tensors, path, metadata)
    result = run_parity(tmp_path)
    assert result.returncode == 1
    assert "FAILED" in result.stdout


@pytest.mark.parametrize("name", ["", "stranger.safetensors"])
def test_a_folder_without_file_sets_is_no_success(tmp_path: Path, name: str) -> None:
    if name:
        save_file({"a": torch.zeros(1)}, tmp_path / name)
    result = run_parity(tmp_path)
    assert result.returncode == 1
    if name:
        assert "unknown contents" in result.stderr

"""What would run on sm_80, sm_90 and sm_100 compiles there: no spills, and the matrix units."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rae.kernels.dispatch import TABLES, Table

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "architecture",
    ["90", *(pytest.param(name, marks=pytest.mark.slow) for name in ("80", "100"))],
)
def test_every_entry_compiles_without_spills(architecture: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    script = ROOT / "benchmarks" / "compile_kernels.py"
    command = [sys.executable, script, "--architecture", architecture, "--csv", path]
    # Interpreted kernels cannot be compiled.
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = list(csv.DictReader(path.read_text().splitlines()))
    compiled = {(row["case"].split(", ")[0], row["config"]) for row in rows}
    for entry in Table.read(TABLES / f"sm_{architecture}.json").entries:
        config = " ".join(f"{name} {value}" for name, value in entry.config.items())
        assert (entry.op, config) in compiled
    dots = [row for row in rows if row["case"].startswith(("swiglu, bf", "attention, bf"))]
    assert len(dots) >= 8
    for row in rows:
        assert (row["problem"], row["spills"]) == ("", "0")
    assert all(int(row["matrix_instructions"]) > 0 for row in dots)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ("--model=DiTDH-S-256", "--dtype=bf16", "--batch=2"),
            ["DiTDH-S-256, bf16, 2: 30 _adaln_kernel, 14 _attention_kernel, 14 _swiglu_kernel"],
        ),
        pytest.param((), 16 * [""], marks=pytest.mark.slow),
    ],
)
def test_whatever_a_model_launches_compiles(flags: tuple[str, ...], expected: list[str]) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "compile_models.py", *flags]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == len(expected)
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True))

"""The goals and the table of forwards, from what gpu.sh leaves in a folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MODEL = "DiTDH-XL-256"


def row(arm: str, batch: int, ms: float, **more: float) -> dict[str, Any]:
    return {"arm": arm, "batch": batch, "turns": 3, "ms_per_step": ms, "of_the_peak": 0.5} | more


def write(path: Path, **figures: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"model": MODEL, "device": "NVIDIA H200"} | figures))


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "benchmarks" / "goals.py", folder]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def fill(folder: Path, forward_ms: float = 17.5, model: str = MODEL) -> None:
    rows = [row("ours", 32, forward_ms), row("ours", 1, 1.2)]
    rows.append(row("authors, bf16", 32, 40, ours_over_it=2.25))
    rows.append({"arm": "authors, fp32", "batch": 32, "turns": 0, "error": "out of memory"})
    write(folder / "none" / "throughput.json", model=model, rows=rows)
    compiled = row("authors, compiled bf16", 32, 24, ours_over_it=1.31)
    write(folder / "compiled" / "throughput.json", rows=[row("ours", 32, 99), compiled])
    guided = [row("ours", n, 1, images_per_s=rate) for n, rate in ((1, 12.0), (32, 26.5))]
    write(folder / "autoguidance" / "throughput.json", rows=guided)
    write(folder / "http.json", alone_s={"p50": 0.0555})
    write(folder / "train-step-XL.json", bf16={"64": {"faster_ms": 9, "faster_compiled_ms": 1.3}})


def test_all_goals_are_met(tmp_path: Path) -> None:
    fill(tmp_path)
    result = run(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "device NVIDIA H200" in result.stdout
    assert "| 1 | 1.2 | - | - | - | 0.5 |\n| 32 | 17.5 | 40 | - | 24 | 0.5 |\n" in result.stdout
    goals = [line for line in result.stdout.splitlines() if line.endswith("| met |")]
    assert [goal.split(" | ")[2] for goal in goals] == [
        "17.5",
        "26.5",
        "55.5",
        "2.25",
        "1.31",
        "1.3",
    ]


def test_what_is_missed_or_was_not_measured_is_said(tmp_path: Path) -> None:
    fill(tmp_path, forward_ms=18.1)
    (tmp_path / "http.json").unlink()
    result = run(tmp_path)
    assert result.returncode == 1
    assert "| at most 18 | 18.1 | **not met** |" in result.stdout
    assert "| at most 56 | - | not measured |" in result.stdout


def test_figures_of_another_model_do_not_count(tmp_path: Path) -> None:
    fill(tmp_path, model="digits")
    result = run(tmp_path)
    assert "| at most 18 | 99 | **not met** |" in result.stdout
    assert "no folder" in run(tmp_path / "missing").stderr

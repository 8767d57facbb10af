"""The benchmark of the ops runs where there is no GPU, so that it is not broken when there is."""

from __future__ import annotations

import csv
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def test_every_op_is_timed_and_what_cannot_run_is_an_error_in_its_row(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "ops.py", "--device", "cpu", "--quick"]
    result = subprocess.run(
        [*command, "--no-compile", "--out", tmp_path],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    with (tmp_path / "ops.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = {(op, name) for op in ("adaln", "guided_euler") for name in ("ours", "eager")}
    expected |= {("linear", name) for name in ("eager", "padded")}
    expected |= {("swiglu", name) for name in ("ours", "library", "eager")}
    expected |= {("attention", name) for name in ("ours", "cudnn", "flash", "eager")}
    assert {(row["op"], row["implementation"]) for row in rows} == expected
    for row in rows:
        assert row["device"].startswith("cpu")
        if row["implementation"] in ("cudnn", "flash"):
            assert "cannot run here" in row["error"] and not row["p50_us"]
        else:
            assert not row["error"]
            assert 0 < float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"]) < 1e8
            # The ceiling is a larger product: a linear of a CPU may pass it.
            assert 0 < float(row["fraction"]) < (100 if row["op"] == "linear" else 1)
    figures = json.loads((tmp_path / "ops.json").read_text())
    assert all(value > 0 for value in figures["ceilings"].values())
    assert "goals" not in figures


def row(
    op: str, name: str, rows: int, p50_us: float | None, fraction: float = 0.0
) -> dict[str, Any]:
    times = {} if p50_us is None else {"p50_us": p50_us, "fraction": fraction}
    return {"op": op, "implementation": name, "shape": f"{rows}", "dims": {"rows": rows}} | times


def test_goals_take_the_worst_shape_and_the_best_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    rows = [row("adaln", "ours", n, 1.0, x) for n, x in ((256, 0.1), (8192, 0.9), (16384, 0.86))]
    rows += [row("adaln", "eager", n, 9.0) for n in (256, 8192, 16384)]
    rows += [row("swiglu", name, 8192, us) for name, us in (("ours", 2.0), ("library", 1.8))]
    rows += [row("swiglu", name, 8192, us) for name, us in (("authors", 3.2), ("eager", 3.0))]
    times = {"ours": 2.0, "cudnn": None, "flash": 2.5, "eager": 9.0}
    rows += [row("attention", name, 1, us) for name, us in times.items()]
    goals = importlib.import_module("ops").goals
    found = [(goal["measured"], goal["met"]) for goal in goals(rows)]
    assert found == [(0.86, True), (0.9, False), (1.6, True), (1.25, True)]
    failed = [row("attention", "flash", 2, 1.0), row("attention", "ours", 2, None)]
    failed += [row("attention", "eager", 2, 1.0)]
    assert goals(rows + failed)[-1]["measured"] is None
    assert not goals(rows + failed)[-1]["met"]

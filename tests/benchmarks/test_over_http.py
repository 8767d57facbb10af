"""The benchmark of HTTP, on the tiny checkpoint, and what it says of turns."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from benchmarks.over_http import Result

ROOT = Path(__file__).parents[2]


def test_a_run_on_the_tiny_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "over_http.py", "--model", tiny_checkpoint]
    command += ["--steps", "3", "--batch", "2", "--images", "6", "--turns", "1"]
    command += ["--alone", "3"]
    path = tmp_path / "out" / "figures.json"
    command += ["--json", path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert path.is_file(), result.stderr
    figures = json.loads(path.read_text())
    assert (figures["connections"], figures["images_per_turn"]) == (4, 6)
    (turn,) = figures["turns_images_per_s"]
    assert figures["ratio"] == pytest.approx(turn["http"] / turn["offline"])
    assert figures["met"] == (figures["ratio"] >= 0.95) == (result.returncode == 0)
    assert 0.1 < figures["png_kb"] < 2
    assert 0 < figures["alone_s"]["p50"] <= figures["alone_s"]["max"] < 60


def test_the_first_request_alone_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    over_http = importlib.import_module("over_http")
    seconds = iter([9.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr(over_http, "run_client", lambda *_: SimpleNamespace(seconds=next(seconds)))
    found = over_http.time_alone(None, [None] * 4)
    assert (found["p50"], found["max"]) == (2.0, 3.0)


def test_turns_are_compared_in_pairs_and_images_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    over_http = importlib.import_module("over_http")

    def result(seconds: float, value: int = 0) -> Result:
        images = {seed: np.full((2, 2, 3), value, dtype=np.uint8) for seed in range(4)}
        return over_http.Result(seconds=seconds, cpu_s=2 * seconds, images=images, num_bytes=8000)

    turns = [(result(1), result(2)), (result(8), result(8)), (result(4), result(5))]
    found = over_http.summary(turns)
    assert (found["ratio"], found["met"]) == (0.8, False)
    assert (found["offline_images_per_s"], found["http_images_per_s"]) == (1.0, 0.8)
    assert (found["offline_cpu_s_per_image"], found["http_cpu_s_per_image"]) == (2.0, 2.5)
    assert (found["png_kb"], found["differ_by"]) == (2.0, 0)
    others = [(result(1), result(1, value=2))]
    with pytest.raises(RuntimeError, match="differ over HTTP, by 2 of 255"):
        over_http.summary(others)
    assert over_http.summary(others, is_exact=False)["differ_by"] == 2

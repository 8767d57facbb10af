"""What benchmarks/gpu.sh refuses before it starts, and what it leaves out when time is short."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", ROOT / "benchmarks" / "gpu.sh", *arguments],
        env={**os.environ, "DEVICE": "cpu", "UPSTREAM": "", **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("parts", "variables", "message"),
    [
        (("parity", "frist"), {}, "no part frist; known: first second"),
        (("first",), {"DEVICE": "gpu"}, "DEVICE=gpu is not cuda or cpu"),
        (("first",), {"UPSTREAM": "/nowhere"}, "UPSTREAM=/nowhere is no folder"),
    ],
)
def test_what_it_cannot_do_is_refused_before_anything_runs(
    tmp_path: Path, parts: tuple[str, ...], variables: dict[str, str], message: str
) -> None:
    result = run(tmp_path / "out", *parts, **variables)
    assert result.returncode == 2
    assert message in result.stderr
    assert not result.stdout and not (tmp_path / "out").exists()


def test_without_a_folder_it_says_what_it_takes() -> None:
    result = run()
    assert (result.returncode, result.stdout) == (2, "")
    assert "benchmarks/gpu.sh OUT [PART ...]" in result.stderr


def test_no_part_starts_when_the_time_is_up(tmp_path: Path) -> None:
    result = run(tmp_path, "ops-compile", "sixth", "parity", BUDGET="5")
    names = [line.removeprefix("== ") for line in result.stdout.splitlines()]
    left_out = ["ops-compile", "xl512", "start", "deterministic", "parity-fp32", "parity-bf16"]
    assert names == [f"{name}: no time left" for name in left_out]
    assert result.returncode == 1

"""Where figures say that they were measured."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_commit_of_a_copy_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    facts = importlib.import_module("machine_facts")
    monkeypatch.delenv("COMMIT", raising=False)
    monkeypatch.setenv("PATH", "")  # no git, and no nvidia-smi
    assert facts.commit() == facts.gpu_name() == ""
    monkeypatch.setenv("COMMIT", "1a2b3c4")
    assert facts.commit() == "1a2b3c4"

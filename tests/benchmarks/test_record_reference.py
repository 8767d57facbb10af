"""The recorder's own part; the authors' code that it runs is not here."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from rae.models.config import CONFIGS, DiTDHConfig

FILE = Path(__file__).parents[2] / "benchmarks" / "record_reference.py"


@pytest.fixture(scope="module")
def recorder() -> ModuleType:
    spec = spec_from_file_location("record_reference", FILE)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_authors_model_gets_every_option(recorder: ModuleType) -> None:
    odd = replace(
        CONFIGS["DiTDH-S-512"],
        num_classes=7,
        mlp_ratio=3.0,
        class_dropout_prob=0.0,
        use_qknorm=True,
        use_rmsnorm=False,
        use_swiglu=False,
        use_pos_embed=False,
    )
    for config in (*CONFIGS.values(), odd):
        arguments = config.to_published()
        assert DiTDHConfig.from_published(arguments) == config


def test_without_the_authors_code_one_line_says_so(tiny_checkpoint: Path, tmp_path: Path) -> None:
    flags = ["--upstream", tmp_path, "--checkpoint", tiny_checkpoint, "--out", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, FILE, *flags], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr == "record_reference: No module named 'stage1'\n"
    assert not (tmp_path / "out").exists()

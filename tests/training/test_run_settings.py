"""The names of presets, which help and commands have without the recipes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from rae.training.cli import train_app
from rae.training.run_settings import DECODERS, DITS
from rae.training.stage1.decoder_recipe import DECODER_PRESETS
from rae.training.stage2.presets import DIT_PRESETS


def test_the_names_are_those_of_the_recipes() -> None:
    assert tuple(DECODER_PRESETS) == DECODERS
    assert tuple(DIT_PRESETS) == DITS
    assert not set(DECODERS) & set(DITS)


@pytest.mark.parametrize(
    ("command", "names"), [("decoder", DECODERS), ("dit", DITS), ("plan", (*DECODERS, *DITS))]
)
def test_help_lists_them(command: str, names: tuple[str, ...]) -> None:
    text = CliRunner().invoke(train_app, [command, "--help"], env={"COLUMNS": "400"}).output
    assert ", ".join(names[:4]) in text and all(name in text for name in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("['decoder', 'DINOv2-B-25']", "did you mean DINOv2-B-256?"),
        ("['dit', 'huge']", "known: DiTDH-S-256"),
        ("['plan', 'DiTDH-XXL-256']", "did you mean DiTDH-XL-256?"),
    ],
)
def test_another_is_refused_before_torch_is_imported(arguments: str, message: str) -> None:
    code = f"""
import sys
from rae.training.cli import train_app
try:
    train_app({arguments})
except SystemExit as end:
    sys.exit(end.code if "torch" not in sys.modules else 99)
"""
    wide = {**os.environ, "COLUMNS": "200"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=wide)
    assert result.returncode == 2 and message in result.stderr

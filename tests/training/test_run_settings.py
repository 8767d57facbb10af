"""What commands know of the recipes without torch, which takes seconds to import."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from rae.training.cli import train_app
from rae.training.run_settings import DECODERS, DITS


def test_a_name_is_of_one_recipe() -> None:
    assert not set(DECODERS) & set(DITS)


@pytest.mark.parametrize(
    ("command", "names"), [("decoder", DECODERS), ("dit", DITS), ("plan", (*DECODERS, *DITS))]
)
def test_help_lists_them(command: str, names: tuple[str, ...]) -> None:
    text = CliRunner().invoke(train_app, [command, "--help"], env={"COLUMNS": "400"}).output
    assert ", ".join(names[:4]) in text and all(name in text for name in names)


DECODER = "decoder MAE-B-256 --images x --encoder x --out x"
DIT = "dit DiTDH-S-256 --rae x --images x --out x"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("decoder DINOv2-B-25", "did you mean DINOv2-B-256?"),
        ("dit huge", "known: DiTDH-S-256"),
        ("plan DiTDH-XXL-256", "did you mean DiTDH-XL-256?"),
        (f"{DECODER} --set colour=1", "--set colour=1: the recipe has no 'colour'"),
        (f"{DIT} --set model.dept=1", "--set model.dept=1: model has no 'dept'; did you mean"),
        (f"{DIT} --set epochs=39", "constant_epochs 40 are more than epochs 39"),
        ("plan DiT-S-256 --set lr=fast", "--set lr=fast: a number (float) is wanted"),
    ],
)
def test_what_is_no_recipe_is_refused_before_torch_is_imported(command: str, message: str) -> None:
    code = f"""
import sys
from rae.training.cli import train_app
try:
    train_app({command.split()})
except SystemExit as end:
    sys.exit(end.code if "torch" not in sys.modules else 99)
"""
    wide = {**os.environ, "COLUMNS": "200"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=wide)
    assert result.returncode == 2 and message in result.stderr

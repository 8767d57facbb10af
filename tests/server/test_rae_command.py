"""The `rae` command, but for what `rae serve` does once it serves."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated

import pytest
import torch
import typer
from fastapi.testclient import TestClient
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from rae.server.cli import app
from rae.server.settings import server_version

WIDE = {"COLUMNS": "200", "NO_COLOR": "1", "RAE_PRECISION": "fp32"}


def rae(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=WIDE)


def edit_config(key: str, value: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "dit_dh.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return edit


def truncate(folder: Path) -> None:
    path = folder / "decoder.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


BROKEN: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing tensor": (
        edit_tensors(lambda tensors: tensors.pop("s_embedder.proj.weight")),
        ("dit_dh.safetensors", "1 missing: s_embedder.proj.weight"),
    ),
    "unexpected tensor": (
        edit_tensors(lambda tensors: tensors.update(extra=torch.zeros(2))),
        ("dit_dh.safetensors", "1 unexpected: extra [2]"),
    ),
    "wrong shape": (
        edit_tensors(lambda tensors: tensors.update({"s_embedder.proj.bias": torch.zeros(3)})),
        ("s_embedder.proj.bias is [3], expected [32]",),
    ),
    "truncated file": (truncate, ("decoder.safetensors", "truncated")),
    "missing file": (
        lambda folder: (folder / "guide.safetensors").unlink(),
        ("guide.safetensors",),
    ),
    "unknown key": (edit_config("colour", "red"), ("unknown key 'colour'", "known: name")),
    "newer format": (edit_config("format_version", 99), ("99", "reads 1 to")),
    "broken config": (
        lambda folder: (folder / "config.json").write_text("{"),
        ("config.json", "line 1 column"),
    ),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        ("is not a checkpoint folder", "config.json"),
    ),
}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("command", ["serve", "generate", "info"])
def test_a_broken_checkpoint_is_one_message(
    tiny_checkpoint: Path, tmp_path: Path, how: str, command: str
) -> None:
    breaking, words = BROKEN[how]
    folder = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, folder)
    breaking(folder)
    flags = {
        "serve": ["--port", "0", "--model", folder],
        "generate": ["--model", folder, "--out", tmp_path],
        "info": [folder],
    }
    result = rae(command, *flags[command])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert str(folder) in result.stderr
    for word in words:
        assert word in result.stderr


def test_info_shows_the_checkpoint(tiny_checkpoint: Path) -> None:
    result = rae("info", tiny_checkpoint)
    assert result.exit_code == 0
    rows = [line.strip("│ ").split("│") for line in result.stdout.splitlines() if "│" in line]
    found = {name.strip(): value.strip() for name, value in rows}
    assert found["name"] == "tiny"
    assert found["classes"] == "4: zero, one, two, three"
    assert found["image"] == "16 × 16 px"
    assert found["shift"] == "1.5"
    assert found["licence"] == "MIT"
    assert found["encoder"] == "none"
    assert "steps 10, cfg 1.5" in found["defaults"]
    assert int(found["dit_dh parameters"].replace(",", "")) > 10_000
    for name in ("dit_dh", "decoder", "guide"):
        assert re.fullmatch(r"0\.\d\d MB", found[f"{name}.safetensors"])


def test_info_finds_a_file_that_was_changed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(tiny_checkpoint, folder)
    edit_tensors(lambda tensors: tensors["s_embedder.proj.bias"].add_(1))(folder)
    result = rae("info", folder)
    assert result.exit_code == 1
    recorded = json.loads((folder / "config.json").read_text())["sha256"]["dit_dh.safetensors"]
    assert f"{folder / 'dit_dh.safetensors'} has sha256" in result.stderr
    assert f"config.json says {recorded}" in result.stderr
    assert "decoder.safetensors" not in result.stderr


def test_info_and_help_need_only_the_base_install(
    tiny_checkpoint: Path, child_environment: dict[str, str]
) -> None:
    script = (
        "import sys; from rae.server.cli import app, main\n"
        "assert not {'torch', 'fastapi', 'pydantic', 'PIL'} & sys.modules.keys()\n"
        "sys.modules |= dict.fromkeys(('transformers', 'sklearn', 'torchvision'))\n"
        f"sys.argv = ['rae', 'info', {str(tiny_checkpoint)!r}]; main()"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        capture_output=True,
        env=child_environment,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert "dit_dh parameters" in done.stdout.decode()


def test_version() -> None:
    assert rae("--version").stdout == f"rae-server {server_version()}\n"


def test_generate_writes_what_the_server_answers(
    tiny_checkpoint: Path, tmp_path: Path, client: TestClient
) -> None:
    flags = ["--model", tiny_checkpoint, "--device", "cpu", "--out", tmp_path / "new" / "folder"]
    flags += ["--seed", "5", "-n", "2", "--steps", "6", "--cfg", "2"]
    flags += ["--guidance-interval", "0.1", "0.9", "--guidance-method", "autoguidance"]
    result = rae("generate", "three", "0", *flags)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "new" / "folder"
    names = ["3-three-seed5.png", "3-three-seed6.png", "0-zero-seed5.png", "0-zero-seed6.png"]
    assert result.stdout.splitlines() == [f"{folder / name} (seed {name[-5]})" for name in names]
    for name, label, seed in zip(names, (3, 3, 0, 0), (5, 6, 5, 6), strict=True):
        asked = {"class_id": label, "seed": seed, "steps": 6, "cfg": 2}
        asked |= {"guidance_interval": [0.1, 0.9], "guidance_method": "autoguidance"}
        assert (folder / name).read_bytes() == client.post("/generate", json=asked).content


def test_generate_names_the_seed_it_drew(tiny_checkpoint: Path, tmp_path: Path) -> None:
    flags = ["--model", tiny_checkpoint, "--out", tmp_path, "--format", "webp", "--steps", "2"]
    (line,) = rae("generate", *flags).stdout.splitlines()
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("unconditional-seed")
    assert line == f"{path} (seed {path.stem.removeprefix('unconditional-seed')})"


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["4"], 2, "class_id is 4; allowed: an integer from 0 to 3"),
        (["nine"], 2, 'class_name is "nine"; allowed: one of zero, one, two, three'),
        (["zero", "--cfg", "0.5"], 2, "cfg is 0.5; allowed: a number from 1 (off) to 100"),
        (["zero", "--cfg", "nan"], 2, "cfg is NaN; allowed"),
        (["zero", "--steps", "1"], 2, "steps is 1; allowed: an integer from 2"),
        (["zero", "--device", "mps"], 1, "device 'mps' is not available on this machine"),
    ],
)
def test_generate_refuses_as_the_server_does(
    tiny_checkpoint: Path, arguments: list[str], exit_code: int, message: str
) -> None:
    if "mps" in arguments and torch.backends.mps.is_available():
        pytest.skip("this machine has mps")
    result = rae("generate", *arguments, "--model", tiny_checkpoint)
    assert result.exit_code == exit_code
    assert result.stderr.startswith(f"Error: {message}")
    assert result.stderr.count("\n") == 1


def test_an_output_folder_that_is_a_file_is_said(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = rae("generate", "--model", tiny_checkpoint, "--out", tmp_path / "file")
    assert result.exit_code == 1
    assert "File exists" in result.stderr


def test_train_and_eval_pass_their_arguments_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    training = ModuleType("rae.training.cli")
    for name in ("train", "eval"):
        sub = typer.Typer(callback=lambda: None)

        @sub.command()
        def digits(out: Annotated[Path, typer.Option(help="Where to.")], name: str = name) -> None:
            seen.append((name, out))

        setattr(training, f"{name}_app", sub)
    monkeypatch.setitem(sys.modules, "rae.training.cli", training)
    assert rae("train", "digits", "--out", "a").exit_code == 0
    assert rae("eval", "digits", "--out", "b").exit_code == 0
    assert seen == [("train", Path("a")), ("eval", Path("b"))]
    shown = rae("train", "digits", "--help").stdout
    assert "Usage: rae train digits" in shown
    assert "Where to." in shown
    assert "digits" in rae("eval", "--help").stdout
    refused = rae("train", "digits", "--nonsense")
    assert refused.exit_code == 2
    assert "--nonsense" in refused.output


@pytest.mark.parametrize("command", ["train", "eval"])
def test_without_the_extra_the_pip_line_is_said(
    monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setitem(sys.modules, "rae.training.cli", None)
    result = rae(command, "digits")
    assert result.exit_code == 1
    assert result.stderr.endswith("pip install 'rae-server[train]'\n")

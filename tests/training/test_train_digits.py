"""`train digits` and `eval digits`, in miniature: every stage, a few steps each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from rae.models.checkpoint import load_checkpoint
from rae.models.checkpoint_config import read_config
from rae.models.tensor_files import file_sha256
from rae.training import cli
from rae.training.digits import digits_judge
from rae.training.digits.digits_data import render, split_digits
from rae.training.digits.digits_judge import judge_checkpoint, psnr_db
from rae.training.digits.pipeline import DigitsRecipe, train_digits
from rae.training.distributed import World
from rae.training.reports.grid import save_grid
from rae.training.reports.report import Silent
from rae.training.run_settings import RunSettings

ALONE = World(0, 1, torch.device("cpu"))
DEFAULT = DigitsRecipe(copies=0)
BATCH = 32  # of 1,500 images: 46 steps an epoch
MINIATURE = replace(
    DEFAULT,
    encoder=replace(DEFAULT.encoder, batch_size=BATCH, epochs=0.3, warmup_epochs=0),
    decoder=replace(DEFAULT.decoder, batch_size=BATCH, epochs=0.6, warmup_epochs=0, ema_decay=0.5),
    dit=replace(DEFAULT.dit, batch_size=BATCH, epochs=0.5, warmup_epochs=0),
    guide=replace(DEFAULT.guide, batch_size=BATCH, epochs=0.2, warmup_epochs=0),
)


class Interrupted(Silent):
    """A run that is told to stop while a stage runs."""

    def __init__(self, name: str, stage: str) -> None:
        self.stops = name == stage

    def start(self, step: int, num_steps: int) -> None:
        if self.stops:
            raise KeyboardInterrupt


def train(out: Path, *, stop_in: str = "") -> None:
    settings = RunSettings(out=out, precision="bf16", num_workers=0, log_every=5)
    train_digits(out, MINIATURE, settings, ALONE, lambda name, _: Interrupted(name, stop_in))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("trained") / "digits"
    train(out)
    yield out / "checkpoint"


def test_the_folder_loads_and_says_how_it_was_made(trained: Path) -> None:
    checkpoint = load_checkpoint(trained, with_encoder=True)
    config = checkpoint.config
    assert config.classes[7] == "seven"
    assert config.shift == MINIATURE.dit.shift
    assert checkpoint.guide is not None
    assert config.notes["recipe"]["dit"]["epochs"] == 0.5
    assert "Alpaydin" in config.source
    assert "CC BY 4.0" in config.license
    assert {"encoder/config.json", "encoder/model.safetensors"} <= set(config.sha256)
    assert set(config.fingerprints) == {"dit_dh", "guide", "decoder", "encoder"}


def test_latents_are_normalised_and_every_part_has_learnt(trained: Path) -> None:
    checkpoint = load_checkpoint(trained, with_encoder=True)
    train_set, held_out = split_digits()
    latents = checkpoint.rae.encode(render(train_set.scans))
    assert latents.mean().abs() < 0.02
    assert latents.var(0).mean().item() == pytest.approx(1, abs=0.1)
    real = render(held_out.scans)
    rebuilt = checkpoint.rae.decode(checkpoint.rae.encode(real)).clamp(0, 1)
    mean = real.mean(0, keepdim=True).expand_as(real)
    assert psnr_db(rebuilt, real) > psnr_db(mean, real)


def test_a_run_that_was_interrupted_ends_in_the_same_weights(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    for stage in ("decoder", "guide"):
        with pytest.raises(KeyboardInterrupt):
            train(out, stop_in=stage)
        assert not (out / "checkpoint").exists()
    train(out)
    assert read_config(trained)[0].sha256 == read_config(out / "checkpoint")[0].sha256


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    result = CliRunner().invoke(cli.train_app, ["digits", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "is not empty" in result.output
    (tmp_path / "file").touch()
    result = CliRunner().invoke(cli.train_app, ["digits", "--out", str(tmp_path / "file" / "x")])
    assert result.exit_code == 1
    assert "Not a directory" in result.output


def test_eval_fails_an_untrained_model_and_writes_its_figures(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digits_judge, "judge_checkpoint", partial(judge_checkpoint, per_class=2))
    file = tmp_path / "figures.json"
    result = CliRunner().invoke(
        cli.eval_app, ["digits", "--checkpoint", str(trained), "--json", str(file)]
    )
    assert result.exit_code == 1
    figures = {item["name"]: item for item in json.loads(file.read_text())["criteria"]}
    assert figures["held-out real digits recognised"]["passed"] is True
    assert figures["cfg 1: recognised"]["passed"] is False
    assert figures["cfg 1: recognised"]["value"] < 0.6


def test_grid_is_written(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits_judge, "SAMPLES_PER_CLASS", 1)
    file = tmp_path / "grid.png"
    arguments = ["digits", "--checkpoint", str(trained), "--grid", str(file)]
    assert CliRunner().invoke(cli.eval_app, arguments).exit_code == 0
    with Image.open(file) as picture:
        assert picture.size == (64, 640)  # one column here, ten classes, twice as large


def test_a_grid_is_filled_row_by_row(tmp_path: Path) -> None:
    colours = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 1, 1]])
    save_grid(colours[:, :, None, None].expand(6, 3, 4, 5), 3, tmp_path / "grid.png", scale=2)
    with Image.open(tmp_path / "grid.png") as file:
        picture = file.convert("RGB")
    assert picture.size == (3 * 10, 2 * 8)
    for index, colour in enumerate(colours.tolist()):
        x, y = 10 * (index % 3), 8 * (index // 3)
        expected = tuple(int(255 * value) for value in colour)
        assert picture.getpixel((x, y)) == picture.getpixel((x + 9, y + 7)) == expected


def test_files_are_readable_by_all_and_named_with_their_sha256(trained: Path) -> None:
    config, _ = read_config(trained)
    assert "encoder/model.safetensors" in config.sha256
    for name, sha256 in config.sha256.items():
        assert (trained / name).stat().st_mode & 0o777 == 0o644
        assert file_sha256(trained / name) == sha256


def test_only_a_model_of_digits_is_judged_as_one(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="4 classes and 16 px cannot be judged as digits"):
        judge_checkpoint(load_checkpoint(tiny_checkpoint))


def test_an_unwritable_place_is_refused_before_judging(tmp_path: Path) -> None:
    arguments = ["digits", "--json", str(tmp_path / "no" / "x.json")]
    assert CliRunner().invoke(cli.eval_app, arguments).exit_code == 2


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.eval_app, ["digits", "--checkpoint", str(tmp_path)])
    assert result.exit_code == 2
    assert "config.json" in result.output

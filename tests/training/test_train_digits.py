"""`train digits` and `eval digits`, in miniature: every stage, a few steps each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.progress import Progress
from typer.testing import CliRunner

from rae.models import checkpoint
from rae.models.checkpoint import load_checkpoint
from rae.models.checkpoint_config import read_config
from rae.models.config import DiTDHConfig
from rae.models.dit_dh import DiTDH
from rae.models.tensor_files import file_sha256
from rae.training import cli, digits
from rae.training.digits import Recipe, Reporter, train_digits
from rae.training.digits_data import render, split_digits
from rae.training.digits_judge import evaluate, psnr_db, save_grid
from rae.training.loop import OnStep, Plan

MINIATURE = Recipe(
    copies=1,
    encoder=Plan(steps=12, batch_size=32, lr=1e-3),
    decoder=Plan(steps=25, batch_size=32, lr=2e-3, ema_decay=0.5),
    dit_dh=Plan(steps=20, batch_size=32, lr=2e-3),
    guide=Plan(steps=5, batch_size=32, lr=2e-3),
    sample_every=20,
)


def train(out: Path) -> None:
    with Progress(disable=True) as progress:
        train_digits(out, MINIATURE, progress)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "SAMPLES_PER_CLASS", 1)
        patch.setattr(cli, "SAMPLES_PER_CLASS", 1)
        train(out)
        yield out


def test_the_folder_loads_and_says_how_it_was_made(trained: Path) -> None:
    checkpoint = load_checkpoint(trained, with_encoder=True)
    config = checkpoint.config
    assert config.classes[7] == "seven" and config.shift == MINIATURE.shift
    assert checkpoint.guide is not None
    assert config.notes["recipe"]["dit_dh"]["steps"] == 20
    assert set(config.notes["seconds"]) == {"encoder", "decoder", "dit_dh", "guide"}
    assert "Alpaydin" in config.source and "CC BY 4.0" in config.license
    assert {"encoder/config.json", "encoder/model.safetensors"} <= set(config.sha256)
    assert set(config.fingerprints) == {"dit_dh", "guide", "decoder", "encoder"}
    assert [path.name for path in (trained / "samples").iterdir()] == ["000020.png"]


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
    losses = checkpoint.config.notes["last_losses"]
    assert losses["dit_dh"] < 1.9  # zero velocity has 2: the variances of noise and of latents
    assert losses["guide"] < 2.1
    assert losses["encoder"] < (4 * real.square()).mean()  # of a black picture


def test_the_same_seed_trains_the_same_weights(trained: Path, tmp_path: Path) -> None:
    train(tmp_path / "again")
    assert read_config(trained)[0].sha256 == read_config(tmp_path / "again")[0].sha256


def test_losses_are_noted_as_they_fall() -> None:
    reporter = Reporter(Progress(disable=True))
    on_step = reporter.stage("stage", Plan(steps=200, lr=1.0))
    for step in range(200):
        on_step(step + 1, 1.0 if step < 100 else 0.25, torch.nn.Identity())
    assert reporter.notes()["last_losses"] == {"stage": 0.25}


def test_eval_fails_an_untrained_model_and_writes_its_figures(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "evaluate", partial(evaluate, per_class=2))
    file = tmp_path / "figures.json"
    result = CliRunner().invoke(
        cli.eval_app, ["digits", "--checkpoint", str(trained), "--json", str(file)]
    )
    assert result.exit_code == 1
    figures = {item["name"]: item for item in json.loads(file.read_text())["criteria"]}
    assert figures["held-out real digits recognised"]["passed"] is True
    assert figures["cfg 1: recognised"]["passed"] is False
    assert figures["cfg 1: recognised"]["value"] < 0.6


def test_grid_is_written(trained: Path, tmp_path: Path) -> None:
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
        evaluate(load_checkpoint(tiny_checkpoint))


def test_an_unwritable_place_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = CliRunner().invoke(cli.train_app, ["digits", "--out", str(tmp_path / "file" / "x")])
    assert result.exit_code == 2 and "--out" in result.output
    arguments = ["digits", "--json", str(tmp_path / "no" / "x.json")]
    assert CliRunner().invoke(cli.eval_app, arguments).exit_code == 2


def test_a_folder_in_use_is_refused_and_samples_are_not(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    assert cli.unusable(tmp_path) is None
    assert cli.unusable(tmp_path / "new") is None
    (tmp_path / "thesis.tex").touch()
    result = CliRunner().invoke(cli.train_app, ["digits", "--out", str(tmp_path)])
    assert result.exit_code == 2 and "thesis.tex" in result.output
    assert "not a folder" in str(cli.unusable(tmp_path / "thesis.tex"))


def test_an_interrupt_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "train_dit_dh", interrupted)
    monkeypatch.setattr(cli, "Recipe", lambda **_: MINIATURE)
    result = CliRunner().invoke(cli.train_app, ["digits", "--out", str(tmp_path / "out")])
    assert result.exit_code == 130 and "no checkpoint" in result.output
    assert list((tmp_path / "out").iterdir()) == []


def test_an_interrupt_while_writing_leaves_a_folder_to_train_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    save = checkpoint.write_tensors

    def untrained(config: DiTDHConfig, *_: object, on_step: OnStep, **__: object) -> DiTDH:
        model = DiTDH(config)
        on_step(1, 1.0, model)
        return model

    def interrupted(path: Path, tensors: dict[str, torch.Tensor]) -> str:
        if path.name == "decoder.safetensors":
            raise KeyboardInterrupt
        return save(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", interrupted)
    monkeypatch.setattr(digits, "train_dit_dh", untrained)
    monkeypatch.setattr(cli, "Recipe", lambda **_: MINIATURE)
    result = CliRunner().invoke(cli.train_app, ["digits", "--out", str(out)])
    assert result.exit_code == 130
    assert {path.name for path in out.iterdir()} == {"encoder", "dit_dh.safetensors"}
    assert cli.unusable(out) is None


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.eval_app, ["digits", "--checkpoint", str(tmp_path)])
    assert result.exit_code == 2 and "config.json" in result.output

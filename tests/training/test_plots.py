"""Curves from logs, and the command that draws them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from rae.training.reports.grid import make_grid, save_grid
from rae.training.reports.plot_cli import plot_command
from rae.training.reports.plots import (
    COLOURS,
    curves,
    draw_runs,
    names,
    smoothed,
    sorted_keys,
    step_label,
)


def write_log(folder: Path, **columns: list[float | None]) -> Path:
    folder.mkdir(parents=True)
    lines = [
        json.dumps({"step": 100 * (i + 1), **dict(zip(columns, values, strict=True))})
        for i, values in enumerate(zip(*columns.values(), strict=True))
    ]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "log.jsonl"


def test_curves_leave_out_what_is_not_known_or_always_0(tmp_path: Path) -> None:
    log = write_log(
        tmp_path / "a", loss=[3.0, None, 1.0], mfu=[0.1, 0.2, 0.3], unreadable_images=[0, 0, 0]
    )
    found = curves(log)
    assert set(found) == {"loss", "mfu"}
    assert found["loss"][0].tolist() == [100, 300] and found["loss"][1].tolist() == [3, 1]
    assert found["mfu"][1].tolist() == pytest.approx([10, 20, 30])


def test_the_loss_comes_first_and_speeds_last() -> None:
    keys = {"mfu", "lr", "perceptual", "loss", "grad_norm", "l1", "images_per_s"}
    expected = ["loss", "l1", "perceptual", "grad_norm", "lr", "images_per_s", "mfu"]
    assert sorted_keys(keys) == expected


def test_smoothing_keeps_lines_and_takes_noise() -> None:
    line = np.arange(500.0)
    assert smoothed(line)[5:-5] == pytest.approx(line[5:-5])
    noise = np.tile([1.0, -1.0], 250)
    assert np.abs(smoothed(noise)).max() < 0.2
    assert smoothed(np.array([4.0])).tolist() == [4.0]


def test_labels() -> None:
    assert [step_label(x) for x in (0, 500, 20_000, 1_200_000)] == ["0", "500", "20k", "1.2M"]
    logs = [Path("/x/a/log.jsonl"), Path("/y/a/log.jsonl"), Path("/y/b/log.jsonl")]
    assert names(logs[1:]) == ["a", "b"]
    assert names(logs[:2]) == ["/x/a", "/y/a"]


def colours(path: Path) -> set[str]:
    with Image.open(path) as image:
        found = image.convert("RGB").getcolors(maxcolors=1_000_000)
    assert found is not None
    return {"#{:02X}{:02X}{:02X}".format(*colour) for _, colour in found}  # type: ignore[misc]


def test_each_run_has_a_curve_of_its_own_colour(tmp_path: Path) -> None:
    losses: list[float | None] = [100 / (i + 1) for i in range(40)]
    a = write_log(tmp_path / "a", loss=losses, lr=[1e-4] * 40, images_per_s=[5.0] * 40)
    b = write_log(tmp_path / "b", loss=losses[::-1])
    draw_runs([a], tmp_path / "one.png")
    draw_runs([a, b], tmp_path / "two.png")
    assert COLOURS[0] in colours(tmp_path / "one.png")
    assert COLOURS[1] not in colours(tmp_path / "one.png")
    assert {COLOURS[0], COLOURS[1]} <= colours(tmp_path / "two.png")


def test_a_single_point_can_be_seen(tmp_path: Path) -> None:
    draw_runs([write_log(tmp_path / "a", loss=[2.0])], tmp_path / "one.png")
    assert COLOURS[0] in colours(tmp_path / "one.png")


def invoke(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(plot_command)
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    return result.exit_code, result.output


def test_the_command(tmp_path: Path) -> None:
    run = write_log(tmp_path / "a", loss=[2.0, 1.0]).parent
    assert invoke(str(run)) == (0, f"Wrote {run / 'loss.png'}\n")
    own = (run / "loss.png").read_bytes()
    other = write_log(tmp_path / "b", loss=[1.0, 2.0]).parent
    assert invoke(str(run), str(other)) == (0, f"Wrote {run / 'compared.png'}\n")
    assert COLOURS[1] in colours(run / "compared.png")
    assert (run / "loss.png").read_bytes() == own
    assert {path.name for path in other.iterdir()} == {"log.jsonl"}
    code, text = invoke(str(run), str(tmp_path / "nothing"))
    assert code == 2 and "has no log.jsonl" in text
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "log.jsonl").touch()
    code, text = invoke(str(empty))
    assert code == 2 and "has no rows" in text
    code, text = invoke(str(run), "--out", str(tmp_path / "nowhere" / "a.png"))
    assert code == 1 and "Cannot draw" in text


def test_a_grid_is_scaled_and_its_colours_reduced(tmp_path: Path) -> None:
    import torch

    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    save_grid(images, 3, tmp_path / "few.png", scale=2, num_colours=16)
    with Image.open(tmp_path / "few.png") as few:
        assert few.size == (48, 32) and few.mode == "P"
        assert len(few.getcolors() or []) <= 16
    full = make_grid(images, 3)
    assert full.getpixel((9, 10)) == tuple((images[4, :, 2, 1] * 255).round().int().tolist())
    with pytest.raises(ValueError, match="no images"):
        make_grid(images[:0])

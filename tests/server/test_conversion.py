"""`rae convert` and `rae export` as commands: which flags mean what, and one line for errors."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from rae.models.checkpoint import load_checkpoint
from rae.models.published import HUB_REPOSITORY, PRESETS
from rae.models.tensor_files import read_tensors
from rae.server.cli import app
from rae.server.command_settings import ConvertSettings
from rae.server.conversion import published
from rae.server.settings import embedded_model


def rae(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny_encoder_checkpoint: Path) -> Path:
    out = tmp_path_factory.mktemp("exported") / "authors"
    result = rae("export", tiny_encoder_checkpoint, "--out", out)
    assert result.exit_code == 0, result.output
    assert "config.yaml, decoder/config.json, decoder/model.pt" in " ".join(result.output.split())
    return out


def test_there_and_back(exported: Path, tiny_encoder_checkpoint: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("zero\none\n\n two \nthree\n")
    result = rae(
        *("convert", "--config", exported / "config.yaml", "--root", exported),
        *("--out", tmp_path / "back", "--classes", names),
    )
    assert result.exit_code == 0, result.output
    assert f"Wrote {tmp_path / 'back'}" in result.output.replace("\n", "")
    first, second = load_checkpoint(tiny_encoder_checkpoint), load_checkpoint(tmp_path / "back")
    assert second.config.classes == ("zero", "one", "two", "three")
    assert second.config.dit_dh == first.config.dit_dh
    assert second.config.shift == pytest.approx(first.config.shift, rel=1e-12)
    for name in ("dit_dh", "guide", "decoder"):
        before, after = (
            read_tensors(folder / f"{name}.safetensors")
            for folder in (tiny_encoder_checkpoint, tmp_path / "back")
        )
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_info_and_serve_of_an_rae_alone(exported: Path, tmp_path: Path) -> None:
    text = (exported / "config.yaml").read_text()
    (tmp_path / "rae.yaml").write_text(text.partition("stage_2:")[0])
    config, out = tmp_path / "rae.yaml", tmp_path / "out"
    result = rae("convert", "--config", config, "--root", exported, "--out", out)
    assert result.exit_code == 0, result.output
    result = rae("info", out)
    assert result.exit_code == 0, result.output
    assert "facebook/dinov2 at 56 px, not in this folder" in result.output
    assert "16 × 16 px" in result.output and "shift" not in result.output
    for command in (["serve", "--port", 0, "--model", out], ["generate", "--model", out]):
        result = rae(*command)
        assert result.exit_code == 1
        assert "autoencoder without a DiT^DH" in " ".join(result.output.split())


def test_bf16_on_demand(exported: Path, tmp_path: Path) -> None:
    result = rae(
        *("convert", "--config", exported / "config.yaml", "--root", exported),
        *("--out", tmp_path / "small", "--dtype", "bf16"),
    )
    assert result.exit_code == 0, result.output
    weight = read_tensors(tmp_path / "small" / "dit_dh.safetensors")["final_layer.linear.weight"]
    assert weight.dtype == torch.bfloat16


def test_a_checkpoint_that_the_authors_format_cannot_say_has_no_yaml(tmp_path: Path) -> None:
    # The embedded model's pixels are normalised otherwise than the authors' MAE wants them.
    result = rae("export", embedded_model(), "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "stat.pt" in result.output and "classes.txt" in result.output
    assert "No config.yaml is written: it names the encoder's weights" in result.output
    assert not (tmp_path / "out" / "config.yaml").exists()
    names = (tmp_path / "out" / "classes.txt").read_text().split()
    assert names == list(load_checkpoint(embedded_model()).config.classes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Give --config, --preset or --autoencoder"),
        (("--config", "a.yaml", "--preset", "b"), "--config and --preset are two models"),
        (("--config", "a.yaml"), "a.yaml cannot be read"),
        (("--preset", "XXL"), "preset 'XXL'; known: DiTDH-XL-256"),
        (("--from-hub", "--config", "a.yaml"), "--from-hub goes with --preset"),
        (("--from-hub", "--preset", "DiTDH-XL-256", "--root", "."), "without --root"),
        (("--preset", "DiTDH-XL-256", "--root", "."), "missing: DiTs/Dinov2/wReg_base"),
        (("--autoencoder", "nowhere"), "missing: nowhere/config.json"),
        (("--preset", "DiTDH-XL-256", "--classes", "nowhere"), "nowhere"),
        (("--preset", "DiTDH-XL-256", "--dtype", "fp16"), "'fp16' is not one of"),
    ],
)
def test_wrong_flags_are_one_message(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = rae("convert", "--out", tmp_path / "out", *arguments)
    assert result.exit_code != 0
    assert message.replace(" ", "") in "".join(result.output.split()).replace("│", "")
    assert not (tmp_path / "out").exists()


def test_an_autoencoder_of_diffusers_takes_the_place_of_a_presets(tmp_path: Path) -> None:
    settings = ConvertSettings(out=tmp_path, preset="DiTDH-XL-256", autoencoder=tmp_path / "ae")
    model = published(settings)
    assert model.dit_dh == PRESETS["DiTDH-XL-256"].dit_dh and HUB_REPOSITORY in model.source
    assert model.autoencoder.files[0] == tmp_path / "ae" / "config.json"


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path, tiny_checkpoint: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "damaged")
    data = bytearray((folder / "dit_dh.safetensors").read_bytes())
    data[-9] ^= 1
    (folder / "dit_dh.safetensors").write_bytes(data)
    result = rae("export", folder, "--out", tmp_path / "out")
    assert result.exit_code == 1 and "has sha256" in result.output
    assert not (tmp_path / "out").exists()


def test_export_refuses_what_it_cannot_do(tmp_path: Path, tiny_checkpoint: Path) -> None:
    result = rae("export", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert result.exit_code == 1 and "is not a checkpoint folder" in result.output
    result = rae("export", tiny_checkpoint, "--out", tiny_checkpoint)
    assert result.exit_code == 1 and "exists and is not an empty folder" in result.output

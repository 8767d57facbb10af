"""Checkpoint folders: what is written is read back, and what is wrong is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rae.models.checkpoint import load_checkpoint, save_checkpoint
from rae.models.checkpoint_config import CheckpointError, parse_config, read_config
from rae.models.sampling import draw_noise
from rae.models.tensor_files import file_sha256


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def edit_tensors(folder: Path, name: str, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / name)
    edit(tensors)
    save_file(tensors, folder / name)
    edit_config(folder, lambda c: c["sha256"].update({name: file_sha256(folder / name)}))


def test_a_saved_checkpoint_computes_the_same(tiny_checkpoint: Path, tmp_path: Path) -> None:
    first = load_checkpoint(tiny_checkpoint)
    assert first.guide is not None
    config = save_checkpoint(tmp_path, first.config, first.dit_dh, first.rae, first.guide)
    second = load_checkpoint(tmp_path)
    assert second.config == first.config == config
    noise, t, y = draw_noise((32, 4, 4), [1, 2]), torch.tensor([0.3, 0.9]), torch.tensor([0, 4])
    with torch.no_grad():
        torch.testing.assert_close(
            second.dit_dh(noise, t, y), first.dit_dh(noise, t, y), rtol=0, atol=0
        )
        torch.testing.assert_close(
            second.rae.decode(noise), first.rae.decode(noise), rtol=0, atol=0
        )


def test_a_checkpoint_can_be_saved_over_itself(folder: Path) -> None:
    loaded = load_checkpoint(folder)
    before = load_file(folder / "dit_dh.safetensors")
    config = save_checkpoint(folder, loaded.config, loaded.dit_dh, loaded.rae)
    assert "guide.safetensors" not in config.sha256
    after = load_file(folder / "dit_dh.safetensors")
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not list(folder.glob("*.tmp"))


def test_the_files_sha256_is_recorded(tiny_checkpoint: Path) -> None:
    config, sha256 = read_config(tiny_checkpoint)
    files = {path.name for path in tiny_checkpoint.glob("*.safetensors")}
    assert config.sha256.keys() == files
    for name, value in config.sha256.items():
        assert file_sha256(tiny_checkpoint / name) == value
    assert file_sha256(tiny_checkpoint / "config.json") == sha256


def test_wrong_tensors_are_listed_together(folder: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        del tensors["blocks.0.attn.qkv.weight"]
        tensors["blocks.9.attn.qkv.weight"] = torch.zeros(2)
        tensors["pos_embed"] = torch.zeros(1, 9, 32)
        tensors["t_embedder.W"] = torch.zeros(256, dtype=torch.int64)

    edit_tensors(folder, "dit_dh.safetensors", edit)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(folder)
    message = str(error.value)
    assert "1 missing: blocks.0.attn.qkv.weight [96, 32]" in message
    assert "1 unexpected: blocks.9.attn.qkv.weight [2]" in message
    assert "pos_embed is [1, 9, 32], expected [1, 16, 32]" in message
    assert "1 int64, not float32 or bfloat16: t_embedder.W" in message


@pytest.mark.parametrize("name", ["dit_dh", "decoder", "guide"])
@pytest.mark.parametrize("size", [0, 7, 1000, -1])
def test_a_truncated_file_is_named(folder: Path, name: str, size: int) -> None:
    path = folder / f"{name}.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=rf"{name}\.safetensors is truncated"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(colour=1), "unknown key 'colour' for CheckpointConfig"),
        (lambda c: c["dit_dh"].update(colour=1), "unknown key 'colour' for DiTDHConfig"),
        (lambda c: c["dit_dh"].pop("depth"), "missing key 'depth' for DiTDHConfig"),
        (lambda c: c["dit_dh"].update(depth=-2), "depth -2 is not a positive integer"),
        (lambda c: c["dit_dh"].update(num_heads=5), "hidden_size 32 must be num_heads 5 times"),
        (lambda c: c.update(format_version=3), "format_version 3; this rae-server reads 1 to 2"),
        (lambda c: c.pop("format_version"), "not a rae checkpoint's: it has no format"),
        (lambda c: c["classes"].pop(), "3 class names for num_classes 4"),
        (lambda c: c["decoder"].update(grid=8), r"\(32, 4, 4\) of dit_dh, \(32, 8, 8\) of decoder"),
        (lambda c: c["defaults"].update(steps=1), "steps 1: a grid has at least 2 points"),
        (lambda c: c.update(shift=-1), "shift -1 is not a positive number"),
        (lambda c: c.update(image_std=[1]), "image_std .* is not 3 positive numbers"),
        (lambda c: c["guide"].update(num_classes=9), "guide and dit_dh differ"),
        (lambda c: c["guide"].update(class_dropout_prob=0), "guide and dit_dh differ"),
        (lambda c: c.update(classes=[0, 1, 2, 3]), "are not all names"),
        (lambda c: c.update(shift=float("inf")), "shift inf is not a positive number"),
        (lambda c: c["defaults"].update(cfg=0.5), r"cfg 0.5 is not in \[1, 100\]"),
        (
            lambda c: c.update(guide=None, defaults={"cfg": 2, "guidance_method": "autoguidance"}),
            "'autoguidance' needs what this checkpoint lacks; it has cfg",
        ),
        (lambda c: c.update(dit_dh=None), "dit_dh None is not an object"),
        (lambda c: c.update(decoder=None), "decoder None is not an object"),
        (lambda c: c.update(defaults=None), "defaults None is not an object"),
        (lambda c: c["sha256"].update({"../../etc/passwd": "0"}), "no file of a checkpoint"),
        (lambda c: c["sha256"].update({"encoder/../x": "0"}), "no file of a checkpoint"),
        (lambda c: c["dit_dh"].update(depth=10**7), "depth 10000000 is beyond what a model"),
        (lambda c: c.update(shift=10**400), "shift 1000.* is not a positive number"),
        (lambda c: c.update(sha256=[]), r"sha256 \[\] is not an object"),
        (lambda c: c.update(classes="abcd"), "classes 'abcd' is not a list"),
        (lambda c: c.update(name=7), "name 7 is not text"),
        (lambda c: c.update(image_mean=["a", "b", "c"]), "image_mean .* is not 3 numbers"),
        (lambda c: c.update(image_std=[0, 0, 0]), "image_std .* is not 3 positive numbers"),
        (lambda c: c.update(encoder={"kind": "mae", "image_size": "x"}), "image_size 'x' is not"),
        (
            lambda c: c.update(encoder={"kind": "clip", "image_size": 1}),
            "'clip'; known: dinov2",
        ),
        (lambda c: c["decoder"].update(hidden_size=30), "hidden_size 30 must be a multiple"),
    ],
)
def test_a_wrong_configuration_is_named(
    folder: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit_config(folder, edit)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_broken_configuration_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_checkpoint(folder)


def test_what_is_no_checkpoint_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no readable config.json"):
        load_checkpoint(tmp_path / "nowhere")


def test_statistics_broadcast_and_the_mean_may_be_absent(folder: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        del tensors["latents_mean"]
        tensors["latents_var"] = torch.full((32, 1, 1), 4.0)

    edit_tensors(folder, "decoder.safetensors", edit)
    rae = load_checkpoint(folder).rae
    assert rae.latents_mean is None
    assert rae.latents_std.shape == (32, 4, 4)
    torch.testing.assert_close(rae.latents_std[3, 2, 1].item(), (4 + 1e-5) ** 0.5)
    edit_tensors(folder, "decoder.safetensors", lambda t: t.update(latents_var=torch.ones(5)))
    with pytest.raises(CheckpointError, match=r"latents_var \(5,\) for \(32, 4, 4\)"):
        load_checkpoint(folder)


def test_other_weights_may_not_pass_for_the_recorded_ones(folder: Path) -> None:
    tensors = load_file(folder / "dit_dh.safetensors")
    tensors["blocks.0.norm1.weight"][0] += 1e-3
    save_file(tensors, folder / "dit_dh.safetensors")
    with pytest.raises(CheckpointError, match=r"dit_dh\.safetensors has sha256 .* says"):
        load_checkpoint(folder)


def test_a_recorded_file_that_is_absent_is_said(folder: Path) -> None:
    edit_config(folder, lambda c: c["sha256"].update({"more.safetensors": "0" * 64}))
    with pytest.raises(CheckpointError, match=r"more\.safetensors is missing"):
        load_checkpoint(folder)


def test_an_absent_file_is_said(folder: Path) -> None:
    (folder / "guide.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"guide\.safetensors is missing"):
        load_checkpoint(folder)


def test_an_encoder_that_is_not_there_is_said(tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no encoder"):
        load_checkpoint(tiny_checkpoint, with_encoder=True)


def test_a_configuration_survives_json(tiny_checkpoint: Path) -> None:
    config, _ = read_config(tiny_checkpoint)
    config = replace(config, guide=None, notes={"a": [1, 2.5]})
    assert parse_config(config.to_json()) == config

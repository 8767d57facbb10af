"""`train decoder`, `train dit` and `train assemble` in miniature, one after the other."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTMAEConfig, ViTMAEModel
from typer.testing import CliRunner

from rae.models.checkpoint import load_checkpoint
from rae.models.checkpoint_config import read_any_config
from rae.models.decoder import Decoder
from rae.models.rae import RAE
from rae.models.tensor_files import file_sha256
from rae.training import cli, stages
from rae.training.distributed import World
from rae.training.overrides import override
from rae.training.run_settings import AssembleSettings, DecoderSettings, DiTSettings, RunSettings
from rae.training.snapshots import read_averages
from rae.training.stage1.decoder_recipe import DECODER_PRESETS
from rae.training.stage2.dit_dh import DiTTask
from rae.training.stage2.presets import DIT_PRESETS
from rae.training.stage2.run_dit import load_averages
from rae.training.stages import begun, is_unmeasured, run_assemble
from rae.training.trainer import StoppedError

NUM_IMAGES, BATCH = 16, 4
CLASSES = ("cat", "dog")
HOW: dict[str, Any] = {
    "num_workers": 0,
    "device": "cpu",
    "precision": "fp32",
    "log_every": 1,
    "sample_every": 1000,
    "snapshot_every": 1,
}
COMMON = ("batch_size=4", "epochs=1", "warmup_epochs=0")
DECODER = (
    *("model.latent_channels=16", "model.hidden_size=16", "model.depth=1", "model.num_heads=2"),
    *("model.intermediate_size=16", "model.patch_size=8", "model.grid=4"),
    *("encoder.image_size=32", "perceptual=encoder", "discriminator=encoder"),
    *("discriminator_start_epoch=0.5", "adversarial_start_epoch=0.75", *COMMON),
)
DIT = (
    *("model.latent_channels=16", "model.latent_size=4", "model.num_heads=2"),
    *("model.hidden_size=16", "model.depth=1", "model.head_num_heads=2"),
    *("model.head_hidden_size=16", "model.head_depth=1", "model.num_classes=2"),
    *("image_size=32", "constant_epochs=0", "milestone_epochs=0.5", *COMMON),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/, encoder/, and what training makes of them: decoder/, stats.safetensors, dit/."""
    root = tmp_path_factory.mktemp("stages")
    draw = np.random.default_rng(0)
    for index in range(NUM_IMAGES):
        path = root / "images" / CLASSES[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    vit = ViTMAEConfig(
        image_size=32,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        mask_ratio=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ViTMAEModel(vit).save_pretrained(root / "encoder")
    run_decoder(decoder_settings(root))
    write_statistics(root / "stats.safetensors", var=4.0)
    run_dit(dit_settings(root))
    return root


def decoder_settings(root: Path, **changes: Any) -> DecoderSettings:  # noqa: ANN401
    settings = DecoderSettings(
        preset="MAE-B-256",
        images=root / "images",
        encoder=root / "encoder",
        out=root / "decoder",
        changes=list(DECODER),
        **HOW,
    )
    return replace(settings, **changes)


def dit_settings(root: Path, **changes: Any) -> DiTSettings:  # noqa: ANN401
    settings = DiTSettings(
        preset="DiTDH-S-256",
        rae=root / "decoder" / "checkpoint",
        images=root / "images",
        statistics=root / "stats.safetensors",
        out=root / "dit",
        changes=list(DIT),
        **HOW,
    )
    return replace(settings, **changes)


def run_decoder(settings: DecoderSettings) -> None:
    preset = DECODER_PRESETS[settings.preset]
    stages.run_decoder(settings, override(preset, settings.changes or []))


def run_dit(settings: DiTSettings) -> None:
    stages.run_dit(settings, override(DIT_PRESETS[settings.preset], settings.changes or []))


def write_statistics(path: Path, var: float) -> None:
    shape = (16, 4, 4)
    save_file({"latents_mean": torch.zeros(shape), "latents_var": torch.full(shape, var)}, path)


def make_decoder() -> Decoder:
    return Decoder(override(DECODER_PRESETS["MAE-B-256"], DECODER).model)


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_stage_1_writes_an_rae_with_a_decoder_that_has_learnt(root: Path) -> None:
    averages = make_decoder()
    last = root / "decoder" / "snapshots" / "step-000000004"
    read_averages(last, "decoder", averages)
    written = load_file(root / "decoder" / "checkpoint" / "decoder.safetensors")
    for name, tensor in averages.state_dict().items():
        assert torch.equal(written[name], tensor), name
    rows = log_of(root / "decoder")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row.get("grad_norm_discriminator", 0) > 0 for row in rows] == [False, False, True, True]
    assert ["accuracy" in row for row in rows] == [False, False, True, True]
    assert ["adaptive_weight" in row for row in rows] == [False, False, False, True]
    config, _ = read_any_config(root / "decoder" / "checkpoint")
    assert (config.name, config.source) == ("decoder", "trained by `rae train decoder MAE-B-256`")
    assert config.encoder is not None
    assert config.encoder.name == "encoder"


def test_stage_2_writes_a_checkpoint_with_the_averages_and_these_statistics(root: Path) -> None:
    checkpoint = load_checkpoint(root / "dit" / "checkpoint", with_encoder=True)
    assert checkpoint.config.classes == CLASSES
    assert checkpoint.config.name == "dit"
    assert checkpoint.rae.latents_var.unique().tolist() == [4]
    _, averages, step = load_averages(root / "dit")
    assert step == NUM_IMAGES // BATCH
    written = load_file(root / "dit" / "checkpoint" / "dit_dh.safetensors")
    state = averages.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in written.items())
    _, early, _ = load_averages(root / "dit", 2)
    assert any(not torch.equal(state[n], tensor) for n, tensor in early.state_dict().items())


def test_a_finished_run_is_not_done_again(root: Path) -> None:
    before = log_of(root / "dit")
    run_dit(dit_settings(root))
    assert log_of(root / "dit") == before
    assert "finished before: all 4 steps are done" in (root / "dit" / "events.log").read_text()


def test_a_guide_is_an_early_snapshot(root: Path, tmp_path: Path) -> None:
    run = root / "dit"
    settings = AssembleSettings(
        out=tmp_path / "guided",
        rae=root / "decoder" / "checkpoint",
        statistics=root / "stats.safetensors",
        dit=str(run),
        guide=f"{run}@2",
    )
    run_assemble(settings)
    checkpoint = load_checkpoint(tmp_path / "guided")
    assert checkpoint.guide is not None
    assert checkpoint.config.defaults.guidance_method == "autoguidance"
    assert checkpoint.config.name == "guided"
    assert checkpoint.config.classes == CLASSES
    early = load_averages(run, 2)[1].state_dict()
    guide = checkpoint.guide.state_dict()
    assert all(torch.equal(guide[name], early[name]) for name in guide)
    with pytest.raises(ValueError, match=r"no snapshot of step 7; there are: 2, 3, 4"):
        run_assemble(replace(settings, out=tmp_path / "no", guide=f"{run}@7"))
    with pytest.raises(ValueError, match="guided is not empty"):
        run_assemble(settings)
    with pytest.raises(ValueError, match="decoder is no run of `rae train dit`"):
        run_assemble(replace(settings, out=tmp_path / "no", dit=str(root / "decoder")))
    with pytest.raises(ValueError, match="'' is not RUN or RUN@STEP"):
        run_assemble(replace(settings, out=tmp_path / "no", dit=""))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"statistics": None}, "no statistics of its latents: `rae train stats`"),
        ({"images": None}, "one of --images and --latents is needed"),
        ({"changes": [*DIT, "image_size=64"]}, "image_size 64; the RAE's images have 32"),
        ({"changes": [*DIT, "model.latent_size=2"]}, r"latents are \(16, 4, 4\), the model takes"),
        ({"changes": [*DIT, "model.num_classes=1"]}, "--set model.num_classes=2"),
    ],
)
def test_what_does_not_fit_is_refused_and_no_folder_made(
    root: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        run_dit(dit_settings(root, out=out, **changes))
    assert not out.exists()


def test_a_run_goes_on_only_with_what_it_began_with(root: Path, tmp_path: Path) -> None:
    write_statistics(tmp_path / "other.safetensors", var=9.0)
    with pytest.raises(ValueError, match=r"another run \(data\.statistics: "):
        run_dit(dit_settings(root, statistics=tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match=r"another run \(recipe\.seed: 1, not 0\)"):
        run_dit(dit_settings(root, changes=[*DIT, "seed=1"]))


def test_weights_that_a_decoder_learns_through_are_in_the_claim(root: Path) -> None:
    weights = json.loads((root / "decoder" / "recipe.json").read_text())["data"]["weights"]
    assert weights == {
        "encoder/model.safetensors": file_sha256(root / "encoder" / "model.safetensors")
    }


def test_an_encoder_that_cannot_be_read_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no holds no encoder"):
        run_decoder(decoder_settings(root, encoder=tmp_path / "no", out=tmp_path / "run"))
    shutil.copytree(root / "encoder", tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=f"{tmp_path / 'cut'}: "):
        run_decoder(decoder_settings(root, encoder=tmp_path / "cut", out=tmp_path / "run"))


def test_latents_train_what_images_train_and_a_damaged_one_is_named(
    root: Path, tmp_path: Path
) -> None:
    latents, rae = tmp_path / "latents", root / "decoder" / "checkpoint"
    command = ["encode", "--images", str(root / "images"), "--encoder", str(rae), "--workers", "0"]
    result = CliRunner().invoke(cli.train_app, [*command, "--out", str(latents)])
    assert result.exit_code == 0, result.output
    settings = dit_settings(root, out=tmp_path / "run", images=None, latents=latents, verify=True)
    run_dit(settings)
    made = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert made.config.classes == CLASSES
    for name, tensor in load_checkpoint(root / "dit" / "checkpoint").dit_dh.state_dict().items():
        torch.testing.assert_close(made.dit_dh.state_dict()[name], tensor, rtol=0, atol=1e-5)
    index = json.loads((latents / "index.json").read_text())
    changed = {**index, "encoder": {**index["encoder"], "sha256": {"model.safetensors": "0" * 64}}}
    (latents / "index.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"its encoder's model.safetensors is not the RAE's"):
        run_dit(replace(settings, out=tmp_path / "other"))
    (latents / "index.json").write_text(json.dumps(index))
    shard = latents / index["shards"][0]["file"]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=f"{shard.name} has sha256"):
        run_dit(replace(settings, out=tmp_path / "damaged"))


@pytest.mark.parametrize(
    ("mean", "var", "unmeasured"), [(0, 1, True), (None, 1, False), (1, 1, False), (0, 2, False)]
)
def test_an_rae_without_statistics_is_known(mean: int | None, var: int, unmeasured: bool) -> None:
    rae = RAE(make_decoder().config, image_mean=(0, 0, 0), image_std=(1, 1, 1))
    rae.latents_var.fill_(var)
    rae.latents_mean = None if mean is None else torch.full_like(rae.latents_var, mean)
    assert is_unmeasured(rae) == unmeasured


@pytest.mark.parametrize("rank", [0, 1])
def test_what_the_first_process_refuses_all_refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    (tmp_path / "thesis.tex").touch()
    monkeypatch.setattr(World, "any", lambda *_: True)  # as both hear of it
    settings = RunSettings(out=tmp_path)
    message = "first process refuses" if rank else "is not empty"
    with pytest.raises(ValueError, match=message):
        with begun(settings, DIT_PRESETS["digits"], {}, World(rank, 2, torch.device("cpu"))):
            pytest.fail("it began")


def test_classes_without_images_are_said(root: Path, tmp_path: Path) -> None:
    changes = [*DIT, "model.num_classes=5", "epochs=0.25", "milestone_epochs="]
    run_dit(dit_settings(root, out=tmp_path / "run", changes=changes))
    events = (tmp_path / "run" / "events.log").read_text()
    assert "the data have 2 classes, the model has 5" in events
    config = load_checkpoint(tmp_path / "run" / "checkpoint").config
    assert config.classes == ("0", "1", "2", "3", "4")


def test_a_discriminator_that_never_starts_is_said(root: Path, tmp_path: Path) -> None:
    changes = [*DECODER, "discriminator_start_epoch=6", "adversarial_start_epoch=8"]
    run_decoder(decoder_settings(root, out=tmp_path / "run", changes=changes))
    events = (tmp_path / "run" / "events.log").read_text()
    assert "the discriminator would start after 24 steps, the run has 4" in events


def test_a_signal_saves_and_the_same_command_goes_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step = DiTTask.train_step

    def interrupted(task: DiTTask, batches: Any, step: int) -> Any:  # noqa: ANN401
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
        return train_step(task, batches, step)

    settings = dit_settings(root, out=tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(DiTTask, "train_step", interrupted)
        with pytest.raises(StoppedError):
            run_dit(settings)
    assert [row["step"] for row in log_of(tmp_path / "run")] == [1, 2]
    run_dit(settings)
    whole, again = (
        load_file(run / "checkpoint" / "dit_dh.safetensors")
        for run in (root / "dit", tmp_path / "run")
    )
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_commands_say_what_is_wrong_in_a_line(root: Path, tmp_path: Path) -> None:
    command = ["assemble", str(tmp_path / "x"), "--rae", str(root / "decoder" / "checkpoint")]
    command += ["--statistics", str(root / "stats.safetensors"), "--dit", str(tmp_path)]
    result = CliRunner().invoke(cli.train_app, command)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: {tmp_path} holds no run: recipe.json")
    assert result.stderr.count("\n") == 1

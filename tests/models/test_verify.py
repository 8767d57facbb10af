"""A checkpoint folder against what it was: files, tensors, values, outputs, reference numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rae.models.checkpoint import load_dit_dh, write_config
from rae.models.checkpoint_config import (
    AutoencoderConfig,
    CheckpointConfig,
    CheckpointError,
    read_any_config,
    read_config,
)
from rae.models.config import DecoderConfig, DiTDHConfig
from rae.models.tensor_files import file_sha256, matmul_weights, write_tensors
from rae.models.verify import (
    BOUNDS,
    fingerprint,
    fingerprint_error,
    load_network,
    networks,
    record_fingerprints,
    verify,
)

GOLDEN = Path(__file__).parents[1] / "golden"
DIGITS = Path(__file__).parents[2] / "models" / "digits"

Edit = Callable[[dict[str, Tensor]], object]


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    record_fingerprints(folder)
    return folder


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """The embedded model without its encoder: in a random one most tensors hardly matter."""
    folder = shutil.copytree(DIGITS, tmp_path / "digits", ignore=shutil.ignore_patterns("encoder"))
    config, _ = read_any_config(folder)
    sha256 = {name: value for name, value in config.sha256.items() if "/" not in name}
    write_config(folder, replace(config, sha256=sha256))
    return folder


def failures(folder: Path, reference: Path | None = None) -> dict[str, str]:
    checks = verify(folder, reference=reference)
    return {check.name: check.detail for check in checks if check.passed is False}


def edit_tensors(folder: Path, name: str, edit: Edit) -> None:
    """Edit a file of tensors, and record its new sha256."""
    tensors = load_file(folder / name)
    edit(tensors)
    save_file(tensors, folder / name)
    config, _ = read_any_config(folder)
    sha256 = {**config.sha256, name: file_sha256(folder / name)}
    write_config(folder, replace(config, sha256=sha256))


def store_in_bf16(folder: Path) -> None:
    """As conversion does: matmul weights in bf16, everything else in fp32."""
    config, _ = read_any_config(folder)
    for name, file in networks(config).items():
        network = load_network(folder, config, name, keep_bf16=False)
        matmuls = {key.removeprefix("decoder.") for key in matmul_weights(network)}

        def halve(tensors: dict[str, Tensor], matmuls: set[str] = matmuls) -> None:
            tensors |= {key: tensors[key].bfloat16() for key in matmuls}

        edit_tensors(folder, file, halve)


def test_a_sound_folder_passes_every_check(folder: Path) -> None:
    checks = {check.name: check for check in verify(folder)}
    assert {name for name, check in checks.items() if check.passed is None} == {"reconstruction"}
    assert all(check.passed for name, check in checks.items() if name != "reconstruction")
    for name in ("dit_dh", "guide", "decoder"):
        file = f"{name}.safetensors"
        wanted = {f"{file} sha256", f"{file} values", f"{file} tensors", f"{name} fingerprint"}
        assert wanted <= checks.keys()


def spoil(tensors: dict[str, Tensor]) -> None:
    tensors["blocks.1.mlp.w3.weight"][3, :2] = float("nan")
    tensors["t_embedder.W"][7] = float("inf")


DAMAGE: dict[str, tuple[Callable[[Path], object], dict[str, tuple[str, ...]]]] = {
    "truncated": (
        lambda folder: (folder / "guide.safetensors").write_bytes(
            (folder / "guide.safetensors").read_bytes()[:-100]
        ),
        {
            "guide.safetensors sha256": ("config.json says",),
            "guide.safetensors tensors": ("trunc",),
        },
    ),
    "not safetensors": (
        lambda folder: (folder / "decoder.safetensors").write_bytes(b"weights" * 999),
        {
            "decoder.safetensors sha256": ("config.json says",),
            "decoder.safetensors tensors": ("not safetensors",),
        },
    ),
    "missing": (
        lambda folder: (folder / "dit_dh.safetensors").unlink(),
        {
            "dit_dh.safetensors sha256": ("is missing",),
            "dit_dh.safetensors tensors": ("is missing",),
        },
    ),
    "not recorded": (
        lambda folder: save_file({"a": torch.zeros(1)}, folder / "extra.safetensors"),
        {"extra.safetensors sha256": ("not recorded in config.json",)},
    ),
    "not finite": (
        lambda folder: edit_tensors(folder, "dit_dh.safetensors", spoil),
        {
            "dit_dh.safetensors values": (
                "blocks.1.mlp.w3.weight: 2 of 2720 are not finite",
                "t_embedder.W: 1 of 256 are not finite",
            ),
            "dit_dh fingerprint": ("relative error inf",),
        },
    ),
    "wrong names and shapes": (
        lambda folder: edit_tensors(
            folder,
            "guide.safetensors",
            lambda tensors: tensors.update(other=tensors.pop("s_embedder.proj.bias")),
        ),
        {"guide.safetensors tensors": ("1 missing: s_embedder.proj.bias", "unexpected: other")},
    ),
    "wrong type": (
        lambda folder: edit_tensors(
            folder,
            "dit_dh.safetensors",
            lambda tensors: tensors.update(
                {"pos_embed": tensors["pos_embed"].to(torch.float8_e4m3fn)}
            ),
        ),
        {"dit_dh.safetensors tensors": ("1 float8_e4m3fn, not float32 or bfloat16: pos_embed",)},
    ),
    "another precision": (
        store_in_bf16,
        {
            f"{name} fingerprint": ("recorded in 'fp32', the weights are bf16",)
            for name in ("dit_dh", "guide", "decoder")
        },
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_nothing_else_is(folder: Path, damage: str) -> None:
    do, expected = DAMAGE[damage]
    count = len(list(verify(folder)))
    do(folder)
    found = failures(folder)
    assert found.keys() == expected.keys()
    for name, words in expected.items():
        assert all(word in found[name] for word in words), found[name]
    assert len(list(verify(folder))) >= count - 1  # a file that cannot be read has no values


def test_two_damaged_files_are_both_reported(folder: Path) -> None:
    for name in ("dit_dh.safetensors", "decoder.safetensors"):
        (folder / name).write_bytes(b"")
    assert {"dit_dh.safetensors tensors", "decoder.safetensors tensors"} <= failures(folder).keys()


def zero_block(tensors: dict[str, Tensor]) -> None:
    for key, value in tensors.items():
        if key.startswith("blocks.1."):
            value.zero_()


def swap_blocks(tensors: dict[str, Tensor]) -> None:
    a, b = "blocks.0.mlp.w12.weight", "blocks.1.mlp.w12.weight"
    tensors[a], tensors[b] = tensors[b], tensors[a]


def columns_first(tensors: dict[str, Tensor]) -> None:
    for key in ("enc_feat_rope.freqs_cos", "enc_feat_rope.freqs_sin"):
        tensors[key] = tensors[key].roll(tensors[key].shape[1] // 2, 1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("edit", [zero_block, swap_blocks, columns_first])
def test_a_fingerprint_sees_what_names_and_shapes_do_not(
    trained: Path, edit: Edit, precision: str
) -> None:
    if precision == "bf16":
        store_in_bf16(trained)
        record_fingerprints(trained)
    assert failures(trained) == {}
    edit_tensors(trained, "dit_dh.safetensors", edit)
    found = failures(trained)
    assert found.keys() == {"dit_dh fingerprint"}
    assert f"bound {BOUNDS[precision]:.0e} in {precision}" in found["dit_dh fingerprint"]


def test_a_fingerprint_in_fp32_sees_one_row(trained: Path) -> None:
    edit_tensors(
        trained, "guide.safetensors", lambda tensors: tensors["blocks.0.mlp.w3.weight"][0].zero_()
    )
    assert failures(trained).keys() == {"guide fingerprint"}


def test_statistics_are_in_the_decoders_fingerprint(folder: Path) -> None:
    edit_tensors(folder, "decoder.safetensors", lambda tensors: tensors["latents_var"][5].mul_(4))
    assert failures(folder).keys() == {"decoder fingerprint"}


def test_bf16_weights_stay_so_and_compute_as_the_server_does(folder: Path) -> None:
    store_in_bf16(folder)
    config, _ = read_config(folder)
    path = folder / "dit_dh.safetensors"
    kept = load_dit_dh(config.dit_dh, path, keep_bf16=True)
    dtypes = {key: tensor.dtype for key, tensor in kept.state_dict().items()}
    assert dtypes["blocks.0.attn.qkv.weight"] == dtypes["x_embedder.proj.bias"] == torch.bfloat16
    assert dtypes["blocks.0.norm1.weight"] == dtypes["t_embedder.W"] == torch.float32
    upcast = load_dit_dh(config.dit_dh, path)
    assert {tensor.dtype for tensor in upcast.state_dict().values()} == {torch.float32}
    for module in upcast.modules():  # as server/devices.py stores them
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.to(torch.bfloat16)
    assert fingerprint(kept) == fingerprint(upcast)
    exact = fingerprint(load_dit_dh(config.dit_dh, path)) | {"precision": "bf16"}
    assert 1e-4 < fingerprint_error(fingerprint(kept), exact) < BOUNDS["bf16"]


@pytest.mark.parametrize(
    "recorded",
    [7, {}, {"precision": "fp32"}, {"precision": "fp32", "norm": "1", "values": []}],
)
def test_a_damaged_record_fails(folder: Path, recorded: object) -> None:
    values = json.loads((folder / "config.json").read_text())
    values["fingerprints"]["guide"] = recorded
    (folder / "config.json").write_text(json.dumps(values))
    assert failures(folder).keys() == {"guide fingerprint"}


def test_what_is_not_finite_is_not_recorded(folder: Path) -> None:
    edit_tensors(folder, "dit_dh.safetensors", spoil)
    before = (folder / "config.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"the output of dit_dh is not finite"):
        record_fingerprints(folder)
    assert (folder / "config.json").read_bytes() == before


def test_without_records_a_folder_passes(tiny_checkpoint: Path) -> None:
    checks = {check.name: check for check in verify(tiny_checkpoint)}
    assert checks["dit_dh fingerprint"] == ("dit_dh fingerprint", None, "none is recorded")
    assert not any(check.passed is False for check in checks.values())


def test_a_broken_config_is_one_failure(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert failures(folder).keys() == {"config.json"}
    assert "no readable config.json" in failures(folder / "nowhere")["config.json"]


def test_an_autoencoder_alone_is_verified(folder: Path) -> None:
    config, _ = read_any_config(folder)
    for name in ("dit_dh", "guide"):
        (folder / f"{name}.safetensors").unlink()
    sha256 = {"decoder.safetensors": config.sha256["decoder.safetensors"]}
    alone = AutoencoderConfig(
        name="alone",
        decoder=config.decoder,
        image_mean=config.image_mean,
        image_std=config.image_std,
        sha256=sha256,
    )
    write_config(folder, alone)
    assert record_fingerprints(folder).fingerprints.keys() == {"decoder"}
    checks = {check.name: check.passed for check in verify(folder)}
    assert checks["decoder fingerprint"] is True and "dit_dh fingerprint" not in checks
    assert set(checks.values()) == {True, None}


def test_the_embedded_model_passes_with_its_encoder(tmp_path: Path) -> None:
    checks = {check.name: check for check in verify(DIGITS)}
    assert all(check.passed for check in checks.values())
    assert "PSNR" in checks["reconstruction"].detail
    folder = shutil.copytree(DIGITS, tmp_path / "digits")
    edit_tensors(
        folder, "decoder.safetensors", lambda tensors: tensors["decoder_pred.weight"].mul_(-9)
    )
    found = failures(folder)
    assert found.keys() == {"decoder fingerprint", "reconstruction"}
    assert "at least 5.0 dB" in found["reconstruction"]
    edit_tensors(
        folder,
        "encoder/model.safetensors",
        lambda tensors: tensors["embeddings.cls_token"].fill_(float("nan")),
    )
    found = failures(folder)
    assert "embeddings.cls_token: 96 of 96" in found["encoder/model.safetensors values"]
    assert "are not finite" in found["reconstruction"]
    assert "encoder fingerprint" in found
    for name, damage in {
        "encoder.layer.0.output.dense.weight": lambda weight: weight.zero_(),
        "embeddings.position_embeddings": lambda table: table.copy_(table.flip(1)),
    }.items():
        shutil.rmtree(folder)
        shutil.copytree(DIGITS, folder)
        edit_tensors(
            folder,
            "encoder/model.safetensors",
            lambda tensors, name=name, damage=damage: damage(tensors[name]),
        )
        assert failures(folder).keys() == {"encoder fingerprint"}, name
    (folder / "encoder" / "model.safetensors").write_bytes(b"x" * 99)
    found = failures(folder)
    assert {"encoder/model.safetensors values", "reconstruction"} <= found.keys()


@pytest.fixture(scope="module")
def golden_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden weights as a checkpoint folder."""
    folder = tmp_path_factory.mktemp("golden")
    io = {name: load_file(GOLDEN / f"{name}.io.safetensors") for name in ("ditdh_a", "decoder_a")}
    config = CheckpointConfig(
        name="golden",
        dit_dh=DiTDHConfig.from_published(published("ditdh_a.model")),
        guide=DiTDHConfig.from_published(published("ditdh_a.guide")),
        decoder=DecoderConfig.from_published(published("decoder_a.model")),
        image_mean=tuple(io["decoder_a"]["encoder_mean"].tolist()),
        image_std=tuple(io["decoder_a"]["encoder_std"].tolist()),
        classes=tuple("0123456789"),
        shift=float(io["ditdh_a"]["shift"]),
    )
    tensors = {
        name: load_file(GOLDEN / f"ditdh_a.{name}.safetensors") for name in ("model", "guide")
    }
    decoder = load_file(GOLDEN / "decoder_a.model.safetensors")
    for ours, theirs in {
        "latents_mean": "latent_mean",
        "latents_var": "latent_var",
        "eps": "eps",
    }.items():
        decoder[ours] = io["decoder_a"][theirs]
    sha256 = {
        "dit_dh.safetensors": write_tensors(folder / "dit_dh.safetensors", tensors["model"]),
        "guide.safetensors": write_tensors(folder / "guide.safetensors", tensors["guide"]),
        "decoder.safetensors": write_tensors(folder / "decoder.safetensors", decoder),
    }
    write_config(folder, replace(config, sha256=sha256))
    return folder


def published(stem: str) -> dict[str, object]:
    with safe_open(GOLDEN / f"{stem}.safetensors", "pt") as file:
        return json.loads(file.metadata()["config"])


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    for ours, theirs in {"dit_dh": "ditdh_a", "decoder": "decoder_a"}.items():
        shutil.copy(GOLDEN / f"{theirs}.io.safetensors", tmp_path / f"{ours}.io.safetensors")
    return tmp_path


def edit_reference(reference: Path, name: str, edit: Edit) -> None:
    tensors = load_file(reference / f"{name}.io.safetensors")
    edit(tensors)
    tensors = {
        key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()
    }
    save_file(tensors, reference / f"{name}.io.safetensors")


def test_the_published_numbers_are_reproduced(golden_checkpoint: Path, reference: Path) -> None:
    checks = list(verify(golden_checkpoint, reference=reference))
    names = {check.name for check in checks if check.passed}
    assert not any(check.passed is False for check in checks)
    for output in ("dit_dh v", "dit_dh shift", "dit_dh euler_autoguidance_1.42", "decoder image"):
        assert f"reference {output}" in names
    assert "reference dit_dh train_loss" not in names


@pytest.mark.parametrize(
    ("name", "edit", "failure", "detail"),
    [
        ("dit_dh", lambda io: io["v_null"].mul_(1 + 2e-5), "dit_dh v_null", "bound 1e-05"),
        ("dit_dh", lambda io: io["euler_final"].mul_(1 + 2e-4), "dit_dh euler_final", "1e-04"),
        ("decoder", lambda io: io["image"].mul_(1 + 2e-5), "decoder image", "bound 1e-05"),
        ("decoder", lambda io: io.update(z=io["z"][:, :, :3]), "decoder", "takes (24, 4, 4)"),
        ("decoder", lambda io: io.update(z=io["z"].double()), "decoder", "z is torch.float64"),
        ("decoder", lambda io: io.pop("z"), "decoder", "missing z"),
        ("dit_dh", lambda io: io.pop("x"), "dit_dh", "missing x"),
        ("dit_dh", lambda io: io.pop("num_steps"), "dit_dh", "missing num_steps"),
        ("dit_dh", lambda io: io.update(x=io["x"][:, :8]), "dit_dh", "this model takes (3, 24"),
        ("dit_dh", lambda io: io.update(t=io["t"][:1]), "dit_dh", "t is (1,)"),
        ("dit_dh", lambda io: io.update(t=io["t"].double()), "dit_dh", "t is torch.float64"),
        ("dit_dh", lambda io: io["y"].add_(9), "dit_dh", "are not all classes from 0 to 10"),
        ("dit_dh", lambda io: io.update(score=io["v"]), "dit_dh", "unknown output 'score'"),
        ("dit_dh", lambda io: io.pop("cfg_interval"), "dit_dh", "missing cfg_interval for v_cfg"),
    ],
)
def test_another_number_or_another_model_is_found(
    golden_checkpoint: Path, reference: Path, name: str, edit: Edit, failure: str, detail: str
) -> None:
    edit_reference(reference, name, edit)
    found = failures(golden_checkpoint, reference)
    assert found.keys() == {f"reference {failure}"}
    assert detail in found[f"reference {failure}"]


def test_another_shift_is_found(golden_checkpoint: Path, reference: Path) -> None:
    edit_reference(reference, "dit_dh", lambda io: io["shift"].add_(0.01))
    assert "reference dit_dh shift" in failures(golden_checkpoint, reference)


def test_a_reference_that_is_none_is_said(golden_checkpoint: Path, tmp_path: Path) -> None:
    found = failures(golden_checkpoint, golden_checkpoint)
    assert "neither dit_dh.io.safetensors nor decoder.io.safetensors" in found["reference"]
    (tmp_path / "decoder.io.safetensors").write_bytes(b"")
    assert "truncated" in failures(golden_checkpoint, tmp_path)["reference decoder"]

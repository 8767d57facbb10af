"""Published files become the checkpoint they are, and nothing else passes for one."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from rae.models.checkpoint import load_autoencoder, load_checkpoint, load_rae
from rae.models.checkpoint_config import CheckpointError, SamplerDefaults, read_config
from rae.models.convert import convert
from rae.models.dit_dh import DiTDH
from rae.models.export import export
from rae.models.guidance import Guidance
from rae.models.labels import imagenet_classes
from rae.models.published import Published
from rae.models.published_yaml import read_yaml
from rae.models.sampling import denoise, draw_noise, timesteps
from rae.models.tensor_files import read_tensors

if TYPE_CHECKING:
    from authors_folder import AuthorsFolder

GOLDEN = Path(__file__).parent.parent / "golden"
DIT_DH, DECODER = "DiTs/stage2_model.pt", "decoder/model.pt"


def error(output: Tensor, reference: Tensor) -> float:
    return float((output.double() - reference).norm() / reference.double().norm())


def same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype
        for key in first
    )


def test_the_published_numbers_come_out_of_converted_files(
    authors_folder: AuthorsFolder, tmp_path: Path
) -> None:
    convert(authors_folder.published(), tmp_path / "out")
    checkpoint = load_checkpoint(tmp_path / "out")
    io = load_file(GOLDEN / "ditdh_a.io.safetensors")
    defaults, grid = checkpoint.config.defaults, io["grid"]
    assert defaults == SamplerDefaults(steps=10, cfg=1.42, guidance_method="autoguidance")
    assert torch.allclose(timesteps(defaults.steps, checkpoint.config.shift), grid, rtol=1e-6)
    for guidance, name in (
        (None, "euler_final"),
        (Guidance(1.8), "euler_cfg_1.8"),
        (Guidance(defaults.cfg, method="autoguidance"), "euler_autoguidance_1.42"),
    ):
        latents = denoise(
            checkpoint.dit_dh,
            io["x"],
            io["y"],
            timesteps(defaults.steps, checkpoint.config.shift),
            guidance=guidance,
            null_label=10,
            guide=checkpoint.guide,
        )
        assert error(latents, io[name]) < 1e-5, name


def test_the_published_images_come_out_of_a_converted_decoder(
    authors_folder: AuthorsFolder, tmp_path: Path
) -> None:
    config = convert(authors_folder.published(), tmp_path / "out")
    io = load_file(GOLDEN / "decoder_a.io.safetensors")
    mean, std = (tuple(io[f"encoder_{name}"].tolist()) for name in ("mean", "std"))
    assert config.image_mean == (0.485, 0.456, 0.406)
    config = replace(config, image_mean=mean, image_std=std)
    rae = load_rae(config, tmp_path / "out" / "decoder.safetensors")
    assert error(rae.decode(io["z"]), io["image"]) < 1e-5


def test_every_bit_is_kept(authors_folder: AuthorsFolder, tmp_path: Path) -> None:
    convert(authors_folder.published(), tmp_path / "out")
    checkpoint = load_checkpoint(tmp_path / "out")
    root = authors_folder.root
    assert checkpoint.guide is not None
    for model, file in (
        (checkpoint.dit_dh, DIT_DH),
        (checkpoint.guide, "DiTs/guide.pt"),
        (checkpoint.rae.decoder, DECODER),
    ):
        assert same_tensors(model.state_dict(), torch.load(root / file, weights_only=True))
    statistics = torch.load(root / "stat.pt", weights_only=True)
    assert torch.equal(checkpoint.rae.latents_var, statistics["var"])
    assert checkpoint.rae.latents_mean is not None
    assert torch.equal(checkpoint.rae.latents_mean, statistics["mean"])


def test_export_gives_the_authors_files_back(authors_folder: AuthorsFolder, tmp_path: Path) -> None:
    authors_folder.edit("stage_1.params.eps", 3e-6)
    first = convert(authors_folder.published(), tmp_path / "first")
    export(tmp_path / "first", tmp_path / "authors again")
    root, again = authors_folder.root, tmp_path / "authors again"
    for ours, theirs in (("dit_dh/stage2_model.pt", DIT_DH), ("decoder/model.pt", DECODER)):
        exported = torch.load(again / ours, weights_only=True)
        assert same_tensors(exported, torch.load(root / theirs, weights_only=True))
    second = convert(read_yaml(again / "config.yaml", again), tmp_path / "second")
    same = {"name": "", "source": "", "notes": {}}
    assert replace(first, **same) == replace(second, **same)  # sha256 of the weights and all
    assert load_checkpoint(tmp_path / "second").rae.eps == torch.tensor(3e-6)


def test_bf16_is_for_the_matrix_products_alone(
    authors_folder: AuthorsFolder, tmp_path: Path
) -> None:
    convert(authors_folder.published(), tmp_path / "out", dtype="bf16")
    stored = read_tensors(tmp_path / "out" / "dit_dh.safetensors")
    source = torch.load(authors_folder.root / DIT_DH, weights_only=True)
    rounded = {key for key, value in stored.items() if value.dtype == torch.bfloat16}
    assert {"blocks.0.attn.qkv.weight", "x_embedder.proj.bias", "t_embedder.mlp.0.weight"} < rounded
    for name in ("norm", "rope", "pos_embed", "embedding_table", "t_embedder.W"):
        assert not any(name in key for key in rounded), name
    for key, value in stored.items():
        assert torch.equal(value, source[key].to(value.dtype))
    decoder = read_tensors(tmp_path / "out" / "decoder.safetensors")
    assert decoder["latents_var"].dtype == decoder["eps"].dtype == torch.float32
    noise, t = draw_noise((24, 4, 4), [1]), torch.tensor([0.5])
    checkpoint = load_checkpoint(tmp_path / "out")
    with torch.no_grad():
        exact = load_file(GOLDEN / "ditdh_a.model.safetensors")
        model = DiTDH(checkpoint.config.dit_dh)
        model.load_state_dict(exact)
        reference = model(noise, t, torch.tensor([3]))
        assert 1e-5 < error(checkpoint.dit_dh(noise, t, torch.tensor([3])), reference) < 2e-2


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_the_ema_of_a_training_checkpoint_is_taken(
    authors_folder: AuthorsFolder, tmp_path: Path, prefix: str
) -> None:
    ema = torch.load(authors_folder.root / DIT_DH, weights_only=True)
    model = {key: torch.zeros_like(value) for key, value in ema.items()}
    training = {
        "step": 7,
        "epoch": 1,
        "model": model,
        "ema": {prefix + key: value for key, value in ema.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]},
        "scheduler": {"last_epoch": 1},
    }
    torch.save(training, authors_folder.root / DIT_DH)
    convert(authors_folder.published(), tmp_path / "out")
    stored = read_tensors(tmp_path / "out" / "dit_dh.safetensors")
    assert same_tensors(stored, ema)
    del training["ema"]
    torch.save(training, authors_folder.root / DIT_DH)
    with pytest.raises(CheckpointError, match="'model' but no 'ema'"):
        convert(authors_folder.published(), tmp_path / "other")


def test_a_file_of_the_old_format_is_read_and_said(
    authors_folder: AuthorsFolder, tmp_path: Path
) -> None:
    tensors = torch.load(authors_folder.root / DIT_DH, weights_only=True)
    torch.save(tensors, authors_folder.root / DIT_DH, _use_new_zipfile_serialization=False)
    notes: list[str] = []
    convert(authors_folder.published(), tmp_path / "out", notify=notes.append)
    assert any("stage2_model.pt" in note and "cannot be mapped" in note for note in notes)
    assert same_tensors(read_tensors(tmp_path / "out" / "dit_dh.safetensors"), tensors)


def test_a_whole_rae_as_stage_1_ckpt_has_the_last_word(
    authors_folder: AuthorsFolder, tmp_path: Path
) -> None:
    decoder = torch.load(authors_folder.root / DECODER, weights_only=True)
    whole = {f"decoder.{key}": 2 * value for key, value in decoder.items()}
    torch.save(
        {"ema": {**whole, "encoder.model.x": torch.ones(2)}}, authors_folder.root / "ep-9.pt"
    )
    authors_folder.edit("stage_1.ckpt", "ep-9.pt")
    convert(authors_folder.published(), tmp_path / "out")
    stored = read_tensors(tmp_path / "out" / "decoder.safetensors")
    assert torch.equal(stored["decoder_pred.bias"], 2 * decoder["decoder_pred.bias"])


@pytest.mark.parametrize("shape", [(1, 24, 4, 4), (24, 1, 1), ()])
def test_statistics_may_broadcast_and_lack_a_mean(
    authors_folder: AuthorsFolder, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    var = torch.rand(shape) + 0.5
    torch.save({"mean": None, "var": var}, authors_folder.root / "stat.pt")
    convert(authors_folder.published(), tmp_path / "out")
    rae = load_checkpoint(tmp_path / "out").rae
    assert rae.latents_mean is None
    assert torch.equal(rae.latents_var, var.broadcast_to(1, 24, 4, 4)[0])


def test_without_statistics_latents_are_as_the_encoder_gives_them(
    authors_folder: AuthorsFolder, tmp_path: Path
) -> None:
    authors_folder.edit("stage_1.params.normalization_stat_path", None)
    convert(authors_folder.published(), tmp_path / "out")
    rae = load_checkpoint(tmp_path / "out").rae
    assert rae.latents_mean is None and torch.equal(rae.latents_std, torch.ones(24, 4, 4))


def test_an_rae_alone_can_be_converted(authors_folder: AuthorsFolder, tmp_path: Path) -> None:
    authors_folder.config = {"stage_1": authors_folder.config["stage_1"]}
    convert(authors_folder.published(), tmp_path / "out")
    with pytest.raises(CheckpointError, match="autoencoder without a DiT"):
        read_config(tmp_path / "out")
    with pytest.raises(CheckpointError, match="holds no encoder: facebook/vit-mae-base is wanted"):
        load_autoencoder(tmp_path / "out")


def test_an_encoder_comes_along(authors_folder: AuthorsFolder, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ViTMAEConfig(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=4,
        mask_ratio=0.0,
    )
    transformers.ViTMAEModel(config).save_pretrained(tmp_path / "mae")
    published = authors_folder.published()
    converted = convert(published, tmp_path / "out", encoder=tmp_path / "mae")
    assert converted.has_encoder
    _, rae = load_autoencoder(tmp_path / "out")
    assert rae.encode(torch.rand(1, 3, 16, 16)).shape == (1, 24, 4, 4)
    with pytest.raises(CheckpointError, match="no transformers folder"):
        convert(published, tmp_path / "other", encoder=authors_folder.root)
    assert not (tmp_path / "other").exists()


def test_class_names(authors_folder: AuthorsFolder, tmp_path: Path) -> None:
    names = [f"kind {i}" for i in range(10)]
    config = convert(authors_folder.published(), tmp_path / "named", classes=names)
    assert config.to_json() == read_config(tmp_path / "named")[0].to_json()
    assert read_config(tmp_path / "named")[0].classes == tuple(names)
    convert(authors_folder.published(), tmp_path / "unnamed")
    assert read_config(tmp_path / "unnamed")[0].classes[9] == "class 9"
    with pytest.raises(CheckpointError, match="2 class names for num_classes 10"):
        convert(authors_folder.published(), tmp_path / "wrong", classes=["a", "b"])

    def widen(tensors: dict[str, Tensor]) -> None:
        tensors["y_embedder.embedding_table.weight"] = torch.zeros(
            1001, tensors["t_embedder.mlp.2.bias"].numel()
        )

    for file in (DIT_DH, "DiTs/guide.pt"):
        authors_folder.edit_weights(file, widen)
    for path in ("stage_2.params", "guidance.guidance_model.params", "misc"):
        authors_folder.edit(f"{path}.num_classes", 1000)
    convert(authors_folder.published(), tmp_path / "imagenet")
    assert read_config(tmp_path / "imagenet")[0].classes == imagenet_classes()


def test_a_link_to_an_empty_folder_can_be_converted_into(
    authors_folder: AuthorsFolder, tmp_path: Path
) -> None:
    (tmp_path / "volume").mkdir()
    (tmp_path / "out").symlink_to("volume")
    convert(authors_folder.published(), tmp_path / "out")
    load_checkpoint(tmp_path / "volume")
    assert not list((tmp_path / "volume").glob(".*"))


def test_two_conversions_into_one_folder_do_not_mix(
    authors_folder: AuthorsFolder, tmp_path: Path
) -> None:
    published = [authors_folder.published()]
    authors_folder.edit("guidance", {"method": "cfg", "scale": 1.0})
    published.append(authors_folder.published())
    done: list[bool] = []

    def run(model: Published) -> None:
        try:
            convert(model, tmp_path / "out")
            done.append(model.guide is not None)
        except (ValueError, OSError):  # at the start or at the end, as they happen to meet
            pass

    threads = [threading.Thread(target=run, args=(model,)) for model in published]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 1
    assert (load_checkpoint(tmp_path / "out").guide is not None) == done[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["authors", "out"]


def test_a_name_that_comes_twice_is_refused(authors_folder: AuthorsFolder, tmp_path: Path) -> None:
    authors_folder.edit_weights(
        DIT_DH, lambda t: t.update({"module.pos_embed": torch.zeros_like(t["pos_embed"])})
    )
    with pytest.raises(CheckpointError, match="holds some names twice"):
        convert(authors_folder.published(), tmp_path / "out")


class Executes:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("file", [DIT_DH, DECODER, "stat.pt"])
@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
def test_a_pickle_that_would_execute_code_is_refused(
    authors_folder: AuthorsFolder, tmp_path: Path, file: str, form: str
) -> None:
    ran = tmp_path / "it ran"
    values = torch.load(authors_folder.root / file, weights_only=True) | {"extra": Executes(ran)}
    if form == "plain":
        (authors_folder.root / file).write_bytes(pickle.dumps(values))
    else:
        is_zip = form == "zip"
        torch.save(values, authors_folder.root / file, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError, match="nothing of it was executed") as raised:
        convert(authors_folder.published(), tmp_path / "out")
    assert "\n" not in str(raised.value) and Path(file).name in str(raised.value)
    assert not ran.exists() and not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["authors"]


def half(tensors: dict[str, Tensor]) -> None:
    tensors.update({key: value.half() for key, value in tensors.items()})


def fill_with_nan(tensors: dict[str, Tensor]) -> None:
    next(value for key, value in tensors.items() if "qkv.weight" in key or "query" in key).fill_(
        torch.nan
    )


def rename(tensors: dict[str, Tensor]) -> None:
    tensors["blocks.0.attn.w_qkv.weight"] = tensors.pop("blocks.0.attn.qkv.weight")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (DIT_DH, half, "82 float16, not float32 or bfloat16: blocks.0"),
        (DECODER, half, "56 float16, not float32 or bfloat16: decoder_embed.bias"),
        ("stat.pt", half, "latents_mean is torch.float16, expected torch.float32"),
        (DIT_DH, fill_with_nan, "blocks.0.attn.qkv.weight: 6912 of 6912 values are not finite"),
        (DECODER, fill_with_nan, "query.bias: 48 of 48 values are not finite"),
        (
            DIT_DH,
            rename,
            r"1 missing: blocks.0.attn.qkv.weight \[144, 48\]; 1 unexpected: blocks.0",
        ),
        ("stat.pt", lambda t: t.update(var=torch.ones(7)), r"latents_var is \[7\], expected \[24"),
        ("stat.pt", lambda t: t.update(var=-t["var"]), "smallest variance, -.*, is not positive"),
        ("stat.pt", lambda t: t.update(var="x"), "should hold latent statistics"),
        ("stat.pt", lambda t: t.update(var=t["var"].to_sparse()), "latents_var is not a plain"),
        ("stat.pt", lambda t: t.update(var=t["var"].to("meta")), "latents_var is not a plain"),
        (DIT_DH, lambda t: t.update(step=3), "'step' is int, where only tensors are expected"),
        (DIT_DH, lambda t: t.clear(), "should hold a DiT\\^DH; it holds neither"),
        (
            DIT_DH,
            lambda t: t.update({"pos_embed": t["pos_embed"].to_sparse()}),
            "pos_embed is not a plain tensor",
        ),
    ],
)
def test_a_wrong_file_is_one_line(
    authors_folder: AuthorsFolder,
    tmp_path: Path,
    file: str,
    change: Callable[[dict[str, Tensor]], object],
    message: str,
) -> None:
    authors_folder.edit_weights(file, change)
    with pytest.raises(CheckpointError, match=message) as raised:
        convert(authors_folder.published(), tmp_path / "out")
    assert "\n" not in str(raised.value) and Path(file).name in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["authors"]


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, -1])
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_truncated_file_is_one_line(
    authors_folder: AuthorsFolder, tmp_path: Path, keep: float, is_zip: bool
) -> None:
    path = authors_folder.root / DIT_DH
    tensors = torch.load(path, weights_only=True)
    torch.save(tensors, path, _use_new_zipfile_serialization=is_zip)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=r"stage2_model\.pt ") as raised:
        convert(authors_folder.published(), tmp_path / "out")
    assert "\n" not in str(raised.value)


def test_swapped_files_are_called_what_they_are(
    authors_folder: AuthorsFolder, tmp_path: Path
) -> None:
    root = authors_folder.root
    for first, second, message in (
        (DIT_DH, DECODER, "should hold a DiT\\^DH; it holds an RAE decoder"),
        (DIT_DH, "stat.pt", "should hold a DiT\\^DH; it holds latent statistics"),
        (DECODER, "stat.pt", "should hold an RAE decoder; it holds latent statistics"),
    ):
        (root / first).rename(root / "swap")
        (root / second).rename(root / first)
        (root / "swap").rename(root / second)
        with pytest.raises(CheckpointError, match=message):
            convert(authors_folder.published(), tmp_path / "out")
        (root / first).rename(root / "swap")
        (root / second).rename(root / first)
        (root / "swap").rename(root / second)


def test_a_pointer_of_git_lfs_is_called_one(authors_folder: AuthorsFolder, tmp_path: Path) -> None:
    (authors_folder.root / DIT_DH).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="git-lfs' pointer"):
        convert(authors_folder.published(), tmp_path / "out")


def test_missing_files_are_listed(authors_folder: AuthorsFolder, tmp_path: Path) -> None:
    (authors_folder.root / DIT_DH).unlink()
    (authors_folder.root / "stat.pt").unlink()
    with pytest.raises(CheckpointError, match=r"missing: .*stage2_model\.pt, .*stat\.pt"):
        convert(authors_folder.published(), tmp_path / "out")


def test_nothing_is_overwritten(authors_folder: AuthorsFolder, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        convert(authors_folder.published(), tmp_path / "out")
    (tmp_path / "out" / "mine").unlink()
    convert(authors_folder.published(), tmp_path / "out")
    load_checkpoint(tmp_path / "out")

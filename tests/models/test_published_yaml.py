"""The authors' YAML files: what is served is read, what is not is refused by name and value."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from rae.models.checkpoint_config import CheckpointError, SamplerDefaults
from rae.models.config import CONFIGS
from rae.models.hub import below
from rae.models.published import PRESETS, Autoencoder
from rae.models.published_yaml import read_yaml

if TYPE_CHECKING:
    from authors_folder import AuthorsFolder


def test_a_configuration_is_read(authors_folder: AuthorsFolder) -> None:
    published = authors_folder.published()
    root = authors_folder.root
    assert published.dit_dh and published.guide
    assert published.dit_dh.config.latent_shape == (24, 4, 4)
    assert published.guide.file == root / "DiTs" / "guide.pt"
    assert published.autoencoder.files == [root / "decoder" / "model.pt", root / "stat.pt"]
    assert published.defaults == SamplerDefaults(steps=10, cfg=1.42, guidance_method="autoguidance")


@pytest.mark.parametrize("spelling", ["t-min", "t_min"])
def test_both_spellings_of_the_interval_count(authors_folder: AuthorsFolder, spelling: str) -> None:
    guidance = authors_folder.config["guidance"]
    del guidance["t-min"], guidance["t-max"]
    guidance |= {spelling: 0.1, spelling.replace("min", "max"): 0.9}
    assert authors_folder.published().defaults.guidance_interval == (0.1, 0.9)


def test_an_underscore_wins_over_a_hyphen(authors_folder: AuthorsFolder) -> None:
    authors_folder.edit("guidance.t_max", 0.7)
    assert authors_folder.published().defaults.guidance_interval == (0.0, 0.7)


def test_scales_up_to_1_turn_guidance_off(authors_folder: AuthorsFolder) -> None:
    authors_folder.edit("guidance", {"method": "cfg", "scale": 0.5})
    published = authors_folder.published()
    assert published.guide is None
    assert published.defaults == SamplerDefaults(steps=10)
    authors_folder.edit("guidance", {"method": "autoguidance", "scale": 1.0})
    assert authors_folder.published().defaults == SamplerDefaults(steps=10)


def test_what_the_authors_leave_out_has_their_default(authors_folder: AuthorsFolder) -> None:
    for section in ("guidance", "transport", "misc"):
        del authors_folder.config[section]
    authors_folder.edit("sampler", {"params": {"sampling_method": "euler"}})
    published = authors_folder.published()
    assert published.defaults.steps == 50
    assert published.shift == 1.0  # sqrt(24·4·4 / 4096), clamped
    authors_folder.edit("misc", {"time_dist_shift_dim": "1e6", "time_dist_shift_base": 1000})
    assert authors_folder.published().shift == math.sqrt(1000)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("sampler.mode", "SDE", "sampler.mode 'SDE' is not supported: only 'ODE'"),
        ("sampler.params.sampling_method", "dopri5", "sampling_method 'dopri5' is not supported"),
        ("sampler.params.sampling_method", "heun2", "rae sample --solver"),
        ("sampler.params", {}, "sampling_method 'dopri5' is not supported: only 'euler'"),
        ("sampler.params.reverse", True, "reverse True is not supported: only False"),
        ("sampler.params.num_steps", 1, "steps 1: a grid has at least 2 points"),
        ("sampler.params.num_steps", "many", "steps 'many'"),
        ("sampler.params.last_step", "Mean", "sampler.params has unknown keys: last_step"),
        ("transport.params.path_type", "GVP", "path_type 'GVP' is not supported: only 'Linear'"),
        ("transport.params.prediction", "noise", "prediction 'noise' is not supported"),
        ("transport.params.steps", 0.1, "transport.params has unknown keys: steps"),
        ("stage_1.params.encoder_cls", ["a"], r"encoder_cls \['a'\] is not text"),
        ("stage_2.params", [1], r"stage_2.params \[1\] is not a mapping"),
        ("stage_2.params.num_classes", 2**40, "num_classes 1099511627776 is beyond what a model"),
        ("stage_2.params.depth", [10**7, 2], "depth 10000000 is beyond what a model"),
        ("stage_2.params.mlp_ratio", 10**400, "mlp_ratio 1000.* is not a positive number"),
        ("guidance.scale", 10**400, "guidance.scale 1000.* is not a number"),
        ("stage_2.ckpt", "${models}/x.pt", "interpolations are not resolved"),
        ("stage_1.target", "stage1.VAE", "target 'stage1.VAE' is not supported: only RAE"),
        ("stage_1.params.encoder_cls", "CLIP", "encoder_cls 'CLIP'; known: Dinov2withNorm"),
        ("stage_1.params.encoder_params.normalize", False, "normalize False is not supported"),
        ("stage_1.params.reshape_to_2d", False, "reshape_to_2d False is not supported"),
        ("stage_1.params.pretrained_decoder_path", None, "has no pretrained_decoder_path"),
        ("stage_1.params.normalization_stat_path", 3, "normalization_stat_path 3 is not text"),
        ("stage_1.params.eps", "tiny", "eps 'tiny' is not a number"),
        ("stage_1.params.colour", 1, "stage_1.params has unknown keys: colour"),
        ("stage_1.params.decoder_config_path", "nowhere", "the decoder's configuration, cannot"),
        ("stage_1", "x", "stage_1 'x' is not a mapping"),
        ("stage_2.target", "stage2.models.lightningDiT.LightningDiT", "only DiTwDDTHead is"),
        ("stage_2.ckpt", None, "stage_2 has no ckpt"),
        ("stage_2.params.wo_shift", True, "stage_2.params: wo_shift True is not supported"),
        ("stage_2.params.use_rope", False, "use_rope False is not supported"),
        ("stage_2.params.patch_size", 2, "patch_size 2 is not supported"),
        ("stage_2.params.hidden_size", 48, r"hidden_size 48 is not a pair: \[backbone, head\]"),
        ("stage_2.params.depth", [3, 2, 1], r"depth \[3, 2, 1\] is not a pair"),
        ("stage_2.params.colour", 1, "unknown key 'colour'"),
        ("guidance.method", "apg", "guidance method 'apg'; known: cfg, autoguidance"),
        ("guidance.guidance_model", None, "'autoguidance' needs a guidance.guidance_model"),
        ("guidance.scale", 1000, r"cfg 1000.0 is not in \[1, 100\]"),
        ("guidance.t_max", 2, "interval .* is not 0 <= low <= high <= 1"),
        ("guidance.strength", 2, "guidance has unknown keys: strength"),
        ("misc.latent_size", [24, 8, 8], r"latent_size \[24, 8, 8\], but stage_2 has \[24, 4, 4\]"),
        ("misc.num_classes", 1000, "num_classes 1000, but stage_2 has 10"),
        ("misc.null_label", 3, "null_label 3, but stage_2 has 10"),
        ("misc.time_dist_shift_base", 0, "base 0.0 is not positive"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    authors_folder: AuthorsFolder, path: str, value: object, message: str
) -> None:
    authors_folder.edit(path, value)
    with pytest.raises(CheckpointError, match=message) as raised:
        authors_folder.published()
    assert "\n" not in str(raised.value) and "model.yaml" in str(raised.value)


@pytest.mark.parametrize(
    "text", ["", "[1, 2]", "a: [", "\x00", "!!python/object/apply:os.getcwd []"]
)
def test_what_is_no_configuration_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=r"x\.yaml") as raised:
        read_yaml(tmp_path / "x.yaml", tmp_path)
    assert "\n" not in str(raised.value)
    with pytest.raises(CheckpointError, match="No such file"):
        read_yaml(tmp_path / "y.yaml", tmp_path)


def paths_of(node: object, path: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield f"{path}.{key}".lstrip(".")
            yield from paths_of(value, f"{path}.{key}")


WRONG: tuple[object, ...] = (None, [], {}, [1, [2], 3, 4], "x", -1, 0, 1e308, 10**400, True, "ü")


def test_any_value_anywhere_is_read_or_one_line(authors_folder: AuthorsFolder) -> None:
    original = copy.deepcopy(authors_folder.config)
    paths = list(paths_of(original))
    assert len(paths) > 60
    refused = 0
    for path, value in itertools.product(paths, WRONG):
        authors_folder.config = copy.deepcopy(original)
        authors_folder.edit(path, value)
        try:
            authors_folder.published()
        except CheckpointError as error:
            refused += 1
            assert len(str(error)) < 600 and "\n" not in str(error), (path, value)
    assert refused > 400


def test_numbers_are_read_as_the_authors_loader_reads_them(
    authors_folder: AuthorsFolder,
) -> None:
    text = authors_folder.yaml.read_text().replace("scale: 1.42", "scale: 142e-2")
    assert "mlp_ratio: 4.0" in text
    text = text.replace("mlp_ratio: 4.0", "mlp_ratio: 4e0").replace("eps: 1", "eps: 1")
    path = authors_folder.root / "other.yaml"
    path.write_text(text)
    published = read_yaml(path, authors_folder.root)
    assert published.defaults.cfg == 1.42
    assert published.dit_dh and published.dit_dh.config.mlp_ratio == 4.0


def test_the_encoder_is_the_one_whose_weights_are_loaded(authors_folder: AuthorsFolder) -> None:
    authors_folder.edit("stage_1.params.encoder_config_path", "someone/processor")
    autoencoder = authors_folder.published().autoencoder
    assert isinstance(autoencoder, Autoencoder)
    assert autoencoder.encoder.name == "facebook/vit-mae-base"
    authors_folder.edit("stage_1.params.encoder_params", {})
    autoencoder = authors_folder.published().autoencoder
    assert isinstance(autoencoder, Autoencoder)
    assert autoencoder.encoder.name == "someone/processor"


def test_exponential_and_deep_files_are_one_short_line(tmp_path: Path) -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    bomb = "\n".join([*levels, "stage_1: *a8"])
    deep = "stage_1: " + "[" * 10_000
    for text in (bomb, deep):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(CheckpointError) as raised:
            read_yaml(tmp_path / "x.yaml", tmp_path)
        assert len(str(raised.value)) < 500 and "\n" not in str(raised.value)


def test_the_presets_are_the_published_files() -> None:
    model = PRESETS["DiTDH-XL-256"]
    assert [str(file) for file in model.files] == [
        "DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-XL/stage2_model.pt",
        "DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-S_ep14/stage2_model.pt",
        "decoders/dinov2/wReg_base/ViTXL_n08/model.pt",
        "stats/dinov2/wReg_base/imagenet1k/stat.pt",
    ]
    assert model.defaults == SamplerDefaults(cfg=1.42, guidance_method="autoguidance")
    assert model.shift == pytest.approx(6.92820, abs=1e-5)
    large = PRESETS["DiTDH-XL-512"]
    assert large.shift == pytest.approx(13.85641, abs=1e-5)
    assert large.defaults.cfg == 1.5
    assert large.dit_dh and large.dit_dh.config == CONFIGS["DiTDH-XL-512"]
    assert isinstance(large.autoencoder, Autoencoder)
    assert large.autoencoder.encoder.image_size == 448
    assert "stats/siglip2/base_p16_i256/ImageNet1k/stat.pt" in map(
        str, PRESETS["RAE-SigLIP2-B-256"].files
    )


def test_a_preset_is_found_below_a_clone_or_the_hubs_folder(tmp_path: Path) -> None:
    model = PRESETS["DiTDH-XL-256"]
    for root in (tmp_path / "hub", tmp_path / "clone" / "models"):
        file = root / model.files[0]
        file.parent.mkdir(parents=True)
        file.touch()
    assert below(model, tmp_path / "hub").files[0] == tmp_path / "hub" / model.files[0]
    clone = below(model, tmp_path / "clone")
    assert clone.files == [tmp_path / "clone" / "models" / file for file in model.files]

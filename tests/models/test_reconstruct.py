"""Pictures of every kind into the crop that training sees, and through an autoencoder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file

from rae.models.checkpoint import load_autoencoder, write_config
from rae.models.checkpoint_config import AutoencoderConfig, CheckpointError, read_any_config
from rae.models.config import DecoderConfig, EncoderConfig, EncoderKind
from rae.models.encoder import load_encoder
from rae.models.rae import RAE
from rae.models.reconstruct import (
    center_crop,
    drawn_picture,
    psnr_db,
    read_picture,
    reconstruct,
    side_by_side,
)
from rae.models.tensor_files import write_tensors

DIGITS = Path(__file__).parents[2] / "models" / "digits"
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def save(image: Image.Image, path: Path, **options: Any) -> Path:  # noqa: ANN401
    image.save(path, **options)
    return path


def test_a_crop_is_halved_by_area_and_finished_bicubically() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (70, 101, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    halved = image.resize((50, 35), Image.Resampling.BOX).resize((25, 17), Image.Resampling.BOX)
    # 17 is less than 2 · 9; the short side becomes 9, the long one round(25 · 9 / 17) = 13.
    wanted = np.asarray(halved.resize((13, 9), Image.Resampling.BICUBIC))[:, 2:11]
    np.testing.assert_array_equal(np.asarray(center_crop(image, 9)), wanted)
    assert not np.array_equal(
        wanted, np.asarray(image.resize((13, 9), Image.Resampling.BICUBIC))[:, 2:11]
    )
    assert center_crop(image.resize((1, 3)), 8).size == (8, 8)
    np.testing.assert_array_equal(
        np.asarray(center_crop(image.crop((0, 0, 70, 70)), 70)), pixels[:, :70]
    )


def test_exif_turns_a_picture(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[0] = 255  # a white line on top
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side: to be turned clockwise
    path = save(Image.fromarray(pixels), tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_picture(path, 8), np.rot90(pixels, -1))


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 0], pixels[..., 3] = 200, 128
    pixels[0, :, 3] = 0
    picture = read_picture(save(Image.fromarray(pixels), tmp_path / "a.png"), 4)
    assert picture[0].tolist() == [[255, 255, 255]] * 4
    assert abs(picture[2, 2].astype(int) - [227, 127, 127]).max() <= 1
    grey = Image.fromarray(pixels[..., 3]).convert("LA")
    grey.putalpha(0)
    assert (read_picture(save(grey, tmp_path / "la.png"), 4) == 255).all()
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    opaque = save(palette, tmp_path / "p.png")
    assert read_picture(opaque, 4)[0, 0].tolist() == [10, 20, 30]
    clear = save(palette, tmp_path / "p.gif", transparency=1)
    assert read_picture(clear, 4)[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("1", 1, "png", (255, 255, 255)),
        ("L", 77, "png", (77, 77, 77)),
        ("I;16", 200 * 257, "png", (200, 200, 200)),
        ("I", 300 * 257, "tiff", (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), "tiff", (255, 0, 0)),
        ("YCbCr", (77, 128, 128), "jpg", (77, 77, 77)),
    ],
)
def test_modes_become_rgb(
    tmp_path: Path,
    mode: str,
    colour: float | tuple[int, ...],
    suffix: str,
    expected: tuple[int, ...],
) -> None:
    path = save(Image.new(mode, (5, 9), colour), tmp_path / f"image.{suffix}")
    picture = read_picture(path, 4)
    assert picture.shape == (4, 4, 3) and picture.dtype == np.uint8
    assert abs(picture.astype(int) - expected).max() <= (suffix == "jpg")


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    image = Image.fromarray(drawn_picture(64))
    whole = save(image, tmp_path / "whole.png").read_bytes()
    files = {
        "truncated.png": (whole[:-400], "truncated"),
        "text.jpg": (b"not a picture", "is not an image"),
        "empty.png": (b"", "is not an image"),
    }
    for name, (data, message) in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message) as error:
            read_picture(tmp_path / name, 16)
        assert name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="nowhere.png: No such file"):
        read_picture(tmp_path / "nowhere.png", 16)
    with pytest.raises(ValueError, match="directory"):
        read_picture(tmp_path, 16)
    floats = save(Image.new("F", (4, 4), 0.5), tmp_path / "f.tiff")
    with pytest.raises(ValueError, match="floating-point"):
        read_picture(floats, 16)


@pytest.mark.parametrize("size", [(11_000, 10_000), (30_000, 30_000), (1, 40_000)])
def test_a_huge_picture_is_refused_before_it_is_read(tmp_path: Path, size: tuple[int, int]) -> None:
    path = save(Image.new("1", size), tmp_path / "huge.png")
    with pytest.raises(ValueError, match=r"huge\.png: .*more than\s100,000,000"):
        read_picture(path, 256)


def test_psnr() -> None:
    black, grey = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 51, np.uint8)
    assert psnr_db(black, grey) == pytest.approx(-20 * np.log10(0.2))
    assert psnr_db(grey, grey) == float("inf")
    assert (
        np.asarray(side_by_side(black, grey)).tolist() == np.concatenate([black, grey], 1).tolist()
    )
    picture = drawn_picture(48)
    # What verify calls wrong is worse than grey, for this picture and for every other.
    assert psnr_db(np.full_like(picture, 128), picture) > 6
    np.testing.assert_array_equal(picture, drawn_picture(48))


def test_reconstruction_is_the_decoded_encoding() -> None:
    _, rae = load_autoencoder(DIGITS)
    picture = drawn_picture(32)
    images = torch.tensor(picture / 255, dtype=torch.float32).permute(2, 0, 1)[None]
    decoded = rae.decode(rae.encode(images))[0].permute(1, 2, 0).clamp(0, 1)
    rebuilt = reconstruct(rae, picture)
    np.testing.assert_allclose(rebuilt / 255, decoded.numpy(), atol=0.5 / 255 + 1e-6)
    with pytest.raises(ValueError, match="no encoder"):
        rae.encoder = None
        reconstruct(rae, picture)


def published_encoder(kind: EncoderKind, folder: Path) -> torch.nn.Module:
    """Random weights in a folder as on the hub; returns what the authors' code runs of it."""
    torch.manual_seed(0)
    if kind == "dinov2":
        config = transformers.Dinov2WithRegistersConfig(**SIZES, image_size=70, patch_size=14)
        model = tower = transformers.Dinov2WithRegistersModel(config)
    elif kind == "siglip2":
        text = SIZES | {"vocab_size": 50_000}  # holds the default special tokens
        vision = SIZES | {"image_size": 64, "patch_size": 16}
        model = transformers.SiglipModel(
            transformers.SiglipConfig(text_config=text, vision_config=vision)
        )
        tower = model.vision_model
    else:
        decoder = {f"decoder_{key}": value for key, value in SIZES.items()}
        model = transformers.ViTMAEForPreTraining(
            transformers.ViTMAEConfig(**SIZES, **decoder, image_size=56, patch_size=14)
        )
        tower = model.vit
        tower.config.mask_ratio = 0.0
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return tower.eval()


@pytest.mark.parametrize(
    ("kind", "image_size", "patch_size"), [("dinov2", 56, 14), ("siglip2", 64, 16), ("mae", 70, 14)]
)
def test_published_layouts_load(
    tmp_path: Path,
    kind: EncoderKind,
    image_size: int,
    patch_size: int,
) -> None:
    tower: Any = published_encoder(kind, tmp_path)
    names = {"dinov2": "layernorm", "siglip2": "vision_model.encoder", "mae": "decoder.mask_token"}
    assert any(name.startswith(names[kind]) for name in load_file(tmp_path / "model.safetensors"))
    values = json.loads((tmp_path / "config.json").read_text())
    assert ("vision_config" in values) == (kind == "siglip2")
    encoder = load_encoder(EncoderConfig(kind=kind, image_size=image_size), tmp_path)
    pixels = torch.randn(2, 3, image_size, image_size)
    grid = image_size // patch_size
    options: dict[str, Any] = {"output_hidden_states": True}
    if kind != "dinov2":
        options["interpolate_pos_encoding"] = True
    if kind == "mae":
        options["noise"] = torch.arange(float(grid**2)).expand(2, -1)
    with torch.no_grad():
        last = tower(pixels, **options).hidden_states[-1]
    last = last[:, {"dinov2": 5, "siglip2": 0, "mae": 1}[kind] :]
    eps = {"dinov2": 1e-6, "siglip2": 1e-6, "mae": 1e-12}[kind]
    torch.testing.assert_close(
        encoder(pixels), F.layer_norm(last, (32,), eps=eps), rtol=1e-4, atol=1e-5
    )
    assert encoder.latent_shape == (32, grid, grid)


def test_a_16_bit_encoder_runs_in_fp32_and_loading_is_silent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    published_encoder("mae", tmp_path)
    transformers.ViTMAEForPreTraining.from_pretrained(tmp_path).bfloat16().save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["vit.layernorm.bias"].dtype == torch.bfloat16
    capfd.readouterr()
    encoder = load_encoder(EncoderConfig(kind="mae", image_size=56), tmp_path)
    assert encoder(torch.randn(1, 3, 56, 56)).dtype == torch.float32
    assert capfd.readouterr() == ("", "")


def autoencoder_folder(folder: Path, kind: EncoderKind, channels: int = 32) -> Path:
    """An RAE without DiT^DH and without its encoder's weights: 4 × 4 tokens."""
    decoder = DecoderConfig(
        latent_channels=channels,
        hidden_size=32,
        depth=1,
        num_heads=2,
        intermediate_size=64,
        patch_size=8,
        grid=4,
    )
    torch.manual_seed(0)
    rae = RAE(decoder, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    statistics = {"latents_var": rae.latents_var, "eps": rae.eps}
    folder.mkdir()
    path = folder / "decoder.safetensors"
    sha256 = write_tensors(path, {**rae.decoder.state_dict(), **statistics})
    config = AutoencoderConfig(
        name="alone",
        decoder=decoder,
        encoder=EncoderConfig(kind=kind, image_size=56, name=f"someone/{kind}"),
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        sha256={path.name: sha256},
    )
    write_config(folder, config)
    return folder


def test_an_encoder_is_given_in_either_of_two_ways(tmp_path: Path) -> None:
    published_encoder("dinov2", tmp_path / "weights")
    folder = autoencoder_folder(tmp_path / "model", "dinov2")
    with pytest.raises(CheckpointError) as error:
        load_autoencoder(folder)
    assert "someone/dinov2 is wanted" in str(error.value)
    assert f"{folder / 'encoder'} holds no encoder" in str(error.value)
    assert "--encoder" in str(error.value)
    _, given = load_autoencoder(folder, tmp_path / "weights")
    shutil.copytree(tmp_path / "weights", folder / "encoder")
    _, own = load_autoencoder(folder)
    picture = drawn_picture(32)
    np.testing.assert_array_equal(reconstruct(given, picture), reconstruct(own, picture))
    assert read_any_config(folder)[0].encoder is not None


@pytest.mark.parametrize(
    ("kind", "channels", "message"),
    [
        ("dinov2", 48, r"makes latents \(32, 4, 4\) of 56 px, the decoder takes \(48, 4, 4\)"),
        ("siglip2", 32, "model_type 'dinov2_with_registers'; siglip2 is siglip or"),
    ],
)
def test_another_encoder_is_refused(
    tmp_path: Path, kind: EncoderKind, channels: int, message: str
) -> None:
    published_encoder("dinov2", tmp_path / "weights")
    folder = autoencoder_folder(tmp_path / "model", kind, channels)
    with pytest.raises(CheckpointError, match=message):
        load_autoencoder(folder, tmp_path / "weights")


@pytest.mark.parametrize(
    ("key", "value"), [("patch_size", 0), ("hidden_size", "x"), ("hidden_act", "?")]
)
def test_a_wrong_encoder_configuration_is_one_line(tmp_path: Path, key: str, value: object) -> None:
    published_encoder("mae", tmp_path / "weights")
    path = tmp_path / "weights" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    folder = autoencoder_folder(tmp_path / "model", "mae")
    with pytest.raises(CheckpointError) as error:
        load_autoencoder(folder, tmp_path / "weights")
    assert str(error.value).startswith(str(tmp_path / "weights"))
    assert "\n" not in str(error.value)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    published_encoder("mae", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin is not read"):
        load_encoder(EncoderConfig(kind="mae", image_size=56), tmp_path)

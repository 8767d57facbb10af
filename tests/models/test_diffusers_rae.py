"""diffusers' AutoencoderRAE, the real one, and what becomes of a folder that it saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_rae import AutoencoderRAE
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import SiglipVisionModel

from rae.models.checkpoint import load_autoencoder, load_rae
from rae.models.checkpoint_config import CheckpointError
from rae.models.config import EncoderKind
from rae.models.convert import convert
from rae.models.diffusers_rae import DiffusersAutoencoder
from rae.models.published import Published

PATCHES = {"dinov2": 14, "siglip2": 16, "mae": 16}


def saved(folder: Path, kind: EncoderKind = "dinov2", **options: Any) -> Any:  # noqa: ANN401
    torch.manual_seed(0)
    patch_size, side = PATCHES[kind], options.pop("side", 4)
    model = AutoencoderRAE(
        encoder_type=kind,
        encoder_hidden_size=128,
        encoder_patch_size=patch_size,
        encoder_num_hidden_layers=2,
        encoder_input_size=side * patch_size,
        decoder_hidden_size=64,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=96,
        patch_size=8,
        **options,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return model.eval()


def published(folder: Path) -> Published:
    return Published(name="x", autoencoder=DiffusersAutoencoder(folder))


def error(output: Tensor, reference: Tensor) -> float:
    return float((output - reference).norm() / reference.norm())


def test_it_decodes_as_diffusers_but_for_the_second_eps(tmp_path: Path) -> None:
    mean, std = torch.randn(128, 16, 16), torch.rand(128, 16, 16) * 0.05 + 0.004
    theirs = saved(tmp_path / "diffusers", side=16, latents_mean=mean, latents_std=std)
    config = convert(published(tmp_path / "diffusers"), tmp_path / "out")
    ours = load_rae(config, tmp_path / "out" / "decoder.safetensors")
    torch.testing.assert_close(ours.latents_std, std, rtol=1e-6, atol=0)
    latents = 50 * torch.randn(2, 128, 16, 16)
    with torch.no_grad():
        as_published = error(ours.decode(latents), theirs.decode(latents).sample)
        ours.latents_var = (std.double() + 1e-5).square().float() - ours.eps
        doubled = error(ours.decode(latents), theirs.decode(latents).sample)
    assert doubled < 5e-7 < 5e-6 < as_published


def test_statistics_may_be_absent(tmp_path: Path) -> None:
    theirs = saved(tmp_path / "diffusers", side=16)
    config = convert(published(tmp_path / "diffusers"), tmp_path / "out")
    ours = load_rae(config, tmp_path / "out" / "decoder.safetensors")
    latents = torch.randn(1, 128, 16, 16)
    with torch.no_grad():
        reference = theirs.decode(latents / (1 + 1e-5)).sample
    assert error(ours.decode(latents), reference) < 1e-6


@pytest.mark.parametrize(
    ("kind", "is_old"), [("dinov2", False), ("siglip2", False), ("siglip2", True), ("mae", False)]
)
def test_the_encoder_comes_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: EncoderKind, is_old: bool
) -> None:
    # diffusers 0.42 looks for SigLIP's tower where transformers 4 had it.
    monkeypatch.setattr(
        SiglipVisionModel, "vision_model", property(lambda self: self), raising=False
    )
    theirs = saved(tmp_path / "diffusers", kind, encoder_norm_mean=[0.5, 0.4, 0.3])
    if is_old:
        path = tmp_path / "diffusers" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path).items()
        save_file({k.replace("encoder.", "encoder.vision_model.", 1): v for k, v in tensors}, path)
    convert(published(tmp_path / "diffusers"), tmp_path / "out")
    config, ours = load_autoencoder(tmp_path / "out")
    assert config.encoder and config.encoder.kind == kind and config.has_encoder
    images = torch.rand(2, 3, 4 * PATCHES[kind], 4 * PATCHES[kind])
    with torch.no_grad():
        reference = theirs.encode(images).latent * (1 + 1e-5)
        assert error(ours.encode(images), reference) < 1e-5
        larger = torch.rand(1, 3, 96, 96)
        reference = theirs.encode(larger).latent * (1 + 1e-5)
        assert error(ours.encode(larger), reference) < 1e-5


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("_class_name", "AutoencoderKL", "_class_name 'AutoencoderKL' is not supported"),
        ("scaling_factor", 0.5, "scaling_factor 0.5 is not supported: only 1.0 is"),
        ("reshape_to_2d", False, "reshape_to_2d False is not supported"),
        ("encoder_type", "clip", "encoder_type 'clip'; known: dinov2"),
        ("encoder_patch_size", 0, "encoder_patch_size 0 is not an integer from 1"),
        ("decoder_hidden_size", 2**40, "decoder_hidden_size 1099511627776 is not an integer"),
        ("decoder_hidden_size", 66, "decoder_hidden_size 66 is not 4"),
        ("decoder_num_hidden_layers", 3, r"16 missing: decoder_layers\.2\.attention"),
        ("decoder_hidden_size", None, "'decoder_hidden_size'"),
    ],
)
def test_what_is_not_supported_is_one_line(
    tmp_path: Path, key: str, value: object, message: str
) -> None:
    saved(tmp_path / "diffusers")
    path = tmp_path / "diffusers" / "config.json"
    values = json.loads(path.read_text())
    if value is None:
        del values[key]
    else:
        values[key] = value
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message) as raised:
        convert(published(tmp_path / "diffusers"), tmp_path / "out")
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


def test_a_tensor_that_is_absent_or_broken_is_one_line(tmp_path: Path) -> None:
    saved(tmp_path / "diffusers")
    path = tmp_path / "diffusers" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    for key, message in (
        ("_latents_std", "has no '_latents_std'"),
        ("decoder.decoder_norm.bias", "1 missing: decoder_norm.bias"),
        ("encoder.embeddings.cls_token", "cls_token"),
    ):
        save_file({k: v for k, v in tensors.items() if k != key}, path)
        with pytest.raises(CheckpointError, match=message):
            convert(published(tmp_path / "diffusers"), tmp_path / "out")
    for change, message in (
        (lambda value: value.half(), "torch.float16, not torch.float32"),
        (lambda value: value.long(), "1 missing|missing_keys"),
    ):
        key = "encoder.embeddings.cls_token"
        save_file({k: change(v) if k == key else v for k, v in tensors.items()}, path)
        with pytest.raises(CheckpointError, match=message):
            convert(published(tmp_path / "diffusers"), tmp_path / "out")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="truncated or not safetensors"):
        convert(published(tmp_path / "diffusers"), tmp_path / "out")

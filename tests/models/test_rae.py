"""Encoders by transformers, and the way between images and normalised latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rae.models.config import DecoderConfig, EncoderConfig, EncoderKind
from rae.models.encoder import load_encoder
from rae.models.rae import RAE

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}


def save_backbone(kind: EncoderKind, folder: Path) -> None:
    torch.manual_seed(0)
    if kind == "dinov2":
        config = transformers.Dinov2WithRegistersConfig(**SIZES, num_register_tokens=4)
        model = transformers.Dinov2WithRegistersModel(config)
    elif kind == "siglip2":
        model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES))
    else:
        model = transformers.ViTMAEModel(transformers.ViTMAEConfig(**SIZES))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)


def last_tokens(kind: EncoderKind, folder: Path, pixels: torch.Tensor) -> torch.Tensor:
    """The tokens before the final LayerNorm, from transformers' untouched model."""
    if kind == "dinov2":
        model = transformers.Dinov2WithRegistersModel.from_pretrained(folder)
        return model(pixels, output_hidden_states=True).hidden_states[-1][:, 5:]
    if kind == "siglip2":
        model = transformers.SiglipVisionModel.from_pretrained(folder)
        return model(pixels, output_hidden_states=True).hidden_states[-1]
    model = transformers.ViTMAEModel.from_pretrained(folder, mask_ratio=0.0)
    noise = torch.arange(16.0).expand(len(pixels), -1)
    return model(pixels, noise=noise, output_hidden_states=True).hidden_states[-1][:, 1:]


@pytest.mark.parametrize("kind", ["dinov2", "siglip2", "mae"])
def test_an_encoder_gives_the_tokens_without_the_affine_part(
    kind: EncoderKind, tmp_path: Path
) -> None:
    save_backbone(kind, tmp_path)
    encoder = load_encoder(EncoderConfig(kind=kind, image_size=32), tmp_path)
    pixels = torch.randn(3, 3, 32, 32)
    tokens = encoder(pixels)
    with torch.no_grad():
        raw = last_tokens(kind, tmp_path, pixels)
    eps = {"dinov2": 1e-6, "siglip2": 1e-6, "mae": 1e-12}[kind]
    assert tokens.shape == (3, 16, 32)
    torch.testing.assert_close(tokens, F.layer_norm(raw, (32,), eps=eps), rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("kind", ["dinov2", "siglip2", "mae"])
def test_an_encoders_layers_pass_gradients_to_the_pixels(kind: EncoderKind, tmp_path: Path) -> None:
    save_backbone(kind, tmp_path)
    encoder = load_encoder(EncoderConfig(kind=kind, image_size=32), tmp_path)
    pixels = torch.randn(2, 3, 32, 32, requires_grad=True)
    states = encoder.hidden_states(pixels)
    assert [state.shape for state in states] == [(2, 16, 32)] * 2
    torch.testing.assert_close(states[-1], last_tokens(kind, tmp_path, pixels))
    states[0].sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().min() > 0


def test_an_encoder_with_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    save_backbone("mae", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["encoder.layer.0.layernorm_before.weight"]
    save_file(tensors, path, {"format": "pt"})
    config = EncoderConfig(kind="mae", image_size=32)
    with pytest.raises(ValueError, match="missing_keys.*layernorm_before"):
        load_encoder(config, tmp_path)
    save_file(tensors | {"encoder.layer.0.layernorm_before.weight": torch.ones(5)}, path)
    with pytest.raises(ValueError, match="mismatched_keys.*layernorm_before"):
        load_encoder(config, tmp_path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises((OSError, SafetensorError)):
        load_encoder(config, tmp_path)
    with pytest.raises(OSError):
        load_encoder(EncoderConfig(kind="mae", image_size=32), tmp_path / "nowhere")


def test_encode_resizes_normalises_and_keeps_the_token_order(tmp_path: Path) -> None:
    save_backbone("dinov2", tmp_path)
    decoder = DecoderConfig(
        latent_channels=32, hidden_size=32, depth=1, num_heads=2, intermediate_size=64, grid=4
    )
    rae = RAE(decoder, image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.4))
    with pytest.raises(ValueError, match="no encoder"):
        rae.encode(torch.zeros(1, 3, 64, 64))
    rae.encoder = load_encoder(EncoderConfig(kind="dinov2", image_size=32), tmp_path)
    assert rae.latents_mean is not None
    rae.latents_mean.normal_()
    rae.latents_var.uniform_(0.5, 2)
    images = torch.rand(2, 3, 64, 64)
    small = F.interpolate(images, size=(32, 32), mode="bicubic", align_corners=False)
    mean = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    std = torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    tokens = rae.encoder((small - mean) / std)
    latents = rae.encode(images)
    expected = (tokens[1, 4 * 2 + 3] - rae.latents_mean[:, 2, 3]) / torch.sqrt(
        rae.latents_var[:, 2, 3] + 1e-5
    )
    torch.testing.assert_close(latents[1, :, 2, 3], expected)


def test_another_latent_shape_is_refused() -> None:
    decoder = DecoderConfig(
        latent_channels=8, hidden_size=16, depth=1, num_heads=2, intermediate_size=32, grid=4
    )
    rae = RAE(decoder, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    with pytest.raises(ValueError, match=r"latents \(8, 5, 5\); this decoder takes \(8, 4, 4\)"):
        rae.decode(torch.zeros(1, 8, 5, 5))
    with pytest.raises(ValueError, match="25 tokens; this decoder takes 16"):
        rae.decoder(torch.zeros(1, 25, 8))

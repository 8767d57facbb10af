"""DINO's features against a ViT written out, and the files that it is read from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from rae.models.checkpoint_config import CheckpointError
from rae.training.stage1.features import DinoFeatures, build_dino, load_dino

DIM, HEADS = 8, 2


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A ViT of 3 blocks for 4×4 patches of 16 px, as a `.pth`."""
    torch.manual_seed(0)
    tensors = {
        key: 0.3 * torch.randn(value.shape) for key, value in tiny_dino().state_dict().items()
    }
    torch.save(tensors, tmp_path / "dino.pth")
    return tmp_path / "dino.pth"


def tiny_dino() -> nn.Module:
    return build_dino(image_size=16, patch_size=4, dim=DIM, depth=3, heads=HEADS)


def vit_states(w: dict[str, Tensor], images: Tensor) -> list[Tensor]:
    """Tokens (B, 17, C) after each block, pre-norm, tanh GELU."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (DIM,), w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    patches = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=4)
    x = patches.flatten(2).mT
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], dim=1) + w["pos_embed"]
    states = []
    for index in range(3):
        name = f"blocks.{index}"
        qkv = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
        q, k, v = qkv.unflatten(-1, (3, HEADS, DIM // HEADS)).permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.mT) / (DIM // HEADS) ** 0.5).softmax(-1) @ v
        x = x + linear(mixed.transpose(1, 2).flatten(2), f"{name}.attn.proj")
        hidden = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        x = x + linear(F.gelu(hidden, approximate="tanh"), f"{name}.mlp.fc2")
        states.append(x)
    return states


def test_features_are_the_patch_tokens_of_the_chosen_blocks(published: Path) -> None:
    vit = tiny_dino()
    load_dino(vit, published)
    features = DinoFeatures(vit, depths=(0, 2))
    assert (features.num_maps, features.channels) == (3, DIM)
    images = torch.rand(2, 3, 24, 20) * 2 - 1
    maps = features(images)
    resized = F.interpolate(images, (16, 16), mode="bilinear", align_corners=False)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    states = vit_states(torch.load(published), ((resized + 1) / 2 - mean) / std)
    for ours, state in zip(maps, (states[0], states[2], states[2]), strict=True):
        assert ours.shape == (2, DIM, 16)
        torch.testing.assert_close(ours, state[:, 1:].mT, rtol=1e-4, atol=1e-5)


def test_gradients_pass_to_the_images_and_stay_out_of_the_network(published: Path) -> None:
    vit = tiny_dino()
    load_dino(vit, published)
    images = torch.rand(1, 3, 16, 16, requires_grad=True)
    DinoFeatures(vit, depths=(1,)).train()(images)[0].square().sum().backward()
    assert images.grad is not None and images.grad.abs().min() > 0
    assert all(p.grad is None and not p.requires_grad for p in vit.parameters())


def test_the_biases_of_keys_are_zeroed(published: Path) -> None:
    vit = tiny_dino()
    load_dino(vit, published)
    raw = torch.load(published)
    for index in range(3):
        key = f"blocks.{index}.attn.qkv.bias"
        query, keys, value = vit.state_dict()[key].chunk(3)
        assert keys.abs().max() == 0
        assert query.equal(raw[key][:DIM]) and value.equal(raw[key][2 * DIM :])


def test_safetensors_are_read_too(published: Path, tmp_path: Path) -> None:
    save_file(torch.load(published), tmp_path / "dino.safetensors")
    one, two = tiny_dino(), tiny_dino()
    load_dino(one, published)
    load_dino(two, tmp_path / "dino.safetensors")
    assert all(value.equal(two.state_dict()[key]) for key, value in one.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("norm.bias"), "1 missing: norm.bias"),
        (lambda w: w.update(head=torch.zeros(1)), "1 unexpected: head"),
        (lambda w: w.update(cls_token=torch.zeros(1, 1, 4)), "1 misshapen: cls_token"),
    ],
)
def test_another_networks_file_is_refused(published: Path, change: object, message: str) -> None:
    tensors = torch.load(published)
    change(tensors)  # type: ignore[operator]
    torch.save(tensors, published)
    with pytest.raises(CheckpointError, match=message):
        load_dino(tiny_dino(), published)


def test_the_published_network_has_its_size() -> None:
    vit = build_dino()
    assert sum(p.numel() for p in vit.parameters()) == 21_670_272
    assert DinoFeatures(vit).depths == [2, 5, 8, 11, 11]

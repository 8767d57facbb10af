"""LPIPS against its formula, on a VGG of random weights read from a file."""

from __future__ import annotations

from pathlib import Path

import lpips
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rae.models.checkpoint_config import CheckpointError
from rae.training.stage1.perceptual import encoder_distance, load_lpips

CPU = torch.device("cpu")
STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
CHANNELS = (64, 128, 256, 512, 512)


@pytest.fixture(scope="module")
def vgg() -> dict[str, Tensor]:
    """As torchvision's file names them, with a small stand-in of its classifier."""
    torch.manual_seed(0)
    tensors, before = {"classifier.0.weight": torch.zeros(2, 2)}, 3
    for layers, channels in zip(STAGES, CHANNELS, strict=True):
        for layer in layers:
            shape = (channels, before, 3, 3)
            tensors[f"features.{layer}.weight"] = torch.randn(shape) * (2 / (9 * before)) ** 0.5
            tensors[f"features.{layer}.bias"] = 0.1 * torch.randn(channels)
            before = channels
    return tensors


def vgg_maps(tensors: dict[str, Tensor], images: Tensor) -> list[Tensor]:
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    x, maps = (images - shift) / scale, []
    for index, layers in enumerate(STAGES):
        x = F.max_pool2d(x, 2) if index else x
        for layer in layers:
            weight = tensors[f"features.{layer}.weight"]
            x = F.relu(F.conv2d(x, weight, tensors[f"features.{layer}.bias"], padding=1))
        maps.append(x)
    return maps


def test_lpips_is_its_formula(vgg: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(vgg, tmp_path / "vgg.pth")
    loss = load_lpips(tmp_path / "vgg.pth", CPU)
    images = torch.rand(2, 3, 32, 32).mul(2).sub(1).requires_grad_()
    target = torch.rand(2, 3, 32, 32) * 2 - 1
    linears = torch.load(Path(lpips.__file__).parent / "weights/v0.1/vgg.pth", map_location="cpu")
    expected = torch.zeros(())
    pairs = zip(vgg_maps(vgg, images), vgg_maps(vgg, target), strict=True)
    for index, (ours, theirs) in enumerate(pairs):
        difference = F.normalize(ours) - F.normalize(theirs)
        weighted = F.conv2d(difference.square(), linears[f"lin{index}.model.1.weight"])
        expected = expected + weighted.mean((1, 2, 3)).mean()
    value = loss(images, target)
    torch.testing.assert_close(value, expected)
    assert value.item() > 0.01 and loss(target, target).item() == 0
    value.backward()
    assert images.grad is not None and images.grad.abs().max() > 0


def test_another_networks_file_is_refused(vgg: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({k: v for k, v in vgg.items() if "28" not in k}, tmp_path / "vgg.pth")
    with pytest.raises(CheckpointError, match=r"VGG-16.*2 missing: 28\.bias, 28\.weight"):
        load_lpips(tmp_path / "vgg.pth", CPU)


class TwoMaps(nn.Module):
    num_maps = 2
    channels = 3

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images.flatten(2), 5 * images.flatten(2)]


def test_an_encoders_distance_is_of_normalised_tokens() -> None:
    one = torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1)
    two = torch.tensor([0.0, 3.0, -3.0]).view(1, 3, 1, 1)
    # Both have norm √1.5 of (1, 0, −1) and (0, 1, −1): 1.5·(1 + 1 + 0)/3 = 1, at either scale.
    distance = encoder_distance(TwoMaps())
    assert distance(one, two).item() == pytest.approx(1, rel=1e-3)
    assert distance(one, 2 * one).item() == pytest.approx(0, abs=1e-6)

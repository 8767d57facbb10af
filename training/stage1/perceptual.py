"""How unlike two images look: LPIPS, or the distance of a frozen encoder's features."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rae.models.pickled import read_pickled
from rae.training.stage1.features import FeatureMaps, load_tensors

if TYPE_CHECKING:
    from lpips import LPIPS

VGG_FILE = (
    "torchvision's VGG-16 of ImageNet, https://download.pytorch.org/models/vgg16-397923af.pth"
)

ALEX_FILE = (
    "torchvision's AlexNet of ImageNet, https://download.pytorch.org/models/"
    "alexnet-owt-7be5be79.pth"
)
LPIPS_FILES = f"{VGG_FILE}, or {ALEX_FILE}"
ALEX_KERNEL = 11  # of its first layer

PerceptualLoss = Callable[[Tensor, Tensor], Tensor]
"""Of two batches (B, 3, H, W) in [−1, 1]: their mean distance, 0-d; gradients reach both."""


def load_lpips(weights: Path, device: torch.device) -> PerceptualLoss:
    """LPIPS 0.1 on VGG-16, as a loss. Raises as `lpips_network` does."""
    network = lpips_network(weights, may_be_alex=False).to(device)
    return lambda images, target: network(images, target).mean()


def lpips_network(weights: Path, *, may_be_alex: bool = True) -> LPIPS:
    """LPIPS 0.1 (B, 1, 1, 1) of two batches (B, 3, H, W) in [−1, 1], on the VGG-16 or the AlexNet
    that `weights` holds, with the library's own linear layers; frozen.

    Nothing is downloaded. Raises ImportError that names the extra to install and CheckpointError
    for another file. Source: arXiv 1801.03924.
    """
    tensors = {
        key.removeprefix("features."): value
        for key, value in read_pickled(weights).items()
        if key.startswith("features.")
    }
    first = tensors.get("0.weight")
    is_alex = may_be_alex and isinstance(first, Tensor) and first.shape[-1] == ALEX_KERNEL
    network = build_lpips("alex" if is_alex else "vgg")
    layers = nn.Sequential()  # lpips cuts them into slices, where they keep their numbers
    for part in network.net.children():
        for name, layer in part.named_children():
            layers.add_module(name, layer)
    expected = ALEX_FILE if is_alex else VGG_FILE if not may_be_alex else LPIPS_FILES
    load_tensors(layers, tensors, weights, expected)
    return network


def build_lpips(name: Literal["vgg", "alex"]) -> LPIPS:
    """With a VGG or an AlexNet of random weights, frozen."""
    try:
        import lpips
    except ImportError as error:
        raise ImportError("LPIPS needs lpips: pip install 'rae-server[train]'") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks torchvision for the network in an old way
        network = lpips.LPIPS(net=name, pnet_rand=True, verbose=False)
    return network.requires_grad_(False).eval()


def encoder_distance(features: FeatureMaps) -> PerceptualLoss:
    """The mean squared difference of normalised tokens, mean over the feature maps."""

    def distance(images: Tensor, target: Tensor) -> Tensor:
        pairs = zip(features(images), features(target), strict=True)
        return torch.stack([F.mse_loss(normalised(a), normalised(b)) for a, b in pairs]).mean()

    return distance


def normalised(tokens: Tensor) -> Tensor:
    """Maps (B, C, N) with mean 0 and variance 1 over the channels of each token."""
    return F.layer_norm(tokens.transpose(1, 2).float(), (tokens.shape[1],))

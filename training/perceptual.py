"""How unlike two images look: LPIPS, or the distance of a frozen encoder's features."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rae.models.pickled import read_pickled
from rae.training.features import Features, load_tensors

VGG_FILE = (
    "torchvision's VGG-16 of ImageNet, https://download.pytorch.org/models/vgg16-397923af.pth"
)

PerceptualLoss = Callable[[Tensor, Tensor], Tensor]
"""Of two batches (B, 3, H, W) in [−1, 1]: their mean distance, 0-d; gradients reach both."""


def load_lpips(weights: Path, device: torch.device) -> PerceptualLoss:
    """LPIPS 0.1 on VGG-16: the library's own linear layers, `weights` for the rest.

    Nothing is downloaded. Raises ImportError that names the extra to install and CheckpointError
    for another file.
    """
    network = build_lpips()
    tensors = {
        key.removeprefix("features."): value
        for key, value in read_pickled(weights).items()
        if key.startswith("features.")
    }
    vgg = nn.Sequential()
    for part in network.net.children():
        for name, layer in part.named_children():
            vgg.add_module(name, layer)
    load_tensors(vgg, tensors, weights, VGG_FILE)
    network.to(device)
    return lambda images, target: network(images, target).mean()


def build_lpips() -> nn.Module:
    """With a VGG of random weights, frozen."""
    try:
        import lpips
    except ImportError as error:
        raise ImportError("LPIPS needs lpips: pip install 'rae-server[train]'") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks torchvision for VGG in an old way
        network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    return network.requires_grad_(False).eval()


def encoder_distance(features: Features) -> PerceptualLoss:
    """The mean squared difference of normalised tokens, mean over the feature maps."""

    def distance(images: Tensor, target: Tensor) -> Tensor:
        pairs = zip(features(images), features(target), strict=True)
        return torch.stack([F.mse_loss(normalised(a), normalised(b)) for a, b in pairs]).mean()

    return distance


def normalised(tokens: Tensor) -> Tensor:
    """Maps (B, C, N) with mean 0 and variance 1 over the channels of each token."""
    return F.layer_norm(tokens.transpose(1, 2).float(), (tokens.shape[1],))

"""The losses of the decoder's discriminator, and the weight that balances them.

Source: github bytetriper/RAE, `src/disc/gan_loss.py` and `src/train_stage1.py`, after VQGAN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ADAPTIVE_WEIGHT = 1e4


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The hinge loss of logits of any shape, 0-d."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def generator_loss(fake: Tensor) -> Tensor:
    """What the decoder lowers so that its images' logits rise, 0-d."""
    return -fake.mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor) -> Tensor:
    """Ratio of the norms of two losses' gradients by the same weights, at most 10,000, 0-d."""
    ratio = reconstruction.norm() / (adversarial.norm() + 1e-6)
    return ratio.clamp(0, MAX_ADAPTIVE_WEIGHT).detach()


def last_layer_gradient(pixels_gradient: Tensor, inputs: Tensor, patch_size: int) -> Tensor:
    """A loss's gradient by the decoder's `decoder_pred.weight` (3·p², D), fp32.

    From its gradient by the decoder's pixels (B, 3, S, S) and that layer's `inputs` (B, 1 + N, D),
    class token first: the layer is linear, and only moves its outputs into place after it. So λ
    costs no pass through the networks of the losses, and sharded weights need not be gathered.
    """
    grid = pixels_gradient.shape[-1] // patch_size
    g = pixels_gradient.unflatten(3, (grid, patch_size)).unflatten(2, (grid, patch_size))
    g = g.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (B, N, p·p·3)
    with torch.autocast(g.device.type, enabled=False):
        return torch.einsum("bno,bnd->od", g.float(), inputs[:, 1:].float())

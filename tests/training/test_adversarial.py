"""Losses of the discriminator, and the weight λ, against numbers made by hand."""

from __future__ import annotations

import pytest
import torch

from rae.models.config import DecoderConfig
from rae.models.decoder import Decoder
from rae.training.stage1.adversarial import (
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    last_layer_gradient,
)


def test_hinge_losses() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0])
    # ½·((0 + .5 + 2)/3 + (0 + 1)/2)
    assert discriminator_loss(real, fake).item() == pytest.approx(0.5 * (2.5 / 3 + 0.5))
    assert generator_loss(fake).item() == pytest.approx(1.5)


def test_the_adaptive_weight_is_a_ratio_of_norms() -> None:
    reconstruction, adversarial = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0], [2.0]])
    assert adaptive_weight(reconstruction, adversarial).item() == pytest.approx(2.5)
    nothing = torch.zeros(2)
    assert adaptive_weight(nothing, adversarial).item() == 0
    assert adaptive_weight(torch.tensor([0.005]), nothing).item() == pytest.approx(5000)
    assert adaptive_weight(torch.tensor([1.0]), nothing).item() == 1e4
    assert not adaptive_weight(reconstruction.requires_grad_(), adversarial).requires_grad


def test_the_last_layers_gradient_is_autograds() -> None:
    torch.manual_seed(0)
    config = DecoderConfig(
        latent_channels=4,
        hidden_size=8,
        depth=1,
        num_heads=2,
        intermediate_size=8,
        patch_size=2,
        grid=3,
    )
    decoder = Decoder(config)
    inputs: list[torch.Tensor] = []
    decoder.decoder_pred.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    pixels = decoder(torch.randn(2, 9, 4))
    loss = (pixels * torch.randn(pixels.shape)).square().sum()
    by_pixels, expected = torch.autograd.grad(loss, [pixels, decoder.decoder_pred.weight])
    torch.testing.assert_close(last_layer_gradient(by_pixels, inputs[0], 2), expected)

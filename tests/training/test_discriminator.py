"""The discriminator's heads against the same arithmetic written out."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rae.training.stage1.discriminator import DiscriminatorHeads, Head


def random_heads(num_maps: int = 2, channels: int = 6) -> DiscriminatorHeads:
    torch.manual_seed(0)
    heads = DiscriminatorHeads(num_maps, channels)
    for name, parameter in heads.named_parameters():
        nn.init.normal_(parameter, std=0.5, mean=1.0 if name.endswith("1.weight") else 0.0)
    return heads.eval()


def estimates(heads: nn.Module) -> list[Tensor]:
    return [value.clone() for name, value in heads.named_buffers() if name.endswith(("_u", "_v"))]


def normalised_conv(x: Tensor, conv: nn.Module) -> Tensor:
    """A ring of tokens (B, C, N), the weight over its largest singular value's estimate."""
    state = conv.state_dict()
    weight = state["parametrizations.weight.original"]
    left, right = (state[f"parametrizations.weight.0.{name}"] for name in ("_u", "_v"))
    weight = weight / (left @ weight.flatten(1) @ right)
    pad = weight.shape[-1] // 2
    ring = torch.cat([x[:, :, -pad:], x, x[:, :, :pad]], dim=2) if pad else x
    return F.conv1d(ring, weight) + state["bias"][:, None]


def block(x: Tensor, layers: nn.Sequential) -> Tensor:
    x, norm = normalised_conv(x, layers[0]), layers[1].state_dict()
    mean, var = x.mean(2, keepdim=True), x.var(2, correction=0, keepdim=True)
    x = (x - mean) / (var + 1e-6).sqrt() * norm["weight"][:, None] + norm["bias"][:, None]
    return torch.where(x > 0, x, 0.2 * x)


def test_a_head_is_its_formula() -> None:
    heads = random_heads()
    maps = [torch.randn(3, 6, 12), torch.randn(3, 6, 10)]
    (logits,) = heads(maps)
    assert logits.shape == (3, 22)
    start = 0
    for head, features in zip(heads.heads, maps, strict=True):
        assert isinstance(head, Head)
        x = block(features, head.project)
        x = (block(x, head.mix) + x) / math.sqrt(2)
        expected = normalised_conv(x, head.classify)[:, 0]
        part = logits[:, start : start + features.shape[2]]
        torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-5)
        start += features.shape[2]


def test_a_sample_does_not_see_its_neighbours() -> None:
    heads, maps = random_heads(), [torch.randn(4, 6, 12), torch.randn(4, 6, 12)]
    (together,) = heads(maps)
    (alone,) = heads([part[1:2] for part in maps])
    torch.testing.assert_close(together[1:2], alone)


def test_spectral_estimates_move_once_for_each_list_in_training_alone() -> None:
    heads, maps = random_heads(), [torch.randn(2, 6, 12)] * 2
    before = estimates(heads)
    heads(maps)
    assert all(a.equal(b) for a, b in zip(estimates(heads), before, strict=True))
    weight = heads.state_dict()["heads.0.project.0.parametrizations.weight.original"].flatten(1)
    u, v = before[:2]
    for _ in range(2):
        u = F.normalize(weight @ v, dim=0)
        v = F.normalize(weight.T @ u, dim=0)
    heads.train()
    fake, real = heads(maps, maps)
    assert not fake.equal(real)  # the second list met moved estimates
    torch.testing.assert_close(estimates(heads)[:2], [u, v])

"""The parts of a forward: conditioning apart from tokens, and tokens in any layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rae.models.checkpoint import load_checkpoint
from rae.models.cpu import can_pack, pack
from rae.models.dit_dh import Conditioning, DiTDH
from rae.models.fused import fuse

LAYERS = [
    "plain",
    pytest.param(
        "packed", marks=pytest.mark.skipif(not can_pack(), reason="this CPU has no packed linear")
    ),
    "fused",
]


def prepared(folder: Path, layers: str, dtype: torch.dtype) -> DiTDH:
    model = load_checkpoint(folder).dit_dh
    if layers == "packed":
        pack(model, dtype)
    elif layers == "fused":
        fuse(model, dtype, "reference", "reference")
    return model


def inputs(model: DiTDH, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    latents = torch.randn(batch, *model.config.latent_shape)
    return latents, torch.rand(batch), torch.randint(model.config.num_classes + 1, (batch,))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layers", LAYERS)
def test_velocity_of_kept_rows_is_the_forward(
    tiny_checkpoint: Path, layers: str, dtype: torch.dtype
) -> None:
    model = prepared(tiny_checkpoint, layers, dtype)
    latents, t, labels = inputs(model, 5)
    latents, rows = latents[:3], torch.tensor([3, 0, 3])
    tokens = latents.flatten(2).transpose(1, 2)
    assert not tokens.is_contiguous()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        forward = model(latents, t[rows], labels[rows])
        kept = model.condition(t, labels)
        picked = Conditioning(kept.time[rows], kept.modulations[rows])
        velocity = model.velocity(tokens.contiguous(), picked)
        strided = model.velocity(tokens, picked)
    assert kept.time.shape == (5, 32) and kept.modulations.shape == (5, 2, 6 * 32)
    assert kept.time.dtype == kept.modulations.dtype == dtype
    assert velocity.is_contiguous() and velocity.equal(strided)
    assert velocity.transpose(1, 2).reshape(forward.shape).equal(forward)
    assert not velocity[0].equal(velocity[2])  # the same condition, other tokens


def test_a_modulation_is_its_blocks_linear_of_the_condition_activated_twice(
    tiny_checkpoint: Path,
) -> None:
    model = prepared(tiny_checkpoint, "plain", torch.float32)
    _, t, labels = inputs(model, 5)
    conditioning = model.condition(t, labels)
    c = F.silu(F.silu(model.t_embedder(t) + model.y_embedder.embedding_table.weight[labels]))
    weights = model.state_dict()
    for index, modulation in enumerate(conditioning.modulations.unbind(1)):
        name = f"blocks.{index}.adaLN_modulation.1"
        expected = F.linear(c, weights[f"{name}.weight"], weights[f"{name}.bias"])
        torch.testing.assert_close(modulation, expected)


def test_gradients_reach_every_parameter(tiny_checkpoint: Path) -> None:
    model = prepared(tiny_checkpoint, "plain", torch.float32).train().requires_grad_(True)
    model(*inputs(model, 3)).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())

"""Statistics, EMA, schedule, label dropout and decoder noise, in numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import ViTMAEConfig

from rae.training.decoder import NOISE_TAU, add_noise, reconstruction_loss
from rae.training.dit_dh import drop_labels
from rae.training.ema import EMA
from rae.training.encoder_mae import build_mae
from rae.training.loop import DivergedError, Plan, fit, lr_factor
from rae.training.stats import LatentStatistics


@pytest.mark.parametrize("sizes", [[1000], [1, 999], [7, 300, 1, 692], [1] * 1000])
def test_statistics_do_not_depend_on_the_batches(sizes: list[int]) -> None:
    # A mean a thousand times the spread: E[x²] − E[x]² would lose six digits here.
    latents = 1000 + torch.randn(
        1000, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    statistics = LatentStatistics()
    for batch in latents.split(sizes):
        statistics.update(batch)
    torch.testing.assert_close(statistics.mean, latents.mean(0), rtol=1e-13, atol=0)
    expected = latents.var(0, correction=0)
    torch.testing.assert_close(statistics.var, expected, rtol=1e-11, atol=0)


def test_statistics_of_two_workers_merge() -> None:
    latents = torch.randn(90, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    one, two = LatentStatistics(), LatentStatistics()
    one.update(latents[:30])
    two.update(latents[30:])
    one.merge(two)
    one.merge(LatentStatistics())
    torch.testing.assert_close(one.var, latents.double().var(0, correction=0), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="no latents"):
        _ = LatentStatistics().var


def test_ema_follows_its_formula_and_keeps_buffers() -> None:
    model = nn.BatchNorm1d(1)
    nn.init.zeros_(model.weight)
    ema = EMA(model, 0.5)
    nn.init.ones_(model.weight)
    expected = 0.0
    for n in range(12):
        ema.update(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay)
        assert ema.average.weight.item() == pytest.approx(expected, rel=1e-6)
    model.running_mean = torch.ones(1)
    ema.update(model)
    assert ema.average.running_mean is not None and ema.average.running_mean.item() == 0
    assert not ema.average.training and not ema.average.weight.requires_grad
    with pytest.raises(ValueError, match=r"1\.0"):
        EMA(model, 1.0)


def test_learning_rate_rises_then_falls_on_a_line() -> None:
    factors = [lr_factor(step, 1100) for step in range(1100)]
    assert factors[0] == 0.01 and factors[99] == 1.0 and factors[100] == 1.0
    assert factors[600] == pytest.approx(0.51)
    assert factors[-1] == pytest.approx(0.02, abs=1e-3)


def test_fit_solves_a_regression_and_returns_the_average() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    target = x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 3
    losses: list[float] = []

    def batch_loss(model: nn.Linear) -> Tensor:
        return (model(x) - target).square().mean()

    plan = Plan(steps=400, lr=0.1, ema_decay=0.9)
    model = fit(
        nn.Linear(3, 1), batch_loss, plan, bf16=False, on_step=lambda _, x, __: losses.append(x)
    )
    assert len(losses) == 400 and losses[-1] < 1e-4 * losses[0]
    assert model.weight.flatten().tolist() == pytest.approx([1, -2, 0.5], abs=0.01)
    assert model.bias.item() == pytest.approx(3, abs=0.01)


def test_fit_stops_where_the_loss_is_no_number() -> None:
    with pytest.raises(DivergedError, match="nan at step 0"):
        fit(
            nn.Linear(1, 1),
            lambda model: model.weight.sum() * float("nan"),
            Plan(steps=3, lr=0.1),
            bf16=False,
            on_step=lambda *_: None,
        )


def test_a_tenth_of_the_labels_is_dropped_and_no_other_changes() -> None:
    labels = torch.arange(10).repeat(5000)
    dropped = drop_labels(labels, 10, 0.1, torch.Generator().manual_seed(0))
    gone = dropped != labels
    assert gone.float().mean().item() == pytest.approx(0.1, abs=0.005)
    assert dropped[gone].unique().tolist() == [10]
    assert drop_labels(labels, 10, 0.0, torch.Generator()).equal(labels)


def test_decoder_noise_is_uniform_in_strength() -> None:
    noise = add_noise(torch.zeros(4000, 16, 8), torch.Generator().manual_seed(0))
    sigma = noise.flatten(1).std(1)
    assert sigma.mean().item() == pytest.approx(NOISE_TAU / 2, abs=0.01)
    assert sigma.max().item() < 1.25 * NOISE_TAU
    assert sigma.quantile(0.25).item() == pytest.approx(NOISE_TAU / 4, abs=0.01)


def test_reconstruction_loss_is_l1_plus_l2() -> None:
    target = torch.zeros(1, 3, 2, 2)
    assert reconstruction_loss(target + 0.5, target).item() == 0.75


def test_an_mae_from_scratch_knows_positions() -> None:
    config = ViTMAEConfig(
        image_size=8,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        decoder_hidden_size=8,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    mae = build_mae(config)
    for table in (mae.vit.embeddings.position_embeddings, mae.decoder.decoder_pos_embed):
        assert torch.cdist(table[0, 1:], table[0, 1:]).fill_diagonal_(1).min() > 0.5
        assert table[0, 0].abs().max() == 0
    assert mae.decoder.mask_token.std() > 0

"""Statistics, EMA, seeds and label dropout, in numbers."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from transformers import ViTMAEConfig

from rae.training.data.stats import LatentStatistics
from rae.training.digits.encoder_mae import build_mae
from rae.training.draws import mix
from rae.training.ema import EMA
from rae.training.evaluation.measuring import exact_convolutions
from rae.training.precision import Precision, set_matmul_precision
from rae.training.stage2.dit_dh import FlowMatching


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


@pytest.mark.parametrize("rises", [False, True])
def test_ema_follows_its_formula(rises: bool) -> None:
    model = nn.BatchNorm1d(1)
    nn.init.zeros_(model.weight)
    model.bias.requires_grad_(False)
    ema = EMA(model, 0.5, rises=rises)
    assert list(ema.averages) == ["weight"]
    nn.init.ones_(model.weight)
    expected = 0.0
    for n in range(12):
        ema.update(n)
        decay = min(0.5, (1 + n) / (10 + n)) if rises else 0.5
        expected = decay * expected + (1 - decay)
        assert ema.averages["weight"].item() == pytest.approx(expected, rel=1e-6)
    with ema.applied():
        assert model.weight.item() == ema.averages["weight"].item() < 1
    assert model.weight.item() == 1
    with pytest.raises(ValueError, match=r"1\.0"):
        EMA(model, 1.0)


def test_a_tenth_of_the_labels_is_dropped_whatever_the_batch() -> None:
    objective = FlowMatching(shift=1, null_label=10, class_dropout_prob=0.1, seed=0)
    positions = torch.arange(5000)
    draws = objective.draw(positions, (1, 1, 1), torch.device("cpu"))
    assert draws.dropped.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert draws.noise.std().item() == pytest.approx(1, abs=0.03)
    alone = objective.draw(positions[70:71], (1, 1, 1), torch.device("cpu"))
    for one, all_ in zip(alone, draws, strict=True):
        assert torch.equal(one[0], all_[70])
    other = FlowMatching(shift=1, null_label=10, class_dropout_prob=0.1, seed=1)
    assert not torch.equal(other.draw(positions, (1, 1, 1), torch.device("cpu")).t, draws.t)
    with pytest.raises(ValueError, match="shift 0 is not positive"):
        FlowMatching(shift=0, null_label=10, class_dropout_prob=0.1, seed=1)


def test_seeds_of_neighbours_have_nothing_in_common() -> None:
    seeds = [mix(seed, position) for seed in range(4) for position in range(250)]
    assert len(set(seeds)) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    bits = [(one ^ other).bit_count() for one, other in itertools.pairwise(seeds)]
    assert sum(bits) / len(bits) == pytest.approx(31.5, abs=0.5)
    assert mix(1, 2) != mix(2, 1) != mix(2, 1, 0)


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


@pytest.mark.parametrize(("precision", "is_rounded"), [("fp32", False), ("tf32", True)])
def test_tf32_is_of_matmuls_and_convolutions(precision: Precision, is_rounded: bool) -> None:
    try:
        set_matmul_precision(precision)
        assert torch.get_float32_matmul_precision() == ("high" if is_rounded else "highest")
        assert torch.backends.cudnn.allow_tf32 == is_rounded
        with exact_convolutions():  # no setting contradicts another
            assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.allow_tf32 == is_rounded
    finally:
        set_matmul_precision("fp32")

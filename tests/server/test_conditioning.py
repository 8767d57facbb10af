"""The conditioning cache: the model's own bits; rows that are shared and overwritten."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rae.models.checkpoint import load_checkpoint
from rae.models.config import CONFIGS, DiTDHConfig
from rae.models.cpu import can_pack, pack
from rae.models.dit_dh import Conditioning, DiTDH
from rae.models.layers import store_matmul_weights
from rae.models.sampling import timesteps
from rae.server.conditioning import CHUNK, ConditioningCache, Key, bytes_per_row

CPU = torch.device("cpu")
PREPARE = {"plain": store_matmul_weights} | ({"packed": pack} if can_pack() else {})


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> DiTDH:
    return load_checkpoint(tiny_checkpoint).dit_dh


@pytest.fixture
def cache(model: DiTDH) -> ConditioningCache:
    return ConditioningCache(model, 4, CPU, torch.float32)


def misses(cache: ConditioningCache, class_label: int, *times: float) -> int:
    before = cache.misses
    cache.rows([(class_label, t) for t in times])
    return cache.misses - before


def equal(one: Conditioning, other: Conditioning) -> bool:
    return one.time.equal(other.time) and one.modulations.equal(other.modulations)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layers", PREPARE)
@torch.inference_mode()
def test_rows_are_the_bits_of_the_model_alone(
    tiny_checkpoint: Path, layers: str, dtype: torch.dtype
) -> None:
    config = replace(load_checkpoint(tiny_checkpoint).dit_dh.config, hidden_size=96, depth=3)
    torch.manual_seed(0)
    model = DiTDH(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    PREPARE[layers](model, dtype)
    cache = ConditioningCache(model, 200, CPU, dtype)
    grids = {2: timesteps(50, 3.0)[:-1].tolist(), 4: timesteps(99, 1.5)[:-1].tolist()}
    assert len(grids[4]) > CHUNK
    cache.rows([(2, t) for t in grids[2][::5]])  # then a part is there
    for label, grid in grids.items():
        rows = cache.rows([(label, t) for t in grid])
        for row, t in zip(rows, grid, strict=True):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                alone = model.condition(torch.tensor([t]), torch.tensor([label]))
            assert equal(cache.gather(torch.tensor([row])), alone)
            assert alone.modulations.dtype == cache.modulations.dtype == dtype
    assert (cache.hits, cache.misses) == (10, 49 + 98)


def test_the_model_always_sees_the_same_number_of_rows(
    model: DiTDH, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, seen = ConditioningCache(model, 200, CPU, torch.float32), []
    condition = model.condition

    def watched(t: torch.Tensor, class_labels: torch.Tensor) -> Conditioning:
        seen.append((len(t), len(class_labels)))
        return condition(t, class_labels)

    monkeypatch.setattr(model, "condition", watched)
    for label, count in enumerate((1, CHUNK, CHUNK + 1)):
        cache.rows([(label, t) for t in torch.linspace(0, 1, count).tolist()])
    assert seen == [(CHUNK, CHUNK)] * 4


def test_the_least_recently_used_row_goes_first(cache: ConditioningCache) -> None:
    assert misses(cache, 0, 0.1, 0.2, 0.3, 0.4) == 4
    assert misses(cache, 0, 0.2, 0.1) == 0
    assert misses(cache, 1, 0.3) == 1  # in place of (0, 0.3): a label has rows of its own
    assert misses(cache, 0, 0.1, 0.2) == 0
    assert misses(cache, 0, 0.4, 0.3) == 1
    assert misses(cache, 1, 0.3) == 1


def test_what_is_asked_for_together_stays_together(cache: ConditioningCache) -> None:
    place = cache.modulations.data_ptr()
    cache.rows([(0, 0.1), (0, 0.2), (0, 0.3), (0, 0.4)])
    rows = cache.rows([(0, 0.1), (1, 0.2), (1, 0.3), (1, 0.4)])
    assert sorted(rows) == [0, 1, 2, 3]
    assert cache.modulations.data_ptr() == place
    with pytest.raises(AssertionError):
        cache.rows([(0, t) for t in (0.1, 0.2, 0.3, 0.4, 0.5)])


def test_a_key_that_comes_twice_has_one_row(cache: ConditioningCache) -> None:
    rows = cache.rows([(0, 0.1), (0, 0.2), (0, 0.1)])
    assert rows[0] == rows[2] != rows[1]
    assert (cache.hits, cache.misses) == (1, 2)


def test_a_failed_evaluation_loses_no_rows(
    cache: ConditioningCache, model: DiTDH, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert misses(cache, 0, 0.1, 0.2) == 2

    def fail(*_: object) -> Conditioning:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(model, "condition", fail)
        with pytest.raises(torch.OutOfMemoryError):
            cache.rows([(0, 0.1), (0, 0.3)])
    assert misses(cache, 0, 0.1, 0.2, 0.3, 0.4) == 2


def test_a_failed_copy_loses_no_rows(
    cache: ConditioningCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError

    misses(cache, 0, 0.1)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "time", MagicMock(index_copy_=fail, device=CPU, dtype=torch.float32))
        for _ in range(2 * cache.capacity):
            with pytest.raises(torch.OutOfMemoryError):
                cache.rows([(0, 0.2), (0, 0.3)])
    assert misses(cache, 0, 0.1, 0.2, 0.3, 0.4) >= 3
    assert sorted([*cache._rows.values(), *cache._empty]) == list(range(cache.capacity))


KEYS = [(label, t) for label in range(5) for t in (0.0, 0.25, 0.5, 0.75, 1.0)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.sampled_from(KEYS), max_size=6), max_size=30))
def test_rows_hold_what_was_asked_for(model: DiTDH, batches: list[list[Key]]) -> None:
    every = ConditioningCache(model, len(KEYS), CPU, torch.float32)
    exact = dict(zip(KEYS, every.modulations[every.rows(KEYS)], strict=True))
    cache = ConditioningCache(model, 6, CPU, torch.float32)
    for keys in batches:
        for key, row in zip(keys, cache.rows(keys), strict=True):
            assert cache.modulations[row].equal(exact[key])


@pytest.mark.parametrize("config", [CONFIGS["DiTDH-XL-256"], CONFIGS["DiTDH-S-256"]])
def test_a_row_takes_what_it_says(config: DiTDHConfig) -> None:
    with torch.device("meta"):
        model = DiTDH(config)
    cache = ConditioningCache(model, 7, torch.device("meta"), torch.bfloat16)
    assert cache.time.nbytes + cache.modulations.nbytes == 7 * bytes_per_row(config, torch.bfloat16)

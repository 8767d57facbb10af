"""The conditioning cache: the model's own bits; rows that are shared, pinned and overwritten."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

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
from rae.server.conditioning import CHUNK, ConditioningCache, bytes_per_row

CPU = torch.device("cpu")
PREPARE = {"plain": store_matmul_weights} | ({"packed": pack} if can_pack() else {})


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> DiTDH:
    return load_checkpoint(tiny_checkpoint).dit_dh


@pytest.fixture
def cache(model: DiTDH) -> ConditioningCache:
    return ConditioningCache(model, 4, CPU, torch.float32)


def acquire(cache: ConditioningCache, class_label: int, *times: float) -> list[int]:
    rows = cache.acquire(class_label, times)
    assert rows is not None
    return rows


def misses(cache: ConditioningCache, class_label: int, *times: float) -> int:
    before = cache.misses
    cache.release(acquire(cache, class_label, *times))
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
    cache.release(acquire(cache, 2, *grids[2][::5]))  # then a part is there
    for label, grid in grids.items():
        rows = acquire(cache, label, *grid)
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
        acquire(cache, label, *torch.linspace(0, 1, count).tolist())
    assert seen == [(CHUNK, CHUNK)] * 4


def test_the_least_recently_released_row_goes_first(cache: ConditioningCache) -> None:
    first = acquire(cache, 0, 0.1, 0.2)
    second = acquire(cache, 0, 0.3, 0.4)
    cache.release(second)
    cache.release(first)
    assert misses(cache, 1, 0.3) == 1  # in place of (0, 0.3): a label has rows of its own
    assert misses(cache, 0, 0.2) == 0
    assert misses(cache, 1, 0.1, 0.2) == 2  # of (0, 0.4) and (0, 0.1)
    assert misses(cache, 0, 0.2) == 0
    assert misses(cache, 1, 0.1, 0.2, 0.3) == 0
    assert misses(cache, 0, 0.1) == 1


def test_pinned_rows_stay(cache: ConditioningCache) -> None:
    place = cache.modulations.data_ptr()
    held = acquire(cache, 0, 0.1, 0.2)
    kept = cache.gather(torch.tensor(held))
    for label in range(1, 5):
        assert misses(cache, label, 0.1, 0.2) == 2
    assert equal(cache.gather(torch.tensor(held)), kept)
    assert acquire(cache, 0, 0.1, 0.2) == held
    cache.release(held)
    assert cache.acquire(1, [0.3, 0.4, 0.5]) is None  # they were taken twice
    cache.release(held)
    assert acquire(cache, 1, 0.3, 0.4, 0.5)
    assert cache.modulations.data_ptr() == place


def test_what_does_not_fit_changes_nothing(cache: ConditioningCache) -> None:
    assert cache.acquire(0, [0.1, 0.2, 0.3, 0.4, 0.5]) is None
    held = acquire(cache, 0, 0.1, 0.2)
    cache.release(acquire(cache, 0, 0.3, 0.4))
    assert cache.acquire(0, [0.3, 0.4, 0.5]) is None  # the two are there, a third has no place
    assert cache.acquire(0, [0.1, 0.5, 0.6, 0.7]) is None
    assert (cache.hits, cache.misses) == (0, 4)
    assert misses(cache, 0, 0.1, 0.2, 0.3, 0.4) == 0
    assert misses(cache, 0, 0.5, 0.6) == 2
    cache.release(held)
    with pytest.raises(AssertionError, match="is not pinned"):
        cache.release(held[:1])


def test_a_time_that_comes_twice_has_one_row(cache: ConditioningCache) -> None:
    rows = acquire(cache, 0, 0.1, 0.2, 0.1)
    assert rows[0] == rows[2] != rows[1]
    assert (cache.hits, cache.misses) == (1, 2)
    cache.release(rows)
    assert acquire(cache, 1, 0.1, 0.2, 0.3, 0.4)


def test_a_failed_evaluation_loses_no_rows(
    cache: ConditioningCache, model: DiTDH, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.release(acquire(cache, 0, 0.1, 0.2))

    def fail(*_: object) -> Conditioning:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(model, "condition", fail)
        with pytest.raises(torch.OutOfMemoryError):
            cache.acquire(0, [0.1, 0.3])
    assert acquire(cache, 0, 0.1, 0.2, 0.3, 0.4)


TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)
Action = int | tuple[int, list[float]]
ACTIONS = st.lists(
    st.integers(0, 9) | st.tuples(st.integers(0, 4), st.lists(st.sampled_from(TIMES))), max_size=40
)


@settings(max_examples=40, deadline=None)
@given(ACTIONS)
def test_random_use_leaks_nothing(model: DiTDH, actions: list[Action]) -> None:
    capacity = 6
    cache = ConditioningCache(model, capacity, CPU, torch.float32)
    keys = [(label, t) for label in range(5) for t in TIMES]
    values = cache.evaluate(*zip(*keys, strict=True)).modulations
    exact = dict(zip(keys, values, strict=True))
    held: list[tuple[int, list[float], list[int]]] = []
    for action in actions:
        if isinstance(action, int):
            if held:
                cache.release(held.pop(action % len(held))[2])
            continue
        pinned = {(label, t) for label, times, _ in held for t in times}
        rows = cache.acquire(*action)
        label, times = action
        fits = len(pinned | {(label, t) for t in times}) <= capacity
        assert (rows is not None) == fits
        if rows is not None:
            held.append((label, times, rows))
        for label, times, rows in held:
            for t, row in zip(times, rows, strict=True):
                assert cache.modulations[row].equal(exact[label, t])
    for _, _, rows in held:
        cache.release(rows)
    assert len(set(acquire(cache, 0, *torch.linspace(0.1, 0.2, capacity).tolist()))) == capacity


@pytest.mark.parametrize("config", [CONFIGS["DiTDH-XL-256"], CONFIGS["DiTDH-S-256"]])
def test_a_row_takes_what_it_says(config: DiTDHConfig) -> None:
    with torch.device("meta"):
        model = DiTDH(config)
    cache = ConditioningCache(model, 7, torch.device("meta"), torch.bfloat16)
    assert cache.time.nbytes + cache.modulations.nbytes == 7 * bytes_per_row(config, torch.bfloat16)

"""A measured table holds what was the fastest, and nothing that failed or was wrong."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from rae.kernels import adaln, tune
from rae.kernels.dispatch import Table
from rae.kernels.tune_problems import Op, Shape, adaln_problem
from rae.server.cli import app

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

FP32 = torch.float32
SHAPES = (
    Shape("adaln", FP32, {"dim": 24, "rows": 5}),
    Shape("swiglu", FP32, {"dim": 32, "hidden": 128, "rows": 3}),
    Shape("attention", FP32, {"head_dim": 16, "tokens": 9, "rows": 2}),
    Shape("guided_euler", FP32, {"size": 40, "rows": 2}),
)
SWIGLU = dict(tune.CANDIDATES["swiglu"][0]) | {"block_m": 16, "block_n": 128, "block_k": 16}
ATTENTION = {"block_n": 16, "num_warps": 4, "num_stages": 1}
CANDIDATES: dict[Op, tuple[dict[str, int], ...]] = {
    "adaln": ({"block_rows": 1, "num_warps": 4}, {"block_rows": 2, "num_warps": 4}),
    "swiglu": (SWIGLU, SWIGLU | {"block_n": 64}),
    "attention": (ATTENTION | {"block_m": 16}, ATTENTION | {"block_m": 32}),
    "guided_euler": ({"block": 16, "num_warps": 4}, {"block": 64, "num_warps": 4}),
}


def test_a_table_of_what_was_measured(tmp_path: Path) -> None:
    kept: list[Table] = []
    device = torch.device(DEVICE)
    tune.write(tune.tune(device, SHAPES, CANDIDATES, keep=kept.append), tmp_path / "gpu.json")
    table = Table.read(tmp_path / "gpu.json")
    assert [len(each.entries) for each in kept] == [9, 10, 11, 12]
    assert kept[-1].entries == table.entries
    assert table.measured is not None
    assert table.measured.keys() == {"gpu", "torch", "triton", "date"}
    for shape in SHAPES:
        entry = table.find(shape.op, "float32", shape.dims)
        assert entry.dims == shape.dims
        assert "triton" in entry.p50_us
        assert entry.choice == min(entry.p50_us, key=entry.p50_us.__getitem__)
        assert entry.config in CANDIDATES[shape.op]
        other = table.find(shape.op, "bfloat16", dict.fromkeys(shape.dims, 10**6))
        assert other.dims == {}


@pytest.mark.parametrize("failure", ["raises", "is wrong", "is NaN"])
def test_a_candidate_that_fails_is_left_out(
    failure: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    launch = adaln.launch

    def broken(*args: object, block_rows: int, num_warps: int) -> list[Tensor]:
        out = launch(*args, block_rows=block_rows, num_warps=num_warps)  # type: ignore[arg-type]
        if block_rows == 2:
            return out
        if failure == "raises":
            raise RuntimeError("out of shared memory")
        return [x * (1.1 if failure == "is wrong" else float("nan")) for x in out]

    monkeypatch.setattr(adaln, "launch", broken)
    entry = tune.tune(torch.device(DEVICE), SHAPES[:1], CANDIDATES).entries[0]
    assert entry.config == {"block_rows": 2, "num_warps": 4}
    assert "'block_rows': 1, 'num_warps': 4} is left out" in caplog.text


def test_a_candidate_that_spills_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    spills = iter([4, 0, 0])
    monkeypatch.setattr(
        tune, "launched", lambda: nullcontext([SimpleNamespace(n_spills=next(spills))])
    )
    entry = tune.tune(torch.device(DEVICE), SHAPES[:1], CANDIDATES).entries[0]
    assert entry.config == {"block_rows": 2, "num_warps": 4}
    assert set(entry.p50_us) == {"triton", "library"}


def test_the_fastest_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([3.0, 2.0, 1.0] + [1.0, 2.0, 3.0])
    monkeypatch.setattr(tune, "median_us", lambda call, device: next(times))
    first, second = tune.tune(torch.device(DEVICE), SHAPES[:1] * 2, CANDIDATES).entries[:2]
    assert (first.choice, first.config["block_rows"]) == ("library", 2)
    assert first.p50_us == {"triton": 2.0, "library": 1.0}
    assert (second.choice, second.config["block_rows"]) == ("triton", 1)


def test_a_shape_beyond_the_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def beyond(*_: object) -> list[Tensor]:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(adaln, "adaln_ref", beyond)
    table = tune.tune(torch.device(DEVICE), (SHAPES[0], SHAPES[3]), CANDIDATES)
    assert [entry.op for entry in table.entries if entry.dims] == ["guided_euler"]


def test_a_gpus_table_is_whole_after_each_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is ended leaves what was measured."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "HAS_TRITON", True)
    path = tmp_path / "new" / "gpu.json"
    written: list[int] = []
    entries = Table.read(tune.TABLES / "sm_90.json").entries

    def measured(device: torch.device, say: object, keep: Callable[[Table], None]) -> Table:
        for end in (1, 2):
            keep(Table("gpu", entries[:end], {}))
            written.append(len(Table.read(path).entries))
        return Table("gpu", entries, {})

    monkeypatch.setattr(tune, "tune", measured)
    assert tune.tune_gpu(path, say=str) == path
    assert written == [1, 2]
    assert Table.read(path).entries == entries
    assert list(path.parent.iterdir()) == [path]


def test_rows_beyond_a_samples_tokens_are_of_several_samples() -> None:
    """As the models have them: a kernel is compiled for the number of tokens."""
    shape = Shape("adaln", FP32, {"dim": 24, "rows": 512})
    problem = adaln_problem(shape, torch.device(DEVICE))
    assert problem.reference().shape == (2, 256, 24)


def test_the_command_refuses_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["tune"])
    assert result.exit_code == 1
    assert "measured on a CUDA GPU" in result.output

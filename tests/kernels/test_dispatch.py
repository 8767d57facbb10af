"""Which implementation runs where, and what is said where none can."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import get_args

import pytest
import torch

from rae.kernels import dispatch
from rae.kernels.dispatch import TABLES, Entry, Table, architecture, check_kernels, select
from rae.server import settings

CPU, META = torch.device("cpu"), torch.device("meta")
TABLE = Table(
    "test",
    (
        Entry("swiglu", "bfloat16", {"dim": 64, "rows": 256}, "library", {"block_m": 1}),
        Entry("swiglu", "bfloat16", {"dim": 64, "rows": 4096}, "triton", {"block_m": 2}),
        Entry("swiglu", "bfloat16", {"dim": 64, "hidden": 9}, "triton", {"block_m": 3}),
        Entry("swiglu", "bfloat16", {}, "reference", {"block_m": 4}),
    ),
)


@pytest.mark.parametrize(
    ("rows", "dim", "hidden", "block_m"),
    [
        (1, 64, 8, 1),
        (256, 64, 8, 1),
        (257, 64, 8, 2),
        (4097, 64, 8, 2),  # beyond the largest bucket the largest decides
        (100_000, 64, 8, 2),
        (1, 64, 9, 3),  # the more exact entry wins over the bucket
        (1, 65, 9, 4),
    ],
)
def test_the_most_exact_entry_and_the_smallest_bucket(
    rows: int, dim: int, hidden: int, block_m: int
) -> None:
    entry = TABLE.find("swiglu", "bfloat16", {"rows": rows, "dim": dim, "hidden": hidden})
    assert entry.config == {"block_m": block_m}


def test_a_shape_that_no_entry_takes_is_named() -> None:
    with pytest.raises(ValueError, match="test has nothing for swiglu in float32"):
        TABLE.find("swiglu", "float32", {"rows": 1})


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_every_table_takes_every_op_and_shape(path: Path) -> None:
    table = Table.read(path)
    shape = {"rows": 3, "dim": 5, "hidden": 7, "tokens": 11, "head_dim": 13, "size": 17}
    for op in dispatch.OPS:
        for dtype in ("float32", "bfloat16"):
            assert table.find(op, dtype, shape).dims == {}
    if table.measured is None:
        assert not any(entry.p50_us for entry in table.entries)
    else:
        assert table.measured.keys() >= {"gpu", "torch", "triton", "date"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"measured": null}', "KeyError"),
        ('{"measured": null, "entries": [{"op": "softmax"}]}', "TypeError"),
        ("softmax", "op 'softmax' is not one of adaln, swiglu"),
        ("cublas", "choice 'cublas' is not one of triton, library"),
    ],
)
def test_a_broken_table_is_refused(text: str, complaint: str, tmp_path: Path) -> None:
    if text in ("softmax", "cublas"):
        entry = {"op": "adaln", "dtype": "float32", "dims": {}, "choice": "triton", "config": {}}
        entry |= {"op": text} if text == "softmax" else {"choice": text}
        text = json.dumps({"measured": None, "entries": [entry]})
    path = tmp_path / "sm_90.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"sm_90.json is not a tuning table: .*{complaint}"):
        Table.read(path)


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((12, 0), "sm_80"),
    ],
)
def test_a_gpu_without_its_own_table_takes_its_architecture(
    capability: tuple[int, int], name: str
) -> None:
    assert architecture(capability) == name
    assert (TABLES / f"{name}.json").is_file()


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU does")
def test_what_runs_on_a_cpu_is_selected_once_and_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_selected", {})
    x = torch.zeros(1)
    with caplog.at_level(logging.INFO, logger="rae.kernels.dispatch"):
        choices = [
            select("adaln", x, kernels, rows=rows, dim=4099).choice
            for rows in (1, 2)
            for kernels in ("auto", "triton", "library", "reference")
        ]
    assert choices == ["reference", "triton", "library", "reference"] * 2
    assert dispatch.selected() == {"adaln float32 dim 4099": ["library", "reference", "triton"]}
    assert [record.message for record in caplog.records] == [
        f"adaln, float32, dim 4099: {choice}" for choice in ("reference", "triton", "library")
    ]


def test_kernels_that_cannot_run_are_refused() -> None:
    check_kernels("auto", "auto", META)
    with pytest.raises(ValueError, match="kernels 'fast' is not one of auto, triton, library, ref"):
        check_kernels("fast", "auto", CPU)
    with pytest.raises(ValueError, match="attention 'fast' is not one of auto, triton, library, c"):
        check_kernels("auto", "fast", CPU)
    with pytest.raises(ValueError, match="kernels 'triton' cannot run on 'meta'"):
        check_kernels("triton", "auto", META)
    with pytest.raises(ValueError, match="attention 'cudnn' takes a CUDA GPU, not 'cpu'"):
        check_kernels("reference", "cudnn", CPU)
    with pytest.raises(ValueError, match="attention 'reference' on 'cpu' goes with kernels triton"):
        check_kernels("auto", "reference", CPU)


def test_the_flags_are_the_kernels_own() -> None:
    assert get_args(settings.Kernels) == get_args(dispatch.Kernels)
    assert get_args(settings.Attention) == get_args(dispatch.Attention)

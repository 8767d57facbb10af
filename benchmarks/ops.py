"""Time every op of kernels/ at the published models' shapes, and the ceilings in the same run.

    python benchmarks/ops.py [--device cuda] [--op adaln ...] [--out FOLDER] [--quick]

- ours: the op with kernels="triton". eager: the published code's chain, in bf16. compile: that
  chain by torch.compile. library: cuBLAS and an activation; cudnn, flash: attention by each.
- linear has no kernel of ours: eager is cuBLAS, padded the same with the server's sizes.
- authors: their head's MLP up to the product, at its own hidden size, which no kernel likes.
- A row's ideal time is max(bytes / copy, flop / matmul) with what this run measured for a large
  copy, read and written, and a large bf16 product; `fraction` is the ideal time over p50.
- bytes are what the op must read and write once; flop are its products, without padding.

On CUDA every call finds the L2 cache flushed. Writes ops.csv, ops.json with ceilings, versions and
the goals (CUDA only), and a PNG per op where matplotlib is installed, after every op anew.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from machine_facts import machine
from op_cases import CASES, Case, Run, draw

from rae.kernels.tune import gpu_times_us

QUANTILES = [0.2, 0.5, 0.8]
COLUMNS = "op shape implementation p20_us p50_us p80_us bytes flop fraction error".split()
COLUMNS += ["device", "torch", "triton", "date"]
Row = dict[str, Any]


def measure(run: Run, device: torch.device) -> list[float]:
    """p20, p50 and p80 in microseconds, after calls that are not counted."""
    with torch.inference_mode():
        times = gpu_times_us(run) if device.type == "cuda" else cpu_times_us(run)
    quantiles = torch.tensor(QUANTILES, dtype=torch.float64)
    return torch.tensor(times, dtype=torch.float64).quantile(quantiles).tolist()


def cpu_times_us(run: Run) -> list[float]:
    times: list[float] = []
    for _ in range(6):
        start = time.perf_counter()
        run()
        times.append(1e6 * (time.perf_counter() - start))
    return times[1:]


def ceilings(device: torch.device) -> dict[str, float]:
    """GB/s of a large copy, read and written, and TFLOP/s of a large bf16 product."""
    on_gpu = device.type == "cuda"
    side = 8192 if on_gpu else 1024
    source = draw(device, 2**29 if on_gpu else 2**24)
    target = torch.empty_like(source)
    copy = measure(partial(target.copy_, source), device)[1]
    a, b = draw(device, side, side), draw(device, side, side)
    matmul = measure(partial(torch.mm, a, b), device)[1]
    return {
        "copy_gb_per_s": 2 * source.nbytes / copy / 1e3,
        "matmul_tflop_per_s": 2 * side**3 / matmul / 1e6,
    }


def time_case(
    case: Case, device: torch.device, limits: dict[str, float], compiles: bool
) -> list[Row]:
    """A row per implementation. One that cannot run here has an error instead of times."""
    runs = case.others | {"eager": partial(case.eager, *case.inputs)}
    if compiles:
        # Its limit of recompilations counts over all cases, and past it eager code runs.
        torch.compiler.reset()
        compiled = torch.compile(case.eager, mode="max-autotune-no-cudagraphs", dynamic=False)
        runs["compile"] = partial(compiled, *case.inputs)
    memory_us = case.bytes / limits["copy_gb_per_s"] / 1e3
    ideal_us = max(memory_us, case.flop / limits["matmul_tflop_per_s"] / 1e6)
    rows: list[Row] = []
    for name, run in runs.items():
        row: Row = {"op": case.op, "shape": case.shape, "implementation": name}
        row |= {"bytes": case.bytes, "flop": case.flop, "dims": case.dims}
        try:
            p20, p50, p80 = measure(run, device)
            row |= {"p20_us": p20, "p50_us": p50, "p80_us": p80, "fraction": ideal_us / p50}
        except Exception as error:  # compilers and libraries raise anything, none ends the run
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        rows.append(row)
    return rows


def goals(rows: list[Row]) -> list[dict[str, Any]]:
    """The worst shape of every goal. `measured` is None where a shape of it has no figures."""
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row["op"], row["shape"]), {})[row["implementation"]] = row

    def worst(op: str, least_rows: int, *rivals: str) -> float | None:
        values: list[float | None] = []
        for (name, _), timed in cases.items():
            large = timed["eager"]["dims"].get("rows", 0) >= least_rows
            if name == op and large and (not rivals or timed.keys() & set(rivals)):
                values.append(better(timed, rivals) if rivals else timed["ours"].get("fraction"))
        known = [value for value in values if value is not None]
        return min(known) if known and len(known) == len(values) else None

    found = [
        ("adaln, >= 8192 rows: fraction of the copy", 0.85, worst("adaln", 8192)),
        ("swiglu, >= 8192 rows: times the library", 1.0, worst("swiglu", 8192, "library")),
        ("swiglu, >= 8192 rows: times the authors", 1.5, worst("swiglu", 8192, "authors")),
        ("attention: times cudnn and flash", 1.0, worst("attention", 0, "cudnn", "flash")),
    ]
    return [
        {"goal": f"{text} >= {bound}", "measured": value, "met": bool(value and value >= bound)}
        for text, bound, value in found
    ]


def better(timed: dict[str, Row], rivals: tuple[str, ...]) -> float | None:
    """How many times faster ours is than the fastest of `rivals` that could run."""
    times = [timed[name]["p50_us"] for name in rivals if "p50_us" in timed.get(name, {})]
    ours = timed["ours"].get("p50_us")
    return min(times) / ours if times and ours else None


def plot(rows: list[Row], op: str, path: Path) -> None:
    """Bars of p50 by shape. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    figure = Figure(figsize=(max(6, 0.8 * len(shapes)), 6), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(names):
        timed = [row for row in rows if row["implementation"] == name and "p50_us" in row]
        places = [shapes.index(row["shape"]) + index * 0.8 / len(names) for row in timed]
        axes.bar(places, [row["p50_us"] for row in timed], 0.8 / len(names), label=name)
    axes.set(title=op, ylabel="p50, microseconds", yscale="log")
    axes.set_xticks(range(len(shapes)), shapes, rotation=60, ha="right")
    axes.legend()
    figure.savefig(path, dpi=120)


def write(rows: list[Row], figures: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with (out / "ops.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**figures, **row} for row in rows)
    (out / "ops.json").write_text(json.dumps(figures, indent=1) + "\n")
    for op in dict.fromkeys(row["op"] for row in rows):
        try:
            plot([row for row in rows if row["op"] == op], op, out / f"{op}.png")
        except ImportError as error:
            sys.stderr.write(f"ops: no plots, they need matplotlib: {error}\n")
            return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--op", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="one tiny shape per op")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    args = parser.parse_args()
    torch.manual_seed(0)
    facts = machine(args.device)
    if args.device.type == "cpu":
        facts["device"] = f"cpu, {facts['device']}"
    limits = ceilings(args.device)
    rows: list[Row] = []
    for op in args.op:
        for case in CASES[op](args.device, args.quick):
            rows += time_case(case, args.device, limits, not args.no_compile)
        figures = facts | {"triton": triton.__version__, "ceilings": limits}
        if args.device.type == "cuda":
            figures["goals"] = goals(rows)
        write(rows, figures, args.out)
        sys.stderr.write(f"ops: {op} is done\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Throughput of a step of stage 2: our trainer against the authors', on the same model and data.

    python benchmarks/train_step.py --upstream DIR [--model DiTDH-S-256] [--batch 8 …]
        [--precision tf32 …] [--variant "ours compiled" …] [--encode] [--device cuda] [--json FILE]

DIR is a clone of github bytetriper/RAE; benchmarks/authors.py says what it needs; without it, name
variants of ours alone. Does it run? --model digits --steps 2 --rounds 1. The variants take turns,
each in a process of its own, `--rounds` times, so that a busy or hot machine slows all alike; times
are the median of whole steps after `--warm-up`, the device waited for and the loss read after each.

- authors: DDP of their model on one device, their loss, clipping, fused AdamW, schedule and EMA, in
  the order of their src/train.py, which cannot run without --compile: that is "authors compiled".
  Left out: its loader, logging, samples and checkpoints. Here their eager step runs, too.
- ours: DiTTask.train_step, random draws of each sample by its position, fused AdamW, EMA; no DDP,
  as `rae train dit` on one device; "ours compiled" compiles the blocks as its --compile does.
- trials, where they are named: "whole" compiles all of the model at once; "aligned" pads the head's
  odd hidden size, 5461, with zeros to a multiple of 8, which tensor cores ask of a matrix.

Latents are given; with --encode a DINOv2-B with random weights makes them of 256 px images.
`cpu_ms` is the time of this process's threads on processors, which a neighbour does not lengthen;
`mfu` is of the device's datasheet where it is known; `of_matmul` is of one large product's rate,
measured in the same process; `memory_gib` is the peak of the measured steps. Where a variant has
no figures, `error` says why; exits 1 unless that is memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch
from authors import require_clone
from machine_facts import machine
from train_arms import authors_step, example, our_step

from rae.training.batch import Batch
from rae.training.planning.flops import model_flops
from rae.training.planning.gpus import peak_flops
from rae.training.precision import Precision, set_matmul_precision
from rae.training.stage2.dit_dh import DiTTask
from rae.training.stage2.presets import DIT_PRESETS

VARIANTS = ("authors", "authors compiled", "ours", "ours compiled")
TRIALS = ("ours whole", "ours aligned", "ours compiled aligned", "ours whole aligned")
RATIOS = {"faster": ("ours", "authors"), "faster_compiled": ("ours compiled", "authors compiled")}
NO_MEMORY, NO_TIME = "out of memory", "the time was up"
Row = dict[str, Any]


def measure_all(args: argparse.Namespace) -> Iterator[Row]:
    """One variant in this process: a row for each batch size."""
    set_matmul_precision(*args.precision)
    for batch_size in args.batch:
        try:
            row = measure(batch_size, args)
        except torch.OutOfMemoryError:
            row = {"error": NO_MEMORY}
        yield {"batch": batch_size, **row}
        torch.compiler.reset()  # or what comes next is compiled for any size
        gc.collect()
        if args.device.type == "cuda":
            torch.cuda.empty_cache()


def measure(batch_size: int, args: argparse.Namespace) -> Row:
    """Seconds of each step, memory, and the last loss."""
    (variant,), (precision,), device = args.variant, args.precision, args.device
    recipe = DIT_PRESETS[args.model]
    batch = example(recipe, batch_size, device, encodes=args.encode)
    who, *options = variant.split()
    task = None
    if who == "ours":
        task, step = our_step(recipe, batch, precision, options)
    else:
        step = authors_step(recipe, batch, precision, "compiled" in options)
    times: list[float] = []
    cpu_times: list[float] = []
    loss = 0.0
    for index in range(args.warm_up + args.steps):
        if index == args.warm_up:
            reset_peak_memory(device)
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = step(index)
        synchronize(device)
        times.append(time.perf_counter() - start)
        cpu_times.append(time.process_time() - cpu_start)
    memory = peak_memory(device)
    return {
        "seconds": times[args.warm_up :],
        "cpu_seconds": cpu_times[args.warm_up :],
        "memory_gib": memory / 2**30,
        "matmul_flops": matmul_rate(device, precision),
        "draw_seconds": draw_seconds(task, batch, device) if task else 0.0,
        "loss": loss,
    }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes: of tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def matmul_rate(device: torch.device, precision: Precision) -> float:
    """FLOP/s of one large product, the best of ten."""
    size = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def draw_seconds(task: DiTTask, batch: Batch, device: torch.device) -> float:
    """Of the random numbers of a batch, which are part of a step."""
    shape = task.latents(batch).shape[1:]
    times = []
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        task.objective.draw(batch.positions, shape, device)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def run_child(variant: str, precision: str, args: argparse.Namespace, limit_s: float) -> list[Row]:
    """`measure_all` in a process of its own; rows with an error where it did not get so far."""
    names = ("model", "device", "steps", "warm_up")
    flags = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
    flags += [f"--batch={size}" for size in args.batch]
    flags += [f"--variant={variant}", f"--precision={precision}", "--child"]
    flags += [f"--upstream={args.upstream}"] if args.upstream else []
    flags += ["--encode"] if args.encode else []
    command = [sys.executable, __file__, *flags]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=limit_s)
        output, reason = done.stdout, f"its process ended with {done.returncode}"
    except subprocess.TimeoutExpired as error:
        output, reason = error.stdout or b"", NO_TIME
    rows = [json.loads(line) for line in output.splitlines() if line.startswith(b'{"batch"')]
    return rows + [{"batch": size, "error": reason} for size in args.batch[len(rows) :]]


def summarise(
    rows: list[Row], precision: Precision, batch_size: int, args: argparse.Namespace
) -> Row:
    """Of a variant's rows of all rounds."""
    timed = [row for row in rows if "error" not in row]
    if not timed:
        return {"error": rows[0]["error"] if rows else NO_TIME}
    steps, cpu_steps = (
        [step for row in timed for step in row[clock]] for clock in ("seconds", "cpu_seconds")
    )
    seconds = statistics.median(steps)
    flops = model_flops(DIT_PRESETS[args.model].model).step * batch_size / seconds
    is_gpu = args.device.type == "cuda"
    peak = peak_flops(torch.cuda.get_device_name(args.device), precision) if is_gpu else None
    return {
        "ms": round(1000 * seconds, 1),
        "ms_fastest": round(1000 * min(steps), 1),
        "cpu_ms": round(1000 * statistics.median(cpu_steps), 1),
        "images_per_s": round(batch_size / seconds, 3),
        "gflop_per_s": round(flops / 1e9, 1),
        "mfu": flops / peak if peak else None,
        "of_matmul": flops / max(row["matmul_flops"] for row in timed),
        "memory_gib": round(max(row["memory_gib"] for row in timed), 2),
        "draw_ms": round(1000 * min(row["draw_seconds"] for row in timed), 2),
        "loss": timed[-1]["loss"],
        "rounds": len(timed),
    }


def with_ratios(figures: dict[str, Row]) -> Row:
    """Figures by variant, and how many times as fast as the authors' ours are."""
    return figures | {
        f"{name}_{clock}": figures[theirs][clock] / figures[ours][clock]
        for name, (ours, theirs) in RATIOS.items()
        for clock in ("ms", "cpu_ms")
        if all("ms" in figures.get(variant, {}) for variant in (ours, theirs))
    }


def compare(args: argparse.Namespace) -> Iterator[Row]:
    """All figures so far, by precision and batch size, after each process."""
    deadline = time.monotonic() + args.budget_s
    rows: defaultdict[tuple[str, int, str], list[Row]] = defaultdict(list)
    arms = list(product(args.precision, args.variant))
    for precision, variant in arms * args.rounds:
        if (left_s := deadline - time.monotonic()) > 0:
            for row in run_child(variant, precision, args, left_s):
                rows[precision, row["batch"], variant].append(row)
                sys.stderr.write(f"{precision}, {variant}: {json.dumps(row)}\n")
        figures: dict[str, Row] = {precision: {} for precision in args.precision}
        for precision, size in product(args.precision, args.batch):
            found = {
                variant: summarise(rows[precision, size, variant], precision, size, args)
                for variant in args.variant
            }
            figures[precision][str(size)] = with_ratios(found)
        yield figures


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--upstream", type=Path, help="a clone of bytetriper/RAE")
    parser.add_argument("--model", default="DiTDH-S-256", choices=DIT_PRESETS)
    parser.add_argument("--batch", type=int, action="append", help="8, if none")
    parser.add_argument("--precision", action="append", choices=get_args(Precision))
    parser.add_argument(
        "--variant", action="append", choices=VARIANTS + TRIALS, help="the first four, if none"
    )
    parser.add_argument("--encode", action="store_true", help="of images, not of latents")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--budget-s", type=float, default=86400, help="what is not done then is not"
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.batch = args.batch or [8]
    args.variant = args.variant or list(VARIANTS)
    args.precision = args.precision or (["tf32"] if args.device.type == "cuda" else ["fp32"])
    if any(variant.startswith("authors") for variant in args.variant):
        if args.upstream is None:
            parser.error("the authors' variants need --upstream")
        require_clone(args.upstream, "train_step")
    return args


def main() -> int:
    args = parse()
    if args.child:
        for row in measure_all(args):
            sys.stdout.write(f"\n{json.dumps(row)}\n")
            sys.stdout.flush()
        return 0
    what = {"model": args.model, "from": "images" if args.encode else "latents"}
    facts, figures, text = what | machine(args.device), {}, ""
    for figures in compare(args):
        text = json.dumps(facts | figures, indent=1) + "\n"
        if args.json:
            args.json.write_text(text)
    sys.stdout.write(text)
    found = [figures[p][str(s)][v] for p, s, v in product(args.precision, args.batch, args.variant)]
    return any(figure.get("error", NO_MEMORY) != NO_MEMORY for figure in found)


if __name__ == "__main__":
    sys.exit(main())

"""Where the time of one step goes: its kernels by torch's profiler, beside what each must take.

    python benchmarks/profile_step.py [--model DiTDH-XL-256] [--batch 1 --batch 32] [--out FOLDER]

A step is one evaluation of every image of a batch, without guidance, by the server's runner.
Writes profile-BATCH.txt and .json for each batch:

- wall: milliseconds of a step without the profiler, steps enqueued one after another. busy: the
  sum of its kernels' times. What wall has more than busy, the device waited.
- by group: time, and the floor: the linears' and attention's FLOPs at the rate of a large product
  and the residual sites' bytes at that of a large copy, both measured here. `linears alone` are
  the model's linears without anything else, as plain F.linear in one graph: what the shapes cost.
- by kernel: calls and microseconds in a step, most first.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from arms import Ours, Task, synchronize
from forward import count, matmuls
from machine_facts import machine
from ops import ceilings, measure
from subjects import find_checkpoint
from torch.profiler import ProfilerActivity, profile

from rae.models.checkpoint_config import read_config
from rae.models.config import CONFIGS, DiTDHConfig

# The first that is found in a kernel's name, or an operator's on a CPU. A flash kernel may be one
# of CUTLASS, so attention comes first.
GROUPS = {
    "attention": r"attention|flash|fmha|sdpa|_rope|softmax|bmm",
    "residual sites": r"adaln|rms_?norm|layer_norm",
    "swiglu": r"swiglu|silu",
    "linears": r"gemm|gemv|nvjet|cutlass|xmma|cublas|splitk|linear|addmm|aten::mm",
    "euler": r"guided_euler",
}
STEPS = 10


def group_of(kernel: str) -> str:
    found = (name for name, pattern in GROUPS.items() if re.search(pattern, kernel, re.IGNORECASE))
    return next(found, "other")


def floors_ms(config: DiTDHConfig, batch: int, limits: dict[str, float]) -> dict[str, float]:
    """Milliseconds of a forward that arithmetic and memory ask for, by group."""
    linears, gflop = count(config, batch)
    linears_gflop = sum(2 * rows * inner * columns for rows, inner, columns in linears) / 1e9
    # A site reads the fp32 stream and a layer's bf16 output, and writes both; the head's has the
    # shift, scale and gate of each token, too.
    tokens = batch * config.num_tokens
    moved = 2 * config.depth * config.hidden_size * 12
    moved += 2 * config.head_depth * config.head_hidden_size * (12 + 6)
    return {
        "linears": linears_gflop / limits["matmul_tflop_per_s"],
        "attention": (gflop - linears_gflop) / limits["matmul_tflop_per_s"],
        "residual sites": 1e-6 * tokens * moved / limits["copy_gb_per_s"],
    }


class Steps:
    """A batch in the runner's slots, stepped as often as asked, from its first evaluation."""

    def __init__(self, arm: Ours, task: Task, batch: int, device: torch.device) -> None:
        self.arm, self.slots, self.device = arm, range(batch), device
        for slot in self.slots:
            arm.runner.start(slot, task.spec(slot, arm.num_classes))

    def run(self, steps: int) -> float:
        """Milliseconds of each."""
        synchronize(self.device)
        started = time.perf_counter()
        for step in range(steps):
            self.arm.runner.step([(slot, step) for slot in self.slots])
        synchronize(self.device)
        return 1000 * (time.perf_counter() - started) / steps


def linears_alone_ms(config: DiTDHConfig, batch: int, device: torch.device) -> float:
    run = matmuls(count(config, batch)[0], device)
    if device.type == "cuda":
        run()  # makes cuBLAS's handle and workspace
        synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return measure(graph.replay, device)[1] / 1000
    return measure(run, device)[1] / 1000


def profiled(steps: Steps) -> tuple[dict[str, float], dict[str, float]]:
    """Microseconds and calls in a step, by kernel."""
    on_gpu = steps.device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as found:
        steps.run(STEPS)
    microseconds, calls = defaultdict[str, float](float), defaultdict[str, float](float)
    for event in found.key_averages():
        if event.device_type.name == ("CUDA" if on_gpu else "CPU"):
            own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            microseconds[event.key] += own / STEPS
            calls[event.key] += event.count / STEPS
    return microseconds, calls


def report(
    microseconds: dict[str, float],
    calls: dict[str, float],
    floors: dict[str, float],
    wall_ms: float,
) -> dict[str, Any]:
    busy = sum(microseconds.values()) / 1000
    groups = defaultdict[str, float](float)
    for kernel, own in microseconds.items():
        groups[group_of(kernel)] += own / 1000
    kernels = [
        {"kernel": kernel, "group": group_of(kernel), "us": own, "calls": calls[kernel]}
        for kernel, own in sorted(microseconds.items(), key=lambda item: -item[1])
        if own
    ]
    return {
        "wall_ms": wall_ms,
        "busy_ms": busy,
        "floor_ms": sum(floors.values()),
        "groups": {
            name: {"ms": groups[name], "floor_ms": floors.get(name, 0.0)}
            for name in sorted(groups | floors, key=lambda name: -groups[name])
        },
        "kernels": kernels,
    }


def table(figures: dict[str, Any]) -> str:
    facts = ("model", "batch", "precision", "device", "torch", "cuda", "triton", "date", "commit")
    lines = [", ".join(f"{name} {figures[name]}" for name in facts if name in figures)]
    names = ("wall_ms", "busy_ms", "floor_ms", "linears_alone_ms")
    lines += ["  ".join(f"{name} {figures[name]:.3f}" for name in names), ""]
    lines.append(f"{'group':<20} {'ms':>9} {'floor':>9} {'of it':>6}")
    for name, group in figures["groups"].items():
        share = group["floor_ms"] / group["ms"] if group["ms"] else 0
        lines.append(f"{name:<20} {group['ms']:9.3f} {group['floor_ms']:9.3f} {share:6.0%}")
    lines += ["", f"{'us a step':>10} {'calls':>7}  group and kernel"]
    for kernel in figures["kernels"]:
        what = f"{kernel['group']}: {kernel['kernel'][:120]}"
        lines.append(f"{kernel['us']:10.1f} {kernel['calls']:7.1f}  {what}")
    return "\n".join(lines) + "\n"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="DiTDH-XL-256", help="as throughput.py has it")
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--precision", default="bf16", choices=("fp32", "tf32", "bf16"))
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--checkpoints", type=Path, help="where random weights are kept")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the results")
    args = parser.parse_args()
    if args.model not in CONFIGS and args.model != "digits" and not Path(args.model).is_dir():
        parser.error(f"--model {args.model}: not digits, a folder, or one of {', '.join(CONFIGS)}")
    return args


def main() -> int:
    args = parse_arguments()
    batches = args.batch or [1, 32]
    task = Task(steps=STEPS + 1, method="none", cfg=1.0, interval=(0.0, 1.0))
    with tempfile.TemporaryDirectory() as temporary:
        folder = find_checkpoint(args.model, args.checkpoints or Path(temporary), args.device)
        config = read_config(folder)[0].dit_dh
        options: dict[str, Any] = {"precision": args.precision, "kernels": args.kernels}
        arm = Ours(folder, args.device, task, max(batches), **options)
    limits = ceilings(args.device)
    facts = machine(args.device) | {"model": args.model} | options
    args.out.mkdir(parents=True, exist_ok=True)
    for batch in batches:
        steps = Steps(arm, task, batch, args.device)
        steps.run(STEPS)  # not counted
        wall_ms = min(steps.run(STEPS) for _ in range(5))
        found = report(*profiled(steps), floors_ms(config, batch, limits), wall_ms)
        alone = linears_alone_ms(config, batch, args.device)
        figures = facts | {"batch": batch, "ceilings": limits, "linears_alone_ms": alone} | found
        (args.out / f"profile-{batch}.json").write_text(json.dumps(figures, indent=1) + "\n")
        text = table(figures)
        (args.out / f"profile-{batch}.txt").write_text(text)
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

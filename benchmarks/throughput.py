"""How many images a second: by batch, start times, and what each optimisation gives.

    python benchmarks/throughput.py [--model digits] [--guidance autoguidance] [--upstream DIR]

--model is digits, a checkpoint folder, or a name of CONFIGS, which gets random weights and a guide.
DIR is a clone of github bytetriper/RAE; what its `stage2` imports must be installed. The parts:

- sweep: at every --batch ours, and with --upstream the authors' models in their sampler, in turns.
- start: `rae serve` until it is ready, with empty compilation caches, and again with these.
- deterministic: with every step filled to the largest --batch, as `--deterministic` does.
- ablation: the optimisations of the device, switched on one after another, at the first --batch.
- compiled: as sweep, against the authors' models by torch.compile (max-autotune); on a CPU, which
  takes minutes, only with --compile-upstream.

images_per_s counts noise, evaluations, decoding, and pixels on the host. `of_the_peak` is the rate
of the FLOPs that the images need, no pads and nothing twice, over that of one large product;
`of_the_linears` is the same over that of the model's linears at their published sizes. Both are
F.linear, in the same turns; packed or padded layers may pass them. Figures are medians over
--turns; `ours_over_it` is the median of the turns' ratios. What fails has an `error`, and nothing
else is lost: all is written after each group. Plots take matplotlib.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from arms import Arm, Authors, Ours, Plain, Task, synchronize
from figures import Figures
from forward import count, matmuls
from lanes import Lane, in_turns
from machine_facts import machine
from subjects import find_checkpoint, serve

from rae.models.checkpoint_config import CheckpointConfig, read_config
from rae.models.config import CONFIGS
from rae.models.guidance import Guidance
from rae.models.sampling import timesteps
from rae.server.devices import resolve_precision

CACHE_OFF, CACHE_ON = {"conditioning_bytes": 0}, {"conditioning_bytes": 2**30}
# What may run over the budget, a compilation say, before the process is ended.
GRACE_S = 60

Makers = dict[str, tuple[int, Callable[[], Arm]]]
"""A batch and how the arm is made, by name."""


class Bench:
    """A checkpoint, a task, a device, and the time that is left."""

    def __init__(
        self, args: argparse.Namespace, folder: Path, figures: Figures, deadline: float
    ) -> None:
        self.args, self.folder, self.figures = args, folder, figures
        self.config, _ = read_config(folder)
        self.device: torch.device = args.device
        self.precision, self.dtype = resolve_precision(args.precision, self.device)
        self.deadline = deadline
        defaults = self.config.defaults
        self.task = Task(
            steps=args.steps or defaults.steps,
            method=args.guidance,
            cfg=args.cfg or (defaults.cfg if defaults.cfg > 1 else 1.5),
            interval=tuple(args.interval),
        )

    def ours(self, largest: int, **options: object) -> Callable[[], Arm]:
        chosen: dict[str, Any] = {"precision": self.precision, "kernels": self.args.kernels}
        chosen |= {"compile": self.args.compile}
        return partial(Ours, self.folder, self.device, self.task, largest, **(chosen | options))

    def authors(self, dtype: torch.dtype, *, compiled: bool = False) -> Callable[[], Arm]:
        upstream = self.args.upstream
        return partial(Authors, self.folder, self.device, upstream, dtype, compiled=compiled)

    def compare(self, part: str, makers: Makers, batches: Sequence[int] | None = None) -> None:
        """Time arms in turns, at their own batch or at each of `batches`, and write the rows."""
        self._compare(part, makers, batches)
        gc.collect()
        torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _compare(self, part: str, makers: Makers, batches: Sequence[int] | None) -> None:
        lanes: list[Lane] = []
        for name, (_, make) in makers.items():
            sys.stderr.write(f"throughput: {part}: {name}\n")
            lanes.append(Lane(name, make, self.device))
        for batch in batches or [0]:
            own = [batch or own for own, _ in makers.values()]
            ceiling = Ceiling(self.config, self.task, max(own), self.device, self.dtype)
            runs = list(zip(lanes, own, strict=True))
            in_turns(runs, self.task, self.args.turns, self.deadline, ceiling.run)
            self.figures.rows += [
                {"part": part} | self.row(lane, size, lanes[0], ceiling) for lane, size in runs
            ]
            self.figures.save()

    def row(self, lane: Lane, batch: int, first: Lane, ceiling: Ceiling) -> dict[str, Any]:
        row = lane.figures(self.task, batch)
        if lane.times:
            row |= ceiling.fractions(1000 * batch / row["ms_per_step"])
            if first.name == "ours" and first is not lane and first.times:
                pairs = zip(first.times, lane.times, strict=False)
                row["ours_over_it"] = median(its.total_s / ours.total_s for ours, its in pairs)
        return row


class Ceiling:
    """What products alone reach, in the same turns: one large one, and the linears of a guided
    evaluation of `batch` images. `gflop` is what an image needs for an evaluation, their mean."""

    def __init__(
        self,
        config: CheckpointConfig,
        task: Task,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        model_rows, guide_rows = needed_rows(task, config.shift)
        self.gflop = model_rows * count(config.dit_dh, 1)[1]
        if guide_rows and config.guide is not None:
            self.gflop += guide_rows * count(config.guide, 1)[1]
        linears, _ = count(config.dit_dh, batch * (2 if model_rows > 1 else 1))
        side = 8192 if device.type == "cuda" else 2048
        self._device = device
        self._shapes = {"peak": [(side, side, side)], "linears": linears}
        self._runs = {name: matmuls(x, device, dtype) for name, x in self._shapes.items()}
        self._seconds: dict[str, list[float]] = {name: [] for name in self._runs}
        self.run()  # not counted
        for seconds in self._seconds.values():
            seconds.clear()

    def run(self) -> None:
        for name, run in self._runs.items():
            synchronize(self._device)
            started = time.perf_counter()
            run()
            synchronize(self._device)
            self._seconds[name].append(time.perf_counter() - started)

    def fractions(self, evaluations_per_s: float) -> dict[str, float]:
        """What share of both rates so many evaluations of an image are."""
        shares: dict[str, float] = {}
        for name, shapes in self._shapes.items():
            gflop = sum(2 * rows * inner * columns for rows, inner, columns in shapes) / 1e9
            rate = gflop / median(self._seconds[name])
            shares[f"of_the_{name}"] = evaluations_per_s * self.gflop / rate
        return shares


def needed_rows(task: Task, shift: float) -> tuple[float, float]:
    """Rows of the model and of the guide that an image needs, the mean over its evaluations."""
    if task.method == "none":
        return 1.0, 0.0
    active = Guidance(task.cfg, task.interval, task.method).active(timesteps(task.steps, shift))
    guided = active[:-1].float().mean().item()
    return (1 + guided, 0.0) if task.method == "cfg" else (1.0, guided)


def sweep(bench: Bench) -> None:
    batches = bench.args.batch
    makers: Makers = {"ours": (0, bench.ours(max(batches)))}
    if bench.args.upstream:
        makers["authors, bf16"] = (0, bench.authors(torch.bfloat16))
        makers["authors, fp32"] = (0, bench.authors(torch.float32))
    bench.compare("sweep", makers, batches)


def compiled(bench: Bench) -> None:
    wanted = bench.device.type == "cuda" or bench.args.compile_upstream
    if bench.args.upstream and wanted:
        makers: Makers = {"ours": (0, bench.ours(max(bench.args.batch)))}
        makers["authors, compiled bf16"] = (0, bench.authors(torch.bfloat16, compiled=True))
        bench.compare("compiled", makers, bench.args.batch)


def deterministic(bench: Bench) -> None:
    """What it costs to fill every step to the largest batch."""
    largest = max(bench.args.batch)
    makers: Makers = {
        "ours": (0, bench.ours(largest)),
        "ours, deterministic": (0, bench.ours(largest, deterministic=True)),
    }
    bench.compare("deterministic", makers, bench.args.batch)


def ablation(bench: Bench) -> None:
    """On CUDA one stage is there at a time: their compilations would meet each other's limits."""
    if bench.device.type == "cuda":
        for name, stage in cuda_stages(bench).items():
            bench.compare("ablation", {name: stage})
    else:
        bench.compare("ablation", cpu_stages(bench))


def cpu_stages(bench: Bench) -> Makers:
    n = bench.args.batch[0]
    plain = partial(Plain, bench.folder, bench.device, torch.float32)
    stages: Makers = {"plain fp32 layers, an image at a time, published rows": (1, plain)}
    options: dict[str, Any] = {"precision": "fp32", "published_rows": True} | CACHE_OFF
    for name, batch, change in (
        ("+ packed layers", 1, {}),
        ("+ bf16", 1, {"precision": "bf16"}),
        ("+ batching", n, {}),
        ("+ only the rows that are needed", n, {"published_rows": False}),
        ("+ conditioning cache", n, CACHE_ON),
    ):
        options |= change
        stages[name] = (batch, bench.ours(batch, **options))
    return stages


def cuda_stages(bench: Bench) -> Makers:
    n = bench.args.batch[0]
    plain = partial(Plain, bench.folder, bench.device, torch.bfloat16)
    stages: Makers = {"eager plain bf16 layers, published rows": (n, plain)}
    options: dict[str, Any] = {"precision": "bf16", "compile": "off", "graphs": False}
    # One bucket: a part of the decoder is compiled for each, 41 in all buckets up to 32.
    options |= {"published_rows": True, "deterministic": True} | CACHE_OFF
    for name, change in (
        ("+ fused kernels", {}),
        ("+ torch.compile", {"compile": "on"}),
        ("+ CUDA graphs", {"graphs": True}),
        ("+ only the rows that are needed", {"published_rows": False}),
        ("+ conditioning cache", CACHE_ON),
    ):
        options |= change
        stages[name] = (n, bench.ours(n, **options))
    return stages


def start(bench: Bench) -> None:
    """Seconds from the start of the process, and its peak memory; files are in the page cache."""
    args = bench.args
    flags = [f"--device={bench.device.type}", f"--precision={bench.precision}"]
    flags += [f"--kernels={args.kernels}", f"--compile={args.compile}"]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as caches:
        names = {"XDG_CACHE_HOME": "cache", "TRITON_CACHE_DIR": "triton"}
        names["TORCHINDUCTOR_CACHE_DIR"] = "inductor"
        environment = {name: f"{caches}/{folder}" for name, folder in names.items()}
        for name in ("cold", "warm"):
            sys.stderr.write(f"throughput: start: {name}\n")
            try:
                timeout_s = max(1.0, bench.deadline - time.monotonic())
                with serve(bench.folder, flags, environment, timeout_s) as served:
                    found[f"{name}_s"] = served.ready_s
                found[f"{name}_peak_rss_gib"] = served.peak_rss_gib
            except (RuntimeError, OSError) as error:
                found[f"{name}_error"] = str(error)
    bench.figures.facts["start"] = found
    bench.figures.save()


PARTS = {
    "sweep": sweep,
    "start": start,
    "ablation": ablation,
    "deterministic": deterministic,
    "compiled": compiled,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    parser.add_argument("--model", default="DiTDH-XL-256" if on_gpu else "digits")
    methods = ("none", "cfg", "autoguidance")
    parser.add_argument("--guidance", choices=methods, default="autoguidance")
    parser.add_argument("--cfg", type=float, help="scale; default: the checkpoint's")
    parser.add_argument("--interval", type=float, nargs=2, default=(0.0, 1.0))
    parser.add_argument("--steps", type=int, help="grid points; default: the checkpoint's")
    parser.add_argument("--batch", type=int, action="append", help="images; the first is ablated")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "tf32", "bf16"))
    parser.add_argument("--compile", default="auto", choices=("auto", "on", "off"))
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--device", type=torch.device, default=device)
    parser.add_argument("--upstream", type=Path, help="a clone of bytetriper/RAE")
    parser.add_argument("--compile-upstream", action="store_true", help="on a CPU too")
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--budget-s", type=float, default=540.0)
    parser.add_argument("--checkpoints", type=Path, help="where random weights are kept")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the results")
    args = parser.parse_args()
    args.batch = args.batch or ([32, 1, 64, 8] if args.device.type == "cuda" else [16, 1, 4])
    args.part = args.part or list(PARTS)
    if args.model not in CONFIGS and args.model != "digits" and not Path(args.model).is_dir():
        parser.error(f"--model {args.model}: not digits, a folder, or one of {', '.join(CONFIGS)}")
    return args


def main() -> int:
    args = parse_arguments()
    if "GOMP_SPINCOUNT" not in os.environ:  # as the `rae` command sets it; it is read with torch
        os.environ["GOMP_SPINCOUNT"] = "1000"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    deadline = time.monotonic() + args.budget_s
    faulthandler.dump_traceback_later(args.budget_s + GRACE_S, exit=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = find_checkpoint(args.model, args.checkpoints or Path(temporary), args.device)
        figures = Figures(args.out, machine(args.device) | {"load_average": os.getloadavg()})
        bench = Bench(args, folder, figures, deadline)
        figures.facts |= {"model": args.model, "precision": bench.precision, **vars(bench.task)}
        for part in args.part:
            PARTS[part](bench)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
    figures.facts["peak_rss_gib_of_all"] = rss / 2**20
    figures.save()
    figures.plot()
    return 1 if any("error" in row for row in figures.rows) else 0


if __name__ == "__main__":
    sys.exit(main())

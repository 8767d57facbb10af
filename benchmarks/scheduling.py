"""Our scheduler against batches of whole requests, simulated for GPUs and real on this CPU.

    python benchmarks/scheduling.py [--part engine] [--json FILE] [--plot FILE]

Requests of one image: 10, 50 or 250 steps, guidance off, 1.5 or 3, a third each. The arms:

- row-level: ours.
- request-level: waiting images with as many steps, and guidance on or off, form a batch of at most
  64 that runs to its end, the group of the oldest first; as in SGLang's merged scheduler. Each GPU
  has its queue; "central" is one queue for all.
- one request: one at a time.

In the simulation step times are PREDICTED for an H200, not measured. Requests arrive at random, at
70 % of what the request-level arm, and then ours, does when saturated; the first tenth of them does
not count. An arm that is slower than they arrive has latencies that only grow.
On the CPU the real engine runs the embedded digits, batches hold 64 rows, not images, and few
requests make p95 coarse: about 5 minutes. The simulation takes as long, most of it for 64 GPUs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import torch
from machine_facts import machine
from rival_schedulers import OneRequest, RequestLevel
from simulation import (
    STEPS,
    Ended,
    MakeScheduler,
    draw_arrivals,
    draw_specs,
    make_devices,
    make_requests,
    simulate,
)

from rae.models.checkpoint import load_checkpoint
from rae.models.config import GuidanceMethod
from rae.server.engine import Engine
from rae.server.metrics import Metrics
from rae.server.request import ImageSpec
from rae.server.scheduler import Scheduler
from rae.server.settings import EngineSettings

OURS, THEIRS = "row-level", "request-level"
GPUS = (1, 8, 64)
PARTS = ("engine", "simulated")
LOAD = 0.7
SATURATED_PER_GPU = 1_000
P95_GOAL, SATURATED_GOAL = 0.35, 1.0
ENGINE_SATURATED, ENGINE_ARRIVING = 150, 150

Figures = dict[str, Any]
Run = Callable[[Sequence[ImageSpec], Sequence[float]], list[Ended]]


def simulated_arms(gpus: int) -> dict[str, Run]:
    """What serves images that arrive at given times, by arm."""
    batches = partial(RequestLevel, max_images=64)

    def arm(make: MakeScheduler, *, central: bool = False) -> Run:
        def run(specs: Sequence[ImageSpec], arrivals: Sequence[float]) -> list[Ended]:
            devices = make_devices(make, gpus, central)
            return simulate(make_requests(specs, arrivals), devices, predict=make is Scheduler)

        return run

    arms = {OURS: arm(Scheduler), THEIRS: arm(batches), "one request": arm(OneRequest)}
    return arms | ({f"{THEIRS}, central": arm(batches, central=True)} if gpus > 1 else {})


def simulate_gpus(
    gpus: int,
    saturated: int | None = None,
    arriving: int | None = None,
    method: GuidanceMethod = "cfg",
) -> Figures:
    """All arms on `gpus` GPUs, with so many requests that are all there, or arrive."""
    arms = simulated_arms(gpus)
    specs = draw_specs(saturated or SATURATED_PER_GPU * gpus, seed=0, method=method)
    rates = {name: images_per_s(run(specs, [0.0] * len(specs))) for name, run in arms.items()}
    figures: Figures = {"gpus": gpus, "guidance": method, "saturated images per s": rates}
    specs = draw_specs(arriving or max(6_000, 500 * gpus), seed=1, method=method)
    for of in (THEIRS, OURS):
        arrivals = draw_arrivals(len(specs), LOAD * rates[of], seed=2)
        ended = {name: run(specs, arrivals) for name, run in arms.items()}
        figures[f"at {LOAD:.0%} of {of}"] = {n: latencies(e) for n, e in ended.items()}
        if of == THEIRS:
            figures["predicted / actual"] = predictions(ended[OURS])
    return figures | {"goals": goals(figures)}


def images_per_s(ended: Sequence[Ended]) -> float:
    return len(ended) / max(each.end for each in ended)


def latencies(ended: Sequence[Ended]) -> Figures:
    """Of those that came after the first tenth, by steps."""
    warm = sorted(ended, key=lambda each: each.arrival)[len(ended) // 10 :]
    by_steps = {n: [e.latency_s for e in warm if e.steps == n] for n in STEPS}
    return {
        str(n): {"mean_s": mean(seconds), "p95_s": quantiles(seconds, n=20)[-1]}
        for n, seconds in by_steps.items()
    }


def predictions(ended: Sequence[Ended]) -> Figures:
    """What was predicted when a request came, as a share of what it took."""
    shares = {n: [e.predicted_s / e.latency_s for e in ended if e.steps == n] for n in STEPS}
    return {
        str(n): {"p10": tenths[0], "median": median(share), "p90": tenths[-1]}
        for n, share in shares.items()
        for tenths in [quantiles(share, n=10)]
    }


def goals(figures: Figures) -> Figures:
    """Ours against the best variant of request-level batches."""
    rates, loaded = figures["saturated images per s"], figures[f"at {LOAD:.0%} of {THEIRS}"]
    rivals = [name for name in rates if name.startswith(THEIRS)]
    p95 = min(loaded[name]["10"]["p95_s"] for name in rivals)
    latency = loaded[OURS]["10"]["p95_s"] / p95
    throughput = rates[OURS] / max(rates[name] for name in rivals)
    return {
        "p95 of 10 steps": {"share": latency, "at most": P95_GOAL, "met": latency <= P95_GOAL},
        "saturated": {
            "share": throughput,
            "at least": SATURATED_GOAL,
            "met": throughput >= SATURATED_GOAL,
        },
    }


def run_engine(
    make: MakeScheduler, specs: Sequence[ImageSpec], arrivals: Sequence[float]
) -> list[Ended]:
    """The same on this machine's CPU, by the engine, with the embedded digits."""
    settings = EngineSettings(device="cpu", max_queue=math.inf)
    checkpoint = load_checkpoint(settings.find_folder())
    engine = Engine(checkpoint, settings, Metrics(), make_scheduler=make)
    engine.start()
    while not engine.ready:
        time.sleep(0.01)
        if engine.failure:
            raise RuntimeError(engine.failure)
    ends, requests = [0.0] * len(specs), []
    started = time.perf_counter()
    for i, (spec, arrival) in enumerate(zip(specs, arrivals, strict=True)):
        time.sleep(max(0.0, started + arrival - time.perf_counter()))
        request = engine.submit([spec], str(i))
        request.future.add_done_callback(partial(note_end, ends, i))
        requests.append(request)
    for request in requests:
        request.future.result()
    engine.close()
    return [
        Ended(spec.steps, request.submitted_at - started, end - started, math.nan)
        for spec, request, end in zip(specs, requests, ends, strict=True)
    ]


def note_end(ends: list[float], index: int, future: object) -> None:
    ends[index] = time.perf_counter()


def measure_engine() -> Figures:
    """All arms on this machine, one after the other."""
    makes = {OURS: Scheduler, THEIRS: RequestLevel, "one request": OneRequest}
    specs = draw_specs(ENGINE_SATURATED, seed=0)
    rates = {n: images_per_s(run_engine(m, specs, [0.0] * len(specs))) for n, m in makes.items()}
    specs = draw_specs(ENGINE_ARRIVING, seed=1)
    arrivals = draw_arrivals(len(specs), LOAD * rates[THEIRS], seed=2)
    loaded = {n: latencies(run_engine(m, specs, arrivals)) for n, m in makes.items()}
    figures = {"saturated images per s": rates, f"at {LOAD:.0%} of {THEIRS}": loaded}
    return figures | {"goals": goals(figures)}


def plot(figures: Figures, path: Path) -> None:
    """p95 by steps and arm: points, as bars would start nowhere on a logarithmic axis."""
    pyplot = import_module("matplotlib.pyplot")
    simulated = figures.get("simulated", ())
    panels = {f"{each['gpus']} GPUs, simulated": each for each in simulated}
    if "cpu" in figures:
        panels["CPU, digits"] = figures["cpu"]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 4), squeeze=False)
    for axis, (title, panel) in zip(axes[0], panels.items(), strict=True):
        for arm, by_steps in panel[f"at {LOAD:.0%} of {THEIRS}"].items():
            p95 = [by_steps[str(steps)]["p95_s"] for steps in STEPS]
            axis.plot([str(steps) for steps in STEPS], p95, marker="o", label=arm)
        axis.set(title=title, xlabel="steps", ylabel="p95 latency, s", yscale="log")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--part", choices=PARTS, help="the engine on this CPU, or simulated GPUs")
    parser.add_argument("--json", type=Path, help="where to write the figures; else to stdout")
    parser.add_argument("--plot", type=Path, help="where to draw them; needs matplotlib")
    args = parser.parse_args()
    if args.plot is not None and find_spec("matplotlib") is None:
        sys.exit("scheduling: --plot needs matplotlib: pip install matplotlib")
    figures: Figures = machine(torch.device("cpu")) | {"load_average": os.getloadavg()}
    if args.part != "simulated":
        figures["cpu"] = measure_engine()
    if args.part != "engine":
        figures |= {
            "step times": "of an H200 with DiTDH-XL-256, PREDICTED, not measured",
            "simulated": [simulate_gpus(gpus) for gpus in GPUS],
            "simulated, AutoGuidance": simulate_gpus(1, method="autoguidance"),
        }
    text = json.dumps(figures, indent=1) + "\n"
    if args.json is None:
        sys.stdout.write(text)
    else:
        args.json.write_text(text)
    if args.plot is not None:
        plot(figures, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Servers of many GPUs in simulated time: real schedulers, made-up step times."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise

from rae.models.config import GuidanceMethod
from rae.server.request import ImageSpec, Plan, Request, Sample
from rae.server.scheduler import Scheduler
from rae.server.step_times import StepTimes

MakeScheduler = Callable[[int, int, StepTimes], Scheduler]

# Of an H200 with DiTDH-XL-256: PREDICTED, not measured.
PREDICTED_MS = {1: 1.15, 8: 5.5, 32: 19.7, 64: 39.2}
DECODE_S = 0.28e-3
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
GUIDE_COST = 0.1
NUM_SLOTS, MAX_ROWS = 512, 64
STEPS, CFGS = (10, 50, 250), (1.0, 1.5, 3.0)


@dataclass(frozen=True)
class Ended:
    """A request of the simulation, in seconds."""

    steps: int
    arrival: float
    end: float
    predicted: float

    @property
    def latency(self) -> float:
        return self.end - self.arrival


def predicted_step_times() -> StepTimes:
    table = {}
    for (low, low_ms), (high, high_ms) in pairwise(PREDICTED_MS.items()):
        for rows in (n for n in BUCKETS if low <= n <= high):
            share = (rows - low) / (high - low)
            table[rows] = 1e-3 * (low_ms + share * (high_ms - low_ms))
    return StepTimes(table, {n: GUIDE_COST * s for n, s in table.items()}, pads=True)


@cache
def plan(steps: int, cfg: float, method: GuidanceMethod) -> Plan:
    guided = (cfg > 1,) * (steps - 1)
    second = 1.0 if method == "cfg" else GUIDE_COST
    costs = tuple(accumulate((1 + second * flag for flag in guided), initial=0.0))[::-1]
    times = tuple(1 - i / steps for i in range(steps))
    return Plan(times=times, scale=cfg, method=method, guided=guided, costs=costs)


def make_request(name: str, steps: int, cfg: float, method: GuidanceMethod, at: float) -> Request:
    request = Request(name, submitted_at=at)
    spec = ImageSpec(class_label=0, seed=0, steps=steps, cfg=cfg, guidance_method=method)
    request.samples.append(Sample(spec, request, plan(steps, cfg, method)))
    return request


def draw_requests(
    num: int, rate: float | None, seed: int, method: GuidanceMethod = "cfg"
) -> list[Request]:
    """Poisson arrivals at `rate` per second, or all at the start."""
    generator = random.Random(seed)
    requests, now = [], 0.0
    for i in range(num):
        now += generator.expovariate(rate) if rate else 0.0
        steps, cfg = generator.choice(STEPS), generator.choice(CFGS)
        requests.append(make_request(str(i), steps, cfg, method, now))
    return requests


class Device:
    """One GPU: its scheduler, and the step that runs."""

    def __init__(self, scheduler: Scheduler, step_times: StepTimes) -> None:
        self.scheduler = scheduler
        self.stepping: list[Sample] = []
        self._step_times = step_times

    def start_step(self) -> float:
        """Returns how long it will take."""
        self.stepping = self.scheduler.select()
        assert self.stepping
        rows = sum(sample.plan.model_rows(sample.step) for sample in self.stepping)
        guide_rows = sum(sample.plan.guide_rows(sample.step) for sample in self.stepping)
        ending = sum(sample.step + 1 == sample.spec.num_evaluations for sample in self.stepping)
        return self._step_times.seconds(rows, guide_rows) + ending * DECODE_S


def simulate(
    requests: Sequence[Request], devices: Sequence[Device], predict: bool = False
) -> list[Ended]:
    """Each request goes to the device with the least left to do, an idle one first."""
    steps: list[tuple[float, int]] = []  # end, device
    predicted: dict[Request, float] = {}
    ended: list[Ended] = []
    coming = sorted(requests, key=lambda request: request.submitted_at, reverse=True)
    while coming or steps:
        now = min(
            steps[0][0] if steps else float("inf"),
            coming[-1].submitted_at if coming else float("inf"),
        )
        touched: set[int] = set()
        while steps and steps[0][0] <= now:
            index = heapq.heappop(steps)[1]
            device = devices[index]
            for sample in device.scheduler.advance(device.stepping):
                r = sample.request
                ended.append(Ended(sample.spec.steps, r.submitted_at, now, predicted.get(r, 0.0)))
            device.stepping = []
            touched.add(index)
        while coming and coming[-1].submitted_at <= now:
            request = coming.pop()
            index = min(
                range(len(devices)),
                key=lambda i: (devices[i].scheduler.cost, bool(devices[i].stepping)),
            )
            if predict:
                predicted[request] = devices[index].scheduler.predict_s(request.samples)
            devices[index].scheduler.add(request)
            touched.add(index)
        for index in sorted(touched):
            device = devices[index]
            if not device.stepping and device.scheduler.has_work:
                heapq.heappush(steps, (now + device.start_step(), index))
    return ended

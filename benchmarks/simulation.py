"""Servers of many GPUs in simulated time: real schedulers, steps that only take their time."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise

from rival_schedulers import RequestLevel

from rae.models.config import GuidanceMethod
from rae.server.request import ImageSpec, Plan, Request, Sample
from rae.server.scheduler import Scheduler
from rae.server.step_times import StepTimes

MakeScheduler = Callable[[int, int, StepTimes], Scheduler]

# An H200 with DiTDH-XL-256: PREDICTED, not measured.
PREDICTED_MS = {1: 1.15, 8: 5.5, 32: 19.7, 64: 39.2}
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
DECODE_S = 0.28e-3
GUIDE_COST = 0.1
NUM_SLOTS, MAX_ROWS = 1024, 64
STEPS, CFGS = (10, 50, 250), (1.0, 1.5, 3.0)


@dataclass(frozen=True)
class Ended:
    """A request that is done; times are in seconds."""

    steps: int
    arrival: float
    end: float
    predicted_s: float

    @property
    def latency_s(self) -> float:
        return self.end - self.arrival


class Device:
    """One GPU: its scheduler, and the step that runs."""

    def __init__(self, make_scheduler: MakeScheduler) -> None:
        self.step_times = predicted_step_times()
        self.scheduler = make_scheduler(NUM_SLOTS, MAX_ROWS, self.step_times)
        self.stepping: list[Sample] = []

    @property
    def load(self) -> tuple[float, bool]:
        return self.scheduler.cost, bool(self.stepping)

    def start_step(self) -> float:
        """Returns how long it takes, in seconds; decoding comes after the step."""
        self.stepping = self.scheduler.select()
        assert self.stepping
        model_rows = sum(sample.model_rows for sample in self.stepping)
        guide_rows = sum(sample.guide_rows for sample in self.stepping)
        ending = sum(sample.step + 1 == sample.spec.num_evaluations for sample in self.stepping)
        return self.step_times.seconds(model_rows, guide_rows) + ending * DECODE_S

    def end_step(self) -> list[Sample]:
        stepping, self.stepping = self.stepping, []
        return self.scheduler.advance(stepping)


def predicted_step_times() -> StepTimes:
    model = {}
    for (low, low_ms), (high, high_ms) in pairwise(PREDICTED_MS.items()):
        for rows in (n for n in BUCKETS if low <= n <= high):
            model[rows] = (low_ms + (high_ms - low_ms) * (rows - low) / (high - low)) / 1000
    guide = {rows: GUIDE_COST * seconds for rows, seconds in model.items()}
    return StepTimes(model, guide, pads=True)


@cache
def make_plan(steps: int, cfg: float, method: GuidanceMethod) -> Plan:
    guided = (cfg > 1,) * (steps - 1)
    second = GUIDE_COST if method == "autoguidance" else 1.0
    return Plan(
        times=tuple(1 - i / steps for i in range(steps)),
        scale=cfg,
        method=method,
        guided=guided,
        costs=tuple(accumulate((1 + second * flag for flag in guided), initial=0.0))[::-1],
    )


def draw_specs(num: int, seed: int, method: GuidanceMethod = "cfg") -> list[ImageSpec]:
    """A third each of STEPS, and of CFGS."""
    draw = random.Random(seed)
    return [
        ImageSpec(
            class_label=draw.randrange(10),
            seed=i,
            steps=draw.choice(STEPS),
            cfg=draw.choice(CFGS),
            guidance_method=method,
        )
        for i in range(num)
    ]


def draw_arrivals(num: int, rate: float, seed: int) -> list[float]:
    """Poisson arrivals, `rate` per second; an infinite one: all at the start."""
    draw = random.Random(seed)
    return list(accumulate(draw.expovariate(rate) if rate < math.inf else 0.0 for _ in range(num)))


def make_requests(specs: Sequence[ImageSpec], arrivals: Sequence[float]) -> list[Request]:
    requests = []
    for i, (spec, arrival) in enumerate(zip(specs, arrivals, strict=True)):
        request = Request(str(i), submitted_at=arrival)
        plan = make_plan(spec.steps, spec.cfg, spec.guidance_method)
        request.samples.append(Sample(spec, request, plan))
        requests.append(request)
    return requests


def make_devices(make_scheduler: MakeScheduler, num: int, central: bool = False) -> list[Device]:
    """With `central` the devices, which must be request-level, take from one queue."""
    devices = [Device(make_scheduler) for _ in range(num)]
    if central:
        queues = [d.scheduler for d in devices if isinstance(d.scheduler, RequestLevel)]
        assert len(queues) == num
        queues[0].share_queue(queues[1:])
    return devices


def simulate(
    requests: Sequence[Request], devices: Sequence[Device], *, predict: bool = False
) -> list[Ended]:
    """Each request, of one image, goes to the device with the least left to do, an idle one first;
    `predict` asks it then for how long this will take."""
    coming = sorted(requests, key=lambda request: request.submitted_at, reverse=True)
    step_ends: list[tuple[float, int]] = []  # with the device
    predicted: dict[Request, float] = {}
    ended: list[Ended] = []
    while coming or step_ends:
        now = min(
            step_ends[0][0] if step_ends else math.inf,
            coming[-1].submitted_at if coming else math.inf,
        )
        touched: set[int] = set()
        while step_ends and step_ends[0][0] <= now:
            _, index = heapq.heappop(step_ends)
            touched.add(index)
            for sample in devices[index].end_step():
                request = sample.request
                guess = predicted.get(request, math.nan)
                ended.append(Ended(sample.spec.steps, request.submitted_at, now, guess))
        while coming and coming[-1].submitted_at <= now:
            request = coming.pop()
            index = min(range(len(devices)), key=lambda i: devices[i].load)
            touched.add(index)
            if predict:
                predicted[request] = devices[index].scheduler.predict_s(request.samples)
            devices[index].scheduler.add(request)
        for index in sorted(touched):
            device = devices[index]
            if not device.stepping and device.scheduler.has_work:
                heapq.heappush(step_ends, (now + device.start_step(), index))
    return ended

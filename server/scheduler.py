"""Which images advance in the next step: pure Python, no tensors, no clock, no threads.

An image keeps its progress in a slot, whether it advances or not: so a step can always serve those
whose turn it is, in fair order.
"""

from __future__ import annotations

import heapq
import math
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count, islice

from rae.server.fair_order import FairOrder
from rae.server.request import Request, Sample
from rae.server.step_times import StepTimes

# Simulated H200, 1 GPU (benchmarks/scheduling.py): 0.05 costs 0.2 % of the saturated throughput
# and 1 costs 3.2 %, with which images of 250 steps end late, too.
MEAN_WEIGHT = 0.05


class Scheduler:
    """Waiting requests, and running samples by slot: those that have been in a step.

    A step evaluates at most `max_rows` rows of the model; `num_slots` should be a few times as
    many, as a request waits where all are taken.
    """

    def __init__(self, num_slots: int, max_rows: int, step_times: StepTimes) -> None:
        self.waiting: dict[Request, deque[Sample]] = {}
        self.running: dict[int, Sample] = {}
        self.cost = 0.0  # what is left to do, in rows of the model
        self._costs: dict[Request, float] = {}
        self._started: dict[Request, dict[Sample, None]] = {}
        self._order = FairOrder()
        self._free = list(reversed(range(num_slots)))
        self.max_rows = max_rows
        self._last_rows = 0
        self.step_times = step_times
        self._cancelled: deque[Request] = deque()
        # Most are done long before: their pixels must not stay until then.
        self._deadlines: list[tuple[float, int, weakref.ref[Request]]] = []
        self._arrivals = count()

    @property
    def has_work(self) -> bool:
        return bool(self._costs)

    @property
    def requests(self) -> set[Request]:
        return set(self._costs)

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self.waiting.values()))

    def add(self, request: Request) -> None:
        cost = request.cost
        self.waiting[request] = deque(request.samples)
        self._started[request] = {}
        self._costs[request] = cost
        self.cost += cost
        self._order.add(request, cost)
        if request.deadline < math.inf:
            entry = (request.deadline, next(self._arrivals), weakref.ref(request))
            heapq.heappush(self._deadlines, entry)
        # Called where the future is cancelled, in any thread: a deque takes that.
        request.future.add_done_callback(
            lambda future: self._cancelled.append(request) if future.cancelled() else None
        )

    def drop(self, now: float) -> list[Request]:
        """Forget the requests whose future was cancelled, and those whose deadline has passed;
        return the latter."""
        while self._cancelled:
            self.remove(self._cancelled.popleft())
        expired: list[Request] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            request = heapq.heappop(self._deadlines)[2]()
            if request is not None and request in self._costs:
                self.remove(request)
                expired.append(request)
        return expired

    def select(self) -> list[Sample]:
        """Who advances in the next step; those who were waiting get a slot."""
        selected = self._worthwhile(self._fill())
        self._last_rows = sum(sample.model_rows for sample in selected)
        for sample in selected:
            if sample.slot < 0:
                self._start(sample)
        return selected

    def advance(self, samples: Sequence[Sample]) -> list[Sample]:
        """Count one evaluation for each of `samples`; those at their last one leave.

        What was removed since it was selected is left alone.
        """
        samples = [sample for sample in samples if sample.request in self._costs]
        served = 0.0
        for sample in samples:
            cost = sample.step_cost
            sample.step += 1
            self._costs[sample.request] -= cost
            served += cost
        self.cost -= served
        self._order.serve(served)
        denoised = [sample for sample in samples if sample.denoised]
        for sample in denoised:
            self._free_slot(sample)
        for request in {sample.request for sample in denoised}:
            if not self._started[request] and request not in self.waiting:
                self._forget(request)
        return denoised

    def remove(self, request: Request) -> None:
        """Forget a request, wherever its samples are; nothing for one that is not here."""
        if request in self._costs:
            self.waiting.pop(request, None)
            for sample in list(self._started[request]):
                self._free_slot(sample)
            self._forget(request, unserved=self._costs[request])

    def predict_s(self, samples: Sequence[Sample]) -> float:
        """Seconds until `samples`, which may be added yet or not, are done if nobody else comes."""
        requests = {sample.request for sample in samples}
        new = [request for request in requests if request not in self._costs]
        for request in new:
            cost = sum(sample.remaining_cost for sample in samples if sample.request is request)
            self._costs[request] = cost
            self._order.add(request, cost)
        cost = self._cost_until(requests)
        for request in new:
            self._order.remove(request, self._costs.pop(request))
        more = sum(sample.model_rows for sample in samples)
        return max(self.drain_s(cost, more), self._steps_s(samples))

    def drain_s(self, cost: float, more_rows: int = 0) -> float:
        """Seconds in which the device works off `cost`, in steps as full as those who are here, and
        others of `more_rows`, can make them: few images are slower than many."""
        rows = more_rows + sum(s.model_rows for s in self._fill())
        return cost / self.step_times.rate(min(max(rows, 1), self.max_rows))

    def _cost_until(self, requests: set[Request]) -> float:
        """What is left of `requests` and of all that is served before the last of them."""
        cost, left = 0.0, len(requests)
        for request in self._order:
            cost += self._costs[request]
            left -= request in requests
            if not left:
                break
        return cost

    def _steps_s(self, samples: Sequence[Sample]) -> float:
        """Seconds for the evaluations of `samples`, in steps as full as the last one was."""
        rows = sum(sample.model_rows for sample in samples)
        rows = max(rows, self._last_rows) if self.running else rows
        step_s = self.step_times.seconds(min(rows, self.max_rows))
        return step_s * max(sample.spec.num_evaluations - sample.step for sample in samples)

    def _candidates(self) -> Iterator[Sample]:
        """In order, those with a slot and as many others as slots are free."""
        free = len(self._free)
        for request in self._order:
            yield from self._started[request]
            for sample in islice(self.waiting.get(request, ()), free):
                free -= 1
                yield sample

    def _fill(self) -> list[Sample]:
        """The first in order, as many as fit into a step, the first of all in any case."""
        filling: list[Sample] = []
        rows = 0
        # An image of two rows may leave the last row to a later one; nobody looks far for that.
        for sample in islice(self._candidates(), 2 * self.max_rows):
            more = sample.model_rows
            if filling and rows + more > self.max_rows:
                continue
            filling.append(sample)
            rows += more
            if rows >= self.max_rows:
                break
        return filling

    def _worthwhile(self, samples: list[Sample]) -> list[Sample]:
        """As many of the first as let the requests end soonest, in the mean.

        J equal requests, M of them at a time, end after (J + M) / 2M such turns in the mean: few at
        a time end early, many are evaluated faster. Requests that come later wait for these, as if
        J were larger; `MEAN_WEIGHT` of M stands for that. With many waiting only speed counts.
        """
        count, best, work = 0, math.inf, 0.0
        model_rows = guide_rows = 0
        requests: set[Request] = set()
        for number, sample in enumerate(samples, 1):
            work += sample.step_cost
            model_rows += sample.model_rows
            guide_rows += sample.guide_rows
            requests.add(sample.request)
            turns = (len(self._costs) + MEAN_WEIGHT * len(requests)) / work
            score = self.step_times.seconds(model_rows, guide_rows) * turns
            if score <= best:
                count, best = number, score
        return samples[:count]

    def _start(self, sample: Sample) -> None:
        request = sample.request
        self.waiting[request].remove(sample)
        if not self.waiting[request]:
            del self.waiting[request]
        sample.slot = self._free.pop()
        self.running[sample.slot] = sample
        self._started[request][sample] = None
        request.num_running += 1

    def _free_slot(self, sample: Sample) -> None:
        del self.running[sample.slot]
        del self._started[sample.request][sample]
        self._free.append(sample.slot)
        sample.request.num_running -= 1

    def _forget(self, request: Request, unserved: float = 0.0) -> None:
        self._order.remove(request, unserved)
        del self._started[request]
        self.cost -= self._costs.pop(request)
        if not self._costs:
            self.cost = 0.0  # the guide's share is no integer: sums drift

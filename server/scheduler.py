"""Which images run: pure Python, no tensors, no clock, no threads.

Every running image advances by one evaluation a step, so requests join and leave at any step.
"""

from __future__ import annotations

from collections import deque

from rae.server.request import Request, Sample


class Scheduler:
    """Waiting requests, and running samples by slot."""

    def __init__(self, num_slots: int) -> None:
        self.waiting: dict[Request, deque[Sample]] = {}
        self.running: dict[int, Sample] = {}
        self.cost = 0.0  # what is left to do, in rows of the model
        self._free = list(reversed(range(num_slots)))
        self._reserve = num_slots // 8

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def requests(self) -> set[Request]:
        return {*self.waiting, *(sample.request for sample in self.running.values())}

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self.waiting.values()))

    def add(self, request: Request) -> None:
        self.waiting[request] = deque(request.samples)
        self.cost += sum(sample.remaining_cost for sample in request.samples)

    def drop_cancelled(self) -> None:
        """Forget the requests whose future was cancelled."""
        for request in [r for r in self.requests if r.future.cancelled()]:
            self.remove(request)

    def admit(self) -> list[Sample]:
        """Give free slots to waiting samples: first to the request with the fewest running; among
        equals, to the oldest. The last eighth of the slots is for requests that have none, so
        that a large one does not keep the small ones out."""
        admitted: list[Sample] = []
        while self._free and self.waiting:
            request = min(self.waiting, key=lambda r: r.num_running)
            if request.num_running and len(self._free) <= self._reserve:
                break
            sample = self.waiting[request].popleft()
            if not self.waiting[request]:
                del self.waiting[request]
            sample.slot = self._free.pop()
            self.running[sample.slot] = sample
            request.num_running += 1
            admitted.append(sample)
        return admitted

    def advance(self) -> list[Sample]:
        """Count one evaluation for every running sample; those at their last one leave."""
        for sample in self.running.values():
            self.cost -= sample.remaining_cost
            sample.step += 1
            self.cost += sample.remaining_cost
        denoised = [sample for sample in self.running.values() if sample.denoised]
        for sample in denoised:
            self._release(sample)
        return denoised

    def remove(self, request: Request) -> None:
        """Forget a request, wherever its samples are."""
        for sample in self.waiting.pop(request, ()):
            self.cost -= sample.remaining_cost
        for sample in [s for s in self.running.values() if s.request is request]:
            self._release(sample)

    def _release(self, sample: Sample) -> None:
        del self.running[sample.slot]
        sample.request.num_running -= 1
        self._free.append(sample.slot)
        self.cost -= sample.remaining_cost
        if not self.has_work:
            self.cost = 0.0  # the guide's share is no integer: sums drift

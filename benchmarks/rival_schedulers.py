"""How other servers batch, in the place of our scheduler."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import islice

from rae.server.request import Sample
from rae.server.scheduler import Scheduler
from rae.server.step_times import StepTimes


class RequestLevel(Scheduler):
    """Waiting images with as many steps, and guidance on or off, form a batch that runs to its end;
    the group of the oldest goes first."""

    def __init__(
        self, num_slots: int, max_rows: int, step_times: StepTimes, max_images: int | None = None
    ) -> None:
        """At most `max_images`; without it as many as `max_rows` holds."""
        super().__init__(num_slots, max_rows, step_times)
        self._max_images = max_images

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def select(self) -> list[Sample]:
        if not self.running:
            self._start_batch()
        return list(self.running.values())

    def group(self, sample: Sample) -> Hashable:
        guided = any(sample.plan.guided)
        return sample.spec.steps, guided and sample.plan.method

    def share_queue(self, others: Sequence[RequestLevel]) -> None:
        """Let `others` take from this one's queue."""
        for other in others:
            other.waiting, other._started = self.waiting, self._started
            other._costs, other._order = self._costs, self._order

    def _start_batch(self) -> None:
        waiting = [sample for samples in self.waiting.values() for sample in samples]
        first = waiting[0]
        rows = max(first.plan.model_rows(step) for step in range(first.spec.num_evaluations))
        images = self._max_images or max(1, self.max_rows // rows)
        group = self.group(first)
        alike = (sample for sample in waiting if self.group(sample) == group)
        for sample in islice(alike, images):
            self._start(sample)


class OneRequest(RequestLevel):
    """One request at a time."""

    def group(self, sample: Sample) -> Hashable:
        return sample.request.id

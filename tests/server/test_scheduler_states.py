"""The scheduler in any order of events: arrivals, steps whole and in parts, who leaves and why.

`pytest --hypothesis-profile=soak` takes many more examples.
"""

from __future__ import annotations

import math
from itertools import accumulate, count

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from rae.models.config import GuidanceMethod
from rae.server.request import ImageSpec, Plan, Priority, Request, Sample
from rae.server.scheduler import Scheduler
from rae.server.step_times import StepTimes

GUIDE_COST = 0.3
TABLES = ({1: 1.0, 64: 1.0}, {1: 1.0, 64: 64.0}, {1: 1.0, 2: 1.2, 4: 2.0, 8: 4.5}, {})
WEIGHTS = {"a": 0.5, "b": 1.0, "c": 3.0, "z": 0.5}
NUM_EXAMPLES, NUM_STEPS = 150, 100
Image = tuple[list[bool], GuidanceMethod]
IMAGES = st.tuples(
    st.lists(st.booleans(), min_size=1, max_size=6), st.sampled_from(["cfg", "autoguidance"])
)
INDICES = st.integers(0, 63)


def make_request(
    name: str,
    images: list[Image],
    *,
    client: str,
    priority: Priority,
    deadline: float = math.inf,
) -> Request:
    """Images by whether they are guided at each of their evaluations, and how."""
    request = Request(
        name, client=client, weight=WEIGHTS[client], priority=priority, deadline=deadline
    )
    for guided, method in images:
        second = GUIDE_COST if method == "autoguidance" else 1.0
        falling = accumulate((1 + second * flag for flag in reversed(guided)), initial=0.0)
        plan = Plan(
            times=tuple(1 - i / len(guided) for i in range(len(guided) + 1)),
            scale=2.0,
            method=method,
            guided=tuple(guided),
            costs=tuple(falling)[::-1],
            second=second,
        )
        spec = ImageSpec(class_label=0, seed=0, steps=len(guided) + 1)
        request.samples.append(Sample(spec, request, plan))
    return request


class SchedulerStates(RuleBasedStateMachine):
    """Beside the scheduler, who is present by what happened, and a clock."""

    checks = 0

    @initialize(
        num_slots=st.integers(1, 12),
        max_rows=st.integers(1, 12),
        table=st.sampled_from(TABLES),
        shrinkings=st.integers(0, 2),
    )
    def begin(
        self, num_slots: int, max_rows: int, table: dict[int, float], shrinkings: int
    ) -> None:
        self.num_slots, self.shrinkings = num_slots, shrinkings
        self.scheduler = Scheduler(num_slots, max_rows, StepTimes(table, pads=True))
        self.present: dict[Request, None] = {}
        self.now = 0.0
        self.names = count()

    def some(self, index: int) -> Request:
        return list(self.present)[index % len(self.present)]

    def leaves(self, request: Request) -> None:
        del self.present[request]
        assert request not in self.scheduler.requests and request.num_running == 0

    @rule(
        images=st.lists(IMAGES, min_size=1, max_size=3),
        client=st.sampled_from("abc"),
        priority=st.sampled_from(["low", "normal", "high"]),
        deadline_s=st.sampled_from([math.inf, math.inf, 2.0, 10.0]),
    )
    def add(
        self,
        images: list[Image],
        client: str,
        priority: Priority,
        deadline_s: float,
    ) -> None:
        request = make_request(
            str(next(self.names)),
            images,
            client=client,
            priority=priority,
            deadline=self.now + deadline_s,
        )
        before = self.scheduler.cost
        self.scheduler.add(request)
        self.present[request] = None
        assert self.scheduler.cost == pytest.approx(before + request.cost)

    def select(self) -> list[Sample]:
        order = list(self.scheduler._order)
        chosen = self.scheduler.select()
        rows = sum(sample.plan.model_rows(sample.step) for sample in chosen)
        assert rows <= self.scheduler.max_rows or len(chosen) == 1
        assert len(set(chosen)) == len(chosen)
        assert all(self.scheduler.running[sample.slot] is sample for sample in chosen)
        requests = {sample.request for sample in chosen}
        assert requests <= self.present.keys() and bool(requests) == bool(self.present)
        # Nobody is passed for ever: the first whom no lack of slots keeps out is always served.
        first = next((r for r in order if r.num_running or r in requests), None)
        assert first is None or first in requests
        return chosen

    def advance(self, chosen: list[Sample]) -> None:
        counted = [sample for sample in chosen if sample.request in self.present]
        every = [sample for request in self.present for sample in request.samples]
        expected = {sample: sample.step + (sample in counted) for sample in every}
        denoised = self.scheduler.advance(chosen)
        assert {sample: sample.step for sample in every} == expected
        assert denoised == [sample for sample in counted if sample.denoised]
        for request in {sample.request for sample in denoised}:
            if all(sample.denoised for sample in request.samples):
                self.leaves(request)

    @rule(number=st.integers(1, 4))
    def step(self, number: int) -> None:
        for _ in range(number):
            self.advance(self.select())

    @precondition(lambda self: self.present)
    @rule(half=INDICES, index=INDICES)
    def step_in_parts(self, half: int, index: int) -> None:
        """As where a step fails: some advance, somebody is told that he failed, others advance."""
        chosen = self.select()
        culprit = chosen[index % len(chosen)]
        cut = half % (len(chosen) + 1)
        self.advance(chosen[:cut])
        if culprit.request in self.present:
            self.scheduler.remove(culprit.request)
            self.leaves(culprit.request)
        self.advance(chosen[cut:])

    @precondition(lambda self: self.present)
    @rule(index=INDICES)
    def cancel(self, index: int) -> None:
        self.some(index).future.cancel()

    @rule(seconds=st.floats(0, 3))
    def drop(self, seconds: float) -> None:
        self.now += seconds
        for request in [request for request in self.present if request.future.cancelled()]:
            del self.present[request]
        late = {request for request in self.present if request.deadline <= self.now}
        expired = self.scheduler.drop(self.now)
        assert set(expired) == late and len(expired) == len(late)
        for request in late:
            self.leaves(request)

    @precondition(lambda self: self.present)
    @rule(index=INDICES)
    def remove(self, index: int) -> None:
        request = self.some(index)
        self.scheduler.remove(request)
        self.leaves(request)

    @rule(images=st.lists(IMAGES, min_size=1, max_size=3), client=st.sampled_from("abc"))
    def predict_for_a_new_one(self, images: list[Image], client: str) -> None:
        self.predict(make_request("new", images, client=client, priority="normal"))

    @precondition(lambda self: self.present)
    @rule(index=INDICES)
    def predict_for_one_who_is_here(self, index: int) -> None:
        self.predict(self.some(index))

    def predict(self, request: Request) -> None:
        before = self.scheduler.cost, list(self.scheduler._order), self.scheduler.requests
        left = [sample for sample in request.samples if not sample.denoised]
        assert 0 < self.scheduler.predict_s(left) < math.inf
        after = self.scheduler.cost, list(self.scheduler._order), self.scheduler.requests
        assert after == before, "to ask changes nothing"

    @precondition(lambda self: self.shrinkings)
    @rule()
    def shrink(self) -> None:
        self.shrinkings -= 1
        self.scheduler.max_rows = max(1, self.scheduler.max_rows // 2)

    @invariant()
    def nothing_is_lost(self) -> None:
        SchedulerStates.checks += 1
        scheduler = self.scheduler
        assert scheduler.requests == self.present.keys()
        assert set(scheduler._order) == self.present.keys()
        waiting = [sample for samples in scheduler.waiting.values() for sample in samples]
        running = scheduler.running
        assert sorted([*scheduler._free, *running]) == list(range(self.num_slots))
        assert all(sample.slot == slot for slot, sample in running.items())
        left = [s for request in self.present for s in request.samples if not s.denoised]
        assert len(left) == len(waiting) + len(running)
        assert set(left) == {*waiting, *running.values()}
        assert scheduler.num_waiting == len(waiting)
        remaining = sum(sample.remaining_cost for sample in left)
        assert scheduler.cost == pytest.approx(remaining, abs=1e-6)
        for request in self.present:
            assert request.num_running == sum(running.get(s.slot) is s for s in request.samples)

    def teardown(self) -> None:
        """All who are left end beside somebody else of the smallest weight who always wants more,
        in twice the evaluations that are theirs."""
        if not hasattr(self, "scheduler"):
            return
        self.drop(0.0)
        theirs = dict(self.present)
        patience = 2 * sum(request.cost for request in theirs) + 20
        while theirs.keys() & self.present.keys():
            if not any(request.client == "z" for request in self.present):
                self.add([([False], "cfg")], "z", "low", math.inf)
            self.advance(self.select())
            patience -= 1
            assert patience > 0, "somebody starves"
        for request in list(self.present):
            self.scheduler.remove(request)
            self.leaves(request)
        self.nothing_is_lost()
        assert not self.scheduler.has_work and self.scheduler.cost == 0.0


def test_whatever_happens_slots_costs_and_turns_are_right() -> None:
    SchedulerStates.checks = 0
    chosen = settings(
        max_examples=max(NUM_EXAMPLES, settings().max_examples),
        stateful_step_count=NUM_STEPS,
        deadline=None,
        suppress_health_check=[HealthCheck.large_base_example, HealthCheck.too_slow],
    )
    run_state_machine_as_test(SchedulerStates, settings=chosen)
    assert SchedulerStates.checks >= 10_000

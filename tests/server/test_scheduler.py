"""The scheduler alone: pure Python, so every case is exact."""

from __future__ import annotations

from collections.abc import Sequence

from rae.server.request import ImageSpec, Plan, Request, Sample
from rae.server.scheduler import Scheduler


def make_request(name: str, *steps: int, branch: float = 0.0) -> Request:
    request = Request(name)
    for count in steps:
        spec = ImageSpec(class_label=0, seed=0, steps=count)
        costs = tuple((1 + branch) * left for left in range(count - 1, -1, -1))
        guided = (branch > 0,) * (count - 1)
        times = tuple(1 - i / count for i in range(count))
        plan = Plan(times=times, scale=2.0, method="cfg", guided=guided, costs=costs)
        request.samples.append(Sample(spec, request, plan))
    return request


def names(samples: Sequence[Sample]) -> list[str]:
    return [sample.request.id for sample in samples]


def test_slots_are_given_and_freed() -> None:
    scheduler = Scheduler(num_slots=2)
    scheduler.add(make_request("a", 2, 3, 3))
    assert [sample.slot for sample in scheduler.admit()] == [0, 1]
    assert scheduler.num_waiting == 1
    assert scheduler.admit() == []
    (done,) = scheduler.advance()
    assert (done.slot, done.denoised) == (0, True)
    (late,) = scheduler.admit()
    assert late.slot == 0, "the freed slot is used at the next step"
    assert [sample.step for sample in scheduler.running.values()] == [1, 0]
    assert len(scheduler.advance()) == 1
    assert len(scheduler.advance()) == 1
    assert not scheduler.has_work


def test_a_large_request_does_not_keep_a_small_one_out() -> None:
    scheduler = Scheduler(num_slots=4)
    large, small = make_request("large", *[3] * 10), make_request("small", 3)
    scheduler.add(large)
    scheduler.add(small)
    assert names(scheduler.admit()) == ["large", "small", "large", "large"]


def test_slots_are_kept_for_requests_that_come_later() -> None:
    scheduler = Scheduler(num_slots=16)
    for name in ("large", "also large"):
        scheduler.add(make_request(name, *[400] * 64))
    assert len(scheduler.admit()) == 14
    for name in ("small", "another", "late"):
        scheduler.add(make_request(name, 10))
    assert names(scheduler.admit()) == ["small", "another"]
    assert names([sample for _ in range(9) for sample in scheduler.advance()]) == [
        "small",
        "another",
    ]
    assert names(scheduler.admit()) == ["late"], "not one more of the large ones"


def test_the_oldest_of_equals_is_first() -> None:
    scheduler = Scheduler(num_slots=3)
    for name in "abcd":
        scheduler.add(make_request(name, 2))
    assert names(scheduler.admit()) == ["a", "b", "c"]


def test_cost_counts_what_is_left_of_waiting_and_running() -> None:
    scheduler = Scheduler(num_slots=1)
    scheduler.add(make_request("guided", 11, branch=1.0))
    scheduler.add(make_request("plain", 5))
    assert scheduler.cost == 20 + 4
    scheduler.admit()
    scheduler.advance()
    assert scheduler.cost == 18 + 4


def test_a_cancelled_request_leaves_and_touches_nobody_else() -> None:
    scheduler = Scheduler(num_slots=2)
    gone, stays, next_one = (make_request(name, 4) for name in ("gone", "stays", "next"))
    waiting = make_request("waiting", 4)
    for request in (gone, stays, waiting, next_one):
        scheduler.add(request)
    scheduler.admit()
    scheduler.advance()
    assert gone.future.cancel() and waiting.future.cancel()
    scheduler.drop_cancelled()
    assert names(scheduler.admit()) == ["next"]
    assert {s.request.id: s.step for s in scheduler.running.values()} == {"stays": 1, "next": 0}
    assert scheduler.requests == {stays, next_one}


def test_remove_frees_every_slot_of_a_request() -> None:
    scheduler = Scheduler(num_slots=2)
    request, other = make_request("a", 3, 3, 3), make_request("b", 3)
    scheduler.add(request)
    scheduler.admit()
    scheduler.remove(request)
    scheduler.add(other)
    assert not request.num_running and names(scheduler.admit()) == ["b"]

"""The scheduler alone: pure Python, so every case is exact."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rae.models.config import GuidanceMethod
from rae.server.request import ImageSpec, Plan, Priority, Request, Sample
from rae.server.scheduler import Scheduler
from rae.server.step_times import StepTimes

Table = dict[int, float]

GUIDE_COST = 0.1
ALIKE: Table = dict.fromkeys(
    (1, 2, 4, 8, 16, 64), 1.0
)  # any step takes a second: full ones are best
IN_PROPORTION: Table = {n: float(n) for n in (1, 2, 4, 8, 16, 64)}


def make_request(
    name: str,
    *steps: int,
    branch: GuidanceMethod | None = None,
    client: str = "",
    weight: float = 1.0,
    priority: Priority = "normal",
    deadline: float = math.inf,
) -> Request:
    request = Request(name, client=client, weight=weight, priority=priority, deadline=deadline)
    for count in steps:
        spec = ImageSpec(class_label=0, seed=0, steps=count)
        guided = (branch is not None,) * (count - 1)
        second = GUIDE_COST if branch == "autoguidance" else 1.0
        costs = tuple(accumulate((1 + second * flag for flag in guided), initial=0.0))[::-1]
        times = tuple(1 - i / count for i in range(count))
        plan = Plan(times=times, scale=2.0, method=branch or "cfg", guided=guided, costs=costs)
        request.samples.append(Sample(spec, request, plan))
    return request


def make_scheduler(num_slots: int = 64, max_rows: int = 8, table: Table = ALIKE) -> Scheduler:
    return Scheduler(num_slots, max_rows, StepTimes(table, pads=True))


def names(samples: Sequence[Sample]) -> list[str]:
    return [sample.request.id for sample in samples]


def step(scheduler: Scheduler) -> list[Sample]:
    return scheduler.advance(scheduler.select())


def ends(scheduler: Scheduler) -> dict[str, int]:
    """After how many steps from now each request is done."""
    found: dict[str, int] = {}
    for number in range(1, 100_000):
        if not scheduler.has_work:
            return found
        before = scheduler.requests
        step(scheduler)
        found |= {request.id: number for request in before - scheduler.requests}
    raise AssertionError("it does not end")


def test_slots_are_given_and_freed() -> None:
    scheduler = make_scheduler(num_slots=2)
    scheduler.add(request := make_request("a", 2, 3, 3))
    first = scheduler.select()
    assert [sample.slot for sample in first] == [0, 1]
    assert (scheduler.num_waiting, request.num_running) == (1, 2)
    assert scheduler.select() == first
    (done,) = scheduler.advance(first)
    assert (done.slot, done.denoised) == (0, True)
    running, late = scheduler.select()
    assert (running.slot, late.slot) == (1, 0), "the freed slot is used at the next step"
    assert [running.step, late.step] == [1, 0]
    assert scheduler.advance([running, late]) == [running]
    assert step(scheduler) == [late]
    assert not scheduler.has_work and not request.num_running


def test_short_ones_pass_long_ones_which_keep_their_progress() -> None:
    scheduler = make_scheduler(max_rows=1)
    scheduler.add(long := make_request("long", 250))
    for _ in range(100):
        step(scheduler)
    scheduler.add(make_request("short", 10, client="other"))
    assert ends(scheduler) == {"short": 9, "long": 149 + 9}
    assert long.samples[0].denoised


@pytest.mark.parametrize("client", ["", "other"])
def test_a_large_request_does_not_hold_up_a_small_one(client: str) -> None:
    scheduler = make_scheduler(num_slots=512, max_rows=8)
    scheduler.add(make_request("large", *[400] * 64))
    for _ in range(500):
        step(scheduler)
    for number in range(5):
        scheduler.add(make_request(f"small {number}", 10, client=client))
        assert "large" in names(scheduler.select()), "there is room for both"
    found = ends(scheduler)
    assert [found[f"small {number}"] for number in range(5)] == [9] * 5


def test_equals_go_by_arrival_one_after_the_other() -> None:
    scheduler = make_scheduler(max_rows=1)
    for name in "abcd":
        scheduler.add(make_request(name, 3, client=name))
    assert ends(scheduler) == {"a": 2, "b": 4, "c": 6, "d": 8}


def test_a_priority_is_a_share_ten_times_as_large() -> None:
    scheduler = make_scheduler(max_rows=1)
    for priority in ("low", "normal", "high"):
        for steps in (11, 101):
            scheduler.add(make_request(f"{priority} {steps}", steps, priority=priority))
    # They would end at 22.2, 122.2, 132.2, 220, 222 and 330 if all shared.
    assert ends(scheduler) == {
        "high 11": 10,
        "high 101": 110,
        "normal 11": 120,
        "normal 101": 220,
        "low 11": 230,
        "low 101": 330,
    }


def test_a_low_request_is_not_passed_for_ever() -> None:
    scheduler = make_scheduler(max_rows=1)
    low = make_request("low", 11, priority="low")
    scheduler.add(low)
    num_steps = 0
    while not low.samples[0].denoised:
        if num_steps % 2 == 0:
            scheduler.add(make_request(f"normal {num_steps}", 3))
        step(scheduler)
        num_steps += 1
    assert 90 <= num_steps <= 130, "10 evaluations at an eleventh of the device"


def saturate(scheduler: Scheduler, num_steps: int, **clients: tuple[float, int]) -> Counter[str]:
    """Each client, of a weight, always has 8 requests of one image of its number of steps; returns
    what each was served."""
    served: Counter[str] = Counter()
    for number in range(num_steps):
        present = Counter(request.client for request in scheduler.requests)
        for client, (weight, count) in clients.items():
            for i in range(8 - present[client]):
                name = f"{client} {number} {i}"
                scheduler.add(make_request(name, count, client=client, weight=weight))
        chosen = scheduler.select()
        served.update(sample.request.client for sample in chosen)
        scheduler.advance(chosen)
    return served


@pytest.mark.parametrize("steps", [(10, 10), (50, 10), (10, 50)])
def test_clients_share_by_weight(steps: tuple[int, int]) -> None:
    served = saturate(make_scheduler(max_rows=4), 5_000, one=(1.0, steps[0]), three=(3.0, steps[1]))
    assert served["three"] / served["one"] == pytest.approx(3, rel=0.05)


def test_a_clients_many_requests_are_no_more_than_its_share() -> None:
    scheduler = make_scheduler(max_rows=1)
    for number in range(100):
        scheduler.add(make_request(f"flood {number}", 10, client="flood"))
    scheduler.add(make_request("single", 50, client="other"))
    assert ends(scheduler)["single"] <= 2 * 49


def test_a_long_request_gets_its_share_beside_an_endless_stream_of_short_ones() -> None:
    scheduler = make_scheduler(max_rows=1)
    scheduler.add(long := make_request("long", 100))
    for number in range(2 * 99):
        if len(scheduler.requests) == 1:
            scheduler.add(make_request(f"short {number}", 10, client="other"))
        step(scheduler)
    assert long not in scheduler.requests


def test_a_long_request_gets_through_a_stream_of_its_own_client_too() -> None:
    scheduler = make_scheduler(max_rows=8)
    scheduler.add(long := make_request("long", 250))
    number = 0
    while long in scheduler.requests:
        number += 1
        for i in range(17 - len(scheduler.requests)):
            scheduler.add(make_request(f"short {number} {i}", 10))
        step(scheduler)
    assert number < 4 * 249 * 17 / 8, "four times as long as at an equal share"


def test_a_row_that_is_left_goes_to_the_next_image_that_needs_no_more() -> None:
    scheduler = make_scheduler(max_rows=3)
    scheduler.add(make_request("pair", 10, 10, branch="cfg"))
    scheduler.add(make_request("single", 50))
    assert [(s.request.id, s.slot) for s in scheduler.select()] == [("pair", 0), ("single", 1)]


def test_a_guides_row_is_no_row_of_the_model() -> None:
    scheduler = make_scheduler(max_rows=2)
    for name in "abc":
        scheduler.add(make_request(name, 10, branch="autoguidance"))
    assert names(scheduler.select()) == ["a", "b"]
    lone = make_scheduler(max_rows=1)
    lone.add(make_request("guided", 10, branch="cfg"))
    assert names(lone.select()) == ["guided"]


def test_rows_that_would_pad_a_bucket_too_much_wait() -> None:
    scheduler = make_scheduler(table={1: 1.0, 2: 1.2, 4: 2.0, 8: 4.0})
    for name in "abcde":
        scheduler.add(make_request(name, 10))
    assert names(scheduler.select()) == ["a", "b", "c", "d"], "2 rows a second, not 5 / 4"
    assert len(scheduler.running) == 4
    scheduler.advance(scheduler.select())
    assert names(scheduler.select()) == ["a", "b", "c", "d"], "they are not interrupted"


@pytest.mark.parametrize(
    ("table", "rows"),
    [(ALIKE, [8] * 9), (IN_PROPORTION, [1] * 8 * 9)],
    ids=["alike", "in proportion"],
)
def test_a_step_is_as_full_as_is_worth_its_time(table: Table, rows: list[int]) -> None:
    scheduler = make_scheduler(table=table)
    for number in range(8):
        scheduler.add(make_request(str(number), 10))
    found = []
    while scheduler.has_work:
        found.append(len(step_rows := scheduler.select()))
        scheduler.advance(step_rows)
    assert found == rows


def test_the_images_of_one_request_end_together() -> None:
    scheduler = make_scheduler(table=IN_PROPORTION)
    scheduler.add(make_request("request", *[10] * 8))
    assert len(scheduler.select()) == 8, "one after the other, its end would be no sooner"


def test_steps_are_fuller_the_more_wait() -> None:
    scheduler = make_scheduler(512, 64, {n: 0.85 + n for n in (1, 2, 4, 8, 16, 32, 64)})
    rows = []
    for number in range(1_000):
        scheduler.add(make_request(str(number), 10))
        if number + 1 in (2, 8, 64, 1_000):
            rows.append(len(scheduler.select()))
    assert rows == [2, 8, 32, 64]


def test_with_all_slots_taken_those_who_have_one_go_on() -> None:
    scheduler = make_scheduler(num_slots=2, max_rows=2)
    for name in ("long", "longer"):
        scheduler.add(make_request(name, 100 + len(name)))
    step(scheduler)
    scheduler.add(make_request("short", 3))
    assert ends(scheduler) == {"long": 102, "longer": 104, "short": 104}


def test_cost_counts_what_is_left_of_waiting_and_running() -> None:
    scheduler = make_scheduler(max_rows=2)
    scheduler.add(make_request("guided", 11, branch="cfg"))
    scheduler.add(make_request("plain", 5, 6))
    assert scheduler.cost == 20 + 9
    assert names(step(scheduler)) == []
    assert scheduler.cost == 20 + 7
    scheduler.remove(next(r for r in scheduler.requests if r.id == "plain"))
    assert scheduler.cost == 20


def test_a_cancelled_request_leaves_and_touches_nobody_else() -> None:
    scheduler = make_scheduler(num_slots=2, max_rows=2)
    gone, stays, waiting, next_one = requests = [
        make_request(name, 4) for name in ("gone", "stays", "waiting", "next")
    ]
    for request in requests:
        scheduler.add(request)
    step(scheduler)
    assert gone.future.cancel() and waiting.future.cancel()
    assert scheduler.drop(now=0.0) == []
    assert names(scheduler.select()) == ["stays", "next"]
    assert {s.request.id: s.step for s in scheduler.running.values()} == {"stays": 1, "next": 0}
    assert scheduler.requests == {stays, next_one}
    assert scheduler.cost == 2 + 3


def test_what_was_cancelled_before_or_after_its_time_here_is_no_matter() -> None:
    scheduler = make_scheduler()
    early, late = make_request("early", 2), make_request("late", 2)
    assert early.future.cancel()
    scheduler.add(early)
    scheduler.add(late)
    assert scheduler.drop(now=0.0) == [] and scheduler.requests == {late}
    step(scheduler)
    assert late.future.cancel()
    assert scheduler.drop(now=0.0) == [] and not scheduler.has_work


def test_the_expired_leave_and_are_named() -> None:
    scheduler = make_scheduler(num_slots=1, max_rows=1)
    running, waiting, later, cancelled, done = requests = [
        make_request("running", 4, deadline=2.0),
        make_request("waiting", 9, deadline=1.0),
        make_request("later", 9, deadline=3.0),
        make_request("cancelled", 9, deadline=1.0),
        make_request("done", 2, deadline=1.0),
    ]
    for request in requests:
        scheduler.add(request)
    assert names(step(scheduler)) == ["done"]
    step(scheduler)
    assert cancelled.future.cancel()
    assert scheduler.drop(now=0.9) == []
    assert scheduler.drop(now=2.0) == [waiting, running]
    assert scheduler.requests == {later} and scheduler.cost == 8
    assert scheduler.select()[0].slot == 0


def test_remove_frees_every_slot_of_a_request_even_of_one_in_a_step() -> None:
    scheduler = make_scheduler(num_slots=2, max_rows=2)
    request, other = make_request("a", 3, 3, 3), make_request("b", 3)
    scheduler.add(request)
    stepping = scheduler.select()
    scheduler.remove(request)
    scheduler.remove(request)
    scheduler.add(other)
    assert scheduler.advance(stepping) == []
    assert (scheduler.cost, stepping[0].step, request.num_running) == (2, 0, 0)
    assert names(scheduler.select()) == ["b"]


def test_who_left_takes_nothing_from_its_clients_other_requests() -> None:
    scheduler = make_scheduler(max_rows=1)
    scheduler.add(gone := make_request("gone", 101))
    scheduler.add(make_request("stays", 101))
    for _ in range(10):
        step(scheduler)
    scheduler.remove(gone)
    scheduler.add(make_request("other", 106, client="other"))
    assert ends(scheduler) == {"stays": 100, "other": 205}


def test_predictions_count_what_goes_before() -> None:
    scheduler = make_scheduler(max_rows=1, table={1: 2.0})
    long, short = make_request("long", 101), make_request("short", 11)
    assert scheduler.predict_s(short.samples) == 20
    scheduler.add(long)
    assert scheduler.predict_s(long.samples) == 200
    assert scheduler.predict_s(short.samples) == 20
    urgent = make_request("urgent", 21, priority="high")
    scheduler.add(urgent)
    assert scheduler.predict_s(short.samples) == 60
    step(scheduler)
    assert scheduler.predict_s(short.samples) == 58
    scheduler.add(short)
    assert scheduler.predict_s(short.samples) == 58
    assert scheduler.predict_s(long.samples) == 258
    assert scheduler.predict_s([*short.samples, *urgent.samples]) == 58
    assert scheduler.cost == 129, "to ask changes nothing"
    assert ends(scheduler) == {"urgent": 19, "short": 29, "long": 129}
    assert scheduler.drain_s(100) == 200


def test_a_prediction_is_no_less_than_its_own_steps() -> None:
    scheduler = make_scheduler(max_rows=64, table={1: 1.0, 64: 4.0})
    request = make_request("request", *[10] * 4)
    assert scheduler.predict_s(request.samples) == 9 * 4.0, "4 rows run as 64"
    scheduler.add(make_request("other", 2, client="other"))
    assert scheduler.predict_s(make_request("single", 10).samples) == 10 * 1.0, "after the other"
    scheduler.add(make_request("many", *[3] * 63))
    scheduler.select()
    assert scheduler.predict_s(make_request("single", 10).samples) == 9 * 4.0
    ends(scheduler)
    assert scheduler.predict_s(make_request("single", 10).samples) == 9 * 1.0


REQUESTS = st.builds(
    make_request,
    st.just("request"),
    st.integers(2, 8),
    branch=st.sampled_from([None, "cfg", "autoguidance"]),
    client=st.sampled_from("ab"),
    weight=st.sampled_from([0.5, 1.0, 3.0]),
    priority=st.sampled_from(["low", "normal", "high"]),
    deadline=st.sampled_from([math.inf, 3.0, 10.0, 30.0]),
)


def check(scheduler: Scheduler, num_slots: int, chosen: Sequence[Sample]) -> None:
    waiting = [sample for samples in scheduler.waiting.values() for sample in samples]
    running = scheduler.running
    assert {slot: sample.slot for slot, sample in running.items()} == {n: n for n in running}
    assert len(running) <= num_slots and set(running) <= set(range(num_slots))
    assert len({*waiting, *running.values()}) == len(waiting) + len(running)
    assert scheduler.cost == pytest.approx(
        sum(sample.remaining_cost for sample in (*waiting, *running.values()))
    )
    assert scheduler.requests == {sample.request for sample in (*waiting, *running.values())}
    assert all(running[sample.slot] is sample for sample in chosen)


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 6), st.integers(1, 6), st.sampled_from([ALIKE, IN_PROPORTION]))
def test_whatever_happens_no_slot_is_lost_and_all_work_ends(
    data: st.DataObject, num_slots: int, max_rows: int, table: Table
) -> None:
    scheduler = make_scheduler(num_slots, max_rows, table)
    known: list[Request] = []
    now, gone = 0.0, set[Request]()
    for arriving in data.draw(st.lists(st.lists(REQUESTS, max_size=3), max_size=20)):
        now += 1
        for request in arriving:
            scheduler.add(request)
        known += arriving
        if known and data.draw(st.integers(0, 3)) == 0:
            cancelled = data.draw(st.sampled_from(known))
            cancelled.future.cancel()
            gone.add(cancelled)
        expired = scheduler.drop(now)
        assert all(request.deadline <= now and request not in gone for request in expired)
        gone.update(expired)
        assert not gone & scheduler.requests
        turn(scheduler, num_slots, max_rows)
    for _ in range(7 * len(known)):
        turn(scheduler, num_slots, max_rows)
    assert not scheduler.has_work and scheduler.cost == 0 and not scheduler.running
    assert all(request in gone or request.samples[0].denoised for request in known)
    assert sorted(scheduler._free) == list(range(num_slots))


def turn(scheduler: Scheduler, num_slots: int, max_rows: int) -> None:
    chosen = scheduler.select()
    assert bool(chosen) == scheduler.has_work
    rows = sum(sample.plan.model_rows(sample.step) for sample in chosen)
    assert rows <= max_rows or len(chosen) == 1
    check(scheduler, num_slots, chosen)
    scheduler.advance(chosen)
    check(scheduler, num_slots, [])

"""The order of requests, against a system that really shares."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rae.server.fair_order import FairOrder
from rae.server.request import Request

Job = tuple[int, int, str, float]  # arrival, cost, client, weight


def request(name: str, client: str = "", weight: float = 1.0) -> Request:
    return Request(name, client=client, weight=weight)


def names(order: FairOrder) -> list[str]:
    return [request.id for request in order]


def order_of(**costs: float) -> FairOrder:
    order = FairOrder()
    for name, cost in costs.items():
        order.add(request(name), cost)
    return order


def test_the_cheapest_of_those_who_come_together_is_first_then_the_oldest() -> None:
    assert names(order_of(a=5, b=3, c=5, d=1)) == ["d", "b", "a", "c"]


def test_what_comes_later_is_behind_what_would_have_ended_by_then() -> None:
    order = order_of(old=10)
    order.serve(6)  # 4 left
    order.add(request("equal"), 4)
    order.add(request("small"), 3)
    order.add(request("large"), 5)
    assert names(order) == ["small", "old", "equal", "large"]


def test_clients_share_by_weight_and_their_requests_equally() -> None:
    order = FairOrder()
    order.add(request("heavy", "h", 3.0), 20)  # alone at 3: after 6.7 units of time
    order.add(request("first", "l"), 3)  # two at 1/2: after 6
    order.add(request("second", "l"), 4)  # after 7
    assert names(order) == ["first", "heavy", "second"]
    order.add(request("heavier", "h", 6.0), 10)  # at 3 after 3.3; "heavy" then at 6 after 5
    assert names(order) == ["heavier", "heavy", "first", "second"]


def test_what_was_done_early_still_counts_until_it_would_have_been_done() -> None:
    order = FairOrder()
    order.add(early := request("early"), 4)
    order.add(request("long"), 10)
    order.serve(4)  # to each 2 in the shadow
    order.remove(early)
    order.serve(2)  # to each 1: "early" would have 1 left, "long" 7
    order.add(request("new"), 6.5)
    assert names(order) == ["new", "long"]
    order.serve(3)  # to each 1: only now does "early" leave
    order.serve(11)  # to each 5.5: "new" ends
    assert names(order) == ["new", "long"]


def test_what_ended_in_the_shadow_goes_first() -> None:
    order = order_of(a=2, b=3)
    order.serve(5)
    order.add(request("c"), 0.5)
    assert names(order) == ["a", "b", "c"]


def test_who_gives_up_leaves_what_it_was_served_ahead() -> None:
    order = FairOrder()
    order.add(quitter := request("quitter"), 10)
    order.add(request("other"), 10)
    order.serve(6)  # all of it to the quitter, 3 to each in the shadow
    order.remove(quitter, unserved=4)
    order.serve(6)  # the 3 that it was ahead, and as much of the other's
    order.add(request("new"), 4.5)
    assert names(order) == ["other", "new"], "4 of 10 left in the shadow"
    order.remove(next(iter(order)), unserved=4)
    order.add(request("newer"), 4.4)
    assert names(order) == ["newer", "new"]


def test_who_gives_up_unserved_leaves_nothing() -> None:
    order = FairOrder()
    order.add(quitter := request("quitter"), 10)
    order.add(request("other"), 10)
    order.serve(6)  # 3 to each in the shadow
    order.remove(quitter, unserved=10)
    order.add(request("before"), 6.9)
    order.add(request("after"), 7.1)
    assert names(order) == ["before", "other", "after"]


def test_with_nobody_left_all_starts_anew() -> None:
    order = FairOrder()
    order.add(quitter := request("quitter"), 10)
    order.add(other := request("other"), 10)
    order.serve(6)
    order.remove(quitter, unserved=10)
    order.serve(4)
    order.remove(other)  # 3 before its end in the shadow
    order.add(request("larger", "another client"), 5)
    order.add(request("smaller"), 4)
    assert names(order) == ["smaller", "larger"]


def shared_ends(jobs: list[Job]) -> list[float]:
    """When each job ends if all are served at once; the device works off 1 per unit of time."""
    left = [float(cost) for _, cost, _, _ in jobs]
    ends = [0.0] * len(jobs)
    now = 0.0
    while any(left):
        present = [i for i, job in enumerate(jobs) if job[0] <= now + 1e-9 and left[i]]
        coming = min((job[0] for job in jobs if job[0] > now + 1e-9), default=float("inf"))
        crowd = Counter(jobs[i][2] for i in present)
        weights = {jobs[i][2]: jobs[i][3] for i in present}
        total = sum(weights.values())
        rates = {i: weights[jobs[i][2]] / total / crowd[jobs[i][2]] for i in present}
        span = min([left[i] / rates[i] for i in present] + [coming - now])
        now += span
        for i in present:
            left[i] -= span * rates[i]
            if left[i] < 1e-9:
                left[i], ends[i] = 0.0, now
    return ends


def served_ends(jobs: list[Job]) -> list[float]:
    """When each job ends if the first in order is served one unit at a time."""
    order, ends = FairOrder(), [0.0] * len(jobs)
    left = [cost for _, cost, _, _ in jobs]
    now = 0
    while any(left):
        for i, (arrival, cost, client, weight) in enumerate(jobs):
            if arrival == now:
                order.add(request(str(i), client, weight), cost)
        first = next(iter(order), None)
        now += 1
        if first is not None:
            i = int(first.id)
            left[i] -= 1
            order.serve(1)
            if not left[i]:
                order.remove(first)
                ends[i] = now
    return ends


WEIGHTS = {"a": 1.0, "b": 3.0, "c": 0.5}
JOBS = st.lists(
    st.tuples(st.integers(0, 30), st.integers(1, 20), st.sampled_from("abc")).map(
        lambda job: (*job, WEIGHTS[job[2]])
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=500, deadline=None)
@given(JOBS)
def test_none_ends_later_than_if_all_shared(jobs: list[Job]) -> None:
    served, shared = served_ends(jobs), shared_ends(jobs)
    assert all(ours <= theirs + 1 - 1e-6 for ours, theirs in zip(served, shared, strict=True)), (
        "units are served whole, so an end may be late by less than one"
    )
    assert sum(served) <= sum(shared) + len(jobs)


def test_most_end_much_sooner() -> None:
    jobs: list[Job] = [(0, 10, "a", 1.0)] * 10
    assert sum(served_ends(jobs)) == 550
    assert sum(shared_ends(jobs)) == pytest.approx(1000)

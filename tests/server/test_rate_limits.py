"""A client gets its share, later ones theirs, and forgetting changes nothing."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rae.server.errors import RateLimitedError
from rae.server.rate_limits import RateLimits

RATES = st.floats(0.01, 1000)
BURSTS = st.floats(1, 1000)
COSTS = st.floats(0.1, 10_000)
PAUSES = st.one_of(st.just(0.0), st.floats(0.001, 1000))
HOUR_S = 3600


def is_let_in(limits: RateLimits, client: str, now: float) -> bool:
    try:
        limits.check(client, now)
    except RateLimitedError:
        return False
    return True


def test_the_burst_the_debt_and_the_pause() -> None:
    limits = RateLimits(10, 60)
    limits.check("a", 0)
    limits.charge("a", 599, 0)
    limits.check("a", 0)
    limits.charge("a", 101, 0)  # 100 in debt
    with pytest.raises(RateLimitedError) as refused:
        limits.check("a", 0)
    assert refused.value.retry_after_s == pytest.approx(10)
    assert str(refused.value).startswith(
        "this client may use 10 model evaluations a second, and 600 at once after a pause; "
    )
    limits.check("b", 0)
    assert not is_let_in(limits, "a", 9.99)
    assert is_let_in(limits, "a", 10.01)
    limits.charge("a", 600, HOUR_S)
    assert not is_let_in(limits, "a", HOUR_S)  # a long pause gives no more than the burst


def test_a_balance_of_0_is_not_above_0() -> None:
    limits = RateLimits(1, 8)
    limits.charge("a", 8, 0)
    assert not is_let_in(limits, "a", 0)


def test_without_a_rate_nobody_is_limited() -> None:
    limits = RateLimits(None, 60)
    limits.charge("a", 1e9, 0)
    limits.check("a", 0)


@given(
    rate=RATES,
    burst_s=BURSTS,
    asked=st.lists(st.tuples(PAUSES, COSTS, st.integers(0, 3)), min_size=1, max_size=30),
)
def test_no_window_holds_more_than_its_share(
    rate: float, burst_s: float, asked: list[tuple[float, float, int]]
) -> None:
    """Requests are charged so many requests later than they were checked."""
    limits = RateLimits(rate, burst_s)
    times = list(accumulate(pause for pause, _, _ in asked))
    pending: list[tuple[int, float]] = []
    charged: list[tuple[float, float]] = []
    most_pending = 0
    for i, (now, (_, cost, delay)) in enumerate(zip(times, asked, strict=True)):
        if is_let_in(limits, "a", now):
            pending.append((i + delay, cost))
        most_pending = max(most_pending, len(pending))
        for due, this in [p for p in pending if p[0] <= i]:
            limits.charge("a", this, now)
            charged.append((now, this))
            pending.remove((due, this))
    largest = max(cost for _, cost, _ in asked)
    for first, (start, _) in enumerate(charged):
        for last, (end, _) in enumerate(charged[first:], first):
            total = sum(cost for _, cost in charged[first : last + 1])
            allowed = rate * (burst_s + end - start) + most_pending * largest
            assert total <= allowed * (1 + 1e-9)


@given(rate=RATES, burst_s=BURSTS, costs=st.lists(COSTS, min_size=1, max_size=10))
def test_who_waits_as_told_is_let_in_and_nobody_earlier(
    rate: float, burst_s: float, costs: list[float]
) -> None:
    limits = RateLimits(rate, burst_s)
    for cost in costs:
        limits.charge("a", cost, 0)
    try:
        limits.check("a", 0)
    except RateLimitedError as error:
        slack = 1e-6 * (1 + error.retry_after_s)
        assert not is_let_in(limits, "a", error.retry_after_s - slack)
        assert is_let_in(limits, "a", error.retry_after_s + slack)
        assert is_let_in(limits, "a", float(error.headers["retry-after"]) + slack)
    else:
        assert sum(costs) < rate * burst_s * (1 + 1e-9)


@given(asked=st.lists(st.tuples(PAUSES, COSTS, st.integers(0, 20)), max_size=100))
def test_forgetting_changes_nothing(asked: list[tuple[float, float, int]]) -> None:
    rate, burst_s, now = 10.0, 60.0, 0.0
    all_kept, few_kept = RateLimits(rate, burst_s), RateLimits(rate, burst_s, max_clients=8)
    full_at: dict[str, float] = {}
    for pause, cost, number in asked:
        now, client = now + pause, str(number)
        assert is_let_in(few_kept, client, now) == is_let_in(all_kept, client, now)
        # Up to half of the clients that are kept may be without a full bucket.
        others = [name for name, at in full_at.items() if at > now and name != client]
        if len(others) < 4:
            full_at[client] = max(full_at.get(client, now), now) + cost / rate
            all_kept.charge(client, cost, now)
            few_kept.charge(client, cost, now)
        assert len(few_kept._full_at) <= 8


def test_of_too_many_those_most_in_debt_are_kept() -> None:
    limits = RateLimits(1, 10, max_clients=4)
    for number in range(5):
        limits.charge(str(number), 11 + number, 0)
    assert [is_let_in(limits, str(number), 0) for number in range(5)] == [True] * 3 + [False] * 2

"""What clients are told to do next, and that errors survive the way between processes."""

from __future__ import annotations

import pickle

import pytest

from rae.server.errors import ApiError, QueueFullError, RateLimitedError, RetryLaterError


@pytest.mark.parametrize(
    ("computed_s", "told_s"),
    [
        (0.0, {1, 2}),
        (1.0, {1, 2}),
        (1.5, {2, 3}),
        (4.0, {4, 5, 6}),
        (9.01, {10, 11, 12, 13, 14, 15}),
    ],
)
def test_refused_clients_come_back_at_different_times(computed_s: float, told_s: set[int]) -> None:
    def told(drawn: int) -> str:
        error = RetryLaterError("full", computed_s, lambda below: min(drawn, below - 1))
        assert str(error) == f"full; try again in {error.headers['retry-after']} s"
        return error.headers["retry-after"]

    assert {int(told(drawn)) for drawn in range(20)} == told_s


def test_the_share_is_random() -> None:
    errors = [QueueFullError(1000, cost=1, queued=2, limit=2) for _ in range(50)]
    told_s = [int(error.headers["retry-after"]) for error in errors]
    assert min(told_s) >= 1000
    assert max(told_s) <= 1500
    assert len(set(told_s)) > 10


@pytest.mark.parametrize(
    "error",
    [QueueFullError(9.5, cost=10, queued=20, limit=25), RateLimitedError(9.5, rate=2, burst_s=60)],
    ids=lambda error: error.type,
)
def test_another_process_tells_the_same(error: ApiError) -> None:
    received = pickle.loads(pickle.dumps(error))
    assert type(received) is type(error)
    assert (str(received), received.headers) == (str(error), error.headers)

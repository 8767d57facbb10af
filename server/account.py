"""What becomes known of one POST /generate: for the counts, its log line and its span."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from rae.server.errors import FailureReason
from rae.server.metrics import Ended, Metrics, Outcome, Refused

REFUSED: Mapping[int, Refused] = {
    429: "rejected",
    499: "incomplete",
    503: "unavailable",
    504: "refused_deadline",
}


@dataclass
class Account:
    """`facts` are names and plain values; `timings_ms` are the stages in their order, of which the
    last ended at `ended_ns`, in nanoseconds since 1970."""

    metrics: Metrics
    started: float = field(default_factory=time.perf_counter)
    is_accepted: bool = False
    outcome: Outcome | None = None
    facts: dict[str, str | int | float | None] = field(default_factory=dict)
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    ended_ns: int = 0

    def accept(self) -> None:
        """Nobody refused it, and work is queued."""
        assert not self.is_accepted
        self.is_accepted = True
        self.metrics.accepted()

    def took(self, timings_ms: Mapping[str, float]) -> None:
        """The stages of a request whose last one ends now."""
        self.timings_ms, self.ended_ns = timings_ms, time.time_ns()

    def end(self, status: int, reason: FailureReason) -> None:
        """Count it by the status that it was answered with."""
        if self.is_accepted:
            outcome = self.outcome = ended(status)
            self.metrics.ended(outcome, time.perf_counter() - self.started, reason)
        else:
            outcome = self.outcome = refused(status)
            self.metrics.refused(outcome)


def refused(status: int) -> Refused:
    return REFUSED.get(status, "invalid" if 400 <= status < 500 else "internal")


def ended(status: int) -> Ended:
    """By the client's or somebody's wish is "cancelled"."""
    if status < 400:
        return "done"
    if status == 504:
        return "expired"
    return "cancelled" if status < 500 else "failed"

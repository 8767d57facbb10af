"""A worker as its supervisor sees it: when it is started, whether it hangs, when it is given up.

As there, nothing is done, and times are given.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rae.server import messages
from rae.server.ticket import Ticket

State = Literal["starting", "ready", "dying", "dead", "given up"]

START_S = 1800.0
"""For a worker's start. XL takes 2 minutes where it is compiled; a network's disk may take more."""
SILENT_START_S = 300.0
"""That nothing may be heard of a start: torch's libraries load with Python's lock held."""
SHORT_LIFE_S = 10.0
FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 30.0
STARTS = 5
"""Times that a worker may fail to start, one after the other."""
EXPECTED_STEPS = 10
"""A step hangs when it takes so many times what was expected, and the time that is allowed."""


@dataclass(eq=False)
class WorkerState:
    """From its first start on, whichever process it is; `died_at` is None once that is ready."""

    index: int
    state: State = "dead"
    reason: str = "no worker was started yet"
    """Why it is not ready."""
    failure: str = ""
    """What ends it, where that is known before it has ended."""
    detail: str = ""
    """The same for whoever started the server, with paths."""
    tickets: dict[int, Ticket] = field(default_factory=dict)
    suspect: Ticket | None = None
    facts: messages.Facts | None = None
    beat: messages.Beat = field(default_factory=messages.Beat)
    unseen_cost: float = 0.0
    """Sent since the last beat; what is not accepted yet is taken for a usual request."""
    spawned_at: float = 0.0
    heard_at: float = 0.0
    ready_at: float | None = None
    died_at: float | None = None
    start_at: float = 0.0
    start_s: float | None = None
    """How long the last start took, if one has succeeded."""
    has_served: bool = False
    failed_starts: int = 0
    short_lives: int = 0
    restarts: int = 0

    @property
    def load_s(self) -> float:
        return self.beat.load.drain_s + self.unseen_cost / self.beat.load.rows_per_s

    def start(self, now: float) -> None:
        self.restarts += self.died_at is not None
        self.state, self.reason = "starting", "the worker is starting"
        self.failure = self.detail = ""
        self.spawned_at = self.heard_at = now
        self.ready_at = None

    def report(self, beat: messages.Beat) -> None:
        self.beat, self.unseen_cost = beat, 0.0
        if self.state == "starting":
            self.reason = beat.progress

    def become_ready(self, now: float) -> None:
        self.state, self.reason = "ready", ""
        self.ready_at, self.start_s = now, now - self.spawned_at
        self.has_served, self.failed_starts = False, 0
        self.died_at = None

    def fail(self, failed: messages.Failed) -> None:
        """It is about to end."""
        self.failure, self.detail = failed.reason, failed.detail
        if failed.is_permanent and self.start_s is None:
            self.failed_starts = STARTS

    def die(self, reason: str, now: float) -> None:
        """`reason` is that of an end that nothing was known of."""
        self.state, self.reason = "dead", self.failure or reason
        self.beat, self.unseen_cost = messages.Beat(), 0.0
        if self.died_at is None:
            self.died_at = now

    def plan_start(self, now: float) -> None:
        """When, if at all: later and later for one that cannot start, or dies without service."""
        if self.ready_at is None:
            self.failed_starts += 1
            count = self.failed_starts
        else:
            lived = self.has_served or now - self.ready_at > SHORT_LIFE_S
            self.short_lives = count = 0 if lived else self.short_lives + 1
        if self.failed_starts >= STARTS:
            self.state = "given up"
        delay_s = FIRST_DELAY_S * 2 ** min(count - 1, 16) if count else 0.0
        self.start_at = now + min(delay_s, LONGEST_DELAY_S)

    def hanging(self, now: float, hang_s: float) -> str | None:
        """Why it has to be killed, if it has to be."""
        silent_s = hang_s if self.state == "ready" else max(hang_s, SILENT_START_S)
        if now - self.heard_at > silent_s:
            return f"the worker said nothing for {silent_s:.0f} s"
        if self.beat.busy_s > hang_s + EXPECTED_STEPS * self.beat.expected_s:
            return f"a step did not end in {self.beat.busy_s:.0f} s"
        if self.state == "starting" and now - self.spawned_at > START_S:
            return f"the worker was not ready in {START_S:.0f} s"
        return None

    def condemn(self, reason: str) -> None:
        """It is killed."""
        self.state, self.reason, self.failure = "dying", reason, reason

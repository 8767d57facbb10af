"""Which worker gets which request, and what becomes of both when one dies.

Decisions only: no processes, no sockets, no clock; `World` has those, and times are given.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import Protocol

from rae.server import messages
from rae.server.errors import ApiError, DeadlineError, NotReadyError, WorkerDiedError
from rae.server.request import Generated
from rae.server.ticket import Ticket
from rae.server.worker_state import WorkerState

USUAL_START_S = 5.0
DEATHS = 3
"""At which a request is given up that waits, in a worker or in line; one that has started is at its
own second. Its client would give up, too: where each death costs 16 s, 10 of 10,000 requests waited
for more than a minute while those in line were spared."""
SMOOTHING = 0.1
ORPHAN_S = 30.0
"""That a request waits for a worker to be ready after its own has died."""


class World(Protocol):
    """What a supervisor does."""

    def spawn(self, index: int) -> None: ...
    def restarted(self) -> None: ...
    def kill(self, index: int) -> None: ...
    def send(self, index: int, message: messages.ToWorker) -> None: ...
    def accepted(self, ticket: Ticket, cost: float) -> None: ...
    def end(self, ticket: Ticket, result: Generated | ApiError) -> None: ...
    def retried(self, ticket: Ticket) -> None: ...
    def recovered(self, seconds: float) -> None: ...


class Supervisor:
    """Keeps `num_workers` workers alive (None: as many as the first one sees devices), and every
    ticket in one of them, or waiting for one, until it has ended exactly once.

    What ran when a worker died may be what killed it. Such suspects are tried once more, at most
    one at a time in a worker: if that dies too, it is known whom to refuse, and those beside it,
    suspects now themselves, get their own second chance.
    """

    def __init__(self, world: World, num_workers: int | None, hang_s: float) -> None:
        self._world, self._hang_s = world, hang_s
        self._grows = num_workers is None
        self.workers = [WorkerState(index) for index in range(num_workers or 1)]
        self._waiting: deque[Ticket] = deque()
        self._suspects: deque[Ticket] = deque()
        self._closing = False
        self._ticked_at = -math.inf
        self._watched_from = 0.0
        self._ready_at = 0.0  # when a worker was seen ready for the last time
        self._usual_cost = 49.0  # of a request, in evaluations

    @property
    def ready(self) -> list[WorkerState]:
        return [worker for worker in self.workers if worker.state == "ready"]

    @property
    def reasons(self) -> list[str]:
        """Why it is not ready."""
        many = len(self.workers) > 1
        return [f"worker {w.index}: {w.reason}" if many else w.reason for w in self.workers]

    @property
    def failure(self) -> str | None:
        """Why there is no use in going on."""
        if all(worker.state == "given up" for worker in self.workers):
            return "; ".join(dict.fromkeys(w.detail or w.reason for w in self.workers))
        return None

    def submit(self, ticket: Ticket, now: float) -> None:
        """Raises NotReadyError where no worker is ready."""
        if not self.ready:
            start_s = max(worker.start_s or USUAL_START_S for worker in self.workers)
            raise NotReadyError(self.reasons, start_s)
        self._send(min(self.ready, key=lambda worker: worker.load_s), ticket, now)

    def cancel(self, ticket: Ticket, now: float) -> None:
        for queue in (self._waiting, self._suspects):
            if ticket in queue:
                queue.remove(ticket)
        for worker in self.workers:
            if ticket.id in worker.tickets:
                self._world.send(worker.index, messages.Cancel(ticket.id))
                self._take(worker, ticket.id, now)

    def heard(self, index: int, message: messages.FromWorker, now: float) -> None:
        """A worker's message; of tickets that it no longer has nothing is wanted."""
        worker = self.workers[index]
        worker.heard_at = now
        match message:
            case messages.Hello(num_devices):
                if self._grows:
                    self._grow(num_devices)
            case messages.Facts():
                worker.facts = message
                if worker.state == "starting":
                    self._welcome(worker, now)
            case messages.Failed():
                worker.fail(message)
            case messages.Beat():
                worker.report(message)
            case messages.Accepted(id, cost):
                if id in worker.tickets:
                    worker.unseen_cost = max(0.0, worker.unseen_cost + cost - self._usual_cost)
                    self._accept(worker.tickets[id], cost)
            case messages.Started(id):
                if id in worker.tickets:
                    worker.tickets[id].is_started = True
            case messages.Done(id, generated):
                worker.has_served = True
                self._end(worker, id, generated, now)
            case messages.Refused(id, error):
                self._end(worker, id, error, now)

    def died(self, index: int, reason: str, now: float) -> None:
        """A worker's process has ended, and all that it held is free."""
        worker = self.workers[index]
        self._see_ready(now)
        worker.die(reason, now)
        if not self._closing:
            worker.plan_start(now)
        tickets, worker.tickets, worker.suspect = worker.tickets, {}, None
        if worker.ready_at is not None:
            self._count_death_in_line()
        for ticket in tickets.values():
            self._orphan(ticket, now)
        self._dispatch(now)

    def tick(self, now: float) -> None:
        """Some times a second: start who is due, kill who hangs, end who has waited too long."""
        self._see_ready(now)
        if self._hang_s / 2 < now - self._ticked_at < math.inf:
            # This process was stopped, and its workers perhaps with it: nothing they said is new.
            self._watched_from = now + self._hang_s
        self._ticked_at = now
        for worker in self.workers:
            if worker.state == "dead" and now >= worker.start_at and not self._closing:
                self._start(worker, now)
            elif worker.state in ("starting", "ready") and now >= self._watched_from:
                self._watch(worker, now)
        self._end_overdue(now)

    def close(self, error: ApiError) -> None:
        """Nobody is started any more, and every ticket ends with `error`."""
        self._closing = True
        for ticket in list(self._tickets()):
            self._world.end(ticket, error)
        self._waiting.clear()
        self._suspects.clear()
        for worker in self.workers:
            worker.tickets.clear()

    def _tickets(self) -> Iterator[Ticket]:
        for worker in self.workers:
            yield from worker.tickets.values()
        yield from self._waiting
        yield from self._suspects

    def _send(self, worker: WorkerState, ticket: Ticket, now: float) -> None:
        worker.tickets[ticket.id] = ticket
        worker.unseen_cost += self._usual_cost
        self._world.send(worker.index, ticket.message(now))

    def _take(self, worker: WorkerState, id: int, now: float) -> Ticket | None:
        ticket = worker.tickets.pop(id, None)
        if ticket is not None and ticket is worker.suspect:
            worker.suspect = None
            self._dispatch(now)
        return ticket

    def _accept(self, ticket: Ticket, cost: float) -> None:
        if not ticket.is_accepted:
            ticket.is_accepted = True
            self._usual_cost += SMOOTHING * (cost - self._usual_cost)
            self._world.accepted(ticket, cost)

    def _end(self, worker: WorkerState, id: int, result: Generated | ApiError, now: float) -> None:
        ticket = self._take(worker, id, now)
        if ticket is not None:
            self._world.end(ticket, result)

    def _orphan(self, ticket: Ticket, now: float) -> None:
        ticket.deaths += 1
        ticket.orphaned_at = now
        was_suspect = ticket.is_suspect
        ticket.is_suspect = was_suspect or ticket.is_started
        if (was_suspect and ticket.is_started) or ticket.deaths >= DEATHS:
            self._world.end(ticket, WorkerDiedError(ticket.deaths))
            return
        ticket.is_started = False
        (self._suspects if ticket.is_suspect else self._waiting).append(ticket)
        self._world.retried(ticket)

    def _count_death_in_line(self) -> None:
        for queue in (self._waiting, self._suspects):
            for ticket in list(queue):
                ticket.deaths += 1
                if ticket.deaths >= DEATHS:
                    queue.remove(ticket)
                    self._world.end(ticket, WorkerDiedError(ticket.deaths))

    def _dispatch(self, now: float) -> None:
        """Give who waits to those who are ready."""
        self._end_overdue(now)
        ready = self.ready
        while ready and self._waiting:
            self._send(min(ready, key=lambda w: len(w.tickets)), self._waiting.popleft(), now)
        for worker in ready:
            if self._suspects and worker.suspect is None:
                worker.suspect = self._suspects.popleft()
                self._send(worker, worker.suspect, now)

    def _end_overdue(self, now: float) -> None:
        for queue in (self._waiting, self._suspects):
            for ticket in list(queue):
                error = self._overdue(ticket, now)
                if error is not None:
                    queue.remove(ticket)
                    self._world.end(ticket, error)

    def _see_ready(self, now: float) -> None:
        if self.ready:
            self._ready_at = now

    def _overdue(self, ticket: Ticket, now: float) -> ApiError | None:
        if ticket.deadline <= now:
            return DeadlineError(ticket.deadline - ticket.submitted_at)
        # Who stood in line while a worker was ready could have been served until it was not.
        orphaned_at = max(ticket.orphaned_at, self._ready_at)
        if not self.ready and (self.failure or now - orphaned_at > ORPHAN_S):
            return WorkerDiedError(ticket.deaths)
        return None

    def _grow(self, num_workers: int) -> None:
        self.workers += [WorkerState(index) for index in range(len(self.workers), num_workers)]

    def _start(self, worker: WorkerState, now: float) -> None:
        if worker.died_at is not None:
            self._world.restarted()
        worker.start(now)
        self._world.spawn(worker.index)

    def _watch(self, worker: WorkerState, now: float) -> None:
        reason = worker.hanging(now, self._hang_s)
        if reason is not None:
            worker.condemn(reason)
            self._world.kill(worker.index)

    def _welcome(self, worker: WorkerState, now: float) -> None:
        if worker.died_at is not None:
            self._world.recovered(now - worker.died_at)
        worker.become_ready(now)
        self._dispatch(now)

"""Who gets which request and what a death costs: no processes, a fake clock."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from rae.server import messages
from rae.server.errors import (
    ApiError,
    DeadlineError,
    EngineClosedError,
    NotReadyError,
    QueueFullError,
    WorkerDiedError,
)
from rae.server.request import Generated, ImageSpec
from rae.server.supervisor import DEATHS, ORPHAN_S, Supervisor
from rae.server.ticket import Ticket
from rae.server.worker_state import (
    LONGEST_DELAY_S,
    SILENT_START_S,
    START_S,
    STARTS,
    WorkerState,
)

HANG_S = 5.0
EXAMPLES = int(os.environ.get("RAE_TEST_EXAMPLES", "200"))
STEPS = 100
FACTS = messages.Facts(
    device="cpu",
    precision="fp32",
    layers="plain",
    compiles=False,
    num_slots=8,
    num_parameters={},
    implementations={},
)
IMAGES = Generated(images=[], queue_s=0.0, denoise_s=0.0, decode_s=0.0)
SPEC = ImageSpec(class_label=0, seed=0, steps=2)


def loaded(drain_s: float = 0.0, rows_per_s: float = 1.0) -> messages.Beat:
    return messages.Beat(load=messages.Load(drain_s=drain_s, rows_per_s=rows_per_s))


@dataclass
class Fakes:
    """Workers that do nothing by themselves: what was sent to each, and what was decided."""

    alive: dict[int, list[messages.ToWorker]] = field(default_factory=dict)
    killed: list[int] = field(default_factory=list)
    results: dict[Ticket, Generated | ApiError] = field(default_factory=dict)
    accepts: list[Ticket] = field(default_factory=list)
    retries: list[Ticket] = field(default_factory=list)
    recoveries: list[float] = field(default_factory=list)
    restarts: int = 0

    def spawn(self, index: int) -> None:
        assert index not in self.alive, "two processes for one worker"
        self.alive[index] = []

    def restarted(self) -> None:
        self.restarts += 1

    def kill(self, index: int) -> None:
        assert index in self.alive
        self.killed.append(index)

    def send(self, index: int, message: messages.ToWorker) -> None:
        self.alive[index].append(message)

    def accepted(self, ticket: Ticket, cost: float) -> None:
        self.accepts.append(ticket)

    def end(self, ticket: Ticket, result: Generated | ApiError) -> None:
        assert ticket not in self.results, "ended twice"
        self.results[ticket] = result

    def retried(self, ticket: Ticket) -> None:
        self.retries.append(ticket)

    def recovered(self, seconds: float) -> None:
        self.recoveries.append(seconds)


class House:
    """A supervisor, its world and its time."""

    def __init__(self, num_workers: int | None = 1) -> None:
        self.now, self.fakes, self.count = 0.0, Fakes(), 0
        self.supervisor = Supervisor(self.fakes, num_workers, HANG_S)
        self.supervisor.tick(self.now)

    @property
    def workers(self) -> list[WorkerState]:
        return self.supervisor.workers

    def hear(self, message: messages.FromWorker, index: int = 0) -> None:
        self.supervisor.heard(index, message, self.now)

    def submit(self, deadline_s: float = math.inf) -> Ticket:
        self.count += 1
        deadline = self.now + deadline_s
        ticket = Ticket(
            id=self.count, request_id="", specs=[SPEC], submitted_at=self.now, deadline=deadline
        )
        self.supervisor.submit(ticket, self.now)
        return ticket

    def run(self, ticket: Ticket, index: int = 0) -> None:
        """It is accepted and starts."""
        self.hear(messages.Accepted(ticket.id, 1.0), index)
        self.hear(messages.Started(ticket.id), index)

    def die(self, index: int = 0) -> None:
        del self.fakes.alive[index]
        self.supervisor.died(index, "it died", self.now)

    def wait(self, seconds: float) -> None:
        """Workers that live say so meanwhile."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(self.now + HANG_S / 4, end)
            for index in self.fakes.alive:
                self.hear(messages.Beat(), index)
            self.supervisor.tick(self.now)

    def fall_silent(self, seconds: float) -> None:
        for _ in range(int(seconds)):
            self.now += 1.0
            self.supervisor.tick(self.now)

    def restart(self, index: int = 0) -> None:
        self.die(index)
        while index not in self.fakes.alive:
            self.wait(0.1)
        self.hear(FACTS, index)

    def submitted(self, index: int = 0) -> list[int]:
        """Tickets that the living process was sent."""
        return [m.ticket for m in self.fakes.alive[index] if isinstance(m, messages.Submit)]


@pytest.fixture
def house() -> House:
    house = House()
    house.hear(FACTS)
    return house


def test_nobody_is_let_in_before_a_worker_is_ready() -> None:
    house = House()
    house.hear(messages.Beat(progress="the model is being loaded"))
    with pytest.raises(NotReadyError, match="not ready: the model is being loaded"):
        house.submit()
    house.hear(FACTS)
    ticket = house.submit()
    house.hear(messages.Done(ticket.id, IMAGES))
    assert house.fakes.results == {ticket: IMAGES}


def test_as_many_workers_as_devices() -> None:
    house = House(num_workers=None)
    assert list(house.fakes.alive) == [0]
    house.hear(messages.Hello(3))
    house.supervisor.tick(house.now)
    assert list(house.fakes.alive) == [0, 1, 2]


def test_the_least_loaded_worker_gets_the_next_request() -> None:
    house = House(num_workers=2)
    for index, drain_s in enumerate((2.0, 1.0)):
        house.hear(FACTS, index)
        house.hear(loaded(drain_s=drain_s, rows_per_s=10.0), index)
    first = house.submit()
    house.hear(messages.Accepted(first.id, 15.0), 1)  # 1.5 s more
    second = house.submit()
    assert (house.submitted(0), house.submitted(1)) == ([second.id], [first.id])


def test_a_beat_counts_what_was_sent_before_it() -> None:
    house = House(num_workers=2)
    for index in range(2):
        house.hear(FACTS, index)
        house.hear(loaded(rows_per_s=10.0), index)
    for _ in range(4):
        ticket = house.submit()
        (index,) = [w.index for w in house.workers if ticket.id in w.tickets]
        house.hear(messages.Accepted(ticket.id, 100.0), index)
        house.hear(loaded(rows_per_s=10.0, drain_s=float(index == 0)), index)
    # With nothing unseen only the first worker's second is between them.
    assert len(house.submitted(1)) >= 3


def test_starts_that_failed_are_forgotten_by_one_that_did_not() -> None:
    house = House()
    for _ in range(3):
        for _ in range(STARTS - 1):
            house.die()
            house.wait(LONGEST_DELAY_S)
        house.hear(FACTS)
        house.die()
        house.wait(LONGEST_DELAY_S)
    assert house.supervisor.failure is None


def test_requests_that_come_together_are_shared() -> None:
    house = House(num_workers=2)
    for index in range(2):
        house.hear(FACTS, index)
        house.hear(loaded(rows_per_s=10.0), index)
    tickets = [house.submit() for _ in range(6)]  # before any of them is accepted
    assert house.submitted(0) == [ticket.id for ticket in tickets[::2]]
    assert house.submitted(1) == [ticket.id for ticket in tickets[1::2]]


def test_what_ran_is_tried_once_more_and_what_waited_more_often(house: House) -> None:
    ran, waited = house.submit(), house.submit()
    house.run(ran)
    house.hear(messages.Accepted(waited.id, 1.0))
    for _ in range(2):
        house.restart()
        assert sorted(house.submitted()) == sorted(
            t.id for t in (ran, waited) if t not in house.fakes.results
        )
        house.hear(messages.Started(ran.id))
    assert isinstance(house.fakes.results[ran], WorkerDiedError)
    assert waited not in house.fakes.results
    house.hear(messages.Done(waited.id, IMAGES))
    assert house.fakes.results[waited] is IMAGES
    assert house.fakes.accepts == [ran, waited]


def test_a_suspect_that_dies_unstarted_is_tried_again_without_a_bound(house: House) -> None:
    ticket = house.submit()
    house.run(ticket)
    for _ in range(2):
        house.restart()
        assert ticket not in house.fakes.results
    (sent,) = house.fakes.alive[0]
    assert isinstance(sent, messages.Submit) and not sent.bounded


def test_a_request_that_never_starts_is_given_up_at_last(house: House) -> None:
    ticket = house.submit()
    for _ in range(DEATHS):
        assert ticket not in house.fakes.results
        house.restart()
    assert isinstance(house.fakes.results[ticket], WorkerDiedError)


def test_a_poisoned_request_harms_nobody_but_itself(house: House) -> None:
    tickets = [house.submit() for _ in range(5)]
    poisoned = tickets[2]
    deaths = 0
    for ticket in tickets:
        house.run(ticket)
    while len(house.fakes.results) < len(tickets):
        running = [t for t in tickets if t.id in house.workers[0].tickets]
        if poisoned in running:
            house.run(poisoned)
            house.restart()
            deaths += 1
        else:
            house.run(running[0])
            house.hear(messages.Done(running[0].id, IMAGES))
    assert deaths == 2
    assert isinstance(house.fakes.results.pop(poisoned), WorkerDiedError)
    assert all(result is IMAGES for result in house.fakes.results.values())


def test_a_worker_that_hangs_is_killed_and_one_with_a_long_step_is_not(house: House) -> None:
    house.hear(messages.Beat(busy_s=HANG_S + 9.9, expected_s=1.0))
    house.supervisor.tick(house.now)
    assert not house.fakes.killed
    house.hear(messages.Beat(busy_s=HANG_S + 10.1, expected_s=1.0))
    house.supervisor.tick(house.now)
    assert house.fakes.killed == [0]
    assert house.supervisor.reasons == ["a step did not end in 15 s"]
    house.die()
    assert house.supervisor.reasons == ["a step did not end in 15 s"]


def test_a_worker_that_says_nothing_is_killed(house: House) -> None:
    house.fall_silent(HANG_S)
    assert not house.fakes.killed
    house.fall_silent(1.0)
    assert house.fakes.killed == [0]
    with pytest.raises(NotReadyError, match="said nothing for 5 s"):
        house.submit()


def test_who_was_paused_with_its_workers_gives_them_time(house: House) -> None:
    house.now += 60.0
    house.supervisor.tick(house.now)
    house.hear(messages.Beat(busy_s=60.0))
    house.fall_silent(HANG_S - 1)
    assert not house.fakes.killed
    house.fall_silent(2.0)
    assert house.fakes.killed == [0]


def test_a_start_may_be_silent_for_longer() -> None:
    house = House()
    house.fall_silent(SILENT_START_S)
    assert not house.fakes.killed
    house.fall_silent(1.0)
    assert house.fakes.killed == [0]


def test_a_start_may_take_long_but_not_for_ever() -> None:
    house = House()
    house.wait(START_S - 1)
    assert not house.fakes.killed
    house.wait(2)
    assert house.fakes.killed == [0]


def test_a_worker_that_cannot_start_is_given_up() -> None:
    house = House()
    for number in range(STARTS):
        assert house.supervisor.failure is None
        house.hear(messages.Failed("no luck", f"no luck, {number}", is_permanent=False))
        house.die()
        house.wait(LONGEST_DELAY_S)
    assert house.supervisor.failure == f"no luck, {STARTS - 1}"
    assert not house.fakes.alive


def test_a_failure_that_is_permanent_ends_at_once_unless_it_ran_before(house: House) -> None:
    house.die()
    house.wait(1)
    house.hear(messages.Failed("no model", "no such file", is_permanent=True))
    house.die()
    assert house.supervisor.failure is None
    fresh = House()
    fresh.hear(messages.Failed("no model", "no such file", is_permanent=True))
    fresh.die()
    assert fresh.supervisor.failure == "no such file"


def test_who_dies_without_having_served_is_started_later_and_later(house: House) -> None:
    delays = []
    for _ in range(4):
        house.die()
        died_at = house.now
        while not house.fakes.alive:
            house.now += 0.1
            house.supervisor.tick(house.now)
        delays.append(house.now - died_at)
        house.hear(FACTS)
    assert delays == pytest.approx([0.5, 1, 2, 4], abs=0.2)
    ticket = house.submit()
    house.hear(messages.Done(ticket.id, IMAGES))
    house.die()
    house.supervisor.tick(house.now)
    assert list(house.fakes.alive) == [0]


def test_an_orphan_waits_only_so_long(house: House) -> None:
    late, lost = house.submit(deadline_s=4.0), house.submit()
    house.die()
    house.now += 4.0
    house.supervisor.tick(house.now)
    assert isinstance(house.fakes.results[late], DeadlineError)
    house.now += ORPHAN_S
    house.supervisor.tick(house.now)
    assert isinstance(house.fakes.results[lost], WorkerDiedError)


def test_who_stands_in_line_through_many_deaths_is_told_in_time(house: House) -> None:
    tickets = [house.submit() for _ in range(8)]
    for ticket in tickets:
        house.run(ticket)
    for _ in range(3):
        house.restart()
        for ticket in house.workers[0].tickets.values():
            house.hear(messages.Started(ticket.id))
        house.wait(9.0)
    assert set(house.fakes.results) == set(tickets)
    assert all(isinstance(end, WorkerDiedError) for end in house.fakes.results.values())


def test_closing_ends_all(house: House) -> None:
    running = house.submit()
    house.die()
    house.supervisor.close(EngineClosedError())
    assert isinstance(house.fakes.results[running], EngineClosedError)
    house.wait(LONGEST_DELAY_S)
    assert not house.fakes.alive


def test_a_suspect_in_line_keeps_its_chance_when_a_worker_hangs(house: House) -> None:
    first, second = house.submit(), house.submit()
    for ticket in (first, second):
        house.run(ticket)
    house.restart()
    house.run(first)
    house.wait(ORPHAN_S + 10)
    house.hear(messages.Beat(busy_s=HANG_S + 1))
    house.supervisor.tick(house.now)
    assert house.fakes.killed == [0]
    assert second not in house.fakes.results
    house.restart()
    assert house.submitted() == [second.id]


def test_nobody_waits_for_workers_that_are_given_up(house: House) -> None:
    ticket = house.submit()
    house.die()
    for _ in range(STARTS):
        assert ticket not in house.fakes.results
        house.now += 4.0  # the longest of these delays
        house.supervisor.tick(house.now)
        house.die()
    assert house.supervisor.failure is not None
    assert isinstance(house.fakes.results[ticket], WorkerDiedError)


def test_a_start_that_closing_ends_has_not_failed() -> None:
    house = House()
    for _ in range(STARTS - 1):
        house.die()
        house.wait(LONGEST_DELAY_S)
    house.supervisor.close(EngineClosedError())
    house.die()
    assert house.supervisor.failure is None


def test_a_worker_may_die_any_number_of_times(house: House) -> None:
    for _ in range(2000):
        house.die()
        house.now += LONGEST_DELAY_S
        house.supervisor.tick(house.now)
        assert house.fakes.alive
        house.hear(FACTS)
    ticket = house.submit()
    assert house.submitted() == [ticket.id]


class Supervised(RuleBasedStateMachine):
    """Two workers that live, serve and die at random, and clients that come and leave."""

    steps = 0
    tickets = Bundle("tickets")

    def __init__(self) -> None:
        super().__init__()
        self.house = House(num_workers=2)
        self.gone: set[Ticket] = set()
        self.all: list[Ticket] = []

    @property
    def living(self) -> list[int]:
        return sorted(self.house.fakes.alive)

    def held(self, index: int) -> list[Ticket]:
        """What the process of a worker has, by what it was told."""
        sent = self.house.submitted(index)
        cancelled = {
            m.ticket for m in self.house.fakes.alive[index] if isinstance(m, messages.Cancel)
        }
        return [
            t
            for t in self.all
            if t.id in sent and t.id not in cancelled and t not in self.house.fakes.results
        ]

    @rule(target=tickets, deadline_s=st.sampled_from([math.inf, 3.0, 40.0]))
    def submit(self, deadline_s: float) -> Ticket | None:
        try:
            ticket = self.house.submit(deadline_s)
        except NotReadyError:
            assert not self.house.supervisor.ready
            return None
        self.all.append(ticket)
        return ticket

    @rule(ticket=consumes(tickets))
    def cancel(self, ticket: Ticket | None) -> None:
        if ticket is not None and ticket not in self.house.fakes.results:
            self.house.supervisor.cancel(ticket, self.house.now)
            self.gone.add(ticket)

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def worker_speaks(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from(self.living))
        house, worker = self.house, self.house.workers[index]
        if worker.state == "starting":
            house.hear(FACTS, index)
            return
        held = self.held(index)
        if not held:
            house.hear(loaded(drain_s=data.draw(st.floats(0, 5))), index)
            return
        ticket = data.draw(st.sampled_from(held))
        kinds = ["accepted", "started", "done"] + ["refused"] * (not ticket.is_accepted)
        match data.draw(st.sampled_from(kinds)):
            case "accepted":
                house.hear(messages.Accepted(ticket.id, 3.0), index)
            case "started":
                house.hear(messages.Started(ticket.id), index)
            case "done":
                house.hear(messages.Done(ticket.id, IMAGES), index)
            case _:
                house.hear(messages.Refused(ticket.id, QueueFullError(1.0, 1, 1, 1)), index)

    @precondition(lambda self: self.living)
    @rule(data=st.data(), id=st.integers(1, 50))
    def a_message_comes_too_late(self, data: st.DataObject, id: int) -> None:
        """Of a ticket that this worker does not have: nothing happens."""
        index = data.draw(st.sampled_from(self.living))
        if id not in self.house.workers[index].tickets:
            before = dict(self.house.fakes.results)
            for message in (messages.Started(id), messages.Done(id, IMAGES)):
                self.house.hear(message, index)
            assert self.house.fakes.results == before

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def worker_dies(self, data: st.DataObject) -> None:
        self.house.die(data.draw(st.sampled_from(self.living)))

    @rule(seconds=st.sampled_from([0.1, 1.0, 20.0]))
    def time_passes(self, seconds: float) -> None:
        self.house.wait(seconds)

    @invariant()
    def count_steps(self) -> None:
        type(self).steps += 1

    @invariant()
    def every_ticket_is_in_one_place(self) -> None:
        supervisor, results = self.house.supervisor, self.house.fakes.results
        places = list(supervisor._tickets())
        assert len(set(places)) == len(places)
        assert set(places) == set(self.all) - set(results) - self.gone
        for worker in self.house.workers:
            assert worker.index in self.house.fakes.alive or not worker.tickets

    @invariant()
    def the_worker_has_what_the_supervisor_thinks(self) -> None:
        for index in self.living:
            assert {t.id for t in self.held(index)} == set(self.house.workers[index].tickets)

    @invariant()
    def suspects_run_one_at_a_time(self) -> None:
        for worker in self.house.workers:
            suspects = [t for t in worker.tickets.values() if t.is_suspect]
            assert suspects == ([] if worker.suspect is None else [worker.suspect])

    @invariant()
    def nobody_waits_for_a_worker_that_is_ready(self) -> None:
        supervisor = self.house.supervisor
        if supervisor.ready:
            assert not supervisor._waiting
            assert not supervisor._suspects or all(w.suspect for w in supervisor.ready)

    def teardown(self) -> None:
        """Workers that live on end what is left."""
        house = self.house
        for _ in range(3):
            house.wait(LONGEST_DELAY_S)
            for index in self.living:
                house.hear(FACTS, index)
        if house.supervisor.failure is None:
            while any(worker.tickets for worker in house.workers):
                for worker in house.workers:
                    for id in list(worker.tickets):
                        house.hear(messages.Done(id, IMAGES), worker.index)
        else:
            house.wait(ORPHAN_S + 1)
        assert set(house.fakes.results) | self.gone == set(self.all)
        assert len(house.fakes.accepts) == len(set(house.fakes.accepts))


def test_any_sequence_of_events() -> None:
    run = settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        deadline=None,
    )
    run_state_machine_as_test(Supervised, settings=run)
    assert Supervised.steps >= min(10_000, EXAMPLES * STEPS // 2)

"""Worker processes and what goes between them and the event loop: what a Supervisor decides."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from rae.server import messages
from rae.server.access import KEYS_VARIABLE
from rae.server.errors import ApiError, EngineClosedError
from rae.server.metrics import Metrics
from rae.server.request import Generated, ImageSpec, Priority
from rae.server.serve_settings import ServeSettings
from rae.server.supervisor import Supervisor
from rae.server.ticket import Ticket
from rae.server.worker_state import WorkerState

log = logging.getLogger(__name__)

COMMAND = (sys.executable, "-P", "-m", "rae.server.worker")
TICK_S = 0.1
# An engine's last step, and what it remembers for the next start.
CLOSE_S = 5.0
# For the system to end a process that was killed; one in a driver that hangs it never ends.
END_S = 10.0
POLL_S = 0.02

OnAccepted = Callable[[float], None]


class Pool:
    """The workers of one server, in the event loop that `start` is called in.

    `command` starts a worker; it gets the number of its end of a socket pair.
    """

    def __init__(
        self,
        folder: Path,
        settings: ServeSettings,
        metrics: Metrics,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self._folder, self._settings, self._metrics = folder, settings, metrics
        self._command = command
        self._supervisor = Supervisor(self, settings.workers, settings.hang_timeout)
        self._open: dict[Ticket, tuple[asyncio.Future[Generated], OnAccepted]] = {}
        self._ids = count(1)
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._ticking: asyncio.Task[None] | None = None
        self._is_closing = False
        self.draining = False
        """Once set, nobody is let in."""

    # What the service asks.

    @property
    def ready(self) -> bool:
        return bool(self._supervisor.ready) and not self.draining

    @property
    def reasons(self) -> list[str]:
        """Why it is not ready."""
        return ["the server is shutting down"] if self.draining else self._supervisor.reasons

    @property
    def failure(self) -> str | None:
        if self._ticking is not None and self._ticking.done() and not self._is_closing:
            return "the workers are not supervised any more; the log says why"
        return self._supervisor.failure

    @property
    def workers(self) -> Sequence[WorkerState]:
        return self._supervisor.workers

    @property
    def facts(self) -> messages.Facts | None:
        """Of the first worker that was ready once; the others have the same settings."""
        return next((worker.facts for worker in self.workers if worker.facts), None)

    @property
    def waiting(self) -> int:
        return sum(worker.beat.load.waiting for worker in self.workers)

    @property
    def running(self) -> int:
        return sum(worker.beat.load.running for worker in self.workers)

    @property
    def queued_cost(self) -> float:
        return sum(worker.beat.load.queued_cost for worker in self.workers)

    @property
    def max_rows(self) -> int:
        return sum(worker.beat.load.max_rows for worker in self.workers)

    @property
    def num_slots(self) -> int:
        return sum(worker.facts.num_slots for worker in self._supervisor.ready if worker.facts)

    @property
    def max_queue(self) -> float:
        """Of all workers together."""
        return self._settings.max_queue * len(self.workers)

    @property
    def workers_ready(self) -> int:
        return len(self._supervisor.ready)

    @property
    def in_flight(self) -> int:
        """Requests that are not answered yet, whether their images are made or not."""
        return max(len(self._open), self._metrics.in_flight)

    async def start(self) -> None:
        self._supervisor.tick(self._now())
        self._ticking = asyncio.create_task(self._tick())
        self._ticking.add_done_callback(log_failure)

    async def close(self) -> None:
        """What is left fails with EngineClosedError; workers are asked to end, then made to."""
        self.draining = self._is_closing = True
        self._supervisor.close(EngineClosedError())
        if self._ticking is not None:
            self._ticking.cancel()
        for worker in self._supervisor.ready:
            self.send(worker.index, messages.Stop())
        for worker in self.workers:
            if worker.state != "ready":
                self.kill(worker.index)
        _, pending = await asyncio.wait(self._tasks, timeout=CLOSE_S) if self._tasks else ((), ())
        if pending:
            log.warning("%d workers did not end in %.0f s", len(pending), CLOSE_S)
            for index in self._processes:
                self.kill(index)
            await asyncio.wait(pending, timeout=END_S + 1)

    async def generate(
        self,
        specs: Sequence[ImageSpec],
        request_id: str,
        *,
        client: str = "",
        weight: float = 1.0,
        priority: Priority = "normal",
        deadline_s: float = math.inf,
        on_accepted: OnAccepted = lambda cost: None,
    ) -> Generated:
        """The images of one request. Whoever stops waiting for them cancels it.

        `on_accepted` gets the cost, once, when it is in a queue. Raises an ApiError: before that
        NotReadyError, QueueFullError, DeadlineError or EngineClosedError.
        """
        if self.draining:
            raise EngineClosedError
        now = self._now()
        ticket = Ticket(
            id=next(self._ids),
            request_id=request_id,
            specs=list(specs),
            client=client,
            weight=weight,
            priority=priority,
            submitted_at=now,
            deadline=now + deadline_s,
        )
        self._supervisor.submit(ticket, now)
        future: asyncio.Future[Generated] = asyncio.get_running_loop().create_future()
        # An error that comes as its client leaves is nobody's any more.
        future.add_done_callback(lambda future: future.cancelled() or future.exception())
        self._open[ticket] = future, on_accepted
        try:
            return await future
        finally:
            del self._open[ticket]
            if future.cancelled():
                self._supervisor.cancel(ticket, self._now())

    # What the supervisor asks.

    def spawn(self, index: int) -> None:
        task = asyncio.create_task(self._live(index))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def restarted(self) -> None:
        self._metrics.worker_restarted()

    def kill(self, index: int) -> None:
        if index in self._processes:
            self._processes[index].kill()
        if index in self._writers:  # its end may be open still, as in a process it forked
            self._writers[index].transport.abort()

    def send(self, index: int, message: messages.ToWorker) -> None:
        """Never waits: a worker that reads nothing is killed before much has gathered."""
        if index in self._writers:
            self._writers[index].write(messages.frame(message))

    def accepted(self, ticket: Ticket, cost: float) -> None:
        future, on_accepted = self._open.get(ticket, (None, None))
        # Cancelled in this turn of the loop: its account is closed already.
        if future is not None and on_accepted is not None and not future.done():
            on_accepted(cost)

    def end(self, ticket: Ticket, result: Generated | ApiError) -> None:
        future, _ = self._open.get(ticket, (None, None))
        if future is None or future.done():
            return
        if isinstance(result, ApiError):
            future.set_exception(result)
        else:
            future.set_result(result)

    def retried(self, ticket: Ticket) -> None:
        if ticket.is_accepted:
            self._metrics.retried()
        fields = {"request_id": ticket.request_id}
        log.warning("a request is tried again: its worker died", extra=fields)

    def recovered(self, seconds: float) -> None:
        self._metrics.worker_recovered(seconds)
        log.warning("a worker is ready again, %.1f s after its death", seconds)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    async def _tick(self) -> None:
        while True:
            self._supervisor.tick(self._now())
            await asyncio.sleep(TICK_S)

    async def _live(self, index: int) -> None:
        """One life of a worker."""
        try:
            reason = await self._listen(index)
        except Exception as error:  # no memory, no processes, no descriptors: perhaps later
            log.exception("worker %d", index)
            reason = f"the worker could not be started ({type(error).__name__})"
            self.kill(index)
        self._metrics.device(index, None, None, None)
        self._supervisor.died(index, reason, self._now())
        level = logging.DEBUG if self._is_closing else logging.ERROR
        log.log(level, "worker %d is gone: %s", index, self.workers[index].reason)

    async def _listen(self, index: int) -> str:
        """Hear a new process out, until it ends; how it did."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = self._processes[index] = self._spawn(theirs.fileno())
            except OSError:
                ours.close()
                raise
        reader, writer = await asyncio.open_connection(sock=ours)
        self._writers[index] = writer
        start = messages.Start(
            folder=self._folder,
            settings=self._settings,
            index=index,
            num_workers=self._settings.workers,
            log_level=self._settings.log_level,
            log_format=self._settings.log_format,
        )
        writer.write(messages.frame(start))
        reason = ""
        try:
            while True:
                self._heard(index, await messages.read(reader))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # it ended, or closed its end, which is as bad
        except Exception as error:  # bytes that are no message: nothing it says can be relied on
            log.exception("worker %d", index)
            reason = f"the worker sent what is no message ({type(error).__name__})"
        del self._writers[index]
        writer.close()
        process.kill()
        code = await end_of(process)
        return reason or ending(code)

    def _spawn(self, descriptor: int) -> subprocess.Popen[bytes]:
        with signals_blocked():
            return subprocess.Popen(
                [*self._command, str(descriptor)],
                stdin=subprocess.DEVNULL,
                pass_fds=(descriptor,),
                env={key: value for key, value in os.environ.items() if key != KEYS_VARIABLE},
            )

    def _heard(self, index: int, message: messages.FromWorker) -> None:
        if isinstance(message, messages.Beat):
            for name, arguments in message.observations:
                getattr(self._metrics, name)(*arguments)
            self._metrics.device(index, *(message.use or (None, None, None)))
        self._supervisor.heard(index, message, self._now())


def log_failure(task: asyncio.Task[None]) -> None:
    error = None if task.cancelled() else task.exception()
    if error is not None:
        log.error("the workers are not supervised any more", exc_info=error)


async def end_of(process: subprocess.Popen[bytes]) -> int | None:
    """The exit code of a process that was killed; None where it is not gone in END_S."""
    end = time.monotonic() + END_S
    while process.poll() is None and time.monotonic() < end:
        await asyncio.sleep(POLL_S)
    return process.returncode


def ending(code: int | None) -> str:
    """How a process ended, for people."""
    if code is None:
        return "the worker could not be ended"
    if code >= 0:
        return f"the worker ended with exit code {code}"
    with suppress(ValueError):
        return f"the worker was ended by {signal.Signals(-code).name}"
    return f"the worker was ended by signal {-code}"


@contextmanager
def signals_blocked() -> Iterator[None]:
    """A child starts with them blocked: none can end it before it can say what it does with them.
    Here they are only late."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

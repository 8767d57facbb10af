"""A process with one device: runs an Engine on what it is sent, until its parent is gone."""

from __future__ import annotations

import ctypes
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from rae.server import logs, messages
from rae.server.errors import ApiError, GenerationError

if TYPE_CHECKING:
    from rae.server.engine import Engine
    from rae.server.request import Generated, Request

log = logging.getLogger(__name__)

BEAT_S = 0.1
TRIM_S = 10.0


class Relay:
    """An Observer whose calls are made again in the parent. What a killed process has not sent is
    lost: a beat of step times, but no count of requests, which the parent keeps."""

    def __init__(self) -> None:
        self._calls: deque[tuple[str, tuple[float, ...]]] = deque()

    def queued(self, seconds: float) -> None:
        self._calls.append(("queued", (seconds,)))

    def first_stepped(self, seconds: float) -> None:
        self._calls.append(("first_stepped", (seconds,)))

    def stepped(self, rows: int, seconds: float) -> None:
        self._calls.append(("stepped", (rows, seconds)))

    def evaluated(self, rows: float, saved: float) -> None:
        self._calls.append(("evaluated", (rows, saved)))

    def decoded(self, images: int, seconds: float) -> None:
        self._calls.append(("decoded", (images, seconds)))

    def take(self) -> list[tuple[str, tuple[float, ...]]]:
        return [self._calls.popleft() for _ in range(len(self._calls))]


class Worker:
    """Answers what comes over `connection`.

    Two threads send: the engine's, which says what it starts before it does, as that may be the end
    of this process; and one that reports all else, so that no step waits for images to be sent.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._outbox: queue.SimpleQueue[messages.FromWorker] = queue.SimpleQueue()
        self._requests: dict[int, Request] = {}
        self._relay = Relay()
        self._engine: Engine | None = None

    def run(self) -> None:
        try:
            start = messages.receive(self._connection)
            assert isinstance(start, messages.Start)
            logs.configure(start.log_level, start.log_format, start.index)
            threading.Thread(target=self._report, name="report", daemon=True).start()
            self._engine = engine = self._load(start)
            engine.start()
            self._obey(engine)
            engine.close()
        except (EOFError, ConnectionError):  # the parent is gone
            os._exit(1)
        os._exit(0)  # taking torch down in good order takes 2 s, and nothing is left to lose

    def _load(self, start: messages.Start) -> Engine:
        from rae.models.checkpoint import load_checkpoint
        from rae.server.devices import share_cores, visible_devices
        from rae.server.engine import Engine

        try:
            num_devices = visible_devices(start.settings.device)
            self._send(messages.Hello(num_devices))
            share_cores(start.num_workers or num_devices)
            checkpoint = load_checkpoint(start.folder, keep_bf16=True)
            return Engine(checkpoint, start.settings, self._relay, local_rank=start.index)
        except (ValueError, OSError) as error:
            self._give_up("the model could not be loaded", str(error), is_permanent=True)
        except Exception as error:
            log.exception("the model could not be loaded")
            detail = f"the model could not be loaded: {type(error).__name__}: {error}"
            self._give_up("the model could not be loaded", detail)

    def _obey(self, engine: Engine) -> None:
        while True:
            match messages.receive(self._connection):
                case messages.Submit() as submit:
                    self._submit(engine, submit)
                case messages.Cancel(ticket):
                    request = self._requests.get(ticket)
                    if request is not None:
                        engine.cancel(request)
                case _:
                    return

    def _submit(self, engine: Engine, submit: messages.Submit) -> None:
        ticket = submit.ticket
        try:
            request = engine.submit(
                submit.specs,
                submit.request_id,
                client=submit.client,
                weight=submit.weight,
                priority=submit.priority,
                deadline_s=submit.deadline_s,
                bounded=submit.bounded,
                on_start=lambda: self._send(messages.Started(ticket)),
            )
        except ApiError as error:
            if not engine.failure:  # of this process, which ends: another will take it
                self._outbox.put(messages.Refused(ticket, error))
            return
        self._outbox.put(messages.Accepted(ticket, request.cost))
        self._requests[ticket] = request
        request.future.add_done_callback(partial(self._ended, ticket))

    def _ended(self, ticket: int, future: Future[Generated]) -> None:
        self._requests.pop(ticket, None)
        if future.cancelled() or (self._engine and self._engine.failure):
            return  # nobody waits for it, or it is tried again in another process
        error = future.exception()
        if error is None:
            self._outbox.put(messages.Done(ticket, future.result()))
        elif isinstance(error, ApiError):
            self._outbox.put(messages.Refused(ticket, error))
        else:
            failure = GenerationError("step", f"the generation failed ({type(error).__name__})")
            self._outbox.put(messages.Refused(ticket, failure))

    def _report(self) -> None:
        facts, next_beat, next_trim = None, 0.0, 0.0
        while True:
            with suppress(queue.Empty):
                self._send(self._outbox.get(timeout=max(0.0, next_beat - time.monotonic())))
            if time.monotonic() < next_beat:
                continue
            next_beat = time.monotonic() + BEAT_S
            if time.monotonic() >= next_trim:
                next_trim = time.monotonic() + TRIM_S
                trim_heap()
            engine = self._engine
            if engine is None:
                self._send(messages.Beat(progress="the model is being loaded"))
                continue
            if engine.failure:
                self._give_up(engine.failure, engine.failure_detail)
            if engine.ready and facts != (facts := engine.facts()):
                self._send(facts)
            self._send(self._beat(engine))

    def _beat(self, engine: Engine) -> messages.Beat:
        observations = self._relay.take()  # first: what they led to is in the load
        busy_s, expected_s = engine.activity()
        return messages.Beat(
            progress=engine.progress,
            load=engine.load(),
            busy_s=busy_s,
            expected_s=expected_s,
            use=engine.use(),
            observations=observations,
        )

    def _send(self, message: messages.FromWorker) -> None:
        data = messages.frame(message)
        try:
            with self._sending:
                self._connection.sendall(data)
        except OSError:  # the parent is gone, and so is all reason to go on
            os._exit(1)

    def _give_up(self, reason: str, detail: str, *, is_permanent: bool = False) -> NoReturn:
        """At once: a device that has failed may not let go of its process in an orderly way."""
        self._send(messages.Failed(reason, detail, is_permanent))
        os._exit(1)


def trim_heap() -> None:
    """Give back to the system what lies free between blocks in use, where malloc is glibc's.

    Steps of ever other sizes leave it in pieces: after 150 s of load the digits' 1,287 MB on a CPU
    became 1,164. One call took 9 to 16 ms.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def main() -> None:
    # A terminal and a service manager signal the whole group; the parent says when to stop.
    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    Worker(socket.socket(fileno=int(sys.argv[1]))).run()


if __name__ == "__main__":
    main()

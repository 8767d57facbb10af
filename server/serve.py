"""`rae serve`: a port, a model, and uvicorn between a line that says where and a clean end."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from rae.models.checkpoint_config import read_config
from rae.server import logs
from rae.server.access import proxies
from rae.server.app import create_app
from rae.server.connections import protocol
from rae.server.environment import unknown_variables
from rae.server.metrics import Metrics
from rae.server.pool import Pool
from rae.server.serve_settings import ServeSettings
from rae.server.stopping import Stopping
from rae.server.tracing import start_tracing

log = logging.getLogger(__name__)

PROGRESS_S = 5
POLL_S = 0.05
# For answers to be read, once all are made.
ANSWER_S = 5
BACKLOG = 2048


class Server(uvicorn.Server):
    """Says where it is once a worker is ready; ends with exit code 0 when it is told to stop."""

    def __init__(
        self,
        config: uvicorn.Config,
        pool: Pool,
        listener: socket.socket,
        grace_s: float,
        announce: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self.pool, self.listener, self.announce = pool, listener, announce
        self.grace_s = grace_s

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """They are `Stopping`'s: uvicorn would close the port first, and end by the signal."""
        yield

    async def main_loop(self) -> None:
        watching = asyncio.create_task(self.watch())
        await super().main_loop()
        await watching

    async def watch(self) -> None:
        """Say how the start goes, and that it is over; end the server when it is told to stop, or
        no worker can be had."""
        try:
            await self.announce_and_wait()
            await self.drain()
        finally:
            self.should_exit = True

    async def announce_and_wait(self) -> None:
        said, is_announced = time.monotonic(), False
        while not (self.pool.failure or self.stopping.signals):
            if self.pool.ready and not is_announced:
                self.announce()
                is_announced = True
            elif not self.pool.ready and time.monotonic() - said > PROGRESS_S:
                log.info("; ".join(self.pool.reasons))
                said = time.monotonic()
            await asyncio.sleep(POLL_S)

    async def drain(self) -> None:
        """The port stays open, so that whoever comes, and asks whether it is ready, is told."""
        self.pool.draining = True
        end = time.monotonic() + self.grace_s
        if self.pool.in_flight:
            log.info("finishing %d requests, for at most %g s", self.pool.in_flight, self.grace_s)
        while self.pool.in_flight and time.monotonic() < end and self.stopping.signals < 2:
            await asyncio.sleep(POLL_S)
        await self.pool.close()

    def serve_until_stopped(self, stopping: Stopping) -> str | None:
        """Until SIGTERM or SIGINT; what runs then is finished, for at most `grace_s`, or until the
        second one. Returns why it stopped by itself, if it did."""
        self.stopping = stopping
        stopping.serve()
        self.run([self.listener])
        return self.pool.failure


def prepare(settings: ServeSettings, say: Callable[[str], None]) -> Server:
    """`say` gets the lines for people.

    Raises ValueError or OSError for a setting or a checkpoint that cannot be used.
    """
    logs.configure(settings.log_level, settings.log_format)
    for line in unknown_variables(os.environ):
        log.warning(line)
    forwarded_allow_ips = proxies(settings.trusted_proxies)
    tracing = start_tracing(settings.otel)
    # A published model may be downloaded here: nobody should be let in to wait for that.
    folder = settings.find_folder(say)
    # Before a model is loaded, so that a port that is taken is said at once.
    listener = listen(settings.host, settings.port)
    try:
        checkpoint, sha256 = read_config(folder)
        metrics = Metrics()
        pool = Pool(folder, settings, metrics)
        app = create_app(pool, checkpoint, sha256, metrics, settings, tracing)
    except (ValueError, OSError):
        listener.close()
        raise
    metrics.watch(pool, checkpoint.name)
    say(f"Loading {checkpoint.name} ...")
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level=settings.log_level,
        access_log=False,
        root_path=settings.root_path,
        timeout_graceful_shutdown=ANSWER_S,
        backlog=BACKLOG,
        forwarded_allow_ips=forwarded_allow_ips,
        http=protocol(settings, metrics),
        ws="none",
        timeout_keep_alive=math.ceil(settings.keep_alive),
    )
    text = welcome(settings.host, listener.getsockname()[1], checkpoint.name)
    return Server(config, pool, listener, settings.grace, lambda: say(text))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ValueError that says what to change."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reason = f"port {port} of {host} is taken; choose another with --port or RAE_PORT"
        else:
            reason = f"cannot listen on {host} port {port} (--host, --port): {error.strerror}"
        raise ValueError(reason) from error


def welcome(host: str, port: int, name: str) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    return "\n".join(
        (
            f"Ready: {url} serves {name}",
            f"Docs:  {url}/docs",
            f"Try:   curl -s {url}/generate -H 'content-type: application/json' "
            """-d '{"class_id": 0}' -o image.png""",
        )
    )

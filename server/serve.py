"""`rae serve`: a port, a model, and uvicorn between a line that says where and a clean end."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import time
from collections.abc import Callable

import uvicorn

from rae.models.checkpoint import load_checkpoint
from rae.server.app import create_app
from rae.server.engine import Engine
from rae.server.metrics import Metrics
from rae.server.serve_settings import ServeSettings

log = logging.getLogger(__name__)

GRACE_S = 30
PROGRESS_S = 5
BACKLOG = 2048


class Server(uvicorn.Server):
    """Says where it is once the engine is ready; ends with exit code 0 when it is told to stop."""

    def __init__(
        self,
        config: uvicorn.Config,
        engine: Engine,
        listener: socket.socket,
        announce: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self.engine, self.listener, self.announce = engine, listener, announce

    async def main_loop(self) -> None:
        waiting = asyncio.create_task(self.watch())
        await super().main_loop()
        waiting.cancel()

    async def watch(self) -> None:
        """Say how the warm-up goes, and that it is over; end the server where the engine fails."""
        said, is_announced = time.monotonic(), False
        while not self.engine.failure:
            if self.engine.ready and not is_announced:
                self.announce()
                is_announced = True
            elif not self.engine.ready and time.monotonic() - said > PROGRESS_S:
                log.info(self.engine.progress)
                said = time.monotonic()
            await asyncio.sleep(0.05)
        self.should_exit = True

    def serve_until_stopped(self) -> str | None:
        """Until SIGTERM or SIGINT; what runs then is finished, for at most GRACE_S.

        Returns why it stopped by itself, if it did.
        """
        # uvicorn raises the signal that stopped it once more: the default would end us by it.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        self.run([self.listener])
        return self.engine.failure


def prepare(settings: ServeSettings, say: Callable[[str], None]) -> Server:
    """`say` gets the lines for people.

    Raises ValueError for a port, a checkpoint or a device that cannot be used.
    """
    logging.basicConfig(level=settings.log_level.upper(), format="%(levelname)s: %(message)s")
    # A published model may be downloaded here: nobody should be let in to wait for that.
    folder = settings.find_folder(say)
    # Before the model is loaded, so that a port that is taken is said at once.
    listener = listen(settings.host, settings.port)
    try:
        checkpoint = load_checkpoint(folder, keep_bf16=True)
        metrics = Metrics()
        engine = Engine(checkpoint, settings, metrics)
    except (ValueError, OSError):
        listener.close()
        raise
    name = checkpoint.config.name
    metrics.watch(engine, name)
    say(f"Warming up {name} on {engine.device} in {engine.precision} ...")
    config = uvicorn.Config(
        create_app(engine, checkpoint, metrics, settings),
        log_level=settings.log_level,
        root_path=settings.root_path,
        timeout_graceful_shutdown=GRACE_S,
        backlog=BACKLOG,
    )
    text = welcome(settings.host, listener.getsockname()[1], name)
    return Server(config, engine, listener, lambda: say(text))


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

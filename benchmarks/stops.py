"""SIGTERM at random moments of a server's life, from when its handler stands.

    python benchmarks/stops.py [--model FOLDER] [--stops 20] [--json FILE]

Servers one after the other, each stopped once: while it starts, while it warms up and is asked for
images already, under load, and idle with connections that are kept alive, that never said a word,
or that are in the middle of a head.

Asked for: exit code 0; every request that was sent before the signal gets 200 or an error that says
why, and 200 where the server had accepted it; no process is left.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from arrivals import Subject, percentiles
from http_client import Client, Connection, NoAnswerError, generate_message, message
from live_server import STOP_TIMEOUT_S, LiveServer, start_server
from load import DROPPED, HUNG, Figures
from service_checks import conclude, scrape

REQUESTS = 16
IDLE = 8
QUESTION = generate_message({"class_id": 0, "steps": 50})

UNCLEAR = "an unclear error"
FAILURES = {HUNG, DROPPED, UNCLEAR}


@dataclass
class Life:
    """What goes on in a server when it is stopped."""

    asked: list[asyncio.Task[str]] = field(default_factory=list)
    connections: list[Connection] = field(default_factory=list)


def free_port() -> int:
    """Of a moment ago: a server says its own only when it is ready."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


async def status_of(client: Client, data: bytes) -> str:
    """How a request ended: its status, or what was wrong with it."""
    try:
        answer, _ = await client.request(data)
    except NoAnswerError:
        return DROPPED
    except TimeoutError:
        return HUNG
    return str(answer.status) if answer.status == 200 or answer.is_clear_error else UNCLEAR


def ask(client: Client, data: Sequence[bytes]) -> list[asyncio.Task[str]]:
    return [asyncio.create_task(status_of(client, each)) for each in data]


async def while_starting(server: LiveServer, client: Client, draw: np.random.Generator) -> Life:
    return Life()


async def while_warming_up(server: LiveServer, client: Client, draw: np.random.Generator) -> Life:
    """Images are asked for once it answers at all."""
    while True:
        with suppress(NoAnswerError):
            await client.request(message("GET", "/health/live"))
            return Life(ask(client, [QUESTION] * 4))
        await asyncio.sleep(0.005)


async def under_load(server: LiveServer, client: Client, draw: np.random.Generator) -> Life:
    """All that was asked for has been accepted."""
    await asyncio.to_thread(server.wait_until_ready)
    subject = await Subject.of(client)
    asked = ask(client, [generate_message(fields) for fields in subject.draw(REQUESTS, draw)])
    accepted = 0.0
    while accepted < REQUESTS:
        metrics = await scrape(client)
        inside = metrics["rae_waiting_images"] + metrics["rae_running_images"]
        accepted = max(accepted, inside + sum(task.done() for task in asked))
    return Life(asked)


async def when_idle(server: LiveServer, client: Client, draw: np.random.Generator) -> Life:
    """With connections that were used, one that never was, and one in the middle of a head."""
    await asyncio.to_thread(server.wait_until_ready)
    await asyncio.gather(*(client.request(message("GET", "/info")) for _ in range(IDLE)))
    others = [await Connection.open(server.host, server.port) for _ in range(2)]
    others[1].send(QUESTION[:20])
    return Life(connections=others)


Begin = Callable[[LiveServer, Client, np.random.Generator], Awaitable[Life]]
MOMENTS: dict[str, tuple[Begin, float]] = {
    "starting": (while_starting, 0.3),
    "warming up": (while_warming_up, 2.0),
    "load": (under_load, 1.0),
    "idle": (when_idle, 1.0),
}
"""What there is to stop, and up to how many seconds later the signal comes."""


async def stop_once(folder: Path | None, moment: str, draw: np.random.Generator) -> Figures:
    begin, latest_s = MOMENTS[moment]
    with start_server(folder, port=free_port()) as server:
        while not server.catches(signal.SIGTERM):
            if server.process.poll() is not None:
                raise RuntimeError(f"stops: the server ended by itself: {server.text[-2000:]}")
            await asyncio.sleep(0.001)
        client = server.client()
        life = await begin(server, client, draw)
        after_s = draw.uniform(0, latest_s)
        await asyncio.sleep(after_s)
        signalled = time.perf_counter()
        pids = server.pids()
        server.process.send_signal(signal.SIGTERM)
        exit_code = await asyncio.to_thread(server.wait, STOP_TIMEOUT_S)
        exit_s = time.perf_counter() - signalled
        left = server.kill(pids)
        statuses = Counter(await asyncio.gather(*life.asked))
        for connection in life.connections:
            connection.leave()
        await client.close()
        figures = {"moment": moment, "after_s": after_s, "exit_code": exit_code, "exit_s": exit_s}
        figures |= {"left_behind": left, "by_status": statuses}
        figures["tracebacks"] = server.text.count("Traceback")
        if exit_code or figures["tracebacks"]:
            sys.stdout.write(f"the end of the server's log:\n{server.text[-3000:]}\n")
    return figures


def criteria_of(stops: Sequence[Figures]) -> dict[str, bool]:
    statuses = {status for stop in stops for status in stop["by_status"]}
    loaded = {status for s in stops if s["moment"] == "load" for status in s["by_status"]}
    return {
        "every exit code is 0": all(stop["exit_code"] == 0 for stop in stops),
        "every request that was sent is answered, or refused with a reason": not statuses
        & FAILURES,
        "what was accepted is finished": loaded <= {"200"},
        "no traceback": not any(stop["tracebacks"] for stop in stops),
        "no process is left": not any(stop["left_behind"] for stop in stops),
    }


async def measure(args: argparse.Namespace) -> int:
    draw = np.random.default_rng(args.seed)
    stops = []
    for moment in islice(cycle(MOMENTS), args.stops):
        stops.append(await stop_once(args.model, moment, draw))
        stop = stops[-1]
        sys.stdout.write(
            f"{moment}, {stop['after_s']:.2f} s later: exit code {stop['exit_code']} after "
            f"{stop['exit_s']:.2f} s, requests: {dict(stop['by_status'])}\n"
        )
    by_moment = {
        moment: percentiles([stop["exit_s"] for stop in stops if stop["moment"] == moment])
        for moment in MOMENTS
    }
    return conclude("stops", {"exit_s": by_moment, "stops": stops}, criteria_of(stops), args.json)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, help="a checkpoint folder; default: the digits")
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())

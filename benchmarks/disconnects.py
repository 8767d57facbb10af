"""Clients that leave at random moments, thousands of them, beside some that stay.

    python benchmarks/disconnects.py [--clients 10000] [--at-once 200] [--json FILE]

A client leaves in the middle of its headers, of its body, while its images wait or run, or while
the answer is on its way (into a receive buffer that does not hold it), with a FIN or with a RST.
Beside them GOOD clients, at an address of their own, ask for images that were made alone before,
one after another.

Asked for: every image of those is the same bytes, all that is accepted is given back (the gauges
are zero), no file descriptor is left open, and counters agree.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import Sequence
from itertools import chain, cycle
from pathlib import Path

import numpy as np
from arrivals import Fields, Known, Subject, know, percentiles
from http_client import Client, Connection, NoAnswerError, generate_message
from live_server import LiveServer, start_server
from load import Figures, Outcome, ask
from service_checks import conclude, end, settle, usage_at_rest

GOOD, ADDRESS = 4, "127.0.0.2"
KNOWN = 30
MOMENTS = ("headers", "body", "waiting", "running", "answer")
LONGEST_WAIT_S = 2.0
SMALL_BUFFER = 2048


async def leave(server: LiveServer, fields: Fields, moment: str, draw: np.random.Generator) -> None:
    """One client's short life. Raises NoAnswerError where the server is gone."""
    small = SMALL_BUFFER if moment == "answer" else None
    connection = await Connection.open(server.host, server.port, receive_buffer=small)
    try:
        if moment == "answer":  # the more images, the longer the answer is on its way
            fields = fields | {"n": 16, "steps": 2, "cfg": 1.0}
        data = generate_message(fields, "application/json")
        head = data.index(b"\r\n\r\n") + 4
        cut = {
            "headers": int(draw.integers(1, head)),
            "body": int(draw.integers(head, len(data))),
        }
        connection.send(data[: cut.get(moment, len(data))])
        if moment == "running":
            await asyncio.sleep(draw.uniform(0, LONGEST_WAIT_S))
        elif moment == "answer":
            async with asyncio.timeout(60):
                await connection.reader.read(100)
        else:
            await asyncio.sleep(draw.uniform(0, 0.05))
    except OSError:  # the server was the first to close it
        pass
    finally:
        connection.leave(reset=bool(draw.integers(2)))


async def leave_all(
    server: LiveServer, clients: int, at_once: int, subject: Subject, draw: np.random.Generator
) -> Counter[str]:
    """How often which moment came, and what went wrong."""
    counts: Counter[str] = Counter()
    left = iter(range(clients))

    async def work() -> None:
        for _ in left:
            moment = str(draw.choice(MOMENTS))
            counts[moment] += 1
            try:
                await leave(server, subject.draw(1, draw)[0], moment, draw)
            except (NoAnswerError, TimeoutError) as error:
                counts[f"failed: {type(error).__name__}"] += 1

    await asyncio.gather(*(work() for _ in range(at_once)))
    return counts


async def stay(client: Client, known: Sequence[Known], is_over: asyncio.Event) -> list[Outcome]:
    """A client that waits for each of its images, and asks for no more once `is_over`."""
    outcomes = []
    for each in cycle(known):
        outcomes.append(await ask(client, each, time.perf_counter()))
        if is_over.is_set():
            break
    return outcomes


async def run(server: LiveServer, args: argparse.Namespace) -> tuple[Figures, dict[str, bool]]:
    draw = np.random.default_rng(args.seed)
    client = server.client(ADDRESS)
    subject = await Subject.of(client)
    known = await know(client, subject.draw(KNOWN, draw))
    # What the first of many connections opens for good, such as threads, counts as before.
    await leave_all(server, 200, 50, subject, draw)
    await settle(client)
    await client.close()
    before = await usage_at_rest(server)
    is_over, started = asyncio.Event(), time.perf_counter()
    good = [asyncio.create_task(stay(client, known, is_over)) for _ in range(GOOD)]
    counts = await leave_all(server, args.clients, args.at_once, subject, draw)
    seconds = time.perf_counter() - started
    is_over.set()
    outcomes = list(chain.from_iterable(await asyncio.gather(*good)))
    after, criteria = await end(server, client)
    fds = (before["fds"], after["usage"]["fds"])
    return {
        "clients": args.clients,
        "at_once": args.at_once,
        "seconds": seconds,
        "moments": counts,
        "good": Counter(str(outcome.status) for outcome in outcomes),
        "good_latency_s": percentiles([outcome.latency_s for outcome in outcomes]),
        "usage_before": before,
    } | after, {
        "nobody who left found the server gone": set(counts) <= set(MOMENTS),
        "every image of who stayed is there, and right": all(each.is_right for each in outcomes),
        f"file descriptors before and after: {fds}": fds[1] <= fds[0],
    } | criteria


async def measure(args: argparse.Namespace) -> int:
    with start_server(args.model) as server:
        await asyncio.to_thread(server.wait_until_ready)
        figures, criteria = await run(server, args)
    sys.stdout.write(
        f"{args.clients} clients left in {figures['seconds']:.0f} s, {args.at_once} at a time: "
        f"{dict(figures['moments'])}\nthose who stayed: {dict(figures['good'])} "
        f"{figures['good_latency_s']}\n"
    )
    return conclude("disconnects", figures, criteria, args.json)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, help="a checkpoint folder; default: the digits")
    parser.add_argument("--clients", type=int, default=10_000, help="how many leave")
    parser.add_argument("--at-once", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())

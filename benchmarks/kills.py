"""A worker process that is killed (SIGKILL) again and again under load.

    python benchmarks/kills.py [--model FOLDER] [--kills 50] [--json FILE]

CONNECTIONS ask for images that were made alone before, always; what is refused is asked for again
after a moment. At a random moment one worker, a child of the server, is killed. Recovery is from
then to the first 200 of a request that was sent after the kill, and to the first 200 of
/health/ready while a new worker is there; then comes the next kill.

Asked for: every request gets 200 or an error that says what happened, in 60 s; every image is the
same bytes as before the first kill; each kill is recovered from; at the end gauges are zero,
counters agree and no process is left.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from arrivals import Known, Subject, know, percentiles
from http_client import Client, NoAnswerError, message
from live_server import SERVE_HELP, LiveServer, start_server
from load import Figures, Outcome, ask
from service_checks import conclude, end

CONNECTIONS = 8
KNOWN = 40
RECOVERY_TIMEOUT_S = 120.0
AGAIN_S = 0.05
LONGEST_PAUSE_S = 2.0


class Load:
    """Requests without an end; `outcomes` grows."""

    def __init__(self, client: Client, known: Sequence[Known], draw: np.random.Generator) -> None:
        self.client, self.known, self.draw = client, known, draw
        self.outcomes: list[Outcome] = []
        self.is_over = False
        self.tasks = [asyncio.create_task(self._work()) for _ in range(CONNECTIONS)]

    async def _work(self) -> None:
        while not self.is_over:
            known = self.known[int(self.draw.integers(len(self.known)))]
            outcome = await ask(self.client, known, time.perf_counter())
            self.outcomes.append(outcome)
            if outcome.status != 200:
                await asyncio.sleep(AGAIN_S)

    async def first_done(self, since: float, seen: int) -> float | None:
        """When the first request was done that was sent after `since`; None if none is in time.
        The first `seen` outcomes ended before."""
        while time.perf_counter() < since + RECOVERY_TIMEOUT_S:
            new = self.outcomes[seen:]
            done = [each.ended for each in new if each.status == 200 and each.sent > since]
            if done:
                return min(done)
            await asyncio.sleep(0.002)
        return None

    async def finish(self) -> None:
        self.is_over = True
        await asyncio.gather(*self.tasks)


async def first_ready(
    server: LiveServer, client: Client, killed: int, workers: int, since: float
) -> float | None:
    """When /health/ready was first 200 while another worker stood in for the one that was killed;
    None if that is not in time."""
    while time.perf_counter() < since + RECOVERY_TIMEOUT_S:
        with suppress(NoAnswerError, TimeoutError):
            answer, _ = await client.request(message("GET", "/health/ready"))
            now = time.perf_counter()
            if answer.status == 200 and len(set(server.workers()) - {killed}) == workers:
                return now
        await asyncio.sleep(0.01)
    return None


async def kill_one(server: LiveServer, client: Client, load: Load) -> Figures:
    """Kill a worker, and what it takes until all is well again."""
    workers = server.workers()
    killed = workers[int(load.draw.integers(len(workers)))]
    seen, since = len(load.outcomes), time.perf_counter()
    os.kill(killed, signal.SIGKILL)
    ready, done = await asyncio.gather(
        first_ready(server, client, killed, len(workers), since), load.first_done(since, seen)
    )
    return {
        "ready_s": None if ready is None else ready - since,
        "recovery_s": None if done is None else done - since,
        "by_status": Counter(str(each.status) for each in load.outcomes[seen:]),
    }


async def run(server: LiveServer, args: argparse.Namespace) -> tuple[Figures, dict[str, bool]]:
    """Raises RuntimeError where the server has no worker process."""
    draw = np.random.default_rng(args.seed)
    client = server.client()
    if not server.workers():
        raise RuntimeError("kills: this server has no worker process to kill")
    known = await know(client, (await Subject.of(client)).draw(KNOWN, draw))
    load = Load(client, known, draw)
    kills: list[Figures] = []
    for i in range(args.kills):
        await asyncio.sleep(draw.uniform(0, LONGEST_PAUSE_S))
        kills.append(await kill_one(server, client, load))
        sys.stdout.write(f"kill {i + 1}: {kills[-1]}\n")
    await load.finish()
    figures, criteria = await end(server, client)
    is_whole = all(kill["ready_s"] and kill["recovery_s"] for kill in kills)
    return {
        "by_status": Counter(str(each.status) for each in load.outcomes),
        "longest_request_s": max(each.latency_s for each in load.outcomes),
        **{
            name: percentiles([kill[name] for kill in kills if kill[name] is not None])
            for name in ("ready_s", "recovery_s")
        },
        "kills": kills,
    } | figures, {
        "every request gets 200 or a clear error in 60 s": all(
            each.status == 200 or each.is_clear for each in load.outcomes
        ),
        "every image is the one made before": all(
            each.is_right for each in load.outcomes if each.status == 200
        ),
        f"every kill is recovered from in {RECOVERY_TIMEOUT_S:.0f} s": is_whole,
    } | criteria


async def measure(args: argparse.Namespace) -> int:
    with start_server(args.model, args.serve) as server:
        await asyncio.to_thread(server.wait_until_ready)
        figures, criteria = await run(server, args)
    sys.stdout.write(
        f"requests: {dict(figures['by_status'])}, longest {figures['longest_request_s']:.1f} s\n"
        f"the first 200 after a kill: {figures['recovery_s']}\nready: {figures['ready_s']}\n"
    )
    return conclude("kills", figures, criteria, args.json)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, help="a checkpoint folder; default: the digits")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", action="append", default=[], help=SERVE_HELP)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())

"""A server below, at and far above what it can do: open-loop load over real sockets.

    python benchmarks/load.py [--model FOLDER] [--seconds 300] [--json FILE]

Two servers one after the other, each with its children on all cores but one; the generator, this
process, has that one. Requests are of one image: 10 to 50 steps, guidance off, 1.5 or 3, any class,
of KNOWN that were made alone before. Every image has to be the same bytes as then.

- capacity: CONNECTIONS that each send the next request when they have an answer (closed loop).
  From it follows the second server's `--max-queue`: --queue-s seconds of work. The default is much
  longer: it suits clients that would rather wait than come again.
- then Poisson arrivals (open loop) at 0.5, 1, 2 and 5 times the capacity, --seconds each. Latency
  is from the moment that a request was due, whether or not the generator was late to send it.
- the capacity once more: other work may have slowed the first. Goodput is of the larger one.

Asked for: no 5xx, nothing without an answer in 60 s; at 5 times goodput of 90 % of the capacity, a
generator that keeps up, and p99 of at most BOUND times --queue-s (images share the device: large
ones wait for small ones that came later, which a full queue lets in the more easily). Where other
work takes the server's cores, `server_cpu` says so; then compare images per second of its CPU time.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from arrivals import Known, Subject, know, percentiles, poisson_times
from http_client import Client, NoAnswerError
from live_server import SERVE_HELP, LiveServer, start_server
from service_checks import conclude, end, scrape, settle

MULTIPLES = (0.5, 1.0, 2.0, 5.0)
CONNECTIONS = 64
KNOWN = 100
GOODPUT_GOAL, BOUND = 0.9, 6.0
MAX_LAG_S = 0.1
HUNG, DROPPED = "no answer in 60 s", "no answer"

Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Times are of `perf_counter`; `status` is that of HTTP, or why there is none."""

    due: float
    sent: float
    ended: float
    status: int | str
    is_right: bool = False
    is_clear: bool = False
    retry_after_s: int | None = None

    @property
    def latency_s(self) -> float:
        return self.ended - self.due


class Clock:
    """Processor seconds since it was made: this process's, and all the server's."""

    def __init__(self, server: LiveServer) -> None:
        self.server = server
        self.own_s, self.server_s = self._now()

    def _now(self) -> tuple[float, float]:
        return time.process_time(), self.server.usage()["cpu_s"]

    def read(self) -> tuple[float, float]:
        own_s, server_s = self._now()
        return own_s - self.own_s, server_s - self.server_s


async def ask(client: Client, known: Known, due: float) -> Outcome:
    try:
        answer, sent = await client.request(known.data)
    except (NoAnswerError, TimeoutError) as error:
        status = HUNG if isinstance(error, TimeoutError) else DROPPED
        return Outcome(due=due, sent=due, ended=time.perf_counter(), status=status)
    retry_after = answer.headers.get("retry-after")
    return Outcome(
        due=due,
        sent=sent,
        ended=time.perf_counter(),
        status=answer.status,
        is_right=known.is_right(answer),
        is_clear=answer.is_clear_error,
        retry_after_s=int(retry_after) if retry_after else None,
    )


async def closed_loop(
    client: Client, known: Sequence[Known], seconds: float, draw: np.random.Generator
) -> list[Outcome]:
    """CONNECTIONS that always have a request under way, none sent after `seconds`."""
    outcomes: list[Outcome] = []
    end = time.perf_counter() + seconds

    async def work() -> None:
        while (now := time.perf_counter()) < end:
            outcomes.append(await ask(client, known[int(draw.integers(len(known)))], now))

    await asyncio.gather(*(work() for _ in range(CONNECTIONS)))
    return outcomes


async def open_loop(
    client: Client, known: Sequence[Known], times: Sequence[float], draw: np.random.Generator
) -> list[Outcome]:
    """A request at each of `times`, in seconds from now, whatever became of those before."""
    started = time.perf_counter()
    tasks = []
    for offset in times:
        await asyncio.sleep(started + offset - time.perf_counter())
        chosen = known[int(draw.integers(len(known)))]
        tasks.append(asyncio.create_task(ask(client, chosen, started + offset)))
    return await asyncio.gather(*tasks)


def describe(outcomes: Sequence[Outcome], seconds: float, cpu_s: float, server_s: float) -> Figures:
    """Of what was sent in `seconds`; goodput counts what was also answered in them. `cpu_s` is the
    generator's processor time, `server_s` the server's, until the last answer."""
    elapsed = max(outcome.ended for outcome in outcomes) - min(outcome.due for outcome in outcomes)
    done = [outcome for outcome in outcomes if outcome.status == 200]
    end = min(outcome.due for outcome in outcomes) + seconds
    return {
        "requests": len(outcomes),
        "by_status": dict(sorted(Counter(str(o.status) for o in outcomes).items())),
        "goodput_per_s": sum(outcome.ended <= end for outcome in done) / seconds,
        "goodput_per_server_cpu_s": len(done) / server_s,
        "latency_s": percentiles([outcome.latency_s for outcome in done]),
        "refusal_s": percentiles([o.latency_s for o in outcomes if o.status == 429]),
        "retry_after_s": percentiles([o.retry_after_s for o in outcomes if o.retry_after_s]),
        "without_retry_after": sum(o.status == 429 and not o.retry_after_s for o in outcomes),
        "wrong_images": sum(not outcome.is_right for outcome in done),
        "unclear_errors": sum(o.status != 200 and not o.is_clear for o in outcomes),
        "generator_lag_s": percentiles([outcome.sent - outcome.due for outcome in outcomes]),
        "generator_cpu": cpu_s / elapsed,
        "server_cpu": server_s / elapsed,
    }


@asynccontextmanager
async def running(
    folder: Path | None, flags: Sequence[str], seed: int
) -> AsyncIterator[tuple[LiveServer, Client, list[Known]]]:
    """A server that is ready, and requests whose images it has made alone."""
    with start_server(folder, flags) as server:
        await asyncio.to_thread(server.wait_until_ready)
        client = server.client()
        subject = await Subject.of(client)
        yield server, client, await know(client, subject.draw(KNOWN, np.random.default_rng(seed)))
        await client.close()


async def measure_capacity(
    server: LiveServer, client: Client, known: Sequence[Known], seconds: float
) -> Figures:
    draw = np.random.default_rng(0)
    await closed_loop(client, known, min(5.0, seconds), draw)
    before, clock = await scrape(client), Clock(server)
    outcomes = await closed_loop(client, known, seconds, draw)
    figures = describe(outcomes, seconds, *clock.read())
    rows = (await scrape(client))["rae_rows_evaluated_total"] - before["rae_rows_evaluated_total"]
    elapsed = max(o.ended for o in outcomes) - min(o.due for o in outcomes)
    sys.stdout.write(line("capacity", figures))
    return figures | {"connections": CONNECTIONS, "evaluations_per_s": rows / elapsed}


async def measure_open(
    args: argparse.Namespace, capacity: Figures
) -> tuple[Figures, Figures, dict[str, bool]]:
    """The phases by multiple of the capacity, the server after them, and criteria of that."""
    draw = np.random.default_rng(args.seed)
    max_queue = round(args.queue_s * capacity["evaluations_per_s"])
    phases: Figures = {}
    flags = [f"--max-queue={max_queue}", *args.serve]
    async with running(args.model, flags, args.seed) as parts:
        server, client, known = parts
        for multiple in MULTIPLES:
            rate = multiple * capacity["goodput_per_s"]
            times = poisson_times(rate, args.seconds, draw)
            clock = Clock(server)
            outcomes = await open_loop(client, known, times.tolist(), draw)
            figures = describe(outcomes, args.seconds, *clock.read())
            phases[f"{multiple:g}"] = {"rate_per_s": rate} | figures
            sys.stdout.write(line(f"{multiple:g} x", figures))
            await settle(client)
        again = await measure_capacity(server, client, known, args.seconds)
        after, criteria = await end(server, client)
    return phases, {"max_queue": max_queue, "capacity_afterwards": again} | after, criteria


def line(name: str, figures: Figures) -> str:
    shown = ", ".join(f"{key} {value:.2f} s" for key, value in figures["latency_s"].items())
    statuses = ", ".join(f"{n} of {status}" for status, n in figures["by_status"].items())
    lag = figures["generator_lag_s"]["p99"]
    return (
        f"{name:9}{figures['goodput_per_s']:6.1f} images/s  {shown}  {statuses}\n"
        f"{'':9}generator: late p99 {1000 * lag:.0f} ms, {figures['generator_cpu']:.0%} of a core; "
        f"server: {figures['server_cpu']:.0%}, "
        f"{figures['goodput_per_server_cpu_s']:.1f} images per second of it\n"
    )


def criteria_of(capacities: Sequence[Figures], phases: Figures, queue_s: float) -> dict[str, bool]:
    all_phases = [*capacities, *phases.values()]
    top = phases[f"{MULTIPLES[-1]:g}"]
    statuses = {status for phase in all_phases for status in phase["by_status"]}
    share = top["goodput_per_s"] / max(each["goodput_per_s"] for each in capacities)
    p99 = top["latency_s"].get("p99", float("inf"))
    return {
        "every answer is 200 or 429": statuses <= {"200", "429"},
        "every 429 has Retry-After and says why": not any(
            phase["without_retry_after"] or phase["unclear_errors"] for phase in all_phases
        ),
        "every image is the one made alone": not any(p["wrong_images"] for p in all_phases),
        f"goodput at 5 x is {share:.2f} of the capacity, {GOODPUT_GOAL} asked": (
            share >= GOODPUT_GOAL
        ),
        f"p99 at 5 x is {p99:.1f} s, at most {BOUND * queue_s:.0f} s": p99 <= BOUND * queue_s,
        "the generator keeps up": top["generator_lag_s"]["p99"] <= MAX_LAG_S,
    }


async def measure(args: argparse.Namespace) -> int:
    async with running(args.model, args.serve, args.seed) as parts:
        capacity = await measure_capacity(*parts, args.seconds)
    phases, after, criteria = await measure_open(args, capacity)
    figures = {"seconds": args.seconds, "queue_s": args.queue_s, "capacity": capacity}
    figures |= {"phases": phases, "after": after}
    criteria = (
        criteria_of([capacity, after["capacity_afterwards"]], phases, args.queue_s) | criteria
    )
    return conclude("load", figures, criteria, args.json)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, help="a checkpoint folder; default: the digits")
    parser.add_argument("--seconds", type=float, default=300, help="of each rate")
    parser.add_argument("--queue-s", type=float, default=3, help="of work that --max-queue lets in")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", action="append", default=[], help=SERVE_HELP)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())

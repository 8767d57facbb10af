"""One server for an hour, with everything that clients do at once, and what it uses meanwhile.

    python benchmarks/soak.py [--model FOLDER] [--seconds 3600] [--json FILE] [--plot FILE]

Poisson arrivals, a phase each at SHARES of the capacity in images (of a server before, in a closed
loop), again and again; the queue takes QUEUE_S of work, as nobody waits for minutes. Of
KINDS each has its share: images that were made alone before, several images, other formats,
priorities, deadlines that can and that cannot be met, clients that leave, bodies that are refused,
and looks at health and metrics. Every SAMPLE_S memory, threads, file descriptors and gauges are
read. After --warm-up, and at the end, nothing is asked for a moment: both are compared.

Asked for: answers of the statuses that are right for their kind, at most MAX_REFUSED of them 429,
and the same bytes for each image; growth of less than MAX_GROWTH_MB in all processes together, and
none of file descriptors, from the warm-up to the end; gauges that are zero then; and counters that
agree.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path

import numpy as np
from arrivals import Fields, Known, Subject, know, percentiles, poisson_times
from disconnects import MOMENTS, leave
from http_client import NoAnswerError, generate_message, message
from live_server import LiveServer, start_server
from load import DROPPED, HUNG, Figures, measure_capacity, running
from service_checks import GAUGES, conclude, end, scrape, settle, usage_at_rest

SHARES = (0.3, 0.6, 0.8, 0.5)
PHASE_S = 60.0
SAMPLE_S = 10.0
KNOWN = 60
CAPACITY_S = 20.0
QUEUE_S = 20.0
MAX_REFUSED = 0.01
MAX_GROWTH_MB = 50.0

KINDS = {
    "known": (0.4, {"200"}),
    "several": (0.1, {"200"}),
    "format": (0.1, {"200"}),
    "priority": (0.1, {"200"}),
    "deadline": (0.1, {"200", "504"}),
    "leaves": (0.1, {"left"}),
    "refused": (0.05, {"400", "413", "415", "422"}),
    "look": (0.05, {"200"}),
}
"""The share of each kind of request, and what it may be answered with; all that ask for images also
with 429, a few of them."""
SEVERAL = (2, 8)
IMAGES_PER_REQUEST = 0.9 + 0.1 * (sum(SEVERAL) / 2 - 1)
"""As if all stayed and none came too late; who is refused and who looks ask for none."""
LOOKS = ("/health/live", "/health/ready", "/metrics", "/info", "/classes")


def refused(fields: Fields, draw: np.random.Generator) -> bytes:
    """A body that no server takes: broken, too large, of another type, of wrong values."""
    json_type = {"content-type": "application/json"}
    return [
        message("POST", "/generate", b'{"class_id": ', json_type),
        message("POST", "/generate", b" " * 100_000, json_type),
        message("POST", "/generate", b"class_id=1", {"content-type": "text/plain"}),
        generate_message(fields | {"steps": 0}),
        generate_message(fields | {"colour": "red"}),
    ][int(draw.integers(5))]


def request_of(kind: str, fields: Fields, draw: np.random.Generator) -> bytes:
    match kind:
        case "several":
            fields = fields | {"n": int(draw.integers(SEVERAL[0], SEVERAL[1] + 1))}
        case "format":
            fields = fields | {"format": str(draw.choice(("jpeg", "webp", "png")))}
        case "priority":
            fields = fields | {"priority": str(draw.choice(("low", "high")))}
        case "deadline":
            fields = fields | {"deadline_ms": int(10 ** draw.uniform(0, 5))}
        case "refused":
            return refused(fields, draw)
        case "look":
            return message("GET", str(draw.choice(LOOKS)))
    return generate_message(fields)


class Crowd:
    """All clients of the hour; counts what they were answered."""

    def __init__(
        self, server: LiveServer, subject: Subject, known: Sequence[Known], seed: int
    ) -> None:
        self.server, self.subject, self.known = server, subject, known
        self.client, self.draw = server.client(), np.random.default_rng(seed)
        self.statuses: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
        self.num_wrong = 0
        self.latencies: list[float] = []

    async def arrive(self, rate: float, seconds: float) -> None:
        """Requests of all kinds, `rate` a second, until all are answered."""
        started, tasks = time.perf_counter(), []
        names, shares = list(KINDS), [share for share, _ in KINDS.values()]
        for offset in poisson_times(rate, seconds, self.draw).tolist():
            await asyncio.sleep(started + offset - time.perf_counter())
            kind = str(self.draw.choice(names, p=shares))
            tasks.append(asyncio.create_task(self.come(kind, started + offset)))
        await asyncio.gather(*tasks)

    async def come(self, kind: str, due: float) -> None:
        try:
            status = await self._come(kind)
        except NoAnswerError:
            status = DROPPED
        except TimeoutError:
            status = HUNG
        self.statuses[kind][status] += 1
        if status == "200":
            self.latencies.append(time.perf_counter() - due)

    async def _come(self, kind: str) -> str:
        if kind == "leaves":
            moment = str(self.draw.choice(MOMENTS))
            await leave(self.server, self.subject.draw(1, self.draw)[0], moment, self.draw)
            return "left"
        if kind == "known":
            known = self.known[int(self.draw.integers(len(self.known)))]
            answer, _ = await self.client.request(known.data)
            self.num_wrong += answer.status == 200 and not known.is_right(answer)
        else:
            fields = self.subject.draw(1, self.draw)[0]
            answer, _ = await self.client.request(request_of(kind, fields, self.draw))
        is_clear = answer.status == 200 or answer.is_clear_error
        return str(answer.status) if is_clear else f"{answer.status}, unclear"


class Samples:
    """What the server uses, every `period_s`, until it is cancelled."""

    def __init__(self, server: LiveServer, period_s: float) -> None:
        self.server, self.client, self.period_s = server, server.client(), period_s
        self.rows: list[dict[str, float | None]] = []

    async def collect(self) -> None:
        started = time.perf_counter()
        while True:
            metrics = await scrape(self.client)
            gauges = {name: metrics.get(name) for name in GAUGES}
            now = time.perf_counter() - started
            self.rows.append({"time_s": now, **self.server.usage(), **gauges})
            await asyncio.sleep(self.period_s)


async def crowd_for(crowd: Crowd, capacity: float, seconds: float) -> None:
    """`capacity` in images a second. Phases of all SHARES in turn; at the end nobody is left."""
    end_at = time.perf_counter() + seconds
    for share in cycle(SHARES):
        left = end_at - time.perf_counter()
        if left <= 0:
            break
        await crowd.arrive(
            share * capacity / IMAGES_PER_REQUEST, min(PHASE_S, seconds / len(SHARES), left)
        )
    await settle(crowd.client)
    await crowd.client.close()


async def run(
    server: LiveServer, capacity: float, args: argparse.Namespace
) -> tuple[Figures, dict[str, bool]]:
    draw = np.random.default_rng(args.seed)
    client = server.client()
    subject = await Subject.of(client)
    known = await know(client, subject.draw(KNOWN, draw))
    await client.close()
    crowd = Crowd(server, subject, known, args.seed)
    samples = Samples(server, min(SAMPLE_S, args.seconds / 30))
    collecting = asyncio.create_task(samples.collect())
    await crowd_for(crowd, capacity, args.warm_up)
    warm = await usage_at_rest(server)
    await crowd_for(crowd, capacity, args.seconds - args.warm_up)
    collecting.cancel()
    await asyncio.gather(collecting, return_exceptions=True)
    await samples.client.close()
    figures, criteria = await end(server, client)
    total = sum(crowd.statuses.values(), Counter())
    refused = total["429"] / total.total()
    growth = {name: figures["usage"][name] - warm[name] for name in ("rss_mb", "fds", "threads")}
    return {
        "seconds": args.seconds,
        "queue_s": QUEUE_S,
        "warm_up_s": args.warm_up,
        "capacity_per_s": capacity,
        "statuses": crowd.statuses,
        "latency_s": percentiles(crowd.latencies),
        "wrong_images": crowd.num_wrong,
        "usage_after_warm_up": warm,
        "growth": growth,
        "rss_mb_per_hour": slope(samples.rows, args.warm_up),
        "samples": samples.rows,
    } | figures, {
        "every answer is right for its kind": all(
            set(crowd.statuses[kind]) <= allowed | ({"429"} if "200" in allowed else set())
            for kind, (_, allowed) in KINDS.items()
        ),
        f"{refused:.2%} were refused for a full queue": refused <= MAX_REFUSED,
        "every image is the one made alone": not crowd.num_wrong,
        f"memory grew by {growth['rss_mb']:.1f} MB": growth["rss_mb"] < MAX_GROWTH_MB,
        f"file descriptors grew by {growth['fds']:.0f}": growth["fds"] <= 0,
    } | criteria


def slope(rows: Sequence[dict[str, float | None]], since_s: float) -> float | None:
    """Of the memory of all processes, in MB an hour, by least squares."""
    points = [(row["time_s"], row["rss_mb"]) for row in rows if (row["time_s"] or 0) > since_s]
    if len(points) < 2:
        return None
    times, memory = np.array(points, dtype=float).T
    return float(np.polyfit(times / 3600, memory, 1)[0])


def draw_plot(rows: Sequence[dict[str, float | None]], path: Path) -> None:
    pyplot = import_module("matplotlib.pyplot")
    names = ("rss_mb", "fds", "threads", *GAUGES)
    figure, axes = pyplot.subplots(len(names), sharex=True, figsize=(8, 1.6 * len(names)))
    times = [(row["time_s"] or 0) / 60 for row in rows]
    for axis, name in zip(axes, names, strict=True):
        axis.plot(times, [row[name] if row[name] is not None else np.nan for row in rows])
        axis.set_ylabel(name.removeprefix("rae_"), fontsize=7)
    axes[-1].set_xlabel("minutes")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


async def measure(args: argparse.Namespace) -> int:
    async with running(args.model, [], args.seed) as parts:
        capacity = await measure_capacity(*parts, min(CAPACITY_S, args.seconds / 10))
    max_queue = round(QUEUE_S * capacity["evaluations_per_s"])
    with start_server(args.model, [f"--max-queue={max_queue}"]) as server:
        await asyncio.to_thread(server.wait_until_ready)
        figures, criteria = await run(server, capacity["goodput_per_s"], args)
    for kind, statuses in figures["statuses"].items():
        sys.stdout.write(f"{kind}: {dict(statuses)}\n")
    for name in ("latency_s", "usage_after_warm_up", "usage", "rss_mb_per_hour"):
        sys.stdout.write(f"{name}: {figures[name]}\n")
    if args.plot and find_spec("matplotlib"):
        draw_plot(figures["samples"], args.plot)
    elif args.plot:
        sys.stdout.write("no plot: matplotlib is not installed\n")
    return conclude("soak", figures, criteria, args.json)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, help="a checkpoint folder; default: the digits")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--warm-up", type=float, help="seconds of these; default: a sixth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--plot", type=Path, help="where to draw what was used, by time")
    args = parser.parse_args()
    args.warm_up = args.seconds / 6 if args.warm_up is None else args.warm_up
    return asyncio.run(measure(args))


if __name__ == "__main__":
    sys.exit(main())

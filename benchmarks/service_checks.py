"""What the scripts that load a server ask of it afterwards, and how they say and write it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from http_client import Client, message
from live_server import LiveServer, split_cores
from machine_facts import commit, cpu_name, gpu_name

GAUGES = (
    "rae_requests_in_flight",
    "rae_running_images",
    "rae_waiting_images",
    "rae_queued_evaluations",
)
ENDED = ("done", "failed", "cancelled", "expired")
ACCEPTED = "rae_requests_accepted_total"
REST_S = 12.0
SAMPLE = re.compile(r"^(\w+(?:\{.*\})?) (\S+)$", re.MULTILINE)

Metrics = Mapping[str, float]


async def scrape(client: Client) -> Metrics:
    answer, _ = await client.request(message("GET", "/metrics"))
    return {name: float(value) for name, value in SAMPLE.findall(answer.body.decode())}


async def settle(client: Client, timeout_s: float = 60) -> Metrics:
    """The metrics once all gauges are zero, or as they are after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while True:
        metrics = await scrape(client)
        if not any(metrics.get(name) for name in GAUGES) or time.monotonic() > end:
            return metrics
        await asyncio.sleep(0.1)


def reconciliation(metrics: Metrics) -> dict[str, float | None]:
    """What was accepted, None where the server does not count it, and how requests ended."""
    ended = {name: metrics.get(f'rae_requests_total{{outcome="{name}"}}') for name in ENDED}
    return {"accepted": metrics.get(ACCEPTED)} | ended


def reconciles(counts: Mapping[str, float | None]) -> bool:
    return counts["accepted"] == sum(counts[name] or 0 for name in ENDED)


async def usage_at_rest(server: LiveServer) -> dict[str, float]:
    """`LiveServer.usage` of the last moment in REST_S with the fewest open file descriptors: a
    server needs a while to see that connections have ended, and to give memory back."""
    usages = []
    for _ in range(round(REST_S / 0.2)):
        await asyncio.sleep(0.2)
        usages.append(server.usage())
    return min(reversed(usages), key=lambda usage: usage["fds"])


async def end(server: LiveServer, client: Client) -> tuple[dict[str, Any], dict[str, bool]]:
    """Stop a server that nobody loads any more: figures and criteria of what it leaves."""
    metrics = await settle(client)
    await client.close()
    usage, counts = await usage_at_rest(server), reconciliation(metrics)
    exit_code, left = await asyncio.to_thread(server.stop)
    tracebacks = server.text.count("Traceback")
    if exit_code or tracebacks:
        sys.stdout.write(f"the end of the server's log:\n{server.text[-5000:]}\n")
    gauges = {name: metrics.get(name) for name in GAUGES}
    figures = {"usage": usage, "gauges": gauges, "requests": counts}
    missing = [name for name in (*GAUGES, ACCEPTED) if name not in metrics]
    criteria = {
        f"no metric is missing: {missing}": not missing,
        "all gauges are zero": not any(gauges.values()),
        f"accepted = done + failed + cancelled + expired: {counts}": reconciles(counts),
        f"exit code {exit_code}, {tracebacks} tracebacks": (exit_code, tracebacks) == (0, 0),
        f"processes left behind: {left}": not left,
    }
    return figures | {"exit_code": exit_code}, criteria


def machine() -> dict[str, Any]:
    own, others = split_cores()
    packages = ("torch", "fastapi", "uvicorn")
    return {
        "device": gpu_name() or cpu_name(),
        "cores": {"generator": len(own), "server": len(others)},
        **{name: version(name) for name in packages},
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "load_average": os.getloadavg(),
    }


def conclude(
    part: str, figures: Mapping[str, Any], criteria: Mapping[str, bool], path: Path | None
) -> int:
    """Say which criteria are met and write the figures to `path`; the exit code."""
    met = all(criteria.values())
    for name, is_met in criteria.items():
        sys.stdout.write(f"{'met' if is_met else 'NOT MET'}: {name}\n")
    sys.stdout.write(f"{part}: {'all is met' if met else 'FAILED'}\n")
    if path:
        text = json.dumps(machine() | {"criteria": criteria, "met": met} | dict(figures), indent=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return 0 if met else 1

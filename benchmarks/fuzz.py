"""Requests that no sane client sends, and whether `rae serve` takes them all.

    python benchmarks/fuzz.py [--cases N] [--seed S] [--url URL | --model FOLDER] [--json FILE]

- A fifth of the cases are bodies and queries of schemathesis, valid and invalid ones, over the
  server's own OpenAPI document.
- The others go into bare sockets, 100 at a time: malformed HTTP, half and slow requests, huge
  headers, binary bodies, mutations of good requests, garbage behind them, early closes, resets.

Without --url it starts a server of its own, whose clients get half a second. A failure is any 5xx,
but a 504 for a deadline that the case set; no answer and no end within a minute; an error that has
not the shape of all; a whole request that gets no answer. After every 100 cases a good one has to
be answered within --good-s, with the bytes of the first; in the end nothing may run or wait.

Case i depends on --seed and i alone: `--first i --cases 1 --only sockets` repeats it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from random import Random
from urllib.parse import urlsplit

from fuzz_cases import KINDS, Case

BATCH = 100
ANSWER_S = 60
LATE_S = 0.2  # where this process was slower, the server's time-out may have come first
SETTLE_S = 30
MAX_FAILURES = 20
OWN_FLAGS = ("--max-steps=50", "--max-images=4", "--max-batch=16")
OWN_TIMES = ("--header-timeout=0.5", "--body-timeout=0.5", "--write-timeout=1", "--keep-alive=5")


@dataclass
class Report:
    cases: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    good_s: list[float] = field(default_factory=list)

    def fail(self, what: str) -> None:
        self.failures.append(what)

    def see(self, status: int, headers: dict[str, str], body: bytes, may_expire: bool) -> str:
        """Count an answer; what is wrong with it, or nothing."""
        self.statuses[str(status)] += 1
        if status >= 500 and not (status == 504 and may_expire):
            return f"{status} {body[:300]!r}"
        if status >= 400 and body:
            try:
                answer = json.loads(body)
                kind, request_id = answer["error"]["type"], answer["request_id"]
            except (ValueError, KeyError, TypeError):
                return f"{status} with the body {body[:300]!r}"
            if not kind or headers.get("x-request-id") != request_id:
                return f"{status} has the request ids {headers.get('x-request-id')}, {request_id}"
        return ""


async def read_answer(
    reader: asyncio.StreamReader, is_head: bool
) -> tuple[int, dict[str, str], bytes] | None:
    """The next final answer; None where the server closed instead."""
    while line := await reader.readline():
        status, headers = int(line.split()[1]), {}
        while (line := await reader.readline()).strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        if status >= 200:
            size = 0 if is_head else int(headers.get("content-length", 0))
            return status, headers, await reader.readexactly(size)
    return None


async def converse(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    case: Case,
    report: Report,
    started: float,
) -> str:
    """Send and read what the case says; what is wrong, or nothing."""
    problem, answered, is_late = "", 0, False
    late_from = started + LATE_S + len(case.parts) * case.pause_s
    try:
        for part in case.parts:
            is_late = time.monotonic() > late_from
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(case.pause_s)
        is_late = time.monotonic() > late_from
        while case.end == "read" and answered < case.answers and not problem:
            answer = await read_answer(reader, case.parts[0].startswith(b"HEAD "))
            if answer is None:
                break
            answered += 1
            problem = report.see(*answer, case.may_expire)
    except (ConnectionError, asyncio.IncompleteReadError):
        report.statuses["reset"] += 1
    if case.end == "read" and answered == 0:
        report.statuses["late" if is_late else "closed"] += 1
    if case.is_sound and not answered and not is_late:
        return "no answer to a request that is whole"
    return problem


async def run_case(address: tuple[str, int], case: Case, report: Report) -> str:
    try:
        async with asyncio.timeout(ANSWER_S):
            started = time.monotonic()
            reader, writer = await asyncio.open_connection(*address)
            try:
                return await converse(reader, writer, case, report, started)
            finally:
                if case.end == "reset":
                    own = writer.get_extra_info("socket")
                    own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort() if case.end == "reset" else writer.close()
    except TimeoutError:
        return f"neither an answer nor an end in {ANSWER_S} s"
    except OSError as error:
        return f"cannot connect: {error}"


class Good:
    """The request that has to be answered in time, with the same bytes each time."""

    def __init__(self, url: str, report: Report, limit_s: float) -> None:
        self.address, self.report, self.limit_s = urlsplit(url).netloc, report, limit_s
        self.first = b""

    def check(self, after: str) -> None:
        started = time.monotonic()
        connection = HTTPConnection(self.address, timeout=ANSWER_S)
        body = json.dumps({"class_id": 3, "seed": 1, "steps": 4})
        try:
            connection.request("POST", "/generate", body, {"content-type": "application/json"})
            response = connection.getresponse()
            status, data = response.status, response.read()
        except OSError as error:
            return self.report.fail(f"after {after}: a good request gets {error!r}")
        finally:
            connection.close()
        seconds = time.monotonic() - started
        self.report.good_s.append(seconds)
        self.first = self.first or data
        if status != 200 or data != self.first:
            self.report.fail(f"after {after}: a good request gets {status} {data[:100]!r}")
        elif seconds > self.limit_s:
            self.report.fail(f"after {after}: a good request took {seconds:.2f} s")


async def fuzz_sockets(url: str, seed: int, numbers: range, report: Report, check: Good) -> None:
    parts = urlsplit(url)
    address = (parts.hostname or "", parts.port or 80)
    names = list(KINDS)
    for start in range(0, len(numbers), BATCH):
        batch = numbers[start : start + BATCH]
        kinds = [names[i % len(names)] for i in batch]
        draws = [Random(f"{seed} {i}") for i in batch]
        cases = [KINDS[kind](draw) for kind, draw in zip(kinds, draws, strict=True)]
        report.cases.update(kinds)
        problems = await asyncio.gather(*(run_case(address, case, report) for case in cases))
        for i, kind, case, problem in zip(batch, kinds, cases, problems, strict=True):
            if problem:
                sent = [part[:2000] for part in case.parts]
                report.fail(f"case {i} ({kind}, seed {seed}): {problem}; sent {sent!r}")
        await asyncio.to_thread(check.check, f"case {batch[-1]}")
        if len(report.failures) > MAX_FAILURES:
            return


def get(url: str, path: str) -> bytes:
    connection = HTTPConnection(urlsplit(url).netloc, timeout=ANSWER_S)
    connection.request("GET", path)
    body = connection.getresponse().read()
    connection.close()
    return body


def fuzz_api(url: str, seed: int, cases: int, report: Report, check: Good) -> None:
    """Most of the cases are POST /generate, half of them valid, with few steps."""
    import requests
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    document = json.loads(get(url, "/openapi.json"))
    body = document["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]
    del body["examples"]
    properties = body["schema"]["properties"]
    properties["steps"] = {"type": "integer", "minimum": 2, "maximum": 4}
    properties["n"]["anyOf"][0]["maximum"] = 2
    body["schema"]["required"] = ["steps"]
    session, done = requests.Session(), 0

    def run(case: schemathesis.Case) -> None:
        nonlocal done
        response = case.call(base_url=url, session=session)
        headers = {name: values[0] for name, values in response.headers.items()}
        may_expire = "deadline_ms" in str(case.body)
        problem = report.see(response.status_code, headers, response.content, may_expire)
        if problem:
            report.fail(f"{case.as_curl_command()[:2000]} (seed {seed}): {problem}")
        done += 1
        report.cases["api"] += 1
        if done % BATCH == 0:
            check.check(f"{done} cases of the API")

    for found in schemathesis.openapi.from_dict(document).get_all_operations():
        operation = found.ok()  # type: ignore[union-attr]
        share = {"POST /generate": 0.4, "GET /classes": 0.1}.get(operation.label, 0.01)
        for mode in schemathesis.GenerationMode:
            if mode.is_negative and share < 0.1:
                continue  # they take nothing that could be wrong
            options = settings(
                max_examples=max(1, round(share * cases)),
                database=None,
                deadline=None,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
                phases=[Phase.generate],
            )
            seeded(seed)(options(given(operation.as_strategy(generation_mode=mode))(run)))()


def settled(url: str) -> bool:
    """Whether nothing runs or waits in the server."""
    lines = [line.split() for line in get(url, "/metrics").decode().splitlines()]
    gauges = ("rae_running_images", "rae_waiting_images", "rae_queued_evaluations")
    values = [float(line[1]) for line in lines if line[0] in gauges]
    return len(values) == len(gauges) and not any(values)


def fuzz(
    url: str, *, cases: int, seed: int, first: int = 0, good_s: float = 1.0, only: str = ""
) -> Report:
    """All of it against a server that is there."""
    report = Report()
    check = Good(url, report, good_s)
    check.check("nothing")
    share = {"api": cases, "sockets": 0}.get(only, cases // 5)
    if share:
        fuzz_api(url, seed, share, report, check)
    if only != "api":
        numbers = range(first, first + cases - share)
        asyncio.run(fuzz_sockets(url, seed, numbers, report, check))
    deadline = time.monotonic() + SETTLE_S
    try:
        while not settled(url):
            if time.monotonic() > deadline:
                report.fail(f"something runs or waits {SETTLE_S} s after the last case")
                break
            time.sleep(0.1)
    except OSError as error:
        report.fail(f"the server is gone: {error!r}")
    return report


@contextmanager
def server(model: str) -> Iterator[tuple[str, Path]]:
    """A server of our own: its URL, and what it writes."""
    from subjects import find_checkpoint, serve, torch

    folder = find_checkpoint(model, Path("unused"), torch.device("cpu"))
    with serve(folder, [*OWN_FLAGS, *OWN_TIMES]) as served:
        yield served.url, Path(f"/proc/{served.pid}/fd/2")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", type=int, default=25_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first socket case")
    parser.add_argument("--only", choices=("api", "sockets"), default="")
    parser.add_argument("--url", help="a server that is there; default: one of our own")
    parser.add_argument("--model", default="digits", help="a checkpoint folder for our own")
    parser.add_argument("--good-s", type=float, default=1.0, help="what a good request may take")
    parser.add_argument("--json", type=Path, help="where to write the counts")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    started = time.monotonic()
    asked = {key: getattr(args, key) for key in ("cases", "seed", "first", "good_s", "only")}
    if args.url:
        report = fuzz(args.url, **asked)
    else:
        with server(args.model) as (url, log):
            report = fuzz(url, **asked)
            written = log.read_text()
        if "Traceback" in written:
            report.fail(f"the server wrote {written[written.index('Traceback') :][:4000]}")
    figures = vars(report) | {"seed": args.seed, "seconds": round(time.monotonic() - started, 1)}
    figures["good_s"] = {"count": len(report.good_s), "max": max(report.good_s, default=0.0)}
    text = json.dumps(figures, indent=1) + "\n"
    sys.stdout.write(text)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(text)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())

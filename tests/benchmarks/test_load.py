"""What the scripts that load a server rest on: arrivals, figures, and a small HTTP client."""

from __future__ import annotations

import asyncio
import importlib
import json
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SETTLED = (
    b"rae_requests_in_flight 0.0\nrae_running_images 0.0\nrae_waiting_images 0.0\n"
    b'rae_requests_total{outcome="done"} 7.0\n'
)

Reply = Callable[[str, bytes], bytes]
"""What a tiny server writes for a request line and a body; nothing ends the connection."""


@pytest.fixture(autouse=True)
def _scripts_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.fixture
def arrivals() -> ModuleType:
    return importlib.import_module("arrivals")


@pytest.fixture
def http_client() -> ModuleType:
    return importlib.import_module("http_client")


@pytest.fixture
def load() -> ModuleType:
    return importlib.import_module("load")


def answer(status: int, body: bytes, **headers: str) -> bytes:
    headers |= {"content-length": str(len(body))}
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} Reason\r\n{lines}\r\n".encode() + body


def with_server(reply: Reply, use: Callable[[int], Awaitable[None]]) -> int:
    """Run `use` with the port of a tiny server; returns how many connections that had."""
    connections: list[asyncio.Task[None] | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(asyncio.current_task())
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = head.partition("content-length: ")[2].partition("\r\n")[0]
                data = reply(head.partition("\r\n")[0], await reader.readexactly(int(length or 0)))
                if not data:
                    break
                writer.write(data)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    async def main() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        await use(server.sockets[0].getsockname()[1])
        server.close()
        await asyncio.gather(*(task for task in connections if task))

    asyncio.run(main())
    return len(connections)


@pytest.mark.parametrize("script", ["load", "kills"])
def test_flags_are_handed_to_the_server(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, started = importlib.import_module(script), list[Sequence[str]]()

    def start(folder: Path | None, flags: Sequence[str]) -> None:
        started.append(flags)
        raise LookupError("no server")

    monkeypatch.setattr(module, "start_server", start)
    flags = ["--deterministic", "--max-batch=16"]
    monkeypatch.setattr(sys, "argv", [script, *(f"--serve={flag}" for flag in flags)])
    with pytest.raises(LookupError):
        module.main()
    assert started == [flags]
    if script == "load":  # its second server has a queue for the capacity of the first
        args = SimpleNamespace(model=None, serve=flags, seed=0, queue_s=3)
        with pytest.raises(LookupError):
            asyncio.run(module.measure_open(args, {"evaluations_per_s": 100.0}))
        assert started[1] == ["--max-queue=300", *flags]


def test_arrivals_are_a_poisson_process(arrivals: ModuleType) -> None:
    times = arrivals.poisson_times(50.0, 400.0, np.random.default_rng(0))
    gaps = np.diff(times)
    # 20,000 expected, of which sqrt(20,000) = 141 is one standard deviation.
    assert abs(len(times) - 20_000) < 4 * 141
    assert 0 <= times[0] and times[-1] < 400 and (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)
    assert np.mean(gaps > 2 / 50) == pytest.approx(np.exp(-2), rel=0.05)


def test_percentiles(arrivals: ModuleType) -> None:
    found = arrivals.percentiles([i / 100 for i in range(101)][::-1])
    assert found == pytest.approx({"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0})
    assert arrivals.percentiles([]) == {}


def test_requests_are_of_the_model_and_none_comes_twice(arrivals: ModuleType) -> None:
    subject = arrivals.Subject("digits", 10, ("cfg", "autoguidance"))
    requests = subject.draw(200, np.random.default_rng(0))
    assert {request["class_id"] for request in requests} == set(range(10))
    assert {request["steps"] for request in requests} == set(range(10, 51))
    assert len({request["seed"] for request in requests}) == 200
    assert requests == subject.draw(200, np.random.default_rng(0))


def test_a_fingerprint_is_of_the_images(arrivals: ModuleType, http_client: ModuleType) -> None:
    def fingerprint(data: str, request_id: str) -> str:
        body = json.dumps({"request_id": request_id, "images": [{"data": data}]}).encode()
        headers = {"content-type": "application/json"}
        return arrivals.fingerprint(http_client.Answer(200, headers, body))

    assert fingerprint("aaaa", "1") == fingerprint("aaaa", "2") != fingerprint("aaab", "1")


def test_a_client_keeps_its_connections(http_client: ModuleType) -> None:
    def reply(line: str, body: bytes) -> bytes:
        return answer(200, f"{line} {body.decode()}".encode(), X_Seed="7")

    async def use(port: int) -> None:
        client = http_client.Client("127.0.0.1", port)
        for i in range(5):
            data = http_client.message("POST", "/generate", str(i).encode())
            got, _ = await client.request(data)
            assert (got.status, got.headers["x-seed"]) == (200, "7")
            assert got.body == f"POST /generate HTTP/1.1 {i}".encode()
        both = [client.request(http_client.message("GET", f"/{i}")) for i in range(2)]
        assert [got.body for got, _ in await asyncio.gather(*both)] == [
            b"GET /0 HTTP/1.1 ",
            b"GET /1 HTTP/1.1 ",
        ]
        await client.close()

    assert with_server(reply, use) == 2


def test_a_kept_connection_that_was_closed_is_no_failure(http_client: ModuleType) -> None:
    replies = iter([answer(200, b"first"), b"", answer(200, b"second"), b"", b""])

    async def use(port: int) -> None:
        client = http_client.Client("127.0.0.1", port)
        data = http_client.message("GET", "/")
        assert (await client.request(data))[0].body == b"first"
        assert (await client.request(data))[0].body == b"second"
        # A new connection that ends without an answer is one.
        with pytest.raises(http_client.NoAnswerError):
            await client.request(data)
        await client.close()

    assert with_server(lambda *_: next(replies), use) == 3


def test_half_an_answer_and_none_in_time_are_failures(http_client: ModuleType) -> None:
    half = answer(200, b"whole")[:-1]

    async def use(port: int) -> None:
        client = http_client.Client("127.0.0.1", port)
        with pytest.raises(TimeoutError):
            await client.request(http_client.message("GET", "/"), timeout_s=0.2)
        await client.close()
        connection = await http_client.Connection.open("127.0.0.1", port)
        connection.send(http_client.message("GET", "/") * 2)
        with pytest.raises(http_client.NoAnswerError):
            await connection.receive()
        connection.leave()

    replies = iter([half, half, b""])
    with_server(lambda *_: next(replies), use)


def test_nobody_listens(http_client: ModuleType) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    client = http_client.Client("127.0.0.1", port)
    with pytest.raises(http_client.NoAnswerError):
        asyncio.run(client.request(http_client.message("GET", "/")))


def test_a_clear_error_says_what_is_wrong(http_client: ModuleType) -> None:
    def is_clear(status: int, body: bytes) -> bool:
        return http_client.Answer(status, {}, body).is_clear_error

    body = json.dumps({"error": {"type": "queue_full", "message": "try again"}}).encode()
    assert is_clear(429, body)
    assert not is_clear(200, body)
    assert not is_clear(500, b"Internal Server Error")
    assert not is_clear(500, b'{"error": {"type": "", "message": ""}}')
    assert not is_clear(500, b"[]")


def test_latency_is_from_when_a_request_was_due(
    load: ModuleType, arrivals: ModuleType, http_client: ModuleType
) -> None:
    """A server that answers one, refuses one and breaks off one, and its second try."""
    error = json.dumps({"error": {"type": "queue_full", "message": "try again"}}).encode()
    replies = iter([answer(200, b"right"), answer(429, error, Retry_After="3"), b"", b""])

    async def use(port: int) -> None:
        client = http_client.Client("127.0.0.1", port)
        right = arrivals.fingerprint(http_client.Answer(200, {}, b"right"))
        known = [arrivals.Known({}, http_client.message("GET", "/"), right)]
        outcomes.extend(
            [(await load.open_loop(client, known, [t], np.random.default_rng(0)))[0] for t in times]
        )
        await client.close()

    times, outcomes = [0.1, 0.0, 0.0], []
    with_server(lambda *_: next(replies), use)
    assert [each.status for each in outcomes] == [200, 429, load.DROPPED]
    assert [each.is_right for each in outcomes] == [True, False, False]
    assert outcomes[1].retry_after_s == 3 and outcomes[1].is_clear

    def outcome(due: float, ended: float, status: int | str) -> object:
        return load.Outcome(due=due, sent=due + 0.5, ended=ended, status=status, is_right=True)

    made = [outcome(0.0, 2.0, 200), outcome(1.0, 4.0, 200), outcome(9.0, 12.0, 200)]
    found = load.describe([*made, outcome(3.0, 3.1, 503)], 10.0, cpu_s=6.0, server_s=12.0)
    assert found["by_status"] == {"200": 3, "503": 1}
    assert found["goodput_per_s"] == pytest.approx(0.2)  # the last came too late to count
    assert found["latency_s"]["p50"] == pytest.approx(3.0)
    assert found["generator_lag_s"]["max"] == pytest.approx(0.5)
    assert (found["generator_cpu"], found["server_cpu"]) == pytest.approx((0.5, 1.0))
    assert found["goodput_per_server_cpu_s"] == pytest.approx(0.25)
    assert (found["wrong_images"], found["unclear_errors"]) == (0, 1)


def test_gauges_and_counters_are_read_from_the_metrics(http_client: ModuleType) -> None:
    checks = importlib.import_module("service_checks")
    seen = []

    async def use(port: int) -> None:
        client = http_client.Client("127.0.0.1", port)
        seen.append(await checks.settle(client))
        await client.close()

    busy = SETTLED.replace(b"running_images 0.0", b"running_images 2.0")
    replies = iter([answer(200, busy), answer(200, SETTLED)])
    with_server(lambda *_: next(replies), use)
    counts = checks.reconciliation(seen[0])
    assert seen[0]["rae_running_images"] == 0.0
    assert counts == {"accepted": None, "done": 7, "failed": None, "cancelled": None} | {
        "expired": None
    }
    assert not checks.reconciles(counts)
    assert checks.reconciles(counts | {"accepted": 7})
    assert not checks.reconciles(counts | {"accepted": 8})


def test_a_server_that_is_stopped_while_it_starts(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "out" / "stops.json"
    command = [sys.executable, ROOT / "benchmarks" / "stops.py", "--stops", "1"]
    command += ["--model", tiny_checkpoint, "--json", path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert path.is_file(), result.stderr
    figures = json.loads(path.read_text())
    assert (result.returncode, figures["met"]) == (0, True), result.stdout
    (stop,) = figures["stops"]
    assert (stop["moment"], stop["exit_code"], stop["left_behind"]) == ("starting", 0, 0)
    assert 0 < stop["exit_s"] < 45
    assert len(figures["criteria"]) == 5 and all(figures["criteria"].values())

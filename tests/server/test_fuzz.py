"""A few hundred cases of the fuzzer, and that it sees what is wrong."""

from __future__ import annotations

import importlib
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from types import ModuleType

import pytest

Serve = Callable[..., AbstractContextManager[tuple[str, subprocess.Popen[bytes]]]]

ROOT = Path(__file__).parents[2]
GAUGES = b"rae_running_images 0\nrae_waiting_images 0\nrae_queued_evaluations %d\n"


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("fuzz")


def test_a_few_hundred_cases_do_no_harm(serve: Serve, fuzz: ModuleType) -> None:
    # Half requests take as long as their time-outs; 5 s: this machine may be busy with others.
    with serve("--max-steps=20", "--max-images=4", *fuzz.OWN_TIMES) as (url, process):
        report = fuzz.fuzz(url, cases=700, seed=1, good_s=5)
        assert process.poll() is None
        log = Path(f"/proc/{process.pid}/fd/1").read_text()
    assert report.failures == []
    assert "Traceback" not in log
    assert "Exception" not in log
    assert report.cases["api"] >= 140
    assert all(report.cases[kind] >= 50 for kind in fuzz.KINDS)
    assert set(report.statuses) >= {"200", "400", "404", "405", "408", "422", "431"}
    assert report.statuses["closed"] < 20


@contextmanager
def broken(answers: dict[str, tuple[int, bytes]]) -> Iterator[str]:
    """A server that answers each path so."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            status, body = answers.get(self.path, (404, b""))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "queued", "words"),
    [
        (500, b"", 0, "500 b''"),
        (504, b"", 0, "504 b''"),
        (400, b"oops", 0, "400 with the body b'oops'"),
        (422, b'{"error": {"type": "x"}, "request_id": "1"}', 0, "the request ids None, 1"),
        (200, b"fine", 3, "something runs or waits"),
    ],
)
def test_what_is_wrong_is_found(
    fuzz: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    body: bytes,
    queued: int,
    words: str,
) -> None:
    monkeypatch.setattr(fuzz, "SETTLE_S", 0.1)
    monkeypatch.setattr(fuzz, "KINDS", {"invalid": fuzz.KINDS["invalid"]})
    with broken({"/generate": (status, body), "/metrics": (200, GAUGES % queued)}) as url:
        report = fuzz.fuzz(url, cases=3, seed=0, only="sockets")
    assert any(words in failure for failure in report.failures)


def test_a_server_that_is_silent_slow_or_gone_is_found(
    fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with broken({"/metrics": (200, GAUGES % 0), "/generate": (200, b"x")}) as url:
        monkeypatch.setattr(fuzz, "KINDS", {"half": fuzz.KINDS["half"]})
        monkeypatch.setattr(fuzz, "ANSWER_S", 0.5)
        report = fuzz.fuzz(url, cases=1, seed=0, good_s=0, only="sockets")
    assert "took" in report.failures[0]
    assert any("case 0 (half, seed 0): neither an answer nor" in line for line in report.failures)
    assert "gone" in fuzz.fuzz(url, cases=1, seed=0, only="sockets").failures[-1]


def test_cases_depend_on_their_number_alone(fuzz: ModuleType) -> None:
    for kind, make in fuzz.KINDS.items():
        assert make(Random(f"1 {kind}")) == make(Random(f"1 {kind}"))
        assert len({b"".join(make(Random(f"1 {i}")).parts) for i in range(50)}) > 15

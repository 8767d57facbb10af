"""What is logged, in which form, what never is, and that no request suffers where it cannot be."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from rae.server import logs

MakeClient = Callable[..., AbstractContextManager[TestClient]]
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
SECRET = "hunter2-hunter2"
JSON = {"content-type": "application/json"}
START_S, STOP_S = 60, 20
FULL = Path("/dev/full")
on_linux = pytest.mark.skipif(not FULL.exists(), reason="/dev/full and /proc are Linux's")

log = logging.getLogger("rae.test")
Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def own_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    for handler in handlers:  # `configure` would close pytest's own
        root.removeHandler(handler)
    yield
    logging.captureWarnings(False)
    root.handlers, root.level = handlers, level


@pytest.fixture
def lines(own_logging: None, capfd: pytest.CaptureFixture[str]) -> Lines:
    """What the HTTP process, not its test client, has logged as JSON since the last call."""

    def read() -> list[dict[str, Any]]:
        found = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
        return [line for line in found if not line["logger"].startswith(("httpx", "rae.kernels"))]

    return read


def test_text_is_one_line_with_what_is_known(
    own_logging: None, capfd: pytest.CaptureFixture[str]
) -> None:
    logs.configure("info", "text")
    log.info("ready after %d s", 3)
    log.debug("not at info")
    logs.configure("info", "text", worker=2)
    log.warning("slow\n", extra={"request_id": "r1", "fields": {"step": 7, "absent": None}})
    first, second = capfd.readouterr().err.splitlines()
    assert first[24:] == " INFO rae.test: ready after 3 s"
    assert second[24:] == " WARNING rae.test: slow worker=2 request_id=r1 step=7"


def test_nobody_breaks_a_line_of_text(own_logging: None, capfd: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "text")
    log.info("a\nINFO forged \x1b[31mred", extra={"fields": {"client": "1\r2\u2028é"}})
    (line,) = capfd.readouterr().err.splitlines()
    assert line[24:] == r" INFO rae.test: a\nINFO forged \x1b[31mred client=1\r2\u2028é"


def test_json_is_one_object_a_line(lines: Lines) -> None:
    logs.configure("debug", "json", worker=0)
    log.debug("two\nlines", extra={"request_id": "r1", "fields": {"steps": 50, "path": Path("/")}})
    (found,) = lines()
    time_of = found.pop("time")
    assert abs(time.time() - logs.datetime.fromisoformat(time_of).timestamp()) < 60
    assert len(time_of) == 24 and time_of.endswith("Z")
    assert found == {
        "level": "debug",
        "logger": "rae.test",
        "message": "two\nlines",
        "worker": 0,
        "request_id": "r1",
        "steps": 50,
        "path": "/",
    }


def test_an_exception_is_its_type_and_its_trace(lines: Lines) -> None:
    logs.configure("info", "json")
    try:
        _ = 1 / 0
    except ZeroDivisionError:
        log.exception("a step failed")
    (found,) = lines()
    assert (found["level"], found["message"]) == ("error", "a step failed")
    assert found["exception"] == "ZeroDivisionError"
    assert found["trace"].startswith("Traceback") and "1 / 0" in found["trace"]


def test_text_shows_the_trace_below_its_line(
    own_logging: None, capfd: pytest.CaptureFixture[str]
) -> None:
    logs.configure("info", "text")
    log.error("a decoding failed", exc_info=ValueError("what"))
    assert capfd.readouterr().err.splitlines()[1:] == ["ValueError: what"]


def test_warnings_and_faulty_calls_are_lines_too(
    own_logging: None, capfd: pytest.CaptureFixture[str]
) -> None:
    logs.configure("info", "text")
    log.info("%d steps", "five")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("old", stacklevel=1)
    first, second = capfd.readouterr().err.splitlines()
    assert first == "INFO rae.test: cannot be formatted: '%d steps'"
    assert "WARNING py.warnings: " in second and "UserWarning: old" in second


def test_each_request_is_one_line(make_client: MakeClient, lines: Lines) -> None:
    logs.configure("info", "json")
    with make_client(log_format="json") as client:
        lines()
        asked = {"class_id": 3, "steps": 5, "n": 2, "seed": 1, "format": "png"}
        client.post("/generate", json=asked, headers={"x-request-id": "mine"})
        (found,) = lines()
        assert {name: found.pop(name) > 0 for name in list(found) if name.endswith("_ms")} == {
            f"{stage}_ms": True for stage in ("duration", "queue", "denoise", "decode", "encode")
        }
        del found["time"]
        assert found == {
            "level": "info",
            "logger": "rae.server.accounting",
            "message": "request",
            "request_id": "mine",
            "client": "testclient",
            "method": "POST",
            "path": "/generate",
            "status": 200,
            "class_id": 3,
            "steps": 5,
            "evaluations": 4,
            "cfg": 1.5,
            "n": 2,
            "outcome": "done",
        }
        client.post("/generate", json={"steps": 1})
        client.get("/nowhere")
        client.get("/generate")
        statuses = [(line["method"], line["path"], line["status"]) for line in lines()]
    assert statuses == [
        ("POST", "/generate", 422),
        ("GET", "/nowhere", 404),
        ("GET", "/generate", 405),
    ]


def test_a_fault_is_logged_with_its_request(
    make_client: MakeClient, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs.configure("info", "json")
    with make_client(log_format="json") as client:
        lines()
        monkeypatch.setattr("rae.server.generate.encode", lambda *_: 1 / 0)
        answer = client.post("/generate", json={"steps": 2}, headers={"x-request-id": "bad"})
        fault, found = lines()
    assert answer.status_code == 500
    assert "Traceback" not in answer.text
    assert (fault["message"], fault["exception"]) == ("an encoding failed", "ZeroDivisionError")
    assert fault["request_id"] == "bad"
    assert (found["status"], found["outcome"], found["request_id"]) == (500, "failed", "bad")


def test_health_and_metrics_are_quiet(make_client: MakeClient, lines: Lines) -> None:
    with make_client(root_path="/rae", log_format="json") as client:
        for level, logged in (("info", []), ("debug", ["/health/live", "/metrics"])):
            logs.configure(level, "json")  # type: ignore[arg-type]
            client.get("/health/live")
            client.get("/metrics")
            found = [line for line in lines() if line["logger"] == "rae.server.accounting"]
            assert [line["path"].removeprefix("/rae") for line in found] == logged


def test_no_secret_is_logged(make_client: MakeClient, lines: Lines) -> None:
    logs.configure("debug", "json")
    with make_client(log_format="json") as client:
        headers = {"authorization": f"Bearer {SECRET}", "x-api-key": SECRET, "cookie": SECRET}
        client.get(f"/classes?search={SECRET}", headers=headers)
        client.post(f"/generate?key={SECRET}", json={"class_name": SECRET}, headers=headers)
        client.post("/generate", content=SECRET, headers=headers)
        found = lines()
    assert [line["path"] for line in found if line["message"] == "request"] == [
        "/classes",
        "/generate",
        "/generate",
    ]
    assert SECRET not in json.dumps(found)


def test_a_long_path_is_cut(make_client: MakeClient, lines: Lines) -> None:
    logs.configure("info", "json")
    with make_client(log_format="json") as client:
        lines()
        client.get("/" + "x" * 10_000)
        (found,) = lines()
    assert found["path"] == "/" + "x" * 199


@pytest.fixture
def environment(child_environment: dict[str, str]) -> dict[str, str]:
    """With Python's buffers, which are what fails once more at the exit."""
    return {k: v for k, v in child_environment.items() if k != "PYTHONUNBUFFERED"}


@contextmanager
def server(
    checkpoint: Path, environment: dict[str, str], *flags: str, out: Path, error: Path
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`rae serve` that serves: its process and port, found without what it says."""
    command = [sys.executable, "-P", "-m", "rae.server", "serve", "--port", "0"]
    command += ["--model", str(checkpoint), "--device", "cpu", "--max-batch", "8", *flags]
    with out.open("wb") as stdout, error.open("wb") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment)
    try:
        deadline = time.monotonic() + START_S
        port = None
        while port is None or not is_ready(port):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
            with suppress(FileNotFoundError):  # it has ended
                port = listening(process.pid)
        yield process, port
    finally:
        process.kill()
        process.wait(STOP_S)


def listening(pid: int) -> int | None:
    """The port on which a process listens, as Linux tells it."""
    sockets = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            sockets.add(os.readlink(file))
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, *_, inode = line.split()[:10]
        if state == "0A" and f"socket:[{inode}]" in sockets:
            return int(local.split(":")[1], 16)
    return None


def is_ready(port: int) -> bool:
    with suppress(OSError):
        return ask(port, "GET", "/health/ready")[0] == 200
    return False


def ask(port: int, method: str, path: str, body: object = None) -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, None if body is None else json.dumps(body), JSON)
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    return response.status, answer


@on_linux
def test_a_full_disk_behind_stdout_and_stderr_harms_nobody(
    tiny_checkpoint: Path, environment: dict[str, str]
) -> None:
    with server(tiny_checkpoint, environment, out=FULL, error=FULL) as (process, port):
        for _ in range(300):  # more than a buffer of 8 KiB
            assert ask(port, "POST", "/generate", {"steps": 1})[0] == 422
        status, image = ask(port, "POST", "/generate", {"steps": 5})
        assert (status, image[:4]) == (200, b"\x89PNG")
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_S) == 0


def test_json_is_all_that_a_server_writes_and_who_left_is_499(
    tiny_checkpoint: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    out, error = tmp_path / "out", tmp_path / "error"

    def gone() -> list[dict[str, Any]]:
        found = map(json.loads, error.read_text().splitlines())
        return [line for line in found if line.get("status") == 499]

    flags = ("--log-format", "json", "--log-level", "debug")
    with server(tiny_checkpoint, environment, *flags, out=out, error=error) as serving:
        process, port = serving
        with sending(port, b"{", length=9):
            pass
        wait_until(lambda: len(gone()) == 1)
        body = json.dumps({"class_id": 0, "steps": 1000, "n": 32}).encode()
        with sending(port, body, length=len(body)):
            wait_until(lambda: b"rae_requests_in_flight 1.0" in metrics(port))
        wait_until(lambda: len(gone()) == 2)
        assert b'rae_requests_total{outcome="incomplete"} 1.0' in metrics(port)
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_S) == 0
    assert [line["outcome"] for line in gone()] == ["incomplete", "cancelled"]
    assert gone()[1]["steps"] == 1000
    assert out.read_text() == ""
    assert SECRET not in error.read_text()
    messages = [json.loads(line)["message"] for line in error.read_text().splitlines()]
    assert any(message.startswith("Ready: http://127.0.0.1:") for message in messages)
    assert "Application startup complete." in messages


@contextmanager
def sending(port: int, body: bytes, length: int) -> Iterator[None]:
    """A client that sends `body`, says that it is of `length` bytes, and leaves at the end."""
    head = f"POST /generate?key={SECRET} HTTP/1.1\r\nhost: x\r\nauthorization: {SECRET}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(head.encode() + body)
        yield


def metrics(port: int) -> bytes:
    return ask(port, "GET", "/metrics")[1]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@on_linux
def test_what_cannot_be_said_on_stdout_is_dropped(environment: dict[str, str]) -> None:
    code = "from rae.server.terminal import say; say('one'); say('two')"
    with FULL.open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (0, b"")

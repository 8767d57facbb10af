"""`rae serve` as a process of its own, over real connections."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from rae.server.serve import welcome

Serve = Callable[..., AbstractContextManager[tuple[str, subprocess.Popen[bytes]]]]
JSON = {"content-type": "application/json"}
SMALL = {"class_id": 3, "seed": 1, "steps": 5}
LARGE = {"class_id": 0, "cfg": 1, "steps": 1000, "n": 32}
STOP_S = 20


def connect(url: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)


def post(url: str, body: object) -> tuple[int, bytes]:
    connection = connect(url)
    connection.request("POST", "/generate", json.dumps(body), JSON)
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    return response.status, answer


def scraped(url: str, sample: str) -> float:
    connection = connect(url)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return next(float(line.split()[-1]) for line in lines if line.startswith(sample + " "))


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def url(serve: Serve) -> Iterator[str]:
    with serve() as (url, _):
        yield url


def stream(parts: int) -> Iterator[bytes]:
    for _ in range(parts):
        yield b" " * 1_000_000


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_50_mb_body_gets_its_answer(url: str, is_chunked: bool) -> None:
    connection = connect(url)
    headers = JSON if is_chunked else {**JSON, "content-length": "50000000"}
    connection.request("POST", "/generate", stream(50), headers, encode_chunked=is_chunked)
    response = connection.getresponse()
    message = json.loads(response.read())["error"]["message"]
    connection.close()
    assert response.status == 413
    assert message == (
        "the body has more than 65536 bytes; allowed: at most 65536"
        if is_chunked
        else "the body has 50000000 bytes; allowed: at most 65536"
    )
    assert post(url, SMALL)[0] == 200


def test_a_large_body_is_refused_before_it_is_sent(url: str) -> None:
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as client:
        client.sendall(
            b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: 50000000\r\nexpect: 100-continue\r\n\r\n"
        )
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"100 Continue" not in answer


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 12",
        b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 12\r\n\r\n{",
        b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
    ],
)
def test_broken_http_does_no_harm(url: str, sent: bytes) -> None:
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as client:
        client.sendall(sent)
    assert post(url, SMALL)[0] == 200


def test_a_client_that_leaves_frees_its_slots_and_harms_nobody(url: str) -> None:
    alone = post(url, SMALL)[1]
    cancelled, rows = 'rae_requests_total{outcome="cancelled"}', "rae_rows_evaluated_total"
    cancelled_before, rows_before = scraped(url, cancelled), scraped(url, rows)
    leaving = connect(url)
    leaving.request("POST", "/generate", json.dumps(LARGE), JSON)
    wait_until(lambda: scraped(url, "rae_running_images") > 0, 20)
    with ThreadPoolExecutor() as threads:
        staying = threads.submit(post, url, SMALL)
        wait_until(lambda: scraped(url, "rae_waiting_images") > 0, 20)
        leaving.close()
        assert staying.result() == (200, alone)
    wait_until(lambda: scraped(url, cancelled) == cancelled_before + 1, 10)
    wait_until(lambda: scraped(url, "rae_running_images") == 0, 10)
    assert scraped(url, "rae_waiting_images") == scraped(url, "rae_queued_evaluations") == 0
    assert scraped(url, rows) - rows_before < 0.9 * 32 * 999


def test_a_short_request_overtakes_a_long_one(url: str) -> None:
    with ThreadPoolExecutor() as threads:
        long = threads.submit(post, url, {"class_id": 1, "steps": 1000, "n": 4})
        wait_until(lambda: scraped(url, "rae_running_images") > 0, 20)
        assert post(url, SMALL)[0] == 200
        assert not long.done()
        assert long.result()[0] == 200


def get(url: str, path: str) -> tuple[int, bytes]:
    connection = connect(url)
    connection.request("GET", path)
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    return response.status, answer


def test_sigterm_finishes_what_runs_and_lets_nobody_in(serve: Serve) -> None:
    with serve() as (url, process), ThreadPoolExecutor() as threads:
        idle = connect(url)
        idle.request("GET", "/health/live")
        idle.getresponse().read()
        running = threads.submit(post, url, {**LARGE, "n": 8})
        wait_until(lambda: scraped(url, "rae_running_images") > 0, 20)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: get(url, "/health/ready")[0] == 503, 20)
        assert json.loads(get(url, "/health/ready")[1])["reasons"] == [
            "the server is shutting down"
        ]
        assert get(url, "/health/live")[0] == 200
        status, body = post(url, SMALL)
        assert (status, json.loads(body)["error"]["type"]) == (503, "shutting_down")
        assert not running.done()
        status, body = running.result()
        assert (status, len(json.loads(body)["images"])) == (200, 8)
        assert process.wait(STOP_S) == 0
        with pytest.raises(OSError):
            post(url, SMALL)
        idle.close()


@pytest.mark.parametrize("grace", ["0.5", "600"])
def test_what_takes_longer_than_the_grace_or_a_second_signal_is_told(
    serve: Serve, grace: str
) -> None:
    with serve("--grace", grace) as (url, process), ThreadPoolExecutor() as threads:
        running = threads.submit(post, url, LARGE)
        wait_until(lambda: scraped(url, "rae_running_images") > 0, 20)
        process.send_signal(signal.SIGTERM)
        if grace == "600":
            wait_until(lambda: get(url, "/health/ready")[0] == 503, 20)
            process.send_signal(signal.SIGTERM)
        status, body = running.result()
        assert (status, json.loads(body)["error"]["type"]) == (503, "shutting_down")
        assert process.wait(STOP_S) == 0


def handles_sigterm(pid: int) -> bool:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("seconds", [0.0, 0.2, 0.7, 2.0])
def test_a_signal_at_any_moment_of_the_start_ends_it_with_0(
    tiny_checkpoint: Path, child_environment: dict[str, str], seconds: float, number: int
) -> None:
    command = [sys.executable, "-P", "-m", "rae.server", "serve", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--model", str(tiny_checkpoint)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=child_environment,
    )
    try:
        wait_until(lambda: handles_sigterm(process.pid), 30)
        time.sleep(seconds)
        process.send_signal(number)
        _, log = process.communicate(timeout=STOP_S)
    finally:
        process.kill()
    assert process.returncode == 0, log.decode()
    assert b"Traceback" not in log


def test_sigint_exits_0_and_settings_come_from_flags(serve: Serve) -> None:
    with serve("--max-steps", "12", "--root-path", "/rae") as (url, process):
        assert b"from 2 to 12" in post(url, {"steps": 13})[1]
        process.send_signal(signal.SIGINT)
        assert process.wait(STOP_S) == 0


@pytest.mark.parametrize("is_flag", [True, False])
def test_a_port_that_is_taken_is_said_in_one_line(
    tiny_checkpoint: Path, child_environment: dict[str, str], is_flag: bool
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-P", "-m", "rae.server", "serve"]
        command += ["--model", str(tiny_checkpoint), *(["--port", port] if is_flag else [])]
        environment = child_environment if is_flag else child_environment | {"RAE_PORT": port}
        done = subprocess.run(command, capture_output=True, env=environment, timeout=60)
    assert done.returncode == 1
    assert done.stderr.decode() == (
        f"Error: port {port} of 127.0.0.1 is taken; choose another with --port or RAE_PORT\n"
    )


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("example.org", "http://example.org:80"),
    ],
)
def test_the_first_lines_are_urls_that_work_here(host: str, url: str) -> None:
    lines = welcome(host, 80, "digits").splitlines()
    assert lines[0] == f"Ready: {url} serves digits"
    assert lines[1] == f"Docs:  {url}/docs"
    assert lines[2].startswith(f"Try:   curl -s {url}/generate -H 'content-type: application/json'")

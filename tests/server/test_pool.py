"""Real worker processes: what they are given, how they end, how requests in them are cancelled."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import pytest
from fastapi.testclient import TestClient
from httpx2 import Response

from rae.server import pool as pool_module
from rae.server import worker_state
from rae.server.metrics import Metrics
from rae.server.pool import Pool, ending
from rae.server.serve_settings import ServeSettings

MakeClient = Callable[..., AbstractContextManager[TestClient]]
WaitUntil = Callable[..., None]
JSON = {"accept": "application/json"}
SMALL = {"class_id": 3, "seed": 1, "steps": 5}
LONG = {"class_id": 0, "cfg": 1, "steps": 1000, "n": 8}


def post(client: TestClient, body: object, request_id: str = "x") -> Response:
    return client.post("/generate", json=body, headers={**JSON, "x-request-id": request_id})


def gauge(client: TestClient, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def workers() -> list[psutil.Process]:
    """This process's."""
    return [p for p in psutil.Process().children() if "rae.server.worker" in p.cmdline()]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_the_http_process_has_no_torch(serve: Callable[..., AbstractContextManager]) -> None:
    with serve() as (_, process):
        (worker,) = psutil.Process(process.pid).children()
        maps = [Path(f"/proc/{pid}/maps").read_text() for pid in (process.pid, worker.pid)]
    assert ["libtorch" in text for text in maps] == [False, True]


def test_two_workers_share_the_work_and_one_does_without_the_other(
    make_client: MakeClient, wait_until: WaitUntil
) -> None:
    with make_client(workers=2) as client, ThreadPoolExecutor() as threads:
        wait_until(lambda: gauge(client, "rae_workers_ready") == 2)
        alone = post(client, SMALL).json()["images"]
        long = [threads.submit(post, client, LONG) for _ in range(2)]
        wait_until(lambda: gauge(client, "rae_running_images") > 8)  # of 8 in each
        newest = max(workers(), key=lambda process: process.create_time())
        newest.kill()
        wait_until(lambda: gauge(client, "rae_workers_ready") == 1)
        assert client.get("/health/ready").status_code == 200
        assert post(client, SMALL).json()["images"] == alone
        assert [request.result().status_code for request in long] == [200, 200]
        wait_until(lambda: gauge(client, "rae_workers_ready") == 2)
        assert gauge(client, "rae_worker_restarts_total") == 1
        assert gauge(client, "rae_requests_retried_total") == 1


def test_nobody_is_left_when_the_pool_has_closed(make_client: MakeClient) -> None:
    before = workers()
    with make_client(workers=2) as client:
        started = [process for process in workers() if process not in before]
        assert started
        assert client.get("/health/ready").status_code == 200
    assert not any(process.is_running() for process in started)


def test_a_worker_ends_with_its_parent(serve: Callable[..., AbstractContextManager]) -> None:
    with serve() as (_, process):
        (worker,) = psutil.Process(process.pid).children()
        process.kill()
        worker.wait(20)


def test_a_checkpoint_that_cannot_be_loaded_ends_the_server_in_one_line(
    tiny_checkpoint: Path, tmp_path: Path, child_environment: dict[str, str]
) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in tiny_checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "decoder.safetensors").write_bytes(b"not it")
    command = [sys.executable, "-P", "-m", "rae.server", "serve", "--model", str(folder)]
    done = subprocess.run(
        [*command, "--port", "0", "--log-level", "error"],
        capture_output=True,
        env=child_environment,
        timeout=60,
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.decode().splitlines() if line.startswith("Error: ")]
    assert "decoder.safetensors" in line
    assert "Traceback" not in done.stderr.decode()


@pytest.mark.parametrize("request_id", ["to-be-cancelled", "b64/+="])
def test_a_request_is_cancelled_by_its_id(
    client: TestClient, wait_until: WaitUntil, request_id: str
) -> None:
    alone = post(client, SMALL).json()["images"]
    with ThreadPoolExecutor() as threads:
        cancelled = threads.submit(post, client, LONG, request_id)
        wait_until(lambda: gauge(client, "rae_running_images") > 0)
        stays = threads.submit(post, client, SMALL)
        answer = client.delete(f"/requests/{request_id}")
        assert (answer.status_code, answer.json()) == (200, {"request_id": request_id})
        assert stays.result().json()["images"] == alone
        assert cancelled.result().status_code == 499
        assert cancelled.result().json()["error"]["type"] == "cancelled"
    wait_until(lambda: gauge(client, "rae_running_images") == 0)
    assert gauge(client, "rae_waiting_images") == gauge(client, "rae_queued_evaluations") == 0
    gone = client.delete(f"/requests/{request_id}")
    assert (gone.status_code, gone.json()["error"]["type"]) == (404, "not_found")


def test_with_keys_a_request_is_its_owners(
    make_client: MakeClient, wait_until: WaitUntil, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("ann:a-key-of-ann-0123456789\nbob:a-key-of-bob-0123456789\n")
    ann, bob = ({"x-api-key": f"a-key-of-{name}-0123456789"} for name in ("ann", "bob"))
    with make_client(api_keys_file=keys) as client, ThreadPoolExecutor() as threads:
        headers = {**ann, **JSON, "x-request-id": "hers"}
        hers = threads.submit(client.post, "/generate", json=LONG, headers=headers)
        wait_until(lambda: gauge(client, "rae_running_images") > 0)
        assert client.delete("/requests/hers").status_code == 401
        assert client.delete("/requests/hers", headers=bob).status_code == 404
        assert not hers.done()
        assert client.delete("/requests/hers", headers=ann).status_code == 200
        assert hers.result().status_code == 499


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (None, "the worker could not be ended"),
        (0, "the worker ended with exit code 0"),
        (-signal.SIGSEGV, "the worker was ended by SIGSEGV"),
        (-64, "the worker was ended by SIGRTMAX"),
        (-99, "the worker was ended by signal 99"),
    ],
)
def test_how_a_worker_ended_is_said(code: int | None, text: str) -> None:
    assert ending(code) == text


def test_a_frozen_worker_is_replaced(make_client: MakeClient, wait_until: WaitUntil) -> None:
    before = workers()
    with make_client(hang_timeout=1) as client, ThreadPoolExecutor() as threads:
        alone = post(client, SMALL).json()["images"]
        (worker,) = [process for process in workers() if process not in before]
        os.kill(worker.pid, signal.SIGSTOP)
        stuck = threads.submit(post, client, SMALL)
        started = time.monotonic()
        assert stuck.result().json()["images"] == alone
        assert time.monotonic() - started < 60
        assert gauge(client, "rae_worker_restarts_total") == 1


def test_a_server_that_was_frozen_keeps_its_worker(
    serve: Callable[..., AbstractContextManager], wait_until: WaitUntil
) -> None:
    with serve("--hang-timeout", "1") as (_, process):
        (worker,) = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        process.send_signal(signal.SIGCONT)
        time.sleep(1)
        assert worker.is_running() and psutil.Process(process.pid).children() == [worker]


async def life(command: Sequence[str], until: Callable[[Pool], bool]) -> Pool:
    """A pool of one such worker, closed once that holds."""
    pool = Pool(Path(), ServeSettings(workers=1, hang_timeout=1), Metrics(), command)
    await pool.start()
    async with asyncio.timeout(60):
        while not until(pool):
            await asyncio.sleep(0.01)
        await pool.close()
    return pool


def test_a_request_is_in_flight_until_its_answer_is_sent() -> None:
    metrics = Metrics()
    pool = Pool(Path(), ServeSettings(), metrics)
    metrics.accepted()
    assert pool.in_flight == 1
    metrics.ended("done", 1.0, "internal")
    assert pool.in_flight == 0


def test_a_worker_that_never_starts_is_given_up() -> None:
    command = (sys.executable, "-c", "import sys; sys.exit(7)")
    pool = asyncio.run(life(command, lambda pool: pool.failure is not None))
    assert pool.failure == "the worker ended with exit code 7"


def test_a_worker_whose_socket_is_held_by_its_child_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_state, "SILENT_START_S", 1.0)
    script = "import os, time; os.fork() or time.sleep(30); os.abort()"
    command = (sys.executable, "-c", script)
    pool = asyncio.run(life(command, lambda pool: pool.workers[0].restarts == 1))
    assert pool.in_flight == 0


def test_a_worker_that_the_system_cannot_end_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_state, "SILENT_START_S", 1.0)
    monkeypatch.setattr(pool_module, "END_S", 1.0)
    immortal: list[subprocess.Popen[bytes]] = []
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: immortal.append(process))
    script = "import time; time.sleep(60)"
    try:
        pool = asyncio.run(
            life((sys.executable, "-c", script), lambda pool: pool.workers[0].restarts == 1)
        )
    finally:
        monkeypatch.undo()
        for process in set(immortal):
            process.kill()
            process.wait()
    assert pool.workers[0].restarts == 1

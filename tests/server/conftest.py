"""A server in this process, and real ones in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from rae.models.checkpoint_config import read_config
from rae.server.app import create_app
from rae.server.metrics import Metrics
from rae.server.pool import COMMAND, Pool
from rae.server.serve_settings import ServeSettings
from rae.server.tracing import Tracing

if TYPE_CHECKING:
    from fastapi.testclient import TestClient

START_S = 60
STOP_S = 20

MakeClient = Callable[..., AbstractContextManager["TestClient"]]
Serve = Callable[..., AbstractContextManager[tuple[str, subprocess.Popen[bytes]]]]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    # Two threads on two busy cores: 10 s for 50 steps of the tiny model; one thread: 0.1 s.
    torch.set_num_threads(1)


@pytest.fixture(params=[1, 2, 3], ids=lambda count: f"{count} threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_client(tiny_checkpoint: Path) -> MakeClient:
    """A client of an app whose worker runs the tiny checkpoint."""
    from fastapi.testclient import TestClient  # wants httpx2, which tests on a GPU may lack

    @contextmanager
    def make(
        folder: Path = tiny_checkpoint,
        command: Sequence[str] = COMMAND,
        tracing: Tracing | None = None,
        **settings: object,
    ) -> Iterator[TestClient]:
        values: dict[str, Any] = {"device": "cpu", "precision": "fp32", "max_batch": 8}
        values.update(settings)
        chosen = ServeSettings(**values)
        (config, sha256), metrics = read_config(folder), Metrics()
        pool = Pool(folder, chosen, metrics, command)
        metrics.watch(pool, config.name)
        app = create_app(pool, config, sha256, metrics, chosen, tracing)
        with TestClient(app, root_path=chosen.root_path, raise_server_exceptions=False) as client:
            until(lambda: pool.ready)
            yield client

    return make


@pytest.fixture(scope="session")
def client(make_client: MakeClient) -> Iterator[TestClient]:
    with make_client() as client:
        yield client


@pytest.fixture(scope="session")
def child_environment() -> dict[str, str]:
    outer = {key: value for key, value in os.environ.items() if not key.startswith("RAE_")}
    return outer | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}


@pytest.fixture(scope="session")
def serve(
    tiny_checkpoint: Path,
    child_environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Serve:
    """`rae serve` on a free port: yields its URL, once it said that it is ready, and process."""

    @contextmanager
    def start(*flags: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
        log = tmp_path_factory.mktemp("serve") / "log"
        command = [sys.executable, "-P", "-m", "rae.server", "serve", "--port", "0"]
        command += ["--model", str(tiny_checkpoint), "--device", "cpu", "--max-batch", "8"]
        command += ["--precision", "fp32", *flags]
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, env=child_environment)
        try:
            until(lambda: "Try:" in log.read_text() or process.poll() is not None, START_S)
            lines = [line for line in log.read_text().splitlines() if line.startswith("Ready: ")]
            assert lines, log.read_text()
            yield lines[0].split()[1], process
        finally:
            process.kill()
            process.wait(STOP_S)

    return start


@pytest.fixture(scope="session")
def faulty_worker() -> Callable[..., Sequence[str]]:
    """What starts a worker in which the image of seed 666 + i brings the i-th fault: pairs of a
    stage and one of FAULTS in faulty_worker.py."""
    script = Path(__file__).with_name("faulty_worker.py")
    return lambda *pairs: (sys.executable, "-P", str(script), *pairs)


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    return until


def until(condition: Callable[[], bool], timeout_s: float = START_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)

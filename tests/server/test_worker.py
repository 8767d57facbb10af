"""What a worker tells its parent, without an engine's thread or a process."""

from __future__ import annotations

import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NoReturn

import psutil
import pytest

from rae.server import messages
from rae.server.errors import ApiError, EngineClosedError, QueueFullError
from rae.server.worker import Worker, trim_heap

SUBMIT = messages.Submit(
    ticket=1,
    request_id="x",
    specs=[],
    client="",
    weight=1.0,
    priority="normal",
    deadline_s=1.0,
    bounded=True,
)


@pytest.fixture
def worker() -> Iterator[Worker]:
    parent, child = socket.socketpair()
    with parent, child:
        yield Worker(child)


def test_a_worker_has_no_web_framework() -> None:
    """It would take 15 MB and 0.2 s of every start."""
    code = "import sys, rae.server.worker, rae.server.engine; print(*sys.modules)"
    command = [sys.executable, "-P", "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert {"rae.server.engine", "torch"} <= set(loaded)
    assert not {"fastapi", "starlette", "pydantic", "uvicorn"} & set(loaded)


def refusing(error: ApiError, failure: str | None) -> Any:  # noqa: ANN401
    def submit(*_: object, **__: object) -> NoReturn:
        raise error

    return SimpleNamespace(submit=submit, failure=failure)


def test_who_comes_to_an_engine_that_has_failed_is_left_to_another_worker(worker: Worker) -> None:
    worker._submit(refusing(EngineClosedError(), "the engine failed"), SUBMIT)
    assert worker._outbox.empty()


def test_who_is_refused_at_the_door_is_told(worker: Worker) -> None:
    error = QueueFullError(1.0, 1.0, 1.0, 1.0)
    worker._submit(refusing(error, None), SUBMIT)
    assert worker._outbox.get_nowait() == messages.Refused(1, error)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_what_lies_free_between_blocks_in_use_goes_back_to_the_system() -> None:
    process = psutil.Process()
    blocks = [b"x" * 64_000 for _ in range(2000)]
    kept = blocks[::20]
    del blocks
    before = process.memory_info().rss
    trim_heap()
    assert before - process.memory_info().rss > 100e6
    assert {len(block) for block in kept} == {64_000}

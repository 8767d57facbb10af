"""What a machine does to a server: a clock that jumps, a disk that is full."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

BODY = b'{"class_id": 3, "seed": 1, "steps": 20, "deadline_ms": 60000}'
JUMPING_CLOCK = """
import itertools, random, time
now, day = time.time, 86_400
jumps = random.Random(0)
time.time = lambda: now() + jumps.choice((-day, 0, day))
time.time_ns = lambda: int(1e9 * time.time())
"""


@contextmanager
def started(checkpoint: Path, environment: dict[str, str], log: Path) -> Iterator[tuple[str, int]]:
    command = [sys.executable, "-P", "-m", "rae.server", "serve", "--port", "0", "--device", "cpu"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--model", str(checkpoint)], stdout=out, stderr=out, env=environment
        )
    try:
        end = time.monotonic() + 60
        while "Ready: " not in log.read_text() and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.05)
        yield log.read_text().partition("Ready: ")[2].split()[0], process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


def post(url: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    connection.request("POST", "/generate", BODY, {"content-type": "application/json"})
    response = connection.getresponse()
    answer = response.status, response.read()
    connection.close()
    return answer


@pytest.fixture(scope="module")
def expected(
    tiny_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
    child_environment: dict[str, str],
) -> bytes:
    log = tmp_path_factory.mktemp("undisturbed") / "log"
    with started(tiny_checkpoint, child_environment, log) as (url, _):
        status, image = post(url)
    assert status == 200
    return image


def test_a_clock_that_jumps_harms_nobody(
    tiny_checkpoint: Path, tmp_path: Path, child_environment: dict[str, str], expected: bytes
) -> None:
    """Wall clocks of both processes jump by a day, to and fro."""
    (tmp_path / "sitecustomize.py").write_text(JUMPING_CLOCK)
    paths = [str(tmp_path), *filter(None, [child_environment.get("PYTHONPATH")])]
    environment = child_environment | {"PYTHONPATH": os.pathsep.join(paths)}
    with started(tiny_checkpoint, environment, tmp_path / "log") as (url, _):
        assert [post(url) for _ in range(5)] == [(200, expected)] * 5


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_a_cache_that_cannot_be_written_harms_nobody(
    tiny_checkpoint: Path, tmp_path: Path, child_environment: dict[str, str], expected: bytes
) -> None:
    cache = tmp_path / "cache" / "rae-server"
    cache.mkdir(parents=True)
    (cache / "step-times").symlink_to("/dev/full")
    environment = child_environment | {"XDG_CACHE_HOME": str(cache.parent)}
    with started(tiny_checkpoint, environment, tmp_path / "log") as (url, _):
        assert post(url) == (200, expected)

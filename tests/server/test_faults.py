"""Faults of one request, in real worker processes: what its client sees, and that nobody else does.

docs/faults.md is the table of these.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import pytest
from fastapi.testclient import TestClient
from httpx2 import Response

from rae.server import generate

MakeClient = Callable[..., AbstractContextManager[TestClient]]
FAULTY = {"class_id": 1, "seed": 666, "steps": 8, "cfg": 1.5}
OTHERS: list[dict[str, Any]] = [
    {"class_id": 0, "seed": 1, "steps": 200},
    {"class_id": 1, "seed": 2, "steps": 60, "cfg": 2.0},
    {"class_id": 2, "seed": 3, "steps": 30, "guidance_method": "autoguidance", "cfg": 1.5},
    {"class_id": 3, "seed": 4, "steps": 3, "n": 2},
]
DIED = (503, "worker_died")
FAILED = (500, "generation_failed")
TABLE = {
    ("admit", "raise"): FAILED,
    ("admit", "die"): DIED,
    ("step", "raise"): FAILED,
    ("step", "die"): DIED,
    ("step", "hang"): DIED,
    ("step", "garbage"): DIED,
    ("step", "hang up"): DIED,
    ("step", "out of memory"): (200, ""),
    ("decode", "raise"): FAILED,
    ("decode", "die"): DIED,
    ("decode", "hang"): DIED,
    ("decode", "out of memory"): (200, ""),
    ("latents", "nan"): FAILED,
}


def post(client: TestClient, body: dict[str, Any]) -> Response:
    """The answer; who comes while there is no worker comes again."""
    while True:
        response = client.post("/generate", json=body, headers={"accept": "application/json"})
        if response.status_code != 503 or response.json()["error"]["type"] != "not_ready":
            return response
        time.sleep(0.1)


def pixels(response: Response) -> list[str]:
    return [image["data"] for image in response.json()["images"]]


@pytest.fixture(scope="module")
def expected(client: TestClient) -> list[list[str]]:
    """What each of the others gets alone, and the faulty one where it has no fault."""
    return [pixels(post(client, body)) for body in (*OTHERS, FAULTY)]


def gauges(client: TestClient) -> dict[str, float]:
    names = ("rae_running_images", "rae_waiting_images", "rae_queued_evaluations")
    lines = client.get("/metrics").text.splitlines()
    return {
        name: float(line.split()[1]) for line in lines for name in names if line.startswith(name)
    }


@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] if case == ("decode", "hang") else [])
        for case in TABLE
    ],
)
def test_a_fault_is_its_own_requests(
    make_client: MakeClient,
    expected: list[list[str]],
    wait_until: Callable[..., None],
    faulty_worker: Callable[..., Sequence[str]],
    stage: str,
    fault: str,
) -> None:
    command = faulty_worker(stage, fault)
    with make_client(command=command, hang_timeout=5) as client, ThreadPoolExecutor() as threads:
        bodies = [*OTHERS[:2], FAULTY, *OTHERS[2:]]
        responses = list(threads.map(lambda body: post(client, body), bodies))
        faulty = responses.pop(2)
        status, kind = TABLE[stage, fault]
        assert faulty.status_code == status, faulty.text
        if status == 200:
            assert pixels(faulty) == expected[-1]
        else:
            assert faulty.json()["error"]["type"] == kind
            assert "/a/path" not in faulty.text and "Traceback" not in faulty.text
        assert [pixels(response) for response in responses] == expected[:-1]
        wait_until(lambda: client.get("/health/ready").status_code == 200)
        assert pixels(post(client, OTHERS[0])) == expected[0]
        wait_until(lambda: set(gauges(client).values()) == {0.0})


def test_a_fault_of_encoding_is_its_own_requests(
    client: TestClient, expected: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = generate.encode

    def faulty(image: object, format: object, description: dict[str, Any]) -> bytes:
        if description["seed"] == FAULTY["seed"]:
            raise OSError(28, "No space left on device", "/a/path")
        return encode(image, format, description)  # type: ignore[arg-type]

    monkeypatch.setattr(generate, "encode", faulty)
    with ThreadPoolExecutor() as threads:
        responses = list(threads.map(lambda body: post(client, body), (FAULTY, *OTHERS)))
    assert responses[0].status_code == 500
    assert responses[0].json()["error"]["message"] == "the png could not be made (OSError)"
    assert [pixels(response) for response in responses[1:]] == expected[:-1]

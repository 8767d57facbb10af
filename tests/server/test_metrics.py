"""What is counted: every request once, by how it ended; the engine's work; GPUs and workers."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import get_args, get_type_hints

import pytest
import torch
from fastapi.testclient import TestClient
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from rae.server.accounting import AccountMiddleware
from rae.server.devices import DeviceUse, device_use, power_watts
from rae.server.errors import FailureReason
from rae.server.metrics import Ended, Metrics, Observer, Refused, power_of_two

MakeClient = Callable[..., AbstractContextManager[TestClient]]
ENDED, REFUSED = get_args(Ended), get_args(Refused)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"rae_{name}", labels)


def outcomes(metrics: Metrics) -> dict[str, float]:
    found = {name: value(metrics, "requests_total", outcome=name) for name in (*ENDED, *REFUSED)}
    return {name: count for name, count in found.items() if count}


def check_sums(metrics: Metrics) -> None:
    counts = outcomes(metrics)
    accepted = value(metrics, "requests_accepted_total")
    assert accepted == sum(counts.get(name, 0) for name in ENDED)
    reasons = [value(metrics, "failures_total", reason=r) or 0 for r in get_args(FailureReason)]
    assert sum(reasons) == counts.get("failed", 0)
    assert value(metrics, "requests_in_flight") == 0
    assert value(metrics, "request_seconds_count") == counts.get("done", 0)


async def call(app: ASGIApp, method: str = "POST", path: str = "/generate") -> None:
    scope: Scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode()}
    scope |= {"headers": [], "query_string": b"", "state": {"request_id": "1"}}

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b""}

    async def send(message: object) -> None:
        pass

    await app(scope, receive, send)


def answer(
    metrics: Metrics, status: int | BaseException, is_accepted: bool, reason: str = ""
) -> ASGIApp:
    """An app that answers so, or raises."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if is_accepted:
            scope["state"]["account"].accept()
            assert value(metrics, "requests_in_flight") == 1
        if isinstance(status, BaseException):
            raise status
        if reason:
            scope["state"]["failure"] = reason
        await Response(status_code=status)(scope, receive, send)

    return AccountMiddleware(app, metrics)


@pytest.mark.parametrize(
    ("status", "at_the_door", "accepted"),
    [
        (200, "internal", "done"),
        (400, "invalid", "cancelled"),
        (413, "invalid", "cancelled"),
        (422, "invalid", "cancelled"),
        (429, "rejected", "cancelled"),
        (499, "incomplete", "cancelled"),
        (500, "internal", "failed"),
        (503, "unavailable", "failed"),
        (504, "refused_deadline", "expired"),
        (RuntimeError("a fault"), "internal", "failed"),
        (asyncio.CancelledError(), "internal", "failed"),
    ],
)
def test_how_a_request_ended_is_its_status(
    status: int | BaseException, at_the_door: str, accepted: str
) -> None:
    for is_accepted, outcome in ((False, at_the_door), (True, accepted)):
        metrics = Metrics()
        try:
            asyncio.run(call(answer(metrics, status, is_accepted)))
        except (RuntimeError, asyncio.CancelledError) as error:
            assert error is status
        assert outcomes(metrics) == {outcome: 1}
        check_sums(metrics)


@pytest.mark.parametrize("reason", get_args(FailureReason))
def test_failures_have_a_reason_of_a_fixed_set(reason: str) -> None:
    metrics = Metrics()
    asyncio.run(call(answer(metrics, 500, True, reason)))
    assert value(metrics, "failures_total", reason=reason) == 1
    check_sums(metrics)


def test_a_fault_that_nobody_named_is_internal_and_the_end_of_patience_shutting_down() -> None:
    for error, reason in ((ValueError(), "internal"), (asyncio.CancelledError(), "shutting_down")):
        metrics = Metrics()
        with pytest.raises(type(error)):
            asyncio.run(call(answer(metrics, error, True)))
        assert value(metrics, "failures_total", reason=reason) == 1


def test_other_requests_are_not_counted() -> None:
    metrics = Metrics()
    for method, path in (("GET", "/generate"), ("POST", "/generate/x"), ("GET", "/info")):
        asyncio.run(call(answer(metrics, 404, False), method, path))
    assert outcomes(metrics) == {}


def test_real_requests_add_up(
    make_client: MakeClient,
    wait_until: Callable[..., None],
    faulty_worker: Callable[..., Sequence[str]],
) -> None:
    command = faulty_worker("decode", "raise", "step", "slow")
    with make_client(command=command, max_queue=9000) as client:
        asked = {"class_id": 1, "cfg": 1, "steps": 5}
        long = {**asked, "steps": 1000, "n": 8}
        assert client.post("/generate", json=asked).status_code == 200
        assert client.post("/generate", json={"steps": 1}).status_code == 422
        assert client.post("/generate", json={**long, "deadline_ms": 1}).status_code == 504
        slow = {**asked, "seed": 667, "deadline_ms": 450}
        assert client.post("/generate", json=slow).status_code == 504
        assert client.post("/generate", json={**asked, "seed": 666}).status_code == 500
        wait_until(lambda: scrape(client)["rae_queue_seconds_count"] == 3)
        wait_until(lambda: scrape(client)["rae_decode_seconds_count"] == 2)  # one too late
        wait_until(lambda: scrape(client)["rae_running_images"] == 0)  # by the next beat
        samples = scrape(client)
    ended = {"done": 1, "failed": 1, "expired": 1, "cancelled": 0}
    expected = ended | dict.fromkeys(REFUSED, 0) | {"invalid": 1, "refused_deadline": 1}
    assert {o: samples[f'rae_requests_total{{outcome="{o}"}}'] for o in expected} == expected
    assert samples["rae_requests_accepted_total"] == 3
    assert samples["rae_requests_in_flight"] == samples["rae_running_images"] == 0
    assert samples["rae_slots"] == samples["rae_free_slots"] == 128
    assert (samples["rae_max_rows"], samples["rae_workers_ready"]) == (8, 1)
    assert samples["rae_queue_limit_evaluations"] == 9000
    assert samples["rae_first_step_seconds_count"] == samples["rae_queue_seconds_count"]
    assert samples["rae_decode_images_sum"] == samples["rae_decode_seconds_count"]
    assert samples["rae_images_total"] == 1
    assert samples["process_resident_memory_bytes"] > 2**20
    (build,) = [name for name in samples if name.startswith("rae_build_info")]
    assert 'checkpoint="tiny"' in build and samples[build] == 1


def scrape(client: TestClient) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(number) for name, _, number in pairs}


def test_the_engines_work() -> None:
    metrics = Metrics()
    metrics.queued(0.5)
    metrics.first_stepped(0.75)
    for rows, seconds in ((1, 0.1), (5, 0.2), (8, 0.3)):
        metrics.stepped(rows, seconds)
    metrics.evaluated(11.0, 5.0)
    metrics.evaluated(1.25, 0.0)
    metrics.decoded(3, 0.04)
    assert value(metrics, "queue_seconds_sum") == 0.5
    assert value(metrics, "first_step_seconds_sum") == 0.75
    assert value(metrics, "step_seconds_sum", rows="1") == 0.1
    assert value(metrics, "step_seconds_sum", rows="8") == 0.5
    assert value(metrics, "step_seconds_count", rows="8") == 2
    assert value(metrics, "rows_evaluated_total") == 12.25
    assert value(metrics, "rows_saved_total") == 5
    assert value(metrics, "decode_seconds_sum") == 0.04
    assert value(metrics, "decode_images_sum") == 3
    assert value(metrics, "decode_images_bucket", le="2.0") == 0
    assert value(metrics, "decode_images_bucket", le="4.0") == 1


def test_rows_are_labels_of_few_values() -> None:
    assert [power_of_two(rows) for rows in (0, 1, 2, 3, 4, 5, 64, 65)] == [
        1,
        1,
        2,
        4,
        4,
        8,
        64,
        128,
    ]
    assert len({power_of_two(rows) for rows in range(10_000)}) == 15


def test_an_observer_gets_numbers_alone() -> None:
    for name, method in inspect.getmembers(Observer, inspect.isfunction):
        if not name.startswith("_"):
            hints = get_type_hints(method)
            assert hints.pop("return") is type(None)
            assert hints and set(hints.values()) <= {int, float}, name
            assert callable(getattr(Metrics, name))


def test_workers() -> None:
    metrics = Metrics()
    metrics.worker_restarted()
    metrics.worker_recovered(7.5)
    metrics.retried()
    assert value(metrics, "worker_restarts_total") == 1
    assert value(metrics, "requests_retried_total") == 1
    assert value(metrics, "worker_recovery_seconds_sum") == 7.5
    assert value(metrics, "worker_recovery_seconds_bucket", le="5.0") == 0
    assert value(metrics, "worker_recovery_seconds_bucket", le="10.0") == 1


def test_a_gpus_use_by_worker_and_no_figure_that_is_not_known() -> None:
    metrics = Metrics()
    metrics.device(0, 10, 80, 250.5)
    metrics.device(1, 20, 80, None)
    assert value(metrics, "gpu_memory_used_bytes", worker="0") == 10
    assert value(metrics, "gpu_memory_total_bytes", worker="1") == 80
    assert value(metrics, "gpu_power_watts", worker="0") == 250.5
    assert value(metrics, "gpu_power_watts", worker="1") is None
    metrics.device(0, None, None, None)
    assert value(metrics, "gpu_memory_used_bytes", worker="0") is None
    assert value(metrics, "gpu_power_watts", worker="0") is None
    assert value(metrics, "gpu_memory_used_bytes", worker="1") == 20


def test_a_cpu_has_no_such_figures() -> None:
    assert device_use(torch.device("cpu")) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may answer")
def test_without_a_gpu_nothing_is_raised() -> None:
    assert power_watts(torch.device("cuda")) is None


def test_what_a_gpu_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (30, 100))
    monkeypatch.setattr(torch.cuda, "power_draw", lambda _: 250_500)
    assert device_use(torch.device("cuda", 1)) == DeviceUse(70, 100, 250.5)


def test_a_gpu_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> int:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    assert device_use(torch.device("cuda", 0)) is None


class NVMLError(Exception):
    """Of pynvml, which is no RuntimeError."""


@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("nvidia-ml-py"), NVMLError(), RuntimeError()]
)
def test_memory_is_known_where_nvml_fails(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (30, 100))
    monkeypatch.setattr(torch.cuda, "power_draw", fail)
    assert device_use(torch.device("cuda", 0)) == DeviceUse(70, 100, None)

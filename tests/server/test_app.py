"""The routes around /generate, the counts, and what happens under load."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from rae.models.checkpoint import load_checkpoint
from rae.models.checkpoint_config import read_config
from rae.server.app import create_app
from rae.server.metrics import Metrics
from rae.server.pool import Pool
from rae.server.serve_settings import ServeSettings

MakeClient = Callable[..., AbstractContextManager[TestClient]]
OUTCOMES = ("done", "failed", "cancelled", "rejected", "invalid")


def scrape(client: TestClient) -> dict[str, float]:
    """Samples by name, or by outcome."""
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return {
        sample.labels.get("outcome", sample.name): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }


def test_classes(client: TestClient) -> None:
    assert client.get("/classes").json() == [
        {"class_id": 0, "name": "zero"},
        {"class_id": 1, "name": "one"},
        {"class_id": 2, "name": "two"},
        {"class_id": 3, "name": "three"},
    ]


def test_info(client: TestClient, tiny_checkpoint: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    parts = {"dit_dh": checkpoint.dit_dh, "decoder": checkpoint.rae.decoder}
    parts["guide"] = checkpoint.guide
    info = client.get("/info").json()
    (worker,) = info["workers"]
    assert (worker["state"], worker["reason"], worker["restarts"]) == ("ready", "", 0)
    assert (worker["device"], worker["precision"]) == ("cpu", "fp32")
    assert 0 < worker["start_s"] < 60
    assert info["solver"] == "euler"
    assert "steps − 1 evaluations" in info["sampler"]
    assert info["deterministic"] is False
    assert (info["max_batch"], worker["max_rows"], worker["slots"]) == (8, 8, 128)
    model = info["model"]
    assert (model["name"], model["sha256"], model["license"]) == ("tiny", checkpoint.sha256, "MIT")
    assert (model["num_classes"], model["image_size"], model["shift"]) == (4, 16, 1.5)
    assert model["guidance_methods"] == ["cfg", "autoguidance"]
    assert model["defaults"]["steps"] == 10
    assert model["parameters"] == {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in parts.items()
        if part is not None
    }
    assert model["configurations"]["dit_dh"]["depth"] == 2


def test_health_and_docs(client: TestClient) -> None:
    ok = {"status": "ok", "reasons": []}
    assert client.get("/health/live").json() == ok
    assert client.get("/health/ready").json() == ok
    to_docs = client.get("/", follow_redirects=False)
    assert (to_docs.status_code, to_docs.headers["location"]) == (307, "/docs")
    assert client.get("/docs").status_code == 200


def test_not_ready_says_why(tiny_checkpoint: Path) -> None:
    (config, sha256), metrics, settings = read_config(tiny_checkpoint), Metrics(), ServeSettings()
    pool = Pool(tiny_checkpoint, settings, metrics)
    # Without its lifespan, the app does not start the pool.
    client = TestClient(create_app(pool, config, sha256, metrics, settings))
    response = client.get("/health/ready")
    assert response.status_code == 503
    assert response.json() == {"status": "not ready", "reasons": ["no worker was started yet"]}
    assert client.get("/health/live").status_code == 200
    refused = client.post("/generate", json={"class_id": 1})
    assert (refused.status_code, refused.json()["error"]["type"]) == (503, "not_ready")
    assert int(refused.headers["retry-after"]) >= 1


def test_every_request_is_counted_once(
    make_client: MakeClient, wait_until: Callable[..., None]
) -> None:
    with make_client() as client:
        for status, body in [(200, {"n": 3}), (200, {}), (422, {"steps": 1}), (422, {"x": 1})]:
            asked = {"class_id": 1, "cfg": 1, "steps": 5, **body}
            assert client.post("/generate", json=asked).status_code == status
        too_large = client.post("/generate", content=b" " * 70_000)
        assert too_large.status_code == 413
        malformed = client.post(
            "/generate", content=b"{", headers={"content-type": "application/json"}
        )
        assert malformed.status_code == 400
        wait_until(lambda: scrape(client)["rae_queue_seconds_count"] == 2)
        wait_until(lambda: scrape(client)["rae_rows_evaluated_total"] == pytest.approx(4 * 4))
        wait_until(lambda: scrape(client)["rae_queued_evaluations"] == 0)
        found = scrape(client)
    assert {outcome: found[outcome] for outcome in OUTCOMES} == {
        "done": 2,
        "failed": 0,
        "cancelled": 0,
        "rejected": 0,
        "invalid": 4,
    }
    assert found["rae_images_total"] == 4
    assert found["rae_request_seconds_count"] == found["rae_encode_seconds_count"] == 2
    assert found["rae_waiting_images"] == found["rae_running_images"] == 0
    assert found["rae_queue_limit_evaluations"] == 150_000
    assert found["rae_build_info"] == 1


def test_a_full_queue_is_429_and_then_free(make_client: MakeClient) -> None:
    long = {"class_id": 0, "cfg": 1, "steps": 600, "n": 8}
    with make_client(max_queue=5400) as client, ThreadPoolExecutor() as threads:
        running = threads.submit(client.post, "/generate", json=long)
        deadline = time.monotonic() + 30
        while scrape(client)["rae_running_images"] < 7:  # the eighth slot is kept
            assert time.monotonic() < deadline
            time.sleep(0.01)
        refused = client.post("/generate", json={**long, "n": 2})
        accepted = client.post("/generate", json={"class_id": 1, "steps": 3})
        assert running.result().status_code == 200
        assert client.post("/generate", json={**long, "n": 1}).status_code == 200
        found = scrape(client)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    error = refused.json()["error"]
    assert error["type"] == "queue_full"
    assert "the limit is 5400" in error["message"]
    assert accepted.status_code == 200
    assert (found["done"], found["rejected"]) == (3, 1)


def test_cors_and_root_path(make_client: MakeClient) -> None:
    settings = {"cors_origins": "https://a.example, https://b.example", "root_path": "/rae"}
    with make_client(**settings) as client:
        allowed = client.post(
            "/generate", json={"steps": 2}, headers={"origin": "https://b.example"}
        )
        assert allowed.headers["access-control-allow-origin"] == "https://b.example"
        assert "X-Seed" in allowed.headers["access-control-expose-headers"]
        other = client.get("/classes", headers={"origin": "https://c.example"})
        assert "access-control-allow-origin" not in other.headers
        assert client.get("/", follow_redirects=False).headers["location"] == "/rae/docs"
        assert client.get("/rae/classes").status_code == 200
        assert client.get("/openapi.json").json()["servers"] == [{"url": "/rae"}]


def test_without_origins_there_is_no_cors(client: TestClient) -> None:
    response = client.get("/classes", headers={"origin": "https://a.example"})
    assert "access-control-allow-origin" not in response.headers


def test_limits_are_settings(make_client: MakeClient) -> None:
    with make_client(max_steps=20, max_images=2, max_body_bytes=100) as client:
        steps = client.post("/generate", json={"steps": 21}).json()["error"]["message"]
        images = client.post("/generate", json={"n": 3}).json()["error"]["message"]
        body = client.post("/generate", json={"class_name": "x" * 100}).json()["error"]["message"]
        assert client.post("/generate", json={"steps": 20, "n": 2}).status_code == 200
    assert "from 2 to 20" in steps
    assert "from 1 to 2" in images
    assert "at most 100" in body

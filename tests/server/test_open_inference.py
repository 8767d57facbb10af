"""The field names and statuses of the Open Inference Protocol's specification."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from rae.models.checkpoint_config import read_config
from rae.server.error_responses import add_error_handlers
from rae.server.open_inference import INPUTS, OpenInference
from rae.server.schemas import GenerateRequest
from rae.server.settings import server_version


@pytest.fixture(scope="module")
def version(tiny_checkpoint: Path) -> str:
    return read_config(tiny_checkpoint)[1][:12]


def test_the_server(client: TestClient) -> None:
    answer = {"name": "rae-server", "version": server_version(), "extensions": []}
    assert client.get("/v2").json() == answer
    live, ready = client.get("/v2/health/live"), client.get("/v2/health/ready")
    assert (live.status_code, live.json()) == (200, {"live": True})
    assert (ready.status_code, ready.json()) == (200, {"ready": True})


def test_the_model(client: TestClient, version: str) -> None:
    found = client.get("/v2/models/tiny")
    assert found.status_code == 200
    assert found.json() == {
        "name": "tiny",
        "versions": [version],
        "platform": "pytorch_safetensors",
        "inputs": [
            {"name": "class_id", "datatype": "INT64", "shape": [1]},
            {"name": "cfg", "datatype": "FP32", "shape": [1]},
            {"name": "steps", "datatype": "INT64", "shape": [1]},
            {"name": "seed", "datatype": "INT64", "shape": [1]},
            {"name": "n", "datatype": "INT64", "shape": [1]},
            {"name": "guidance_method", "datatype": "BYTES", "shape": [1]},
            {"name": "guidance_interval", "datatype": "FP32", "shape": [2]},
        ],
        "outputs": [{"name": "image", "datatype": "UINT8", "shape": [-1, 16, 16, 3]}],
    }
    assert client.get(f"/v2/models/tiny/versions/{version}").json() == found.json()
    for path in ("/v2/models/tiny/ready", f"/v2/models/tiny/versions/{version}/ready"):
        ready = client.get(path)
        assert (ready.status_code, ready.json()) == (200, {"name": "tiny", "ready": True})


def test_inputs_are_fields_of_a_request() -> None:
    assert {name for name, _, _ in INPUTS} < set(GenerateRequest.model_fields)


@pytest.mark.parametrize("end", ["", "/ready"])
def test_no_other_model_and_no_other_version(client: TestClient, version: str, end: str) -> None:
    for path, message in [
        (f"/v2/models/large{end}", 'model is "large"; allowed: tiny'),
        (f"/v2/models/large/versions/{version}{end}", 'model is "large"; allowed: tiny'),
        (f"/v2/models/tiny/versions/1{end}", f'version is "1"; allowed: {version}'),
    ]:
        found = client.get(path)
        assert found.status_code == 404
        error = {"type": "not_found", "message": message, "details": []}
        assert found.json() == {"error": error, "request_id": found.headers["x-request-id"]}


def test_there_is_no_infer_route_and_the_docs_say_so(client: TestClient) -> None:
    assert client.post("/v2/models/tiny/infer", json={}).status_code == 404
    paths = client.get("/openapi.json").json()["paths"]
    assert "there is no infer route" in paths["/v2/models/{name}"]["get"]["description"]


def test_not_ready_is_503_and_alive(tiny_checkpoint: Path) -> None:
    app = FastAPI()
    add_error_handlers(app)
    OpenInference(*read_config(tiny_checkpoint), lambda: False).add_routes(app)
    client = TestClient(app)
    assert client.get("/v2/health/live").status_code == 200
    assert client.get("/v2/models/tiny").status_code == 200
    ready, model = client.get("/v2/health/ready"), client.get("/v2/models/tiny/ready")
    assert (ready.status_code, ready.json()) == (503, {"ready": False})
    assert (model.status_code, model.json()) == (503, {"name": "tiny", "ready": False})

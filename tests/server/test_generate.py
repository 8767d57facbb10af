"""POST /generate over HTTP: the right pixels, in the form that was asked for."""

from __future__ import annotations

import json
import re
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from rae.models.checkpoint import load_checkpoint
from rae.models.guidance import Guidance
from rae.models.sampling import denoise, draw_noise, timesteps, to_uint8
from rae.server.generate import accepts_image

EXIF_IMAGE_DESCRIPTION = 270


def pixels(data: bytes) -> np.ndarray:
    with Image.open(BytesIO(data)) as picture:
        return np.asarray(picture)


def metadata(data: bytes) -> dict[str, Any]:
    with Image.open(BytesIO(data)) as picture:
        return json.loads(picture.info.get("rae") or picture.getexif()[EXIF_IMAGE_DESCRIPTION])


def reference(folder: Path, label: int, seed: int, steps: int, guidance: Guidance) -> np.ndarray:
    checkpoint = load_checkpoint(folder)
    config = checkpoint.config
    latents = denoise(
        checkpoint.dit_dh,
        draw_noise(config.dit_dh.latent_shape, [seed]),
        torch.tensor([label]),
        timesteps(steps, config.shift),
        guidance=guidance,
        null_label=config.dit_dh.null_label,
        guide=checkpoint.guide,
    )
    return to_uint8(checkpoint.rae.decode(latents))[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("wire", "label", "guidance"),
    [
        ({"class_id": 3, "cfg": 1.0}, 3, Guidance(1.0)),
        ({"class_id": 3, "cfg": 4}, 3, Guidance(4.0)),
        ({"class_name": "two"}, 2, Guidance(1.5)),
        ({}, 4, Guidance(1.0)),
        ({"class_id": None, "cfg": 3.0}, 4, Guidance(1.0)),
        (
            {"class_id": 1, "cfg": 3.0, "guidance_interval": [0.2, 0.7]},
            1,
            Guidance(3.0, (0.2, 0.7)),
        ),
        (
            {"class_id": 0, "cfg": 2.5, "guidance_method": "autoguidance"},
            0,
            Guidance(2.5, method="autoguidance"),
        ),
    ],
)
def test_pixels_are_the_samplers(
    client: TestClient, tiny_checkpoint: Path, wire: dict, label: int, guidance: Guidance
) -> None:
    response = client.post("/generate", json={**wire, "steps": 12, "seed": 7})
    assert response.status_code == 200
    expected = reference(tiny_checkpoint, label, 7, 12, guidance).astype(int)
    assert np.abs(pixels(response.content) - expected).max() <= 1


def test_defaults_are_the_checkpoints(client: TestClient) -> None:
    first = client.post("/generate", json={"class_id": 1, "seed": 3})
    asked = {"class_id": 1, "seed": 3, "steps": 10, "cfg": 1.5, "guidance_method": "cfg"}
    asked |= {"guidance_interval": [0, 1], "n": 1, "format": "png", "solver": "euler"}
    assert client.post("/generate", json=asked).content == first.content
    nulls = dict.fromkeys(asked) | {"class_id": 1, "seed": 3}
    assert client.post("/generate", json=nulls).content == first.content
    assert first.headers["x-evaluations"] == "9"


def test_same_request_same_bytes_and_another_seed_another_image(client: TestClient) -> None:
    asked = {"class_id": 2, "seed": 11, "steps": 5}
    one = client.post("/generate", json=asked, headers={"x-request-id": "a"})
    two = client.post("/generate", json=asked, headers={"x-request-id": "b"})
    assert one.content == two.content
    other = client.post("/generate", json={**asked, "seed": 12})
    assert np.abs(pixels(other.content).astype(int) - pixels(one.content)).max() > 10


def test_headers(client: TestClient) -> None:
    response = client.post("/generate", json={"class_id": 0, "seed": 5, "steps": 7})
    assert response.headers["content-type"] == "image/png"
    assert response.headers["x-seed"] == "5"
    assert response.headers["x-evaluations"] == "6"
    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])
    number = r"\d+\.\d\d"
    stages = ", ".join(f"{name};dur={number}" for name in ("queue", "denoise", "decode", "encode"))
    assert re.fullmatch(stages, response.headers["server-timing"])


@pytest.mark.parametrize(
    ("sent", "is_kept"),
    [
        ("abc-1.2_3:/+=", True),
        ("x" * 64, True),
        ("x" * 65, False),
        ("a b", False),
        ("", False),
        ("é".encode("latin-1"), False),
    ],
)
def test_request_id(client: TestClient, sent: str | bytes, is_kept: bool) -> None:
    response = client.get("/health/live", headers=[(b"x-request-id", sent)])  # type: ignore[arg-type]
    (got,) = response.headers.get_list("x-request-id")
    assert (got == sent) == is_kept
    assert is_kept or re.fullmatch("[0-9a-f]{32}", got)


def test_a_random_seed_is_returned_and_makes_the_image_again(client: TestClient) -> None:
    first = client.post("/generate", json={"class_id": 0, "steps": 3})
    second = client.post("/generate", json={"class_id": 0, "steps": 3})
    seed = int(first.headers["x-seed"])
    assert seed != int(second.headers["x-seed"])
    again = client.post("/generate", json={"class_id": 0, "steps": 3, "seed": seed})
    assert again.content == first.content


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_metadata_makes_the_image_again(
    client: TestClient, tiny_checkpoint: Path, format: str
) -> None:
    asked = {"class_id": 3, "cfg": 2, "guidance_interval": [0, 0.8], "format": format}
    response = client.post("/generate", json=asked)
    assert response.headers["content-type"] == f"image/{format}"
    found = metadata(response.content)
    info = client.get("/info").json()
    assert found == {
        "class_id": 3,
        "class_name": "three",
        "cfg": 2.0,
        "steps": 10,
        "seed": int(response.headers["x-seed"]),
        "guidance_method": "cfg",
        "guidance_interval": [0.0, 0.8],
        "solver": "euler",
        "checkpoint": "tiny",
        "checkpoint_sha256": load_checkpoint(tiny_checkpoint).sha256,
        "precision": "fp32",
        "version": info["version"],
    }
    fields = client.get("/openapi.json").json()["paths"]["/generate"]["post"]["requestBody"]
    names = fields["content"]["application/json"]["schema"]["properties"]
    again = {key: value for key, value in found.items() if key in names} | {"format": format}
    assert client.post("/generate", json=again).content == response.content


def test_several_images_come_as_json_and_each_can_be_made_alone(client: TestClient) -> None:
    asked = {"class_id": 2, "n": 3, "seed": 100, "steps": 6, "format": "webp"}
    response = client.post(
        "/generate", json=asked, headers={"accept": "image/png", "x-request-id": "r1"}
    )
    body = response.json()
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-seed"] == "100"
    assert (body["request_id"], body["steps"], body["evaluations"]) == ("r1", 6, 5)
    assert (body["cfg"], body["guidance_method"]) == (1.5, "cfg")
    assert body["guidance_interval"] == [0, 1]
    assert body["timings_ms"].keys() == {"queue", "denoise", "decode", "encode"}
    assert body["timings_ms"]["denoise"] > 0
    for i, image in enumerate(body["images"]):
        data = b64decode(image.pop("data"))
        assert image == {
            "seed": 100 + i,
            "class_id": 2,
            "class_name": "two",
            "mime_type": "image/webp",
        }
        alone = client.post("/generate", json={**asked, "n": 1, "seed": 100 + i})
        assert alone.content == data


def test_one_image_comes_as_json_where_json_is_accepted(client: TestClient) -> None:
    asked = {"seed": 1, "steps": 3}
    image = client.post("/generate", json=asked)
    answer = client.post("/generate", json=asked, headers={"accept": "application/json"}).json()
    (item,) = answer["images"]
    assert b64decode(item["data"]) == image.content
    assert (item["class_id"], item["class_name"]) == (None, None)


@pytest.mark.parametrize(
    ("accept", "is_image"),
    [
        (None, True),
        ("", True),
        ("*/*", True),
        ("image/*", True),
        ("image/webp", True),
        ("IMAGE/PNG;q=0.5", True),
        ("application/json", False),
        ("application/json, */*", False),
        ("application/json, text/plain, */*", False),
        ("application/json;q=0.5, image/*", True),
        ("application/json, image/*;q=0.5", False),
        ("text/html,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8", True),
        ("text/html", False),
        ("image/*;q=1.2.3, ;;;,q=,", True),
    ],
)
def test_accept(accept: str | None, is_image: bool) -> None:
    assert accepts_image(accept) == is_image


def test_every_example_of_the_docs_works(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    content = document["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]
    assert content["schema"]["properties"]["class_id"]["anyOf"][0] == {
        "type": "integer",
        "minimum": 0,
        "maximum": 3,
    }
    examples = {name: example["value"] for name, example in content["examples"].items()}
    assert len(examples) == 6
    for name, example in examples.items():
        response = client.post("/generate", json=example)
        assert response.status_code == 200, (name, response.text)


def test_a_deadline_that_cannot_be_met_is_refused_at_once(client: TestClient) -> None:
    asked = {"class_id": 1, "steps": 1000, "n": 8, "deadline_ms": 20}
    response = client.post("/generate", json=asked)
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (504, "deadline_exceeded")
    assert re.fullmatch(
        r"the deadline of 20 ms is too short: about \d+\.\d\d s are needed", error["message"]
    )
    (detail,) = error["details"]
    assert (detail["field"], detail["value"]) == ("deadline_ms", "20")
    asked |= {"steps": 5, "n": 1, "deadline_ms": 60_000, "priority": "high"}
    assert client.post("/generate", json=asked).status_code == 200

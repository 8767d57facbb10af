"""Whatever a client sends gets an answer that helps, and the next request passes."""

from __future__ import annotations

import json

import pytest
from fastapi.testclient import TestClient

JSON = {"content-type": "application/json"}
CLASS_IDS = "an integer from 0 to 3, or null for unconditional"
CFG = "a number from 1 (off) to 100"
STEPS = "an integer from 2 to 1000"
N = "an integer from 1 to 64"
SEED = "an integer from 0 to 9007199254740991"
DEADLINE = "an integer from 1 to 86400000 (a day)"
INTERVAL = "[low, high] with 0 <= low <= high <= 1"

REFUSED = [
    ("class_id", "-1", "-1", CLASS_IDS),
    ("class_id", "4", "4", CLASS_IDS),
    ("class_id", "10", "10", CLASS_IDS),
    ("class_id", '"seven"', '"seven"', CLASS_IDS),
    ("class_id", '"1"', '"1"', CLASS_IDS),
    ("class_id", "1e9", "1000000000.0", CLASS_IDS),
    ("class_id", "true", "true", CLASS_IDS),
    ("class_id", "7.5", "7.5", CLASS_IDS),
    ("class_id", "[1]", "[1]", CLASS_IDS),
    ("class_id", "{}", "{}", CLASS_IDS),
    ("class_id", "1" + "0" * 400, "1" + "0" * 79 + "…", CLASS_IDS),
    ("class_name", '"seven"', '"seven"', "one of zero, one, two, three"),
    ("class_name", '""', '""', "one of zero, one, two, three"),
    ("class_name", "7", "7", "one of zero, one, two, three"),
    ("class_name", f'"{"x" * 500}"', '"' + "x" * 79 + "…", "one of zero"),
    ("class_name", r'"\ud800"', r'"\ud800"', "one of zero"),
    ("cfg", "-1", "-1", CFG),
    ("cfg", "0", "0", CFG),
    ("cfg", "0.5", "0.5", CFG),
    ("cfg", "NaN", "NaN", CFG),
    ("cfg", "Infinity", "Infinity", CFG),
    ("cfg", "-Infinity", "-Infinity", CFG),
    ("cfg", "1e999", "Infinity", CFG),
    ("cfg", "1e6", "1000000.0", CFG),
    ("cfg", "true", "true", CFG),
    ("cfg", '"1.5"', '"1.5"', CFG),
    ("cfg", "1" + "0" * 400, "1" + "0" * 79 + "…", CFG),
    ("steps", "0", "0", STEPS),
    ("steps", "1", "1", STEPS),
    ("steps", "-50", "-50", STEPS),
    ("steps", "1001", "1001", STEPS),
    ("steps", "100000", "100000", STEPS),
    ("steps", "50.5", "50.5", STEPS),
    ("steps", "false", "false", STEPS),
    ("n", "0", "0", N),
    ("n", "65", "65", N),
    ("n", "10000", "10000", N),
    ("n", "true", "true", N),
    ("seed", "-1", "-1", SEED),
    ("seed", "9007199254740992", "9007199254740992", SEED),
    ("seed", "1.5", "1.5", SEED),
    ("guidance_method", '"magic"', '"magic"', "cfg or autoguidance"),
    ("guidance_method", "[]", "[]", "cfg or autoguidance"),
    ("guidance_interval", "[0.9, 0.1]", "[0.9, 0.1]", INTERVAL),
    ("guidance_interval", "[-0.1, 1]", "[-0.1, 1]", INTERVAL),
    ("guidance_interval", "[0, 1.1]", "[0, 1.1]", INTERVAL),
    ("guidance_interval", "[0, NaN]", "[0, NaN]", INTERVAL),
    ("guidance_interval", "[0]", "[0]", INTERVAL),
    ("guidance_interval", "[true, 1]", "[true, 1]", INTERVAL),
    ("guidance_interval", "0.5", "0.5", INTERVAL),
    ("format", '"gif"', '"gif"', "png, jpeg or webp"),
    ("format", '"PNG"', '"PNG"', "png, jpeg or webp"),
    ("solver", '"heun2"', '"heun2"', "euler"),
    ("priority", '"urgent"', '"urgent"', "low, normal or high"),
    ("priority", "1", "1", "low, normal or high"),
    ("deadline_ms", "0", "0", DEADLINE),
    ("deadline_ms", "86400001", "86400001", DEADLINE),
    ("deadline_ms", "1.5", "1.5", DEADLINE),
    ("class", "1", "1", "no field of this name, only class_id, class_name, cfg, steps"),
    ("", "1", "1", "no field of this name, only class_id"),
    (r"\ud800", "1", "1", "no field of this name, only"),
]


def post(client: TestClient, body: str | bytes, **headers: str) -> tuple[int, dict]:
    response = client.post("/generate", content=body, headers={**JSON, **headers})
    return response.status_code, json.loads(response.content)


def assert_healthy(client: TestClient) -> None:
    response = client.post("/generate", json={"class_id": 3, "steps": 2, "seed": 0})
    assert response.status_code == 200
    assert response.content.startswith(b"\x89PNG")


@pytest.mark.parametrize(("field", "value", "shown", "allowed"), REFUSED)
def test_a_value_out_of_range_is_named_with_the_range(
    client: TestClient, field: str, value: str, shown: str, allowed: str
) -> None:
    status, body = post(client, f'{{"{field}": {value}}}', **{"x-request-id": "mine"})
    assert status == 422
    assert body["request_id"] == "mine"
    assert body["error"]["type"] == "invalid_request"
    (detail,) = body["error"]["details"]
    assert (detail["field"], detail["value"]) == (field, shown)
    assert allowed in detail["allowed"]
    assert body["error"]["message"] == f"{field} is {shown}; allowed: {detail['allowed']}"
    assert_healthy(client)


def test_every_field_out_of_range_is_named_at_once(client: TestClient) -> None:
    _, body = post(client, '{"class_id": -1, "cfg": NaN, "steps": "x", "n": 0, "what": 1}')
    fields = [detail["field"] for detail in body["error"]["details"]]
    assert fields == ["class_id", "cfg", "steps", "n", "what"]


def test_the_seed_of_the_last_image_counts(client: TestClient) -> None:
    status, body = post(client, '{"n": 3, "seed": 9007199254740990}')
    assert status == 422
    assert "from 0 to 9007199254740989 (2^53 − n)" in body["error"]["message"]
    largest = {"n": 3, "seed": 2**53 - 3, "steps": 2, "class_id": 0}
    images = client.post("/generate", json=largest).json()["images"]
    assert [image["seed"] for image in images] == [2**53 - 3, 2**53 - 2, 2**53 - 1]


def test_a_class_id_and_name_that_disagree_are_refused(client: TestClient) -> None:
    status, body = post(client, '{"class_id": 1, "class_name": "two"}')
    assert status == 422
    assert body["error"]["message"] == 'class_id is 1 beside class_name "two"; allowed: 2, or none'
    agree = {"class_id": 2, "class_name": "two", "steps": 2}
    assert client.post("/generate", json=agree).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "it is empty"),
        (b"{", 400, "not JSON"),
        (b'{"class_id": 7', 400, "line 1 column"),
        (b"{'class_id': 7}", 400, "not JSON"),
        (b'{"class_name": "\xff\xfe"}', 400, "not JSON"),
        (b"\xff" * 10, 400, "not JSON"),
        (b'{"n": ' + b"1" * 5000 + b"}", 400, "not JSON"),
        (b"[" * 30_000, 400, "nested too deeply"),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, 400, "nested too deeply"),
        (b"[]", 400, "the body is []; send a JSON object"),
        (b"null", 400, "the body is null"),
        (b"NaN", 400, "the body is NaN"),
        (b'"text"', 400, 'the body is "text"'),
        (b" " * 65_537, 413, "65537 bytes; allowed: at most 65536"),
    ],
)
def test_a_body_that_is_no_object_is_refused(
    client: TestClient, body: bytes, status: int, words: str
) -> None:
    got, answer = post(client, body)
    assert got == status
    assert words in answer["error"]["message"]
    assert len(answer["error"]["message"]) < 300
    assert answer["error"]["details"] == []
    assert_healthy(client)


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_another_media_type_is_refused(client: TestClient, media_type: str) -> None:
    headers = {"content-type": media_type} if media_type else {}
    response = client.post("/generate", content=b"{}", headers=headers)
    assert response.status_code == 415
    assert response.json()["error"]["message"] == (
        f'content-type is "{media_type}"; send application/json'
    )


def test_a_charset_beside_the_media_type_is_fine(client: TestClient) -> None:
    status = client.post(
        "/generate",
        content=b'{"steps": 2, "class_id": 1, "class_id": 0}',
        headers={"content-type": "Application/JSON; charset=utf-8"},
    ).status_code
    assert status == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/generate", 405, "method_not_allowed"),
        ("DELETE", "/classes", 405, "method_not_allowed"),
        ("GET", "/nothing", 404, "not_found"),
        ("POST", "/%ff%00", 404, "not_found"),
    ],
)
def test_other_errors_have_the_same_body(
    client: TestClient, method: str, path: str, status: int, kind: str
) -> None:
    response = client.request(method, path)
    body = response.json()
    assert (response.status_code, body["error"]["type"]) == (status, kind)
    assert body["request_id"] == response.headers["x-request-id"]
    assert body["error"]["details"] == []
    if status == 405:
        assert response.headers["allow"]

"""Only those who have a key may spend the device's time, and no key is ever said."""

from __future__ import annotations

import hmac
import http.client
import json
import logging
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from fastapi.testclient import TestClient
from starlette.requests import Request

from rae.server import messages
from rae.server.access import Access, Client, proxies
from rae.server.errors import UnauthorizedError

MakeClient = Callable[..., AbstractContextManager[TestClient]]
Serve = Callable[..., AbstractContextManager[tuple[str, subprocess.Popen[bytes]]]]
ALICE, BOB, WRONG = "alice-0123456789", "bob/+=_-~.0123456789", "wrong-0123456789"
SMALL = {"class_id": 1, "steps": 3}
OPEN = ("/health/live", "/health/ready", "/metrics", "/docs", "/openapi.json", "/info", "/classes")


def request_with(headers: dict[str, str]) -> Request:
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    return Request({"type": "http", "headers": raw, "client": ("10.0.0.9", 1234)})


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# who may ask\n\nalice:{ALICE}\r\n  bob:{BOB}:2.5  \n", encoding="utf-8-sig")
    return path


@pytest.mark.parametrize(
    ("headers", "client"),
    [
        ({"Authorization": f"Bearer {ALICE}"}, Client("alice")),
        ({"Authorization": f"bearer   {ALICE} "}, Client("alice")),
        ({"X-API-Key": BOB}, Client("bob", 2.5)),
        ({"X-API-Key": BOB, "Authorization": "Basic Z2F0ZXdheTp4"}, Client("bob", 2.5)),
        ({"X-API-Key": BOB, "Authorization": "Bearer of-the-proxy"}, Client("bob", 2.5)),
        ({"X-API-Key": "zoe-0123456789ab"}, Client("zoe")),
    ],
)
def test_a_key_says_who_asks(keys_file: Path, headers: dict[str, str], client: Client) -> None:
    access = Access.read(keys_file, {"RAE_API_KEYS": "yan:yan-0123456789ab,\nzoe:zoe-0123456789ab"})
    assert access.client(request_with(headers)) == client


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({}, "an API key is needed"),
        ({"Authorization": ""}, "an API key is needed"),
        ({"Authorization": "Bearer"}, "an API key is needed"),
        ({"Authorization": f"Basic {ALICE}"}, "an API key is needed"),
        ({"Authorization": f"{ALICE}"}, "an API key is needed"),
        ({"Authorization": f"Bearer {WRONG}"}, "this API key is not known"),
        ({"X-API-Key": WRONG, "Authorization": f"Bearer {ALICE}"}, "this API key is not known"),
        ({"X-API-Key": ALICE[:-1]}, "this API key is not known"),
        ({"X-API-Key": ALICE + " "}, "this API key is not known"),
        ({"X-API-Key": f"alice:{ALICE}"}, "this API key is not known"),
        ({"X-API-Key": "ä" * 16}, "this API key is not known"),
    ],
)
def test_nobody_else_may_ask(keys_file: Path, headers: dict[str, str], reason: str) -> None:
    with pytest.raises(UnauthorizedError) as refused:
        Access.read(keys_file, {}).client(request_with(headers))
    assert str(refused.value) == f"{reason}; send Authorization: Bearer KEY or X-API-Key: KEY"
    assert refused.value.headers == {"www-authenticate": "Bearer"}


@pytest.mark.parametrize("key", [ALICE, BOB, WRONG])
def test_every_key_is_compared_whichever_it_is(
    keys_file: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    access, compared = Access.read(keys_file, {}), []

    def count(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return a == b

    monkeypatch.setattr(hmac, "compare_digest", count)
    try:
        access.client(request_with({"X-API-Key": key}))
    except UnauthorizedError:
        assert key == WRONG
    assert compared == [(32, 32)] * 2


def test_without_keys_the_address_asks() -> None:
    access = Access.read(None, {})
    assert not access.needs_key
    assert access.client(request_with({"X-API-Key": WRONG})) == Client("10.0.0.9")


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("secretsecretsecret", "is not name:key"),
        ("eve:secret-of-eve-12", ""),
        ("eve:secret-of-eve-1", "is not name:key"),
        ("eve:secret of eve 12345", "is not name:key"),
        ("eve:secret-of-eve-12:fast", "is not name:key"),
        ("eve:secret-of-eve-12:0", "is not name:key"),
        ("eve:secret-of-eve-12:-1", "is not name:key"),
        ("eve:secret-of-eve-12:1.2.3", "is not name:key"),
        ("eve:secret-of-eve-12:1001", "is not name:key"),
        ("eve:secret-of-eve-12:.5", ""),
        ("eve:secret-of-eve-12:1:1", "is not name:key"),
        (":secret-of-eve-12", "is not name:key"),
        ("e v e:secret-of-eve-12", "is not name:key"),
        ("eve:secret-of-ève-12", "is not name:key"),
        ("eve:secret-of-\udcffve-12", "is not name:key"),
        (f"eve:{ALICE}", "has a key that was given before"),
        ("alice:secret-of-eve-12", "has a name that was given before"),
    ],
)
def test_a_bad_line_is_named_and_not_said(tmp_path: Path, entry: str, problem: str) -> None:
    path = tmp_path / "keys"
    text = f"alice:{ALICE}\n\n{entry}\n"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    if not problem:
        assert Access.read(path, {}).needs_key
        return
    with pytest.raises(ValueError, match=f"^line 3 of --api-keys-file {problem}") as refused:
        Access.read(path, {})
    said = "".join(traceback.format_exception(refused.value))
    for secret in ("secret", ALICE):
        assert secret not in said
    with pytest.raises(ValueError, match=f"^entry 2 of RAE_API_KEYS {problem}"):
        Access.read(None, {"RAE_API_KEYS": f"alice:{ALICE},{entry}"})


def test_names_and_keys_are_told_apart_across_both_places(keys_file: Path) -> None:
    with pytest.raises(ValueError, match="^entry 1 of RAE_API_KEYS has a name that was given"):
        Access.read(keys_file, {"RAE_API_KEYS": "alice:another-0123456789"})


@pytest.mark.parametrize("text", ["", "\n", "# alice:alice-0123456789", ","])
def test_a_secret_that_did_not_arrive_lets_nobody_in(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text.replace(",", ""))
    with pytest.raises(ValueError, match="^--api-keys-file holds no key"):
        Access.read(path, {})
    with pytest.raises(ValueError, match="^RAE_API_KEYS holds no key"):
        Access.read(None, {"RAE_API_KEYS": text})
    with pytest.raises(ValueError, match="^--api-keys-file .*none: No such file or directory$"):
        Access.read(tmp_path / "none", {})


def test_only_generate_needs_a_key(
    make_client: MakeClient, keys_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with make_client(api_keys_file=keys_file) as client:
        for path in (*OPEN, "/limits", "/v2", "/v2/health/ready"):
            assert client.get(path).status_code == 200, path
        missing = client.post("/generate", json=SMALL)
        wrong = client.post("/generate", json=SMALL, headers={"X-API-Key": WRONG})
        malformed = client.post("/generate", content=b"{")
        right = client.post("/generate", json=SMALL, headers={"Authorization": f"Bearer {ALICE}"})
        document = client.get("/openapi.json").json()
        assert client.get("/limits").json()["needs_api_key"] is True
        metrics = client.get("/metrics").text
    assert [r.status_code for r in (missing, wrong, malformed, right)] == [401, 401, 401, 200]
    assert missing.headers["www-authenticate"] == "Bearer"
    assert wrong.json() == {
        "error": {
            "type": "unauthorized",
            "message": "this API key is not known; "
            "send Authorization: Bearer KEY or X-API-Key: KEY",
            "details": [],
        },
        "request_id": wrong.headers["x-request-id"],
    }
    assert 'rae_requests_total{outcome="invalid"} 3.0' in metrics
    schemes = document["components"]["securitySchemes"]
    assert {s["scheme"] if s["type"] == "http" else s["name"] for s in schemes.values()} == {
        "bearer",
        "X-API-Key",
    }
    assert document["paths"]["/generate"]["post"]["security"] == [{name: []} for name in schemes]
    assert "security" not in document["paths"]["/info"]["get"]
    for key in (ALICE, BOB, WRONG):
        assert key not in caplog.text


def test_without_keys_none_is_documented(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert "securitySchemes" not in document["components"]
    assert client.get("/limits").json()["needs_api_key"] is False


def test_the_workers_learn_who_asks(
    make_client: MakeClient, keys_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, frame = [], messages.frame

    def record(message: messages.ToWorker) -> bytes:
        sent.append(message)
        return frame(message)

    monkeypatch.setattr(messages, "frame", record)
    with make_client(api_keys_file=keys_file) as client:
        for key in (ALICE, BOB):
            headers = {"X-API-Key": key}
            assert client.post("/generate", json=SMALL, headers=headers).status_code == 200
    submitted = [message for message in sent if isinstance(message, messages.Submit)]
    assert [(one.client, one.weight) for one in submitted] == [("alice", 1.0), ("bob", 2.5)]


def test_each_key_has_a_rate_of_its_own(make_client: MakeClient, keys_file: Path) -> None:
    asked = {"class_id": 1, "steps": 101, "cfg": 1}
    with make_client(api_keys_file=keys_file, rate_limit=0.5, rate_burst=100) as client:

        def ask(key: str) -> tuple[int, float]:
            response = client.post("/generate", json=asked, headers={"X-API-Key": key})
            if response.status_code == 429:
                assert response.json()["error"]["type"] == "rate_limited"
                return 429, float(response.headers["retry-after"])
            return response.status_code, 0

        started = time.monotonic()
        assert ask(ALICE) == (200, 0)  # 100 of 50
        status, wait_s = ask(ALICE)
        assert status == 429
        assert 100 - (time.monotonic() - started) <= wait_s <= 151
        assert ask(BOB) == (200, 0)


def test_proxies_are_addresses_and_networks() -> None:
    assert proxies(" 127.0.0.1, ::1,10.0.0.0/8 ") == ["127.0.0.1", "::1", "10.0.0.0/8"]
    assert proxies("*") == ["*"]
    assert proxies("") == []
    for bad in ("proxy.internal", "10.0.0.1/8", "*, 10.0.0.1"):
        with pytest.raises(ValueError, match="^trusted-proxies has '.*'; allowed: addresses and"):
            proxies(bad)


def post(connection: http.client.HTTPConnection, headers: dict[str, str]) -> int:
    body = json.dumps(SMALL) + 60_000 * " "
    connection.request("POST", "/generate", body, {"content-type": "application/json", **headers})
    response = connection.getresponse()
    response.read()
    return response.status


def connect(url: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)


@pytest.mark.parametrize(
    ("flags", "statuses"),
    [((), [200, 429, 200, 429]), (("--trusted-proxies", "10.9.9.9"), [200, 429, 429, 429])],
    ids=["believed", "not believed"],
)
def test_clients_behind_a_proxy(serve: Serve, flags: tuple[str, ...], statuses: list[int]) -> None:
    """Each client is let in once; what it says itself, before its proxy's word, counts nothing."""
    asked = ("10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.3, 10.0.0.2")
    with serve("--rate-limit", "0.01", *flags) as (url, _), closing(connect(url)) as connection:
        found = [post(connection, {"x-forwarded-for": addresses}) for addresses in asked]
    assert found == statuses


def test_a_server_with_keys(
    serve: Serve, keys_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    flags = ("--api-keys-file", str(keys_file), "--log-level", "debug")
    with serve(*flags) as (url, _), closing(connect(url)) as connection:
        assert post(connection, {}) == 401
        assert post(connection, {"X-API-Key": WRONG}) == 401
        assert post(connection, {"X-API-Key": ALICE}) == 200  # on the same connection
    logs = [path.read_text() for path in tmp_path_factory.getbasetemp().glob("serve*/log")]
    assert any("401" in log for log in logs)
    for key in (ALICE, BOB, WRONG):
        assert all(key not in log for log in logs)


def test_bad_keys_end_the_start_in_one_line(
    tiny_checkpoint: Path, child_environment: dict[str, str]
) -> None:
    command = [sys.executable, "-P", "-m", "rae.server", "serve", "--port", "0"]
    command += ["--model", str(tiny_checkpoint), "--log-level", "error"]
    environment = child_environment | {"RAE_API_KEYS": f"alice:{ALICE}\nbob:{BOB}:quick"}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=60)
    assert done.returncode == 1
    assert done.stderr.decode().startswith("Error: entry 2 of RAE_API_KEYS is not name:key")
    assert done.stderr.count(b"\n") == 1
    assert BOB.encode() not in done.stderr + done.stdout

"""What fuzz.py sends into bare sockets: each kind of case is a function of its random numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

ROUTES = ("/generate", "/classes", "/info", "/health/live", "/health/ready", "/metrics", "/docs")
ROUTES += ("/openapi.json", "/", "/classes/", "/nothing", "/generate/", "/%ff%00", "//", "/../etc")
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW")
MEDIA_TYPES = (
    "application/json",
    "text/plain",
    "application/json; charset=\xff",
    "",
    "\x01",
    "a/b",
)
VALUES = (
    None,
    True,
    -1,
    0,
    1,
    2,
    3,
    2**53,
    10**30,
    0.5,
    1e308,
    float("nan"),
    "",
    "seven",
    "\ud800",
)
VALUES += ("\0", [], [0, 1], [[[]]], {}, {"a": {}}, "x" * 5000)
FIELDS = ("class_id", "class_name", "cfg", "steps", "n", "seed", "guidance_method", "solver")
FIELDS += ("guidance_interval", "format", "priority", "deadline_ms", "nothing", "\ud800", "")
LINES = (
    b"GET / HTTP/1.1",
    b"GET / HTTP/1.0",
    b"GET  / HTTP/1.1",
    b"GET / HTTP/2.0",
    b"get / http/1.1",
    b"GET http://[/ HTTP/1.1",
    b"GET / HTTP/1.1 x",
    b"CONNECT x:1 HTTP/1.1",
    b"OPTIONS * HTTP/1.1",
    b"POST /generate HTTP/1.1",
    b"PRI * HTTP/2.0",
    b"\x16\x03\x01\x02\x00",
    b"",
)
HEADERS = (
    b"host: x",
    b"host: [",
    b"host:",
    b"content-length: 2",
    b"content-length: -1",
    b"content-length: 99999999999999999999",
    b"content-length: 2, 2",
    b"transfer-encoding: chunked",
    b"transfer-encoding: gzip, chunked",
    b"connection: close",
    b"connection: upgrade",
    b"upgrade: websocket",
    b"expect: 100-continue",
    b"content-type: application/json",
    b"x-request-id: \xff\xfe",
    b"accept: */*;q=\xb2",
    b" folded: line",
    b"no colon",
    b"x: \x00",
    b": empty",
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """`parts` are sent with `pause_s` between them, and `answers` read, or what there are."""

    parts: Sequence[bytes]
    answers: int = 1
    pause_s: float = 0.0
    end: Literal["read", "close", "reset"] = "read"
    is_sound: bool = False

    @property
    def may_expire(self) -> bool:
        return b"deadline_ms" in b"".join(self.parts)


def request(method: str, path: str, body: bytes, headers: Sequence[bytes] = ()) -> bytes:
    lines = [f"{method} {path} HTTP/1.1".encode("latin-1"), b"host: fuzz", *headers]
    return b"\r\n".join([*lines, f"content-length: {len(body)}".encode(), b"", body])


def generate(body: object, headers: Sequence[bytes] = ()) -> bytes:
    content = json.dumps(body).encode()
    return request("POST", "/generate", content, [b"content-type: application/json", *headers])


def good(draw: Random) -> Case:
    body: dict[str, Any] = {"class_id": draw.randrange(4), "steps": draw.randint(2, 4)}
    more = {"seed": 1, "n": 2, "format": "webp", "priority": "low", "cfg": 1.5, "deadline_ms": 9}
    body |= {key: more[key] for key in draw.sample(sorted(more), draw.randrange(4))}
    return Case(parts=[generate(body)], is_sound=True)


def invalid(draw: Random) -> Case:
    body = {draw.choice(FIELDS): draw.choice(VALUES) for _ in range(draw.randint(1, 4))}
    return Case(parts=[generate({"steps": 2} | body)], is_sound=True)


def route(draw: Random) -> Case:
    path = draw.choice(ROUTES) + draw.choice(("", "", "?search=%ff", "?" + "a=b&" * 500))
    body = draw.choice((b"", b"{}", b"null", draw.randbytes(50), b"[" * 5000))
    media_type = b"content-type: " + draw.choice(MEDIA_TYPES).encode("latin-1")
    return Case(parts=[request(draw.choice(METHODS), path, body, [media_type])], is_sound=True)


def malformed(draw: Random) -> Case:
    lines = [draw.choice(LINES), *draw.choices(HEADERS, k=draw.randrange(6))]
    body = draw.choice((b"", b"{}", b"zz\r\n", b"2\r\n{}\r\n0\r\nx: y\r\n\r\n", draw.randbytes(30)))
    return Case(parts=[b"\r\n".join([*lines, b"", body])])


def half(draw: Random) -> Case:
    whole = good(draw).parts[0]
    return Case(parts=[whole[: draw.randrange(len(whole))]])


def slow(draw: Random) -> Case:
    whole = draw.choice((good, invalid, route))(draw).parts[0]
    size = len(whole) // draw.randint(2, 5) + 1
    parts = [whole[i : i + size] for i in range(0, len(whole), size)]
    return Case(parts=parts, pause_s=draw.choice((0.01, 0.1, 0.4)))


def huge(draw: Random) -> Case:
    size = draw.choice((10_000, 16_384, 20_000, 70_000, 300_000))
    return draw.choice(
        (
            lambda: Case(parts=[request("GET", "/info", b"", [b"x: " + b"y" * size])]),
            lambda: Case(parts=[request("GET", "/info", b"", [b"x: y"] * (size // 6))]),
            lambda: Case(parts=[request("GET", "/classes?search=" + "y" * size, b"")]),
            lambda: Case(parts=[generate({"class_name": "y" * size})]),
            lambda: Case(parts=[generate({"steps": 2}).replace(b"POST", b"P" * size)]),
        )
    )()


def binary(draw: Random) -> Case:
    body = draw.randbytes(draw.randrange(1, 3000))
    media_type = b"content-type: application/json"
    whole = request("POST", "/generate", body, [media_type])
    return Case(parts=[draw.choice((whole, body))])


def mutated(draw: Random) -> Case:
    data = bytearray(draw.choice((good, invalid))(draw).parts[0])
    for _ in range(draw.randint(1, 8)):
        i, j = sorted((draw.randrange(len(data)), draw.randrange(len(data))))
        match draw.randrange(4):
            case 0:
                data[i] = draw.randrange(256)
            case 1:
                data[i:i] = draw.randbytes(draw.randint(1, 4))
            case 2:
                data[i:i] = data[i:j]
            case _:
                del data[i : min(j, i + 8)]
    return Case(parts=[bytes(data)])


def pipelined(draw: Random) -> Case:
    count = draw.randint(1, 4)
    whole = [draw.choice((good, invalid))(draw).parts[0] for _ in range(count)]
    whole.append(
        draw.choice((b"", b"garbage\r\n\r\n", b"GET ", draw.randbytes(200), b"x" * 200_000))
    )
    return Case(parts=[b"".join(whole)], answers=count)


def early(draw: Random) -> Case:
    whole = draw.choice((good, mutated, pipelined, route))(draw).parts[0]
    cut = draw.choice((len(whole), draw.randrange(len(whole))))
    return Case(parts=[whole[:cut]], end=draw.choice(("close", "reset")))


KINDS: dict[str, Callable[[Random], Case]] = {
    made.__name__: made
    for made in (
        *(good, invalid, route, malformed, half, slow),
        *(huge, binary, mutated, pipelined, early),
    )
}

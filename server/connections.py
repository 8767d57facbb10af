"""The edge of HTTP: no client holds a connection, or memory, by being slow, broken or hostile.

h11 parses and uvicorn runs the app. Here is what both leave open: how long a client may take to
send and to read, how many clients there may be, and how a request that is no HTTP is answered.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import resource
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, ClassVar, Literal, Self

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from rae.server import errors
from rae.server.metrics import Metrics
from rae.server.serve_settings import ServeSettings
from rae.server.transports import Transport

log = logging.getLogger(__name__)

MAX_HEADER_BYTES = 16_384
# What may come behind a request that is being answered; more is thrown away.
MAX_PIPELINED_BYTES = 65_536
# Closing at once would make the client's system throw an answer away with what it still sends.
LINGER_S = 2.0
MAX_REFUSED = 256
# Sockets of workers, checkpoints, libraries.
RESERVED_FILES = 256

HOST = re.compile(rb"([\w.~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(:\d*)?", re.ASCII)
ABSOLUTE = re.compile(rb"https?://[^/?#]+", re.IGNORECASE)

Phase = Literal["headers", "body", "idle"]


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """Times are in seconds."""

    headers_s: float
    body_s: float
    idle_s: float
    write_s: float
    max_connections: int

    @classmethod
    def of(cls, settings: ServeSettings) -> Self:
        """The settings', with no more connections than this process may have files; raises the
        soft limit of them where that is too low."""
        return cls(
            headers_s=settings.header_timeout,
            body_s=settings.body_timeout,
            idle_s=settings.keep_alive,
            write_s=settings.write_timeout,
            max_connections=allow_connections(settings.max_connections),
        )


def allow_connections(wanted: int) -> int:
    """How many connections of `wanted` may be open, once the limit of open files is raised as far
    as it has to be and can be; at least 1."""
    others = MAX_REFUSED + RESERVED_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = wanted + others if soft == resource.RLIM_INFINITY else soft
    if files < wanted + others:
        files = wanted + others if hard == resource.RLIM_INFINITY else min(hard, wanted + others)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    allowed = max(1, min(wanted, files - others))
    if allowed < wanted:
        log.warning("at most %d connections: only %d files may be open", allowed, files)
    return allowed


def protocol(settings: ServeSettings, metrics: Metrics) -> type[asyncio.Protocol]:
    """What uvicorn's Config takes as `http`."""
    limits = ConnectionLimits.of(settings)
    return type(
        "BoundConnection", (Connection,), {"limits": limits, "metrics": metrics, "refused": set()}
    )


class Connection(H11Protocol):
    """One client. Slow ones are told 408, broken ones 400 or 431, too many 429, all in the shape
    of `errors.error_body`; who does not read is cut off."""

    limits: ClassVar[ConnectionLimits]
    metrics: ClassVar[Metrics]
    refused: ClassVar[set[Connection]]

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn = Parser(self.refuse)
        self.timer: asyncio.TimerHandle | None = None
        self.timed: object = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.wire = Transport(transport, self.loop, self.limits.write_s, self._sends_body)
        super().connection_made(self.wire)
        if len(self.connections) > self.limits.max_connections:
            self._make_room()
        if len(self.connections) <= self.limits.max_connections:
            return self._watch()
        self.connections.discard(self)
        if len(self.refused) >= MAX_REFUSED:
            return self.transport.abort()
        self.refused.add(self)
        self.refuse(errors.TooManyConnectionsError(self.limits.max_connections))

    def _make_room(self) -> None:
        """End a connection on which nothing is asked: health checks have to get through."""
        for other in self.connections:
            if other is not self and isinstance(other, Connection) and other.is_quiet():
                self.connections.discard(other)
                return other.transport.abort()

    def is_quiet(self) -> bool:
        return self._phase() in ("idle", "headers") and not self.conn.trailing_data[0]

    def connection_lost(self, exc: Exception | None) -> None:
        self.refused.discard(self)
        self.wire.stop()
        self._set_timer(None)
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing() or self.conn.their_state is h11.MUST_CLOSE:
            return
        if self._phase() is None and len(self.conn.trailing_data[0]) > MAX_PIPELINED_BYTES:
            self.cycle.keep_alive = False
            return
        super().data_received(data)
        if self._phase() is None:
            # uvicorn stops reading behind a whole request: it would not see the client leave.
            self.flow.resume_reading()
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def shutdown(self) -> None:
        if self.wire.lingers:
            self.transport.abort()
        elif not self.transport.is_closing():
            super().shutdown()

    def refuse(self, error: errors.ApiError) -> None:
        """Answer instead of the app, if nothing was answered yet, and close the connection."""
        is_answered = self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE)
        is_running = self.cycle is not None and not self.cycle.response_complete
        state = self.scope.get("state", {}) if is_running else {}
        request_id = state.get("request_id") or uuid.uuid4().hex
        if not is_answered:
            state["refused"] = error.status
            self.transport.write(self._answer(error, request_id))
        self.metrics.connection_refused(error.type)
        fields = {"client": self.client and self.client[0], "status": error.status}
        log.info("%s", error, extra={"request_id": request_id, "fields": fields})
        if is_running:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.wire.linger()
        self._set_timer(LINGER_S, self.transport.abort)

    def _answer(self, error: errors.ApiError, request_id: str) -> bytes:
        body = errors.error_body(error.type, str(error), request_id, error.details)
        content = json.dumps(body, ensure_ascii=False).encode()
        headers = dict(self.server_state.default_headers) | {
            b"content-type": b"application/json",
            b"content-length": str(len(content)).encode(),
            b"connection": b"close",
            b"x-request-id": request_id.encode(),
        }
        headers |= {name.encode(): value.encode() for name, value in error.headers.items()}
        lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode()]
        lines += [name + b": " + value for name, value in headers.items()]
        return b"\r\n".join((*lines, b"", content))

    def _should_upgrade(self) -> bool:
        return False  # to nothing, and uvicorn would warn of each

    def _sends_body(self) -> bool:
        return self.conn.their_state is h11.SEND_BODY

    def _phase(self) -> Phase | None:
        """What the client has to do next; None where it is our turn."""
        if self._sends_body():
            return "body"
        if self.conn.their_state is not h11.IDLE:
            return None
        return "headers" if self.cycle is None or self.conn.trailing_data[0] else "idle"

    def _watch(self) -> None:
        """Give each phase of each request its time, once."""
        phase = self._phase()
        if self.transport.is_closing() or self.timed == (phase, self.cycle):
            return
        self.timed = phase, self.cycle
        seconds = {
            "headers": self.limits.headers_s,
            "body": self.limits.body_s,
            "idle": self.limits.idle_s,
            None: None,
        }[phase]
        self._set_timer(seconds, lambda: self._end(phase, seconds))

    def _end(self, phase: Phase | None, seconds: float | None) -> None:
        if self.transport.is_closing():
            self.transport.abort()
        elif phase == "body" or self.conn.trailing_data[0]:
            self.refuse(errors.RequestTimeoutError(str(phase), seconds or 0))
        else:
            self.transport.close()

    def _set_timer(self, seconds: float | None, then: Callable[[], None] | None = None) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.timer = self.loop.call_later(seconds, then) if seconds and then else None


class Parser(h11.Connection):
    """h11's parser, which tells `refuse` what is wrong instead of raising it, and is as strict as
    RFC 9112 where proxies may disagree on where a request ends."""

    def __init__(self, refuse: Callable[[errors.ApiError], None]) -> None:
        super().__init__(h11.SERVER, MAX_HEADER_BYTES)
        self.refuse = refuse

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        try:
            event = super().next_event()
            return checked(event) if isinstance(event, h11.Request) else event
        except h11.RemoteProtocolError as error:
            is_large = error.error_status_hint == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            self.refuse(
                errors.HeadersTooLargeError(MAX_HEADER_BYTES)
                if is_large
                else errors.MalformedRequestError(str(error))
            )
            return h11.NEED_DATA


def checked(request: h11.Request) -> h11.Request:
    """The request with a path as its target. Raises h11.RemoteProtocolError."""
    headers = dict(request.headers)
    size = sum(len(name) + len(value) + 4 for name, value in request.headers)
    if size + len(request.target) > MAX_HEADER_BYTES:
        raise h11.RemoteProtocolError("headers are too large", error_status_hint=431)
    if request.http_version not in (b"1.0", b"1.1"):
        raise h11.RemoteProtocolError(f"HTTP/{request.http_version.decode()} is not served")
    if b"transfer-encoding" in headers:
        if b"content-length" in headers:
            raise h11.RemoteProtocolError("both Content-Length and Transfer-Encoding")
        if request.http_version == b"1.0":
            raise h11.RemoteProtocolError("Transfer-Encoding in HTTP/1.0")
    if not HOST.fullmatch(headers.get(b"host", b"")):
        raise h11.RemoteProtocolError("bad Host")
    target = ABSOLUTE.sub(b"", request.target, count=1)
    if target == request.target and target.startswith(b"/"):
        return request
    if request.method == b"OPTIONS" and target == b"*":
        return request
    if target and not target.startswith((b"/", b"?")) or request.method == b"CONNECT":
        raise h11.RemoteProtocolError("the target is no path")
    return h11.Request(
        method=request.method,
        headers=request.headers,
        target=target if target.startswith(b"/") else b"/" + target,
        http_version=request.http_version,
    )

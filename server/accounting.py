"""What became of each HTTP request: a line in the log, and for POST /generate a count and a span.

All of it is read off the answer's status, so that nothing in between can forget to say it.
"""

from __future__ import annotations

import asyncio
import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rae.server.account import Account
from rae.server.logs import request_id
from rae.server.metrics import Metrics
from rae.server.tracing import Tracing

log = logging.getLogger(__name__)

GENERATE = "/generate"
QUIET = ("/health/", "/metrics")
SHOWN_CHARACTERS = 200


class AccountMiddleware:
    """Belongs around all that may refuse a request, and inside what gives it an id."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing | None = None) -> None:
        self.app, self.metrics, self.tracing = app, metrics, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        # Never taken back: what uvicorn logs of this request comes after it.
        request_id.set(scope["state"]["request_id"])
        started = time.perf_counter()
        account = None
        if scope["method"] == "POST" and route(scope) == GENERATE:
            account = scope["state"]["account"] = Account(self.metrics)
        span = self.tracing.start(scope) if self.tracing and account else None
        status = 500

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except asyncio.CancelledError:  # uvicorn's patience has ended before the request
            scope["state"]["failure"] = "shutting_down"
            raise
        finally:
            # What the connection has said already, where it did not wait for the app.
            status = scope["state"].get("refused", status)
            if account is not None:
                account.end(status, scope["state"].get("failure", "internal"))
            if span is not None and account is not None:
                span.end(status, account)
            say(scope, status, time.perf_counter() - started, account)


def say(scope: Scope, status: int, seconds: float, account: Account | None) -> None:
    """One line; neither query, headers nor body, where secrets may be."""
    client = scope.get("client")
    path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")
    fields: dict[str, object] = {
        "client": scope["state"].get("client") or (client[0] if client else None),
        "method": scope["method"],
        "path": path[:SHOWN_CHARACTERS],
        "status": status,
        "duration_ms": round(1000 * seconds, 2),
    }
    if account is not None:
        fields |= account.facts
        fields |= {f"{stage}_ms": round(ms, 2) for stage, ms in account.timings_ms.items()}
        fields["outcome"] = account.outcome
    is_quiet = route(scope).startswith(QUIET)
    level = logging.DEBUG if is_quiet else logging.INFO
    log.log(level, "request", extra={"fields": fields})


def route(scope: Scope) -> str:
    """The path, without what a proxy put before it."""
    return scope["path"].removeprefix(scope.get("root_path", ""))

"""OpenTelemetry traces of POST /generate, of which the OTEL_ variables say where they go and how.

The opentelemetry packages are optional: they are imported where traces are asked for.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from starlette.datastructures import Headers

from rae.server.settings import server_version

if TYPE_CHECKING:
    from opentelemetry import trace
    from opentelemetry.sdk.trace.export import SpanExporter
    from starlette.types import Scope

    from rae.server.account import Account

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
SERVED_PROTOCOL = "http/protobuf"
# What is left is sent at the end, for at most so long.
CLOSE_S = 2.0


def start_tracing(is_asked: bool, environment: Mapping[str, str] = os.environ) -> Tracing | None:
    """None where neither `is_asked` nor an endpoint in `environment` asks for traces.

    Raises ValueError where they are asked for and cannot be made.
    """
    endpoint = next((name for name in ENDPOINTS if environment.get(name)), None)
    is_off = environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if is_off or not (is_asked or endpoint):
        return None
    protocol = next(filter(None, map(environment.get, PROTOCOLS)), SERVED_PROTOCOL)
    if protocol != SERVED_PROTOCOL:
        raise ValueError(f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol}; allowed: {SERVED_PROTOCOL}")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{'--otel' if is_asked else endpoint} asks for traces and {error.name} is missing; "
            "pip install 'rae-server[otel]'"
        ) from error
    return Tracing(OTLPSpanExporter())


class Tracing:
    """Spans, and the thread that exports them in batches; what it cannot send, it drops."""

    def __init__(self, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        service = {"service.name": "rae-server", "service.version": server_version()}
        ours = Resource.create().merge(Resource(service))
        resource = ours.merge(OTELResourceDetector().detect())  # variables have the last word
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._exporter = exporter
        self._tracer = self._provider.get_tracer("rae.server", server_version())

    def start(self, scope: Scope) -> RequestSpan:
        """A span of this request, in the trace that its traceparent names."""
        from opentelemetry import propagate, trace

        span = self._tracer.start_span(
            "POST /generate",
            propagate.extract(Headers(scope=scope)),
            trace.SpanKind.SERVER,
            {
                "http.request.method": "POST",
                "http.route": "/generate",
                "url.path": scope["path"],
                "url.scheme": scope.get("scheme", "http"),
                "rae.request_id": scope["state"]["request_id"],
            },
        )
        return RequestSpan(self._tracer, span)

    def close(self) -> None:
        """Send what is left, unless that takes longer than it is worth."""
        closing = threading.Thread(target=self._provider.shutdown, name="tracing", daemon=True)
        closing.start()
        closing.join(CLOSE_S)
        if closing.is_alive():
            self._exporter.shutdown()


class RequestSpan:
    """The span of one request; ended with those of its stages."""

    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self._tracer, self._span = tracer, span

    def end(self, status: int, account: Account) -> None:
        from opentelemetry import trace

        span = self._span
        facts = {f"rae.{name}": value for name, value in account.facts.items()}
        facts |= {"http.response.status_code": status, "rae.outcome": account.outcome}
        span.set_attributes({name: value for name, value in facts.items() if value is not None})
        if status >= 500:
            span.set_attribute("error.type", str(status))
            span.set_status(trace.StatusCode.ERROR)
        within = trace.set_span_in_context(span)
        start_ns = account.ended_ns - sum(map(nanoseconds, account.timings_ms.values()))
        for stage, ms in account.timings_ms.items():
            end_ns = start_ns + nanoseconds(ms)
            self._tracer.start_span(stage, within, start_time=start_ns).end(end_ns)
            start_ns = end_ns
        span.end()


def nanoseconds(ms: float) -> int:
    return round(1e6 * ms)

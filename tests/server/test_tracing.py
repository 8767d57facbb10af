"""Traces of POST /generate: whose they continue, what they hold, and that they harm nobody."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from fastapi.testclient import TestClient
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from rae.server.tracing import CLOSE_S, Tracing, start_tracing

MakeClient = Callable[..., AbstractContextManager[TestClient]]
Serve = Callable[..., AbstractContextManager[tuple[str, subprocess.Popen[bytes]]]]
STAGES = ["queue", "denoise", "decode", "encode"]
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (ENDPOINT, "OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)


def spans_of(
    make_client: MakeClient, body: object, headers: dict[str, str] | None = None, status: int = 200
) -> list[ReadableSpan]:
    """The request's span, then those of its stages."""
    exporter = InMemorySpanExporter()
    with make_client(tracing=Tracing(exporter)) as client:
        assert client.post("/generate", json=body, headers=headers).status_code == status
        assert client.get("/health/live").status_code == 200
    spans = exporter.get_finished_spans()  # complete, as the lifespan has ended
    return sorted(spans, key=lambda span: span.name in STAGES)


def identifiers(span: ReadableSpan) -> tuple[str, str, str]:
    """Of the trace, the span and its parent, as in a traceparent."""
    assert span.context
    parent = f"{span.parent.span_id:016x}" if span.parent else ""
    return f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}", parent


def test_a_request_is_a_span_with_its_stages_in_the_callers_trace(make_client: MakeClient) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
    started_ns = time.time_ns()
    request, *stages = spans_of(make_client, {"class_id": 3, "steps": 20, "n": 2}, headers)
    assert (request.name, request.kind) == ("POST /generate", SpanKind.SERVER)
    assert identifiers(request)[::2] == (TRACE, PARENT)
    assert dict(request.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/generate",
        "http.response.status_code": 200,
        "url.path": "/generate",
        "url.scheme": "http",
        "rae.request_id": "mine",
        "rae.class_id": 3,
        "rae.steps": 20,
        "rae.evaluations": 19,
        "rae.cfg": 1.5,
        "rae.n": 2,
        "rae.outcome": "done",
    }
    assert request.status.status_code is StatusCode.UNSET
    assert [stage.name for stage in stages] == STAGES
    assert {identifiers(stage)[::2] for stage in stages} == {(TRACE, identifiers(request)[1])}
    times = [time_ns for stage in stages for time_ns in (stage.start_time, stage.end_time)]
    assert None not in times and times == sorted(t for t in times if t)
    assert times[1:-1:2] == times[2::2]  # one begins where the other ends
    assert request.start_time and request.end_time and times[0] and times[-1]
    # Two clocks are read, so that the first may seem to begin a little before the request.
    assert started_ns < request.start_time < times[0] + 5_000_000
    assert times[-1] < request.end_time < time.time_ns()


def test_stages_last_as_long_as_the_client_is_told(make_client: MakeClient) -> None:
    exporter = InMemorySpanExporter()
    with make_client(tracing=Tracing(exporter)) as client:
        timing = client.post("/generate", json={"steps": 9}).headers["server-timing"]
    told = {part.split(";dur=")[0]: float(part.split("=")[1]) for part in timing.split(", ")}
    spans = {span.name: span for span in exporter.get_finished_spans()}
    for stage, ms in told.items():
        start, end = spans[stage].start_time, spans[stage].end_time
        assert start and end
        assert (end - start) / 1e6 == pytest.approx(ms, abs=0.0051)


@pytest.mark.parametrize("sent", ["", "nonsense", f"00-{'0' * 32}-{PARENT}-01", "é" * 9000])
def test_what_is_no_traceparent_starts_a_trace(make_client: MakeClient, sent: str) -> None:
    headers = {"traceparent": sent.encode("latin-1")}
    request, *_ = spans_of(make_client, {"steps": 2}, headers)  # type: ignore[arg-type]
    assert request.parent is None
    assert int(identifiers(request)[0], 16) > 0


def test_what_the_caller_does_not_record_is_not_recorded(make_client: MakeClient) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
    assert spans_of(make_client, {"steps": 2}, headers) == []


def test_a_refusal_is_a_span_without_stages_and_no_error(make_client: MakeClient) -> None:
    (request,) = spans_of(make_client, {"steps": 1}, status=422)
    assert request.attributes and request.attributes["rae.outcome"] == "invalid"
    assert request.attributes["http.response.status_code"] == 422
    assert request.status.status_code is StatusCode.UNSET


def test_a_failure_is_an_error(make_client: MakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rae.server.generate.encode", lambda *_: 1 / 0)
    (request,) = spans_of(make_client, {"steps": 2}, status=500)
    assert request.attributes and request.attributes["rae.outcome"] == "failed"
    assert request.attributes["error.type"] == "500"
    assert request.status.status_code is StatusCode.ERROR


class FailingExporter(SpanExporter):
    def export(self, spans: object) -> SpanExportResult:
        raise RuntimeError("no collector")


def test_an_exporter_that_fails_fails_no_request(make_client: MakeClient) -> None:
    with make_client(tracing=Tracing(FailingExporter())) as client:
        for _ in range(3):
            assert client.post("/generate", json={"steps": 2}).status_code == 200


class StuckExporter(SpanExporter):
    def __init__(self) -> None:
        self.released = threading.Event()

    def export(self, spans: object) -> SpanExportResult:
        self.released.wait()
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        self.released.set()


def test_an_exporter_that_hangs_holds_up_nobody(make_client: MakeClient) -> None:
    exporter = StuckExporter()
    with make_client(tracing=Tracing(exporter)) as client:
        for _ in range(3):
            assert client.post("/generate", json={"steps": 2}).status_code == 200
        left = time.monotonic()
    assert exporter.released.is_set()
    assert CLOSE_S <= time.monotonic() - left < 25  # 30 s are what the library would wait


@contextmanager
def collector() -> Iterator[tuple[str, list[tuple[str, ExportTraceServiceRequest]]]]:
    """An OTLP receiver: its URL, and what it has received with a header of it."""
    received: list[tuple[str, ExportTraceServiceRequest]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            assert self.path == "/v1/traces"
            received.append((self.headers["x-team"], ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", received
        finally:
            server.shutdown()


def test_a_server_sends_its_spans_as_the_variables_say(
    serve: Serve, child_environment: dict[str, str]
) -> None:
    with collector() as (endpoint, received):
        variables = {
            ENDPOINT: endpoint,
            "OTEL_EXPORTER_OTLP_HEADERS": "x-team=digits",
            "OTEL_SERVICE_NAME": "images",
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=test",
        }
        child_environment |= variables
        try:
            with serve() as (url, process):
                assert post(url) == 200
                process.terminate()
                assert process.wait(20) == 0
        finally:
            for name in variables:
                del child_environment[name]
    ((header, request),) = received
    (spans,) = request.resource_spans
    resource = {a.key: a.value.string_value for a in spans.resource.attributes}
    assert header == "digits"
    assert (resource["service.name"], resource["deployment.environment"]) == ("images", "test")
    names = [span.name for scope in spans.scope_spans for span in scope.spans]
    assert sorted(names) == sorted(["POST /generate", *STAGES])


def test_where_nobody_listens_requests_are_served_and_the_end_is_quick(
    serve: Serve, child_environment: dict[str, str]
) -> None:
    child_environment[ENDPOINT] = "http://127.0.0.1:1"
    try:
        with serve() as (url, process):
            for _ in range(3):
                assert post(url) == 200
            process.terminate()
            assert process.wait(20) == 0
    finally:
        del child_environment[ENDPOINT]


def post(url: str) -> int:
    connection = HTTPConnection(urlsplit(url).netloc, timeout=60)
    headers = {"content-type": "application/json"}
    connection.request("POST", "/generate", json.dumps({"steps": 3}), headers)
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status


def test_a_service_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def name() -> object:
        tracing = Tracing(InMemorySpanExporter())
        tracing.close()
        return tracing._provider.resource.attributes["service.name"]

    assert name() == "rae-server"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "images")
    assert name() == "images"


def test_nobody_asks() -> None:
    assert start_tracing(False, {}) is None
    assert start_tracing(False, {ENDPOINT: ""}) is None
    assert start_tracing(True, {"OTEL_SDK_DISABLED": "true", ENDPOINT: "http://x"}) is None


@pytest.mark.parametrize("name", [ENDPOINT, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"])
def test_a_variable_asks(name: str) -> None:
    tracing = start_tracing(False, {name: "http://127.0.0.1:1"})
    assert tracing is not None
    tracing.close()


def test_a_protocol_that_is_not_spoken_is_named() -> None:
    with pytest.raises(ValueError, match="PROTOCOL is grpc; allowed: http/protobuf"):
        start_tracing(True, {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})


@pytest.mark.parametrize(
    ("is_asked", "environment", "who"),
    [(True, {}, "--otel"), (False, {ENDPOINT: "http://x"}, ENDPOINT)],
)
def test_without_the_packages_who_asks_is_told(
    monkeypatch: pytest.MonkeyPatch, is_asked: bool, environment: dict[str, str], who: str
) -> None:
    missing = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=rf"{who} asks for traces .*rae-server\[otel\]"):
        start_tracing(is_asked, environment)


def test_without_the_packages_nobody_who_does_not_ask_is_troubled(
    child_environment: dict[str, str],
) -> None:
    code = "import sys; sys.modules['opentelemetry.sdk'] = None; "
    code += "sys.modules['opentelemetry.exporter'] = None; import rae.server.serve as s; "
    code += "assert s.start_tracing(False, {}) is None"
    command = [sys.executable, "-P", "-c", code]
    subprocess.run(command, env=child_environment, check=True, timeout=60)

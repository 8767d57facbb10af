"""What the server counts, for Prometheus. Each `Metrics` has its own registry."""

from __future__ import annotations

from importlib.metadata import version
from typing import Literal, Protocol, get_args

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from rae.server.settings import server_version

Outcome = Literal["done", "failed", "cancelled", "rejected", "expired", "invalid"]

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Watched(Protocol):
    """What of an engine is read at each scrape."""

    max_queue: float

    @property
    def waiting(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def queued_cost(self) -> float: ...


class Observer(Protocol):
    """What an engine tells of its work: `Metrics` counts it, a worker process sends it on."""

    def queued(self, seconds: float) -> None:
        """A request had its first slot so long after it was submitted."""
        ...

    def stepped(self, rows: int, seconds: float) -> None:
        """A step is over, of so many rows of the model, pads not counted."""
        ...

    def evaluated(self, rows: float, saved: float) -> None:
        """Rows that a step evaluates, and those that both branches at every time would add."""
        ...

    def decoded(self, images: int, seconds: float) -> None:
        """A batch of latents has become pixels."""
        ...


class Metrics:
    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "rae_requests", "POST /generate by how it ended.", ["outcome"], registry=registry
        )
        for outcome in get_args(Outcome):
            self.requests.labels(outcome)
        self.images = Counter("rae_images", "Images generated.", registry=registry)
        self.rows_evaluated = Counter(
            "rae_rows_evaluated",
            "Evaluations of the model for one row; the guide's at its share of the parameters.",
            registry=registry,
        )

        def histogram(stage: str, text: str) -> Histogram:
            return Histogram(f"rae_{stage}_seconds", text, buckets=SECONDS, registry=registry)

        self.queue_seconds = histogram("queue", "From submission to a request's first slot.")
        self.step_seconds = histogram("step", "One evaluation for those whose turn it was.")
        self.decode_seconds = histogram("decode", "One batch of latents to pixels.")
        self.encode_seconds = histogram("encode", "The pixels of a request to files.")
        self.request_seconds = histogram("request", "POST /generate that was done, all of it.")

    def watch(self, engine: Watched, checkpoint: str) -> None:
        """Read the engine's gauges at each scrape, and say what runs."""

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"rae_{name}", text, registry=self.registry)

        gauge("waiting_images", "Accepted, without a slot.").set_function(lambda: engine.waiting)
        gauge("running_images", "In a slot.").set_function(lambda: engine.running)
        gauge("queued_evaluations", "Left to do, of all that was accepted.").set_function(
            lambda: engine.queued_cost
        )
        gauge("queue_limit_evaluations", "Beyond it requests get 429.").set(engine.max_queue)
        labels = {
            "version": server_version(),
            "torch": version("torch"),
            "checkpoint": checkpoint,
        }
        build = Gauge("rae_build_info", "What runs; always 1.", [*labels], registry=self.registry)
        build.labels(**labels).set(1)

    def queued(self, seconds: float) -> None:
        self.queue_seconds.observe(seconds)

    def stepped(self, rows: int, seconds: float) -> None:
        self.step_seconds.observe(seconds)

    def evaluated(self, rows: float, saved: float) -> None:
        self.rows_evaluated.inc(rows)

    def decoded(self, images: int, seconds: float) -> None:
        self.decode_seconds.observe(seconds)

    def count(self, outcome: Outcome) -> None:
        self.requests.labels(outcome).inc()

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)

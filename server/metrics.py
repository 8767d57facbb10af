"""What the server counts, for Prometheus. Each `Metrics` has its own registry.

All values of a label are from a fixed set, or as many as there are buckets or workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

from rae.server.errors import FailureReason
from rae.server.settings import server_version

Refused = Literal[
    "rejected", "invalid", "unavailable", "refused_deadline", "incomplete", "internal"
]
Ended = Literal["done", "failed", "cancelled", "expired"]
Outcome = Refused | Ended

CONNECTION_REASONS = (
    "malformed_request",
    "headers_too_large",
    "request_timeout",
    "too_many_connections",
)
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
RECOVERY_SECONDS = (1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
IMAGES = (1, 2, 4, 8, 16, 32, 64)


class Watched(Protocol):
    """What is read at each scrape, of all workers together."""

    @property
    def max_queue(self) -> float: ...
    @property
    def waiting(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def queued_cost(self) -> float: ...
    @property
    def max_rows(self) -> int: ...
    @property
    def num_slots(self) -> int: ...
    @property
    def workers_ready(self) -> int: ...


class Observer(Protocol):
    """What an engine tells of its work: `Metrics` counts it, a worker process sends it on. Hence
    numbers alone."""

    def queued(self, seconds: float) -> None:
        """A request had its first slot so long after it was submitted."""
        ...

    def first_stepped(self, seconds: float) -> None:
        """A request's first step was over so long after it was submitted; on CUDA, sent."""
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
        self.registry = CollectorRegistry()
        self.in_flight = 0
        """Requests that are accepted and not ended, which is after their answers were sent."""
        ProcessCollector(registry=self.registry)
        self._count_requests()
        self._count_work()
        self._count_workers()

    def _count_requests(self) -> None:
        self._requests = self._counter("requests", "POST /generate by how it ended.", "outcome")
        for outcome in (*get_args(Refused), *get_args(Ended)):
            self._requests.labels(outcome)
        self._accepted = self._counter(
            "requests_accepted", "Of them, accepted: done, failed, cancelled or expired in the end."
        )
        in_flight = self._gauge("requests_in_flight", "Accepted, and not ended.")
        in_flight.set_function(lambda: self.in_flight)
        self._failures = self._counter("failures", "Accepted requests that failed.", "reason")
        for reason in get_args(FailureReason):
            self._failures.labels(reason)
        self._request_seconds = self._histogram(
            "request_seconds", "POST /generate that was done, all of it."
        )

        self._connections_refused = self._counter(
            "connections_refused", "What was no request, or too slow, or too many.", "reason"
        )
        for reason in CONNECTION_REASONS:
            self._connections_refused.labels(reason)

    def _count_work(self) -> None:
        counter, histogram = self._counter, self._histogram
        self.images = counter("images", "Images generated.")
        self.rows_evaluated = counter(
            "rows_evaluated",
            "Evaluations of the model for one row; the guide's at its share of the parameters.",
        )
        self.rows_saved = counter(
            "rows_saved", "Rows that guidance would add if it were on at every time."
        )
        self.queue_seconds = histogram(
            "queue_seconds", "From submission to a request's first slot."
        )
        self.first_step_seconds = histogram(
            "first_step_seconds", "From submission to the end of a request's first step."
        )
        self.step_seconds = histogram(
            "step_seconds",
            "One step, by its rows of the model, rounded up to a power of two.",
            labels=["rows"],
        )
        self.decode_seconds = histogram("decode_seconds", "One batch of latents to pixels.")
        self.decode_images = histogram("decode_images", "Images of such a batch.", IMAGES)
        self.encode_seconds = histogram("encode_seconds", "The pixels of a request to files.")

    def _count_workers(self) -> None:
        self._restarts = self._counter("worker_restarts", "Workers started again after an end.")
        self._retried = self._counter(
            "requests_retried", "Accepted requests given to another worker, as theirs had died."
        )
        self._recovery_seconds = self._histogram(
            "worker_recovery_seconds",
            "From a worker's death until its successor serves.",
            RECOVERY_SECONDS,
        )
        self._memory_used = self._gauge("gpu_memory_used_bytes", "By anybody.", "worker")
        self._memory_total = self._gauge("gpu_memory_total_bytes", "There is.", "worker")
        self._watts = self._gauge("gpu_power_watts", "Mean of the last second.", "worker")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"rae_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"rae_{name}", text, labels, registry=self.registry)

    def _histogram(
        self,
        name: str,
        text: str,
        buckets: Sequence[float] = SECONDS,
        labels: Sequence[str] = (),
    ) -> Histogram:
        return Histogram(f"rae_{name}", text, labels, buckets=buckets, registry=self.registry)

    def watch(self, watched: Watched, checkpoint: str) -> None:
        """Read the gauges at each scrape, and say what runs."""
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "waiting_images": ("Accepted, without a slot.", lambda: watched.waiting),
            "running_images": ("In a slot.", lambda: watched.running),
            "queued_evaluations": (
                "Left to do, of all that was accepted.",
                lambda: watched.queued_cost,
            ),
            "queue_limit_evaluations": (
                "Beyond it requests get 429.",
                lambda: watched.max_queue,
            ),
            "max_rows": (
                "Of a step; fewer after memory ran out.",
                lambda: watched.max_rows,
            ),
            "slots": ("For images in the middle of their steps.", lambda: watched.num_slots),
            "workers_ready": ("Processes that serve.", lambda: watched.workers_ready),
            "free_slots": ("Of them, free.", lambda: watched.num_slots - watched.running),
        }
        for name, (text, read) in gauges.items():
            self._gauge(name, text).set_function(read)
        labels = {
            "version": server_version(),
            "torch": version("torch"),
            "checkpoint": checkpoint,
        }
        self._gauge("build_info", "What runs; always 1.", *labels).labels(**labels).set(1)

    def accepted(self) -> None:
        """A request got in; one `ended` has to follow."""
        self._accepted.inc()
        self.in_flight += 1

    def ended(self, outcome: Ended, seconds: float, reason: FailureReason) -> None:
        """An accepted request has its answer, after so long; `reason` is that of a failed one."""
        self.in_flight -= 1
        self._requests.labels(outcome).inc()
        if outcome == "failed":
            self._failures.labels(reason).inc()
        if outcome == "done":
            self._request_seconds.observe(seconds)

    def connection_refused(self, reason: str) -> None:
        """`reason` is one of CONNECTION_REASONS."""
        self._connections_refused.labels(reason).inc()

    def refused(self, outcome: Refused) -> None:
        """A request did not get in."""
        self._requests.labels(outcome).inc()

    def queued(self, seconds: float) -> None:
        self.queue_seconds.observe(seconds)

    def first_stepped(self, seconds: float) -> None:
        self.first_step_seconds.observe(seconds)

    def stepped(self, rows: int, seconds: float) -> None:
        self.step_seconds.labels(power_of_two(rows)).observe(seconds)

    def evaluated(self, rows: float, saved: float) -> None:
        self.rows_evaluated.inc(rows)
        self.rows_saved.inc(saved)

    def decoded(self, images: int, seconds: float) -> None:
        self.decode_seconds.observe(seconds)
        self.decode_images.observe(images)

    def worker_restarted(self) -> None:
        self._restarts.inc()

    def worker_recovered(self, seconds: float) -> None:
        """A worker serves again, so long after its predecessor died."""
        self._recovery_seconds.observe(seconds)

    def retried(self) -> None:
        """An accepted request was given to another worker: it stays accepted, and in flight."""
        self._retried.inc()

    def device(
        self,
        worker: int,
        memory_used: int | None,
        memory_total: int | None,
        watts: float | None,
    ) -> None:
        """What a worker's GPU uses; what is None is not known, and is no longer shown."""
        gauges = (self._memory_used, self._memory_total, self._watts)
        for gauge, value in zip(gauges, (memory_used, memory_total, watts), strict=True):
            if value is None:
                gauge.remove_by_labels({"worker": str(worker)})
            else:
                gauge.labels(worker).set(value)

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)


def power_of_two(rows: int) -> int:
    """The smallest that is not below `rows`: no more values than a step has sizes of buckets."""
    return 1 << (max(rows, 1) - 1).bit_length()

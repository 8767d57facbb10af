"""The loop: choose who advances, evaluate one step, decode what is done."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from rae.models.checkpoint import Checkpoint
from rae.server.devices import resolve_device
from rae.server.errors import DeadlineError, EngineClosedError, QueueFullError
from rae.server.request import Generated, ImageSpec, Priority, Request, Sample
from rae.server.runner import Decoding, Runner, RunnerOptions, StepTiming
from rae.server.scheduler import Scheduler
from rae.server.step_times import StepTimes
from rae.server.warm_up import remember, remembered, step_times_file, warm_up

if TYPE_CHECKING:
    import numpy as np

    from rae.server.metrics import Observer
    from rae.server.settings import EngineSettings

log = logging.getLogger(__name__)

# Batches of pixels under way: without a bound decoding might fall behind, and nobody would wait.
DECODED_AHEAD = 4

MakeScheduler = Callable[[int, int, StepTimes], Scheduler]


class Engine:
    """Runs requests on one device, in a thread of its own. `submit` may be called from any.

    Raises ValueError for a device, precision or kernels that this machine does not have.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: EngineSettings,
        observer: Observer,
        *,
        local_rank: int | None = None,
        make_scheduler: MakeScheduler = Scheduler,
    ) -> None:
        device = resolve_device(settings.device, local_rank)
        megabytes = settings.conditioning_mb
        options = RunnerOptions(
            max_rows=settings.max_batch,
            precision=settings.precision,
            kernels=settings.kernels,
            attention=settings.attention,
            compile=settings.compile,
            deterministic=settings.deterministic,
            conditioning_bytes=None if megabytes is None else megabytes * 2**20,
        )
        self._runner = Runner(checkpoint, device, options)
        self._step_times_file = step_times_file(checkpoint, self._runner)
        self.device = device.type
        self.precision = self._runner.precision
        self.max_queue = settings.max_queue
        self._max_rows = settings.max_batch
        self.ready = False
        self.failure: str | None = None
        self.progress = "the model is warming up"
        self._observer = observer
        self._scheduler = make_scheduler(self._runner.num_slots, settings.max_batch, StepTimes())
        self._wake = threading.Condition()
        self._closing = False
        self._stepping: list[Sample] = []
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        # Pixels arrive while the next steps run; on a CPU they are there when `decode` returns.
        self._receiving: deque[Future[None]] = deque()
        self._receiver = ThreadPoolExecutor(1, "decoded") if device.type == "cuda" else None

    @property
    def layers(self) -> str:
        """How the models' layers run: "fused" on the kernels, "packed" for a CPU, or "plain"."""
        return self._runner.layers

    @property
    def compiles(self) -> bool:
        return self._runner.compiles

    @property
    def num_slots(self) -> int:
        return self._runner.num_slots

    @property
    def implementations(self) -> dict[str, list[str]]:
        return self._runner.implementations

    @property
    def waiting(self) -> int:
        with self._wake:
            return self._scheduler.num_waiting

    @property
    def running(self) -> int:
        return len(self._scheduler.running)

    @property
    def queued_cost(self) -> float:
        """Rows of the model still to evaluate, for everything accepted."""
        with self._wake:
            return self._scheduler.cost

    @property
    def max_rows(self) -> int:
        return self._scheduler.max_rows

    def activity(self) -> tuple[float, float]:
        return 0.0, 0.0

    def load(self) -> tuple[float, float]:
        with self._wake:
            cost = self._scheduler.cost
            return self._scheduler.drain_s(cost), self._scheduler.step_times.rate(self.max_rows)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop after the step in progress; what is left fails with EngineClosedError."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()
        if self._receiver is not None:
            self._receiver.shutdown()
        if self.ready and self._runner.buckets.sizes is None:
            remember(self._step_times_file, self._scheduler.step_times)
        self._fail(EngineClosedError(), self._scheduler.requests)

    def submit(
        self,
        specs: Sequence[ImageSpec],
        request_id: str,
        *,
        client: str = "",
        weight: float = 1.0,
        priority: Priority = "normal",
        deadline_s: float = math.inf,
        bounded: bool = True,
        on_start: Callable[[], None] | None = None,
    ) -> Request:
        """Queue the images of one request; cancel it by cancelling its future.

        Raises QueueFullError when the bound on queued cost would be passed (an idle engine takes
        anything), DeadlineError where it cannot be done in `deadline_s` seconds by what steps took
        so far, EngineClosedError after `close`.
        """
        now = time.perf_counter()
        request = Request(
            request_id,
            client=client,
            weight=weight,
            priority=priority,
            submitted_at=now,
            deadline=now + deadline_s,
        )
        request.on_start = on_start
        request.samples = [Sample(spec, request, self._runner.plan(spec)) for spec in specs]
        cost = sum(sample.remaining_cost for sample in request.samples)
        with self._wake:
            if self._closing:
                raise EngineClosedError
            queued = self._scheduler.cost
            if bounded and queued and queued + cost > self.max_queue:
                excess = min(queued + cost - self.max_queue, queued)
                wait_s = max(1.0, self._scheduler.drain_s(excess))
                raise QueueFullError(wait_s, cost, queued, self.max_queue)
            if self.ready and deadline_s < math.inf:
                predicted_s = self._scheduler.predict_s(request.samples)
                if predicted_s > deadline_s:
                    raise DeadlineError(deadline_s, predicted_s)
            self._scheduler.add(request)
            self._wake.notify()
        return request

    def cancel(self, request: Request) -> None:
        """Its slots are free before the next step; nobody else is touched."""
        request.future.cancel()

    def step(self) -> None:
        """One evaluation for the images whose turn it is."""
        self._stepping = []
        self._observe(self._runner.wait())
        self._drop()
        with self._wake:
            self._stepping = samples = self._scheduler.select()
        if not samples:
            return
        self._place(sample for sample in samples if not sample.step)
        cost = sum(sample.remaining_cost for sample in samples)
        self._runner.step([(sample.slot, sample.step) for sample in samples])
        with self._wake:
            denoised = self._scheduler.advance(samples)
        self._observer.evaluated(cost - sum(sample.remaining_cost for sample in samples), saved=0)
        self._decode([sample for sample in denoised if not sample.request.future.cancelled()])

    def _observe(self, timing: StepTiming | None) -> None:
        if timing is not None:
            self._observer.stepped(timing.model_rows, timing.seconds)
            with self._wake:
                self._scheduler.step_times.observe(*timing)

    def _drop(self) -> None:
        """Who has cancelled or is late leaves."""
        with self._wake:
            expired = self._scheduler.drop(time.perf_counter())
        for request in expired:
            self._end(request, DeadlineError(request.deadline - request.submitted_at))

    def _place(self, samples: Iterable[Sample]) -> None:
        now = time.perf_counter()
        for sample in samples:
            if not sample.request.started_at and sample.request.on_start:
                sample.request.on_start()
            self._runner.start(sample.slot, sample.spec)
            if not sample.request.started_at:
                sample.request.started_at = now
                self._observer.queued(now - sample.request.submitted_at)

    def _decode(self, samples: Sequence[Sample]) -> None:
        if not samples:
            return
        started = time.perf_counter()
        try:
            decoding = self._runner.decode([sample.slot for sample in samples])
        except Exception as error:  # the others' steps go on
            self._fail_decoded(samples, error)
            return
        if self._receiver is None:
            self._receive(samples, decoding, started)
            return
        self._receiving.append(self._receiver.submit(self._receive, samples, decoding, started))
        if len(self._receiving) > DECODED_AHEAD:
            self._receiving.popleft().result()

    def _receive(self, samples: Sequence[Sample], decoding: Decoding, started: float) -> None:
        try:
            images = decoding.images()
        except Exception as error:
            self._fail_decoded(samples, error)
        else:
            self._deliver(samples, images, started)

    def _fail_decoded(self, samples: Sequence[Sample], error: Exception) -> None:
        log.error("a decoding failed", exc_info=error)
        self._fail(error, {sample.request for sample in samples})

    def _deliver(
        self, samples: Sequence[Sample], images: Sequence[np.ndarray], started: float
    ) -> None:
        now = time.perf_counter()
        self._observer.decoded(len(samples), now - started)
        for sample, image in zip(samples, images, strict=True):
            sample.image = image
        for request in dict.fromkeys(sample.request for sample in samples):
            if request.done:
                generated = Generated(
                    images=[s.image for s in request.samples if s.image is not None],
                    queue_s=request.started_at - request.submitted_at,
                    denoise_s=started - request.started_at,
                    decode_s=now - started,
                )
                self._end(request, generated)

    def _loop(self) -> None:
        try:
            self._warm_up()
        except EngineClosedError:
            return
        except Exception as error:  # e.g. out of memory: whoever waits is told
            self._give_up("the warm-up failed", error)
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closing or self._scheduler.has_work)
                if self._closing:
                    return
            try:
                self.step()
            except Exception as error:  # those in this step are told, and the loop goes on
                if not self._stepping or not self._runner.works():
                    self._give_up("the engine failed", error)
                else:
                    log.exception("a step failed")
                    self._fail(error, {sample.request for sample in self._stepping})

    def _give_up(self, what: str, error: Exception) -> None:
        log.error(what, exc_info=error)
        self.failure = f"{what}: {type(error).__name__}: {error}"
        self.ready = False
        with self._wake:
            self._closing = True
        self._fail(error, self._scheduler.requests)

    def _warm_up(self) -> None:
        def say(text: str) -> None:
            if self._closing:
                raise EngineClosedError
            self.progress = f"the model is warming up: {text}"
            self._drop()

        step_times = warm_up(self._runner, say, remembered(self._step_times_file))
        with self._wake:
            self._scheduler.step_times = step_times
            self._scheduler.max_rows = min(self._max_rows, self._runner.buckets.largest)
        self.ready = True

    def _fail(self, error: BaseException, requests: set[Request]) -> None:
        with self._wake:
            for request in requests:
                self._scheduler.remove(request)
        for request in requests:
            self._end(request, error)

    def _end(self, request: Request, result: Generated | BaseException) -> None:
        """Resolve a request, by the engine's thread or the receiver's, that has not ended already
        and was not cancelled."""
        with self._wake:
            future = request.future
            if future.done() or not future.set_running_or_notify_cancel():
                return
            if isinstance(result, Generated):
                future.set_result(result)
            else:
                future.set_exception(result)

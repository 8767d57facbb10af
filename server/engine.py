"""The loop: admit, evaluate one step for every running image, decode what is done."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rae.models.checkpoint import Checkpoint
from rae.server.errors import EngineClosedError, QueueFullError
from rae.server.request import Generated, ImageSpec, Request, Sample
from rae.server.runner import Runner, resolve_device, resolve_precision
from rae.server.scheduler import Scheduler

if TYPE_CHECKING:
    from rae.server.metrics import Metrics
    from rae.server.settings import EngineSettings

log = logging.getLogger(__name__)

RATE_WEIGHT = 0.1


class Engine:
    """Runs requests on one device, in a thread of its own. `submit` may be called from any.

    Raises ValueError for a device, precision or kernels that this machine does not have.
    """

    def __init__(self, checkpoint: Checkpoint, settings: EngineSettings, metrics: Metrics) -> None:
        device = resolve_device(settings.device)
        precision = resolve_precision(settings.precision, device)
        self.device = device.type
        self.precision = "bf16" if precision.itemsize == 2 else "fp32"
        self.max_queue = settings.max_queue
        self.ready = False
        self.failure: str | None = None
        self._metrics = metrics
        self._runner = Runner(
            checkpoint,
            device,
            precision,
            settings.max_batch,
            kernels=settings.kernels,
            attention=settings.attention,
        )
        self._scheduler = Scheduler(settings.max_batch)
        self._num_slots = settings.max_batch
        self._wake = threading.Condition()
        self._closing = False
        self._stepping: list[Sample] = []
        self._rate = 0.0  # cost per second, smoothed
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    @property
    def layers(self) -> str:
        """How the models' layers run: "fused" on the kernels, "packed" for a CPU, or "plain"."""
        return self._runner.layers

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

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop after the step in progress; what is left fails with EngineClosedError."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()
        self._fail(EngineClosedError(), self._scheduler.requests)

    def submit(self, specs: Sequence[ImageSpec], request_id: str) -> Request:
        """Queue the images of one request; cancel it by cancelling its future.

        Raises QueueFullError when the bound on queued cost would be passed (an idle engine takes
        anything), EngineClosedError after `close`.
        """
        request = Request(request_id)
        request.samples = [Sample(spec, request, self._runner.plan(spec)) for spec in specs]
        cost = sum(sample.remaining_cost for sample in request.samples)
        with self._wake:
            if self._closing:
                raise EngineClosedError
            queued = self._scheduler.cost
            if queued and queued + cost > self.max_queue:
                excess = queued + cost - self.max_queue
                wait_s = self._seconds(min(excess, queued))
                raise QueueFullError(wait_s, cost, queued, self.max_queue)
            self._scheduler.add(request)
            self._wake.notify()
        return request

    def cancel(self, request: Request) -> None:
        """Its slots are free before the next step; nobody else is touched."""
        request.future.cancel()

    def step(self) -> None:
        """One evaluation for every running image."""
        with self._wake:
            self._scheduler.drop_cancelled()
            admitted = self._scheduler.admit()
            self._stepping = running = list(self._scheduler.running.values())
        self._place(admitted)
        if not running:
            return
        cost = sum(sample.remaining_cost for sample in running)
        started = time.perf_counter()
        self._runner.step([(sample.slot, sample.step) for sample in running])
        with self._wake:
            denoised = self._scheduler.advance()
        cost -= sum(sample.remaining_cost for sample in running)
        self._observe(len(running), cost, time.perf_counter() - started)
        self._deliver([sample for sample in denoised if not sample.request.future.cancelled()])

    def _place(self, samples: Sequence[Sample]) -> None:
        now = time.perf_counter()
        for sample in samples:
            self._runner.start(sample.slot, sample.spec)
            if not sample.request.started_at:
                sample.request.started_at = now
                self._metrics.queue_seconds.observe(now - sample.request.submitted_at)

    def _deliver(self, denoised: Sequence[Sample]) -> None:
        if not denoised:
            return
        started = time.perf_counter()
        images = self._runner.decode([sample.slot for sample in denoised])
        now = time.perf_counter()
        self._metrics.decode_seconds.observe(now - started)
        for sample, image in zip(denoised, images, strict=True):
            sample.image = image
        for request in dict.fromkeys(sample.request for sample in denoised):
            # False for a request that was cancelled during its last step.
            if request.done and request.future.set_running_or_notify_cancel():
                generated = Generated(
                    images=[s.image for s in request.samples if s.image is not None],
                    queue_s=request.started_at - request.submitted_at,
                    denoise_s=started - request.started_at,
                    decode_s=now - started,
                )
                request.future.set_result(generated)
                self._metrics.images.inc(len(request.samples))

    def _loop(self) -> None:
        try:
            self._warm_up()
        except Exception as error:  # e.g. out of memory: whoever waits is told
            log.exception("the warm-up failed")
            self.failure = f"the warm-up failed: {type(error).__name__}: {error}"
            with self._wake:
                self._closing = True
            self._fail(error, self._scheduler.requests)
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closing or self._scheduler.has_work)
                if self._closing:
                    return
            try:
                self.step()
            except Exception as error:  # those in this step are told, and the loop goes on
                log.exception("a step failed")
                self._fail(error, {sample.request for sample in self._stepping})

    def _warm_up(self) -> None:
        """Run the largest batch, every row guided, so that what comes later fits and is fast.

        On a CPU one image: the first step there is as fast as the next, and 64 images of the
        published XL model took 8 minutes.
        """
        methods = self._runner.config.guidance_methods
        method = methods[0] if methods else "cfg"
        cfg = 2.0 if methods else 1.0
        spec = ImageSpec(class_label=0, seed=0, steps=3, cfg=cfg, guidance_method=method)
        slots = range(1 if self.device == "cpu" else self._num_slots)
        costs = self._runner.plan(spec).costs
        for slot in slots:
            self._runner.start(slot, spec)
        for step in range(spec.num_evaluations):
            if self._closing:
                return
            started = time.perf_counter()
            self._runner.step([(slot, step) for slot in slots])
            cost = len(slots) * (costs[step] - costs[step + 1])
            self._rate = cost / (time.perf_counter() - started)
        self._runner.decode(slots)
        self.ready = True

    def _fail(self, error: BaseException, requests: set[Request]) -> None:
        with self._wake:
            for request in requests:
                self._scheduler.remove(request)
        for request in requests:
            if not request.future.done() and request.future.set_running_or_notify_cancel():
                request.future.set_exception(error)

    def _observe(self, num_images: int, cost: float, seconds: float) -> None:
        if 2 * num_images > self._num_slots:  # a full queue runs in large, faster batches
            self._rate += RATE_WEIGHT * (cost / seconds - self._rate)
        self._metrics.step_seconds.observe(seconds)
        self._metrics.rows_evaluated.inc(cost)

    def _seconds(self, cost: float) -> float:
        return max(1.0, cost / self._rate) if self._rate else 1.0

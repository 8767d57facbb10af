"""The loop: choose who advances, evaluate one step, decode what is done."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal, TypeVar

from rae.models.checkpoint import Checkpoint
from rae.server.activity import Activity
from rae.server.devices import DeviceUse, device_use, resolve_device
from rae.server.errors import DeadlineError, EngineClosedError, GenerationError, QueueFullError
from rae.server.in_flight import StepTiming
from rae.server.memory import NoMemoryError
from rae.server.messages import Facts, Load
from rae.server.request import Generated, ImageSpec, Priority, Request, Sample
from rae.server.runner import Decoding, Runner, RunnerOptions
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

T = TypeVar("T")
Stage = Literal["step", "decode"]
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
        self._num_parameters = checkpoint.num_parameters
        self._runner = Runner(checkpoint, device, options)
        self._step_times_file = step_times_file(checkpoint, self._runner)
        self.precision = self._runner.precision
        self.max_queue = settings.max_queue
        self.ready = False
        self.failure: str | None = None
        self.failure_detail = ""  # with what no client is told, as paths
        self.progress = "the model is warming up"
        self._observer = observer
        self._scheduler = make_scheduler(self._runner.num_slots, settings.max_batch, StepTimes())
        self._wake = threading.Condition()
        self._closing = False
        self._activity = Activity()
        self._step_s = self._image_s = 0.0  # what the last step was to take, and a decoded image
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        # Pixels arrive while the next steps run; on a CPU they are there when `decode` returns.
        self._receiving: deque[Future[None]] = deque()
        self._receiver = ThreadPoolExecutor(1, "decoded") if device.type == "cuda" else None

    @property
    def num_slots(self) -> int:
        return self._runner.num_slots

    def facts(self) -> Facts:
        """What runs here."""
        runner = self._runner
        return Facts(
            device=runner.device.type,
            precision=runner.precision,
            layers=runner.layers,
            compiles=runner.compiles,
            num_slots=runner.num_slots,
            num_parameters=self._num_parameters,
            implementations=runner.implementations,
        )

    def activity(self) -> tuple[float, float]:
        """Seconds since the step or decoding that runs began, and those it is expected to take, 0
        where that is not known; zeros where nothing runs, and in the warm-up."""
        return self._activity.longest()

    def load(self) -> Load:
        """What there is to do, at one moment."""
        with self._wake:
            scheduler = self._scheduler
            return Load(
                waiting=scheduler.num_waiting,
                running=len(scheduler.running),
                queued_cost=scheduler.cost,
                max_rows=scheduler.max_rows,
                drain_s=scheduler.drain_s(scheduler.cost),
                rows_per_s=scheduler.step_times.rate(scheduler.max_rows),
            )

    def use(self) -> DeviceUse | None:
        """What of the device is in use; None where that is not known."""
        return device_use(self._runner.device)

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

        `on_start` is called once, in the engine's thread, before the first of them is touched.

        Raises QueueFullError when the bound on queued cost would be passed (an idle engine takes
        anything, and whoever is not `bounded` is taken), DeadlineError where it cannot be done in
        `deadline_s` seconds by what steps took so far, EngineClosedError after `close`.
        """
        now = time.perf_counter()
        request = Request(
            request_id,
            client=client,
            weight=weight,
            priority=priority,
            submitted_at=now,
            deadline=now + deadline_s,
            on_start=on_start,
        )
        request.samples = [Sample(spec, request, self._runner.plan(spec)) for spec in specs]
        cost = request.cost
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
        with self._activity.working(self._step_s):
            self._observe(self._runner.wait())
        self._drop()
        with self._wake:
            samples = self._scheduler.select()
        denoised: list[Sample] = []
        for part, _ in self._in_parts("step", samples, self._evaluate):
            denoised += self._advance(part)
        for part, (decoding, started) in self._in_parts("decode", denoised, self._decode):
            self._hand_over(part, decoding, started)

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

    def _in_parts(
        self, stage: Stage, samples: Sequence[Sample], work: Callable[[Sequence[Sample]], T]
    ) -> Iterator[tuple[Sequence[Sample], T]]:
        """What `work` gives for `samples`: for halves of them where it fails, and so on. Who fails
        alone is told why; of those who left meanwhile nothing is wanted."""
        parts = [samples]
        while parts:
            part = [sample for sample in parts.pop() if not sample.request.future.done()]
            if not part:
                continue
            with self._activity.working(self._expected_s(stage, part)):
                result = self._try(stage, part, work)
                if is_short_of_memory(result) and len(part) == 1:
                    result = self._try(stage, part, work)  # what was cached is free now
            if not isinstance(result, GenerationError):
                yield part, result
            elif len(part) == 1:
                self._fail(result, {part[0].request})
            else:
                if is_short_of_memory(result):
                    self._shrink(stage, part)
                half = len(part) // 2
                parts += [part[half:], part[:half]]

    def _try(
        self, stage: Stage, samples: Sequence[Sample], work: Callable[[Sequence[Sample]], T]
    ) -> T | GenerationError:
        """What `work` gives, or what is to be said of its failure; raises what the device does not
        recover from."""
        try:
            return work(samples)
        except NoMemoryError as error:
            log.warning("no memory for a %s of %d images: %s", stage, len(samples), str(error))
        except Exception as error:
            log.exception("a %s of %d images failed", stage, len(samples))
            if not self._runner.works():
                raise
            message = f"a {stage} failed ({type(error).__name__}); the server's log says where"
            return GenerationError(stage, message)
        self._runner.free()  # out here: the exception held what had been computed
        return GenerationError("out_of_memory", f"a {stage} did not fit into the memory")

    def _shrink(self, stage: Stage, samples: Sequence[Sample]) -> None:
        """So many at a time do not fit into the memory, and will not be tried again."""
        if stage == "decode":
            images = self._runner.shrink_decoding(len(samples))
            log.warning("from now on at most %d images are decoded at a time", images)
            return
        smaller = self._runner.buckets.below(sum(s.model_rows for s in samples))
        if smaller is not None:
            with self._wake:
                self._scheduler.max_rows = min(self._scheduler.max_rows, smaller.largest)
            log.warning("from now on a step has at most %d rows", self._scheduler.max_rows)

    def _expected_s(self, stage: Stage, samples: Sequence[Sample]) -> float:
        """0 where no such thing was measured yet."""
        if stage == "decode":
            return self._image_s * len(samples)
        rows = sum(sample.model_rows for sample in samples)
        guide_rows = sum(sample.guide_rows for sample in samples)
        times = self._scheduler.step_times
        return times.seconds(rows, guide_rows) if times.model else 0.0

    def _evaluate(self, samples: Sequence[Sample]) -> None:
        """Where this raises it may be tried again: nobody has advanced."""
        for sample in samples:
            if not sample.step:
                self._place(sample)
        self._runner.step([(sample.slot, sample.step) for sample in samples])

    def _place(self, sample: Sample) -> None:
        request = sample.request
        if not request.started_at:
            request.started_at = time.perf_counter()
            self._observer.queued(request.started_at - request.submitted_at)
            if request.on_start is not None:
                request.on_start()
        self._runner.start(sample.slot, sample.spec)

    def _advance(self, samples: Sequence[Sample]) -> list[Sample]:
        """Count what was evaluated; those for whom it was the last."""
        self._step_s = self._expected_s("step", samples)
        rows = sum(sample.step_cost for sample in samples)
        saved = sum(sample.plan.saved(sample.step) for sample in samples)
        self._observer.evaluated(rows, saved)
        now = time.perf_counter()
        for request in {sample.request for sample in samples if not sample.step}:
            if not request.is_begun:
                request.is_begun = True
                self._observer.first_stepped(now - request.submitted_at)
        with self._wake:
            return self._scheduler.advance(samples)

    def _decode(self, samples: Sequence[Sample]) -> tuple[Decoding, float]:
        started = time.perf_counter()
        return self._runner.decode([sample.slot for sample in samples]), started

    def _hand_over(self, samples: Sequence[Sample], decoding: Decoding, started: float) -> None:
        if self._receiver is None:
            self._receive(samples, decoding, started)
            return
        self._receiving.append(self._receiver.submit(self._receive, samples, decoding, started))
        if len(self._receiving) > DECODED_AHEAD:
            self._receiving.popleft().result()

    def _receive(self, samples: Sequence[Sample], decoding: Decoding, started: float) -> None:
        """Their slots may hold others by now: what fails here cannot be tried again."""
        try:
            with self._activity.working(self._image_s * len(samples)):
                images = self._try("decode", samples, lambda _: decoding.images())
        except Exception as error:  # in a thread whose exceptions nobody sees
            self._give_up("the engine failed", error)
            return
        if isinstance(images, GenerationError):
            self._fail(images, {sample.request for sample in samples})
            return
        for sample, is_finite in zip(samples, decoding.finite(), strict=True):
            if not is_finite:
                label, seed = sample.spec.class_label, sample.spec.seed
                message = f"the image of class {label} and seed {seed} is not finite"
                self._fail(GenerationError("non_finite", message), {sample.request})
        self._deliver(samples, images, started)

    def _deliver(
        self, samples: Sequence[Sample], images: Sequence[np.ndarray], started: float
    ) -> None:
        now = time.perf_counter()
        self._image_s = (now - started) / len(samples)
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
                late = DeadlineError(request.deadline - request.submitted_at)
                self._end(request, generated if now <= request.deadline else late)

    def _loop(self) -> None:
        try:
            self._runner.enter_thread()
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
            except Exception as error:  # no request's fault: nothing here can be relied on
                self._give_up("the engine failed", error)

    def _give_up(self, what: str, error: Exception) -> None:
        log.error(what, exc_info=error)
        self.failure_detail = f"{what}: {type(error).__name__}: {error}"
        self.failure = f"{what} ({type(error).__name__})"
        self.ready = False
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._fail(EngineClosedError(), self._scheduler.requests)

    def _warm_up(self) -> None:
        def say(text: str) -> None:
            if self._closing:
                raise EngineClosedError
            self.progress = f"the model is warming up: {text}"
            self._drop()

        step_times = warm_up(self._runner, say, remembered(self._step_times_file))
        with self._wake:
            self._scheduler.step_times = step_times
            self._scheduler.max_rows = min(self._scheduler.max_rows, self._runner.buckets.largest)
        started = time.perf_counter()
        self._runner.decode([0]).images()
        self._image_s = time.perf_counter() - started
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


def is_short_of_memory(result: object) -> bool:
    return isinstance(result, GenerationError) and result.reason == "out_of_memory"

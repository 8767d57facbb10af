"""Tensors on one device: slots, rows, decode. Knows nothing of requests that wait."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from rae.kernels.dispatch import selected
from rae.kernels.guided_euler import guided_euler
from rae.models.cache import cache_folder
from rae.models.checkpoint import Checkpoint
from rae.models.config import Solver
from rae.models.dit_dh import DiTDH
from rae.models.guidance import Guidance
from rae.models.sampling import denoise, draw_noise
from rae.server.conditioning import ConditioningCache, bytes_per_row
from rae.server.decoding import Decoding, ImageDecoder
from rae.server.descriptors import Descriptors, to_device
from rae.server.devices import (
    Layers,
    conditioning_bytes,
    num_slots,
    prepare,
    resolve_precision,
    set_matmul_precision,
)
from rae.server.evaluation import Evaluation
from rae.server.graphs import Buckets, compile_regions, keep_compiled
from rae.server.in_flight import InFlight, StepTiming
from rae.server.memory import free_cached, memory_errors
from rae.server.plans import Planner
from rae.server.request import ImageSpec, Plan
from rae.server.settings import Attention, Compile, Kernels, Precision

# Pixels of more images would only wait for each other.
DECODED_AT_ONCE = 16
# Up to how many of the model's rows the guide runs beside it: more fill a GPU alone.
FORKED_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class RunnerOptions:
    """How the models run. `max_rows` bounds the model's rows in a step; `slots` are as many as
    memory allows where they are None.

    `conditioning_bytes` bound what is kept, of each model, for labels and times that come again: 0
    keeps nothing, None what memory allows. With `deterministic` every step and decoding has the
    same number of rows, so that no image's bits can depend on how many others there are.
    """

    max_rows: int = 64
    slots: int | None = None
    precision: Precision = "auto"
    kernels: Kernels = "auto"
    attention: Attention = "auto"
    compile: Compile = "auto"
    graphs: bool = True
    conditioning_bytes: int | None = None
    deterministic: bool = False


class Runner:
    """One image per slot, token-major and in fp32. A row is one evaluation of a model for one
    slot: with CFG a guided slot takes a second row of the model, with AutoGuidance one of the
    guide. On CUDA the host is at most RUN_AHEAD steps ahead.

    Raises ValueError for a precision or kernels that cannot run on `device`.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, options: RunnerOptions
    ) -> None:
        config = self.config = checkpoint.config
        self.device, self.options = device, options
        self.enter_thread()
        self.precision, self._dtype = resolve_precision(options.precision, device)
        set_matmul_precision(self.precision)
        self.compiles = options.compile == "on" or (
            options.compile == "auto" and device.type == "cuda"
        )
        sizes = checkpoint.num_parameters
        self.plan = Planner(config, guide_cost=sizes.get("guide", 0) / sizes["dit_dh"])
        self._dit_dh, self._guide = checkpoint.dit_dh, checkpoint.guide
        for model in (checkpoint.dit_dh, checkpoint.guide, checkpoint.rae):
            if model is not None:
                self.layers = self._prepare(model.to(device))
        shape = (config.dit_dh.num_tokens, config.dit_dh.latent_channels)
        slots = options.slots or num_slots(device, 4 * shape[0] * shape[1], options.max_rows)
        self.latents = torch.zeros(slots, *shape, device=device)
        self._images: dict[int, tuple[ImageSpec, Plan]] = {}
        max_rows = max(2, options.max_rows)  # what one image with CFG takes
        self.buckets = self._buckets(max_rows)
        self._descriptors = Descriptors(max_rows, device)
        bound = options.conditioning_bytes
        self._conditioning_bytes = conditioning_bytes(device) if bound is None else bound
        self.model = self._evaluation(self._dit_dh)
        self.guide = self._guide and self._evaluation(self._guide, "guide_")
        decoded = self._buckets(min(DECODED_AT_ONCE, options.max_rows))
        self.decoder = ImageDecoder(
            checkpoint.rae, device, decoded, self.autocast, captures=self.captures
        )
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._in_flight = InFlight(device)

    def enter_thread(self) -> None:
        """Make the device the calling thread's, where it has a number: Triton, events and graphs
        take the current one, and each thread has its own."""
        if self.device.index is not None:
            torch.cuda.set_device(self.device)

    def _prepare(self, model: torch.nn.Module) -> Layers:
        kernels, attention = self.options.kernels, self.options.attention
        layers = prepare(
            model, self.device, self._dtype, kernels, attention, compiles=self.compiles
        )
        if self.compiles:
            keep_compiled(cache_folder() / "compiled")
            compile_regions(model, self._regions)
        return layers

    @property
    def _regions(self) -> tuple[str, ...]:
        """What is compiled. A fused block is kernels and products, with nothing between them to be
        fused, and XL's would be 45 compilations: only who asks for them gets them."""
        return ("blocks", "decoder_layers") if self.options.compile == "on" else ("decoder_layers",)

    def _evaluation(self, model: DiTDH, prefix: str = "") -> Evaluation:
        capacity = self._conditioning_bytes // bytes_per_row(model.config, self._dtype)
        fits = capacity >= self.buckets.largest
        return Evaluation(
            model,
            self.latents,
            {
                name: self._descriptors.read[prefix + name]
                for name in ("slots", "labels", "t", "kept")
            },
            ConditioningCache(model, capacity, self.device, self._dtype) if fits else None,
            self.autocast,
            captures=self.captures,
        )

    def _buckets(self, largest: int) -> Buckets:
        if self.options.deterministic:
            return Buckets(largest, (largest,))
        if self.compiles or self.captures:
            return Buckets.upto(largest)
        return Buckets(largest, None)

    @property
    def captures(self) -> bool:
        """Whether steps are CUDA graphs."""
        return self.options.graphs and self.device.type == "cuda"

    @property
    def num_slots(self) -> int:
        return len(self.latents)

    @property
    def implementations(self) -> dict[str, list[str]]:
        """What ran so far, by op and shape: "triton", "library", ..."""
        return selected() if self.layers == "fused" else {}

    def autocast(self) -> AbstractContextManager[object]:
        """All weights of matmuls are stored in the dtype: there is no cast to be remembered."""
        enabled = self._dtype != torch.float32
        return torch.autocast(self.device.type, self._dtype, enabled=enabled, cache_enabled=False)

    @memory_errors()
    def start(self, slot: int, spec: ImageSpec) -> None:
        """Put an image's noise into a slot; once more is no harm. Raises NoMemoryError."""
        noise = draw_noise(self.config.dit_dh.latent_shape, [spec.seed])[0].flatten(1).T
        if self.device.type == "cuda":  # a copy from memory that is not pinned waits for all steps
            noise = noise.contiguous().pin_memory()
        self.latents[slot].copy_(noise, non_blocking=noise.is_pinned())
        plan = self.plan(spec)
        self._images[slot] = (spec, plan)
        second = [t for t, guided in zip(plan.times, plan.guided, strict=False) if guided]
        self.model.keep((spec.class_label, t) for t in plan.times[:-1])
        if plan.method == "cfg":
            self.model.keep((self.config.dit_dh.null_label, t) for t in second)
        elif self.guide is not None:
            self.guide.keep((spec.class_label, t) for t in second)

    @memory_errors()
    @torch.inference_mode()
    def step(self, rows: Sequence[tuple[int, int]]) -> None:
        """One evaluation and Euler update for each (slot, step) of `rows`; slots are distinct. On
        CUDA it is only enqueued.

        The update is the last that is done: where this raises, NoMemoryError or another, no latents
        have changed, and after `works` or `free` the same may be tried again.
        """
        self.wait()
        num_model, num_guide = self._describe(rows)
        with self._in_flight.step(num_model, num_guide):
            velocity, guide_velocity = self._velocities(num_model, num_guide)
            read = self._descriptors.read
            updated = len(velocity) if self.buckets.sizes else len(rows)
            guided_euler(
                self.latents,
                read["targets"][:updated],
                read["dt"][:updated],
                velocity,
                read["weak_rows"][:updated],
                read["scales"][:updated],
                guide_velocity,
                kernels=self.options.kernels,
            )

    def wait(self) -> StepTiming | None:
        """Wait until another step may be enqueued. The step that ended with that, if one did; what
        a step is to do is best decided after this."""
        return self._in_flight.wait()

    def free(self) -> None:
        """After NoMemoryError was handled: wait for the steps, and let go of what is cached."""
        free_cached(self.device)

    def shrink_decoding(self, images: int) -> int:
        """Decode fewer at a time than it takes for `images`, if fewer are possible; how many."""
        smaller = self.decoder.buckets.below(min(images, self.decoder.buckets.largest))
        self.decoder.buckets = smaller or self.decoder.buckets
        return self.decoder.buckets.largest

    def works(self) -> bool:
        """Wait for the steps; False after a fault that a CUDA device does not recover from in this
        process."""
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except RuntimeError:
            return False
        return True

    def _describe(self, rows: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """Write the step's descriptors: the images' own rows, in their order, then the null
        label's, then pads. How many the model's are, and the guide's."""
        write, null_label = self._descriptors.write, self.config.dit_dh.null_label
        write["targets"].fill(-1)
        write["weak_rows"].fill(-1)
        model: list[tuple[int, int, float]] = []
        cfg: list[int] = []
        auto: list[int] = []
        for row, (slot, step) in enumerate(rows):
            spec, plan = self._images[slot]
            t, t_next = plan.times[step : step + 2]
            model.append((slot, spec.class_label, t))
            write["targets"][row] = slot
            write["dt"][row], write["scales"][row] = t_next - t, plan.scale
            if plan.guided[step]:
                (cfg if plan.method == "cfg" else auto).append(row)
        guide = [model[row] for row in auto]
        model += [(model[row][0], null_label, model[row][2]) for row in cfg]
        write["weak_rows"][cfg] = range(len(rows), len(model))
        first = self.buckets(len(model))  # the guide's rows count on from the model's, with pads
        write["weak_rows"][auto] = range(first, first + len(auto))
        self.model.describe(model, write, "")
        if self.guide is not None and guide:
            self.guide.describe(guide, write, "guide_")
        self._descriptors.send()
        return len(model), len(guide)

    def _velocities(self, num_model: int, num_guide: int) -> tuple[Tensor, Tensor | None]:
        """Of all rows and of the guide's, pads included."""
        padded = self.buckets(num_model)
        if self.guide is None or not num_guide:
            return self.model.rows(padded), None
        padded_guide = self.buckets(num_guide)
        if self._side is None or padded > FORKED_ROWS:
            guide_velocity = self.guide.rows(padded_guide)
            return self.model.rows(padded), guide_velocity
        main = torch.cuda.current_stream(self.device)
        self._side.wait_stream(main)
        with torch.cuda.stream(self._side):
            guide_velocity = self.guide.rows(padded_guide)
        velocity = self.model.rows(padded)
        main.wait_stream(self._side)
        return velocity, guide_velocity

    @torch.inference_mode()
    def solve(self, slots: Sequence[int], solver: Solver) -> None:
        """Denoise `slots`, which share a plan, by `sampling.denoise`: `step` knows only euler."""
        specs, plans = zip(*(self._images[slot] for slot in slots), strict=True)
        assert all(plan is plans[0] for plan in plans)
        indices = torch.tensor(slots, device=self.device)
        latents = self.latents[indices].transpose(1, 2)  # (B, C, N)
        with self.autocast():
            latents = denoise(
                self._dit_dh,
                latents.unflatten(-1, self.config.dit_dh.latent_shape[1:]),
                torch.tensor([spec.class_label for spec in specs], device=self.device),
                torch.tensor(plans[0].times),
                solver=solver,
                guidance=Guidance(plans[0].scale, specs[0].guidance_interval, plans[0].method),
                null_label=self.config.dit_dh.null_label,
                guide=self._guide,
            )
        self.latents[indices] = latents.flatten(2).transpose(1, 2)

    @memory_errors()
    @torch.inference_mode()
    def decode(self, slots: Sequence[int], *, truncate: bool = False) -> Decoding:
        """Images of the latents in `slots`, which may be started anew at once. Pixels are rounded,
        or truncated as published. Raises NoMemoryError."""
        latents = self.latents[to_device(slots, torch.int64, self.device)]
        return self.decoder.decode(slots, latents, truncate=truncate)

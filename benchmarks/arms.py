"""Ways to make a batch of images, for throughput.py: ours, plain layers, and the authors' code."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from forward import authors_model
from torch import Tensor, nn

from rae.models.checkpoint import load_checkpoint
from rae.models.dit_dh import DiTDH
from rae.models.layers import store_matmul_weights
from rae.models.sampling import VelocityModel, denoise, draw_noise, timesteps, to_uint8
from rae.server.request import ImageSpec
from rae.server.runner import Runner, RunnerOptions
from rae.server.warm_up import warm_up

Method = Literal["none", "cfg", "autoguidance"]
Images = Sequence[np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is sampled: `steps` grid points, and a guidance; its interval is closed."""

    steps: int
    method: Method
    cfg: float
    interval: tuple[float, float]

    def spec(self, index: int, num_classes: int) -> ImageSpec:
        return ImageSpec(
            class_label=index % num_classes,
            seed=index,
            steps=self.steps,
            cfg=1.0 if self.method == "none" else self.cfg,
            guidance_method="cfg" if self.method == "none" else self.method,
            guidance_interval=self.interval,
        )


class Arm(Protocol):
    def sample(self, task: Task, batch: int) -> Iterator[Images | None]:
        """Yields when the noise is there, when all evaluations are enqueued, and the images,
        (H, W, 3) uint8 on the host."""
        ...


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds: of all evaluations, of decoding to the host, and of both with the noise."""

    evaluate_s: float
    decode_s: float
    total_s: float


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(arm: Arm, task: Task, batch: int, device: torch.device) -> Times:
    synchronize(device)
    marks, images = [time.perf_counter()], None
    for images in arm.sample(task, batch):  # noqa: B007
        synchronize(device)
        marks.append(time.perf_counter())
    assert images is not None and len(images) == batch
    started, noise, evaluated, decoded = marks
    return Times(
        evaluate_s=evaluated - noise, decode_s=decoded - evaluated, total_s=decoded - started
    )


class Ours:
    """The server's runner. With `published_rows` it does the work of the authors' sampler: guidance
    at every step, and with AutoGuidance both models on twice the images."""

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        task: Task,
        largest: int,
        *,
        published_rows: bool = False,
        **options: object,
    ) -> None:
        self.published_rows = published_rows
        images = largest * self._copies(task)
        rows = images * (2 if task.method == "cfg" else 1)
        given: dict[str, Any] = {"max_rows": rows, "slots": images, **options}
        checkpoint = load_checkpoint(folder, keep_bf16=True)
        self.num_classes = checkpoint.config.dit_dh.num_classes
        self.runner = Runner(checkpoint, device, RunnerOptions(**given))
        self.step_times = warm_up(self.runner, lambda _: None)

    def _copies(self, task: Task) -> int:
        return 2 if self.published_rows and task.method == "autoguidance" else 1

    def sample(self, task: Task, batch: int) -> Iterator[Images | None]:
        if self.published_rows:
            task = replace(task, interval=(0.0, 1.0))
        slots = range(batch * self._copies(task))
        for slot in slots:
            self.runner.start(slot, task.spec(slot, self.num_classes))
        yield None
        for step in range(task.steps - 1):
            self.runner.step([(slot, step) for slot in slots])
        yield None
        yield self.runner.decode(slots[:batch]).images()


def guided_on_full_rows(
    model: VelocityModel, guide: VelocityModel | None, task: Task, null_label: int
) -> VelocityModel:
    """The authors' guidance as they batch it: twice the rows, whatever the interval."""

    def velocity(latents: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        twice, times = torch.cat([latents, latents]), torch.cat([t, t])
        if task.method == "cfg":
            both = torch.cat([labels, torch.full_like(labels, null_label)])
            strong, weak = model(twice, times, both).float().chunk(2)
        else:
            assert guide is not None
            both = torch.cat([labels, labels])
            strong, weak = (m(twice, times, both).float()[: len(t)] for m in (model, guide))
        low, high = task.interval
        scale = torch.where((t >= low) & (t <= high), task.cfg, 1.0).view(-1, 1, 1, 1)
        return weak + scale * (strong - weak)

    return velocity


class Plain:
    """Our plain layers, eager, with matmul weights stored in `dtype`, on the published rows."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.checkpoint = load_checkpoint(folder, keep_bf16=True)
        self.device, self.dtype = device, dtype
        self.guide: DiTDH | None = self.checkpoint.guide
        for model in (self.checkpoint.dit_dh, self.guide, self.checkpoint.rae):
            if model is not None:
                store_matmul_weights(model.to(device), dtype)

    def sample(self, task: Task, batch: int) -> Iterator[Images | None]:
        config = self.checkpoint.config
        noise = draw_noise(config.dit_dh.latent_shape, range(batch)).to(self.device)
        labels = torch.arange(batch, device=self.device) % config.dit_dh.num_classes
        yield None
        velocity: VelocityModel = self.checkpoint.dit_dh
        if task.method != "none":
            null_label = config.dit_dh.null_label
            velocity = guided_on_full_rows(velocity, self.guide, task, null_label)
        bf16 = self.dtype != torch.float32
        with torch.inference_mode(), torch.autocast(self.device.type, self.dtype, enabled=bf16):
            latents = denoise(velocity, noise, labels, timesteps(task.steps, config.shift))
            yield None
            images = to_uint8(self.checkpoint.rae.decode(latents))
        yield list(images.permute(0, 2, 3, 1).cpu().numpy())


def keep_workspaces() -> None:
    """Let max-autotune's CUDA graphs leave the cuBLAS workspaces of all streams where they are: our
    graphs, captured before, write to theirs."""
    from torch._inductor import cudagraph_trees  # takes seconds

    cudagraph_trees.clear_cublass_cache = lambda: None


class Authors:
    """The authors' models in their sampler, as their sample_ddp.py runs them: their autocast is
    open over all steps, TF32 is on, and guided images take twice the rows. Images are decoded by
    our plain layers: theirs, which need transformers, have a slower attention.

    Raises ImportError where `upstream` cannot run.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        upstream: Path,
        dtype: torch.dtype,
        *,
        compiled: bool = False,
    ) -> None:
        checkpoint = load_checkpoint(folder)
        self.config, self.device, self.dtype = checkpoint.config, device, dtype
        self.rae = checkpoint.rae.to(device)
        self.model: Any = self._load(checkpoint.dit_dh, upstream, compiled)
        guide = checkpoint.guide
        self.guide: Any = guide and self._load(guide, upstream, compiled)
        transport = import_module("stage2.transport")
        self.sampler = transport.Sampler(
            transport.create_transport(
                path_type="Linear",
                prediction="velocity",
                time_dist_type="uniform",
                time_dist_shift=self.config.shift,
            )
        )

    def _load(self, ours: DiTDH, upstream: Path, compiled: bool) -> nn.Module:
        model = authors_model(upstream, ours.config, ours.to(self.device).state_dict())
        if compiled:
            keep_workspaces()
            run = torch.compile(model.forward, mode="max-autotune", dynamic=False)
            # A CUDA graph's output is overwritten by the next one's, the guide's.
            model.forward = lambda *args, **kwargs: run(*args, **kwargs).clone()
        return model

    def sample(self, task: Task, batch: int) -> Iterator[Images | None]:
        bf16 = self.dtype != torch.float32
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                yield from self._sample(task, batch)
        finally:
            torch.set_float32_matmul_precision(precision)

    def _sample(self, task: Task, batch: int) -> Iterator[Images | None]:
        config = self.config.dit_dh
        run = self.sampler.sample_ode(sampling_method="euler", num_steps=task.steps)
        z = torch.randn(batch, *config.latent_shape, device=self.device)
        y = torch.arange(batch, device=self.device) % config.num_classes
        kwargs: dict[str, Any] = {}
        forward = self.model.forward
        if task.method != "none":
            z = torch.cat([z, z])
            y = torch.cat([y, torch.full_like(y, config.null_label)])
            kwargs = {"cfg_scale": task.cfg, "cfg_interval": task.interval}
            forward = self.model.forward_with_cfg
        if task.method == "autoguidance":
            assert self.guide is not None
            kwargs["additional_model_forward"] = self.guide.forward
            forward = self.model.forward_with_autoguidance
        yield None
        latents = run(z, forward, y=y, **kwargs)[-1][:batch]
        yield None
        images = self.rae.decode(latents).clamp(0, 1)
        pixels = images.mul(255).permute(0, 2, 3, 1).to("cpu", dtype=torch.uint8)
        yield list(pixels.numpy())

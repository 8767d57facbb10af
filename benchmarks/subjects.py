"""What the benchmarks of whole images measure: checkpoint folders, and servers on them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from rae.models.checkpoint import save_checkpoint
from rae.models.checkpoint_config import CheckpointConfig, SamplerDefaults
from rae.models.config import CONFIGS, DECODER_CONFIGS
from rae.models.dit_dh import DiTDH
from rae.models.published import IMAGENET_MEAN, IMAGENET_STD
from rae.models.rae import RAE
from rae.models.sampling import default_shift
from rae.server.settings import embedded_model


def draw_weights(model: nn.Module) -> None:
    """Random weights, none of them zero, that keep activations near 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(std=0.1)


def find_checkpoint(model: str, folder: Path, device: torch.device) -> Path:
    """The folder of `model`: "digits", a checkpoint folder, or a name of CONFIGS, which gets random
    weights under `folder`, once: its own, a guide of size S, and the published decoder."""
    if model == "digits":
        return embedded_model()
    if model not in CONFIGS:
        return Path(model)
    path = folder / model
    if not (path / "config.json").is_file():
        write_random_checkpoint(model, path, device)
    return path


def write_random_checkpoint(name: str, path: Path, device: torch.device) -> None:
    size = name.rpartition("-")[2]
    config = CheckpointConfig(
        name=name,
        dit_dh=CONFIGS[name],
        guide=CONFIGS[f"DiTDH-S-{size}"],
        decoder=DECODER_CONFIGS[f"decoder-ViT-XL-{size}"],
        classes=tuple(map(str, range(CONFIGS[name].num_classes))),
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
        shift=default_shift(CONFIGS[name].latent_shape),
        defaults=SamplerDefaults(cfg=1.42, guidance_method="autoguidance"),
    )
    assert config.guide is not None
    torch.manual_seed(0)
    with device:
        dit_dh, guide = DiTDH(config.dit_dh), DiTDH(config.guide)
        rae = RAE(config.decoder, image_mean=config.image_mean, image_std=config.image_std)
    for model in (dit_dh, guide, rae):
        draw_weights(model)
    save_checkpoint(path, config, dit_dh, rae, guide)


def cpu_seconds(pid: int) -> float:
    """What a process on Linux, and those that it started, took of the CPUs so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own + sum(cpu_seconds(int(child)) for child in children)


@dataclass(kw_only=True)
class Served:
    """A running `rae serve`; `peak_rss_gib` is known once it has ended."""

    url: str
    pid: int
    ready_s: float
    peak_rss_gib: float = 0.0


@contextmanager
def serve(
    folder: Path,
    flags: Sequence[str] = (),
    environment: dict[str, str] | None = None,
    timeout_s: float = 600,
) -> Iterator[Served]:
    """`rae serve` on a free port, from its start until it says that it is ready, and then as long
    as the context. Raises RuntimeError with what it wrote where it ends before, or is not ready
    in time."""
    command = [sys.executable, "-P", "-m", "rae.server", "serve", "--model", str(folder)]
    command += ["--port", "0", "--log-level", "warning", *flags]
    outer = {key: value for key, value in os.environ.items() if not key.startswith("RAE_")}
    with tempfile.TemporaryFile("w+") as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=outer | (environment or {})
        )
        assert process.stdout is not None
        timer = threading.Timer(timeout_s, process.kill)
        timer.start()
        try:
            line = next((line for line in process.stdout if line.startswith("Ready: ")), "")
            late = timer.finished.is_set()
            timer.cancel()
            if not line:
                log.seek(0)
                reason = f"was not ready in {timeout_s:.0f} s" if late else "ended too early"
                raise RuntimeError(f"rae serve {reason}: {log.read()[-2000:]}")
            ready_s = time.perf_counter() - started
            served = Served(url=line.split()[1], pid=process.pid, ready_s=ready_s)
            yield served
            process.send_signal(signal.SIGTERM)
            _, _, usage = os.wait4(process.pid, 0)
            served.peak_rss_gib = usage.ru_maxrss / 2**20  # KiB on Linux
            process.returncode = 0
        finally:
            timer.cancel()
            if process.returncode is None:
                process.kill()
            process.wait()
            process.stdout.close()

"""What HTTP costs: finished PNGs a second from `rae serve`, against the engine's own pixels.

    python benchmarks/over_http.py [--model DiTDH-S-256] [--precision bf16] [--json FILE]

- offline: requests of one image, all submitted at once to an `Engine` in a process of its own;
  until the last image is there as uint8 pixels.
- http: POST /generate of the same images, by this process over `--connections` kept alive, more
  than the batch, so that the server never waits for a request; until the last PNG is complete.

Both have the same settings and run in turns, after one that is not counted, and each image of one
is compared with that of the other: `differ_by` is the largest mean difference of one's pixels, of
255, and on a CPU has to be 0. A GPU's products have other bits in steps of other sizes.

`ratio` is the median over the turns of http's rate over offline's; `cpu_s_per_image` is what other
work on the machine does not slow as much, the client counted in. `alone_s` is how long one image
takes over HTTP where nothing else is asked for, of --alone of them one after another, each on a new
connection. --model is a name of CONFIGS, with random weights, a checkpoint folder, or digits.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from threading import local
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import torch
from arrivals import percentiles
from machine_facts import machine
from PIL import Image
from subjects import Served, cpu_seconds, find_checkpoint, serve

from rae.models.checkpoint_config import read_config
from rae.server.request import ImageSpec
from rae.server.settings import EngineSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

TARGET = 0.95


@dataclass(frozen=True, kw_only=True)
class Result:
    """`images` by seed: (H, W, 3) uint8 each. `cpu_s` are all processes' that took part."""

    seconds: float
    cpu_s: float
    images: dict[int, np.ndarray]
    num_bytes: int


def run_engine(pipe: Connection, folder: Path, settings: EngineSettings) -> None:
    """A process: answers each list of specs with a Result, until it gets None."""
    from rae.models.checkpoint import load_checkpoint
    from rae.server.engine import Engine
    from rae.server.metrics import Metrics

    engine = Engine(load_checkpoint(folder, keep_bf16=True), settings, Metrics())
    engine.start()
    while not (engine.ready or engine.failure):
        time.sleep(0.05)
    pipe.send(engine.failure)
    for specs in iter(pipe.recv, None):
        started, cpu_s = time.perf_counter(), time.process_time()
        requests = [engine.submit([spec], str(spec.seed)) for spec in specs]
        images = [request.future.result().images[0] for request in requests]
        seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_s
        by_seed = {spec.seed: image for spec, image in zip(specs, images, strict=True)}
        size = sum(image.nbytes for image in images)
        pipe.send(Result(seconds=seconds, cpu_s=cpu_s, images=by_seed, num_bytes=size))
    engine.close()


class Offline:
    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def run(self, specs: Sequence[ImageSpec]) -> Result:
        self.pipe.send(specs)
        return self.pipe.recv()


@contextmanager
def offline(folder: Path, settings: EngineSettings) -> Iterator[Offline]:
    """Raises RuntimeError where the engine fails, EOFError where its process does."""
    spawning = multiprocessing.get_context("spawn")
    pipe, end = spawning.Pipe()
    process = spawning.Process(target=run_engine, args=(end, folder, settings), daemon=True)
    process.start()
    end.close()
    failure = pipe.recv()
    if failure:
        raise RuntimeError(failure)
    yield Offline(pipe)
    pipe.send(None)
    process.join()


def run_client(served: Served, connections: int, specs: Sequence[ImageSpec]) -> Result:
    """Each thread has a connection that is kept alive: new in every turn, since the server closes
    those that wait for seconds. Raises RuntimeError for another answer than a PNG."""
    own = local()

    def connect() -> None:
        own.connection = http.client.HTTPConnection(urlsplit(served.url).netloc)

    def generate(spec: ImageSpec) -> bytes:
        body = {"class_id": spec.class_label, "seed": spec.seed, "steps": spec.steps}
        body |= {"cfg": spec.cfg, "guidance_method": spec.guidance_method}
        headers = {"content-type": "application/json"}
        own.connection.request("POST", "/generate", json.dumps(body), headers)
        response = own.connection.getresponse()
        data = response.read()
        if response.status != 200:
            raise RuntimeError(f"{response.status} {data[:500]!r}")
        return data

    with ThreadPoolExecutor(connections, initializer=connect) as pool:
        started, before = time.perf_counter(), cpu_seconds(served.pid) + time.process_time()
        files = list(pool.map(generate, specs))
        seconds = time.perf_counter() - started
        cpu_s = cpu_seconds(served.pid) + time.process_time() - before
    images = {
        spec.seed: np.asarray(Image.open(io.BytesIO(file)))
        for spec, file in zip(specs, files, strict=True)
    }
    return Result(seconds=seconds, cpu_s=cpu_s, images=images, num_bytes=sum(map(len, files)))


def time_alone(served: Served, specs: Sequence[ImageSpec]) -> dict[str, float]:
    """Seconds of a request that has the server for itself; the first is not counted."""
    seconds = [run_client(served, 1, [spec]).seconds for spec in specs]
    return percentiles(seconds[1:])


def specs_of(args: argparse.Namespace, turn: int, num: int, num_classes: int) -> list[ImageSpec]:
    return [
        ImageSpec(
            class_label=seed % num_classes,
            seed=seed,
            steps=args.steps,
            cfg=args.cfg,
            guidance_method=args.guidance,
        )
        for seed in range(turn * num, (turn + 1) * num)
    ]


def difference(turns: Sequence[tuple[Result, Result]]) -> float:
    return max(
        float(np.abs(image.astype(np.int16) - server.images[seed]).mean())
        for engine, server in turns
        for seed, image in engine.images.items()
    )


def summary(turns: Sequence[tuple[Result, Result]], *, is_exact: bool = True) -> dict[str, Any]:
    """Rates by turn and their medians, of (offline, http). Raises RuntimeError for images that are
    not the same, where they have to be."""
    differ_by = difference(turns)
    if is_exact and differ_by:
        raise RuntimeError(f"images differ over HTTP, by {differ_by:.3g} of 255 in the mean")
    rates = [[len(result.images) / result.seconds for result in turn] for turn in turns]
    ratio = median(server / engine for engine, server in rates)
    return {
        "offline_images_per_s": median(engine for engine, _ in rates),
        "http_images_per_s": median(server for _, server in rates),
        "ratio": ratio,
        "differ_by": differ_by,
        "met": ratio >= TARGET,
        "offline_cpu_s_per_image": median(e.cpu_s / len(e.images) for e, _ in turns),
        "http_cpu_s_per_image": median(s.cpu_s / len(s.images) for _, s in turns),
        "turns_images_per_s": [{"offline": a, "http": b} for a, b in rates],
        "png_kb": median(s.num_bytes / len(s.images) for _, s in turns) / 1000,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="DiTDH-S-256")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--steps", type=int, default=6, help="grid points of an image")
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument("--guidance", choices=("cfg", "autoguidance"), default="cfg")
    parser.add_argument("--batch", type=int, default=8, help="the engine's largest batch")
    parser.add_argument("--connections", type=int, help="default: twice the batch")
    parser.add_argument("--images", type=int, help="of a turn; default: two batches")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--alone", type=int, default=20, help="requests one after another")
    parser.add_argument("--checkpoints", type=Path, help="where random weights are kept")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the `rae` command sets it
    connections = args.connections or 2 * args.batch
    num = args.images or 2 * args.batch
    device = torch.device(args.device)
    settings = EngineSettings(device=args.device, precision=args.precision, max_batch=args.batch)
    flags = [f"--{key}={getattr(settings, key)}" for key in ("device", "precision")]
    turns: list[tuple[Result, Result]] = []
    figures: dict[str, Any] = machine(device) | {"load_average": os.getloadavg()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = find_checkpoint(args.model, args.checkpoints or Path(temporary), device)
        flags.append(f"--max-batch={args.batch}")
        num_classes = read_config(folder)[0].dit_dh.num_classes
        with offline(folder, settings) as engine, serve(folder, flags) as served:
            for turn in range(args.turns + 1):
                specs = specs_of(args, turn, num, num_classes)
                results = (engine.run(specs), run_client(served, connections, specs))
                if turn:
                    turns.append(results)
            figures["alone_s"] = time_alone(served, specs_of(args, 0, args.alone + 1, num_classes))
    asked = ("model", "precision", "steps", "cfg", "guidance", "batch")
    figures |= {key: getattr(args, key) for key in asked}
    figures |= {"connections": connections, "images_per_turn": num} | summary(
        turns, is_exact=device.type == "cpu"
    )
    text = json.dumps(figures, indent=1) + "\n"
    sys.stdout.write(text)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(text)
    return 0 if figures["met"] else 1


if __name__ == "__main__":
    sys.exit(main())

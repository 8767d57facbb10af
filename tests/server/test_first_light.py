"""The embedded model behind a real server: digits that can be read, the same ones always."""

from __future__ import annotations

import io
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from PIL import Image

from rae.models.checkpoint import load_checkpoint
from rae.server.request import ImageSpec
from rae.server.runner import Runner, RunnerOptions
from rae.server.settings import Precision, embedded_model
from rae.training.digits.digits_data import split_digits, to_scans
from rae.training.digits.digits_judge import Judge

Serve = Callable[..., AbstractContextManager[tuple[str, subprocess.Popen[bytes]]]]
TIMEOUT_S = 100


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def url(request: pytest.FixtureRequest, serve: Serve) -> Iterator[str]:
    flags = ("--model", str(embedded_model()), "--precision", request.param, "--max-batch", "40")
    with serve(*flags) as (url, _):
        yield url


def generate(url: str, **body: object) -> bytes:
    """The PNG of one image."""
    response = httpx2.post(f"{url}/generate", json=body, timeout=TIMEOUT_S)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "image/png"
    return response.content


def test_digits_are_the_class_asked_for(url: str) -> None:
    """Ten classes, three seeds, the request of the README: an SVC reads all but one."""
    judge = Judge(*split_digits())
    asked = [(class_id, seed) for class_id in range(10) for seed in range(3)]

    def draw(pair: tuple[int, int]) -> np.ndarray:
        png = generate(url, class_id=pair[0], cfg=1.5, steps=50, seed=pair[1])
        return np.asarray(Image.open(io.BytesIO(png)))

    with ThreadPoolExecutor(len(asked)) as pool:
        images = np.stack(list(pool.map(draw, asked)))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    labels = torch.tensor([class_id for class_id, _ in asked])
    assert judge.recognised(to_scans(pixels), labels) >= 29 / 30


def test_the_same_seed_gives_the_same_bytes_alone_and_among_twenty(url: str) -> None:
    request = {"class_id": 7, "cfg": 1.5, "steps": 50, "seed": 2026}
    alone = generate(url, **request)
    draw = random.Random(0)
    others: list[dict[str, Any]] = [
        {
            "class_id": draw.choice([None, *range(10)]),
            "cfg": draw.choice([1, 1.3, 2, 7.5]),
            "steps": draw.randint(2, 60),
            "seed": draw.randrange(10**6),
            "guidance_method": draw.choice(["cfg", "autoguidance"]),
            "guidance_interval": draw.choice([[0, 1], [0.2, 0.8]]),
        }
        for _ in range(20)
    ]
    with ThreadPoolExecutor(21) as pool:
        ahead = [pool.submit(generate, url, **other) for other in others[:10]]
        among = pool.submit(generate, url, **request)
        behind = [pool.submit(generate, url, **other) for other in others[10:]]
        assert among.result() == alone
        assert len({future.result() for future in ahead + behind}) == 20


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_batch_size_from_1_to_40_gives_the_same_image(precision: Precision) -> None:
    options = RunnerOptions(max_rows=80, slots=40, precision=precision)
    runner = Runner(load_checkpoint(embedded_model()), torch.device("cpu"), options)
    draw = random.Random(0)
    specs = [
        ImageSpec(class_label=slot % 11, seed=slot, steps=4, cfg=draw.choice([1.0, 1.5, 4.0]))
        for slot in range(40)
    ]
    expected: dict[int, np.ndarray] = {}
    for batch in range(1, 41):
        slots = [0, *draw.sample(range(1, 40), batch - 1)]
        for slot in slots:
            runner.start(slot, specs[slot])
        for step in range(3):
            runner.step([(slot, step) for slot in slots])
        for slot, image in zip(slots, runner.decode(slots).images(), strict=True):
            np.testing.assert_array_equal(image, expected.setdefault(slot, image), f"{batch}")
    assert len({image.tobytes() for image in expected.values()}) == 40


def test_a_short_request_overtakes_a_long_one(url: str) -> None:
    def timed(steps: int) -> float:
        start = time.monotonic()
        generate(url, class_id=1, steps=steps)
        return time.monotonic() - start

    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(timed, 400)
        time.sleep(0.2)
        short = pool.submit(timed, 10)
        assert short.result() <= long.result() / 4

"""What is asked of a server under load, and when; and what is said of the answers' times."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from http_client import Answer, Client, generate_message, message

Fields = dict[str, Any]

STEPS = (10, 50)
CFGS = (1.0, 1.5, 3.0)


def poisson_times(rate: float, seconds: float, draw: np.random.Generator) -> np.ndarray:
    """When requests come, in seconds from the start, ascending: `rate` a second, at random."""
    return np.sort(draw.uniform(0, seconds, draw.poisson(rate * seconds)))


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99 and the largest; nothing of nothing."""
    if not seconds:
        return {}
    p50, p95, p99 = map(float, np.percentile(seconds, (50, 95, 99)))
    return {"p50": p50, "p95": p95, "p99": p99, "max": max(seconds)}


@dataclass(frozen=True)
class Subject:
    """What of a server's model decides which requests it takes."""

    name: str
    num_classes: int
    methods: tuple[str, ...]

    @classmethod
    async def of(cls, client: Client) -> Subject:
        answer, _ = await client.request(message("GET", "/info"))
        model = json.loads(answer.body)["model"]
        return cls(model["name"], model["num_classes"], tuple(model["guidance_methods"]))

    def draw(self, count: int, draw: np.random.Generator) -> list[Fields]:
        """Requests for one image each: seeds are apart; classes, steps and guidance differ."""
        return [
            {
                "class_id": int(draw.integers(self.num_classes)),
                "seed": int(draw.integers(2**32)) * 100,
                "steps": int(draw.integers(STEPS[0], STEPS[1] + 1)),
                "cfg": float(draw.choice(CFGS)),
                "guidance_method": str(draw.choice(self.methods)),
            }
            for _ in range(count)
        ]


def fingerprint(answer: Answer) -> str:
    """Of the images alone: JSON says more of a request, which differs."""
    data = answer.body
    if answer.headers.get("content-type") == "application/json":
        data = "".join(image["data"] for image in json.loads(data)["images"]).encode()
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Known:
    """A request with the bytes it has to be answered with."""

    fields: Mapping[str, Any]
    data: bytes
    fingerprint: str

    def is_right(self, answer: Answer) -> bool:
        return answer.status == 200 and fingerprint(answer) == self.fingerprint


async def know(client: Client, requests: Sequence[Fields]) -> list[Known]:
    """Each request's images, made alone: the server has nothing else to do meanwhile.

    Raises RuntimeError where one is refused.
    """
    known = []
    for fields in requests:
        data = generate_message(fields)
        answer, _ = await client.request(data)
        if answer.status != 200:
            raise RuntimeError(f"{fields}: {answer.status} {answer.body[:500]!r}")
        known.append(Known(fields, data, fingerprint(answer)))
    return known

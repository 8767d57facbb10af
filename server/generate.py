"""One POST /generate: from its body to its answer."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from base64 import b64encode
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from rae.models.checkpoint_config import CheckpointConfig
from rae.server import errors
from rae.server.access import Access, Client
from rae.server.account import Account
from rae.server.images import describe, encode, mime_type
from rae.server.limits import Limits, shown
from rae.server.metrics import Metrics
from rae.server.pool import Pool
from rae.server.rate_limits import RateLimits
from rae.server.request import Generated, ImageSpec
from rae.server.schemas import (
    Cancelled,
    GeneratedImage,
    GenerateRequest,
    GenerateResponse,
    parse_request,
)
from rae.server.serve_settings import ServeSettings
from rae.server.settings import ImageFormat

log = logging.getLogger(__name__)

QUALITY = re.compile(r"q=[01](\.\d*)?")


class Running(NamedTuple):
    """A request under its X-Request-Id, which need not be the only one."""

    client: str
    work: asyncio.Task[Generated]


class Generate:
    """The route. How a request ended is counted around it, by `AccountMiddleware`."""

    def __init__(
        self,
        pool: Pool,
        config: CheckpointConfig,
        sha256: str,
        metrics: Metrics,
        limits: Limits,
        settings: ServeSettings,
        access: Access,
    ) -> None:
        self.pool, self.config, self.sha256, self.metrics = pool, config, sha256, metrics
        self.limits, self.max_body_bytes = limits, settings.max_body_bytes
        self.access = access
        self.rate_limits = RateLimits(settings.rate_limit, settings.rate_burst)
        self._running: dict[str, set[Running]] = {}

    async def respond(self, http: Request) -> Response:
        client = self._client(http)
        asked = parse_request(await read_json(http, self.max_body_bytes), self.limits)
        specs = asked.specs(self.limits)
        account: Account = http.state.account
        account.facts |= told(specs, self.limits)
        generated = await self._run(specs, asked, http, client)
        started = time.perf_counter()
        descriptions = self._describe(specs)
        files = await encode_all(generated, descriptions, asked.image_format)
        encode_s = time.perf_counter() - started
        self.metrics.encode_seconds.observe(encode_s)
        self.metrics.images.inc(len(files))
        timings_ms = {
            "queue": 1000 * generated.queue_s,
            "denoise": 1000 * generated.denoise_s,
            "decode": 1000 * generated.decode_s,
            "encode": 1000 * encode_s,
        }
        account.took(timings_ms)
        headers = {
            "x-seed": str(specs[0].seed),
            "x-evaluations": str(specs[0].num_evaluations),
            "server-timing": ", ".join(f"{k};dur={ms:.2f}" for k, ms in timings_ms.items()),
        }
        mime = mime_type(asked.image_format)
        if len(files) == 1 and accepts_image(http.headers.get("accept")):
            return Response(files[0], media_type=mime, headers=headers)
        answer = partial(self._json, http.state.request_id, specs, files, mime, timings_ms)
        # 64 images of 256 px are 8 MB of text: others' requests go on meanwhile.
        text = await asyncio.to_thread(answer)
        return Response(text, media_type="application/json", headers=headers)

    def _describe(self, specs: Sequence[ImageSpec]) -> list[dict[str, Any]]:
        assert self.pool.facts is not None
        precision = self.pool.facts.precision
        return [describe(spec, self.config, self.sha256, precision) for spec in specs]

    def _json(
        self,
        request_id: str,
        specs: Sequence[ImageSpec],
        files: Sequence[bytes],
        mime: str,
        timings_ms: dict[str, float],
    ) -> str:
        first = specs[0]
        return GenerateResponse(
            request_id=request_id,
            images=[
                GeneratedImage(
                    seed=description["seed"],
                    class_id=description["class_id"],
                    class_name=description["class_name"],
                    mime_type=mime,
                    data=b64encode(file).decode(),
                )
                for file, description in zip(files, self._describe(specs), strict=True)
            ],
            steps=first.steps,
            evaluations=first.num_evaluations,
            cfg=first.cfg,
            guidance_method=first.guidance_method,
            guidance_interval=first.guidance_interval,
            checkpoint_sha256=self.sha256,
            timings_ms=timings_ms,
        ).model_dump_json()

    async def _run(
        self, specs: Sequence[ImageSpec], asked: GenerateRequest, http: Request, client: Client
    ) -> Generated:
        """Raises an ApiError: then nothing runs on."""
        self.rate_limits.check(client.name, time.monotonic())
        request_id = http.state.request_id
        work = asyncio.create_task(
            self.pool.generate(
                specs,
                request_id,
                client=client.name,
                weight=client.weight,
                priority=asked.priority or "normal",
                deadline_s=asked.deadline_ms / 1000 if asked.deadline_ms else math.inf,
                on_accepted=partial(self._accepted, http.state.account, client.name),
            )
        )
        one = Running(client.name, work)
        running = self._running.setdefault(request_id, set())
        running.add(one)
        gone = asyncio.create_task(disconnected(http))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise errors.ClientGoneError
            if work.cancelled():
                raise errors.RequestCancelledError
            return work.result()
        finally:
            gone.cancel()
            work.cancel()
            running.remove(one)
            if not running:
                del self._running[request_id]

    def _client(self, http: Request) -> Client:
        """Raises UnauthorizedError."""
        client = self.access.client(http)
        http.state.client = client.name
        return client

    def _accepted(self, account: Account, client: str, cost: float) -> None:
        account.accept()
        self.rate_limits.charge(client, cost, time.monotonic())

    async def cancel(self, http: Request, request_id: str) -> Cancelled:
        """DELETE /requests/{request_id}; the request itself is answered with status 499. With API
        keys only its own client finds it."""
        client = self._client(http)
        running = [
            one
            for one in self._running.get(request_id, ())
            if one.client == client.name or not self.access.needs_key
        ]
        if not sum(one.work.cancel() for one in running):
            raise errors.NotFoundError(f"no request {shown(request_id)} waits or runs")
        return Cancelled(request_id=request_id)


def told(specs: Sequence[ImageSpec], limits: Limits) -> dict[str, int | float | None]:
    """What a log line and a span say of a request; all of its images differ in the seed alone."""
    first = specs[0]
    return {
        "class_id": None if first.class_label == limits.null_label else first.class_label,
        "steps": first.steps,
        "evaluations": first.num_evaluations,
        "cfg": first.cfg,
        "n": len(specs),
    }


async def disconnected(http: Request) -> None:
    """Returns when the client is gone; the body has been read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def read_json(http: Request, max_bytes: int) -> bytes:
    """The body. Raises BodyTooLargeError before more than `max_bytes` are kept."""
    declared = http.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise errors.BodyTooLargeError(declared, max_bytes)
    body = bytearray()
    try:
        async for chunk in http.stream():
            body += chunk
            if len(body) > max_bytes:
                raise errors.BodyTooLargeError(f"more than {max_bytes}", max_bytes)
    except ClientDisconnect as error:
        raise errors.ClientGoneError from error
    media_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise errors.MediaTypeError(f"content-type is {shown(media_type)}; send application/json")
    return bytes(body)


async def encode_all(
    generated: Generated, descriptions: Sequence[Mapping[str, Any]], format: ImageFormat
) -> list[bytes]:
    pairs = zip(generated.images, descriptions, strict=True)
    try:
        return await asyncio.gather(
            *(asyncio.to_thread(encode, image, format, description) for image, description in pairs)
        )
    except Exception as error:
        log.exception("an encoding failed")
        message = f"the {format} could not be made ({type(error).__name__})"
        raise errors.GenerationError("encode", message) from error


def accepts_image(accept: str | None) -> bool:
    """False where JSON is named and no image is preferred, and where neither is acceptable."""
    if not accept:
        return True
    qualities = {}
    for item in accept.lower().split(","):
        name, *parameters = (part.strip() for part in item.split(";"))
        weights = [part[2:] for part in parameters if QUALITY.fullmatch(part)]
        qualities[name] = float(weights[0]) if weights else 1.0
    json = max(qualities.get(name, 0.0) for name in ("application/json", "application/*"))
    image = max((q for name, q in qualities.items() if name.startswith("image/")), default=0.0)
    return image >= json if image or json else qualities.get("*/*", 0.0) > 0

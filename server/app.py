"""The HTTP side: routes, and one request from its body to its answer."""

from __future__ import annotations

import asyncio
import os
import platform
import re
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Annotated, Any, get_args

from fastapi import FastAPI, Query, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, RedirectResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rae.models import labels
from rae.models.checkpoint_config import CheckpointConfig
from rae.server import errors
from rae.server.access import Access
from rae.server.accounting import AccountMiddleware
from rae.server.error_responses import add_error_handlers
from rae.server.generate import Generate
from rae.server.images import mime_type
from rae.server.limits import Limits
from rae.server.metrics import Metrics
from rae.server.open_inference import OpenInference
from rae.server.pool import Pool
from rae.server.schemas import (
    ClassItem,
    ErrorResponse,
    GenerateResponse,
    Health,
    Info,
    LimitsInfo,
    ModelInfo,
    WorkerInfo,
    request_body,
)
from rae.server.serve_settings import ServeSettings
from rae.server.settings import ImageFormat, server_version
from rae.server.tracing import Tracing

REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,64}")
EXPOSED_HEADERS = ("X-Seed", "X-Request-Id", "X-Evaluations", "Server-Timing", "Retry-After")
SUMMARY = (
    "Images of a class from a representation-autoencoder diffusion transformer. "
    "`steps` are grid points as published, so there are steps − 1 evaluations; the solver is euler."
)


def create_app(
    pool: Pool,
    config: CheckpointConfig,
    sha256: str,
    metrics: Metrics,
    settings: ServeSettings,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The app for the checkpoint that `pool` serves; its lifespan starts and closes the pool, and
    closes `tracing`."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await pool.start()
        yield
        await pool.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

    app = FastAPI(
        title="rae-server",
        version=server_version(),
        description=SUMMARY,
        lifespan=lifespan,
    )
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )
    app.add_middleware(AccountMiddleware, metrics=metrics, tracing=tracing)
    app.add_middleware(RequestIdMiddleware)
    add_error_handlers(app)
    add_routes(app, Service(pool, config, sha256, metrics, settings))
    return app


class RequestIdMiddleware:
    """Gives every response an X-Request-Id: the client's where it is sane."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        sent = Headers(scope=scope).get("x-request-id", "")
        request_id = sent if REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self.app(scope, receive, send_with_id)


def add_routes(app: FastAPI, service: Service) -> None:
    kinds: dict[int, list[str]] = {}
    for error in (
        errors.MalformedBodyError,
        errors.UnauthorizedError,
        errors.BodyTooLargeError,
        errors.MediaTypeError,
        errors.InvalidRequestError,
        errors.QueueFullError,
        errors.RateLimitedError,
        errors.GenerationError,
        errors.NotReadyError,
        errors.DeadlineError,
    ):
        kinds.setdefault(error.status, []).append(error.type.replace("_", " "))
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse, "description": " or ".join(these)}
        for status, these in kinds.items()
    }
    binary = {"schema": {"type": "string", "format": "binary"}}
    images = {mime_type(format): binary for format in get_args(ImageFormat)}
    images_or_json = {"model": GenerateResponse, "content": images}
    app.add_api_route(
        "/generate",
        service.generate.respond,
        methods=["POST"],
        summary="Generate images",
        description="One image comes back as an image; several, or where the client accepts "
        "application/json, come back as JSON with base64.",
        response_class=JSONResponse,
        responses={200: images_or_json, **refusals},
        dependencies=service.access.documented,
        openapi_extra={"requestBody": request_body(service.limits)},
    )
    app.add_api_route(
        "/requests/{request_id:path}",  # with slashes, as base64 has
        service.generate.cancel,
        methods=["DELETE"],
        dependencies=service.access.documented,
        responses={404: {"model": ErrorResponse}},
        summary="Cancel what waits or runs under an X-Request-Id",
    )
    app.add_api_route("/classes", service.classes, summary="The classes, or those that match")
    app.add_api_route("/limits", service.get_limits, summary="What is allowed")
    app.add_api_route("/info", service.get_info, summary="What runs here")
    app.add_api_route("/health/live", live, summary="Whether the process answers")
    app.add_api_route(
        "/health/ready",
        service.ready,
        responses={503: {"model": Health}},
        summary="Whether requests are served",
    )
    app.add_api_route("/metrics", service.scrape, response_class=Response, summary="Prometheus")
    service.open_inference.add_routes(app)
    app.add_api_route("/", to_docs, include_in_schema=False)


def live() -> Health:
    return Health(status="ok")


def to_docs(http: Request) -> RedirectResponse:
    return RedirectResponse(f"{http.scope.get('root_path', '')}/docs")


class Service:
    """What the routes share, and what they do."""

    def __init__(
        self,
        pool: Pool,
        config: CheckpointConfig,
        sha256: str,
        metrics: Metrics,
        settings: ServeSettings,
    ) -> None:
        self.pool, self.metrics = pool, metrics
        self.limits = Limits.of(
            config, max_steps=settings.max_steps, max_images=settings.max_images
        )
        self.access = Access.read(settings.api_keys_file, os.environ)
        self.generate = Generate(pool, config, sha256, metrics, self.limits, settings, self.access)
        self.limits_info = LimitsInfo.of(self.limits, settings, needs_api_key=self.access.needs_key)
        self.open_inference = OpenInference(config, sha256, lambda: pool.ready)
        self.info = Info(
            version=server_version(),
            torch=version("torch"),
            python=platform.python_version(),
            kernels=settings.kernels,
            attention=settings.attention,
            deterministic=settings.deterministic,
            max_batch=settings.max_batch,
            model=ModelInfo.of(config, sha256, {}, self.limits.methods),
            workers=[],
        )

    def classes(
        self,
        search: Annotated[str, Query(description="An id, a name or words; best match first.")] = "",
    ) -> list[ClassItem]:
        names = self.limits.classes
        return [ClassItem(class_id=i, name=names[i]) for i in labels.search(names, search)]

    def get_info(self) -> Info:
        facts = self.pool.facts
        self.info.model.parameters = dict(facts.num_parameters) if facts else {}
        self.info.workers = [WorkerInfo.of(worker) for worker in self.pool.workers]
        return self.info

    def get_limits(self) -> LimitsInfo:
        return self.limits_info

    def ready(self, response: Response) -> Health:
        if self.pool.ready:
            return Health(status="ok")
        response.status_code = 503
        return Health(status="not ready", reasons=self.pool.reasons)

    def scrape(self) -> Response:
        return Response(self.metrics.render(), headers={"content-type": self.metrics.content_type})

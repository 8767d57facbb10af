"""The Open Inference Protocol's health and metadata (KServe, Triton), version 2.

What watches a fleet by it can watch this server. There is no infer route: its tensors in JSON have
no place for a PNG; images come from POST /generate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Response

from rae.models.checkpoint_config import CheckpointConfig
from rae.server.errors import NotFoundError
from rae.server.limits import shown
from rae.server.schemas import (
    ErrorResponse,
    ModelMetadata,
    ModelReady,
    ServerLive,
    ServerMetadata,
    ServerReady,
    TensorMetadata,
)
from rae.server.settings import server_version

SHORT_SHA256 = 12
INPUTS = (
    ("class_id", "INT64", 1),
    ("cfg", "FP32", 1),
    ("steps", "INT64", 1),
    ("seed", "INT64", 1),
    ("n", "INT64", 1),
    ("guidance_method", "BYTES", 1),
    ("guidance_interval", "FP32", 2),
)


class OpenInference:
    """`ready` says whether requests are served now. The model's only version is the start of the
    checkpoint's sha256."""

    def __init__(self, config: CheckpointConfig, sha256: str, ready: Callable[[], bool]) -> None:
        self.ready = ready
        self.name, self.version = config.name, sha256[:SHORT_SHA256]
        size = config.decoder.image_size
        self.metadata = ModelMetadata(
            name=self.name,
            versions=[self.version],
            platform="pytorch_safetensors",
            inputs=[TensorMetadata(name=n, datatype=t, shape=[s]) for n, t, s in INPUTS],
            outputs=[TensorMetadata(name="image", datatype="UINT8", shape=[-1, size, size, 3])],
        )

    def add_routes(self, app: FastAPI) -> None:
        model, version = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"
        missing: dict[int | str, dict[str, Any]] = {404: {"model": ErrorResponse}}
        not_ready = missing | {503: {"model": ModelReady}}
        infer = "Inputs are fields of POST /generate; there is no infer route."

        def add(path: str, route: Callable[..., object], summary: str, **options: Any) -> None:  # noqa: ANN401
            app.add_api_route(path, route, summary=summary, tags=["Open Inference"], **options)

        add("/v2", self.server, "The server")
        add("/v2/health/live", self.live, "Whether the process answers")
        server_not_ready = {503: {"model": ServerReady}}
        add("/v2/health/ready", self.server_ready, "As /health/ready", responses=server_not_ready)
        add(model, self.model, "The model", responses=missing, description=infer)
        add(version, self.model_version, "The same", responses=missing, description=infer)
        add(f"{model}/ready", self.model_ready, "As /health/ready", responses=not_ready)
        add(f"{version}/ready", self.version_ready, "As /health/ready", responses=not_ready)

    def server(self) -> ServerMetadata:
        return ServerMetadata(name="rae-server", version=server_version(), extensions=[])

    def live(self) -> ServerLive:
        return ServerLive(live=True)

    def server_ready(self, response: Response) -> ServerReady:
        return ServerReady(ready=self._is_ready(response))

    def model(self, name: str) -> ModelMetadata:
        return self.model_version(name, self.version)

    def model_version(self, name: str, version: str) -> ModelMetadata:
        """Raises NotFoundError."""
        if name != self.name:
            raise NotFoundError(f"model is {shown(name)}; allowed: {self.name}")
        if version != self.version:
            raise NotFoundError(f"version is {shown(version)}; allowed: {self.version}")
        return self.metadata

    def model_ready(self, response: Response, name: str) -> ModelReady:
        return self.version_ready(response, name, self.version)

    def version_ready(self, response: Response, name: str, version: str) -> ModelReady:
        name = self.model_version(name, version).name
        return ModelReady(name=name, ready=self._is_ready(response))

    def _is_ready(self, response: Response) -> bool:
        is_ready = self.ready()
        response.status_code = 200 if is_ready else 503
        return is_ready

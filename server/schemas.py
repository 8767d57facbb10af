"""The wire: what a request may hold, what is refused and how it is said, what comes back."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal, Self, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from rae.models.checkpoint_config import CheckpointConfig
from rae.models.config import GuidanceMethod
from rae.models.labels import find_labels, has_name
from rae.server.errors import Detail, InvalidRequestError, MalformedBodyError
from rae.server.limits import NUMBERS, Limits, clean, shown
from rae.server.request import ImageSpec, Priority
from rae.server.serve_settings import ServeSettings
from rae.server.settings import ImageFormat
from rae.server.worker_state import WorkerState

ServedSolver = Literal["euler"]
RANDOM_SEEDS = 2**32  # short enough to type again
Integer = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class GenerateRequest(BaseModel):
    """Null and absent mean the same: the default."""

    model_config = ConfigDict(extra="forbid")

    class_id: Integer | None = Field(None, description="Class; null is unconditional.")
    class_name: str | None = Field(None, description="A name of a class, for class_id.")
    cfg: Number | None = Field(None, description="Guidance scale; 1 is off.")
    steps: Integer | None = Field(
        None, description="Grid points as published; there is one evaluation fewer."
    )
    n: Integer | None = Field(None, description="Images.")
    seed: Integer | None = Field(
        None, description="Image i has seed + i. Random and returned where it is null."
    )
    guidance_method: GuidanceMethod | None = Field(
        None, description="What guides: the null label, or the checkpoint's weaker model."
    )
    guidance_interval: tuple[Number, Number] | None = Field(
        None, description="Closed interval of shifted time in which guidance is on."
    )
    format: ImageFormat | None = Field(None, description="Of the image.")
    solver: ServedSolver | None = Field(None, description="The only one that is served.")
    priority: Priority | None = Field(
        None, description="High goes before all normal ones, low after them."
    )
    deadline_ms: Integer | None = Field(
        None, description="504 once so long has passed, or at once where it cannot be met."
    )

    @field_validator(*NUMBERS)
    @classmethod
    def _is_in_range(cls, value: float | None, info: ValidationInfo) -> float | None:
        limits = cast("Limits", info.context)
        low, high = limits.bounds(str(info.field_name), info.data.get("n") or 1)
        if value is not None and not low <= value <= high:
            raise ValueError
        return value

    @field_validator("guidance_interval")
    @classmethod
    def _is_interval(
        cls, value: tuple[float, float] | None, info: ValidationInfo
    ) -> tuple[float, float] | None:
        low, high = cast("Limits", info.context).bounds("guidance_interval")
        if value is not None and not low <= value[0] <= value[1] <= high:
            raise ValueError
        return value

    @property
    def image_format(self) -> ImageFormat:
        return self.format or "png"

    def specs(self, limits: Limits) -> list[ImageSpec]:
        """The images asked for, all defaults filled in. Needs a request of `read_request`."""
        defaults, n = limits.defaults, self.n or 1
        label = limits.null_label if self.class_id is None else self.class_id
        first_seed = secrets.randbelow(RANDOM_SEEDS) if self.seed is None else self.seed
        return [
            ImageSpec(
                class_label=label,
                seed=first_seed + i,
                steps=self.steps or defaults.steps,
                cfg=self.cfg or defaults.cfg,
                guidance_method=self.guidance_method or defaults.guidance_method,
                guidance_interval=self.guidance_interval or defaults.guidance_interval,
            )
            for i in range(n)
        ]


def parse_request(body: bytes, limits: Limits) -> GenerateRequest:
    """Raises MalformedBodyError or InvalidRequestError."""
    try:
        values = json.loads(body)
    except RecursionError as error:
        raise MalformedBodyError("the body is nested too deeply; send one flat object") from error
    except ValueError as error:
        # What Python says of 5,000 digits goes on with advice for its programmers.
        reason = clean(str(error).partition(";")[0]) if body else "it is empty"
        raise MalformedBodyError(f"the body is not JSON: {reason}") from error
    if not isinstance(values, dict):
        raise MalformedBodyError(f"the body is {shown(values)}; send a JSON object")
    return read_request(values, limits)


def read_request(values: Mapping[str, Any], limits: Limits) -> GenerateRequest:
    """A request whose class, if named, has its id; all else as it came.

    Raises InvalidRequestError that names every field that is out of range.
    """
    try:
        request = GenerateRequest.model_validate(values, context=limits)
    except ValidationError as error:
        # A field name that is not Unicode has no location.
        names = dict.fromkeys(str(e["loc"][0]) if e["loc"] else None for e in error.errors())
        raise InvalidRequestError([_refused(name, values, limits) for name in names]) from None
    name = request.class_name
    named = [] if name is None else find_labels(limits.classes, name)
    problems = list(_problems(request, named, limits))
    if problems:
        raise InvalidRequestError(problems)
    is_chosen = request.class_id is not None or name is None
    return request if is_chosen else request.model_copy(update={"class_id": named[0]})


def _refused(name: str | None, values: Mapping[str, Any], limits: Limits) -> Detail:
    n = values.get("n")
    n = n if type(n) is int and 1 <= n <= limits.max_images else 1
    if name is None:
        name = next(key for key in values if clean(key) != key)
    if name not in GenerateRequest.model_fields:
        fields = ", ".join(GenerateRequest.model_fields)
        return Detail(clean(name), shown(values[name]), f"no field of this name, only {fields}")
    return Detail(name, shown(values[name]), limits.allowed(name, n))


def _problems(request: GenerateRequest, named: list[int], limits: Limits) -> Iterator[Detail]:
    """What no field says alone; `named` are the classes of the request's class_name."""
    name, label = request.class_name, request.class_id
    if name is not None and not named:
        yield Detail("class_name", shown(name), limits.classes_like(name))
    elif name is not None and label is not None and not has_name(limits.classes[label], name):
        these = " or ".join(map(str, named))
        yield Detail("class_id", f"{label} beside class_name {shown(name)}", f"{these}, or none")
    elif name is not None and label is None and len(named) > 1:
        these = " and ".join(map(str, named))
        yield Detail("class_name", shown(name), f"give class_id: {these} have this name")
    if name is None and label is None and not limits.has_null_label:
        yield Detail("class_id", "null", limits.allowed("class_id"))
    method = request.guidance_method or limits.defaults.guidance_method
    guided = (request.cfg or limits.defaults.cfg) > 1
    if method not in limits.methods and (guided or request.guidance_method):
        yield Detail("guidance_method", shown(method), limits.allowed("guidance_method"))


def request_body(limits: Limits) -> dict[str, Any]:
    """The body for OpenAPI, with this server's ranges and examples that work."""
    schema = GenerateRequest.model_json_schema()
    for name, field in schema["properties"].items():
        field["description"] += f" Allowed: {limits.allowed(name)}."
        if name in NUMBERS:
            low, high = limits.bounds(name)
            field["anyOf"][0] |= {"minimum": low, "maximum": high}
    label, steps = min(7, len(limits.classes) - 1), min(50, limits.max_steps)
    examples: dict[str, dict[str, Any]] = {
        "one image": {"class_id": label, "steps": steps},
        "the same image each time": {"class_name": limits.classes[label], "seed": 7},
        "several, as JSON": {"class_id": label, "n": min(4, limits.max_images), "format": "webp"},
    }
    if limits.has_null_label:
        examples["guided in an interval"] = {
            "class_id": label,
            "cfg": 1.5,
            "guidance_method": "cfg",
            "guidance_interval": [0.1, 0.9],
        }
        examples["unconditional"] = {"class_id": None, "cfg": 1.0}
    if "autoguidance" in limits.methods:
        examples["guided by the weaker model"] = {
            "class_id": label,
            "cfg": 1.5,
            "guidance_method": "autoguidance",
        }
    content = {"schema": schema, "examples": {k: {"value": v} for k, v in examples.items()}}
    return {"required": True, "content": {"application/json": content}}


class GeneratedImage(BaseModel):
    seed: int
    class_id: int | None
    class_name: str | None
    mime_type: str
    data: str = Field(description="The image file in base64.")


class GenerateResponse(BaseModel):
    """Every image can be made again alone, from its own seed."""

    request_id: str
    images: list[GeneratedImage]
    steps: int
    evaluations: int = Field(description="Of the model, for each image: steps − 1.")
    cfg: float
    guidance_method: str
    guidance_interval: tuple[float, float]
    checkpoint_sha256: str
    timings_ms: dict[str, float]


class ErrorDetail(BaseModel):
    field: str
    value: str
    allowed: str


class ErrorBody(BaseModel):
    type: str
    message: str
    details: list[ErrorDetail]


class ErrorResponse(BaseModel):
    error: ErrorBody
    request_id: str


class ClassItem(BaseModel):
    class_id: int
    name: str = Field(description="Its names, separated by commas; class_name takes any.")


class Cancelled(BaseModel):
    request_id: str


class Health(BaseModel):
    status: Literal["ok", "not ready"]
    reasons: list[str] = []


class ModelInfo(BaseModel):
    """What a checkpoint folder holds."""

    name: str
    sha256: str = Field(description="Of config.json, which holds the other files' own.")
    source: str
    license: str
    num_classes: int
    image_size: int
    latent_shape: tuple[int, int, int]
    shift: float
    parameters: dict[str, int]
    configurations: dict[str, dict[str, Any]]
    defaults: dict[str, Any]
    guidance_methods: list[str]

    @classmethod
    def of(
        cls,
        config: CheckpointConfig,
        sha256: str,
        parameters: Mapping[str, int],
        methods: Sequence[str],
    ) -> Self:
        parts = {"dit_dh": config.dit_dh, "decoder": config.decoder, "guide": config.guide}
        return cls(
            name=config.name,
            sha256=sha256,
            source=config.source,
            license=config.license,
            num_classes=len(config.classes),
            image_size=config.decoder.image_size,
            latent_shape=config.dit_dh.latent_shape,
            shift=config.shift,
            parameters=dict(parameters),
            configurations={name: asdict(part) for name, part in parts.items() if part},
            defaults=asdict(config.defaults),
            guidance_methods=list(methods),
        )


class Range(BaseModel):
    """Closed."""

    minimum: int | float
    maximum: int | float


class RateLimit(BaseModel):
    """Of each client; what it has not used for a while it may use at once."""

    evaluations_per_s: float
    burst_evaluations: float


class LimitsInfo(BaseModel):
    """What one request may hold, and what the server takes in."""

    ranges: dict[str, Range] = Field(
        description="Of the numbers of POST /generate; seed + n − 1 has to be in seed's too."
    )
    choices: dict[str, list[str]] = Field(description="Of its other fields but class_name.")
    unconditional: bool = Field(description="Whether a request may leave the class away.")
    max_body_bytes: int
    max_queue_evaluations: float = Field(
        description="Of the model, waiting or running in a worker; beyond, 429 queue_full."
    )
    rate_limit: RateLimit | None = Field(description="Beyond, 429 rate_limited.")
    needs_api_key: bool

    @classmethod
    def of(cls, limits: Limits, settings: ServeSettings, *, needs_api_key: bool) -> Self:
        ranges = {name: limits.bounds(name) for name in (*NUMBERS, "guidance_interval")}
        rate, burst_s = settings.rate_limit, settings.rate_burst
        return cls(
            ranges={name: Range(minimum=low, maximum=high) for name, (low, high) in ranges.items()},
            choices={
                "guidance_method": list(limits.methods),
                "format": list(get_args(ImageFormat)),
                "solver": list(get_args(ServedSolver)),
                "priority": list(get_args(Priority)),
            },
            unconditional=limits.has_null_label,
            max_body_bytes=settings.max_body_bytes,
            max_queue_evaluations=settings.max_queue,
            rate_limit=RateLimit(evaluations_per_s=rate, burst_evaluations=rate * burst_s)
            if rate is not None
            else None,
            needs_api_key=needs_api_key,
        )


class ServerLive(BaseModel):
    live: bool


class ServerReady(BaseModel):
    ready: bool


class ServerMetadata(BaseModel):
    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    name: str
    datatype: str
    shape: list[int] = Field(description="−1 is any.")


class ModelMetadata(BaseModel):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ModelReady(BaseModel):
    name: str
    ready: bool


class WorkerInfo(BaseModel):
    """A process with a device. What is null is not known before it was ready."""

    state: str
    reason: str = Field(description="Why it is not ready.")
    restarts: int
    start_s: float | None = Field(description="How long its last start took.")
    device: str | None
    precision: str | None
    slots: int | None
    max_rows: int = Field(description="Of a step; fewer than --max-batch where memory is short.")
    compiled: bool | None = Field(description="Whether torch.compile made the layers.")
    layers: str | None = Field(
        description="fused: on the kernels; packed: oneDNN's on a CPU; plain."
    )
    implementations: dict[str, list[str]] = Field(
        description="What ran so far, by op and shape: triton, library, cudnn, flash, ..."
    )

    @classmethod
    def of(cls, worker: WorkerState) -> Self:
        facts = worker.facts
        return cls(
            state=worker.state,
            reason=worker.reason,
            restarts=worker.restarts,
            start_s=worker.start_s,
            device=facts and facts.device,
            precision=facts and facts.precision,
            slots=facts and facts.num_slots,
            max_rows=worker.beat.load.max_rows,
            compiled=facts and facts.compiles,
            layers=facts and facts.layers,
            implementations={k: list(v) for k, v in facts.implementations.items()} if facts else {},
        )


class Info(BaseModel):
    version: str
    torch: str
    python: str
    kernels: str
    attention: str
    deterministic: bool
    solver: ServedSolver = "euler"
    sampler: str = "steps are grid points as published: steps − 1 evaluations of the model"
    max_batch: int = Field(description="Rows of the model in one step, at most.")
    model: ModelInfo
    workers: list[WorkerInfo]

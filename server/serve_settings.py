"""The settings of `rae serve`, of which each is a flag and an environment variable too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from rae.server.settings import EngineSettings

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]

WORKERS, HTTP, LIMITS = "Workers", "HTTP", "Limits of one request"
ACCESS, TELEMETRY = "Who may ask, and how much", "Logs and traces"
CONNECTIONS = "Limits of a connection"


@dataclass(frozen=True, kw_only=True)
class ServeSettings(EngineSettings):
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes with a device each; each has its own --max-queue.",
            envvar="RAE_WORKERS",
            min=1,
            show_default="one for each GPU, one on a CPU",
            rich_help_panel=WORKERS,
        ),
    ] = None
    hang_timeout: Annotated[
        float,
        typer.Option(
            help="Seconds after which a worker that says nothing, or whose step takes so long (and "
            "10 times what such steps take), is replaced.",
            envvar="RAE_HANG_TIMEOUT",
            min=1,
            rich_help_panel=WORKERS,
        ),
    ] = 30
    grace: Annotated[
        float,
        typer.Option(
            help="Seconds that what runs may take when the server is told to stop.",
            envvar="RAE_GRACE",
            min=0,
            rich_help_panel=WORKERS,
        ),
    ] = 30
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on; 0.0.0.0 lets other machines in.",
            envvar="RAE_HOST",
            rich_help_panel=HTTP,
        ),
    ] = "127.0.0.1"
    port: Annotated[
        int,
        typer.Option(
            help="Port to listen on; 0 takes a free one.",
            envvar="RAE_PORT",
            min=0,
            max=65535,
            rich_help_panel=HTTP,
        ),
    ] = 8000
    root_path: Annotated[
        str,
        typer.Option(
            help="Prefix that a proxy puts before the paths and takes off, as /rae.",
            envvar="RAE_ROOT_PATH",
            rich_help_panel=HTTP,
        ),
    ] = ""
    cors_origins: Annotated[
        str,
        typer.Option(
            help="Origins whose pages may call, separated by commas; * for all.",
            envvar="RAE_CORS_ORIGINS",
            rich_help_panel=HTTP,
        ),
    ] = ""
    log_level: Annotated[
        LogLevel,
        typer.Option(
            help="Requests are logged at info, those for health and metrics at debug.",
            envvar="RAE_LOG_LEVEL",
            rich_help_panel=TELEMETRY,
        ),
    ] = "info"
    log_format: Annotated[
        LogFormat,
        typer.Option(
            help="Of stderr; json is one object a line, and stdout stays empty.",
            envvar="RAE_LOG_FORMAT",
            rich_help_panel=TELEMETRY,
        ),
    ] = "text"
    otel: Annotated[
        bool,
        typer.Option(
            "--otel",
            help="Send OpenTelemetry traces of requests, also where OTEL_EXPORTER_OTLP_ENDPOINT is "
            "set. The OTEL_ variables say where and how.",
            envvar="RAE_OTEL",
            rich_help_panel=TELEMETRY,
        ),
    ] = False
    max_steps: Annotated[
        int,
        typer.Option(help="Largest steps.", envvar="RAE_MAX_STEPS", min=2, rich_help_panel=LIMITS),
    ] = 1000
    max_images: Annotated[
        int,
        typer.Option(help="Largest n.", envvar="RAE_MAX_IMAGES", min=1, rich_help_panel=LIMITS),
    ] = 64
    max_body_bytes: Annotated[
        int,
        typer.Option(
            help="Largest body, in bytes.",
            envvar="RAE_MAX_BODY_BYTES",
            min=2,
            rich_help_panel=LIMITS,
        ),
    ] = 65_536
    max_connections: Annotated[
        int,
        typer.Option(
            help="Connections that may be open; beyond, they get 429.",
            envvar="RAE_MAX_CONNECTIONS",
            min=1,
            rich_help_panel=CONNECTIONS,
        ),
    ] = 1024
    header_timeout: Annotated[
        float,
        typer.Option(
            help="Seconds for the headers of a request; then 408.",
            envvar="RAE_HEADER_TIMEOUT",
            min=0.1,
            rich_help_panel=CONNECTIONS,
        ),
    ] = 10.0
    body_timeout: Annotated[
        float,
        typer.Option(
            help="Seconds for the body of a request; then 408.",
            envvar="RAE_BODY_TIMEOUT",
            min=0.1,
            rich_help_panel=CONNECTIONS,
        ),
    ] = 30.0
    write_timeout: Annotated[
        float,
        typer.Option(
            help="Seconds in which a client has to read 64 KiB of its response, or the rest.",
            envvar="RAE_WRITE_TIMEOUT",
            min=0.1,
            rich_help_panel=CONNECTIONS,
        ),
    ] = 30.0
    keep_alive: Annotated[
        float,
        typer.Option(
            help="Seconds between requests; above those of a load balancer in front.",
            envvar="RAE_KEEP_ALIVE",
            min=0.1,
            rich_help_panel=CONNECTIONS,
        ),
    ] = 75.0

    api_keys_file: Annotated[
        Path | None,
        typer.Option(
            # Not name:key:weight, of which rich would make an emoji.
            help="Lines name:key; :2 after it doubles a client's share. Who asks for images then "
            "needs a key. RAE_API_KEYS holds such lines too, separated by commas.",
            envvar="RAE_API_KEYS_FILE",
            show_default="everybody may ask",
            rich_help_panel=ACCESS,
        ),
    ] = None
    trusted_proxies: Annotated[
        str,
        typer.Option(
            help="Addresses or networks whose X-Forwarded-For is believed, separated by commas; "
            "* for all.",
            envvar="RAE_TRUSTED_PROXIES",
            rich_help_panel=ACCESS,
        ),
    ] = "127.0.0.1,::1"
    rate_limit: Annotated[
        float | None,
        typer.Option(
            help="Model evaluations a second for each client (key or address); beyond, 429.",
            envvar="RAE_RATE_LIMIT",
            min=0.001,
            show_default="none",
            rich_help_panel=ACCESS,
        ),
    ] = None
    rate_burst: Annotated[
        float,
        typer.Option(
            help="Seconds' worth of --rate-limit that a client may use at once after a pause.",
            envvar="RAE_RATE_BURST",
            min=1,
            rich_help_panel=ACCESS,
        ),
    ] = 60.0

    @property
    def allowed_origins(self) -> list[str]:
        return [origin.strip() for origin in self.cors_origins.split(",") if origin.strip()]

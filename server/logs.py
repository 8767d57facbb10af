"""What the processes log, as lines of text or of JSON on stderr.

A line that cannot be written, as on a full disk, is dropped: it never harms who logs it.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable
from contextvars import ContextVar
from datetime import UTC, datetime

from rae.server.serve_settings import LogFormat, LogLevel
from rae.server.terminal import say

log = logging.getLogger(__name__)

STDERR = 2
# Would break a line, or do something to a terminal.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Of the request that this task serves."""


def configure(level: LogLevel, format: LogFormat, worker: int | None = None) -> None:
    """Send all log records and warnings of this process to stderr.

    `worker` is the index of a worker process. A record's `extra={"fields": {...}}` are added to
    the line, by name; so is the id of the request, `extra={"request_id": ...}` outside its task.
    """
    handler = StderrHandler()
    handler.setFormatter(JSONFormatter(worker) if format == "json" else TextFormatter(worker))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)


def announcer(format: LogFormat) -> Callable[[str], None]:
    """What tells people how a start goes: on stdout, or in the log where programs read that."""
    return log.info if format == "json" else say


class StderrHandler(logging.Handler):
    """One write a line, past Python's buffer: lines of several processes do not mix, and what
    could not be written is not kept, to fail again when the process exits (with code 120)."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:  # arguments that do not fit the message
            line = f"{record.levelname} {record.name}: cannot be formatted: {record.msg!r}"
        try:
            os.write(STDERR, f"{line}\n".encode(errors="backslashreplace"))
        except OSError:
            pass


class LineFormatter(logging.Formatter):
    def __init__(self, worker: int | None) -> None:
        super().__init__()
        self.worker = worker

    def fields(self, record: logging.LogRecord) -> dict[str, object]:
        """What a record has besides its message; absent or None where it does not."""
        return {
            "worker": self.worker,
            "request_id": getattr(record, "request_id", None) or request_id.get(),
            **getattr(record, "fields", {}),
        }


class TextFormatter(LineFormatter):
    """`2025-01-31T12:00:00.000Z INFO rae.server.serve: message name=value`, and a trace."""

    def format(self, record: logging.LogRecord) -> str:
        words = [record.getMessage().strip()]
        words += [f"{k}={v}" for k, v in self.fields(record).items() if v is not None]
        text = CONTROL.sub(lambda found: repr(found[0])[1:-1], " ".join(words))
        lines = [f"{utc(record.created)} {record.levelname} {record.name}: {text}"]
        if record.exc_info and record.exc_info[0]:
            lines.append(self.formatException(record.exc_info))
        return "\n".join(lines)


class JSONFormatter(LineFormatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        found = {
            "time": utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage().strip(),
            **self.fields(record),
        }
        if record.exc_info and record.exc_info[0]:
            found["exception"] = record.exc_info[0].__name__
            found["trace"] = self.formatException(record.exc_info)
        return json.dumps({k: v for k, v in found.items() if v is not None}, default=str)


def utc(seconds: float) -> str:
    """ISO 8601 with milliseconds."""
    time = datetime.fromtimestamp(seconds, UTC)
    return f"{time:%Y-%m-%dT%H:%M:%S}.{time.microsecond // 1000:03}Z"

"""What the HTTP process and its worker processes say to one another, over a pair of sockets.

A frame is a length of 4 bytes and a pickle: both ends are this program.
"""

from __future__ import annotations

import asyncio
import pickle
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rae.server.errors import ApiError
from rae.server.request import Generated, ImageSpec, Priority
from rae.server.serve_settings import LogFormat, LogLevel
from rae.server.settings import EngineSettings

LENGTH = struct.Struct("!I")


@dataclass(frozen=True, kw_only=True)
class Start:
    """The first message to a worker, the `index`th of `num_workers`: None for one a device."""

    folder: Path
    settings: EngineSettings
    index: int
    num_workers: int | None
    log_level: LogLevel
    log_format: LogFormat


@dataclass(frozen=True, kw_only=True)
class Submit:
    """`deadline_s` counts from now; the bound on what is queued holds only where `bounded`."""

    ticket: int
    request_id: str
    specs: Sequence[ImageSpec]
    client: str
    weight: float
    priority: Priority
    deadline_s: float
    bounded: bool


@dataclass(frozen=True)
class Cancel:
    ticket: int


@dataclass(frozen=True)
class Stop:
    """Close the engine; what is left fails."""


@dataclass(frozen=True)
class Hello:
    """How many devices of its kind the worker sees, before it loads the model."""

    num_devices: int


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What runs in a worker; the first one says that it is ready."""

    device: str
    precision: str
    layers: str
    """How the models' layers run: "fused" on the kernels, "packed" for a CPU, or "plain"."""
    compiles: bool
    num_slots: int
    num_parameters: Mapping[str, int]
    implementations: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Failed:
    """The worker is about to end. `reason` is for everybody, `detail` for whoever started the
    server. Trying again is no use where the failure `is_permanent`."""

    reason: str
    detail: str
    is_permanent: bool


@dataclass(frozen=True)
class Accepted:
    """`cost` is in evaluations of the model for one row."""

    ticket: int
    cost: float


@dataclass(frozen=True)
class Started:
    """The request is about to be in its first step."""

    ticket: int


@dataclass(frozen=True)
class Done:
    ticket: int
    generated: Generated


@dataclass(frozen=True)
class Refused:
    """By an error at the door, or later; whoever was cancelled hears nothing."""

    ticket: int
    error: ApiError


class Load(NamedTuple):
    """What an engine has to do, at one moment.

    Images that wait, and that run; rows of the model to evaluate for all of them; how many rows a
    step may have: what was asked for, or less where that did not fit into the memory; seconds until
    all is done; rows a second in full steps.
    """

    waiting: int = 0
    running: int = 0
    queued_cost: float = 0.0
    max_rows: int = 0
    drain_s: float = 0.0
    rows_per_s: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Beat:
    """How a worker is, some times a second.

    `busy_s` since the step in progress began, which should take `expected_s`. `observations` are
    calls of an Observer; `load` is none older than they are.
    """

    progress: str = ""
    load: Load = Load()
    busy_s: float = 0.0
    expected_s: float = 0.0
    use: tuple[int, int, float | None] | None = None
    """Of the device: bytes used, bytes there are, watts."""
    observations: Sequence[tuple[str, tuple[float, ...]]] = ()


ToWorker = Start | Submit | Cancel | Stop
FromWorker = Hello | Facts | Failed | Accepted | Started | Done | Refused | Beat


def frame(message: ToWorker | FromWorker) -> bytes:
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return LENGTH.pack(len(data)) + data


async def read(reader: asyncio.StreamReader) -> FromWorker:
    """Raises IncompleteReadError or OSError where the other end is gone."""
    (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
    message = pickle.loads(await reader.readexactly(length))
    if not isinstance(message, FromWorker):
        raise TypeError(f"a worker sends no {type(message).__name__}")
    return message


def receive(connection: socket.socket) -> ToWorker:
    """Raises EOFError where the other end is gone."""
    (length,) = LENGTH.unpack(_receive_exactly(connection, LENGTH.size))
    return pickle.loads(_receive_exactly(connection, length))


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)

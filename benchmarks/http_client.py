"""A small HTTP/1.1 client for the scripts that load a server: its own cost has to be small."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TIMEOUT_S = 60.0
MAX_HEAD_BYTES = 2**16


class NoAnswerError(Exception):
    """The connection could not be made, or ended before the whole answer was there."""


@dataclass(frozen=True)
class Answer:
    """Header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def is_clear_error(self) -> bool:
        """Whether it says what is wrong as all of the server's errors do."""
        try:
            error = json.loads(self.body)["error"]
            return self.status >= 400 and bool(error["type"] and error["message"])
        except (ValueError, KeyError, TypeError):
            return False


def message(
    method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> bytes:
    """A request, to the byte."""
    lines = {"host": "rae"} | ({"content-length": str(len(body))} if body else {})
    head = "".join(f"{name}: {value}\r\n" for name, value in (lines | dict(headers or {})).items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def generate_message(fields: Mapping[str, Any], accept: str = "*/*") -> bytes:
    """POST /generate."""
    headers = {"content-type": "application/json", "accept": accept}
    return message("POST", "/generate", json.dumps(fields).encode(), headers)


class Connection:
    """One connection; one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.has_begun = False  # whether something of the last request's answer came

    @classmethod
    async def open(
        cls, host: str, port: int, *, source: str = "", receive_buffer: int | None = None
    ) -> Connection:
        """From an address of this machine, `source`. Raises NoAnswerError."""
        connecting = socket.socket()
        connecting.setblocking(False)
        if receive_buffer is not None:
            connecting.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            connecting.bind((source, 0))
            await asyncio.get_running_loop().sock_connect(connecting, (host, port))
            return cls(*await asyncio.open_connection(sock=connecting, limit=MAX_HEAD_BYTES))
        except BaseException as error:
            connecting.close()
            if isinstance(error, OSError):
                raise NoAnswerError(f"no connection: {error}") from error
            raise

    @property
    def is_open(self) -> bool:
        """False once the server has closed it."""
        return not (self.reader.at_eof() or self.writer.is_closing())

    def send(self, data: bytes) -> None:
        self.has_begun = False
        self.writer.write(data)

    async def receive(self) -> Answer:
        """The answer to what was sent. Raises NoAnswerError."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
            self.has_begun = True
            first, *lines = head.decode("latin-1").split("\r\n")[:-2]
            pairs = (line.partition(":") for line in lines)
            headers = {name.lower(): value.strip() for name, _, value in pairs}
            body = await self.reader.readexactly(int(headers["content-length"]))
        except (OSError, EOFError, KeyError, asyncio.LimitOverrunError) as error:
            if isinstance(error, asyncio.IncompleteReadError) and error.partial:
                self.has_begun = True
            raise NoAnswerError(f"no whole answer: {error!r}") from error
        if headers.get("connection") == "close":
            self.leave()
        return Answer(int(first.split()[1]), headers, body)

    def leave(self, *, reset: bool = False) -> None:
        """End it with a FIN, or with a RST."""
        if reset and not self.writer.is_closing():
            linger = struct.pack("ii", 1, 0)
            sock: socket.socket = self.writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()


class Client:
    """Requests to one server over connections that are kept alive, as many as there have to be."""

    def __init__(self, host: str, port: int, source: str = "") -> None:
        self.host, self.port, self.source = host, port, source
        self._idle: list[Connection] = []

    async def request(self, data: bytes, timeout_s: float = TIMEOUT_S) -> tuple[Answer, float]:
        """The answer to a request (`message`), and when that was written, on `perf_counter`'s
        clock. Raises NoAnswerError, or TimeoutError after `timeout_s`."""
        async with asyncio.timeout(timeout_s):
            while True:
                connection = self._take()
                is_new = connection is None
                if connection is None:
                    connection = await Connection.open(self.host, self.port, source=self.source)
                try:
                    connection.send(data)
                    sent = time.perf_counter()
                    answer = await connection.receive()
                except NoAnswerError:
                    connection.leave()
                    # A server may close an idle connection while a request is on its way to it.
                    if is_new or connection.has_begun:
                        raise
                    continue
                except BaseException:
                    connection.leave()
                    raise
                if connection.is_open:
                    self._idle.append(connection)
                return answer, sent

    def _take(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
            connection.leave()
        return None

    async def close(self) -> None:
        for connection in self._idle:
            connection.leave()
        self._idle.clear()
        await asyncio.sleep(0)  # transports close in the loop's next turn

"""What uvicorn writes to: a connection that waits for its client to read and send, in time."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any

log = logging.getLogger(__name__)

# Of a response in each --write-timeout, or its rest: less would hold it for hours.
MIN_READ_BYTES = 65_536
# The kernel would take megabytes of what nobody reads, and say so only a megabyte later.
MAX_UNSENT_BYTES = 131_072


class Transport(asyncio.Transport):
    """A transport that aborts where the client does not read, and that stays open for a client
    that still sends, after a FIN of our own, so that it reads what it was answered."""

    def __init__(
        self,
        inner: asyncio.Transport,
        loop: asyncio.AbstractEventLoop,
        write_s: float,
        is_sending: Callable[[], bool],
    ) -> None:
        super().__init__()
        self.inner, self.loop, self.write_s, self.is_sending = inner, loop, write_s, is_sending
        self.lingers = False
        self.written = 0
        self.timer: asyncio.TimerHandle | None = None
        with suppress(AttributeError, OSError):  # not everywhere, nor once the client is gone
            option = socket.TCP_NOTSENT_LOWAT
            inner.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, option, MAX_UNSENT_BYTES)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.lingers:
            return
        self.inner.write(data)
        self.written += len(data)
        if self.timer is None:
            self._expect()

    def close(self) -> None:
        """Once the client has sent what it sends, if it is in the middle of a body."""
        if self.is_sending():
            self.linger()
        else:
            self.inner.close()

    def linger(self) -> None:
        """Send no more and read on; who calls it aborts later."""
        if self.is_closing():
            return
        self.lingers = True
        self.inner.resume_reading()
        try:
            self.inner.write_eof()
        except OSError:  # reset by the client
            self.inner.abort()

    def stop(self) -> None:
        """The connection is lost."""
        if self.timer is not None:
            self.timer.cancel()

    def _expect(self) -> None:
        """That within the next `write_s` some of what waits is read."""
        size = self.inner.get_write_buffer_size()
        wanted = self.written - size + min(size, MIN_READ_BYTES)
        self.timer = self.loop.call_later(self.write_s, self._check, wanted) if size else None

    def _check(self, wanted: int) -> None:
        if self.written - self.inner.get_write_buffer_size() < wanted:
            log.debug("%s: a response was not read", self.get_extra_info("peername"))
            with suppress(OSError):  # without, the kernel would keep what it has of the response
                reset = struct.pack("ii", 1, 0)
                self.inner.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, reset
                )
            self.inner.abort()
        else:
            self._expect()

    def is_closing(self) -> bool:
        return self.lingers or self.inner.is_closing()

    def abort(self) -> None:
        self.inner.abort()

    def get_extra_info(self, name: str, default: object = None) -> Any:  # noqa: ANN401
        return self.inner.get_extra_info(name, default)

    def pause_reading(self) -> None:
        self.inner.pause_reading()

    def resume_reading(self) -> None:
        self.inner.resume_reading()

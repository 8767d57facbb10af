"""A real worker process in which the image of one seed brings a fault: run by test_faults.py."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Sequence

import torch

from rae.server.request import ImageSpec
from rae.server.runner import Runner
from rae.server.worker import Worker, main

FAULTY = 666
AT_STEP = 3


def broken() -> None:
    raise RuntimeError("a fault, with /a/path in it")


def out_of_memory() -> None:
    global FAULTY
    FAULTY = -1  # there is room for smaller steps
    raise torch.OutOfMemoryError("CUDA out of memory")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    time.sleep(3600)


def send_garbage() -> None:
    connections[0].sendall(b"\0\0\0\5hello")
    hang()


def hang_up() -> None:
    connections[0].shutdown(socket.SHUT_RDWR)
    hang()


connections: list[socket.socket] = []
faults = {
    "die": die,
    "hang": hang,
    "garbage": send_garbage,
    "hang up": hang_up,
    "raise": broken,
    "out of memory": out_of_memory,
}


def install(stage: str, fault: str) -> None:
    start, step, decode, init = Runner.start, Runner.step, Runner.decode, Worker.__init__

    def watched_init(self: Worker, connection: socket.socket) -> None:
        connections.append(connection)
        init(self, connection)

    def seeds(self: Runner, slots: Sequence[int]) -> list[int]:
        return [self._images[slot][0].seed for slot in slots]

    def faulty_start(self: Runner, slot: int, spec: ImageSpec) -> None:
        if stage == "admit" and spec.seed == FAULTY:
            faults[fault]()
        start(self, slot, spec)
        if stage == "latents" and spec.seed == FAULTY:
            self.latents[slot].fill_(float("nan"))

    def faulty_step(self: Runner, rows: Sequence[tuple[int, int]]) -> None:
        at = [slot for slot, number in rows if number == AT_STEP]
        if stage == "step" and FAULTY in seeds(self, at):
            faults[fault]()
        step(self, rows)

    def faulty_decode(self: Runner, slots: Sequence[int], *, truncate: bool = False) -> object:
        if stage == "decode" and FAULTY in seeds(self, slots):
            faults[fault]()
        return decode(self, slots, truncate=truncate)

    Worker.__init__ = watched_init
    Runner.start, Runner.step = faulty_start, faulty_step
    Runner.decode = faulty_decode  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    stage, fault, descriptor = sys.argv[1:]
    install(stage, fault)
    sys.argv[1:] = [descriptor]
    main()

"""A real worker process in which the images of some seeds bring faults.

Arguments are pairs of a stage and a fault, then what a worker gets. The images of the i-th pair
have seed FAULTY + i.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence

import torch

from rae.server.memory import memory_errors
from rae.server.request import ImageSpec
from rae.server.runner import Runner
from rae.server.worker import Worker, main

FAULTY = 666
AT_STEP = 3

faults: dict[tuple[str, int], Callable[[], None]] = {}
connections: list[socket.socket] = []


def fail() -> None:
    raise RuntimeError("a fault, with /a/path in it")


def run_out_of_memory() -> None:
    faults.clear()  # there is room for smaller steps
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


FAULTS = {
    "raise": fail,
    "out of memory": run_out_of_memory,
    "die": die,
    "hang": hang,
    "garbage": send_garbage,
    "hang up": hang_up,
    "slow": lambda: time.sleep(0.5),
    "nan": lambda: None,
}


def bring(stage: str, seeds: Sequence[int]) -> None:
    for seed in seeds:
        faults.get((stage, seed), lambda: None)()


def install() -> None:
    start, step, decode, init = Runner.start, Runner.step, Runner.decode, Worker.__init__

    def watched_init(self: Worker, connection: socket.socket) -> None:
        connections.append(connection)
        init(self, connection)

    def seeds(self: Runner, slots: Sequence[int]) -> list[int]:
        return [self._images[slot][0].seed for slot in slots]

    @memory_errors()
    def faulty_start(self: Runner, slot: int, spec: ImageSpec) -> None:
        bring("admit", [spec.seed])
        start(self, slot, spec)
        if ("latents", spec.seed) in faults:
            self.latents[slot].fill_(float("nan"))

    @memory_errors()
    def faulty_step(self: Runner, rows: Sequence[tuple[int, int]]) -> None:
        bring("step", seeds(self, [slot for slot, number in rows if number == AT_STEP]))
        step(self, rows)

    @memory_errors()
    def faulty_decode(self: Runner, slots: Sequence[int], *, truncate: bool = False) -> object:
        bring("decode", seeds(self, slots))
        return decode(self, slots, truncate=truncate)

    Worker.__init__ = watched_init
    Runner.start, Runner.step = faulty_start, faulty_step
    Runner.decode = faulty_decode  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    *pairs, descriptor = sys.argv[1:]
    for number, (stage, fault) in enumerate(zip(pairs[::2], pairs[1::2], strict=True)):
        faults[stage, FAULTY + number] = FAULTS[fault]
    install()
    sys.argv[1:] = [descriptor]
    main()

"""Which samples make a step, whatever the processes, the micro-batches and the workers are."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from rae.training.batch import Batch
from rae.training.data.image_data import ImageFolder
from rae.training.data.samples import ImageSamples, Sample
from rae.training.data.stream import MAX_IN_A_ROW, batches, permutation, sweep
from rae.training.data.transforms import CenterCrop, UnreadableError
from rae.training.data.unreadable import MAX_TOLD, Unreadable
from rae.training.distributed import World
from rae.training.draws import mix


@dataclass(frozen=True)
class Numbers:
    """A data set of which sample i is the number i, its position and a draw."""

    size: int
    unreadable: frozenset[int] = frozenset()

    @property
    def field(self) -> Literal["latents"]:
        return "latents"

    class_names = ()
    num_classes = 10

    def __len__(self) -> int:
        return self.size

    def name(self, index: int) -> str:
        return f"number {index}"

    def load(self, index: int, seed: int, position: int) -> Sample:
        if index in self.unreadable:
            raise UnreadableError("broken")
        draw = mix(seed, position) % 1000
        return Sample(torch.tensor([[[float(index), position, draw]]]), index % 10)


def world(rank: int = 0, size: int = 1) -> World:
    return World(rank, size, torch.device("cpu"))


def take(
    num: int, samples: Numbers, *, batch_size: int = 12, micro_batch: int = 12, **options: int
) -> list[Batch]:
    rank, size = options.pop("rank", 0), options.pop("size", 1)
    options = {"seed": 5, "num_workers": 0} | options
    stream = batches(
        samples, batch_size=batch_size, micro_batch=micro_batch, world=world(rank, size), **options
    )
    return list(islice(stream, num))


def joined(parts: Sequence[Batch]) -> torch.Tensor:
    """(num samples, index, position, draw and label)."""
    values = torch.cat([part.latents.flatten(1) for part in parts if part.latents is not None])
    labels = torch.cat([part.class_labels for part in parts])
    assert torch.equal(torch.cat([part.positions for part in parts]).float(), values[:, 1])
    return torch.cat([values, labels[:, None]], dim=1)


def test_every_epoch_has_every_sample_once_in_an_order_of_its_own() -> None:
    rows = joined(take(25, Numbers(50)))  # 6 epochs, 12 is no divisor of 50
    assert rows[:, 1].tolist() == list(range(300))
    epochs = rows[:, 0].view(6, 50)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(50))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 6
    assert epochs[3].tolist() == permutation(5, 3, 50).tolist()
    assert rows[:, 3].tolist() == [index % 10 for index in rows[:, 0].tolist()]
    other = joined(take(25, Numbers(50), seed=6))
    assert not torch.equal(other[:, 0], rows[:, 0])


@pytest.mark.parametrize(("size", "micro_batch"), [(1, 1), (1, 4), (2, 6), (2, 3), (3, 2), (12, 1)])
def test_a_step_has_the_same_samples_in_any_world(size: int, micro_batch: int) -> None:
    samples = Numbers(50, frozenset([3, 4, 31]))
    expected = joined(take(9, samples))
    per_step = 12 // (size * micro_batch)
    ranks = [
        take(9 * per_step, samples, rank=rank, size=size, micro_batch=micro_batch)
        for rank in range(size)
    ]
    steps = [part[s * per_step : (s + 1) * per_step] for s in range(9) for part in ranks]
    assert torch.equal(joined([batch for step in steps for batch in step]), expected)


def test_it_goes_on_at_any_step() -> None:
    expected = take(12, Numbers(50))
    for start in (1, 4, 11):
        found = take(12 - start, Numbers(50), start_step=start)
        assert torch.equal(joined(found), joined(expected[start:]))
    (far,) = take(1, Numbers(50), start_step=10**12)
    assert far.positions[0] == 12 * 10**12


@pytest.mark.parametrize(
    ("batch_size", "micro_batch"), [(12, 5), (13, 6), (12, 12), (0, 1), (12, 0)]
)
def test_sizes_that_do_not_divide_are_refused(batch_size: int, micro_batch: int) -> None:
    with pytest.raises(ValueError, match=f"batch size {batch_size} .* micro-batch {micro_batch}"):
        take(0, Numbers(50), batch_size=batch_size, micro_batch=micro_batch, size=2)


def test_unreadable_samples_are_replaced_by_the_next_of_the_order() -> None:
    order = permutation(5, 0, 12).tolist()
    broken = {order[2], order[3], order[11]}
    found = take(20, Numbers(12, frozenset(broken)))
    first = joined(found[:1])[:, 0].tolist()
    assert first == [*order[:2], order[4], order[4], *order[4:11], order[0]]
    for batch in found:  # each is an epoch
        assert batch.unreadable == {index: f"number {index}: broken" for index in broken}


@pytest.mark.parametrize(("size", "tries"), [(3, 3), (1000, MAX_IN_A_ROW)])
def test_a_data_set_of_which_nothing_is_readable_ends(size: int, tries: int) -> None:
    message = f"^{tries} images in a row cannot be read, the last is number .*: broken"
    with pytest.raises(ValueError, match=message):
        take(1, Numbers(size, frozenset(range(size))))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for number in range(10):
        path = tmp_path / "set" / f"class {number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    (tmp_path / "set" / "class 1" / "4.png").write_bytes(b"broken")
    return tmp_path / "set"


def test_workers_yield_what_none_yields(folder: Path) -> None:
    samples = ImageSamples(ImageFolder(folder), CenterCrop(16, flip=True))
    state = torch.get_rng_state()
    options: Any = {"seed": 1, "batch_size": 8, "micro_batch": 4, "world": world(), "start_step": 3}
    expected = list(islice(batches(samples, num_workers=0, **options), 9))
    found = list(islice(batches(samples, num_workers=2, **options), 9))
    for one, other in zip(expected, found, strict=True):
        assert one.images is not None and other.images is not None
        assert torch.equal(one.images, other.images)
        assert one.images.shape == (4, 3, 16, 16) and one.images.dtype == torch.uint8
        assert torch.equal(one.class_labels, other.class_labels)
        assert torch.equal(one.positions, other.positions)
        assert one.unreadable == other.unreadable
    assert sum(batch.num_skipped for batch in found) > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_a_sweep_leaves_unreadable_samples_out(caplog: pytest.LogCaptureFixture) -> None:
    chunks = [[0, 1, 2], [3], range(4, 8)]
    with caplog.at_level(logging.WARNING):
        found = list(sweep(Numbers(8, frozenset([1, 3])), chunks, 0, pin_memory=False))
    assert [batch.positions.tolist() for batch in found] == [[0, 2], [], [4, 5, 6, 7]]
    assert [batch.num_skipped for batch in found] == [1, 1, 0]
    assert found[1].latents is None
    assert joined([found[0], found[2]])[:, 0].tolist() == [0, 2, 4, 5, 6, 7]
    assert [record.getMessage() for record in caplog.records] == [
        "skipped number 1: broken",
        "skipped number 3: broken",
    ]


def test_each_unreadable_image_is_told_and_counted_once() -> None:
    told: list[str] = []
    unreadable = Unreadable(told.append)
    for _ in range(2):
        unreadable.add({7: "a.png: broken", 3: "b.png: empty"})
    assert told == ["skipped a.png: broken", "skipped b.png: empty"]
    unreadable.add({number: f"{number}.png: broken" for number in range(150)})
    assert len(unreadable) == 150
    assert len(told) == MAX_TOLD + 1
    assert told[-1] == "further unreadable images are only counted"


READER = """
import sys, torch
from pathlib import Path
from rae.training.distributed import World
from rae.training.data.image_data import ImageFolder
from rae.training.data.samples import ImageSamples
from rae.training.data.stream import batches
from rae.training.data.transforms import CenterCrop

if __name__ == "__main__":
    samples = ImageSamples(ImageFolder(Path(sys.argv[1])), CenterCrop(16))
    world = World(0, 1, torch.device("cpu"))
    for batch in batches(samples, seed=0, batch_size=2, micro_batch=2, world=world, num_workers=1):
        sys.stdout.write(".")
        sys.stdout.flush()
        if not sys.stdin.readline():
            break
"""


FAILING = (
    READER[: READER.index("    for batch")]
    + """
    held = batches(samples, seed=0, batch_size=2, micro_batch=2, world=world, num_workers=1)
    next(held)
    raise OSError("disk full")
"""
)


def test_who_fails_with_workers_ends(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    command = [sys.executable, str(script), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.endswith("OSError: disk full\n")


def test_workers_heed_no_signals_and_end_with_their_parent(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "reader.py"
    script.write_text(READER)
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.read(1) == b"."
        children = psutil.Process(process.pid).children(recursive=True)
        workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        assert len(workers) == 1
        for number in (signal.SIGINT, signal.SIGTERM):
            workers[0].send_signal(number)
        for _ in range(20):  # more than were made ahead
            process.stdin.write(b"\n")
            process.stdin.flush()
            assert process.stdout.read(1) == b"."
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        end = time.monotonic() + 20
        while any(child.is_running() for child in workers) and time.monotonic() < end:
            time.sleep(0.1)
        assert not any(child.is_running() for child in workers)
    finally:
        process.kill()
        process.stdin.close()
        process.stdout.close()

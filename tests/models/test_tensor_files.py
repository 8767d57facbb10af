"""Tensor files: written as a stream, read strictly, and never read as what they are not."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from rae.models.checkpoint import load_checkpoint
from rae.models.checkpoint_config import CheckpointError
from rae.models.tensor_files import file_sha256, read_tensors, require_match, write_tensors


def some_tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "b.odd": torch.randn(3).bfloat16(),
        "a": torch.randn(2, 3),
        "transposed": torch.randn(4, 5).T,
        "parameter": torch.nn.Parameter(torch.randn(7, 1)),
        "scalar": torch.tensor(1e-5),
        "empty": torch.zeros(0, 4),
        "ключ": torch.randn(5)[::2],
    }


def test_what_is_written_is_read_by_safetensors_itself(tmp_path: Path) -> None:
    path, tensors = tmp_path / "x.safetensors", some_tensors()
    assert write_tensors(path, tensors) == file_sha256(path)
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for key, value in tensors.items():
        assert read[key].dtype == value.dtype and torch.equal(read[key], value.detach())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert path.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_types_are_changed_as_asked(tmp_path: Path) -> None:
    path, tensors = tmp_path / "x.safetensors", some_tensors()
    write_tensors(path, tensors, {"a": torch.bfloat16, "b.odd": torch.float32})
    read = load_file(path)
    assert torch.equal(read["a"], tensors["a"].bfloat16())
    assert torch.equal(read["b.odd"], tensors["b.odd"].float())


def test_fp32_stays_aligned_beside_odd_numbers_of_bf16(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, some_tensors())
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    starts = {v["data_offsets"][0] for k, v in header.items() if v.get("dtype") == "F32"}
    assert size % 8 == 0 and len(starts) > 3 and all(start % 4 == 0 for start in starts)


def test_a_file_may_be_written_over_the_one_it_is_mapped_from(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, some_tensors())
    write_tensors(path, read_tensors(path))
    assert all(torch.equal(v, some_tensors()[k].detach()) for k, v in load_file(path).items())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_not_written(tmp_path: Path, value: float) -> None:
    path, tensors = tmp_path / "x.safetensors", some_tensors()
    tensors["a"][1, 1] = value
    with pytest.raises(CheckpointError, match="a: 1 of 6 values are not finite"):
        write_tensors(path, tensors)
    assert not list(tmp_path.iterdir())


def test_every_kind_of_mismatch_is_listed_with_what_was_expected() -> None:
    expected = {f"missing{i}": torch.zeros(i) for i in range(12)}
    expected |= {"shape": torch.zeros(2, 3), "type": torch.zeros(2)}
    tensors = {"shape": torch.zeros(3, 2), "type": torch.zeros(2).half(), "more": torch.zeros(9)}
    with pytest.raises(CheckpointError) as raised:
        require_match(expected, tensors, Path("file"))
    message = str(raised.value)
    assert message.startswith("file: 12 missing: missing0 [0], missing1 [1], missing10 [10], ")
    assert "and 4 more; 1 unexpected: more [9]; " in message
    assert "1 misshapen: shape is [3, 2], expected [2, 3]; " in message
    assert "1 float16, not float32 or bfloat16: type" in message


def test_a_damaged_header_never_loads_as_something_else(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """1,000 files with 1 to 3 changed bytes in the header; no sha256 helps here."""
    source = tiny_checkpoint / "guide.safetensors"
    exact = load_file(source)
    data = source.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    path, chance = tmp_path / "guide.safetensors", random.Random(0)
    refused = 0
    for _ in range(1000):
        damaged = bytearray(data)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(size)] ^= chance.randint(1, 255)
        path.write_bytes(damaged)
        try:
            tensors = read_tensors(path)
            require_match(exact, tensors, path)
        except CheckpointError as error:
            assert not re.search(r"\n", str(error)) and "guide.safetensors" in str(error)
            refused += 1
        else:
            assert all(torch.equal(value, tensors[key]) for key, value in exact.items())
    assert refused > 900


def test_a_changed_byte_anywhere_is_seen_at_load(tiny_checkpoint: Path, tmp_path: Path) -> None:
    chance = random.Random(1)
    for name in ("dit_dh", "decoder", "guide"):
        data = bytearray((tiny_checkpoint / f"{name}.safetensors").read_bytes())
        for file in tiny_checkpoint.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        for _ in range(5):
            damaged, place = data.copy(), chance.randrange(len(data))
            damaged[place] ^= 1 << chance.randrange(8)
            (tmp_path / f"{name}.safetensors").write_bytes(damaged)
            with pytest.raises(CheckpointError, match=rf"{name}\.safetensors"):
                load_checkpoint(tmp_path)

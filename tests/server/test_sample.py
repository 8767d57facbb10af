"""`rae sample`: every image the sampler's own, whatever the batches, processes, stops and kills."""

from __future__ import annotations

import json
import operator
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZIP_STORED, ZipFile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from rae.models.checkpoint import load_checkpoint, write_config
from rae.models.checkpoint_config import read_config
from rae.models.config import GuidanceMethod, Solver
from rae.models.guidance import Guidance
from rae.models.sampling import denoise, draw_noise, timesteps, to_uint8
from rae.server import partial
from rae.server.cli import app
from rae.server.command_settings import SampleSettings
from rae.server.job import Job
from rae.server.runner import Runner, RunnerOptions
from rae.server.sample import make, progress
from rae.server.settings import embedded_model

WIDE = {"COLUMNS": "200", "NO_COLOR": "1", "RAE_PRECISION": "fp32"}
JOB = ("--num", "24", "--steps", "30", "--seed", "7", "--batch", "1")


def rae(*arguments: str | Path, **environment: str) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env=WIDE | environment)


@pytest.fixture
def sample(tiny_checkpoint: Path) -> Callable[..., Result]:
    """`rae sample` of the tiny checkpoint, in this process."""

    def run(out: Path, *flags: str | Path, **environment: str) -> Result:
        return rae("sample", "--model", tiny_checkpoint, "--out", out, *flags, **environment)

    return run


@pytest.fixture(scope="module")
def undisturbed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of JOB, made at once in larger batches."""
    out = tmp_path_factory.mktemp("undisturbed") / "a.npz"
    done = rae("sample", "--model", tiny_checkpoint, "--out", out, *JOB, "--batch", "16")
    assert done.exit_code == 0, done.output
    return out.read_bytes()


@pytest.fixture
def spawn(
    tiny_checkpoint: Path, child_environment: dict[str, str]
) -> Callable[..., subprocess.Popen[str]]:
    """`rae sample` of JOB in a process of its own."""

    def start(out: Path, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", "-m", "rae.server", "sample", *JOB]
        command += ["--model", str(tiny_checkpoint), "--out", str(out)]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=child_environment | {"RAE_PRECISION": "fp32"} | environment,
        )

    return start


def num_done(out: Path) -> int:
    path = out.with_name(f"{out.name}.partial") / "done.npy"
    try:
        return int(np.load(path).sum())
    except (OSError, ValueError, EOFError):  # not there, or just being made
        return 0


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_batch_sizes_give_the_same_file(tmp_path: Path) -> None:
    files = []
    for batch in ("1", "3", "8"):
        out = tmp_path / f"{batch}.npz"
        flags = ["--per-class", "1", "--steps", "6", "--batch", batch, "--precision", "fp32"]
        assert rae("sample", "--out", out, "--device", "cpu", *flags).exit_code == 0
        files.append(out.read_bytes())
    assert files[0] == files[1] == files[2]
    checkpoint = load_checkpoint(embedded_model())
    size = checkpoint.config.decoder.image_size
    with np.load(tmp_path / "1.npz") as arrays:
        assert arrays.files == ["arr_0", "arr_1"]
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert (images.dtype, images.shape) == (np.uint8, (10, size, size, 3))
    assert (labels.dtype, labels.tolist()) == (np.int64, list(range(10)))
    assert images.flags.c_contiguous
    assert len(np.unique(images, axis=0)) == 10


@pytest.mark.parametrize(
    ("solver", "pixels", "cfg", "method"),
    [
        ("euler", "truncate", 3.0, "cfg"),
        ("euler", "round", 1.0, "cfg"),
        ("heun2", "truncate", 2.0, "autoguidance"),
        ("midpoint", "round", 2.0, "cfg"),
    ],
)
def test_images_are_those_of_denoise(
    sample: Callable[..., Result],
    tiny_checkpoint: Path,
    tmp_path: Path,
    solver: Solver,
    pixels: str,
    cfg: float,
    method: GuidanceMethod,
) -> None:
    out = tmp_path / "a.npz"
    flags = ["--num", "8", "--steps", "7", "--seed", "5", "--batch", "3", "--solver", solver]
    flags += ["--pixels", pixels, "--cfg", str(cfg), "--guidance-method", method]
    done = sample(out, *flags, "--guidance-interval", "0.2", "0.9")
    assert done.exit_code == 0, done.output
    checkpoint = load_checkpoint(tiny_checkpoint)
    config = checkpoint.config
    Runner(
        checkpoint, torch.device("cpu"), RunnerOptions(precision="fp32")
    )  # brings it to its form
    with torch.inference_mode():
        latents = denoise(
            checkpoint.dit_dh,
            draw_noise(config.dit_dh.latent_shape, range(5, 13)),
            torch.arange(8) % 4,
            timesteps(7, config.shift),
            solver=solver,
            guidance=Guidance(cfg, (0.2, 0.9), method),
            null_label=config.dit_dh.null_label,
            guide=checkpoint.guide,
        )
        expected = to_uint8(checkpoint.rae.decode(latents), truncate=pixels == "truncate")
    with np.load(out) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], expected.permute(0, 2, 3, 1).numpy())
    report = json.loads((tmp_path / "a.npz.json").read_text())
    assert report["job"] == {
        "checkpoint_sha256": checkpoint.sha256,
        "num_classes": 4,
        "num": 8,
        "labels": "balanced",
        "seed": 5,
        "steps": 7,
        "cfg": cfg,
        "guidance_method": method,
        "guidance_interval": [0.2, 0.9],
        "solver": solver,
        "device": "cpu",
        "precision": "fp32",
        "kernels": "auto",
        "compile": "auto",
        "attention": "auto",
        "pixels": pixels,
    }
    assert report["evaluations_per_image"] == (6 if solver == "euler" else 12)
    assert 0 < report["seconds"] < 60
    assert report["versions"]["torch"]
    assert f"{report['evaluations_per_image']} evaluations each, pixels {pixels[:5]}" in done.stdout


def test_rounded_images_are_those_of_rae_generate(
    sample: Callable[..., Result], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    pictures = tmp_path / "png"
    flags = ["--per-class", "2", "--seed", "30", "--pixels", "round", "--png", pictures]
    assert sample(tmp_path / "a.npz", *flags).exit_code == 0
    with np.load(tmp_path / "a.npz") as arrays:
        images = arrays["arr_0"]
    assert names_in(pictures) == [f"00000{i}.png" for i in range(8)]
    for i in (0, 3, 6):
        made = ["--seed", str(30 + i), "--out", tmp_path / "generated"]
        assert rae("generate", str(i % 4), "--model", tiny_checkpoint, *made).exit_code == 0
        (path,) = (tmp_path / "generated").glob(f"*-seed{30 + i}.png")
        for file in (path, pictures / f"00000{i}.png"):
            with Image.open(file) as picture:
                np.testing.assert_array_equal(np.asarray(picture), images[i])
    with Image.open(pictures / "000006.png") as picture:
        text = json.loads(picture.info["rae"])
    assert (text["class_id"], text["seed"], text["pixels"]) == (2, 36, "round")


def test_the_zip_is_numpys_but_for_the_clock(sample: Callable[..., Result], tmp_path: Path) -> None:
    assert sample(tmp_path / "a.npz", "--num", "4", "--steps", "2").exit_code == 0
    with ZipFile(tmp_path / "a.npz") as archive:
        for info in archive.infolist():
            assert info.compress_type == ZIP_STORED
            assert info.date_time == (1980, 1, 1, 0, 0, 0)
            assert info.extract_version == 45, "sizes have 64 bits"
    with np.load(tmp_path / "a.npz") as arrays:
        np.savez(tmp_path / "numpys", *(arrays[name] for name in arrays.files))
    with ZipFile(tmp_path / "a.npz") as ours, ZipFile(tmp_path / "numpys.npz") as numpys:
        assert ours.namelist() == numpys.namelist()
        assert [ours.read(n) for n in ours.namelist()] == [numpys.read(n) for n in ours.namelist()]


def test_random_labels_depend_on_seed_number_and_classes_alone(
    sample: Callable[..., Result], tmp_path: Path
) -> None:
    drawn = {}
    for seed, num, batch in ((0, 6, 1), (0, 6, 4), (1, 6, 4), (0, 7, 4)):
        out = tmp_path / f"{seed}-{num}-{batch}.npz"
        flags = ["--labels", "random", "--num", num, "--seed", seed, "--batch", batch]
        assert sample(out, *map(str, flags), "--steps", "2").exit_code == 0
        with np.load(out) as arrays:
            drawn[seed, num, batch] = arrays["arr_1"].tolist()
    assert drawn[0, 6, 1] == drawn[0, 6, 4] == [1, 2, 0, 3, 2, 3]
    assert drawn[1, 6, 4] != drawn[0, 6, 4]
    assert drawn[0, 7, 4][:6] != drawn[0, 6, 4]


@pytest.mark.slow
def test_a_process_that_is_killed_again_and_again_goes_on(
    sample: Callable[..., Result],
    spawn: Callable[..., subprocess.Popen[str]],
    undisturbed: bytes,
    tmp_path: Path,
) -> None:
    out, draw = tmp_path / "a.npz", random.Random()
    counts = [0]
    for _ in range(3):
        process = spawn(out)
        enough = counts[-1] + draw.randint(1, 3)
        while num_done(out) < enough and process.poll() is None:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.03))
        process.kill()
        text, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, text
        assert not out.exists()
        counts.append(num_done(out))
    assert 0 < counts[1] < counts[2] < counts[3] < 24
    last = sample(out, *JOB)
    assert last.exit_code == 0, last.output
    assert f"Going on: {counts[3]} of 24 images are there" in last.stdout
    assert out.read_bytes() == undisturbed
    assert names_in(tmp_path) == ["a.npz", "a.npz.json"]


def test_two_processes_share_the_work(
    spawn: Callable[..., subprocess.Popen[str]], undisturbed: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "a.npz"
    processes = [spawn(out, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    texts = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    assert out.read_bytes() == undisturbed
    assert sum("24 images, 29 evaluations each" in text for text in texts) == 1, texts
    assert names_in(tmp_path) == ["a.npz", "a.npz.json"]


def test_who_is_early_says_what_is_to_come_and_who_is_late_finds_it_done(
    sample: Callable[..., Result], undisturbed: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "a.npz"
    for rank, others in ((0, "16 of 24 images are to come from rank 1, 2"), (2, "8 of 24")):
        early = sample(out, *JOB, "--rank", str(rank), "--world-size", "3")
        assert early.exit_code == 0, early.output
        assert f"rank {rank}: done; {others}" in early.stdout
        assert not out.exists()
    last = sample(out, *JOB, RANK="1", WORLD_SIZE="3")
    assert "24 images, 29 evaluations each" in last.stdout
    assert out.read_bytes() == undisturbed
    late = sample(out, *JOB, RANK="0", WORLD_SIZE="3")
    assert (late.exit_code, late.stdout) == (
        0,
        f"rank 0: {out} has been assembled by another process\n",
    )
    other = sample(out, *JOB, "--cfg", "2", RANK="0", WORLD_SIZE="3")
    assert other.exit_code == 1
    assert out.read_bytes() == undisturbed


def test_the_number_of_processes_may_change(
    sample: Callable[..., Result], undisturbed: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "a.npz"
    assert sample(out, *JOB, "--rank", "1", "--world-size", "3").exit_code == 0
    assert "Going on: 8 of 24" in sample(out, *JOB).stdout
    assert out.read_bytes() == undisturbed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_after_the_batch(
    sample: Callable[..., Result], undisturbed: bytes, tmp_path: Path, number: signal.Signals
) -> None:
    out, before = tmp_path / "a.npz", signal.getsignal(number)

    def send() -> None:
        while not num_done(out):
            time.sleep(0.001)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    stopped = sample(out, *JOB)
    sender.join()
    assert stopped.exit_code == 128 + number
    made = num_done(out)
    assert 0 < made < 24
    assert stopped.stdout.endswith(f"Stopped with {made} of 24 images; the same command goes on\n")
    assert signal.getsignal(number) is before
    assert sample(out, *JOB).exit_code == 0
    assert out.read_bytes() == undisturbed


@pytest.mark.parametrize(
    ("step", "file"),
    [
        ("write_json", "job.json"),
        ("write_npz", "archive.npz"),
        ("write_json", "a.npz.json"),
        ("os.link", "archive.npz"),
        ("remove", "a.npz.partial"),
    ],
)
def test_a_death_between_two_steps_is_made_good(
    sample: Callable[..., Result],
    undisturbed: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    file: str,
) -> None:
    out = tmp_path / "a.npz"
    does = operator.attrgetter(step)(partial)

    def die(path: Path, *rest: object) -> None:
        if path.name != file:
            return does(path, *rest)
        if step == "write_npz":
            path.write_bytes(b"half of it")
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(f"rae.server.partial.{step}", die)
        assert sample(out, *JOB, "--batch", "16").exit_code == 9
    assert (tmp_path / "a.npz.partial").is_dir()
    again = sample(out, *JOB)
    assert again.exit_code == 0, again.output
    assert out.read_bytes() == undisturbed
    assert names_in(tmp_path) == ["a.npz", "a.npz.json"]


def test_a_file_that_was_moved_is_not_written_to_through_its_link(
    sample: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, moved = tmp_path / "a.npz", tmp_path / "mine.npz"
    with monkeypatch.context() as patch:
        patch.setattr("rae.server.partial.remove", lambda _: sys.exit(9))
        assert sample(out, *JOB, "--batch", "16").exit_code == 9
    out.rename(moved)
    assert sample(out, *JOB).exit_code == 0
    assert out.read_bytes() == moved.read_bytes()
    assert not out.samefile(moved)


def test_another_job_is_refused_by_every_field_that_differs(
    sample: Callable[..., Result], undisturbed: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "a.npz"
    assert sample(out, *JOB, "--world-size", "2").exit_code == 0
    other = ["--seed", "8", "--solver", "heun2", "--guidance-interval", "0", "0.5"]
    refused = sample(out, *JOB, *other)
    assert refused.exit_code == 1
    assert refused.stderr == (
        f"Error: {out}.partial holds the images of another job: seed is 7 there and 8 here; "
        "guidance_interval is [0.0, 1.0] there and [0.0, 0.5] here; "
        'solver is "euler" there and "heun2" here; '
        "delete it to begin anew, or choose another --out\n"
    )
    assert sample(out, *JOB).exit_code == 0
    assert out.read_bytes() == undisturbed


@pytest.mark.parametrize("name", ["a.npz", "a.npz.json"])
def test_what_exists_is_not_overwritten(
    sample: Callable[..., Result], tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("mine")
    refused = sample(tmp_path / "a.npz", *JOB)
    assert refused.exit_code == 1
    assert refused.stderr == (
        f"Error: {tmp_path / name} exists and is never overwritten; move it, or choose another "
        "--out\n"
    )
    assert names_in(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize(
    ("flags", "exit_code", "message"),
    [
        (["--num", "10"], 1, "--num 10 is not divisible by the 4 classes; give a multiple of 4"),
        ([], 1, "--per-class and --num are both absent; give one of them"),
        (["--num", "4", "--per-class", "1"], 1, "--per-class and --num are both given"),
        (["--num", "4", "--rank", "2", "--world-size", "2"], 1, "--rank is 2; allowed: 0 to 1"),
        (["--num", "4", "--steps", "1"], 2, "steps is 1; allowed: an integer from 2"),
        (["--num", "4", "--cfg", "0.5"], 2, "cfg is 0.5; allowed: a number from 1 (off) to 100"),
        (["--num", "4", "--seed", str(2**53 - 3)], 2, f"seed is {2**53 - 3}; allowed"),
        (
            ["--num", "4", "--guidance-interval", "0.9", "0.1"],
            2,
            "guidance_interval is [0.9, 0.1]; allowed: [low, high] with 0 <= low <= high <= 1",
        ),
    ],
)
def test_what_cannot_be_done_is_one_message(
    sample: Callable[..., Result], tmp_path: Path, flags: list[str], exit_code: int, message: str
) -> None:
    refused = sample(tmp_path / "a.npz", *flags)
    assert refused.exit_code == exit_code
    assert refused.stderr.startswith(f"Error: {message}")
    assert refused.stderr.count("\n") == 1
    assert names_in(tmp_path) == []


def test_out_is_needed() -> None:
    refused = rae("sample", "--num", "4")
    assert refused.exit_code == 2
    assert "Missing option '--out'" in refused.stderr


def test_a_full_disk_is_said_first(
    sample: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=36_000))
    refused = sample(tmp_path / "a.npz", *JOB)
    assert refused.exit_code == 1
    assert refused.stderr == (
        f"Error: 36.9 kB of disk needed in {tmp_path} for the images, twice while the .npz is "
        "assembled; 36.0 kB are free\n"
    )
    assert names_in(tmp_path) == []


def test_weights_that_are_not_finite_stop_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    tensors = load_file(folder / "dit_dh.safetensors")
    tensors["y_embedder.embedding_table.weight"][2] = torch.nan
    save_file(tensors, folder / "dit_dh.safetensors")
    write_config(folder, replace(read_config(folder)[0], sha256={}))
    out = tmp_path / "a.npz"
    flags = ["--num", "8", "--seed", "40", "--steps", "3", "--batch", "2", "--cfg", "1"]
    broken = rae("sample", "--model", folder, "--out", out, *flags)
    assert broken.exit_code == 1
    assert broken.stderr == (
        "Error: image 2 of class 2 and seed 42 is not finite: it and its batch are not written\n"
    )
    assert num_done(out) == 2
    assert not out.exists()


def test_pictures_are_not_mixed_with_others(sample: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "png").mkdir()
    (tmp_path / "png" / "000001.png").touch()
    done = sample(tmp_path / "a.npz", "--num", "4", "--steps", "2", "--png", tmp_path / "png")
    assert done.exit_code == 1 and "exists and is not an empty folder" in done.stderr
    assert not (tmp_path / "a.npz.partial").exists()


def test_every_index_has_a_seed_and_a_class_of_its_own(tiny_checkpoint: Path) -> None:
    config, sha256 = read_config(tiny_checkpoint)
    settings = SampleSettings(out=Path("a.npz"), per_class=12_500, seed=3)
    job = Job.of(settings, config, checkpoint_sha256=sha256, device="cpu", precision="fp32")
    specs = [job.spec(i) for i in range(50_000)]
    assert [spec.seed for spec in specs] == list(range(3, 50_003))
    assert [spec.class_label for spec in specs] == [0, 1, 2, 3] * 12_500


def test_a_batch_that_is_filled_up_gives_the_same_images(tiny_checkpoint: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    settings = SampleSettings(out=Path("a.npz"), num=8, steps=3)
    about = {"checkpoint_sha256": checkpoint.sha256, "device": "cpu", "precision": "fp32"}
    job = Job.of(settings, checkpoint.config, **about)
    runner = Runner(
        checkpoint, torch.device("cpu"), RunnerOptions(max_rows=16, slots=8, precision="fp32")
    )
    alone, filled = (make(runner, [2, 5, 7], job, num_rows) for num_rows in (3, 8))
    np.testing.assert_array_equal(np.stack(filled), np.stack(alone))


def test_the_pace_is_that_of_this_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 102.0, 104.0, 140.0, 141.0])
    monkeypatch.setattr("rae.server.sample.time", SimpleNamespace(perf_counter=clock.__next__))
    lines: list[str] = []
    with progress(90, 10_000, lines.append, wants_bar=False) as advance:
        for made in (5, 5, 90, 9810):
            advance(made)
    assert lines == [
        "95 of 10,000 images, 2.50 images/s, 1:06:02 left",
        "190 of 10,000 images, 2.50 images/s, 1:05:24 left",
        "10,000 of 10,000 images, 241.71 images/s, 0:00:00 left",
    ]


def test_a_terminal_gets_a_bar(sample: Callable[..., Result], tmp_path: Path) -> None:
    flags = ["--num", "4", "--steps", "2", "--batch", "1"]
    done = sample(tmp_path / "a.npz", *flags, FORCE_COLOR="1", TTY_COMPATIBLE="1")
    assert "4 of 4 images" in done.stderr
    assert "━" in done.stderr
    assert "images/s" not in done.stdout

"""The judge passes real digits, and fails copies, collapse and noise."""

from __future__ import annotations

import pytest
import torch

from rae.training.digits.digits_data import Digits, render, split_digits, to_scans
from rae.training.digits.digits_judge import (
    Criterion,
    Judge,
    nearest_distance,
    pairwise_distance,
    psnr_db,
    quantised,
)


@pytest.fixture(scope="module")
def digits() -> tuple[Digits, Digits]:
    return split_digits()


@pytest.fixture(scope="module")
def judge(digits: tuple[Digits, Digits]) -> Judge:
    return Judge(*digits)


def verdicts(judge: Judge, scans: torch.Tensor, labels: torch.Tensor) -> list[bool | None]:
    images = quantised(render(scans))
    return [item.passed for item in judge.judge(images, labels, "test", 0.98, bounded=True)]


def test_real_digits_pass(judge: Judge, digits: tuple[Digits, Digits]) -> None:
    _, held_out = digits
    real = judge.judge_real()
    assert real.passed and 0.97 <= real.value < 1
    legible, nearest, pairwise = judge.judge(
        quantised(render(held_out.scans)), held_out.labels, "real", 0.97, bounded=True
    )
    assert legible.value == real.value
    assert nearest.value == 1
    assert pairwise.value == pytest.approx(1, abs=0.05)


def test_copies_fail_on_the_distance_to_the_training_scans(
    judge: Judge, digits: tuple[Digits, Digits]
) -> None:
    train, _ = digits
    assert verdicts(judge, train.scans, train.labels) == [True, False, True]


def test_one_digit_per_class_fails_on_the_distance_within_a_class(
    judge: Judge, digits: tuple[Digits, Digits]
) -> None:
    _, held_out = digits
    right = judge.classifier.predict(judge.held_out.numpy()) == held_out.labels.numpy()
    rows = [
        next(i for i in range(297) if right[i] and held_out.labels[i] == label)
        for label in range(10)
    ]
    scans = held_out.scans[rows].repeat_interleave(20, 0)
    labels = torch.arange(10).repeat_interleave(20)
    recognised, _, diverse = verdicts(judge, scans, labels)
    assert recognised and not diverse


def test_wrong_labels_and_noise_are_not_recognised(
    judge: Judge, digits: tuple[Digits, Digits]
) -> None:
    _, held_out = digits
    assert verdicts(judge, held_out.scans, (held_out.labels + 1) % 10)[0] is False
    noise = torch.rand(297, 8, 8, generator=torch.Generator().manual_seed(0))
    assert judge.recognised(to_scans(render(noise)), held_out.labels) < 0.3


def test_distances_by_hand() -> None:
    scans = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0], [1.0, 2.0]])
    assert nearest_distance(scans[:2], torch.tensor([[0.0, 1.0], [3.0, 0.0]])) == 2.5
    assert pairwise_distance(scans, torch.tensor([0, 0, 1, 1])) == 3.5


def test_psnr_by_hand_and_eight_bits() -> None:
    image = torch.full((2, 3, 4, 4), 0.5)
    assert psnr_db(image + 0.1, image) == pytest.approx(20, abs=1e-4)
    assert quantised(torch.tensor([-1.0, 0.5, 2.0])).tolist() == pytest.approx([0, 128 / 255, 1])


def test_a_figure_without_a_bound_neither_passes_nor_fails() -> None:
    assert Criterion("x", 1.0, None, "").passed is None
    assert Criterion("x", 0.98, 0.98, "").passed is True

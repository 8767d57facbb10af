"""The split, the 32×32 pictures and the way back."""

from __future__ import annotations

import hashlib

import torch
from sklearn.datasets import load_digits

from rae.training.digits.digits_data import random_transforms, render, split_digits, to_scans


def test_split_is_fixed_complete_and_disjoint() -> None:
    train, held_out = split_digits()
    assert (len(train), len(held_out)) == (1500, 297)
    both = torch.cat([train.scans, held_out.scans]).mul(16).flatten(1)
    everything = torch.tensor(load_digits().data, dtype=torch.float32)  # type: ignore[union-attr]
    assert sorted(both.tolist()) == sorted(everything.tolist())
    digest = hashlib.sha256(bytes(train.labels.tolist())).hexdigest()
    assert digest.startswith("9d44b9cfd5dea95f"), (
        "the split changed: every published figure depends on it"
    )


def test_pictures_are_gray_and_lead_back_to_the_scans() -> None:
    _, held_out = split_digits()
    images = render(held_out.scans)
    assert images.shape == (297, 3, 32, 32)
    assert images.min() >= 0 and images.max() <= 1
    assert images[:, 0].equal(images[:, 2])
    error = to_scans(images) - 16 * held_out.scans.flatten(1)
    assert error.abs().mean() < 1  # of 16: what bicubic interpolation smooths


def test_one_flat_picture_becomes_its_value() -> None:
    image = torch.tensor([0.1, 0.2, 0.6]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    torch.testing.assert_close(to_scans(image), torch.full((1, 64), 4.8))


def test_transforms_are_small_and_differ() -> None:
    train, _ = split_digits()
    transforms = random_transforms(1500, torch.Generator().manual_seed(0))
    identity = torch.eye(2, 3)
    assert 0.04 < (transforms - identity).abs().max() < 0.16
    assert (transforms - identity).mean(0).abs().max() < 0.005
    moved, still = to_scans(render(train.scans, transforms)), to_scans(render(train.scans))
    distance = (moved - still).norm(dim=1)
    assert distance.min() > 0.1
    assert distance.mean() < 12.8  # nearer than another digit's scan, on average

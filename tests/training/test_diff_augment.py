"""DiffAugment in numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rae.training.stage1.diff_augment import diff_augment, draw_augmentation

NEUTRAL = (0.5, 0.5, 0.5, 0.5, 0.5)  # no move, brightness + 0, saturation × 1, contrast × 1


def augmented(images: Tensor, *rows: tuple[float, ...]) -> Tensor:
    return diff_augment(images, torch.tensor(rows))


def test_neutral_draws_change_nothing() -> None:
    images = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(augmented(images, NEUTRAL), images)


@pytest.mark.parametrize(
    ("draw", "down", "right"),
    [(0.0, -2, -3), (0.19, -2, -2), (0.21, -1, -2), (0.79, 1, 2), (1 - 2**-24, 2, 3)],
)
def test_an_image_moves_by_up_to_an_eighth(draw: float, down: int, right: int) -> None:
    images = 1 + torch.rand(2, 3, 16, 24)
    moved = augmented(images, (draw, *NEUTRAL[1:]), (0.5, draw, *NEUTRAL[2:]))
    # As the authors': output pixel y is input pixel y + down, and 0 where there is none.
    expected = torch.zeros(2, 3, 16, 24)
    for y in range(16):
        if 0 <= y + down < 16:
            expected[0, :, y] = images[0, :, y + down]
    for x in range(24):
        if 0 <= x + right < 24:
            expected[1, :, :, x] = images[1, :, :, x + right]
    torch.testing.assert_close(moved, expected)


def test_colours_by_hand() -> None:
    image = torch.tensor([0.0, 0.3, 0.6]).view(1, 3, 1, 1) + torch.tensor([-0.1, 0.1])
    image = image.expand(1, 3, 2, 2)  # channel means .0 .3 .6, gray .2 and .4
    brighter = augmented(image, (0.5, 0.5, 0.9, 0.5, 0.5))
    torch.testing.assert_close(brighter, image + 0.4)
    gray = augmented(image, (0.5, 0.5, 0.5, 0.0, 0.5))
    torch.testing.assert_close(gray, torch.tensor([0.2, 0.4]).expand(1, 3, 2, 2))
    flatter = augmented(image, (0.5, 0.5, 0.5, 0.5, 0.0))
    torch.testing.assert_close(flatter, 0.3 + (image - 0.3) / 2)
    assert augmented(image, (0.5, 0.5, 0.5, 1.0, 0.5))[0, 0, 0, 0].item() == pytest.approx(-0.4)


def test_gradients_follow_the_pixels() -> None:
    images = torch.rand(1, 3, 8, 8, requires_grad=True)
    augmented(images, (0.0, 0.5, 0.5, 0.5, 0.5))[0, 1, 7, 2].backward()
    assert images.grad is not None
    assert images.grad.nonzero().tolist() == [[0, 1, 6, 2]]


def test_draws_belong_to_a_sample() -> None:
    seeds = [3, 4, 3]
    draws = draw_augmentation(torch.Generator().manual_seed(seed) for seed in seeds)
    assert draws.shape == (3, 5) and draws[0].equal(draws[2]) and not draws[0].equal(draws[1])

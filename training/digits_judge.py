"""`rae eval digits`: are generated digits legible, diverse, and not copied?

Pictures are judged in the scans' own space, 8×8 values of 0 to 16 (`data.to_scans`), real and
generated ones by the same path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from sklearn.svm import SVC
from torch import Tensor

from rae.models.checkpoint import Checkpoint
from rae.models.guidance import Guidance
from rae.models.rae import RAE
from rae.models.sampling import denoise, draw_noise, timesteps, to_uint8
from rae.training.digits_data import CLASS_NAMES, IMAGE_SIZE, Digits, render, split_digits, to_scans

SVC_GAMMA = 0.001
PER_CLASS = 100
SAMPLES_PER_CLASS = 8
BATCH = 100


@dataclass(frozen=True)
class Criterion:
    """A measured value and the least that passes."""

    name: str
    value: float
    bound: float | None
    unit: str

    @property
    def passed(self) -> bool | None:
        return None if self.bound is None else self.value >= self.bound

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


class Judge:
    """The classifier and the real digits' figures that generated ones are held against."""

    MIN_REAL = 0.97
    MIN_GUIDED = 0.98
    MIN_UNGUIDED = 0.90
    MIN_NEAREST = 0.80
    MIN_PAIRWISE = 0.80
    MIN_PSNR_DB = 27.0

    def __init__(self, train: Digits, held_out: Digits) -> None:
        self.train = to_scans(quantised(render(train.scans)))
        self.held_out = to_scans(quantised(render(held_out.scans)))
        self.held_out_labels = held_out.labels
        self.classifier = SVC(gamma=SVC_GAMMA)  # type: ignore[arg-type]
        self.classifier.fit(self.train.numpy(), train.labels.numpy())
        self.nearest = nearest_distance(self.held_out, self.train)
        self.pairwise = pairwise_distance(self.train, train.labels)

    def recognised(self, scans: Tensor, labels: Tensor) -> float:
        """Fraction of scans (N, 64) read as their labels (N,)."""
        return float(self.classifier.score(scans.numpy(), labels.numpy()))

    def judge_real(self) -> Criterion:
        value = self.recognised(self.held_out, self.held_out_labels)
        return Criterion("held-out real digits recognised", value, self.MIN_REAL, "")

    def judge(
        self,
        images: Tensor,
        labels: Tensor,
        name: str,
        min_recognised: float | None,
        *,
        bounded: bool,
    ) -> list[Criterion]:
        """Legible, no copies, no collapse: images (N, 3, 32, 32) in [0, 1], labels (N,).

        Distances are fractions of the real digits' own; only reported where not `bounded`.
        """
        scans = to_scans(images)
        nearest = nearest_distance(scans, self.train) / self.nearest
        pairwise = pairwise_distance(scans, labels) / self.pairwise
        return [
            Criterion(f"{name}: recognised", self.recognised(scans, labels), min_recognised, ""),
            Criterion(
                f"{name}: distance to the nearest training scan, of the real one's",
                nearest,
                self.MIN_NEAREST if bounded else None,
                "",
            ),
            Criterion(
                f"{name}: distance within a class, of the real one's",
                pairwise,
                self.MIN_PAIRWISE if bounded else None,
                "",
            ),
        ]


def quantised(images: Tensor) -> Tensor:
    """Images in [0, 1] after the 8 bits that a client gets."""
    return to_uint8(images).float() / 255


def nearest_distance(scans: Tensor, train: Tensor) -> float:
    """Mean over scans (N, 64) of the Euclidean distance to the nearest of `train` (M, 64)."""
    return torch.cdist(scans, train).min(dim=1).values.mean().item()


def pairwise_distance(scans: Tensor, labels: Tensor) -> float:
    """Mean over classes of the mean distance between two scans of the class."""
    groups = [scans[labels == label] for label in labels.unique()]
    return torch.stack([torch.pdist(group).mean() for group in groups]).mean().item()


def psnr_db(images: Tensor, reference: Tensor) -> float:
    """Mean over images (N, 3, H, W) in [0, 1] of the peak signal-to-noise ratio."""
    error = (images - reference).square().flatten(1).mean(1)
    return (-10 * error.log10()).mean().item()


def generate(
    checkpoint: Checkpoint, labels: Tensor, seeds: Sequence[int], guidance: Guidance, steps: int
) -> Tensor:
    """What the published sampler gives a client: (N, 3, H, W) in [0, 1], of 256 levels."""
    dit_dh, config = checkpoint.dit_dh, checkpoint.config
    grid = timesteps(steps, config.shift)
    images = []
    for start in range(0, len(labels), BATCH):
        rows = slice(start, start + BATCH)
        latents = denoise(
            dit_dh,
            draw_noise(config.dit_dh.latent_shape, seeds[rows]),
            labels[rows],
            grid,
            guidance=guidance,
            null_label=config.dit_dh.null_label,
            guide=checkpoint.guide,
        )
        images.append(decode(checkpoint.rae, latents))
    return torch.cat(images)


def generate_default(checkpoint: Checkpoint, labels: Tensor) -> Tensor:
    """`generate` with the checkpoint's own defaults; image i has seed i."""
    defaults = checkpoint.config.defaults
    guidance = Guidance(defaults.cfg, defaults.guidance_interval, defaults.guidance_method)
    return generate(checkpoint, labels, range(len(labels)), guidance, defaults.steps)


@torch.no_grad()
def decode(rae: RAE, latents: Tensor) -> Tensor:
    return quantised(rae.decode(latents))


def protocol_labels(num_classes: int, per_class: int = PER_CLASS) -> Tensor:
    """Class by class; image i has seed i."""
    return torch.arange(num_classes).repeat_interleave(per_class)


def judge_checkpoint(checkpoint: Checkpoint, *, per_class: int = PER_CLASS) -> list[Criterion]:
    """Every figure of the embedded model, with its bound where it has one.

    The default guidance is held to all bounds, the unguided model to its legibility; AutoGuidance
    by the guide, where there is one, at the same scale, is reported.
    Raises ValueError for a checkpoint that is not of digits or has no encoder.
    """
    classes, size = checkpoint.config.classes, checkpoint.config.decoder.image_size
    if classes != CLASS_NAMES or size != IMAGE_SIZE:
        raise ValueError(
            f"a model of {len(classes)} classes and {size} px cannot be judged as digits: "
            f"it takes {', '.join(CLASS_NAMES)} and {IMAGE_SIZE} px"
        )
    train, held_out = split_digits()
    judge = Judge(train, held_out)
    defaults = checkpoint.config.defaults
    method = defaults.guidance_method
    labels = protocol_labels(len(checkpoint.config.classes), per_class)
    guided = generate_default(checkpoint, labels)
    unguided = generate(checkpoint, labels, range(len(labels)), Guidance(), defaults.steps)
    real = render(held_out.scans)
    with torch.no_grad():
        rebuilt = decode(checkpoint.rae, checkpoint.rae.encode(real))
    criteria = [
        judge.judge_real(),
        Criterion("held-out real digits rebuilt", psnr_db(rebuilt, real), judge.MIN_PSNR_DB, "dB"),
        *judge.judge(guided, labels, f"{method} {defaults.cfg:g}", judge.MIN_GUIDED, bounded=True),
        *judge.judge(unguided, labels, "cfg 1", judge.MIN_UNGUIDED, bounded=False),
    ]
    if checkpoint.guide is not None:
        auto = Guidance(defaults.cfg, defaults.guidance_interval, "autoguidance")
        images = generate(checkpoint, labels, range(len(labels)), auto, defaults.steps)
        name = f"AutoGuidance {defaults.cfg:g}"
        criteria += judge.judge(images, labels, name, None, bounded=False)
    return criteria

"""`rae eval samples` and `rae eval reconstruction`: the figures, and with what they were taken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rae.models.rae import RAE
from rae.models.sampling import to_uint8
from rae.training.console import Track
from rae.training.evaluation.feature_networks import FeatureNetwork
from rae.training.evaluation.frechet import frechet_distance
from rae.training.evaluation.image_sources import Images
from rae.training.evaluation.measuring import (
    Collector,
    MeasuredImages,
    channels_first,
    evenly,
    exact_convolutions,
    measure,
)
from rae.training.evaluation.metrics import inception_score, precision_recall, psnr_db, ssim
from rae.training.evaluation.reference import load_reference

if TYPE_CHECKING:
    from lpips import LPIPS

FID_IMAGES = 50_000
GRID_PAIRS = 16
GRID_COLUMNS = 4


@dataclass
class EvaluationReport:
    """Figures by name. A name says which network a figure is of, unless that is FID's own."""

    network: str
    num_images: int
    num_reference_images: int | None
    figures: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "network": self.network,
            "images": self.num_images,
            "reference_images": self.num_reference_images,
            "figures": self.figures,
            "warnings": self.warnings,
        }


def figure_name(figure: str, network: FeatureNetwork) -> str:
    """FID, or FD (encoder …): only Inception with the published weights gives an FID."""
    if network.is_fid:
        return figure
    return f"{figure.replace('FID', 'FD')} ({network.name})"


def evaluate_samples(
    samples: Images,
    reference: Path,
    network: FeatureNetwork,
    *,
    device: torch.device,
    batch: int,
    track: Track,
) -> EvaluationReport:
    """FID, and of Inception sFID and the Inception score; precision and recall where the
    reference has images. Raises ValueError in one line."""
    size = (samples.height, samples.width)
    real = load_reference(reference, network, size, device=device, batch=batch, track=track)
    made = measure(
        samples,
        network,
        device=device,
        batch=batch,
        advance=track(f"samples, {network.name}", samples.num),
    )
    report = EvaluationReport(network.name, samples.num, real.pooled.count)
    report.figures[figure_name("FID", network)] = frechet_distance(made.pooled, real.pooled)
    if made.spatial is not None and real.spatial is not None:
        report.figures[figure_name("sFID", network)] = frechet_distance(made.spatial, real.spatial)
    add_scores(report, made, real, network, device)
    report.warnings += [real.note] if real.note else []
    report.warnings += too_few(samples.num, network, "samples")
    if real.pooled.count is not None and real.pooled.count <= network.dim:
        report.warnings += too_few(real.pooled.count, network, "reference images", of_fid=False)
    return report


def add_scores(
    report: EvaluationReport,
    made: MeasuredImages,
    real: MeasuredImages,
    network: FeatureNetwork,
    device: torch.device,
) -> None:
    """What takes each image's features. Too few images for a figure are a warning."""
    if made.logits is not None:
        try:
            score, deviation = inception_score(made.logits)
        except ValueError as error:
            report.warnings.append(f"no Inception score: {error}")
        else:
            report.figures[figure_name("IS", network)] = score
            report.figures[figure_name("IS, deviation of 10 splits", network)] = deviation
    assert made.features is not None
    if real.features is None:
        report.warnings.append("no precision and recall: the reference has no images")
        return
    try:
        precision, recall = precision_recall(made.features.to(device), real.features.to(device))
    except ValueError as error:
        report.warnings.append(f"no precision and recall: {error}")
        return
    report.figures[figure_name("precision", network)] = precision
    report.figures[figure_name("recall", network)] = recall


def too_few(num: int, network: FeatureNetwork, what: str, *, of_fid: bool = True) -> list[str]:
    """Warnings of a number of images that makes a Fréchet distance hard to compare."""
    found = []
    if num <= network.dim:
        found.append(
            f"{num:,} {what} for {network.dim:,} dimensions: their covariance is singular, and the "
            "distance too large"
        )
    if of_fid and network.is_fid and num != FID_IMAGES:
        found.append(
            f"{num:,} {what}: published FIDs are of {FID_IMAGES:,}, and fewer give a larger one"
        )
    return found


@dataclass(frozen=True)
class Reconstruction:
    """A report, and pairs of an image and its reconstruction (P, 2, H, W, 3) uint8."""

    report: EvaluationReport
    pairs: np.ndarray


def evaluate_reconstruction(
    images: Images,
    rae: RAE,
    network: FeatureNetwork,
    *,
    lpips: LPIPS | None,
    device: torch.device,
    batch: int,
    track: Track,
) -> Reconstruction:
    """PSNR, SSIM and LPIPS, each the mean over images, and rFID of reconstructions of 8 bits.

    Raises ValueError in one line.
    """
    sums: dict[str, Tensor] = {}
    sides = Collector(network, device), Collector(network, device)
    nothing = np.empty(0, dtype=np.int64)
    chosen = set(evenly(images.num, GRID_PAIRS).tolist())
    pairs: list[np.ndarray] = []
    advance, first = track("reconstructions", images.num), 0
    with torch.inference_mode(), exact_convolutions():
        for pixels in images.batches(batch):
            originals = channels_first(pixels, device)
            rebuilt = rebuild(rae, originals)
            for name, values in pairwise(rebuilt, originals, lpips):
                sums[name] = sums.get(name, torch.zeros((), device=device)) + values.double().sum()
            for side, pictures in zip(sides, (rebuilt, originals), strict=True):
                side.add(network(pictures), nothing)
            for row in range(len(pixels)):
                if first + row in chosen:
                    pairs.append(np.stack([pixels[row], to_pixels(rebuilt[row])]))
            first += len(pixels)
            advance(len(pixels))
    made, real = (side.measured() for side in sides)
    report = EvaluationReport(
        network.name, images.num, images.num, warnings=too_few(images.num, network, "images")
    )
    report.figures |= {name: (total / images.num).item() for name, total in sums.items()}
    distance = frechet_distance(made.pooled, real.pooled)
    report.figures[figure_name("rFID", network)] = distance
    return Reconstruction(report, np.stack(pairs))


def rebuild(rae: RAE, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) uint8 through the autoencoder and back to 8 bits, rounded.

    Raises ValueError for values that are not finite.
    """
    decoded = rae.decode(rae.encode(images.float() / 255))
    if not decoded.isfinite().all():
        raise ValueError("the decoder makes values that are not finite")
    return to_uint8(decoded)


def pairwise(
    rebuilt: Tensor, originals: Tensor, lpips: LPIPS | None
) -> Iterator[tuple[str, Tensor]]:
    """Figures (B,) of two images uint8 each."""
    first, second = rebuilt.float() / 255, originals.float() / 255
    yield "PSNR, dB", psnr_db(first, second)
    yield "SSIM", ssim(first, second)
    if lpips is not None:
        yield f"LPIPS ({lpips.pnet_type})", lpips(2 * first - 1, 2 * second - 1).flatten()


def to_pixels(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).cpu().numpy()


def pair_grid(pairs: np.ndarray) -> Image.Image:
    """Pairs (P, 2, H, W, 3), each original left of its reconstruction, four a row."""
    joined = np.concatenate([pairs[:, 0], pairs[:, 1]], axis=2)  # (P, H, 2W, 3)
    blank = np.full((-len(joined) % GRID_COLUMNS, *joined.shape[1:]), 255, dtype=np.uint8)
    rows = np.concatenate([joined, blank]).reshape(-1, GRID_COLUMNS, *joined.shape[1:])
    return Image.fromarray(np.concatenate(list(np.concatenate(list(rows.swapaxes(0, 1)), axis=2))))

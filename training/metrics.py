"""Figures of images and of their features, by well-kept libraries where these are right."""

from __future__ import annotations

from torch import Tensor

NUM_SPLITS = 10  # of 5,000 each for 50,000 images, as in ADM's evaluator
NEIGHBOURS = 3
MAX_PSNR_DB = 100.0  # of equal images, which would make any mean infinite
SSIM_WINDOW = 11
DISTANCES = 50_000_000  # held at a time: 400 MB


def inception_score(logits: Tensor) -> tuple[float, float]:
    """Mean and standard deviation over 10 splits of exp E KL(p(y|x) ‖ p(y)), of logits (N, C).

    Images are shuffled first, always alike: class by class, a split would hold few classes.
    Raises ValueError for fewer images than splits. Source: arXiv 1606.03498.
    """
    from torch_fidelity.metric_isc import (
        KEY_METRIC_ISC_MEAN,
        KEY_METRIC_ISC_STD,
        isc_features_to_metric,
    )

    if len(logits) < NUM_SPLITS:
        raise ValueError(f"{len(logits)} images cannot be split into {NUM_SPLITS}")
    scores = isc_features_to_metric(logits.cpu(), splits=NUM_SPLITS)
    return scores[KEY_METRIC_ISC_MEAN], scores[KEY_METRIC_ISC_STD]


def precision_recall(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """The fractions of generated features (N, D) on the manifold of the real ones (M, D), and of
    real ones on that of the generated ones: within the distance of any one's third neighbour.

    Distances are float64 and held for a batch of rows at a time. Raises ValueError for fewer than
    4 features on a side. Source: arXiv 1904.06991, as in ADM's evaluator.
    """
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    for features in (generated, real):
        if len(features) <= NEIGHBOURS:
            raise ValueError(
                f"{len(features)} images have no neighbours number {NEIGHBOURS}: at least "
                f"{NEIGHBOURS + 1} are needed"
            )
    rows = max(1, DISTANCES // max(len(generated), len(real)))
    return calculate_precision_recall_part(
        generated.double(), real.double(), neighborhood=NEIGHBOURS, batch_size=rows
    )


def psnr_db(images: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) of images (B, 3, H, W) in [0, 1]; at most 100 dB."""
    error = (images.double() - originals.double()).square().flatten(1).mean(1)
    return (-10 * error.log10()).clamp(max=MAX_PSNR_DB)


def ssim(images: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity (B,) of images (B, 3, H, W) in [0, 1]: a Gaussian window of 11 pixels
    and σ 1.5 around every pixel, the borders mirrored, as in the published RAE's figures.

    Raises ValueError for images smaller than the window. Source: Wang et al., 2004.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(images.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(
            f"images of {images.shape[-1]} × {images.shape[-2]} px are smaller than SSIM's window "
            f"of {SSIM_WINDOW}"
        )
    values = structural_similarity_index_measure(
        images, originals, data_range=1.0, sigma=1.5, gaussian_kernel=True, reduction="none"
    )
    assert isinstance(values, Tensor)
    return values.flatten()

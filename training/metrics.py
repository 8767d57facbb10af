"""Figures of images and of their features, by well-kept libraries where these are right."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from rae.models.pickled import read_pickled

NUM_SPLITS = 10  # of 5,000 each for 50,000 images, as in ADM's evaluator
NEIGHBOURS = 3
MAX_PSNR_DB = 100.0  # of equal images, which would make any mean infinite
SSIM_WINDOW = 11
DISTANCES = 50_000_000  # held at a time: 400 MB
LPIPS_FILES = (
    "vgg16-397923af.pth or alexnet-owt-7be5be79.pth of https://download.pytorch.org/models"
)


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
    and σ 1.5. Raises ValueError for images smaller than it. Source: Wang et al., 2004."""
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


def load_lpips(path: Path) -> nn.Module:
    """LPIPS 0.1 on torchvision's VGG-16 or AlexNet, whose weights `path` holds; the weights of its
    linear layers come with the lpips package. Takes images (B, 3, H, W) in [−1, 1].

    Raises ValueError for a file that is absent or holds neither network. Source: arXiv 1801.03924.
    """
    import lpips

    if not path.is_file():
        raise ValueError(f"{path} is no file: LPIPS wants {LPIPS_FILES}")
    values = read_pickled(path)
    name = "vgg" if "features.28.weight" in values else "alex"
    # On the meta device VGG's 120 million unused weights cost neither memory nor time.
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # lpips asks torchvision in a way that it has deprecated
        network = lpips.LPIPS(net=name, pretrained=False, pnet_rand=True, verbose=False)
    network.scaling_layer = lpips.ScalingLayer()
    # lpips cuts `features` into slices, whose layers keep their numbers.
    sources = {key: f"features.{key.partition('.')[2]}" for key in network.net.state_dict()}
    try:
        network.net.load_state_dict({k: values[v] for k, v in sources.items()}, assign=True)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path} holds neither network of LPIPS: {LPIPS_FILES}") from error
    linear = read_pickled(Path(lpips.__file__).parent / "weights" / "v0.1" / f"{name}.pth")
    for key, value in linear.items():
        module, _, rest = key.partition(".")
        network.get_submodule(module).load_state_dict({rest: value}, assign=True)
    return network.eval().requires_grad_(False)

"""References in and out, and reports that say what was measured, on a network of 3 numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torch import Tensor

from rae.models.checkpoint import load_autoencoder
from rae.training.evaluation.feature_networks import ImageFeatures, load_encoder_network
from rae.training.evaluation.image_evaluation import (
    EvaluationReport,
    evaluate_reconstruction,
    evaluate_samples,
    pair_grid,
    rebuild,
)
from rae.training.evaluation.image_sources import NpzImages
from rae.training.evaluation.measuring import evenly
from rae.training.evaluation.metrics import precision_recall, psnr_db
from rae.training.evaluation.reference import load_reference, write_reference
from rae.training.stage1.perceptual import lpips_network

DIGITS = Path(__file__).parents[2] / "models" / "digits"
CPU = torch.device("cpu")


@dataclass
class MeanColour:
    """Features are an image's mean red, green and blue."""

    name: str = "encoder mean colour"
    fingerprint: str = "mean colour"
    is_fid: bool = False
    dim: int = 3
    spatial_dim: int | None = None
    images: list[int] = field(default_factory=list)

    def __call__(self, images: Tensor) -> ImageFeatures:
        self.images.append(len(images))
        return ImageFeatures(images.float().mean((2, 3)))

    def to(self, device: torch.device) -> Self:
        return self


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def track(_: str, __: int):  # noqa: ANN201
    return lambda _: None


def save_images(path: Path, num: int, seed: int, **arrays: np.ndarray) -> np.ndarray:
    images = np.random.default_rng(seed).integers(0, 256, (num, 8, 8, 3), dtype=np.uint8)
    np.savez(path, arr_0=images, **arrays)  # type: ignore[arg-type]
    return images


def colours(images: np.ndarray) -> Tensor:
    return torch.tensor(images.mean((1, 2)))


def distance_by_hand(made: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> float:
    ours = colours(made).numpy()
    mine = np.cov(ours.T)
    root = np.real(np.asarray(scipy.linalg.sqrtm(mine @ covariance)))
    shift = ours.mean(0) - mean
    return shift @ shift + np.trace(mine + covariance - 2 * root)


def evaluate(folder: Path, network: MeanColour, reference: str = "real.npz") -> EvaluationReport:
    samples = NpzImages(folder / "made.npz")
    return evaluate_samples(samples, folder / reference, network, device=CPU, batch=7, track=track)


def test_samples_against_images(tmp_path: Path) -> None:
    made, real = (save_images(tmp_path / f"{n}.npz", 20, s) for n, s in (("made", 0), ("real", 1)))
    report = evaluate(tmp_path, MeanColour())
    theirs = colours(real).numpy()
    expected = distance_by_hand(made, theirs.mean(0), np.cov(theirs.T))
    precision, recall = precision_recall(colours(made), colours(real))
    assert report.figures == {
        "FD (encoder mean colour)": pytest.approx(expected, rel=1e-4),
        "precision (encoder mean colour)": precision,
        "recall (encoder mean colour)": recall,
    }
    assert (report.num_images, report.num_reference_images, report.warnings) == (20, 20, [])


def test_statistics_of_the_network_are_preferred_to_the_images(tmp_path: Path) -> None:
    """As in ADM's batches, whose statistics are of many more images than they hold."""
    made = save_images(tmp_path / "made.npz", 20, 0)
    mean, covariance = np.array([100.0, 120, 140]), np.diag([30.0, 20, 10])
    real = save_images(tmp_path / "real.npz", 9, 1, mu=mean, sigma=covariance)
    report = evaluate(tmp_path, MeanColour(name="Inception-v3", is_fid=True))
    expected = distance_by_hand(made, mean, covariance)
    assert report.figures["FID"] == pytest.approx(expected, rel=1e-4)
    assert report.figures["recall"] == precision_recall(colours(made), colours(real))[1]
    assert report.warnings == [
        "20 samples: published FIDs are of 50,000, and fewer give a larger one"
    ]
    # Another network takes the images, and says so.
    other = evaluate(tmp_path, MeanColour())
    theirs = colours(real).numpy()
    expected = distance_by_hand(made, theirs.mean(0), np.cov(theirs.T))
    assert other.figures["FD (encoder mean colour)"] == pytest.approx(expected, rel=1e-4)
    assert other.warnings == [
        "statistics of FID's Inception-v3, as ADM writes them, not of encoder mean colour"
    ]


def test_statistics_without_images(tmp_path: Path) -> None:
    save_images(tmp_path / "made.npz", 20, 0)
    np.savez(tmp_path / "real.npz", mu=np.zeros(3), sigma=np.eye(3))
    report = evaluate(tmp_path, MeanColour(is_fid=True))
    assert list(report.figures) == ["FID"] and report.num_reference_images is None
    assert "no precision and recall: the reference has no images" in report.warnings
    with pytest.raises(ValueError, match="no images arr_0, and statistics of FID's Inception-v3"):
        evaluate(tmp_path, MeanColour())
    np.savez(tmp_path / "real.npz", mu=np.zeros(4), sigma=np.eye(4))
    with pytest.raises(ValueError, match="mu has 4 dimensions, the network 3"):
        evaluate(tmp_path, MeanColour(is_fid=True))
    np.savez(tmp_path / "real.npz", mu=np.zeros(3), sigma=np.eye(4))
    with pytest.raises(ValueError, match=r"mu, sigma: a mean \(3,\) and a covariance \(4, 4\)"):
        evaluate(tmp_path, MeanColour(is_fid=True))
    np.savez(tmp_path / "real.npz", other=np.zeros(3))
    with pytest.raises(ValueError, match="no images arr_0, and no mu and sigma"):
        evaluate(tmp_path, MeanColour())


def test_a_reference_is_measured_once(tmp_path: Path) -> None:
    save_images(tmp_path / "made.npz", 5, 0)
    save_images(tmp_path / "real.npz", 20, 1)
    first, second = MeanColour(), MeanColour()
    reports = [evaluate(tmp_path, network) for network in (first, second)]
    assert reports[0] == reports[1]
    assert (sum(first.images), sum(second.images)) == (25, 5)
    other = MeanColour(fingerprint="other weights")
    evaluate(tmp_path, other)
    assert sum(other.images) == 25
    for file in (tmp_path / "cache").rglob("*.npz"):  # as a full disk might leave them
        file.write_bytes(file.read_bytes()[:100])
    assert evaluate(tmp_path, MeanColour()) == reports[0]


def test_a_folders_images_are_cropped_to_the_samples_size(tmp_path: Path) -> None:
    save_images(tmp_path / "made.npz", 5, 0)
    (tmp_path / "real").mkdir()
    pictures = np.random.default_rng(0).integers(0, 256, (6, 8, 12, 3), dtype=np.uint8)
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "real" / f"{index}.png")
    real = load_reference(tmp_path / "real", MeanColour(), (8, 8), device=CPU, batch=4, track=track)
    torch.testing.assert_close(real.pooled.mean, colours(pictures[:, :, 2:10]).mean(0))
    np.savez(tmp_path / "large.npz", arr_0=pictures)
    with pytest.raises(ValueError, match="images of 12 × 8 px, the samples are 8 × 8"):
        evaluate(tmp_path, MeanColour(), "large.npz")


def test_written_statistics_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("reference", "measuring"):
        monkeypatch.setattr(
            f"rae.training.evaluation.{module}.MAX_REFERENCE_IMAGES", 4, raising=False
        )
    made = save_images(tmp_path / "made.npz", 10, 0)
    real = save_images(tmp_path / "data.npz", 10, 1)
    out, source = tmp_path / "real.npz", NpzImages(tmp_path / "data.npz")
    write_reference(source, MeanColour(), out, device=CPU, batch=3, track=track)
    with np.load(out) as file:
        assert set(file) == {"arr_0", "mu", "sigma", "num_images", "network", "network_name"}
        np.testing.assert_array_equal(file["arr_0"], real[[0, 2, 5, 7]])
        np.testing.assert_allclose(file["mu"], real.mean((0, 1, 2)))
        np.testing.assert_allclose(file["sigma"], np.cov(colours(real).numpy().T), rtol=1e-4)
    report = evaluate(tmp_path, MeanColour())
    theirs = colours(real).numpy()
    expected = distance_by_hand(made, theirs.mean(0), np.cov(theirs.T))
    assert report.figures["FD (encoder mean colour)"] == pytest.approx(expected, rel=1e-4)
    assert (report.num_reference_images, report.warnings) == (10, [])
    assert (
        "statistics of encoder mean colour"
        in evaluate(tmp_path, MeanColour(fingerprint="other weights")).warnings[0]
    )


def test_no_half_written_statistics_stay(tmp_path: Path) -> None:
    save_images(tmp_path / "data.npz", 1, 0)
    source = NpzImages(tmp_path / "data.npz")
    with pytest.raises(ValueError, match="1 images have no covariance"):
        write_reference(
            source, MeanColour(), tmp_path / "out.npz", device=CPU, batch=3, track=track
        )
    assert [file.name for file in tmp_path.iterdir()] == ["data.npz"]


def test_evenly_chosen_rows() -> None:
    assert evenly(10, 4).tolist() == [0, 2, 5, 7]
    assert evenly(3, 4).tolist() == evenly(3, None).tolist() == [0, 1, 2]


@pytest.fixture(scope="module")
def digit_images(tmp_path_factory: pytest.TempPathFactory) -> NpzImages:
    from rae.models.sampling import to_uint8
    from rae.training.digits.digits_data import render, split_digits

    _, held_out = split_digits()
    images = to_uint8(render(held_out.scans[:20])).permute(0, 2, 3, 1)
    path = tmp_path_factory.mktemp("digits") / "held_out.npz"
    np.savez(path, arr_0=images.numpy())
    return NpzImages(path)


def test_reconstructions(digit_images: NpzImages) -> None:
    _, rae = load_autoencoder(DIGITS)
    network = load_encoder_network(DIGITS)
    result = evaluate_reconstruction(
        digit_images, rae, network, lpips=None, device=CPU, batch=8, track=track
    )
    pixels = next(digit_images.batches(20))
    originals = torch.tensor(pixels).permute(0, 3, 1, 2)
    rebuilt = rebuild(rae, originals)
    assert rebuilt.dtype == torch.uint8
    figures = result.report.figures
    assert figures["PSNR, dB"] == pytest.approx(
        psnr_db(rebuilt / 255, originals / 255).mean().item(), abs=0.01
    )
    assert figures["PSNR, dB"] > 27 and 0.9 < figures["SSIM"] < 1
    assert 0 < figures["rFD (encoder mae of digits)"] < 1
    assert any("20 images for 96 dimensions" in line for line in result.report.warnings)
    shown = evenly(20, 16)
    np.testing.assert_array_equal(result.pairs[:, 0], pixels[shown])
    np.testing.assert_array_equal(result.pairs[:, 1], rebuilt.permute(0, 2, 3, 1).numpy()[shown])


def test_lpips_of_reconstructions_names_its_network(
    digit_images: NpzImages, tmp_path: Path
) -> None:
    # AlexNet's convolutions: kernels, and channels out and in.
    shapes = {
        0: (64, 3, 11),
        3: (192, 64, 5),
        6: (384, 192, 3),
        8: (256, 384, 3),
        10: (256, 256, 3),
    }
    torch.manual_seed(0)
    weights = {
        f"features.{i}.weight": torch.randn(a, b, size, size) * (2 / (b * size**2)) ** 0.5
        for i, (a, b, size) in shapes.items()
    } | {f"features.{i}.bias": torch.zeros(shape[0]) for i, shape in shapes.items()}
    torch.save(weights, tmp_path / "weights.pth")
    network = lpips_network(tmp_path / "weights.pth")
    _, rae = load_autoencoder(DIGITS)
    result = evaluate_reconstruction(
        digit_images, rae, MeanColour(), lpips=network, device=CPU, batch=8, track=track
    )
    originals = torch.tensor(next(digit_images.batches(20))).permute(0, 3, 1, 2)
    first, second = (2 * (images / 255) - 1 for images in (rebuild(rae, originals), originals))
    expected = network(first, second).mean().item()
    assert result.report.figures["LPIPS (alex)"] == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-4


def test_a_grid_of_pairs() -> None:
    pairs = np.arange(5 * 2, dtype=np.uint8).reshape(5, 2, 1, 1, 1).repeat(3, -1)
    sheet = np.asarray(pair_grid(pairs))
    assert sheet[..., 0].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9] + [255] * 6]

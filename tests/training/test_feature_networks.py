"""Inception's features are torch-fidelity's, an encoder's the mean of the RAE's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics

from rae.models.checkpoint import load_autoencoder
from rae.models.published import NORMALISATION
from rae.training.evaluation.feature_networks import InceptionNetwork, load_encoder_network
from rae.training.evaluation.frechet import Gaussian
from rae.training.evaluation.image_evaluation import evaluate_samples, figure_name
from rae.training.evaluation.image_sources import NpzImages

DIGITS = Path(__file__).parents[2] / "models" / "digits"
CPU = torch.device("cpu")


def random_images(num: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Random weights as the published file names them."""
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = FeatureExtractorInceptionV3("random", ["2048"], str(path))
    for module in network.modules():  # so that the signal does not fade from layer to layer
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)
    yield path
    path.unlink()  # 96 MB


@pytest.fixture(scope="module")
def inception(inception_file: Path) -> InceptionNetwork:
    return InceptionNetwork(inception_file)


def test_inception_features(inception: InceptionNetwork) -> None:
    images = random_images(2, 16)
    features = inception(images)
    pooled, logits = inception.network(images)
    torch.testing.assert_close(features.pooled, pooled)
    assert features.logits is not None and features.spatial is not None
    weight = inception.network.fc.weight
    torch.testing.assert_close(features.logits, pooled @ weight.T)  # without the bias
    torch.testing.assert_close(features.logits, logits)
    # TensorFlow's order: rows, columns, channels; after the ReLU.
    maps: list[Tensor] = []
    branch = inception.network.Mixed_6d.branch1x1
    hook = branch.register_forward_hook(lambda *arguments: maps.append(arguments[2]))
    inception(images)
    hook.remove()
    spatial = features.spatial.view(2, 17, 17, 7)
    torch.testing.assert_close(spatial[1, 3, 5], maps[0][1, :7, 3, 5])
    assert spatial.min() == 0 and spatial.std() > 0.01


def test_statistics_on_inception_are_torch_fidelitys(
    inception: InceptionNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = random_images(4, 16), random_images(4, 16, 1) // 2
    for name, images in zip(("made", "real"), sets, strict=True):
        np.savez(tmp_path / f"{name}.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    seen: list[tuple[Gaussian, Gaussian]] = []

    def distance(first: Gaussian, second: Gaussian) -> float:  # the true one takes 10 seconds
        seen.append((first, second))
        return float(len(seen))

    monkeypatch.setattr("rae.training.evaluation.image_evaluation.frechet_distance", distance)
    report = evaluate_samples(
        NpzImages(tmp_path / "made.npz"),
        tmp_path / "real.npz",
        inception,
        device=CPU,
        batch=2,
        track=lambda *_: lambda _: None,
    )
    for gaussian, images in zip(seen[0], sets, strict=True):
        expected = fid_features_to_statistics(inception(images).pooled.double())
        np.testing.assert_allclose(gaussian.mean, expected["mu"], rtol=1e-4)
        np.testing.assert_allclose(gaussian.covariance, expected["sigma"], rtol=1e-3, atol=1e-5)
    assert [gaussian.dim for gaussian in seen[1]] == [7 * 17 * 17] * 2
    name = "Inception-v3 of random.pth, not FID's"
    assert set(report.figures) == {f"{n} ({name})" for n in ("FD", "sFD", "precision", "recall")}
    assert any("4 images cannot be split into 10" in line for line in report.warnings)
    assert any("4 samples for 2,048 dimensions" in line for line in report.warnings)


def test_other_files_than_inceptions_are_refused(tmp_path: Path, inception_file: Path) -> None:
    with pytest.raises(ValueError, match=r"is no file: wanted is pt_inception-2015-12-05-6726825d"):
        InceptionNetwork(tmp_path / "absent.pth")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other tensors than FID's Inception-v3"):
        InceptionNetwork(tmp_path / "other.pth")


class Hostile:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("executed"),))


def test_nothing_of_a_file_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": Hostile()}, "hostile.pth")
    with pytest.raises(ValueError, match="nothing of it was executed"):
        InceptionNetwork(tmp_path / "hostile.pth")
    assert not Path("executed").exists()


@pytest.mark.parametrize("size", [32, 48])
def test_a_checkpoints_encoder(size: int) -> None:
    network = load_encoder_network(DIGITS)
    _, rae = load_autoencoder(DIGITS)
    images = random_images(3, size)
    expected = rae.encode_raw(images.float() / 255).mean((2, 3))
    torch.testing.assert_close(network(images).pooled, expected)
    assert network.dim == 96 and network.name == "encoder mae of digits" and not network.is_fid
    assert figure_name("rFID", network) == "rFD (encoder mae of digits)"


def test_an_encoder_alone_is_normalised_as_its_kind() -> None:
    network = load_encoder_network(DIGITS / "encoder")
    _, rae = load_autoencoder(DIGITS)
    assert rae.encoder is not None
    images = random_images(3, 32)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMALISATION["mae"])
    expected = rae.encoder((images / 255 - mean) / std).mean(1)
    torch.testing.assert_close(network(images).pooled, expected)
    assert F.cosine_similarity(expected, load_encoder_network(DIGITS)(images).pooled).max() < 1
    assert network.name == "encoder encoder"
    assert network.fingerprint != load_encoder_network(DIGITS).fingerprint


def test_a_folder_without_an_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no encoder"):
        load_encoder_network(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="holds a 'bert'; encoders are dinov2_with_registers,"):
        load_encoder_network(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="does not hold an object"):
        load_encoder_network(tmp_path)

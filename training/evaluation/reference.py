"""What a network makes of a set of images: statistics and features, kept in ADM's format.

ADM's reference .npz has images `arr_0`, or `mu`, `sigma` of pool_3 and `mu_s`, `sigma_s` of the
spatial features, or both; ours say of which `network` these are. Source: github
openai/guided-diffusion, `evaluations/evaluator.py`.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from rae.models.cache import cache_folder
from rae.training.console import Track
from rae.training.evaluation.feature_networks import FeatureNetwork
from rae.training.evaluation.frechet import Gaussian
from rae.training.evaluation.image_sources import IMAGES, Images, NpzImages, is_npz, open_images
from rae.training.evaluation.measuring import MeasuredImages, evenly, measure

MAX_REFERENCE_IMAGES = 10_000  # for precision and recall, and arr_0: as in ADM's batches
CACHE_VERSION = 1


def load_reference(
    path: Path,
    network: FeatureNetwork,
    size: tuple[int, int],
    *,
    device: torch.device,
    batch: int,
    track: Track,
) -> MeasuredImages:
    """The statistics that samples of `size` (height, width) are held against.

    A folder's images are cropped to the size; what is measured is kept in the cache. Precision and
    recall need images: without any, `features` is None. Raises ValueError in one line.
    """
    images: Images | None
    if is_npz(path):
        names = array_names(path)
        images = NpzImages(path) if IMAGES in names else None
        statistics, note = stored_statistics(path, names, network)
    else:
        images, statistics, note = open_images(path, size[0]), None, None
    if images is not None and (images.height, images.width) != size:
        raise ValueError(
            f"{path} has images of {images.width} × {images.height} px, the samples are "
            f"{size[1]} × {size[0]}"
        )
    if images is None:
        if statistics is None:
            raise ValueError(f"{path} has no images {IMAGES}, and {note or 'no mu and sigma'}")
        return statistics
    measured = cached(images, network, device=device, batch=batch, track=track)
    if statistics is None:
        return MeasuredImages(measured.pooled, measured.spatial, measured.features, note=note)
    return MeasuredImages(statistics.pooled, statistics.spatial, measured.features)


def array_names(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is neither a folder nor an .npz: {error}") from error
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error


def stored_statistics(
    path: Path, names: list[str], network: FeatureNetwork
) -> tuple[MeasuredImages | None, str | None]:
    """mu and sigma of an .npz where they are of this network, else None and what they are of."""
    if not {"mu", "sigma"} <= set(names):
        return None, None
    with np.load(path, allow_pickle=False) as file:
        if "network" in names:
            is_ours, name = str(file["network"]) == network.fingerprint, str(file["network_name"])
        else:
            is_ours, name = network.is_fid, "FID's Inception-v3, as ADM writes them"
        if not is_ours:
            return None, f"statistics of {name}, not of {network.name}"
        count = int(file["num_images"]) if "num_images" in names else None
        pooled = read_gaussian(file, path, "mu", "sigma", network.dim, count)
        spatial = None
        if network.spatial_dim and {"mu_s", "sigma_s"} <= set(names):
            spatial = read_gaussian(file, path, "mu_s", "sigma_s", network.spatial_dim, count)
    return MeasuredImages(pooled, spatial, None), None


def read_gaussian(
    file: Any,  # noqa: ANN401, numpy's NpzFile
    path: Path,
    mean: str,
    covariance: str,
    dim: int,
    count: int | None,
) -> Gaussian:
    try:
        values = [torch.tensor(np.asarray(file[key], np.float64)) for key in (mean, covariance)]
        result = Gaussian(values[0], values[1], count)
    except (ValueError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: {mean}, {covariance}: {error}") from error
    if result.dim != dim:
        raise ValueError(f"{path}: {mean} has {result.dim} dimensions, the network {dim}")
    return result


def cached(
    images: Images, network: FeatureNetwork, *, device: torch.device, batch: int, track: Track
) -> MeasuredImages:
    """`measure`, unless the same network has seen the same images before."""
    key = f"{CACHE_VERSION} {images.fingerprint} {network.fingerprint}"
    file = cache_folder() / "evaluation" / f"{hashlib.sha256(key.encode()).hexdigest()}.npz"
    if file.exists():
        try:
            # numpy leaves a file open that it has opened and cannot read
            with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
                return from_arrays(arrays)
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile):
            file.unlink(missing_ok=True)  # cut short by a full disk: it is made again
    measured = measure(
        images,
        network,
        device=device,
        batch=batch,
        advance=track(f"reference, {network.name}", images.num),
        max_features=MAX_REFERENCE_IMAGES,
    )
    assert measured.features is not None
    with suppress(OSError):  # on a full disk it is not kept, but measured again
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as target:
            np.savez(target, features=measured.features.numpy(), **statistics_arrays(measured))
    return measured


def from_arrays(arrays: Any) -> MeasuredImages:  # noqa: ANN401, numpy's NpzFile
    def gaussian(suffix: str) -> Gaussian:
        mean, covariance = (torch.tensor(arrays[f"{key}{suffix}"]) for key in ("mu", "sigma"))
        return Gaussian(mean, covariance, int(arrays["num_images"]))

    spatial = gaussian("_s") if "mu_s" in arrays else None
    return MeasuredImages(gaussian(""), spatial, torch.tensor(arrays["features"]))


def statistics_arrays(measured: MeasuredImages) -> dict[str, Any]:
    """ADM's names; sFID's statistics where there are any."""
    pooled, spatial = measured.pooled, measured.spatial
    arrays = {"mu": pooled.mean.numpy(), "sigma": pooled.covariance.numpy()}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean.numpy(), "sigma_s": spatial.covariance.numpy()}
    return {**arrays, "num_images": np.array(pooled.count)}


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file that takes the place of `path` once all of it is written."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.chmod(name, 0o644)  # mkstemp's are for its owner alone
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def write_reference(
    images: Images,
    network: FeatureNetwork,
    out: Path,
    *,
    device: torch.device,
    batch: int,
    track: Track,
) -> MeasuredImages:
    """Write a reference .npz that ADM's evaluator reads: the statistics of all images and, for
    precision and recall, up to 10,000 of them, evenly chosen. Images are written as they come."""
    kept = evenly(images.num, MAX_REFERENCE_IMAGES)
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)),
        "fortran_order": False,
        "shape": (len(kept), images.height, images.width, 3),
    }
    with replacing(out) as target, zipfile.ZipFile(target, "w") as archive:
        with archive.open(f"{IMAGES}.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            measured = measure(
                images,
                network,
                device=device,
                batch=batch,
                advance=track(network.name, images.num),
                max_features=MAX_REFERENCE_IMAGES,
                seen=lambda pixels: file.write(pixels.tobytes()),
            )
        names = {"network": network.fingerprint, "network_name": network.name}
        for key, value in (statistics_arrays(measured) | names).items():
            with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(value), allow_pickle=False)
    return measured

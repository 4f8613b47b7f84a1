"""Sample quality (Table 1): samples, their features, and scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm import metrics
from ddpm.errors import InputError
from ddpm.files import data, features, models
from ddpm.files import images as pictures
from ddpm.guidance import Guided
from ddpm.run.device import replayed
from ddpm.run.parts import in_parts, joined, model_key, parts_folder
from ddpm.run.processes import Processes
from ddpm.run.sample import generate, in_turn
from ddpm.samplers import Levels


def samples(
    found: models.Checkpoint,
    cache: Path,
    ranks: Processes,
    count: int,
    seed: int = 0,
    sampler: str = "ancestral",
    steps: Levels | None = None,
    batch_size: int = 64,
    progress: bool = True,
    classes: Sequence[int] = (),
) -> Tensor:
    """The images of seeds `seed` to `seed` + count - 1, uint8 [count, C, H, W].

    classes are labels, over which the images cycle; without labels the model is sampled without one. The work is split
    over processes, and only the first process gets the images. Finished parts are kept under `cache`, so that the same
    call goes on where it stopped.
    """
    guidance = found.denoiser.network
    guided = [guidance.scale, guidance.first, guidance.last] if isinstance(guidance, Guided) else []
    about = [seed, sampler, steps, [*classes], guided]
    key = [*model_key(found), *about]
    folder = parts_folder(cache, "samples", key)
    denoiser = replayed(found.denoiser, ranks.device)  # once for all parts

    def make(rows: slice) -> dict[str, Tensor]:
        seeds = range(seed + rows.start, seed + rows.stop)
        made = generate(
            denoiser, found.preset.shape, seeds, sampler, steps,
            batch_size=batch_size, device=ranks.device, progress=progress,
            y=in_turn(classes, range(rows.start, rows.stop)),
        )  # fmt: skip
        return {"images": made}

    files = in_parts(folder, count, ranks, batch_size, "samples", progress, make)
    if not ranks.first:
        return torch.empty(0, *found.preset.shape, dtype=torch.uint8)
    return joined(files)["images"]


@dataclass(frozen=True)
class Features:
    """What a metric compares.

    samples    features of the samples
    images     features of the real images; None for a metric that looks at samples only
    inception  whether the network is the Inception of 2015, whose Frechet distance is called FID
    seed       seed of the subsets that kid draws
    """

    samples: features.Measured
    images: features.Measured | None
    inception: bool = False
    seed: int = 0
    device: torch.device | str = "cpu"

    @property
    def real(self) -> features.Measured:
        assert self.images is not None
        return self.images

    def rows(self) -> tuple[metrics.Floats, metrics.Floats]:
        """The features of the real images and of the samples, each [N, D]."""
        assert self.real.features is not None
        assert self.samples.features is not None
        return self.real.features, self.samples.features


def fid(given: Features) -> dict[str, float]:
    """The Frechet distance between the features of samples and of real images."""
    name = "fid" if given.inception else "frechet_distance"
    return {name: metrics.frechet_distance(given.real.moments, given.samples.moments)}


def inception_score(given: Features) -> dict[str, float]:
    """The Inception score of samples, mean and standard deviation over ten parts."""
    if given.samples.probabilities is None:
        raise InputError("is: these features have no class probabilities, which the Inception score needs")
    mean, spread = _inception_score("is", given.samples.probabilities)
    return {"inception_score": mean, "inception_score_std": spread}


def kid(given: Features) -> dict[str, float]:
    """The kernel distance between the features of samples and of real images."""
    value, error = metrics.kid(*given.rows(), seed=given.seed, device=given.device)
    return {"kid": value, "kid_standard_error": error}


def precision_recall(given: Features) -> dict[str, float]:
    """Precision and recall of samples by nearest neighbours among features."""
    precision, recall = metrics.precision_recall(*given.rows(), device=given.device)
    return {"precision": precision, "recall": recall}


class Metric(NamedTuple):
    """A measure of sample quality by name.

    compute        from `Features` to plain JSON values
    real           whether it compares the samples with real images
    rows           whether it needs the features of each image, and not only their moments
    probabilities  whether it needs class probabilities
    least          the fewest samples, and real images, that it works on
    meaning        one line for help
    """

    compute: Callable[[Features], dict[str, float]]
    real: bool = True
    rows: bool = False
    probabilities: bool = False
    least: int = 3
    meaning: str = ""


METRICS = {
    "fid": Metric(fid, meaning="Frechet distance to the training images"),
    "is": Metric(inception_score, real=False, probabilities=True, least=1, meaning="Inception score"),
    "kid": Metric(kid, rows=True, meaning="kernel distance to the training images"),
    "pr": Metric(precision_recall, rows=True, least=4, meaning="precision and recall by nearest neighbours"),
}


def check_network(network: features.Network, images: data.Images) -> None:
    """Raise InputError now, and not after hours, if the network does not give what the Inception score needs."""
    probabilities = network(images.batch([0]))[1]
    if probabilities is None:
        raise InputError(f"{network.name}: gives no class probabilities, which the Inception score needs")
    _inception_score(network.name, probabilities)


def _inception_score(name: str, probabilities: metrics.Floats) -> tuple[float, float]:
    try:
        return metrics.inception_score(probabilities, 10 if len(probabilities) >= 100 else 1)
    except ValueError as error:
        raise InputError(f"{name}: {error}; the Inception score needs class probabilities") from error


def quality(
    names: Sequence[str],
    samples: Tensor,
    images: data.Images,
    network: features.Network,
    cache: Path,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """The quality of `samples`, uint8 [N, C, H, W], against all of `images`, by the features of `network`.

    names are keys of METRICS. The Frechet distance is called fid if the network is the Inception of 2015, and
    frechet_distance otherwise. The statistics of the images are kept under `cache`. Returns plain JSON values.
    Raises InputError for too few samples, and for a network without class probabilities if `is` is asked for.
    """
    chosen = [METRICS[name] for name in names]
    rows = any(metric.rows for metric in chosen)
    _check_counts(names, len(samples), len(images))
    fake = features.measure(
        network, samples, keep_features=rows, keep_probabilities=any(metric.probabilities for metric in chosen),
        progress=progress,
    )  # fmt: skip
    real = None
    if any(metric.real for metric in chosen):
        provenance = features.provenance(images, network)
        file = parts_folder(cache, "statistics", [provenance.fingerprint, provenance.comparable()]).with_suffix(".npz")
        if rows or not file.is_file():
            real = features.measure(network, images, keep_features=rows, progress=progress)
            features.save_statistics(file, real.moments, provenance)
        else:
            real = features.Measured(features.load_statistics(file, provenance.comparable()).moments, None, None)
    given = Features(fake, real, network.weights == features.SHA256, seed, device)
    about = {"samples": len(samples), "features": network.name, "features_weights": network.weights}
    return about | scores(names, given)


def quality_of_files(
    names: Sequence[str], samples: Path, images: Path, seed: int = 0, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """The same from two .npz files of features [N, D], of samples and of images (see `features.read_features`).

    Raises InputError for files without features, for features of different widths, and for too few rows.
    """
    fake, real = (
        features.Measured(metrics.moments(rows), rows, probabilities)
        for rows, probabilities in map(features.read_features, (samples, images))
    )
    _check_counts(names, fake.moments.count or 0, real.moments.count or 0)
    widths = [len(measured.moments.mean) for measured in (fake, real)]
    if widths[0] != widths[1]:
        raise InputError(f"{samples}: features of {widths[0]} numbers, {images} has {widths[1]}; want the same")
    about = {"samples": fake.moments.count, "features": images.name}
    return about | scores(names, Features(fake, real, seed=seed, device=device))


def scores(names: Sequence[str], given: Features) -> dict[str, Any]:
    """The values of the metrics of these names, in the order of METRICS, and how many real images there were."""
    values: dict[str, Any] = {} if given.images is None else {"images": given.images.moments.count}
    for name, metric in METRICS.items():
        if name in names:
            values |= metric.compute(given)
    return values


def _check_counts(names: Sequence[str], samples: int, images: int) -> None:
    """InputError for too few rows: a covariance needs three, neighbours need four."""
    chosen = [METRICS[name] for name in names]
    least = max(metric.least for metric in chosen)
    for what, count in (("samples", samples), ("images", images)):
        if count < least and (what == "samples" or any(metric.real for metric in chosen)):
            raise InputError(f"{count} {what}: want at least {least} for {', '.join(names)}")


def read_samples(path: Path, shape: Sequence[int]) -> Tensor:
    """Saved samples, uint8 [N, C, H, W], from an .npz that `ddpm sample` wrote or from a folder of pictures.

    Raises InputError if there are none. Raises InputError for a picture that is not of shape [C, H, W], because a
    scaled picture would get another score.
    """
    size = f"{shape[1]}x{shape[2]}"
    if path.suffix.lower() != ".npz":
        if not path.is_dir():
            raise InputError(f"{path}: want an .npz as `ddpm sample` writes it, or a folder of images")
        rows = []
        for name in sorted(data.walk(path), key=data.natural):
            if Path(name).suffix.lower() not in pictures.SUFFIXES:
                continue
            picture, file = pictures.read(path / name), path / name
            if picture.size != (shape[2], shape[1]):
                raise InputError(f"{file}: {picture.height}x{picture.width}; want samples of the model's size, {size}")
            if pictures.native(picture) != shape[0]:
                mode = pictures.MODES[shape[0]]
                raise InputError(f"{file}: mode {picture.mode}; want {mode}, as samples of the model have")
            rows.append(np.array(pictures.convert(picture, shape[0], str(file), notes={})).reshape(*shape[1:], -1))
        if not rows:
            raise InputError(f"{path}: no images in this folder; want samples of {size}")
        return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2)
    array = next(iter(features.read_arrays(path).values()))
    wanted = (shape[1], shape[2], shape[0])
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != wanted or not len(array):
        raise InputError(
            f"{path}: holds {array.dtype} {list(array.shape)}; want uint8 [N, {', '.join(map(str, wanted))}]"
        )
    return torch.from_numpy(array).permute(0, 3, 1, 2)

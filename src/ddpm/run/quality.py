"""Sample quality (Table 1): it makes samples, computes their features, and scores them against real images."""

import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm import metrics, pixels
from ddpm.errors import InputError, brief
from ddpm.files import data, features, models
from ddpm.files import images as pictures
from ddpm.run import conditioning
from ddpm.run.device import use_cuda_graphs
from ddpm.run.measure import measure
from ddpm.run.parts import compute_parts, model_key, parts_folder, state_of
from ddpm.run.processes import Processes
from ddpm.run.progress import Progress
from ddpm.run.sample import cycled_labels, generate
from ddpm.run.saved import Parts, Samples
from ddpm.samplers import Levels


def samples(
    checkpoint: models.Checkpoint,
    cache: Path,
    ranks: Processes,
    count: int,
    seed: int = 0,
    sampler: str = "ancestral",
    steps: Levels | None = None,
    batch_size: int = 64,
    progress: bool = True,
    classes: Sequence[int] = (),
    given: data.Images | None = None,
) -> Samples:
    """The model's images of seeds `seed` to `seed` + count - 1, which are read when they are wanted.

    `classes` holds labels, and the images cycle over them; if it is empty, the model is sampled without a class.
    A model with a condition is given those of the images `given`, over which the samples cycle. The work is split over
    processes, which must see the same disk. Finished batches are stored under `cache`, so the same call resumes where
    it stopped. Raises InputError for a sampler or steps that do not exist.
    """
    key = [*model_key(checkpoint), seed, sampler, steps, [*classes]]
    key += [] if given is None else [state_of(given, ranks)]
    folder = parts_folder(cache, "samples", key)
    shape = checkpoint.preset.shape
    denoiser = use_cuda_graphs(checkpoint.denoiser, ranks.device)  # recorded once for all batches

    def make(part: slice) -> dict[str, Tensor]:
        seeds = range(seed + part.start, seed + part.stop)
        labels = cycled_labels(classes, range(part.start, part.stop))
        told = None
        if given is not None:
            places = [i % len(given) for i in range(part.start, part.stop)]
            x0 = pixels.to_signal(given.batch(places), given.values)
            told = conditioning.of_images(checkpoint.preset, given, places, x0)
        images = generate(
            denoiser, shape, seeds, sampler, steps, batch_size, ranks.device, progress=progress, y=labels,
            condition=told,
        )  # fmt: skip
        return {"images": images}

    files = compute_parts(folder, count, ranks, batch_size, "samples", progress, make)
    return Parts(files, batch_size, count)


@dataclass(frozen=True)
class MetricInputs:
    """What a metric is computed from.

    samples    features of the samples
    images     features of the real images; None if no metric compares the samples with real images
    inception  whether the features are of the Inception network of 2015; only their Frechet distance is called FID
    seed       seed of the random subsets of `kid`
    device     where matrix products run
    """

    samples: features.Measured
    images: features.Measured | None
    inception: bool = False
    seed: int = 0
    device: torch.device | str = "cpu"

    @property
    def real(self) -> features.Measured:
        """The features of the real images, for a metric that needs them."""
        assert self.images is not None
        return self.images

    def rows(self) -> tuple[metrics.Floats, metrics.Floats]:
        """The features of the real images [N, D] and of the samples [M, D], float64."""
        assert self.real.features is not None
        assert self.samples.features is not None
        return self.real.features, self.samples.features


def fid(inputs: MetricInputs) -> dict[str, float]:
    """The Frechet distance between the features of the samples and of the real images."""
    name = "fid" if inputs.inception else "frechet_distance"
    return {name: metrics.frechet_distance(inputs.real.moments, inputs.samples.moments)}


def inception_score(inputs: MetricInputs) -> dict[str, float]:
    """The Inception score of the samples: mean and standard deviation over `inception_score_parts` random parts.

    There are ten parts, as in published scores, and one below 100 samples.

    Raises InputError if there are no class probabilities.
    """
    if inputs.samples.probabilities is None:
        raise InputError("metric is: these features have no class probabilities, which the Inception score needs")
    mean, deviation = _inception_score("metric is", inputs.samples.probabilities)
    parts = _parts(inputs.samples.probabilities)
    return {"inception_score": mean, "inception_score_std": deviation, "inception_score_parts": parts}


def kid(inputs: MetricInputs) -> dict[str, float]:
    """The kernel distance between the features of the samples and of the real images, with its standard error."""
    distance, error = metrics.kid(*inputs.rows(), seed=inputs.seed, device=inputs.device)
    return {"kid": distance, "kid_standard_error": error}


def precision_recall(inputs: MetricInputs) -> dict[str, float]:
    """Precision and recall of the samples, from nearest neighbours among the features."""
    precision, recall = metrics.precision_recall(*inputs.rows(), device=inputs.device)
    return {"precision": precision, "recall": recall}


class Metric(NamedTuple):
    """A measure of sample quality.

    compute        from `MetricInputs` to plain JSON values
    real           whether it compares the samples with real images
    rows           whether it needs the features of each image, and not only their moments
    probabilities  whether it needs class probabilities
    least          the smallest number of samples, and of real images, that it works with
    meaning        one line for help
    """

    compute: Callable[[MetricInputs], dict[str, float]]
    real: bool = True
    rows: bool = False
    probabilities: bool = False
    least: int = 3
    meaning: str = ""


METRICS = {
    "fid": Metric(fid, meaning="Frechet distance to the real images"),
    "is": Metric(inception_score, real=False, probabilities=True, least=1, meaning="Inception score"),
    "kid": Metric(kid, rows=True, meaning="kernel distance to the real images"),
    "pr": Metric(precision_recall, rows=True, least=4, meaning="precision and recall by nearest neighbours"),
}


def check_network(network: features.Network, pixels: Tensor) -> None:
    """Raise InputError if the network gives no class probabilities, which the Inception score needs.

    `pixels` is one image, [1, C, H, W]. So a mistake shows at once, and not after hours of sampling.
    """
    probabilities = network(pixels)[1]
    if probabilities is None:
        raise InputError(f"{network.name}: gives no class probabilities, which the Inception score needs")
    _inception_score(network.name, probabilities)


def _inception_score(source: str, probabilities: metrics.Floats) -> tuple[float, float]:
    """The score's mean and standard deviation; InputError, which names `source`, for rows that do not sum to 1."""
    try:
        return metrics.inception_score(probabilities, _parts(probabilities))
    except ValueError as error:
        raise InputError(f"{source}: {error}; the Inception score needs class probabilities") from error


def _parts(probabilities: metrics.Floats) -> int:
    return 10 if len(probabilities) >= 100 else 1


def quality(
    names: Sequence[str],
    samples: Samples,
    images: data.Images | features.Measured,
    network: features.Network,
    cache: Path,
    ranks: Processes,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """The metrics of `names` for `samples` against all of `images`, with features of `network`.

    `images` are real images, or their features or statistics, as `features.read_reference` reads them. `names` are keys
    of METRICS. The Frechet distance is called fid if the network is the Inception network of 2015, and
    frechet_distance otherwise. The moments of the real features are stored under `cache`, because they take long.
    The features are computed by all processes, which must see the same images. The first one computes the metrics and
    returns plain JSON values; the others return {}. It maps the rows that kid and pr need from files in `cache`, and pr
    also holds two copies of one set. Raises InputError for too few samples or images, and for a network without class
    probabilities if `is` is asked for.

    >>> import tempfile
    >>> network = features.Network("pixels", "", "", 64, lambda x: (x.flatten(1).numpy(), None))
    >>> images, test = (data.load("digits", (8, 8), 1, split=split) for split in ("train", "test"))
    >>> alone = Processes(0, 1, torch.device("cpu"))
    >>> with tempfile.TemporaryDirectory() as cache:
    ...     result = quality(["fid"], test, images, network, Path(cache), alone, progress=False)
    >>> result["samples"], result["images"], result["frechet_distance"] > 0
    (297, 1500, True)
    """
    chosen = [METRICS[name] for name in names]
    rows = any(metric.rows for metric in chosen)
    probabilities = any(metric.probabilities for metric in chosen)
    given = images if isinstance(images, features.Measured) else None
    if given is not None:
        check_reference(names, given)
    _check_counts(names, len(samples), given.moments.count if given else len(images))  # type: ignore[arg-type]
    fake = measure(network, samples, ranks, cache, rows, probabilities, progress)
    real = given
    if not isinstance(images, features.Measured) and any(metric.real for metric in chosen):
        real = _real_features(network, images, cache, ranks, rows, progress)
    if not ranks.first:
        return {}
    _check_widths(fake, real)
    inception = network.weights == features.SHA256
    about = {"samples": len(samples), "features": network.name, "features_weights": network.weights}
    return about | scores(names, MetricInputs(fake, real, inception, seed, ranks.device))


def _real_features(
    network: features.Network, images: data.Images, cache: Path, ranks: Processes, rows: bool, progress: bool
) -> features.Measured | None:
    """The features of the real images. Their moments are read from `cache` if no single rows are needed.

    Processes but the first get nothing if the moments are stored.
    """
    provenance = features.provenance(images, network)
    key = [state_of(images, ranks), provenance.comparable(), *_probe(network, images)]
    file = parts_folder(cache, "statistics", key).with_suffix(".npz")
    stored = None
    if ranks.first and file.is_file() and not rows:
        try:
            stored = features.Measured(features.load_statistics(file, provenance.comparable()).moments, None, None)
        except InputError as error:
            warnings.warn(f"{error}; it is made again", stacklevel=2)
    if any(ranks.exchange(stored is not None)):
        return stored
    real = measure(network, images, ranks, cache, rows, progress=progress)
    if ranks.first:
        features.save_statistics(file, real.moments, provenance)
    return real


def _probe(network: features.Network, images: data.Images) -> list[str]:
    """Numbers that change with the network: a function of the user's may read weights from a file of its own."""
    rows, _ = network(images.batch(range(min(2, len(images)))))
    return [f"{value:.3g}" for value in (*np.linalg.norm(rows, axis=1), *(rows @ np.cos(np.arange(rows.shape[1]))))]


def quality_of_files(
    names: Sequence[str], samples: Path, images: Path, seed: int = 0, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """The metrics of `names` from two .npz files: the features [N, D] of samples, and those [M, D] of real images.

    The second may also hold statistics, mu and sigma, as `features.read_reference` reads them. Returns plain JSON
    values. Raises InputError for a file without features, for features of different widths D, for too few rows, and for
    metrics that need more than statistics.
    """
    rows, probabilities = features.read_features(samples)
    fake, real = features.Measured(metrics.moments(rows), rows, probabilities), features.read_reference(images)
    check_reference(names, real)
    _check_counts(names, len(rows), real.moments.count)
    _check_widths(fake, real)
    about = {"samples": fake.moments.count, "features": images.name}
    return about | scores(names, MetricInputs(fake, real, seed=seed, device=device))


def holds_features(path: Path) -> bool:
    """Whether a file of samples holds features and no images. Raises InputError if it is a damaged .npz."""
    if path.suffix.lower() != ".npz" or not path.is_file():
        return False
    names = features.array_names(path)
    return "features" in names or any(array.ndim == 2 for array in features.read_arrays(path, names[:1]).values())


def check_reference(names: Sequence[str], reference: features.Measured) -> None:
    """Raise InputError for a metric that needs more than the statistics that a reference holds."""
    for name in names:
        if METRICS[name].rows and reference.features is None:
            raise InputError(f"metric {name}: needs the features of each real image, not mu and sigma; want fid")


def _check_widths(fake: features.Measured, real: features.Measured | None) -> None:
    widths = [len(measured.moments.mean) for measured in (fake, real or fake)]
    if widths[0] != widths[1]:
        raise InputError(
            f"features of {widths[0]} numbers for the samples, and of {widths[1]} for the real images; want the same"
        )


def compare(
    names: Sequence[str],
    samples: Path,
    images: Path,
    network: Callable[[], features.Network],
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """The metrics of `names` for all pictures of `samples` against all of `images`, without a model.

    Each is a folder, a .zip or an .npz of pictures of any sizes, or an .npz that `features.read_reference` reads. Alpha
    is laid on white. The network is made only if there are pictures. Returns plain JSON values. Raises InputError for
    what cannot be read, for too few pictures, and for a metric that statistics do not allow.
    """
    rows, probabilities = (any(getattr(METRICS[name], need) for name in names) for need in ("rows", "probabilities"))
    sides = [_side(path, rows or probabilities) for path in (samples, images)]
    used = network() if any(isinstance(side, _Pictures) for side in sides) else None
    expected = {} if used is None else {"network": used.name, "weights": used.weights, "resize": used.resize}
    measured: list[features.Measured] = []
    for path, side in zip((samples, images), sides, strict=True):
        if side is None:
            one = features.read_reference(path, expected)
            check_reference(names, one)
        count = len(side) if side is not None else one.moments.count
        _check_counts(names, *((None, count) if measured else (count, None)))
        if side is not None:
            assert used is not None
            counted = Progress(side, total=len(side), desc="features", unit="image", show=progress)
            one = features.measure_each(
                used, counted, keep_features=rows, keep_probabilities=probabilities and not measured, progress=False
            )
            side.warn()
        measured.append(one)
    fake, real = measured
    _check_widths(fake, real)
    inception = used is not None and used.weights == features.SHA256
    about: dict[str, Any] = {"samples": fake.moments.count}
    about |= {} if used is None else {"features": used.name, "features_weights": used.weights}
    return about | scores(names, MetricInputs(fake, real, inception, seed, device))


class _Pictures:
    """The pictures of a source, one after the other as uint8 [C, H, W], C = 1 or 3."""

    def __init__(self, encoded: data.EncodedImages) -> None:
        self.encoded, self.notes = encoded, pictures.Notes()

    def __len__(self) -> int:
        return len(self.encoded)

    def __iter__(self) -> Iterator[Tensor]:
        for i in range(len(self)):
            name = self.encoded.name(i)
            picture = data.decoded(next(self.encoded.fetch([i])), name)
            channels = 1 if pictures.native(picture) == 1 else 3
            array = np.array(pictures.convert(picture, channels, name, self.notes))
            yield torch.from_numpy(array.reshape(*array.shape[:2], channels)).permute(2, 0, 1)

    def warn(self) -> None:
        """Say what was done to pictures."""
        for what, (first, count) in self.notes.items():
            warnings.warn(f"{count:,} pictures: {what}; the first: {first}", stacklevel=3)


def _side(path: Path, rows: bool) -> _Pictures | None:
    """The pictures of a folder, a .zip or an .npz; None for an .npz of features or statistics.

    Files of guided-diffusion hold both pictures and statistics. The statistics are taken unless `rows` are needed.
    """
    if path.suffix.lower() == ".npz" and path.is_file():
        if not rows and {"mu", "sigma"} <= set(features.array_names(path)):
            return None
        every = features.read_arrays(path)
        arrays = {
            name: array
            for name, array in every.items()
            if array.dtype == np.uint8 and array.ndim in (3, 4) and array.shape[3:] in ((), (1,), (3,), (4,))
        }
        if not arrays:
            for name, array in every.items():
                if array.ndim == 4:
                    kind = f"{array.dtype} {list(array.shape)}"
                    raise InputError(f"{path}: {name} is {kind}; want 8-bit grey, RGB or RGBA images")
        if len(arrays) > 1:
            raise InputError(f"{path}: has images in {', '.join(arrays)}; want them in one array")
        for array in arrays.values():
            return _Pictures(data.Arrays(str(path), array))
        return None
    if path.is_dir():
        files = data.image_files(path)
        found: data.EncodedImages = data.Folder(path, files)
    elif path.is_file() and zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                files = [name for name in archive.namelist() if data.is_image(name) and not data.is_hidden(name)]
        except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as fault:
            raise InputError(f"{path}: damaged zip file ({brief(fault)})") from fault
        found = data.Zip(path, sorted(files, key=data.natural))
    else:
        reason = "not a zip file or an .npz" if path.exists() else "no such file or folder"
        raise InputError(f"{path}: {reason}; want a folder, a .zip or an .npz of images")
    if not files:
        raise InputError(f"{path}: no images in it")
    return _Pictures(found)


def scores(names: Sequence[str], inputs: MetricInputs) -> dict[str, Any]:
    """The values of the metrics of these names, in the order of METRICS, and the number of real images."""
    count = None if inputs.images is None else inputs.images.moments.count  # also unknown for plain statistics
    values: dict[str, Any] = {} if count is None else {"images": count}
    for name, metric in METRICS.items():
        if name in names:
            values |= metric.compute(inputs)
    return values


def _check_counts(names: Sequence[str], samples: int | None, images: int | None) -> None:
    """Raise InputError if there are fewer samples or real images than these metrics work with; None is unknown."""
    chosen = [METRICS[name] for name in names]
    least = max(metric.least for metric in chosen)
    for kind, count in (("samples", samples), ("images", images)):
        if count is not None and count < least and (kind == "samples" or any(metric.real for metric in chosen)):
            raise InputError(f"{count} {kind}: want at least {least} for {', '.join(names)}")

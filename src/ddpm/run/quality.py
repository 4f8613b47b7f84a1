"""Sample quality (Table 1): samples, their features, and scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    """The images of seeds `seed` .. `seed` + count - 1, uint8 [count, C, H, W]; on other processes than the first none.

    classes are labels that they have in turn; none: no label.
    What is made is kept under `cache`, so that the same call goes on where it stopped, and split over processes.
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


def probe(network: features.Network, images: data.Images) -> None:
    """InputError now rather than after hours where the network does not give what the Inception score needs."""
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
    wanted: Sequence[str],
    samples: Tensor,
    images: data.Images,
    network: features.Network,
    cache: Path,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Sample quality of `samples`, uint8 [N, C, H, W], against all of `images`, with the features of `network`.

    wanted names some of fid, is, kid, pr. The Frechet distance is called fid where the network is Inception of 2015,
    and frechet_distance otherwise. Statistics of the images are kept under `cache`. Returns plain JSON
    values. Raises InputError where there are too few samples, or the network gives no class probabilities for `is`.
    """
    rows, classes = bool({"kid", "pr"} & set(wanted)), "is" in wanted
    _enough(wanted, len(samples), len(images))
    fake = features.measure(network, samples, keep_features=rows, keep_probabilities=classes, progress=progress)
    real = None
    if rows or "fid" in wanted:
        where = features.provenance(images, network)
        file = parts_folder(cache, "statistics", [where.fingerprint, where.comparable()]).with_suffix(".npz")
        if rows or not file.is_file():
            real = features.measure(network, images, keep_features=rows, progress=progress)
            features.save_statistics(file, real.moments, where)
        else:
            real = features.Measured(features.load_statistics(file, where.comparable()).moments, None, None)
    about = {"samples": len(samples), "features": network.name, "features_weights": network.weights}
    return about | scores(wanted, fake, real, network.weights == features.SHA256, seed, device)


def _enough(wanted: Sequence[str], samples: int, images: int) -> None:
    """InputError where there are too few rows for a covariance or, for pr, for neighbours."""
    least = 4 if "pr" in wanted else 3 if set(wanted) - {"is"} else 1
    for what, count in (("samples", samples), ("images", images)):
        if count < least and (what == "samples" or set(wanted) - {"is"}):
            raise InputError(f"{count} {what}: want at least {least} for {', '.join(wanted)}")


def scores(
    wanted: Sequence[str],
    fake: features.Measured,
    real: features.Measured | None,
    inception: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """The same from features of samples and of images, wherever they come from; inception: whether these are FID's.

    Raises InputError where there are too few samples, or no class probabilities for `is`.
    """
    found: dict[str, Any] = {}
    if real is not None:
        found["images"] = real.moments.count
    if "fid" in wanted:
        assert real is not None
        name = "fid" if inception else "frechet_distance"
        found[name] = metrics.frechet_distance(real.moments, fake.moments)
    if "is" in wanted:
        if fake.probabilities is None:
            raise InputError("is: these features have no class probabilities, which the Inception score needs")
        found["inception_score"], found["inception_score_std"] = _inception_score("is", fake.probabilities)
    if {"kid", "pr"} & set(wanted):
        assert real is not None
        assert real.features is not None
        assert fake.features is not None
        if "kid" in wanted:
            value, error = metrics.kid(real.features, fake.features, seed=seed, device=device)
            found |= {"kid": value, "kid_standard_error": error}
        if "pr" in wanted:
            precision, recall = metrics.precision_recall(real.features, fake.features, device=device)
            found |= {"precision": precision, "recall": recall}
    return found


def scores_of_files(
    wanted: Sequence[str], samples: Path, images: Path, seed: int = 0, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """`scores` from two .npz of features [N, D], of samples and of images (see `features.read_features`).

    Raises InputError for files that hold none, of different widths, or too few.
    """
    fake, real = (
        features.Measured(metrics.moments(rows), rows, probabilities)
        for rows, probabilities in map(features.read_features, (samples, images))
    )
    _enough(wanted, fake.moments.count or 0, real.moments.count or 0)
    widths = [len(x.moments.mean) for x in (fake, real)]
    if widths[0] != widths[1]:
        raise InputError(f"{samples}: features of {widths[0]} numbers, {images} has {widths[1]}; want the same")
    about = {"samples": fake.moments.count, "features": images.name}
    return about | scores(wanted, fake, real, seed=seed, device=device)


def read_samples(path: Path, shape: Sequence[int]) -> Tensor:
    """Saved samples, uint8 [N, C, H, W]: an .npz as `ddpm sample` writes it, or a folder of pictures.

    Raises InputError where there are none, and for one that is not of shape [C, H, W]: scaled, it would be another.
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

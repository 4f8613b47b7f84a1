"""What the paper reports of a model: bits per dimension, level by level (Section 4.3), and sample quality (Table 1)."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import ddpm
from ddpm import kernels, likelihood, metrics, noise, pixels
from ddpm import ode as probability_flow
from ddpm.denoiser import Denoiser, Guided
from ddpm.errors import InputError
from ddpm.files import atomic, checkpoints, datasets, features, plots
from ddpm.files import images as pictures
from ddpm.gaussian import bits_per_dim, q_sample
from ddpm.run import compress
from ddpm.run.distributed import Processes
from ddpm.run.generate import generate, in_turn
from ddpm.run.gpu import replayed
from ddpm.samplers import Levels

_NLL, _CALIBRATION, _ODE, _SUBSET = 0xE7A1, 0xCA1B, 0x0DE, 0x5B5E7
"""Keys that keep the draws of these apart from others of the same seed."""

PILOT = 4
"""Images that see every level before the rest see a few, for where the bound's spread is."""


def subset(images: datasets.Images, count: int | None) -> list[int]:
    """`count` of the images, ever the same and of a larger count the first, in no order; None: all."""
    return torch.randperm(len(images), generator=noise.generator(_SUBSET)).tolist()[:count]


def signal(images: datasets.Images, rows: Sequence[int]) -> Tensor:
    """These images as x_0; InputError where they are not 8-bit by nature."""
    x0 = pixels.to_signal(images.batch(rows))
    if pictures.DEEP in images.notes:
        first, _ = images.notes[pictures.DEEP]
        raise InputError(
            f"{first}: {pictures.DEEP}; bits per dimension (Eq. 13) are of 256 grey levels, and of its 8-bit version "
            "they are not those of the image; want 8-bit images"
        )
    return x0


def _batches(
    images: datasets.Images, rows: Sequence[int], ranks: Processes, batch_size: int, what: str, progress: bool
) -> Iterator[tuple[slice, list[int], Tensor]]:
    """This process's share of the images `rows`, every so many: their places in `rows`, themselves, x_0."""
    starts = range(0, len(rows), batch_size)
    with _bar(len(ranks.mine(len(starts))), what, "batch", progress) as bar:
        for i in ranks.mine(len(starts)):
            places = slice(starts[i], min(starts[i] + batch_size, len(rows)))
            yield places, list(rows[places]), signal(images, rows[places]).to(ranks.device)
            bar.update()


def _bar(total: int, what: str, unit: str, progress: bool) -> "tqdm[Any]":
    return tqdm(total=total, desc=what, unit=unit, disable=None if progress else True)


def _draws(seed: int, images: Sequence[int], draw: int, key: int, shape: Sequence[int]) -> noise.Noise:
    """The noise of these images of a data set: a function of (seed, image, draw, level), not of the batch."""
    return noise.per_image([noise.mix(seed, image, draw, key) for image in images], shape)


def _folder(cache: Path, name: str, about: Sequence[Any]) -> Path:
    """Where parts of something that is made bit by bit are kept, by all that they depend on."""
    digest = hashlib.sha256(json.dumps([*about, ddpm.__version__]).encode()).hexdigest()
    return cache / f"{name}-{digest[:16]}"


def _in_parts(
    folder: Path, count: int, ranks: Processes, batch_size: int, what: str, progress: bool,
    make: Callable[[slice], dict[str, Tensor]],
) -> list[Path]:  # fmt: skip
    """Files of make(rows) for all of 0..count-1, every so many: those that are not there yet, split over processes."""
    parts = [slice(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    files = [folder / f"{rows.start:08d}-{rows.stop:08d}.safetensors" for rows in parts]
    with _bar(len(ranks.mine(len(parts))), what, "batch", progress) as bar:
        try:
            for i in ranks.mine(len(parts)):
                if not files[i].is_file():
                    checkpoints.save_tensors(files[i], make(parts[i]))
                bar.update()
        except KeyboardInterrupt:
            raise KeyboardInterrupt("whole batches that were done are kept, the same command goes on") from None
    ranks.any(False)  # all parts are there
    return files


def _joined(files: Sequence[Path]) -> dict[str, Tensor]:
    """The rows of all parts, by name."""
    try:
        parts = [checkpoints.read_tensors(file) for file in files]
    except InputError as error:
        raise InputError(f"{error}; delete it, and it is made again") from error
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@kernels.frozen()
def calibrate(
    found: checkpoints.Checkpoint,
    images: datasets.Images,
    cache: Path,
    ranks: Processes,
    count: int = 500,
    batch_size: int = 64,
    progress: bool = True,
    codec: int = 32,
) -> Tensor:
    """mse_t, the mean of |x_0 - x0^(x_t)|^2 / D at levels 1..T, over `count` images to train on: float64 [T].

    What is measured is kept under `cache`, so that the same call, or one for more images, goes on where it stopped. The
    result is kept beside the weights, where likelihood, samplers and codec find it, with the sigma_1^2 of least L_0 on
    the same images, to 6%, and with the codec's tables, counted while it codes `codec` of them (0: those that are there
    stay). Raises InputError where the variance that is best does not follow: mu prediction, and a network that gives
    its own.
    """
    denoiser = found.denoiser
    if denoiser.learned or denoiser.predict == "mu":
        why = "gives its own variance" if denoiser.learned else "predicts mu, whose error is not that of x0^"
        raise InputError(f"{found.path}: the network {why}; want eps, x0 or v and a fixed variance")
    chosen = subset(images, count)
    variances = torch.logspace(-7, 0, 141, dtype=torch.float64)  # a grey level is 6e-5

    def make(places: slice) -> dict[str, Tensor]:
        rows = chosen[places]
        x0 = signal(images, rows).to(ranks.device)
        draws = _draws(0, rows, 0, _CALIBRATION, x0.shape[1:])
        mse = likelihood.vlb(denoiser, x0, draws).mse
        first = torch.ones(len(x0), dtype=torch.int64, device=x0.device)
        mean = denoiser(q_sample(denoiser.schedule, x0.double(), first, draws(1).to(x0.device).double()), first).mean
        return {"mse": mse.cpu(), "cost": likelihood.decoder_cost(x0, mean, variances.to(x0.device)).cpu()[None]}

    folder = _folder(cache, "calibration", [found.sha256, found.preset.precision, images.fingerprint, denoiser.clip])
    made = _joined(_in_parts(folder, len(chosen), ranks, batch_size, "calibrating", progress, make))
    mse, sigma = made["mse"].mean(0), float(variances[made["cost"].sum(0).argmin()])
    if ranks.first:
        about: dict[str, Any] = {
            "data": images.name, "split": images.split, "fingerprint": images.fingerprint, "count": len(chosen),
            "precision": found.preset.precision,
        }  # fmt: skip
        tables = compress.kept(found)
        if codec and images.channels in (1, 3):
            some = images.batch(torch.tensor(chosen[:codec]))
            tables = compress.tables(denoiser, made["mse"], some, progress)
        if tables:
            about["codec"] = tables
        checkpoints.save_calibration(found, mse, sigma, about)
    return mse


@kernels.frozen()
def nll(
    found: checkpoints.Checkpoint,
    images: datasets.Images,
    out: Path,
    cache: Path,
    ranks: Processes,
    count: int | None = None,
    draws: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, Any]:
    """The bound of `images` (Eq. 5), all T levels of each, `draws` draws a level: bits per dimension.

    Official settings are one draw, x0^ clipped as the model does. What is done is kept under `cache`, so that the same
    call goes on where it stopped, and split over processes. Writes out/nll.csv, a row a level, and its plot nll.png.
    Returns plain JSON values; all but `count` and settings in bits/dim: bits_per_dim and its standard_error over
    images, prior (L_T), rate (L_1 .. L_T), distortion (L_0), and by_variance: the bound for fixed_large, fixed_small
    and, where the weights are calibrated, calibrated. Raises InputError for images of more than 8 bits a channel.
    """
    denoiser, shape = found.denoiser, found.preset.shape
    rows, variants = subset(images, count), _variants(found)
    tables = [_variance(d) for d in (denoiser, *variants.values())]
    key = [found.sha256, found.preset.precision, images.fingerprint, draws, seed, [*variants], tables, denoiser.clip]
    folder = _folder(cache, "nll", key)

    def make(places: slice) -> dict[str, Tensor]:
        batch = rows[places]
        x0 = signal(images, batch).to(ranks.device)
        sums: dict[str, Tensor] = {}
        for draw in range(draws):
            for name, value in _tables(denoiser, variants, x0, _draws(seed, batch, draw, _NLL, shape)).items():
                sums[name] = sums.get(name, 0) + value / draws
        return sums

    table = _joined(_in_parts(folder, len(rows), ranks, batch_size, "nll", progress, make))
    if ranks.first:
        _write_table(out, table)
    ranks.any(False)  # and the table
    n, per_image = len(rows), table["prior"] + table["terms"].sum(1)
    by_variance = {name: float((table["prior"] + table[name]).mean()) for name in variants}
    return {
        "bits_per_dim": float(per_image.mean()),
        "standard_error": float(per_image.std() / n**0.5) if n > 1 else None,
        "prior": float(table["prior"].mean()),
        "rate": float((per_image - table["terms"][:, 0]).mean()),
        "distortion": float(table["terms"][:, 0].mean()),
        "by_variance": by_variance,
        "count": n,
        "draws": draws,
        "network_calls": n * draws * denoiser.schedule.T,
    }


def _variance(denoiser: Denoiser) -> Any:
    """Which one, for a key: a name or a list of numbers."""
    return denoiser.variance.tolist() if isinstance(denoiser.variance, Tensor) else denoiser.variance


def _variants(found: checkpoints.Checkpoint) -> dict[str, Denoiser]:
    """The same mean with other variances, where the terms follow from mse."""
    if found.denoiser.learned or found.denoiser.predict == "mu":
        return {}
    names = ["fixed_large", "fixed_small"]
    if checkpoints.read_calibration(found) is not None:
        names.append("calibrated")
    return {name: checkpoints.with_variance(found, name).denoiser for name in names}


def _tables(denoiser: Denoiser, variants: dict[str, Denoiser], x0: Tensor, draws: noise.Noise) -> dict[str, Tensor]:
    """Bits/dim of a batch: prior [B], terms [B, T] (L_0, L_1 .. L_{T-1}), each variant's sum [B]; and mse [B, T]."""
    bound = likelihood.vlb(denoiser, x0, draws)
    terms = torch.cat([bound.decoder[:, None], bound.kl], dim=1)
    found = {"prior": bits_per_dim(bound.prior, bound.dims), "terms": bits_per_dim(terms, bound.dims), "mse": bound.mse}
    for name, variant in variants.items():
        other = likelihood.vlb_with_variance(bound, variant, x0, draws)
        found[name] = bits_per_dim(other.kl.sum(1) + other.decoder, bound.dims)
    return {name: value.cpu() for name, value in found.items()}


def _write_table(out: Path, table: dict[str, Tensor]) -> None:
    """A row a level t, T first: what x_t has cost, the term at t (the cost of x_{t-1}), the error of x0^(x_t).

    Rates are bits/dim; RMSE is the root of the mean over images and pixels, grey levels.
    """
    terms, mse = table["terms"].mean(0), table["mse"].mean(0)
    rates = table["prior"].mean() + terms.flip(0).cumsum(0).flip(0) - terms
    rmse = mse.sqrt() / pixels.BIN
    rows = ([t, *(f"{float(column[t - 1]):.8g}" for column in (rates, terms, rmse))] for t in range(len(terms), 0, -1))
    atomic.write_csv(out / "nll.csv", ["t", "rate_bits_per_dim", "term_bits_per_dim", "rmse_grey_levels"], rows)
    levels = list(range(1, len(terms) + 1))
    bits = plots.Panel(
        "The bound, level by level", {"term": (levels, terms.tolist())}, "noise level t", "bits/dim", log_y=True
    )
    error = plots.Panel("Error of x0^", {"RMSE": (levels, rmse.tolist())}, "noise level t", "grey levels")
    atomic.write(out / "nll.png", plots.draw([bits, error]))


@kernels.frozen()
def nll_sampled(
    found: checkpoints.Checkpoint,
    images: datasets.Images,
    levels: int,
    ranks: Processes,
    count: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, Any]:
    """An unbiased estimate of the same bound from `levels` levels an image, and its standard error, bits per dimension.

    Levels are drawn with q(t) proportional to the root mean square of the term at t, as PILOT images have it, by
    systematic sampling, and weighed by 1/q. The error holds the spread of images and of levels.
    """
    denoiser, shape, T = found.denoiser, found.preset.shape, found.denoiser.schedule.T
    chosen = subset(images, count)
    n = len(chosen)
    if not 1 <= levels <= T:
        raise InputError(f"levels {levels}: want 1 to {T}")
    if n < 2:
        raise InputError(f"{n} image: want at least 2, for a standard error")
    x0 = signal(images, chosen[:PILOT]).to(ranks.device)
    whole = likelihood.vlb(denoiser, x0, _draws(seed, chosen[:PILOT], 1, _NLL, shape))
    spread = torch.cat([whole.decoder[:, None], whole.kl], dim=1).square().mean(0).sqrt().cpu()
    q = 0.9 * spread / spread.sum() + 0.1 / T  # a floor, so that no weight is huge
    cdf = q.cumsum(0)

    sums = torch.zeros(n, dtype=torch.float64)
    for places, rows, x0 in _batches(images, chosen, ranks, max(1, batch_size // levels), "nll", progress):
        first = torch.tensor([float(torch.rand((), generator=noise.generator(seed, i, _NLL))) for i in rows])
        even = (first.double()[:, None] + torch.arange(levels)) / levels  # systematic: one draw, then even steps
        t = 1 + torch.searchsorted(cdf, even).clamp(max=T - 1)  # [B, K]
        eps = [_draws(seed, rows, 2 + k, _NLL, shape)(0) for k in range(levels)]
        terms = likelihood.sampled_terms(denoiser, x0, t.to(ranks.device), torch.stack(eps, dim=1).to(ranks.device))
        nats = (terms.cpu() / (levels * q[t - 1])).sum(1) + likelihood.prior(denoiser, x0.double()).cpu()
        sums[places] = bits_per_dim(nats, whole.dims)
    sums = ranks.total(sums)
    return {
        "bits_per_dim": float(sums.mean()),
        "standard_error": float(sums.std() / n**0.5),
        "count": n,
        "levels": levels,
        "network_calls": n * levels + min(PILOT, n) * T,
    }


@kernels.frozen()
def ode(
    found: checkpoints.Checkpoint,
    images: datasets.Images,
    ranks: Processes,
    count: int | None = None,
    steps: int | None = 100,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, Any]:
    """Bits per dimension by the probability-flow ODE: another model of the same network, and an independent figure.

    One draw and one Hutchinson probe an image; `steps` levels. Returns plain JSON values: bits_per_dim, by uniform
    dequantisation, and bits_per_dim_decoder, by Eq. 13's decoder on top of the flow, each with its standard error over
    images, draws and probes; count, steps.
    """
    denoiser, shape, chosen = found.denoiser, found.preset.shape, subset(images, count)
    steps = None if steps is None else min(steps, denoiser.schedule.T)
    n = len(chosen)
    sums = torch.zeros(2, n, dtype=torch.float64)
    for places, rows, x0 in _batches(images, chosen, ranks, batch_size, "ode", progress):
        draws = _draws(seed, rows, 0, _ODE, shape)
        u, probe, eps = torch.special.ndtr(draws(0).double()), draws(1).sign().to(x0.device), draws(2)
        uniform = probability_flow.bound(denoiser, x0, u.to(x0.device), probe, steps)
        decoder = probability_flow.decoder_bound(denoiser, x0, eps.to(x0.device), probe, steps)
        sums[:, places] = bits_per_dim(torch.stack([uniform, decoder]), x0[0].numel()).cpu()
    sums = ranks.total(sums)
    mean, error = sums.mean(1).tolist(), (sums.std(1) / n**0.5).tolist() if n > 1 else [None, None]
    return {
        "bits_per_dim": mean[0],
        "standard_error": error[0],
        "bits_per_dim_decoder": mean[1],
        "standard_error_decoder": error[1],
        "count": n,
        "steps": steps,
    }


def samples(
    found: checkpoints.Checkpoint,
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
    about = [seed, sampler, steps, _variance(found.denoiser), found.denoiser.clip, [*classes], guided]
    key = [found.sha256, found.preset.precision, *about]
    folder = _folder(cache, "samples", key)
    denoiser = replayed(found.denoiser, ranks.device)  # once for all parts

    def make(rows: slice) -> dict[str, Tensor]:
        seeds = range(seed + rows.start, seed + rows.stop)
        made = generate(
            denoiser, found.preset.shape, seeds, sampler, steps,
            batch_size=batch_size, device=ranks.device, progress=progress,
            y=in_turn(classes, range(rows.start, rows.stop)),
        )  # fmt: skip
        return {"images": made}

    files = _in_parts(folder, count, ranks, batch_size, "samples", progress, make)
    if not ranks.first:
        return torch.empty(0, *found.preset.shape, dtype=torch.uint8)
    return _joined(files)["images"]


def probe(network: features.Network, images: datasets.Images) -> None:
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
    images: datasets.Images,
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
        file = _folder(cache, "statistics", [where.fingerprint, where.comparable()]).with_suffix(".npz")
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
        for name in sorted(datasets.walk(path), key=datasets.natural):
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

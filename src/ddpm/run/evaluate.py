"""Bits per dimension of images: the variational bound (Section 4.3), an estimate of it, and the probability-flow ODE.

`nll` computes the bound at every noise level, `nll_sampled` estimates it from a few levels per image, and `ode`
computes the likelihood under the probability-flow ODE of the same network. A model that never saw an image without its
label is measured with the labels of the images; other models are measured without. A model with a condition on an image
is measured given the conditions of the images.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm import kernels, likelihood, noise
from ddpm import ode as probability_flow
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError
from ddpm.files import atomic, data, models, plots
from ddpm.gaussian import bits_per_dim
from ddpm.run import conditioning
from ddpm.run.parts import (
    as_signal,
    batches,
    compute_parts,
    image_noise,
    labels_of,
    model_key,
    parts_folder,
    read_parts,
    state_of,
    subset,
    sum_parts,
    variance_key,
)
from ddpm.run.processes import Processes

_NLL, _ODE = 0xE7A1, 0x0DE
"""Keys of the random draws. They keep these draws apart from others of the same seed."""
PILOT = 4
"""Number of images that `nll_sampled` measures at every level first, to learn how large the terms are."""


@kernels.frozen()
def nll(
    checkpoint: models.Checkpoint,
    images: data.Images,
    out: Path,
    cache: Path,
    ranks: Processes,
    count: int | None = None,
    draws: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
    name: str = "nll",
) -> dict[str, Any]:
    """The variational bound of `images` (Eq. 5) at all T levels, with `draws` noise draws per level.

    The paper uses one draw, and the model's own clipping of x0^. `count` limits the number of images (None: all). The
    work is split over processes. Finished batches are stored under `cache`, so the same call resumes where it stopped.
    Writes out/NAME.csv with one row per level, and its plot out/NAME.png.

    Returns plain JSON values. These are in bits/dim:

    bits_per_dim    the bound, the mean over the images
    standard_error  its standard error over the images; None for one image
    prior           L_T
    rate            L_1 + ... + L_T
    distortion      L_0
    by_variance     the bound with the variances fixed_large, fixed_small and, for a calibrated model, calibrated; {}
                    if the model learned its variance or predicts mu

    The others are count (the number of images), draws and network_calls. Raises InputError for images of more than 8
    bits per channel.
    """
    denoiser, shape = checkpoint.denoiser, checkpoint.preset.shape
    indices, variants = subset(images, count), _variance_variants(checkpoint)
    variances = [variance_key(model) for model in (denoiser, *variants.values())]
    key = [*model_key(checkpoint), state_of(images, ranks), draws, seed, [*variants], variances]
    folder = parts_folder(cache, "nll", key)

    def measure(part: slice) -> dict[str, Tensor]:
        batch = indices[part]
        x0, y = as_signal(images, batch).to(ranks.device), labels_of(checkpoint, images, batch, ranks.device)
        condition = conditioning.of_images(checkpoint.preset, images, batch, x0)
        told = {name: variant.given(condition) for name, variant in variants.items()}
        means: dict[str, Tensor] = {}
        for draw in range(draws):
            draws_of = image_noise(seed, batch, draw, _NLL, shape)
            values = _bound_of_batch(denoiser.given(condition), told, x0, draws_of, y)
            for name, value in values.items():
                means[name] = means.get(name, 0) + value / draws
        return means

    files, n = compute_parts(folder, len(indices), ranks, batch_size, "nll", progress, measure), len(indices)
    prior, means = read_parts(files, ["prior"])["prior"], sum_parts(files, ["terms", "mse"])
    means = {name: total / n for name, total in means.items()}
    if ranks.first:
        _write_table(out, name, float(prior.mean()), means["terms"], means["mse"], denoiser.values.bin)
    ranks.exchange()  # the other processes wait until the table is written
    others = read_parts(files, [*variants]) if variants else {}
    by_variance = {name: float((prior + others[name]).mean()) for name in variants}
    per_image = read_parts(files, ["bound"])["bound"]
    distortion = float(means["terms"][0])
    return {
        "bits_per_dim": float(per_image.mean()),
        "standard_error": float(per_image.std() / n**0.5) if n > 1 else None,
        "prior": float(prior.mean()),
        "rate": float(per_image.mean()) - distortion,
        "distortion": distortion,
        "by_variance": by_variance,
        "count": n,
        "draws": draws,
        "network_calls": n * draws * denoiser.schedule.T,
    }


def _variance_variants(checkpoint: models.Checkpoint) -> dict[str, Denoiser]:
    """The model with other variances, by name; {} if their bounds do not follow from the error of x0^."""
    if not checkpoint.denoiser.bound_follows_from_mse:
        return {}
    names = ["fixed_large", "fixed_small"]
    if models.read_calibration(checkpoint) is not None:
        names.append("calibrated")
    return {name: models.with_variance(checkpoint, name).denoiser for name in names}


def _bound_of_batch(
    denoiser: Denoiser, variants: dict[str, Denoiser], x0: Tensor, draws: noise.Noise, y: Tensor | None
) -> dict[str, Tensor]:
    """The bound of a batch of B images, on the CPU.

    prior         L_T, bits/dim [B]
    bound         L_T + L_0 + ... + L_{T-1}, bits/dim [B]
    terms         L_0 .. L_{T-1}, bits/dim [B, T]: column t - 1 belongs to level t
    mse           mean squared error of x0^(x_t) at levels 1..T, signal units squared [B, T]
    each variant  L_0 + ... + L_{T-1} with the variance of that name, bits/dim [B]
    """
    bound = likelihood.vlb(denoiser, x0, draws, y)
    terms = torch.cat([bound.decoder[:, None], bound.kl], dim=1)
    table = {"prior": bits_per_dim(bound.prior, bound.dims), "terms": bits_per_dim(terms, bound.dims), "mse": bound.mse}
    table["bound"] = table["prior"] + table["terms"].sum(1)
    for name, variant in variants.items():
        other = likelihood.vlb_with_variance(bound, variant, x0, draws, y)
        table[name] = bits_per_dim(other.kl.sum(1) + other.decoder, bound.dims)
    return {name: value.cpu() for name, value in table.items()}


def _write_table(out: Path, name: str, prior: float, terms: Tensor, mse: Tensor, bin: float) -> None:
    """Write NAME.csv, one row per level t from T down, and its plot NAME.png.

    prior, terms, mse are means over the images: L_T, and L_{t-1} [T] in bits/dim, and the error of x0^ [T].

    The rate is what x_t costs, L_T + ... + L_t. The term of level t, L_{t-1}, is what x_{t-1} costs in addition. The
    RMSE is the root mean square error of x0^(x_t) over images and pixels, in grey levels.
    """
    rates = prior + terms.flip(0).cumsum(0).flip(0) - terms
    rmse = mse.sqrt() / bin
    rows = ([t, *(f"{float(column[t - 1]):.8g}" for column in (rates, terms, rmse))] for t in range(len(terms), 0, -1))
    columns = ["t", "rate_bits_per_dim", "term_bits_per_dim", "rmse_grey_levels"]
    atomic.write_csv(out / f"{name}.csv", columns, rows)
    levels = list(range(1, len(terms) + 1))
    bits = plots.Panel(
        "The bound, level by level", {"term": (levels, terms.tolist())}, "noise level t", "bits/dim", log_y=True
    )
    error = plots.Panel("Error of x0^", {"RMSE": (levels, rmse.tolist())}, "noise level t", "grey levels")
    if plots.available():
        atomic.write(out / f"{name}.png", plots.draw([bits, error]))
    else:
        warnings.warn(f"{name}.png is not drawn: matplotlib is not installed", stacklevel=2)


def nll_sampled(
    checkpoint: models.Checkpoint,
    images: data.Images,
    levels_per_image: int,
    ranks: Processes,
    count: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, Any]:
    """An unbiased estimate of the bound of `nll` from `levels_per_image` random levels of each image.

    The first PILOT images are measured at all T levels. The root mean square of the term at each level then gives the
    distribution q(t) from which levels are drawn, by systematic sampling. Each term is weighted by 1/q(t).

    Returns plain JSON values: bits_per_dim and its standard_error, in bits/dim; count, levels_per_image and
    network_calls. The standard error covers both the choice of images and that of levels. Raises InputError for fewer
    than 2 images, for levels_per_image outside 1..T, and for images of more than 8 bits per channel.
    """
    indices, T = subset(images, count), checkpoint.denoiser.schedule.T
    if (n := len(indices)) < 2:
        raise InputError(f"{n} image of {images.name} ({images.split}): want at least 2, for a standard error")
    bits = sampled_bits(checkpoint, images, indices, levels_per_image, ranks, seed, batch_size, progress)
    return {
        "bits_per_dim": float(bits.mean()),
        "standard_error": float(bits.std() / n**0.5),
        "count": n,
        "levels_per_image": levels_per_image,
        "network_calls": n * levels_per_image + min(PILOT, n) * T,
    }


@kernels.frozen()
def sampled_bits(
    checkpoint: models.Checkpoint,
    images: data.Images,
    indices: Sequence[int],
    levels_per_image: int,
    ranks: Processes,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> Tensor:
    """The estimates of `nll_sampled` for the images of these indices, bits/dim, float64 [n].

    Raises InputError as `nll_sampled` does, but takes a single image.
    """
    denoiser, shape, T = checkpoint.denoiser, checkpoint.preset.shape, checkpoint.denoiser.schedule.T
    n = len(indices)
    if not 1 <= levels_per_image <= T:
        raise InputError(f"levels_per_image {levels_per_image}: want 1 to {T}")
    x0 = as_signal(images, indices[:PILOT]).to(ranks.device)
    told, y = conditioning.given(checkpoint, images, indices[:PILOT], x0)
    pilot = likelihood.vlb(told, x0, image_noise(seed, indices[:PILOT], 1, _NLL, shape), y)
    size = torch.cat([pilot.decoder[:, None], pilot.kl], dim=1).square().mean(0).sqrt().cpu()
    q = 0.9 * size / size.sum() + 0.1 / T  # a floor, so that no weight is huge
    cdf = q.cumsum(0)

    bits = torch.zeros(n, dtype=torch.float64)
    for part, batch, x0 in batches(images, indices, ranks, max(1, batch_size // levels_per_image), "nll", progress):
        offsets = torch.tensor([float(torch.rand((), generator=noise.generator(seed, i, _NLL))) for i in batch])
        # systematic sampling: one uniform draw per image, then even steps
        quantiles = (offsets.double()[:, None] + torch.arange(levels_per_image)) / levels_per_image
        t = 1 + torch.searchsorted(cdf, quantiles).clamp(max=T - 1)  # [B, K]
        eps = [image_noise(seed, batch, 2 + k, _NLL, shape)(0) for k in range(levels_per_image)]
        draws = torch.stack(eps, dim=1).to(ranks.device)
        told, y = conditioning.given(checkpoint, images, batch, x0)
        terms = likelihood.sampled_terms(told, x0, t.to(ranks.device), draws, y)
        nats = (terms.cpu() / (levels_per_image * q[t - 1])).sum(1) + likelihood.prior(denoiser, x0.double()).cpu()
        bits[part] = bits_per_dim(nats, pilot.dims)
    return ranks.total(bits)


@kernels.frozen()
def ode(
    checkpoint: models.Checkpoint,
    images: data.Images,
    ranks: Processes,
    count: int | None = None,
    steps: int | None = 100,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, Any]:
    """Bits per dimension by the probability-flow ODE, which defines another density with the same network.

    The figure is independent of the variational bound. Each image gets one uniform draw, one normal draw and one
    Hutchinson probe. The solver visits `steps` noise levels (None: all T). Returns plain JSON values:

    bits_per_dim            with uniform dequantisation, bits/dim
    bits_per_dim_decoder    with the decoder of Eq. 13 between the flow and the grey levels, bits/dim
    standard_error          of the first, over images, draws and probes; None for one image
    standard_error_decoder  of the second
    count, steps            the number of images and of noise levels

    Floating point images have a density instead: nats_per_dim, in the units of the data, and its standard_error.

    Raises InputError for images of more than 8 bits per channel.

    >>> from ddpm.files.opening import open_checkpoint
    >>> checkpoint, alone = open_checkpoint("digits"), Processes(0, 1, torch.device("cpu"))
    >>> images = data.load("digits", (8, 8), 1, split="test")
    >>> result = ode(checkpoint, images, alone, count=2, steps=5, progress=False)
    >>> result["bits_per_dim"] > result["bits_per_dim_decoder"] > 0, result["count"], result["steps"]
    (True, 2, 5)
    """
    denoiser, shape, indices = checkpoint.denoiser, checkpoint.preset.shape, subset(images, count)
    steps = None if steps is None else min(steps, denoiser.schedule.T)
    n = len(indices)
    if images.values.bins is None:
        nats = torch.zeros(n, dtype=torch.float64)
        for part, batch, x0 in batches(images, indices, ranks, batch_size, "ode", progress):
            probe = image_noise(seed, batch, 0, _ODE, shape)(1).sign().to(x0.device)
            told, y = conditioning.given(checkpoint, images, batch, x0)
            nats[part] = probability_flow.density(told, x0, probe, steps, y).cpu() / x0[0].numel()
        nats = ranks.total(nats)
        spread = float(nats.std() / n**0.5) if n > 1 else None
        return {"nats_per_dim": float(nats.mean()), "standard_error": spread, "count": n, "steps": steps}
    bits = torch.zeros(2, n, dtype=torch.float64)
    for part, batch, x0 in batches(images, indices, ranks, batch_size, "ode", progress):
        draws = image_noise(seed, batch, 0, _ODE, shape)
        u, probe, eps = torch.special.ndtr(draws(0).double()), draws(1).sign().to(x0.device), draws(2)
        told, y = conditioning.given(checkpoint, images, batch, x0)
        uniform = probability_flow.bound(told, x0, u.to(x0.device), probe, steps, y)
        decoder = probability_flow.decoder_bound(told, x0, eps.to(x0.device), probe, steps, y)
        bits[:, part] = bits_per_dim(torch.stack([uniform, decoder]), x0[0].numel()).cpu()
    bits = ranks.total(bits)
    mean, error = bits.mean(1).tolist(), (bits.std(1) / n**0.5).tolist() if n > 1 else [None, None]
    return {
        "bits_per_dim": mean[0],
        "standard_error": error[0],
        "bits_per_dim_decoder": mean[1],
        "standard_error_decoder": error[1],
        "count": n,
        "steps": steps,
    }


class Likelihood(NamedTuple):
    """A measure of likelihood.

    function  computes it and returns plain JSON values
    meaning   one line for help
    """

    function: Callable[..., dict[str, Any]]
    meaning: str


LIKELIHOODS = {
    "nll": Likelihood(nll, meaning="the variational bound in bits/dim, at every noise level, as in the paper"),
    "ode": Likelihood(ode, meaning="bits/dim under the probability-flow ODE of the same network"),
}

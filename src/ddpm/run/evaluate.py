"""Bits per dimension: the bound, level by level (Section 4.3), an estimate of it, and the probability-flow ODE's."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm import kernels, likelihood, noise, pixels
from ddpm import ode as probability_flow
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError
from ddpm.files import atomic, data, models, plots
from ddpm.gaussian import bits_per_dim
from ddpm.run.parts import as_signal, batches, draws_of, in_parts, joined, model_key, parts_folder, subset, variance_key
from ddpm.run.processes import Processes

_NLL, _ODE = 0xE7A1, 0x0DE
"""Keys that keep these draws apart from others of the same seed."""
PILOT = 4
"""Images that see every level before the rest see a few, for where the bound's spread is."""


@kernels.frozen()
def nll(
    found: models.Checkpoint,
    images: data.Images,
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
    tables = [variance_key(d) for d in (denoiser, *variants.values())]
    key = [*model_key(found), images.fingerprint, draws, seed, [*variants], tables]
    folder = parts_folder(cache, "nll", key)

    def make(places: slice) -> dict[str, Tensor]:
        batch = rows[places]
        x0 = as_signal(images, batch).to(ranks.device)
        sums: dict[str, Tensor] = {}
        for draw in range(draws):
            for name, value in _tables(denoiser, variants, x0, draws_of(seed, batch, draw, _NLL, shape)).items():
                sums[name] = sums.get(name, 0) + value / draws
        return sums

    table = joined(in_parts(folder, len(rows), ranks, batch_size, "nll", progress, make))
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


def _variants(found: models.Checkpoint) -> dict[str, Denoiser]:
    """The same mean with other variances, where the terms follow from mse."""
    if found.denoiser.learned or found.denoiser.predict == "mu":
        return {}
    names = ["fixed_large", "fixed_small"]
    if models.read_calibration(found) is not None:
        names.append("calibrated")
    return {name: models.with_variance(found, name).denoiser for name in names}


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
    if plots.available():
        atomic.write(out / "nll.png", plots.draw([bits, error]))
    else:
        warnings.warn("nll.png is not drawn: matplotlib is not installed", stacklevel=2)


@kernels.frozen()
def nll_sampled(
    found: models.Checkpoint,
    images: data.Images,
    levels_per_image: int,
    ranks: Processes,
    count: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, Any]:
    """An unbiased estimate of the same bound, bits per dimension, and its standard error: few levels for each image.

    Levels are drawn with q(t) proportional to the root mean square of the term at t, as PILOT images have it, by
    systematic sampling, and weighed by 1/q. The error holds the spread of images and of levels.
    """
    denoiser, shape, T = found.denoiser, found.preset.shape, found.denoiser.schedule.T
    chosen = subset(images, count)
    n = len(chosen)
    if not 1 <= levels_per_image <= T:
        raise InputError(f"levels_per_image {levels_per_image}: want 1 to {T}")
    if n < 2:
        raise InputError(f"{n} image: want at least 2, for a standard error")
    x0 = as_signal(images, chosen[:PILOT]).to(ranks.device)
    whole = likelihood.vlb(denoiser, x0, draws_of(seed, chosen[:PILOT], 1, _NLL, shape))
    spread = torch.cat([whole.decoder[:, None], whole.kl], dim=1).square().mean(0).sqrt().cpu()
    q = 0.9 * spread / spread.sum() + 0.1 / T  # a floor, so that no weight is huge
    cdf = q.cumsum(0)

    sums = torch.zeros(n, dtype=torch.float64)
    for places, rows, x0 in batches(images, chosen, ranks, max(1, batch_size // levels_per_image), "nll", progress):
        first = torch.tensor([float(torch.rand((), generator=noise.generator(seed, i, _NLL))) for i in rows])
        even = (
            first.double()[:, None] + torch.arange(levels_per_image)
        ) / levels_per_image  # systematic: one draw, then even steps
        t = 1 + torch.searchsorted(cdf, even).clamp(max=T - 1)  # [B, K]
        eps = [draws_of(seed, rows, 2 + k, _NLL, shape)(0) for k in range(levels_per_image)]
        terms = likelihood.sampled_terms(denoiser, x0, t.to(ranks.device), torch.stack(eps, dim=1).to(ranks.device))
        nats = (terms.cpu() / (levels_per_image * q[t - 1])).sum(1) + likelihood.prior(denoiser, x0.double()).cpu()
        sums[places] = bits_per_dim(nats, whole.dims)
    sums = ranks.total(sums)
    return {
        "bits_per_dim": float(sums.mean()),
        "standard_error": float(sums.std() / n**0.5),
        "count": n,
        "levels_per_image": levels_per_image,
        "network_calls": n * levels_per_image + min(PILOT, n) * T,
    }


@kernels.frozen()
def ode(
    found: models.Checkpoint,
    images: data.Images,
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
    for places, rows, x0 in batches(images, chosen, ranks, batch_size, "ode", progress):
        draws = draws_of(seed, rows, 0, _ODE, shape)
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


class Likelihood(NamedTuple):
    """A measure of the likelihood of images by name: what computes it, and one line for help."""

    function: Callable[..., dict[str, Any]]
    meaning: str


LIKELIHOODS = {
    "nll": Likelihood(nll, meaning="the variational bound in bits/dim, every level, one draw, as in the paper"),
    "ode": Likelihood(ode, meaning="bits/dim by the probability-flow ODE, another model of the same network"),
}

"""What the paper reports of a model: bits per dimension, level by level (Section 4.3), and sample quality (Table 1)."""

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ddpm import likelihood, metrics, noise, pixels
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError
from ddpm.files import atomic, checkpoints, datasets, features
from ddpm.gaussian import bits_per_dim
from ddpm.run.distributed import Processes

_NLL, _CALIBRATION = 0xE7A1, 0xCA1B
"""Keys that keep the draws of these apart from others of the same seed."""

PILOT = 4
"""Images that see every level before the rest see a few, for where the bound's spread is."""


def _draws(seed: int, images: Sequence[int], draw: int, key: int, shape: Sequence[int]) -> noise.Noise:
    """The noise of these images of a data set: a function of (seed, image, draw, level), not of the batch."""
    return noise.per_image([noise.mix(seed, image, draw, key) for image in images], shape)


def calibrate(
    denoiser: Denoiser,
    images: datasets.Images,
    count: int,
    ranks: Processes,
    batch_size: int = 64,
    progress: bool = True,
) -> Tensor:
    """mse_t, the mean of |x_0 - x0^(x_t)|^2 / D at levels 1..T, over `count` images to train on: float64 [T]."""
    count = min(count, len(images))
    rows = noise.generator(_CALIBRATION)
    chosen = torch.randperm(len(images), generator=rows)[:count][list(ranks.mine(count))]
    total = torch.zeros(denoiser.schedule.T, dtype=torch.float64)
    with tqdm(total=len(chosen), desc="calibrating", unit="image", disable=None if progress else True) as bar:
        for start in range(0, len(chosen), batch_size):
            part = chosen[start : start + batch_size]
            x0 = pixels.to_signal(images.batch(part)).to(ranks.device)
            draws = _draws(0, part.tolist(), 0, _CALIBRATION, x0.shape[1:])
            total += likelihood.vlb(denoiser, x0, draws).mse.sum(0).cpu()
            bar.update(len(part))
    return ranks.total(total) / count


def nll(
    found: checkpoints.Checkpoint,
    images: datasets.Images,
    out: Path,
    ranks: Processes,
    count: int | None = None,
    draws: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    mse: Tensor | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """The bound of `images` (Eq. 5), all T levels of each, `draws` draws a level: bits per dimension.

    Official settings are one draw, x0^ clipped as the model does. What is done is kept under `out`, so that the same
    call goes on where it stopped, and split over processes. mse [T] from `calibrate` adds the calibrated variance.
    Writes out/nll.csv: a row a level. Returns plain JSON values; all but `count` and settings in bits/dim:
    bits_per_dim and its standard_error over images, prior (L_T), rate (L_1 .. L_T), distortion (L_0), and
    by_variance: the bound for fixed_large, fixed_small and, given mse, calibrated.
    """
    denoiser, shape = found.denoiser, found.preset.shape
    n = len(images) if count is None else min(count, len(images))
    variants = _variants(denoiser, mse)
    model = [checkpoints.file_sha256(found.path), found.preset.precision]
    about: list[Any] = [*model, images.fingerprint, draws, seed, [*variants]]
    about.append(None if mse is None else mse.tolist())
    folder = out / f"parts-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, n, batch_size)
    mine = [starts[i] for i in ranks.mine(len(starts))]
    with tqdm(total=len(mine), desc="nll", unit="batch", disable=None if progress else True) as bar:
        for start in mine:
            rows = range(start, min(start + batch_size, n))
            part = folder / f"{rows.start:08d}-{rows.stop:08d}.safetensors"
            if not part.is_file():
                x0 = pixels.to_signal(images.batch(rows)).to(ranks.device)
                sums: dict[str, Tensor] = {}
                for draw in range(draws):
                    for name, value in _tables(denoiser, variants, x0, _draws(seed, rows, draw, _NLL, shape)).items():
                        sums[name] = sums.get(name, 0) + value / draws
                temporary = part.with_suffix(f".{ranks.rank}.tmp")
                save_file({name: value.contiguous() for name, value in sums.items()}, temporary)
                temporary.replace(part)
            bar.update()
    ranks.any(False)  # all parts are there
    parts = [load_file(folder / f"{s:08d}-{min(s + batch_size, n):08d}.safetensors") for s in starts]
    table = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if ranks.first:
        _write_table(out / "nll.csv", table)
    per_image = table["prior"] + table["terms"].sum(1)
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


def _variants(denoiser: Denoiser, mse: Tensor | None) -> dict[str, Denoiser]:
    """The same mean with other variances, where the terms follow from mse."""
    if denoiser.learned or denoiser.predict == "mu":
        return {}
    found = {name: replace(denoiser, variance=name) for name in ("fixed_large", "fixed_small")}
    if mse is not None:
        table = likelihood.calibrated_variance(denoiser.schedule, mse)
        found["calibrated"] = replace(denoiser, variance=table)
    return found


def _tables(denoiser: Denoiser, variants: dict[str, Denoiser], x0: Tensor, draws: noise.Noise) -> dict[str, Tensor]:
    """Bits/dim of a batch: prior [B], terms [B, T] (L_0, L_1 .. L_{T-1}), each variant's sum [B]; and mse [B, T]."""
    bound = likelihood.vlb(denoiser, x0, draws)
    terms = torch.cat([bound.decoder[:, None], bound.kl], dim=1)
    found = {"prior": bits_per_dim(bound.prior, bound.dims), "terms": bits_per_dim(terms, bound.dims), "mse": bound.mse}
    for name, variant in variants.items():
        other = likelihood.with_variance(bound, variant, x0, draws)
        found[name] = bits_per_dim(other.kl.sum(1) + other.decoder, bound.dims)
    return {name: value.cpu() for name, value in found.items()}


def _write_table(path: Path, table: dict[str, Tensor]) -> None:
    """A row a level t: the term at t, the rate sent once t is done (L_T .. L_t), both bits/dim, RMSE in grey levels."""
    terms, mse = table["terms"].mean(0), table["mse"].mean(0)
    sent = table["prior"].mean() + terms.flip(0).cumsum(0).flip(0)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["t", "term_bits_per_dim", "sum_from_T_bits_per_dim", "rmse_grey_levels"])
    for t in range(len(terms), 0, -1):
        rmse = float(mse[t - 1].sqrt() / pixels.BIN)
        writer.writerow([t, f"{float(terms[t - 1]):.8g}", f"{float(sent[t - 1]):.8g}", f"{rmse:.6g}"])
    atomic.write(path, text.getvalue())


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
    n = len(images) if count is None else min(count, len(images))
    if not 1 <= levels <= T or n < 2:
        raise InputError(f"levels {levels}: want 1 to {T}, of at least 2 images")
    pilot = range(min(PILOT, n))
    x0 = pixels.to_signal(images.batch(pilot)).to(ranks.device)
    whole = likelihood.vlb(denoiser, x0, _draws(seed, pilot, 1, _NLL, shape))
    spread = torch.cat([whole.decoder[:, None], whole.kl], dim=1).square().mean(0).sqrt().cpu()
    q = 0.9 * spread / spread.sum() + 0.1 / T  # a floor, so that no weight is huge
    cdf = q.cumsum(0)

    mine = list(ranks.mine(n))
    sums = torch.zeros(n, dtype=torch.float64)
    step = max(1, batch_size // levels)
    with tqdm(total=len(mine), desc="nll", unit="image", disable=None if progress else True) as bar:
        for start in range(0, len(mine), step):
            rows = mine[start : start + step]
            x0 = pixels.to_signal(images.batch(rows)).to(ranks.device)
            first = torch.tensor([float(np.random.default_rng(noise.mix(seed, i, _NLL)).random()) for i in rows])
            places = (first.double()[:, None] + torch.arange(levels)) / levels  # systematic: one draw, then even steps
            t = 1 + torch.searchsorted(cdf, places).clamp(max=T - 1)  # [B, K]
            eps = [_draws(seed, rows, 2 + k, _NLL, shape)(0) for k in range(levels)]
            terms = likelihood.sampled_terms(denoiser, x0, t.to(ranks.device), torch.stack(eps, dim=1).to(ranks.device))
            nats = (terms.cpu() / (levels * q[t - 1])).sum(1) + likelihood.prior(denoiser, x0.double()).cpu()
            sums[rows] = bits_per_dim(nats, whole.dims)
            bar.update(len(rows))
    sums = ranks.total(sums)
    return {
        "bits_per_dim": float(sums.mean()),
        "standard_error": float(sums.std() / n**0.5),
        "count": n,
        "levels": levels,
        "network_calls": n * levels + len(pilot) * T,
    }


QUALITY = ("fid", "is", "kid", "pr")


def quality(
    wanted: Sequence[str],
    samples: Tensor,
    images: datasets.Images,
    network: features.Network,
    out: Path,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Sample quality of `samples`, uint8 [N, C, H, W], against all of `images`, with the features of `network`.

    wanted names some of fid, is, kid, pr. The Frechet distance is called fid where the network is Inception of 2015,
    and frechet_distance otherwise. Statistics of the images are kept under `out` for the next time. Returns plain JSON
    values. Raises InputError where there are too few samples, or the network gives no class probabilities for `is`.
    """
    if len(samples) < 3 and set(wanted) - {"is"}:
        raise InputError(f"{len(samples)} samples: want at least 3")
    rows, classes = bool({"kid", "pr"} & set(wanted)), "is" in wanted
    fake = features.measure(network, samples, keep_features=rows, keep_probabilities=classes, progress=progress)
    found: dict[str, Any] = {"samples": len(samples), "features": network.name, "features_weights": network.weights}
    if rows or "fid" in wanted:
        where = features.provenance(images, network)
        key = hashlib.sha256(json.dumps([where.fingerprint, where.comparable()]).encode()).hexdigest()[:16]
        file = out / f"statistics-{key}.npz"
        if rows or not file.is_file():
            real = features.measure(network, images, keep_features=rows, progress=progress)
            features.save_statistics(file, real.moments, where)
        statistics = features.load_statistics(file, where.comparable())
        found["images"] = statistics.moments.count
    if "fid" in wanted:
        name = "fid" if network.weights == features.SHA256 else "frechet_distance"
        found[name] = metrics.frechet_distance(statistics.moments, fake.moments)
    if classes:
        assert fake.probabilities is not None
        splits = 10 if len(samples) >= 100 else 1
        found["inception_score"], found["inception_score_std"] = metrics.inception_score(fake.probabilities, splits)
    if rows:
        assert real.features is not None
        assert fake.features is not None
        if "kid" in wanted:
            value, error = metrics.kid(real.features, fake.features, seed=seed, device=device)
            found |= {"kid": value, "kid_standard_error": error}
        if "pr" in wanted:
            precision, recall = metrics.precision_recall(real.features, fake.features, device=device)
            found |= {"precision": precision, "recall": recall}
    return found


def read_samples(path: Path, shape: Sequence[int]) -> Tensor:
    """Saved samples, uint8 [N, C, H, W]: an .npz as `ddpm sample` writes it, or a folder of pictures of that size."""
    if path.suffix.lower() != ".npz":
        folder = datasets.load(str(path), (shape[1], shape[2]), shape[0])
        return folder.batch(range(len(folder)))
    try:
        with np.load(path, allow_pickle=False) as file:
            array = file[file.files[0]]
    except (OSError, ValueError, IndexError, KeyError, EOFError) as error:
        raise InputError(
            f"{path}: not an .npz of images ({error}); want what `ddpm sample --out FILE.npz` writes"
        ) from None
    wanted = (shape[1], shape[2], shape[0])
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != wanted:
        raise InputError(
            f"{path}: holds {array.dtype} {list(array.shape)}; want uint8 [N, {', '.join(map(str, wanted))}]"
        )
    return torch.from_numpy(array).permute(0, 3, 1, 2)

"""Measure the best variances of a model, and the codec's tables."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm import kernels, likelihood
from ddpm.errors import InputError
from ddpm.files import data, models
from ddpm.gaussian import q_sample
from ddpm.run import conditioning
from ddpm.run.parts import (
    CALIBRATION,
    as_signal,
    compute_parts,
    image_noise,
    model_key,
    parts_folder,
    read_parts,
    state_of,
    subset,
    sum_parts,
)
from ddpm.run.processes import Processes

_FITTED = 5000
"""The codec's tables are fitted to the errors of at most so many images: 8 bytes for each of their levels in memory."""


@kernels.frozen()
def calibrate(
    checkpoint: models.Checkpoint,
    images: data.Images,
    cache: Path,
    ranks: Processes,
    count: int = 500,
    batch_size: int = 64,
    progress: bool = True,
    codec: int = 32,
) -> Tensor:
    """Measure mse_t, the mean of |x_0 - x0^(x_t)|^2 / D, at levels 1..T on `count` training images: float64 [T].

    The calibration file beside the weights gets three things, for the likelihood, the samplers and the codec:

    mse             mse_t, from which the best variances follow (Bao et al. 2022)
    first_variance  the sigma_1^2 of the least L_0 on the same images, to within 6%
    codec           the codec's tables, fitted on the first `codec` images; 0 keeps the tables that the file has. There
                    are none for a model that the codec does not take, as `models.why_no_codec` says

    Finished batches are stored under `cache`, so the same call, or one for more images, resumes where it stopped.
    Raises InputError for mu prediction and for a learned variance, since the best variance does not follow from mse_t
    then.
    """
    denoiser = checkpoint.denoiser
    fits_codec = codec > 0 and models.why_no_codec(checkpoint) is None
    if fits_codec:
        from ddpm.run import compress  # now, since it raises InputError if the extra `codec` is not installed
    if not denoiser.bound_follows_from_mse:
        reason = "gives its own variance" if denoiser.learned else "predicts mu, whose error is not that of x0^"
        raise InputError(f"{checkpoint.path}: the network {reason}; want eps, x0 or v and a fixed variance")
    indices = subset(images, count)
    lowest = math.floor(2 * math.log10(denoiser.values.bin)) - 2  # -7 for 8 bits: a grey level squared is 6e-5
    variances = torch.logspace(lowest, 0, 1 - 20 * lowest, dtype=torch.float64)

    def measure(part: slice) -> dict[str, Tensor]:
        batch = indices[part]
        x0 = as_signal(images, batch).to(ranks.device)
        draws = image_noise(0, batch, 0, CALIBRATION, x0.shape[1:])
        told, y = conditioning.given(checkpoint, images, batch, x0)
        mse = likelihood.vlb(told, x0, draws, y).mse
        first = torch.ones(len(x0), dtype=torch.int64, device=x0.device)
        mean = told(q_sample(denoiser.schedule, x0.double(), first, draws(1).to(x0.device).double()), first, y).mean
        cost = likelihood.decoder_cost(x0, mean, variances.to(x0.device), denoiser.values)
        return {"mse": mse.cpu(), "cost": cost.cpu()[None]}

    folder = parts_folder(cache, "calibration", [*model_key(checkpoint), state_of(images, ranks)])
    files = compute_parts(folder, len(indices), ranks, batch_size, "calibrating", progress, measure)
    total = sum_parts(files, ["mse", "cost"])
    mse, first_variance = total["mse"] / len(indices), float(variances[total["cost"].argmin()])
    if ranks.first:
        about: dict[str, Any] = {
            "data": images.name, "split": images.split, "fingerprint": images.fingerprint, "count": len(indices),
            "precision": checkpoint.preset.precision,
        }  # fmt: skip
        tables = models.codec_tables(checkpoint)
        if fits_codec:
            errors = read_parts(files[: -(-_FITTED // batch_size)], ["mse"])["mse"][:_FITTED]
            tables = compress.fit_tables(denoiser, errors, images.batch(indices[:codec]), progress)
        if tables:
            about["codec"] = tables
        models.save_calibration(checkpoint, mse, first_variance, about)
    return mse

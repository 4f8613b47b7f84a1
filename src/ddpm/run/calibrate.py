"""Measure the best variances of a model, and the codec's tables."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm import kernels, likelihood
from ddpm.errors import InputError
from ddpm.files import data, models
from ddpm.gaussian import q_sample
from ddpm.run.parts import CALIBRATION, as_signal, draws_of, in_parts, joined, model_key, parts_folder, subset
from ddpm.run.processes import Processes


@kernels.frozen()
def calibrate(
    found: models.Checkpoint,
    images: data.Images,
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
    denoiser, makes_tables = found.denoiser, codec > 0 and images.channels in (1, 3)
    if makes_tables:
        from ddpm.run import compress  # needs the extra `codec`, which may be missing: said before the work
    if denoiser.learned or denoiser.predict == "mu":
        why = "gives its own variance" if denoiser.learned else "predicts mu, whose error is not that of x0^"
        raise InputError(f"{found.path}: the network {why}; want eps, x0 or v and a fixed variance")
    chosen = subset(images, count)
    variances = torch.logspace(-7, 0, 141, dtype=torch.float64)  # a grey level is 6e-5

    def make(places: slice) -> dict[str, Tensor]:
        rows = chosen[places]
        x0 = as_signal(images, rows).to(ranks.device)
        draws = draws_of(0, rows, 0, CALIBRATION, x0.shape[1:])
        mse = likelihood.vlb(denoiser, x0, draws).mse
        first = torch.ones(len(x0), dtype=torch.int64, device=x0.device)
        mean = denoiser(q_sample(denoiser.schedule, x0.double(), first, draws(1).to(x0.device).double()), first).mean
        return {"mse": mse.cpu(), "cost": likelihood.decoder_cost(x0, mean, variances.to(x0.device)).cpu()[None]}

    folder = parts_folder(cache, "calibration", [*model_key(found), images.fingerprint])
    made = joined(in_parts(folder, len(chosen), ranks, batch_size, "calibrating", progress, make))
    mse, sigma = made["mse"].mean(0), float(variances[made["cost"].sum(0).argmin()])
    if ranks.first:
        about: dict[str, Any] = {
            "data": images.name, "split": images.split, "fingerprint": images.fingerprint, "count": len(chosen),
            "precision": found.preset.precision,
        }  # fmt: skip
        tables = models.codec_tables(found)
        if makes_tables:
            some = images.batch(torch.tensor(chosen[:codec]))
            tables = compress.tables(denoiser, made["mse"], some, progress)
        if tables:
            about["codec"] = tables
        models.save_calibration(found, mse, sigma, about)
    return mse

"""The held-out loss: L_simple of images that are not trained on, by noise level."""

import math
from collections.abc import Callable

import torch

from ddpm import kernels, losses, noise, pixels
from ddpm.denoiser import Denoiser
from ddpm.files import data
from ddpm.presets import Preset
from ddpm.run import conditioning
from ddpm.run.processes import Processes

BUCKETS = 10
"""Equal ranges of t in which the held-out loss is logged."""
HELD_OUT_SEED = 1 << 40  # far from the seeds of runs, so that held-out draws are the same in every run


@torch.no_grad()
@kernels.frozen()
def held_out_by_level(
    denoiser: Denoiser, held_out: data.Images, n: int, ranks: Processes, preset: Preset | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> list[float]:  # fmt: skip
    """L_simple of held-out images in BUCKETS equal ranges of t, lowest first: the means of `n` noisy images.

    Noisy image i is image i modulo the number of images, so that a few images are seen at many levels. It has a level
    and a noise of its own, which are the same in every run and for any number of processes. A range of t without an
    image is nan. A range with a loss that is not a number is inf.

    preset  says whether the network is told the labels, and of which condition; None: neither
    stop    if it returns true, the function returns early with the means so far
    """
    T = denoiser.schedule.T
    t = 1 + (torch.randperm(n, generator=noise.generator(HELD_OUT_SEED)) * T + T // 2) // n
    sums = torch.zeros(2, BUCKETS, dtype=torch.float64)
    mine = ranks.mine(n)
    for start in range(0, len(mine), 64):
        if stop():
            break
        rows = list(mine[start : start + 64])
        places = [i % len(held_out) for i in rows]
        x0 = pixels.to_signal(held_out.batch(places), denoiser.values).to(ranks.device)
        eps = noise.normal([noise.mix(HELD_OUT_SEED, i) for i in rows], x0.shape[1:]).to(ranks.device)
        y = condition = None
        if preset is not None:
            y = held_out.labels[places].to(ranks.device) if preset.classes and held_out.labels is not None else None
            condition = conditioning.of_images(preset, held_out, places, x0)
        loss = losses.simple(denoiser.given(condition), x0, t[rows].to(ranks.device), eps, y).cpu().double()
        bucket = (t[rows] - 1) * BUCKETS // T
        sums[0].index_add_(0, bucket, loss.where(~loss.isnan(), math.inf))
        sums[1].index_add_(0, bucket, torch.ones_like(loss))
    total, count = ranks.total(sums)
    means: list[float] = (total / count).tolist()
    return means

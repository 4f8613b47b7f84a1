"""From noise to images: each sampler is a generator of Step(t, x, x0); the caller keeps what it wants."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm.denoiser import Denoiser
from ddpm.errors import InputError
from ddpm.noise import Noise


class Step(NamedTuple):
    """The state after one network call.

    t   the level x is at now, T-1 .. 0
    x   [B, C, H, W] signal; the image where t = 0
    x0  the estimate x0^ (Eq. 15) that the step was made with, of x's shape
    """

    t: int
    x: Tensor
    x0: Tensor


@torch.no_grad()
def ancestral(
    denoiser: Denoiser,
    x: Tensor,
    noise: Noise,
    steps: int | None = None,
    y: Tensor | None = None,
    start: int | None = None,
) -> Iterator[Step]:
    """Algorithm 2: x_{t-1} = mu_theta(x_t, t) + sigma_t z, z = 0 at t = 1.

    x [B, C, H, W] is x_T, standard normal, or x_t at the level t = start; noise(t) is the draw that makes x_t; steps
    is how many of the levels to visit, evenly (None: all); y int64 [B] class labels or None. Yields one Step a
    network call.

    >>> from ddpm import schedule
    >>> from ddpm.noise import per_image
    >>> grey = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear(), predict="x0")
    >>> noise = per_image([0], (1, 4, 4))
    >>> *_, last = ancestral(grey, noise(1000), noise, steps=10)
    >>> last.t, float(last.x.abs().max())
    (0, 0.0)
    """
    start = denoiser.schedule.T if start is None else start
    levels = denoiser.schedule.levels(start if steps is None else steps, start)
    if len(levels) != start:
        denoiser = denoiser.respace(levels)
    for index in range(len(levels), 0, -1):
        estimate = denoiser(x, torch.full((len(x),), index, device=x.device), y)
        t = levels[index - 2] if index > 1 else 0  # the level that this step arrives at
        x = estimate.p.sample(noise(t)) if t > 0 else estimate.mean
        yield Step(t, x, estimate.x0)


@torch.no_grad()
def ddim(
    denoiser: Denoiser,
    x: Tensor,
    steps: int = 50,
    eta: float = 0.0,
    noise: Noise | None = None,
    y: Tensor | None = None,
    start: int | None = None,
) -> Iterator[Step]:
    """DDIM (Song et al. 2021, Eq. 12): x_s = sqrt(abar_s) x0^ + sqrt(1 - abar_s - sigma^2) eps^ + sigma z.

    sigma^2 = eta^2 (1 - abar_s)/(1 - abar_t) (1 - abar_t/abar_s). eta 0 is deterministic and needs no noise; eta 1
    has the posterior's variance. x [B, C, H, W] is x_T, or x_t at the level t = start; steps of the levels up to there
    are visited, evenly, that one first. eps^ belongs to the clipped x0^, so that x_t stays their mixture. Yields one
    Step a network call.

    >>> from ddpm import schedule
    >>> grey = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear(), predict="x0")
    >>> *_, last = ddim(grey, torch.ones(1, 1, 4, 4), steps=5)
    >>> last.t, float(last.x.abs().max())
    (0, 0.0)
    """
    if not 0 <= eta <= 1 or (eta > 0 and noise is None):
        raise InputError(f"eta {eta}: want 0 to 1, and noise where it is above 0")
    levels = [0, *denoiser.schedule.levels(steps, start)]
    abar = denoiser.schedule.alpha_bar.tolist()
    for s, t in zip(levels[-2::-1], levels[:0:-1], strict=True):
        estimate = denoiser(x, torch.full((len(x),), t, device=x.device), y)
        variance = eta**2 * (1 - abar[s]) / (1 - abar[t]) * (1 - abar[t] / abar[s])
        x = math.sqrt(abar[s]) * estimate.x0 + math.sqrt(1 - abar[s] - variance) * estimate.eps
        if eta > 0 and s > 0:
            assert noise is not None
            x = x + math.sqrt(variance) * noise(s)
        yield Step(s, x, estimate.x0)

"""Spacings: which of the T levels a sampler visits. Each returns a rising list that ends at the level to start from.

Every sampler takes such a list as its `steps`; a number alone means `uniform`. The arguments are those of
`Schedule.levels`, and so are the errors.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ddpm import float64, pixels
from ddpm.errors import InputError, whole_number
from ddpm.schedule import Schedule


def uniform(schedule: Schedule, steps: int, start: int | None = None) -> list[int]:
    """Levels evenly over 1..start (None: T), as in published samplers.

    >>> from ddpm import schedule
    >>> uniform(schedule.linear(), 4)
    [250, 500, 750, 1000]
    """
    return schedule.levels(steps, start)


def quadratic(schedule: Schedule, steps: int, start: int | None = None) -> list[int]:
    """Levels that rise as i^2, which are closer together near data (Song et al. 2021, DDIM, Appendix D.2).

    >>> from ddpm import schedule
    >>> quadratic(schedule.linear(), 4)
    [62, 250, 562, 1000]
    """
    steps, start = _count(schedule, steps, start)
    return _distinct(start * (torch.arange(1, steps + 1) / steps) ** 2, start)


def log_snr(schedule: Schedule, steps: int, start: int | None = None) -> list[int]:
    """Levels evenly in log-SNR from level 1 to start (Lu et al. 2022, DPM-Solver).

    With one step, that level is `start`. Raises InputError if the schedule has no log-SNR at `start`, where abar is 0.

    >>> from ddpm import schedule
    >>> log_snr(schedule.linear(), 4)
    [1, 74, 604, 1000]
    """
    steps, start = _count(schedule, steps, start)
    first, last = schedule.half_log_snr[[1, start]].tolist()
    return _nearest(schedule, torch.linspace(last, first, steps, dtype=torch.float64).flip(0), start)


def karras(schedule: Schedule, steps: int, start: int | None = None, rho: float = 7.0) -> list[int]:
    """Levels evenly in (sigma/alpha)^(1/rho) from level 1 to start (Karras et al. 2022, Eq. 5).

    Raises InputError as `log_snr` does.

    >>> from ddpm import schedule
    >>> karras(schedule.linear(), 4)
    [1, 302, 776, 1000]
    """
    steps, start = _count(schedule, steps, start)
    first, last = (-schedule.half_log_snr[[1, start]] / rho).exp().tolist()
    return _nearest(schedule, -rho * torch.linspace(last, first, steps, dtype=torch.float64).flip(0).log(), start)


SPACINGS = {"uniform": uniform, "quadratic": quadratic, "log_snr": log_snr, "karras": karras}


def _count(schedule: Schedule, steps: int, start: int | None) -> tuple[int, int]:
    """The number of levels, and the level to start from, as Python's integers; the errors of `Schedule.levels`."""
    levels = schedule.levels(steps, start)
    return len(levels), levels[-1]


def _nearest(schedule: Schedule, wanted: Tensor, start: int) -> list[int]:
    """The levels nearest to `wanted`, falling values of 1/2 log-SNR; each level once, and the last one `start`."""
    if not wanted.isfinite().all():
        raise InputError(
            "spacing: the schedule ends at alpha_bar 0, which has no log-SNR; want ancestral or ddim on uniform levels"
        )
    half_log_snr = schedule.half_log_snr[1:].cpu()
    nearest = (half_log_snr - wanted[:, None]).abs().argmin(1) + 1
    nearest[-1] = start
    return _distinct(nearest, start)


def _distinct(wanted: Tensor, start: int) -> list[int]:
    """Round the levels and make them distinct: a level that is in use moves up, or down if none is free above."""
    i = torch.arange(len(wanted))  # levels rise by at least one if level - i does not fall
    offset = (wanted.round().long() - i).cummax(0).values.clamp(1, start - len(wanted) + 1)
    return (offset + i).tolist()


def optimised(cost: Tensor, steps: int) -> list[int]:
    """The levels of least total cost, found exactly by dynamic programming (Watson et al. 2021).

    cost   float [T+1, T+1]: cost[s, t] is the cost of a step from level t down to s < t, as `bound_cost` or `path_cost`
           computes it
    steps  the number of levels, 1..T

    Returns rising levels, the last one T. Raises InputError for steps out of range.

    >>> cost = torch.tensor([[0.0, 1, 5, 9], [0, 0, 1, 1], [0, 0, 0, 9], [0, 0, 0, 0]])
    >>> optimised(cost, 2), optimised(cost, 1)
    ([1, 3], [3])
    """
    T = len(cost) - 1
    steps = whole_number("steps", steps, 1, T)
    allowed = cost.double().masked_fill(torch.ones_like(cost, dtype=torch.bool).tril(), math.inf)  # s < t only
    best = torch.full((T + 1,), math.inf, dtype=torch.float64)
    best[0] = 0.0
    came_from = []
    for _ in range(steps):
        best, s = (best[:, None] + allowed).min(0)  # the cheapest path from each t to 0 with one more step
        came_from.append(s)
    levels = [T]
    for s in reversed(came_from[1:]):
        levels.append(int(s[levels[-1]]))
    return levels[::-1]


def bound_cost(schedule: Schedule, mse: Tensor, bin: float = pixels.BIN) -> Tensor:
    """What a step from t to s adds to the bound at the best variance, nats/dim: float64 [T+1, T+1] as cost[s, t].

    mse float64 [T] is the mean squared error of x0^ at levels 1..T, which `ddpm calibrate` measures. For s > 0 the cost
    is E KL(q(x_s|x_t, x_0) || p(x_s|x_t)) = 1/2 log(1 + (SNR_s - SNR_t) mse_t) with SNR = abar / (1 - abar): this is
    Eq. 6-7 between levels s and t with the variance of Bao et al. 2022. For s = 0 it is the entropy of pixels with
    errors of mse_t, whose bins are `bin` signal units wide.

    >>> from ddpm import schedule
    >>> cost = bound_cost(schedule.linear(), torch.linspace(1e-4, 0.3, 1000))
    >>> optimised(cost, 5)[-1]
    1000
    """
    error = torch.cat([torch.zeros(1), mse]).double()
    snr = (2 * schedule.half_log_snr).exp().cpu()
    snr[0] = 0  # SNR_0 is infinite; the row of level 0 is computed below
    cost = 0.5 * ((snr[:, None] - snr).clamp(min=0) * error).log1p()
    cost[0] = 0.5 * (2 * math.pi * math.e * (error / bin**2 + 1 / 12)).log()
    return cost


def path_cost(schedule: Schedule, x: Tensor, path: Iterable[tuple[int, Tensor, Tensor]]) -> Tensor:
    """The distance cost[s, t] between a DDIM step from t to s and the path through all levels, float64 [T+1, T+1].

    x     [B, C, H, W], x_T
    path  the Steps (t, x, x0) of `ddim` from x through all levels

    The distance is the root mean square over images and dimensions of the error of x_s, in signal units. A sum of these
    distances counts every error as if it reached the image undiminished, so it is an upper estimate of the error of the
    image, which `optimised` should make small. The memory holds x and x0 of T levels in float64.

    >>> from ddpm import Denoiser, samplers, schedule
    >>> s, x = schedule.linear(20, 1e-3, 0.6), torch.randn(2, 1, 4, 4)
    >>> grey = Denoiser(lambda x, timestep, y: torch.zeros_like(x), s, predict="x0")
    >>> float(path_cost(s, x, samplers.ddim(grey, x, 20)).max()) < 1e-6  # every step is exact
    True
    """
    T, N = schedule.T, x.numel()
    xs, x0s = torch.zeros(T + 1, N, dtype=torch.float64), torch.zeros(T + 1, N, dtype=torch.float64)
    xs[T] = float64.convert(x).flatten()
    for t, xt, x0 in path:
        xs[t], x0s[t + 1] = float64.convert(xt).flatten(), float64.convert(x0).flatten()
    signal, sigma = schedule.alpha_bar.sqrt().cpu()[:, None], (1 - schedule.alpha_bar).sqrt().cpu()[:, None]
    eps = torch.zeros_like(xs)
    eps[1:] = (xs[1:] - signal[1:] * x0s[1:]) / sigma[1:]
    # |signal_s x0_t + sigma_s eps_t - x_s|^2, multiplied out; s indexes rows and t columns
    ends = signal**2 * _dots(x0s, x0s) + sigma**2 * _dots(eps, eps) + 2 * signal * sigma * _dots(x0s, eps)
    mixed = signal * (xs @ x0s.T) + sigma * (xs @ eps.T)
    return ((ends - 2 * mixed + _dots(xs, xs)[:, None]).clamp(min=0) / N).sqrt().triu(1)


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """The dot product of each row of a with the same row of b, [T, N] -> [T]."""
    return (a * b).sum(1)

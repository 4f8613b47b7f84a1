"""Which of the T levels a sampler visits: rising lists that end at the level it starts from.

Every sampler takes such a list for its `steps`; a number alone is `uniform`.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ddpm import pixels
from ddpm.errors import InputError
from ddpm.schedule import Schedule


def uniform(schedule: Schedule, steps: int, start: int | None = None) -> list[int]:
    """`steps` levels evenly over 1..start (None: T), as published samplers take them.

    >>> from ddpm import schedule
    >>> uniform(schedule.linear(), 4)
    [250, 500, 750, 1000]
    """
    return schedule.levels(steps, start)


def quadratic(schedule: Schedule, steps: int, start: int | None = None) -> list[int]:
    """Levels that rise as i^2, closer near data (Song et al. 2021, DDIM, Appendix D.2).

    >>> from ddpm import schedule
    >>> quadratic(schedule.linear(), 4)
    [62, 250, 562, 1000]
    """
    start = schedule.levels(steps, start)[-1]
    return _distinct(start * (torch.arange(1, steps + 1) / steps) ** 2, start)


def log_snr(schedule: Schedule, steps: int, start: int | None = None) -> list[int]:
    """Levels evenly in log-SNR from level 1 to start (Lu et al. 2022, DPM-Solver); `start` alone for one step.

    >>> from ddpm import schedule
    >>> log_snr(schedule.linear(), 4)
    [1, 74, 604, 1000]
    """
    start = schedule.levels(steps, start)[-1]
    first, last = schedule.half_log_snr[[1, start]].tolist()
    return _nearest(schedule, torch.linspace(last, first, steps, dtype=torch.float64).flip(0), start)


def karras(schedule: Schedule, steps: int, start: int | None = None, rho: float = 7.0) -> list[int]:
    """Levels evenly in (sigma/alpha)^(1/rho) from level 1 to start (Karras et al. 2022, Eq. 5).

    >>> from ddpm import schedule
    >>> karras(schedule.linear(), 4)
    [1, 302, 776, 1000]
    """
    start = schedule.levels(steps, start)[-1]
    first, last = (-schedule.half_log_snr[[1, start]] / rho).exp().tolist()
    return _nearest(schedule, -rho * torch.linspace(last, first, steps, dtype=torch.float64).flip(0).log(), start)


SPACINGS = {"uniform": uniform, "quadratic": quadratic, "log_snr": log_snr, "karras": karras}


def _nearest(schedule: Schedule, wanted: Tensor, start: int) -> list[int]:
    """The levels nearest to `wanted` in 1/2 log-SNR, falling, each once, the last one `start`."""
    if not wanted.isfinite().all():
        raise InputError(
            "spacing: the schedule ends at alpha_bar 0, which has no log-SNR; want ancestral or ddim on uniform levels"
        )
    clock = schedule.half_log_snr[1:].cpu()
    nearest = (clock - wanted[:, None]).abs().argmin(1) + 1
    nearest[-1] = start
    return _distinct(nearest, start)


def _distinct(wanted: Tensor, start: int) -> list[int]:
    """Rounded, with no level twice: one that is taken moves up, or down where there is no room above."""
    i = torch.arange(len(wanted))  # rising by at least one is: level - i does not fall
    room = (wanted.round().long() - i).cummax(0).values.clamp(1, start - len(wanted) + 1)
    return (room + i).tolist()


def optimised(cost: Tensor, steps: int) -> list[int]:
    """The levels of least total cost, exactly, by dynamic programme (Watson et al. 2021).

    cost float [T+1, T+1]: cost[s, t] of a step from level t down to s < t, as `bound_cost` or `path_cost` measure it.
    Returns `steps` rising levels, the last one T. Raises InputError for steps out of range.

    >>> cost = torch.tensor([[0.0, 1, 5, 9], [0, 0, 1, 1], [0, 0, 0, 9], [0, 0, 0, 0]])
    >>> optimised(cost, 2), optimised(cost, 1)
    ([1, 3], [3])
    """
    T = len(cost) - 1
    if not 1 <= steps <= T:
        raise InputError(f"steps {steps}: want 1 to {T}, the number of noise levels")
    down = cost.double().masked_fill(torch.ones_like(cost, dtype=torch.bool).tril(), math.inf)  # s < t only
    best = torch.full((T + 1,), math.inf, dtype=torch.float64)
    best[0] = 0.0
    came_from = []
    for _ in range(steps):
        best, s = (best[:, None] + down).min(0)  # over s: the cheapest way from each t to 0 in one step more
        came_from.append(s)
    levels = [T]
    for s in reversed(came_from[1:]):
        levels.append(int(s[levels[-1]]))
    return levels[::-1]


def bound_cost(schedule: Schedule, mse: Tensor) -> Tensor:
    """What each step adds to the bound with the best variance, nats per dimension, float64 [T+1, T+1] as cost[s, t].

    mse float64 [T] is x0^'s mean squared error at levels 1..T, as `ddpm calibrate` measures it. For s > 0 the cost is
    E KL(q(x_s|x_t, x_0) || p(x_s|x_t)) = 1/2 log(1 + (SNR_s - SNR_t) mse_t), SNR = abar / (1 - abar): Eq. 6-7 between
    levels s and t, with the variance of Bao et al. 2022. For s = 0 it is the entropy of pixels with errors of mse_t.

    >>> from ddpm import schedule
    >>> cost = bound_cost(schedule.linear(), torch.linspace(1e-4, 0.3, 1000))
    >>> optimised(cost, 5)[-1]
    1000
    """
    error = torch.cat([torch.zeros(1), mse]).double()
    snr = (2 * schedule.half_log_snr).exp().cpu()
    snr[0] = 0  # level 0 has its own row
    cost = 0.5 * ((snr[:, None] - snr).clamp(min=0) * error).log1p()
    cost[0] = 0.5 * (2 * math.pi * math.e * (error / pixels.BIN**2 + 1 / 12)).log()
    return cost


def path_cost(schedule: Schedule, x: Tensor, path: Iterable[tuple[int, Tensor, Tensor]]) -> Tensor:
    """How far a DDIM step from t to s misses the path that all levels together take, float64 [T+1, T+1] as cost[s, t].

    x [B, C, H, W] is x_T, path the Steps (t, x, x0) of `ddim` from there through all levels. The error is the root mean
    square over images and dimensions of x_s in signal units; they are taken as if each came whole into the image, so
    that the sum bounds what `optimised` makes small. Memory for T times x and x0.

    >>> from ddpm import Denoiser, samplers, schedule
    >>> s, x = schedule.linear(20, 1e-3, 0.6), torch.randn(2, 1, 4, 4)
    >>> grey = Denoiser(lambda x, timestep, y: torch.zeros_like(x), s, predict="x0")
    >>> float(path_cost(s, x, samplers.ddim(grey, x, 20)).max()) < 1e-6  # every step is exact
    True
    """
    T, N = schedule.T, x.numel()
    xs, x0s = torch.zeros(T + 1, N, dtype=torch.float64), torch.zeros(T + 1, N, dtype=torch.float64)
    xs[T] = x.flatten()
    for t, xt, x0 in path:
        xs[t], x0s[t + 1] = xt.flatten(), x0.flatten()
    signal, sigma = schedule.alpha_bar.sqrt().cpu()[:, None], (1 - schedule.alpha_bar).sqrt().cpu()[:, None]
    eps = torch.zeros_like(xs)
    eps[1:] = (xs[1:] - signal[1:] * x0s[1:]) / sigma[1:]
    # |signal_s x0_t + sigma_s eps_t - x_s|^2 multiplied out, s down and t across
    ends = signal**2 * _dots(x0s, x0s) + sigma**2 * _dots(eps, eps) + 2 * signal * sigma * _dots(x0s, eps)
    mixed = signal * (xs @ x0s.T) + sigma * (xs @ eps.T)
    return ((ends - 2 * mixed + _dots(xs, xs)[:, None]).clamp(min=0) / N).sqrt().triu(1)


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """The products of rows, [T, N] -> [T]."""
    return (a * b).sum(1)

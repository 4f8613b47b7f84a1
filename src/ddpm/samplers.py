"""Samplers: each is a generator that turns noise into images and yields a Step(t, x, x0) after every step.

They share these arguments:

x      [B, C, H, W]: x_T, standard normal, or x_t at the level t = start
steps  how many levels to visit, spread evenly, or the levels themselves, which rise to `start`, as `spacing` gives them
noise  noise(t) is the draw that makes x_t, of x's shape
y      int64 [B] class labels, or None
start  the level of x (None: T)

All samplers but `ancestral` and `consistency` solve one ODE, or the SDE that belongs to it: dx/dphi = cos phi eps^ -
sin phi x0^, where cos^2 phi = abar. They differ in the quantity that they hold constant during a step. All raise
InputError if steps or start is out of range.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ddpm.denoiser import Denoiser, Estimate
from ddpm.errors import InputError, finite_number, is_scalar, whole_number
from ddpm.gaussian import q_sample
from ddpm.noise import Noise
from ddpm.schedule import Schedule
from ddpm.spacing import SPACINGS

Levels: TypeAlias = int | Sequence[int]


class Step(NamedTuple):
    """The state after one step, which is one network call (`heun` and `probability_flow`: two, but one in the last).

    t   the level of x after the step, T-1 .. 0
    x   [B, C, H, W], the signal; the image if t = 0
    x0  the estimate x0^ (Eq. 15) that the step used, of x's shape
    """

    t: int
    x: Tensor
    x0: Tensor


def _estimate(denoiser: Denoiser, x: Tensor, t: int, y: Tensor | None) -> Estimate:
    return denoiser(x, torch.full((len(x),), t, device=x.device), y)


def _down(denoiser: Denoiser, steps: Levels, start: int | None) -> list[tuple[int, int]]:
    """The steps (from level, to level), from `start` down to 0."""
    return list(pairwise([*denoiser.schedule.levels(steps, start)[::-1], 0]))


@torch.no_grad()
def ancestral(
    denoiser: Denoiser,
    x: Tensor,
    noise: Noise,
    steps: Levels | None = None,
    y: Tensor | None = None,
    start: int | None = None,
) -> Iterator[Step]:
    """Algorithm 2: x_{t-1} = mu_theta(x_t, t) + sigma_t z, with z = 0 at t = 1. steps None visits all levels.

    On fewer levels it samples the reverse process of those levels (`Denoiser.respace`).

    >>> from ddpm import schedule
    >>> from ddpm.noise import per_image
    >>> grey = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear(), predict="x0")
    >>> noise = per_image([0], (1, 4, 4))
    >>> *_, last = ancestral(grey, noise(1000), noise, steps=10)
    >>> last.t, float(last.x.abs().max())
    (0, 0.0)
    """
    whole = denoiser.schedule.T if start is None else start
    levels = denoiser.schedule.levels(whole if steps is None else steps, start)
    start = levels[-1]
    if len(levels) != start:
        denoiser = denoiser.respace(levels)
    for index in range(len(levels), 0, -1):
        estimate = _estimate(denoiser, x, index, y)
        t = levels[index - 2] if index > 1 else 0  # the level after this step
        x = estimate.p.sample(noise(t)) if t > 0 else estimate.mean
        yield Step(t, x, estimate.x0)


@torch.no_grad()
def ddim(
    denoiser: Denoiser,
    x: Tensor,
    steps: Levels = 50,
    eta: float = 0.0,
    noise: Noise | None = None,
    y: Tensor | None = None,
    start: int | None = None,
    sigma_hat: bool = False,
) -> Iterator[Step]:
    """DDIM (Song et al. 2021, Eq. 12): x_s = sqrt(abar_s) x0^ + sqrt(1 - abar_s - sigma^2) eps^ + sigma z.

    sigma^2 = eta^2 (1 - abar_s)/(1 - abar_t) (1 - abar_t/abar_s).

    eta        0..1. With 0 the sampler is deterministic and needs no noise; with 1, sigma^2 is the posterior's variance
    sigma_hat  multiply z, but nothing else, by sqrt(1 - abar_t/abar_s) instead of sigma, as in the last rows of their
               Table 1. eta is then 1

    eps^ belongs to the clipped x0^, so that x_t stays a mixture of the two. With eta 0 this is Euler's method on the
    EDM form, d(x/alpha)/d(sigma/alpha) = eps^, and DPM-Solver++ of order 1. Raises InputError if eta is not in 0..1, or
    is above 0 without noise.

    >>> from ddpm import schedule
    >>> grey = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear(), predict="x0")
    >>> *_, last = ddim(grey, torch.ones(1, 1, 4, 4), steps=5)
    >>> last.t, float(last.x.abs().max())
    (0, 0.0)
    """
    eta = 1.0 if sigma_hat else finite_number("eta", eta, 0, 1)
    noisy = eta > 0
    if noisy and noise is None:
        raise InputError(f"eta {eta}: want the argument noise, which eta above 0 needs")
    abar = denoiser.schedule.alpha_bar.tolist()
    for t, s in _down(denoiser, steps, start):
        estimate = _estimate(denoiser, x, t, y)
        beta = 1 - abar[t] / abar[s]
        variance = eta**2 * (1 - abar[s]) / (1 - abar[t]) * beta
        x = math.sqrt(abar[s]) * estimate.x0 + math.sqrt(1 - abar[s] - variance) * estimate.eps
        if noisy and s > 0:
            assert noise is not None
            x = x + math.sqrt(beta if sigma_hat else variance) * noise(s)
        yield Step(s, x, estimate.x0)


@torch.no_grad()
def dpm_solver_pp(
    denoiser: Denoiser, x: Tensor, steps: Levels = 20, order: int = 2, y: Tensor | None = None, start: int | None = None
) -> Iterator[Step]:
    """DPM-Solver++ multistep of order 1, 2 or 3 (Lu et al. 2022, Algorithm 2), with one network call per step.

    x_s = sigma_s/sigma_t x + alpha_s integral over lambda = 1/2 log-SNR of e^(lambda - lambda_s) x0^ (see `_integral`),
    where x0^ is the polynomial through the last `order` estimates. The first steps use fewer estimates because no more
    exist. The last steps use fewer because lambda is infinite at the end. Order 3 is exact for a parabola. The official
    code and diffusers use half of the parabola's second derivative, and so converge with order 2 (the tests show it).
    Raises InputError for another order.

    >>> from ddpm import schedule
    >>> grey = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear(), predict="x0")
    >>> *_, last = dpm_solver_pp(grey, torch.ones(1, 1, 4, 4), steps=5)
    >>> last.t, float(last.x.abs().max())
    (0, 0.0)
    """
    return _multistep(denoiser, x, steps, order, False, y, start)


@torch.no_grad()
def unipc(
    denoiser: Denoiser, x: Tensor, steps: Levels = 20, order: int = 2, y: Tensor | None = None, start: int | None = None
) -> Iterator[Step]:
    """UniPC of order 1, 2 or 3 with B(h) = e^h - 1 (Zhao et al. 2023, Algorithms 5, 6), with one network call per step.

    It is DPM-Solver++ with a correction: each estimate is also used to repeat the step that led to it, with this
    estimate as one more point. This raises the order by one. Raises InputError for another order.

    >>> from ddpm import schedule
    >>> grey = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear(), predict="x0")
    >>> *_, last = unipc(grey, torch.ones(1, 1, 4, 4), steps=5)
    >>> last.t, float(last.x.abs().max())
    (0, 0.0)
    """
    return _multistep(denoiser, x, steps, order, True, y, start)


@torch.no_grad()
def _multistep(
    denoiser: Denoiser, x: Tensor, steps: Levels, order: int, correct: bool, y: Tensor | None, start: int | None
) -> Iterator[Step]:
    """DPM-Solver++ (`dpm_solver_pp`), or UniPC (`unipc`) if `correct` is set."""
    order = whole_number("order", order, 1, 3)
    alpha, sigma, lam = _rates(denoiser, start)
    points: list[tuple[float, Tensor]] = []  # (lambda, x0^), the newest first
    down = _down(denoiser, steps, start)
    origin, x_origin = 0, x  # the level from which the last step started, and its x

    def step(s: int, points: Sequence[tuple[float, Tensor]]) -> Tensor:
        return sigma[s] / sigma[origin] * x_origin + alpha[s] * _integral(points, lam[origin], lam[s])

    for i, (t, s) in enumerate(down):
        newest = lam[t], _estimate(denoiser, x, t, y).x0
        if correct and i > 0:
            x = step(t, [*points, newest])
        points = [newest, *points][: min(order, len(down) - i)]
        origin, x_origin = t, x
        x = step(s, points)
        yield Step(s, x, newest[1])


def _integral(points: Sequence[tuple[float, Tensor]], a: float, b: float) -> Tensor:
    """The integral over a..b of e^(lambda - b) P(lambda) dlambda; P is the polynomial through `points` (lambda, x0^).

    A line is evaluated at the middle of a..b, as in the papers. b may be infinite if there is only one point.
    """
    h = b - a
    moments = [-math.expm1(-h)]  # the integrals of u^0, u^1, .. with u = (lambda - a) / h, by parts
    if len(points) == 1:
        return moments[0] * points[0][1]
    if len(points) == 2:
        moments.append(moments[0] / 2)
    else:
        for k in range(1, len(points)):
            moments.append(1 - k * moments[-1] / h)
    u = torch.tensor([(lam - a) / h for lam, _ in points], dtype=torch.float64)
    weights = torch.linalg.solve(torch.vander(u, increasing=True).T, torch.tensor(moments, dtype=torch.float64))
    return torch.stack([w * x0 for w, (_, x0) in zip(weights.tolist(), points, strict=True)]).sum(0)


@torch.no_grad()
def sde_dpm_solver_pp(
    denoiser: Denoiser, x: Tensor, noise: Noise, steps: Levels = 20, y: Tensor | None = None, start: int | None = None
) -> Iterator[Step]:
    """SDE-DPM-Solver++ 2M (Lu et al. 2022, Appendix): the reverse SDE.

    x_s = sigma_s/sigma_t e^-h x + alpha_s (1 - e^-2h) x0^ + sigma_s sqrt(1 - e^-2h) z, where h = lambda_s - lambda_t
    and x0^ is the line through the last two estimates, evaluated at the middle of the step. With one estimate it is
    `ancestral` with fixed_small. The fresh noise z corrects errors of earlier steps.

    >>> from ddpm import schedule
    >>> from ddpm.noise import per_image
    >>> grey = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear(), predict="x0")
    >>> noise = per_image([0], (1, 4, 4))
    >>> *_, last = sde_dpm_solver_pp(grey, noise(1000), noise, steps=5)
    >>> last.t, float(last.x.abs().max())
    (0, 0.0)
    """
    alpha, sigma, lam = _rates(denoiser, start)
    down = _down(denoiser, steps, start)
    previous: tuple[float, Tensor] | None = None  # (lambda, x0^)
    for t, s in down:
        x0, h = _estimate(denoiser, x, t, y).x0, lam[s] - lam[t]
        middle = x0
        if previous is not None and s > 0:
            middle = x0 + h / 2 * (x0 - previous[1]) / (lam[t] - previous[0])
        previous = lam[t], x0
        fresh = -math.expm1(-2 * h)  # 1 - e^-2h, the fresh part of sigma_s^2
        x = sigma[s] / sigma[t] * math.exp(-h) * x + alpha[s] * fresh * middle
        if s > 0:
            x = x + sigma[s] * math.sqrt(fresh) * noise(s)
        yield Step(s, x, x0)


@torch.no_grad()
def heun(
    denoiser: Denoiser, x: Tensor, steps: Levels = 20, y: Tensor | None = None, start: int | None = None
) -> Iterator[Step]:
    """Heun's method on the EDM form, d(x/alpha)/d(sigma/alpha) = eps^ (Karras et al. 2022, Algorithm 1).

    A step makes two network calls, but the last makes one because no network is called at level 0: 2 steps - 1 in all.

    >>> from ddpm import schedule
    >>> grey = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear(), predict="x0")
    >>> *_, last = heun(grey, torch.ones(1, 1, 4, 4), steps=5)
    >>> last.t, float(last.x.abs().max())
    (0, 0.0)
    """
    alpha, sigma, _ = _rates(denoiser, start)
    clock = [b / a for a, b in zip(alpha, sigma, strict=True)]
    return _heun(denoiser, x, _down(denoiser, steps, start), alpha, clock, lambda estimate, t: estimate.eps, y)


@torch.no_grad()
def probability_flow(
    denoiser: Denoiser, x: Tensor, steps: Levels = 20, y: Tensor | None = None, start: int | None = None
) -> Iterator[Step]:
    """Heun's method on the probability-flow ODE, dx/dphi = cos phi eps^ - sin phi x0^ with cos^2 phi = abar.

    `ode` computes the density of this map: between levels T and 1 it is `ode.probability_flow` run backwards. It makes
    2 steps - 1 network calls, as `heun` does.

    >>> from ddpm import schedule
    >>> grey = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear(), predict="x0")
    >>> *_, last = probability_flow(grey, torch.ones(1, 1, 4, 4), steps=5)
    >>> last.t, float(last.x.abs().max())
    (0, 0.0)
    """
    cos, sin, _ = _rates(denoiser, start)
    clock = [math.atan2(b, a) for a, b in zip(cos, sin, strict=True)]
    slope = lambda estimate, t: cos[t] * estimate.eps - sin[t] * estimate.x0  # noqa: E731
    return _heun(denoiser, x, _down(denoiser, steps, start), [1.0] * len(clock), clock, slope, y)


@torch.no_grad()
def _heun(
    denoiser: Denoiser, x: Tensor, down: list[tuple[int, int]], scale: list[float], clock: list[float],
    slope: Callable[[Estimate, int], Tensor], y: Tensor | None,
) -> Iterator[Step]:  # fmt: skip
    """Solve d(x/scale)/dclock = slope(estimate) by Heun's method; the last step, to level 0, returns x0^ itself."""
    for t, s in down:
        estimate = _estimate(denoiser, x, t, y)
        if s == 0:
            x = estimate.x0
        else:
            width, first = clock[s] - clock[t], slope(estimate, t)
            euler = scale[s] * (x / scale[t] + width * first)
            second = slope(_estimate(denoiser, euler, s, y), s)
            x = scale[s] * (x / scale[t] + width / 2 * (first + second))
        yield Step(s, x, estimate.x0)


@torch.no_grad()
def consistency(
    denoiser: Denoiser, x: Tensor, noise: Noise, steps: Levels = 2, y: Tensor | None = None, start: int | None = None
) -> Iterator[Step]:
    """Multistep consistency sampling (Song et al. 2023, Algorithm 1): x_s = sqrt(abar_s) x0^ + sqrt(1 - abar_s) z.

    It is for a denoiser that was trained with `losses.consistency`, whose x0^ is the end of the ODE's path through x_t,
    and not the mean of x_0. Then one step gives an image, and each further step adds fresh noise z and removes it.

    >>> from ddpm import schedule
    >>> from ddpm.noise import per_image
    >>> grey = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.cosine(), predict="x0")
    >>> noise = per_image([0], (1, 4, 4))
    >>> [(step.t, float(step.x0.abs().max())) for step in consistency(grey, noise(1000), noise)]
    [(500, 0.0), (0, 0.0)]
    """
    for t, s in _down(denoiser, steps, start):
        x0 = _estimate(denoiser, x, t, y).x0
        x = q_sample(denoiser.schedule, x0, torch.tensor([s]), noise(s)) if s > 0 else x0
        yield Step(s, x, x0)


def _rates(denoiser: Denoiser, start: int | None) -> tuple[list[float], list[float], list[float]]:
    """alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t) and lambda_t = log(alpha_t / sigma_t) at levels 0..start."""
    levels = slice(None if start is None else whole_number("start", start, 1, denoiser.schedule.T) + 1)
    abar, lam = denoiser.schedule.alpha_bar[levels], denoiser.schedule.half_log_snr[levels]
    if abar[-1] == 0:
        raise InputError("sampler: the schedule ends at alpha_bar 0, where lambda is infinite; want ancestral or ddim")
    return abar.sqrt().tolist(), (1 - abar).sqrt().tolist(), lam.tolist()


Run: TypeAlias = Callable[[Denoiser, Tensor, Noise, Levels, Tensor | None, int | None], Iterator[Step]]
"""(denoiser, x, noise, steps, y, start) -> the steps. The `run` of every row of SAMPLERS has this form."""


class Sampler(NamedTuple):
    """A sampler of the table SAMPLERS, with its defaults.

    run      the sampler, with the arguments that all rows share
    steps    the default number of levels; None: all T
    spacing  the default spacing of its levels, a name in SPACINGS. Solvers in log-SNR want even steps in log-SNR. On
             uniform levels, heun would take most of sigma/alpha in its first step, and would multiply the network's
             error there a thousandfold
    noisy    whether the sampler draws noise during sampling
    twice    whether a step makes two network calls; the last step always makes one
    meaning  one line for help
    """

    run: Run
    steps: int | None = 20
    spacing: str = "log_snr"
    noisy: bool = False
    twice: bool = False
    meaning: str = ""

    def levels(self, denoiser: Denoiser, steps: Levels | None, start: int | None = None) -> list[int]:
        """The levels that the sampler visits, rising to `start` (None: T).

        steps  the levels themselves, or their number, which are spaced by `spacing` (None: the default number)
        """
        schedule = denoiser.schedule
        if steps is None:
            top = schedule.T if start is None else start
            steps = min(self.steps or top, top)
        spaced = SPACINGS[self.spacing] if is_scalar(steps) else Schedule.levels
        return spaced(schedule, steps, start)  # type: ignore[arg-type]

    def calls(self, denoiser: Denoiser, steps: Levels | None, start: int | None = None) -> int:
        """The number of network calls per image."""
        visited = len(self.levels(denoiser, steps, start))
        return 2 * visited - 1 if self.twice else visited


SAMPLERS = {
    "ancestral": Sampler(ancestral, steps=None, spacing="uniform", noisy=True, meaning="the paper's Algorithm 2"),
    "ddim": Sampler(
        lambda d, x, noise, steps, y, start: ddim(d, x, steps, y=y, start=start),
        steps=50, spacing="uniform", meaning="DDIM, without noise unless eta is given",
    ),
    "dpmpp_2m": Sampler(
        lambda d, x, noise, steps, y, start: dpm_solver_pp(d, x, steps, 2, y, start),
        meaning="DPM-Solver++ of order 2",
    ),
    "dpmpp_3m": Sampler(
        lambda d, x, noise, steps, y, start: dpm_solver_pp(d, x, steps, 3, y, start),
        meaning="DPM-Solver++ of order 3",
    ),
    "dpmpp_2m_sde": Sampler(sde_dpm_solver_pp, noisy=True, meaning="SDE-DPM-Solver++ of order 2, with noise"),
    "unipc": Sampler(
        lambda d, x, noise, steps, y, start: unipc(d, x, steps, 2, y, start), meaning="UniPC of order 2"
    ),
    "unipc_3": Sampler(
        lambda d, x, noise, steps, y, start: unipc(d, x, steps, 3, y, start), meaning="UniPC of order 3"
    ),
    "heun": Sampler(
        lambda d, x, noise, steps, y, start: heun(d, x, steps, y, start),
        steps=10, spacing="karras", twice=True, meaning="Heun's method of EDM, two network calls a step",
    ),
    "pf_ode": Sampler(
        lambda d, x, noise, steps, y, start: probability_flow(d, x, steps, y, start),
        steps=10, twice=True, meaning="Heun's method on the probability-flow ODE, two network calls a step",
    ),
    "consistency": Sampler(
        consistency, steps=2, spacing="uniform", noisy=True, meaning="only for models of ddpm distill, in 1 to 4 steps"
    ),
}  # fmt: skip


def named(name: str, eta: float = 0.0, sigma_hat: bool = False) -> Sampler:
    """The row of SAMPLERS with this name; eta and sigma_hat are settings of `ddim`.

    Raises InputError for an unknown name, and for eta or sigma_hat with another sampler than ddim.

    >>> named("ddim", eta=1.0).noisy, named("heun").twice
    (True, True)
    """
    if name not in SAMPLERS:
        raise InputError(f"sampler {name!r}: want {', '.join(SAMPLERS)}")
    if eta == 0 and not sigma_hat:
        return SAMPLERS[name]
    if name != "ddim":
        raise InputError(f"{f'eta {eta}' if eta else 'sigma_hat'}: only the sampler ddim has this setting")
    run: Run = lambda d, x, noise, steps, y, start: ddim(d, x, steps, eta, noise, y, start, sigma_hat)  # noqa: E731
    return SAMPLERS[name]._replace(run=run, noisy=True)

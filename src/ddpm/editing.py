"""Images made from images: redrawing, interpolation, images that share a latent, inversion, and inpainting.

As in samplers, each is a generator of Step(t, x, x0); the last one's x is the result. Of the arguments, `steps` and `y`
are those of samplers too, and `run` is what goes down from a level: `ancestral`, or SAMPLERS[name].run of another.
"""

import math
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from ddpm.denoiser import Denoiser
from ddpm.errors import InputError
from ddpm.gaussian import broadcast, q_sample, q_step
from ddpm.noise import Noise
from ddpm.samplers import Levels, Run, Step, ancestral


@torch.no_grad()
def redraw(
    denoiser: Denoiser, x0: Tensor, t: int, noise: Noise, steps: Levels | None = None, y: Tensor | None = None,
    run: Run = ancestral,
) -> Iterator[Step]:  # fmt: skip
    """SDEdit (Meng et al. 2022, Algorithm 1): x_t ~ q(x_t | x_0) by noise(t), then the reverse process from there.

    x0 [B, C, H, W] signal, real images or drawn strokes; t in 0..T, how much is made anew: at 0 nothing is.

    >>> from ddpm import schedule
    >>> from ddpm.noise import per_image
    >>> grey = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear(), predict="x0")
    >>> *_, last = redraw(grey, torch.ones(2, 1, 4, 4), 400, per_image([0, 1], (1, 4, 4)), steps=10)
    >>> last.t, float(last.x.abs().max())
    (0, 0.0)
    """
    _check_level(denoiser, t)
    at = torch.full((len(x0),), t, device=x0.device)
    xt = q_sample(denoiser.schedule, x0, at, noise(t).to(x0)) if t > 0 else x0
    yield from _decode(denoiser, xt, t, noise, steps, y, run)


@torch.no_grad()
def invert(
    denoiser: Denoiser,
    x0: Tensor,
    steps: Levels = 50,
    t: int | None = None,
    iterations: int = 1,
    y: Tensor | None = None,
) -> Iterator[Step]:  # fmt: skip
    """x_t whose DDIM samples (eta 0, not clipped, the same `steps`) are the images x0 [B, C, H, W]; t None is T.

    The step from t to s is x_s = sqrt(abar_s) x0^ + sqrt(1 - abar_s) eps^ with the estimate at x_t, solved for x_t by
    `iterations` of the fixed point x_t <- sqrt(abar_t/abar_s) (x_s - sqrt(1 - abar_s) eps^(x_t)) + sqrt(1 - abar_t)
    eps^(x_t), from x_t = x_s on. One is what is called DDIM inversion; more come back to x0 more exactly.

    Yields a Step a level, rising. Raises InputError where t, steps or iterations do not fit.

    >>> from ddpm import schedule, samplers
    >>> half = Denoiser(lambda x, timestep, y: 0.3 * x, schedule.linear(), clip=False)
    >>> x0 = torch.full((1, 1, 4, 4), 0.7)
    >>> *_, up = invert(half, x0, steps=20, iterations=8)
    >>> *_, down = samplers.ddim(half, up.x, steps=20)
    >>> up.t, bool((down.x - x0).abs().max() < 1e-3)
    (1000, True)
    """
    if iterations < 1:
        raise InputError(f"iterations {iterations}: want at least 1")
    denoiser = denoiser.unclipped()
    abar, x = denoiser.schedule.alpha_bar.tolist(), x0
    for s, level in pairwise([0, *denoiser.schedule.levels(steps, t)]):
        at, guess = torch.full((len(x),), level, device=x.device), x
        if abar[level] == 0:
            raise InputError("the schedule ends at alpha_bar 0, where x says nothing of x0; want t below T")
        for _ in range(iterations):
            estimate = denoiser(guess, at, y)
            ratio = math.sqrt(abar[level] / abar[s])
            guess = ratio * (x - math.sqrt(1 - abar[s]) * estimate.eps) + math.sqrt(1 - abar[level]) * estimate.eps
        x = guess
        yield Step(level, x, estimate.x0)


@torch.no_grad()
def interpolate(
    denoiser: Denoiser,
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    t: int,
    noise_a: Tensor,
    noise_b: Tensor,
    noise: Noise,
    steps: Levels | None = None,
    y: Tensor | None = None,
    run: Run = ancestral,
) -> Iterator[Step]:
    """Figures 8, 9: xbar_t = (1 - w) x_t + w x_t', x_t ~ q(x_t | a), x_t' ~ q(x_t | b), and xbar_0 ~ p(x_0 | xbar_t).

    a, b                 [C, H, W] signal, the two ends
    weights              float [K]: 0 is a, 1 is b
    t                    0..T, how much is made anew; 0 mixes pixels and calls no network (Figure 9's last row)
    noise_a, noise_b     [C, H, W] standard normal, the draws of x_t and x_t', independent and the same for all weights
    noise                noise(s), [K, C, H, W], the draw that makes x_s; with one seed for all K images (`[seed] * K`)
                         the images change smoothly with w, as in Figure 8

    Yields Steps of [K, C, H, W]. Raises InputError where t, steps or shapes do not fit.

    >>> from ddpm import schedule
    >>> from ddpm.noise import normal, per_image
    >>> grey = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear(), predict="x0")
    >>> black, white = -torch.ones(1, 4, 4), torch.ones(1, 4, 4)
    >>> ends, weights = normal([1, 2], (1, 4, 4)), torch.linspace(0, 1, 5)
    >>> noise = per_image([0] * 5, (1, 4, 4))
    >>> *_, last = interpolate(grey, black, white, weights, 500, *ends, noise, steps=10)
    >>> last.t, last.x.shape
    (0, torch.Size([5, 1, 4, 4]))
    >>> *_, pixels = interpolate(grey, black, white, weights, 0, *ends, noise)
    >>> pixels.x[:, 0, 0, 0].tolist()
    [-1.0, -0.5, 0.0, 0.5, 1.0]
    """
    if not (a.ndim == 3 and a.shape == b.shape == noise_a.shape == noise_b.shape and weights.ndim == 1):
        shapes = ", ".join(str(list(x.shape)) for x in (a, b, noise_a, noise_b, weights))
        raise InputError(f"a, b, noise_a, noise_b, weights of shapes {shapes}: want [C, H, W] four times, and [K]")
    _check_level(denoiser, t)
    eps = torch.stack([noise_a, noise_b])
    ends = q_sample(denoiser.schedule, torch.stack([a, b]), torch.tensor([t, t]), eps)  # [2, C, H, W]
    w = broadcast(weights, ends)  # [K, 1, 1, 1]
    yield from _decode(denoiser, (1 - w) * ends[0] + w * ends[1], t, noise, steps, y, run)


def share_latent(
    denoiser: Denoiser, xt: Tensor, t: int, noise: Noise, steps: Levels | None = None, y: Tensor | None = None,
    run: Run = ancestral,
) -> Iterator[Step]:  # fmt: skip
    """Figure 7: images that share x_t, B draws of x_0 ~ p_theta(x_0 | x_t).

    xt [C, H, W] is one image's x_t at the level t in 0..T (0: they share everything), of a chain or of q_sample;
    noise(s), [B, C, H, W], is the draw that makes x_s, a seed an image. The higher t is, the less they have in common.

    Yields Steps of [B, C, H, W]. Raises InputError where t, steps or shapes do not fit.

    >>> from ddpm import schedule, samplers
    >>> from ddpm.noise import per_image
    >>> grey = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear(), predict="x0")
    >>> one, four = per_image([0], (1, 8, 8)), per_image([1, 2, 3, 4], (1, 8, 8))
    >>> chain = {step.t: step.x[0] for step in samplers.ancestral(grey, one(1000), one, steps=20)}
    >>> for t in (750, 500, 250):
    ...     *_, last = share_latent(grey, chain[t], t, four, steps=5)
    >>> last.x.shape
    torch.Size([4, 1, 8, 8])
    """
    _check_level(denoiser, t)
    like = noise(t)
    if xt.shape != like.shape[1:]:
        raise InputError(f"xt of shape {list(xt.shape)}: want {list(like.shape[1:])}, one image of the noise's shape")
    yield from _decode(denoiser, xt.expand_as(like), t, noise, steps, y, run)


def _check_level(denoiser: Denoiser, t: int) -> None:
    if not 0 <= t <= denoiser.schedule.T:
        raise InputError(f"t {t}: want 0 to {denoiser.schedule.T}")


def _decode(
    denoiser: Denoiser, x: Tensor, t: int, noise: Noise, steps: Levels | None, y: Tensor | None, run: Run
) -> Iterator[Step]:
    """x_0 ~ p_theta(x_0 | x_t = x); x itself at t = 0."""
    return iter([Step(0, x, x)]) if t == 0 else run(denoiser, x, noise, t if steps is None else steps, y, t)


def repaint_path(n: int, jump: int = 10, resample: int = 10) -> list[int]:
    """The levels that RePaint passes, n .. 0: down by one, a network call, or up by `jump`, noise added.

    At 1, 1 + jump, 1 + 2 jump, .. the first resample - 1 arrivals go up. With jump 1 that is Algorithm 1 (Lugmayr et
    al. 2022), each step down taken `resample` times; more is their code's schedule. About n * resample network calls.

    Raises InputError unless n, jump, resample are at least 1, and jump below n where there is resampling.

    >>> repaint_path(6, jump=2, resample=2)
    [6, 5, 4, 3, 5, 4, 3, 2, 1, 3, 2, 1, 0]
    """
    if n < 1 or resample < 1:
        raise InputError(f"levels {n}, resample {resample}: want at least 1 of each")
    if jump < 1 or (resample > 1 and jump >= n):
        raise InputError(f"jump {jump}: want 1 to {n - 1}, below the number of levels, or resample 1")
    left = dict.fromkeys(range(1, n - jump + 1, jump), resample - 1)
    path = [n]
    while path[-1] > 0:
        t = path[-1]
        up = left.get(t, 0) > 0
        if up:
            left[t] -= 1
        path.append(t + jump if up else t - 1)
    return path


@torch.no_grad()
def inpaint(
    denoiser: Denoiser,
    x0: Tensor,
    mask: Tensor,
    noise: Noise,
    steps: Levels | None = None,
    jump: int = 10,
    resample: int = 10,
    y: Tensor | None = None,
    run: Run = ancestral,
) -> Iterator[Step]:
    """RePaint (Lugmayr et al. 2022, Algorithm 1): x_{t-1} ~ p_theta where masked, ~ q(x_{t-1} | x_0) where known.

    Drawn apart, the two parts do not match; going up again by q(x_{t+jump} | x_t) (Eq. 2) and down by p_theta brings
    them together: see `repaint_path`.

    x0     [B, C, H, W] signal; what is masked in it is not looked at
    mask   0 or 1 (bool or any number), a shape that broadcasts to x0's: 1 where the image is to be made, 0 where it is
           known; all 1 samples freely, all 0 returns x0
    noise  noise(k), [B, C, H, W]. Arrival u = 0, 1, .. at level t draws noise(t + 2u(T+1)), and for the known part
           noise(t + (2u+1)(T+1)): no two draws coincide, and u = 0 is what `ancestral` draws
    steps  how many of the levels to visit, evenly (None: all), or which; jump counts these
    run    takes one step down at a time, so that a multistep solver's order is 1

    Yields Steps of [B, C, H, W], about steps * resample of them; the last one's x is x0 itself where that is known.
    Raises InputError where mask, steps, jump or resample do not fit.

    >>> from ddpm import schedule
    >>> from ddpm.noise import per_image
    >>> grey = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear(), predict="x0")
    >>> left = torch.tensor([1, 1, 0, 0])  # broadcasts over rows, channels and images
    >>> *_, last = inpaint(grey, torch.ones(2, 1, 4, 4), left, per_image([0, 1], (1, 4, 4)), steps=20, resample=2)
    >>> last.x[0, 0, 0].tolist()
    [0.0, 0.0, 1.0, 1.0]
    """
    schedule, T = denoiser.schedule, denoiser.schedule.T
    levels = [0, *schedule.levels(T if steps is None else steps)]
    mask = _as_mask(mask, x0)
    path = repaint_path(len(levels) - 1, jump, resample)
    arrivals = Counter(path[:1])
    x = noise(T).to(x0)
    for s, t in pairwise(path):  # from level s to t, of those visited
        key = levels[t] + 2 * arrivals[t] * (T + 1)
        arrivals[t] += 1
        if t > s:  # x_t ~ q(x_t | x_s), Eq. 2 of the schedule with no level between them
            two = torch.full((len(x),), 2, device=x.device)
            x = q_step(schedule.respace([levels[s], levels[t]]), x, two).sample(noise(key))
            continue
        made = next(run(denoiser, x, lambda _, key=key: noise(key), levels[1 : s + 1], y, levels[s]))  # type: ignore[misc]
        then = torch.full((len(x),), levels[t], device=x.device)
        known = q_sample(schedule, x0, then, noise(key + T + 1))  # at t = 0 it is x0
        x = torch.where(mask, made.x, known)
        yield Step(levels[t], x, made.x0)


def _as_mask(mask: Tensor, x0: Tensor) -> Tensor:
    """`mask` as bool [B, C, H, W] on x0's device."""
    try:
        mask = mask.to(x0.device).expand_as(x0)
    except RuntimeError:
        raise InputError(f"mask of shape {list(mask.shape)}: want one that broadcasts to {list(x0.shape)}") from None
    if not ((mask == 0) | (mask == 1)).all():
        raise InputError("mask: want 1 where the image is to be made and 0 where it is known, nothing between")
    return mask.bool()

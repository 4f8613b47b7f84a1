"""Images made from images: redrawing, inversion, interpolation, images that share a latent, and inpainting.

Each function is a generator that yields Steps(t, x, x0), as samplers do; the x of the last one is the result. `steps`
and `y` are the arguments of samplers. `run` is the sampler that goes down from a level: `ancestral`, or the `run` of a
row of SAMPLERS.
"""

import math
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from ddpm.denoiser import Denoiser
from ddpm.errors import InputError, whole_number
from ddpm.gaussian import broadcast, q_sample, q_step
from ddpm.noise import Noise
from ddpm.samplers import Levels, Run, Step, ancestral
from ddpm.schedule import Schedule


@torch.no_grad()
def redraw(
    denoiser: Denoiser, x0: Tensor, t: int, noise: Noise, steps: Levels | None = None, y: Tensor | None = None,
    run: Run = ancestral,
) -> Iterator[Step]:  # fmt: skip
    """SDEdit (Meng et al. 2022, Algorithm 1): draw x_t ~ q(x_t | x_0) with noise(t), then run the reverse process.

    x0  [B, C, H, W], the signal of real images or drawn strokes
    t   the level in 0..T to start from; the higher it is, the more the images change, and at 0 they do not change

    Raises InputError if t or steps is out of range.

    >>> from ddpm import schedule
    >>> from ddpm.noise import per_image
    >>> grey = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear(), predict="x0")
    >>> *_, last = redraw(grey, torch.ones(2, 1, 4, 4), 400, per_image([0, 1], (1, 4, 4)), steps=10)
    >>> last.t, float(last.x.abs().max())
    (0, 0.0)
    """
    t = _check_level(denoiser, t)
    levels = torch.full((len(x0),), t, device=x0.device)
    xt = q_sample(denoiser.schedule, x0, levels, noise(t).to(x0)) if t > 0 else x0
    yield from _decode(denoiser, xt, t, noise, steps, y, run)


@torch.no_grad()
def invert(
    denoiser: Denoiser, x0: Tensor, steps: Levels = 50, t: int | None = None, iterations: int = 1,
    y: Tensor | None = None,
) -> Iterator[Step]:  # fmt: skip
    """The x_t from which unclipped DDIM (eta 0, the same `steps`) samples the images x0 [B, C, H, W]; t None is T.

    DDIM's step from t to s is x_s = sqrt(abar_s) x0^ + sqrt(1 - abar_s) eps^ with the estimate at x_t. It is solved for
    x_t by `iterations` steps of the fixed point x_t <- sqrt(abar_t/abar_s) (x_s - sqrt(1 - abar_s) eps^(x_t)) + sqrt(1
    - abar_t) eps^(x_t), which start at x_t = x_s. One iteration is the usual DDIM inversion; with more, DDIM returns to
    x0 more exactly, as far as the network's precision allows: a network that computes in bf16 is not inverted to a grey
    level. Each image takes the iterate of its smallest change.

    Yields one Step per level, at rising levels. Raises InputError if t, steps or iterations is out of range, and if the
    schedule has abar 0 at level t.

    >>> from ddpm import schedule, samplers
    >>> half = Denoiser(lambda x, timestep, y: 0.3 * x, schedule.linear(), clip=False)
    >>> x0 = torch.full((1, 1, 4, 4), 0.7)
    >>> *_, up = invert(half, x0, steps=20, iterations=8)
    >>> *_, down = samplers.ddim(half, up.x, steps=20)
    >>> up.t, bool((down.x - x0).abs().max() < 1e-3)
    (1000, True)
    """
    iterations = whole_number("iterations", iterations, 1)
    denoiser = denoiser.unclipped()
    abar, x = denoiser.schedule.alpha_bar.tolist(), x0
    for s, level in pairwise([0, *denoiser.schedule.levels(steps, t)]):
        levels, guess = torch.full((len(x),), level, device=x.device), x
        if abar[level] == 0:
            raise InputError("t: the schedule ends at alpha_bar 0, where x_T does not depend on x0; want t below T")
        best, x0_best, least = x, x, torch.full((len(x),), torch.inf, device=x.device)
        for _ in range(iterations):
            estimate = denoiser(guess, levels, y)
            ratio = math.sqrt(abar[level] / abar[s])
            after = ratio * (x - math.sqrt(1 - abar[s]) * estimate.eps) + math.sqrt(1 - abar[level]) * estimate.eps
            change = (after - guess).square().flatten(1).mean(1).to(least)
            better = (change <= least).view(-1, *[1] * (x.ndim - 1))
            best, x0_best = torch.where(better, after, best), torch.where(better, estimate.x0, x0_best)
            least, guess = torch.minimum(change, least), after
        x = best
        yield Step(level, x, x0_best)


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
    """Figures 8 and 9: mix x_t of two images and decode, xbar_t = (1 - w) x_t + w x_t' and xbar_0 ~ p(x_0 | xbar_t).

    a, b                 [C, H, W], the signals of the two ends; x_t ~ q(x_t | a) and x_t' ~ q(x_t | b)
    weights              float [K], the values of w: 0 is a and 1 is b
    t                    0..T, the level of the mixture; 0 mixes pixels and calls no network (the last row of Figure 9)
    noise_a, noise_b     [C, H, W], independent standard normal draws that make x_t and x_t', the same for all weights
    noise                noise(s), [K, C, H, W], is the draw that makes x_s; with one seed for all K images (`[seed] *
                         K`) the images change smoothly with w, as in Figure 8

    Yields Steps of [K, C, H, W]. Raises InputError if t or steps is out of range, or if the shapes do not match.

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
    t = _check_level(denoiser, t)
    eps = torch.stack([noise_a, noise_b])
    ends = q_sample(denoiser.schedule, torch.stack([a, b]), torch.tensor([t, t]), eps)  # [2, C, H, W]
    w = broadcast(weights, ends)  # [K, 1, 1, 1]
    yield from _decode(denoiser, (1 - w) * ends[0] + w * ends[1], t, noise, steps, y, run)


def share_latent(
    denoiser: Denoiser, xt: Tensor, t: int, noise: Noise, steps: Levels | None = None, y: Tensor | None = None,
    run: Run = ancestral,
) -> Iterator[Step]:  # fmt: skip
    """Figure 7: B images that share x_t, draws of x_0 ~ p_theta(x_0 | x_t); the higher t is, the less they share.

    xt     [C, H, W], the x_t of one image, from a sampler or from `q_sample`
    t      its level in 0..T; at 0 all images are equal
    noise  noise(s), [B, C, H, W], is the draw that makes x_s; each image has its own seed

    Yields Steps of [B, C, H, W]. Raises InputError if t or steps is out of range, or if the shapes do not match.

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
    t = _check_level(denoiser, t)
    draw = noise(t)  # only its shape is used
    if xt.shape != draw.shape[1:]:
        raise InputError(f"xt of shape {list(xt.shape)}: want {list(draw.shape[1:])}, one image of the noise's shape")
    yield from _decode(denoiser, xt.expand_as(draw), t, noise, steps, y, run)


def _check_level(denoiser: Denoiser, t: int) -> int:
    return whole_number("t", t, 0, denoiser.schedule.T)


def _decode(
    denoiser: Denoiser, x: Tensor, t: int, noise: Noise, steps: Levels | None, y: Tensor | None, run: Run
) -> Iterator[Step]:
    """Sample x_0 ~ p_theta(x_0 | x_t = x); at t = 0 the result is x itself."""
    return iter([Step(0, x, x)]) if t == 0 else run(denoiser, x, noise, t if steps is None else steps, y, t)


def repaint_path(n: int, jump: int = 10, resample: int = 10) -> list[int]:
    """The levels that RePaint visits, n .. 0: a move is down by one (a network call) or up by `jump` (added noise).

    At each of the levels 1, 1 + jump, 1 + 2 jump, .., the first resample - 1 visits are followed by a move up. With
    jump 1 this is Algorithm 1 (Lugmayr et al. 2022), in which every step down is made `resample` times; a larger jump
    follows the schedule of their code. There are about n * resample network calls.

    Raises InputError unless n, jump and resample are at least 1, and unless jump is below n if resample is above 1.

    >>> repaint_path(6, jump=2, resample=2)
    [6, 5, 4, 3, 5, 4, 3, 2, 1, 3, 2, 1, 0]
    """
    n, resample, jump = whole_number("n", n, 1), whole_number("resample", resample, 1), whole_number("jump", jump)
    if jump < 1 or (resample > 1 and jump >= n):
        raise InputError(f"jump {jump}: want 1 to {n - 1}, below the number of levels, or resample 1")
    jumps_left = dict.fromkeys(range(1, n - jump + 1, jump), resample - 1)
    path = [n]
    while path[-1] > 0:
        t = path[-1]
        up = jumps_left.get(t, 0) > 0
        if up:
            jumps_left[t] -= 1
        path.append(t + jump if up else t - 1)
    return path


def repaint_calls(n: int, jump: int = 10, resample: int = 10) -> int:
    """The number of Steps that `inpaint` yields, and of its network calls if its sampler makes one a step.

    >>> repaint_calls(250)
    2410
    """
    return sum(t < s for s, t in pairwise(repaint_path(n, jump, resample)))


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
    """RePaint (Lugmayr et al. 2022, Algorithm 1): x_{t-1} ~ p_theta where masked and ~ q(x_{t-1} | x_0) where known.

    The two parts are drawn separately, so they do not match at first. Going up again by q(x_{t+jump} | x_t) (Eq. 2) and
    down by p_theta brings them together; see `repaint_path`.

    x0     [B, C, H, W], the signal; its masked part is not used
    mask   0 or 1 (bool or any number), of a shape that broadcasts to that of x0: 1 where the image is to be sampled and
           0 where it is known. All 1 samples whole images, and all 0 returns x0
    noise  noise(k), [B, C, H, W]. Visit u = 0, 1, .. of level t draws noise(t + 2u(T+1)), and noise(t + (2u+1)(T+1))
           for the known part. So no two draws coincide, and the draws for u = 0 are those of `ancestral`
    steps  how many levels to visit, spread evenly (None: all), or the levels themselves; jump counts these levels
    run    the sampler, which is called for one step at a time, so a multistep solver has order 1

    Yields about steps * resample Steps of [B, C, H, W]. The x of the last one equals x0 in the known part. Raises
    InputError if mask, steps, jump or resample does not fit.

    >>> from ddpm import schedule
    >>> from ddpm.noise import per_image
    >>> grey = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear(), predict="x0")
    >>> left = torch.tensor([1, 1, 0, 0])  # broadcasts over rows, channels and images
    >>> *_, last = inpaint(grey, torch.ones(2, 1, 4, 4), left, per_image([0, 1], (1, 4, 4)), steps=20, resample=2)
    >>> last.x[0, 0, 0].tolist()
    [0.0, 0.0, 1.0, 1.0]
    """
    schedule, T = denoiser.schedule, denoiser.schedule.T
    levels = schedule.levels(T if steps is None else steps)
    mask, x = _as_mask(mask, x0), noise(T).to(x0)
    for t, s, key in moves(schedule, levels, jump, resample):
        if s > t:
            x = back_up(schedule, x, t, s, noise(key))
            continue
        visited = [level for level in levels if level <= t]
        step = next(run(denoiser, x, lambda _, key=key: noise(key), visited, y, t))  # type: ignore[misc]
        s_batch = torch.full((len(x),), s, device=x.device)
        known = q_sample(schedule, x0, s_batch, noise(key + T + 1))  # at s = 0 this is x0
        x = torch.where(mask, step.x, known)
        yield Step(s, x, step.x0)


def moves(schedule: Schedule, steps: Levels, jump: int = 10, resample: int = 1) -> Iterator[tuple[int, int, int]]:
    """The moves of `repaint_path` on these levels: (level before, level after, key of the draw that makes the latter).

    No two keys coincide, nor do they if T + 1 is added to some. Raises InputError if steps, jump or resample does not
    fit.

    >>> from ddpm import schedule
    >>> list(moves(schedule.linear(4), 2)), list(moves(schedule.linear(4), 2, jump=1, resample=2))
    ([(4, 2, 2), (2, 0, 0)], [(4, 2, 2), (2, 4, 14), (4, 2, 12), (2, 0, 0)])
    """
    levels = [0, *schedule.levels(steps)]
    path = repaint_path(len(levels) - 1, jump, resample)
    visits = Counter(path[:1])
    for i, j in pairwise(path):
        yield levels[i], levels[j], levels[j] + 2 * visits[j] * (schedule.T + 1)
        visits[j] += 1


def back_up(schedule: Schedule, x: Tensor, s: int, t: int, eps: Tensor) -> Tensor:
    """x_t ~ q(x_t | x_s = x) for t > s: Eq. 2 for a schedule of these two levels only. eps has the shape of x."""
    return q_step(schedule.respace([s, t]), x, torch.full((len(x),), 2, device=x.device)).sample(eps)


def _as_mask(mask: Tensor, x0: Tensor) -> Tensor:
    """The mask as bool [B, C, H, W] on x0's device. Raises InputError for another shape or value."""
    try:
        mask = mask.to(x0.device).expand_as(x0)
    except RuntimeError:
        raise InputError(f"mask of shape {list(mask.shape)}: want one that broadcasts to {list(x0.shape)}") from None
    if not ((mask == 0) | (mask == 1)).all():
        raise InputError("mask: want 1 where the image is to be sampled and 0 where it is known, and no other value")
    return mask.bool()

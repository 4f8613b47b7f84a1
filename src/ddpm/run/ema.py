"""The moving averages of the weights: the paper's (Section 4), and power functions (Karras et al. 2024, Appendix C)."""

import functools
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]

# -- the average of a checkpoint ---------------------------------------------------------------------------------------


def decay_at(step: int, decay: float, warmup: bool) -> float:
    """The decay of update `step`, counted from 0. The first update copies the weights; the others use `decay`.

    With `warmup` the decay of update n rises as (1 + n)/(10 + n) up to `decay`, so a short run forgets its first
    weights. While it rises, for n below 9/(1 - decay), the average is a power function average with gamma 8 and a
    relative width of 0.09: the decay is `power_decay` to first order in 1/n.

    >>> decay_at(0, 0.9999, False), decay_at(1, 0.9999, False), decay_at(1, 0.9999, True)
    (0.0, 0.9999, 0.18181818181818182)
    """
    if step == 0:
        return 0.0
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


@torch.no_grad()
def update(average: Iterable[Tensor], weights: Iterable[Tensor], decay: float) -> None:
    """Set average to decay * average + (1 - decay) * weights, in place. Both are lists of float32 tensors.

    >>> a = torch.zeros(1)
    >>> update([a], [torch.ones(1)], 0.75)
    >>> a.item()
    0.25
    """
    torch._foreach_lerp_(list(average), list(weights), 1 - decay)


# -- the averages of snapshots -----------------------------------------------------------------------------------------

TRACKED = {"power-0.05": 0.05, "power-0.10": 0.10}
"""The two averages that a run with snapshots tracks: the name of the file, and sigma_rel."""

WIDEST = 0.288
"""The largest sigma_rel: gamma is nearly 0 there, and all steps weigh almost the same."""


@functools.cache
def gamma_of(sigma_rel: float) -> float:
    """The exponent of the profile whose standard deviation is `sigma_rel` times the length of the training so far.

    It is the largest root of sigma_rel^2 (gamma + 2)^2 (gamma + 3) = gamma + 1 (Karras et al. 2024, Eq. 123 and 126).

    >>> [round(gamma_of(sigma_rel), 2) for sigma_rel in TRACKED.values()]
    [16.97, 6.94]
    """
    x = sigma_rel**-2
    return float(np.roots([1, 7, 16 - x, 12 - x]).real.max())


def power_decay(step: int, sigma_rel: float) -> float:
    """The decay of update `step`, counted from 0: beta(t) = (1 - 1/t)^(gamma + 1) with t = step + 1 (Eq. 127).

    After update T the average is the integral of p(t) theta(t) over [0, T], exactly. p(t) = (gamma + 1) t^gamma /
    T^(gamma + 1) is the profile (Eq. 121), and theta(t) is the weights after update k for k - 1 < t <= k.

    >>> power_decay(0, 0.1), round(power_decay(99, 0.1), 4)
    (0.0, 0.9233)
    """
    return float((1 - 1 / (step + 1)) ** (gamma_of(sigma_rel) + 1))


def inner(t_a: Floats, gamma_a: Floats, t_b: Floats, gamma_b: Floats) -> Floats:
    """The integral of p_a(t) p_b(t), two profiles that end at t_a and t_b (Eq. 151). Arrays of float64 that broadcast.

    >>> inner(np.array(1.0), np.array(1.0), np.array(2.0), np.array(1.0)).item()  # of 2t on [0, 1] and t/2 on [0, 2]
    0.3333333333333333
    """
    early, late = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    gamma_late = np.where(t_a < t_b, gamma_b, gamma_a)
    product: Floats = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * (early / late) ** gamma_late / late
    return product


def fit(steps: Sequence[int], sigma_rels: Sequence[float]) -> tuple[Floats, Floats]:
    """The sums of snapshots that are nearest to averages of other widths at the last step (Algorithm 3).

    steps       of the snapshots, in rising order; each holds an average of every width in TRACKED
    sigma_rels  the widths that are wanted, each above 0 and at most WIDEST

    Returns the coefficients, [sigma_rels, steps, TRACKED], and the relative residuals, [sigma_rels], both float64. A
    residual is |sum - p| / |p|, where p is the wanted profile and |.| the norm of L2 on [0, T]. The coefficients add up
    to 1, so a weight that never changes keeps its value. For weights theta(t) and any constant c, the sum of snapshots
    differs from the wanted average by at most residual |p| |theta - c| (Cauchy-Schwarz).

    >>> x, residuals = fit([100, 200, 300], [0.05, 0.07])
    >>> x[0].round(6).tolist() == [[0, 0], [0, 0], [1, 0]], residuals.round(3).tolist()
    (True, [0.0, 0.043])
    """
    t, gamma = np.repeat(steps, len(TRACKED)) / steps[-1], np.tile([gamma_of(s) for s in TRACKED.values()], len(steps))
    now, wanted = np.ones(1), np.array([gamma_of(s) for s in sigma_rels])
    A = inner(t[:, None], gamma[:, None], t, gamma)
    B = inner(t[:, None], gamma[:, None], now, wanted)
    square = inner(now, wanted, now, wanted)
    one = np.ones((len(t), 1))
    with_sum = np.block([[A, one], [one.T, np.zeros((1, 1))]])  # Lagrange's condition that the coefficients add up to 1
    x = np.linalg.solve(with_sum, np.vstack([B, np.ones_like(wanted)]))[:-1]
    residual = np.sqrt(np.maximum(0, (x * (A @ x - 2 * B)).sum(0) + square) / square)
    return x.T.reshape(len(wanted), len(steps), len(TRACKED)), residual

"""Restoration without training: a model samples x_0 for a measurement A x_0 + noise, and was not trained for A.

`ddnm` is for linear operators A = U diag(s) V^T. `dps` is for all functions that PyTorch can differentiate. Both are
generators that yield Steps(t, x, x0), as samplers do; the x of the last one is the result. Neither samples the true
posterior of x_0. docs/howto/restore.md shows how far they are from it on data whose posterior is known.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm.conditions import LUMA, grey
from ddpm.denoiser import Denoiser
from ddpm.editing import back_up, moves
from ddpm.errors import InputError, finite_number
from ddpm.noise import Noise
from ddpm.samplers import Levels, Step

# -- operators ---------------------------------------------------------------------------------------------------------


class Linear(ABC):
    """A linear operator A = U diag(s) V^T on images [B, C, H, W], without loops over its matrix."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """A x, for x [B, C, H, W]."""

    @abstractmethod
    def inverse(self, y: Tensor) -> Tensor:
        """A^+ y = V diag(1/s) U^T y, [B, C, H, W], for y of the shape of A x; 1/s is 0 where s is 0."""

    @abstractmethod
    def filtered(self, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        """V diag(f(s)) V^T x, for x [B, C, H, W]. f takes singular values, float64 of any shape, elementwise."""


class _OneValue(Linear):
    """An operator whose singular values are all s or 0. A^+ A then projects on the directions of s."""

    @property
    @abstractmethod
    def s(self) -> float:
        """The singular value that is not 0."""

    def filtered(self, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        seen, unseen = f(torch.tensor([self.s, 0], dtype=torch.float64)).tolist()
        projected = self.inverse(self(x))
        result: Tensor = projected * seen + (x - projected) * unseen
        return result


@dataclass(frozen=True)
class SuperResolution(_OneValue):
    """Each block of factor x factor pixels becomes its mean: [B, C, H, W] -> [B, C, H / factor, W / factor].

    A row of A has factor^2 entries of 1/factor^2, so s = 1/factor, and A^+ repeats each pixel. The factor divides H and
    W.

    >>> half = SuperResolution(2)
    >>> half(torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]])), half.inverse(torch.tensor([[[[0.5]]]])).shape
    (tensor([[[[0.5000]]]]), torch.Size([1, 1, 2, 2]))
    """

    factor: int

    @property
    def s(self) -> float:
        return 1 / self.factor

    def __call__(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.factor)

    def inverse(self, y: Tensor) -> Tensor:
        return y.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)


@dataclass(frozen=True, eq=False)
class Mask(_OneValue):
    """Pixels are hidden: they become 0.

    hidden  bool, of a shape that broadcasts to [C, H, W]: true where the image is to be restored, as in
            `editing.inpaint`

    >>> Mask(torch.tensor([True, False]))(torch.ones(1, 1, 1, 2))
    tensor([[[[0., 1.]]]])
    """

    hidden: Tensor

    @property
    def s(self) -> float:
        return 1.0

    def __call__(self, x: Tensor) -> Tensor:
        return torch.where(self.hidden, 0, x)

    def inverse(self, y: Tensor) -> Tensor:
        return torch.where(self.hidden, 0, y)


@dataclass(frozen=True)
class Grey(_OneValue):
    """Colours become luma, 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601), as in Pillow: [B, 3, H, W] -> [B, 1, H, W].

    >>> Grey()(torch.ones(1, 3, 1, 1)).item()
    1.0
    """

    @property
    def s(self) -> float:
        return math.hypot(*LUMA)

    def __call__(self, x: Tensor) -> Tensor:
        return grey(x)

    def inverse(self, y: Tensor) -> Tensor:
        return y * y.new_tensor(LUMA)[:, None, None] / self.s**2


@dataclass(frozen=True)
class Blur(Linear):
    """A Gaussian blur, separable, that is cut at 4 sigma and reflects at the edges, as scipy.ndimage.gaussian_filter.

    sigma  the standard deviation in pixels, above 0
    size   (H, W) of the images
    least  singular values below it count as 0. A^+ multiplies noise by 1/s, and a blur has singular values below 1e-9

    >>> blur = Blur(1.0, (8, 8))
    >>> round(blur(torch.ones(1, 1, 8, 8)).mean().item(), 6)
    1.0
    """

    sigma: float
    size: tuple[int, int]
    least: float = 1e-6

    @cached_property
    def _axes(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """U, s and V^T of the one-dimensional blur of each axis."""
        return [torch.linalg.svd(_blur_matrix(side, self.sigma)) for side in self.size]

    @cached_property
    def _s(self) -> Tensor:
        """The singular values [H, W], products of those of the axes."""
        s = torch.outer(*(s for _, s, _ in self._axes))
        return s.where(s >= self.least, 0)

    def _turned(self, x: Tensor, left: bool, back: bool) -> Tensor:
        """U^T x or, with `back`, U x, on both axes; or the same with V, unless `left`."""
        rows, columns = ((u if left else v.T).to(x.dtype).to(x.device) for u, _, v in self._axes)
        return rows @ x @ columns.T if back else rows.T @ x @ columns

    def _times(self, factors: Tensor, x: Tensor) -> Tensor:
        return factors.to(x.dtype).to(x.device) * x

    def __call__(self, x: Tensor) -> Tensor:
        return self._turned(self._times(self._s, self._turned(x, False, False)), True, True)

    def inverse(self, y: Tensor) -> Tensor:
        inverted = torch.where(self._s > 0, 1 / self._s, 0)
        return self._turned(self._times(inverted, self._turned(y, True, False)), False, True)

    def filtered(self, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        return self._turned(self._times(f(self._s), self._turned(x, False, False)), False, True)


def _blur_matrix(side: int, sigma: float) -> Tensor:
    """The blur of one axis, float64 [side, side]; position -1 is position 0 again, as in a mirror at the edge."""
    reach = int(4 * sigma + 0.5)
    offset = torch.arange(-reach, reach + 1)
    kernel = (-0.5 * (offset.double() / sigma) ** 2).exp()
    place = (torch.arange(side)[:, None] + offset) % (2 * side)
    place = torch.minimum(place, 2 * side - 1 - place)
    return torch.zeros(side, side, dtype=torch.float64).scatter_add(1, place, (kernel / kernel.sum()).expand(side, -1))


# -- methods -----------------------------------------------------------------------------------------------------------


def _posterior(abar_t: float, abar_s: float) -> tuple[float, float, float]:
    """The factors of x_0 and x_t in the mean of q(x_s | x_t, x_0), and its standard deviation (Eq. 7, from t to s)."""
    beta = 1 - abar_t / abar_s
    c_0, c_x = math.sqrt(abar_s) * beta / (1 - abar_t), math.sqrt(1 - beta) * (1 - abar_s) / (1 - abar_t)
    return c_0, c_x, math.sqrt(beta * (1 - abar_s) / (1 - abar_t))


def _brought(s: Tensor, noise: float) -> Tensor:
    """The standard deviation noise/s of the noise that the measurement brings into x_s, by singular value."""
    return torch.where(s > 0, noise / s, 0)


def _trust(s: Tensor, noise: float, sd: float) -> Tensor:
    """The diagonal of Sigma in V."""
    return torch.where(_brought(s, noise) > sd, sd / _brought(s, noise), 1)


def _fresh(s: Tensor, noise: float, sd: float) -> Tensor:
    """The square root of the diagonal of Phi in V."""
    return (sd**2 - _brought(s, noise) ** 2).clamp(min=0).sqrt()


@torch.no_grad()
def ddnm(
    denoiser: Denoiser,
    operator: Linear,
    measured: Tensor,
    noise: Noise,
    sigma: float = 0.0,
    steps: Levels = 100,
    jump: int = 10,
    resample: int = 1,
    y: Tensor | None = None,
) -> Iterator[Step]:
    """DDNM and DDNM+ (Wang et al. 2023, Algorithms 1, 2): ancestral sampling with an x0^ that agrees with `measured`.

    1. x0^ <- x0^ - Sigma A^+ (A x0^ - measured)  (their Eq. 17; with sigma 0, Sigma is I, and this is Eq. 13)
    2. x_s ~ N(c_0 x0^ + c_x x_t, Phi), which is q(x_s | x_t, x_0 = x0^) of Eq. 7 with less noise  (their Eq. 18)

    Sigma and Phi are diagonal in V (their Appendix I). In the direction of a singular value s_i, the measurement brings
    noise of the standard deviation c_0 sigma/s_i into x_s. Phi is the variance of Eq. 7 without this noise. If the
    noise is larger than Eq. 7 allows, Sigma makes the correction smaller, and Phi is 0.

    measured  A x_0 + noise in signal units, of the shape of `operator(x)`
    noise     noise(k), [B, C, H, W], gives the draws of `ancestral`, and with resampling those of `editing.inpaint`
    sigma     the standard deviation of the noise of `measured`, in signal units
    steps     how many levels to visit, spread evenly, or the levels themselves
    jump      how many of these levels to go back up in time travel, as in `editing.inpaint`
    resample  how often each level is passed; 1 is without time travel
    y         class labels, int64 [B], or None

    Yields about steps * resample Steps of [B, C, H, W], whose x0 is the corrected x0^. Raises InputError if sigma is
    negative, or if steps, jump or resample does not fit.

    >>> from ddpm import schedule
    >>> from ddpm.noise import per_image
    >>> grey = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear(), predict="x0")
    >>> small = torch.tensor([[[[0.5, -0.5]]]])
    >>> *_, last = ddnm(grey, SuperResolution(2), small, per_image([0], (1, 2, 4)), steps=10)
    >>> last.x[0, 0, 0].tolist()
    [0.5, 0.5, -0.5, -0.5]
    """
    sigma, schedule = finite_number("sigma", sigma, 0), denoiser.schedule
    abar, x = schedule.alpha_bar.tolist(), noise(schedule.T).to(measured)
    for t, s, key in moves(schedule, steps, jump, resample):
        if s > t:  # back up, by Eq. 2
            x = back_up(schedule, x, t, s, noise(key).to(x))
            continue
        c_0, c_x, sd = _posterior(abar[t], abar[s])
        x0 = denoiser(x, torch.full((len(x),), t, device=x.device), y).x0
        difference = operator.inverse(operator(x0) - measured)
        x0 = x0 - operator.filtered(difference, partial(_trust, noise=c_0 * sigma, sd=sd))
        x = c_0 * x0 + c_x * x
        if s > 0:
            x = x + operator.filtered(noise(key).to(x), partial(_fresh, noise=c_0 * sigma, sd=sd))
        yield Step(s, x, x0)


@torch.no_grad()
def dps(
    denoiser: Denoiser,
    operator: Callable[[Tensor], Tensor],
    measured: Tensor,
    noise: Noise,
    zeta: float = 1.0,
    steps: Levels | None = None,
    y: Tensor | None = None,
) -> Iterator[Step]:
    """DPS (Chung et al. 2023, Algorithm 1): ancestral sampling with steps against the gradient of the residual.

    1. x_s ~ q(x_s | x_t, x_0 = x0^)  (Eq. 7)
    2. x_s <- x_s - zeta / |r| grad |r|^2, where r = measured - A(x0^) and grad is that of x_t, through the network

    Each image has its own |r|. The noise of `measured` does not enter.

    operator  A, a function of images [B, C, H, W] in signal units that PyTorch can differentiate
    measured  A(x_0) and noise, of the shape of `operator(x)`, [B, ...]
    noise     noise(t), [B, C, H, W], is the draw that makes x_t
    zeta      the size of the steps, at least 0; 0 is ancestral sampling
    steps     how many levels to visit, spread evenly, or the levels themselves; None visits all, as in the paper
    y         class labels, int64 [B], or None

    Raises InputError if zeta is negative, if steps is out of range, if the operator's result is not a tensor of the
    shape of `measured`, and if it has no gradient that is finite.

    >>> from ddpm import schedule
    >>> from ddpm.noise import per_image
    >>> still = Denoiser(lambda x, timestep, y: x, schedule.linear(), predict="x0")
    >>> *_, last = dps(still, torch.tanh, torch.zeros(1, 1, 2, 2), per_image([0], (1, 2, 2)), steps=10)
    >>> last.x.shape
    torch.Size([1, 1, 2, 2])
    """
    zeta, abar = finite_number("zeta", zeta, 0), denoiser.schedule.alpha_bar.tolist()
    x = noise(denoiser.schedule.T).to(measured)
    levels = denoiser.schedule.levels(denoiser.schedule.T if steps is None else steps)
    for t, s in pairwise([*levels[::-1], 0]):
        with torch.enable_grad():
            xt = x.detach().requires_grad_()
            x0 = denoiser(xt, torch.full((len(x),), t, device=x.device), y).x0
            distance = (measured - _checked(operator(x0), measured)).flatten(1).norm(dim=1)
            (gradient,) = torch.autograd.grad(distance.sum(), xt, allow_unused=True)
        if gradient is None or not gradient.isfinite().all():
            raise InputError("operator: its gradient is not finite; want one that PyTorch can differentiate")
        c_0, c_x, sd = _posterior(abar[t], abar[s])
        x = c_0 * x0.detach() + c_x * x - 2 * zeta * gradient  # grad |r|^2 = 2 |r| grad |r|
        if s > 0:
            x = x + sd * noise(s).to(x)
        yield Step(s, x, x0.detach())


def _checked(result: Tensor, measured: Tensor) -> Tensor:
    """The operator's result. Raises InputError if it cannot be compared with `measured`, or not be differentiated."""
    shape = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
    if shape != list(measured.shape):
        raise InputError(f"operator: returned {shape}; want a tensor of {list(measured.shape)}, as measured")
    if not result.requires_grad:
        raise InputError("operator: its result has no gradient; want a function that PyTorch can differentiate")
    return result

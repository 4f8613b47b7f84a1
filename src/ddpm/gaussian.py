"""The Gaussians of the forward process and the divergence between two of them (Sections 2 and 3).

Coefficients are computed in float64 and are then converted to the dtype of x. Everything else has the dtype, the device
and the shape [B, ...] of x.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm.errors import InputError
from ddpm.schedule import Schedule


@dataclass(frozen=True)
class Gaussian:
    """N(mean, exp(log_variance) I).

    mean          [B, ...]
    log_variance  in nats; it has the shape of mean or broadcasts to it

    >>> Gaussian(torch.ones(2, 3), torch.zeros(2, 1)).sample(torch.zeros(2, 3)).tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """

    mean: Tensor
    log_variance: Tensor

    def sample(self, eps: Tensor) -> Tensor:
        """Turn standard normal noise `eps`, of the shape of mean, into a sample."""
        return self.mean + (0.5 * self.log_variance).exp() * eps


def extract(table: Tensor, t: Tensor) -> Tensor:
    """The entries of a table [T+1] at the levels t int64 [B]: [B], on the table's device.

    Raises InputError for a level outside 0..T, if t is on the CPU. On a GPU the check would have to wait for the GPU,
    so there only levels above T raise an error, which is CUDA's own.
    """
    return table[check_levels(t, 0, len(table) - 1).to(table.device)]


def check_levels(t: Tensor, first: int, last: int) -> Tensor:
    """Return t if it is an integer tensor; on the CPU its values must be in first..last. Raises InputError otherwise.

    >>> check_levels(torch.tensor([1, 0]), 1, 1000)
    Traceback (most recent call last):
    ...
    ddpm.errors.InputError: t 0: want a noise level, 1 to 1000
    """
    if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
        raise InputError(f"t of dtype {t.dtype}: want int64")
    t = t.long()
    if t.device.type == "cpu" and t.numel():
        least, most = (int(end) for end in t.aminmax())
        if least < first or most > last:
            raise InputError(f"t {least if least < first else most}: want a noise level, {first} to {last}")
    return t


def broadcast(coefficient: Tensor, x: Tensor) -> Tensor:
    """Shape coefficients [B], one per image, as [B, 1, ...], so that they multiply x; with x's dtype and device.

    Raises InputError if x is not floating, because the coefficients would then be rounded to whole numbers.
    """
    if not x.is_floating_point():
        raise InputError(f"x of dtype {x.dtype}: want the signal in [-1, 1], a floating dtype; see pixels.to_signal")
    # The dtype changes before the device does, because a device may have no float64 (mps).
    return coefficient.to(x.dtype).to(x.device).view(-1, *[1] * (x.ndim - 1))


def q_step(schedule: Schedule, x_prev: Tensor, t: Tensor) -> Gaussian:
    """q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)  (Eq. 2), for t int64 [B] in 1..T.

    >>> from ddpm import schedule
    >>> q_step(schedule.const(2, beta_T=0.75), torch.ones(1, 1), torch.tensor([1])).mean.item()
    0.5
    """
    beta = extract(schedule.beta, t)
    return Gaussian(broadcast((1 - beta).sqrt(), x_prev) * x_prev, broadcast(beta.log(), x_prev))


def q(schedule: Schedule, x0: Tensor, t: Tensor) -> Gaussian:
    """q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I)  (Eq. 4), for t int64 [B] in 1..T.

    >>> from ddpm import schedule
    >>> q(schedule.const(2, beta_T=0.5), torch.ones(1, 1), torch.tensor([2])).mean.item()
    0.5
    """
    abar = extract(schedule.alpha_bar, t)
    return Gaussian(broadcast(abar.sqrt(), x0) * x0, broadcast((1 - abar).log(), x0))


def q_sample(schedule: Schedule, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps  (Eq. 4).

    x0 [B, ...] is the signal, t int64 [B] is in 0..T, and eps is standard normal noise of x0's shape. The result has
    the shape of x0. At t = 0 it is x0.

    >>> from ddpm import schedule
    >>> x0, eps = torch.ones(1, 1), torch.full((1, 1), 2.0)
    >>> q_sample(schedule.const(1, beta_T=0.75), x0, torch.tensor([1]), eps).item()  # 0.5 x 1 + 0.866 x 2
    2.232...
    """
    abar = extract(schedule.alpha_bar, t)
    return broadcast(abar.sqrt(), x0) * x0 + broadcast((1 - abar).sqrt(), x0) * eps


@functools.lru_cache(maxsize=8)  # every step of a sampler needs this table
def beta_tilde(schedule: Schedule) -> Tensor:
    """beta~_t = (1 - abar_{t-1})/(1 - abar_t) beta_t  (Eq. 7), float64 [T+1], with beta~_1 replaced.

    Eq. 7 gives beta~_1 = 0, and the logarithm of that variance is not finite. As in the official code, the table holds
    beta~_2 instead (beta_1 if T = 1). Losses, likelihood, samplers and codec all use this table. beta~_0 is 0 and is
    not used.

    >>> from ddpm import schedule
    >>> [f"{b:.5e}" for b in beta_tilde(schedule.linear())[1:3].tolist()]
    ['5.45319e-05', '5.45319e-05']
    """
    abar, beta = schedule.alpha_bar, schedule.beta
    tilde = torch.zeros_like(abar)
    tilde[1:] = (1 - abar[:-1]) / (1 - abar[1:]) * beta[1:]
    tilde[1] = tilde[2] if schedule.T > 1 else beta[1]
    return tilde


def posterior_coefficients(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """The factors c_0 of x_0 and c_x of x_t in mu~_t  (Eq. 7), each float64 [B], for t int64 [B] in 1..T.

    >>> from ddpm import schedule
    >>> c_0, c_x = posterior_coefficients(schedule.linear(), torch.tensor([2]))
    >>> round(c_0.item(), 7), round(c_x.item(), 7)
    (0.5452915, 0.4547085)
    """
    abar, abar_prev = extract(schedule.alpha_bar, t), extract(schedule.alpha_bar, t - 1)
    alpha = abar / abar_prev
    beta = 1 - alpha
    c_0 = abar_prev.sqrt() * beta / (1 - abar)
    c_x = alpha.sqrt() * (1 - abar_prev) / (1 - abar)
    return c_0, c_x


def q_posterior(schedule: Schedule, x0: Tensor, xt: Tensor, t: Tensor) -> Gaussian:
    """q(x_{t-1} | x_t, x_0) = N(mu~_t(x_t, x_0), beta~_t I)  (Eq. 6, 7).

    x0 and xt are [B, ...], and t int64 [B] is in 1..T. log_variance is [B, 1, ...]; `beta_tilde` gives its value at t =
    1.

    >>> from ddpm import schedule
    >>> p = q_posterior(schedule.linear(), torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([2]))
    >>> round(p.mean.item(), 5), round(p.log_variance.item(), 4)
    (0.54529, -9.8167)
    """
    c_0, c_x = posterior_coefficients(schedule, t)
    mean = broadcast(c_0, x0) * x0 + broadcast(c_x, xt) * xt
    return Gaussian(mean, broadcast(extract(beta_tilde(schedule), t).log(), xt))


def calibrated_variance(schedule: Schedule, mse: Tensor, first: float | None = None) -> Tensor:
    """sigma_t^2 = beta~_t + c_0^2 mse_t, the scalar variance that minimises the bound (Bao et al. 2022), float64 [T+1].

    mse    [T], the mean of |x_0 - x0^(x_t)|^2 / D at levels 1..T, measured on training images
    first  replaces sigma_1^2. The default is sigma_1^2 = mse_1, because Eq. 7 gives the posterior variance 0 at t = 1;
           this is the best value for a density. For the bins of Eq. 13 a smaller value is better if all errors are
           small, and a larger value if a few errors are large

    c_0 is the factor of x_0 in mu~_t (Eq. 7).

    >>> from ddpm import schedule
    >>> s = schedule.linear()
    >>> bool((calibrated_variance(s, torch.zeros(1000))[2:] == beta_tilde(s)[2:]).all())
    True
    """
    t = torch.arange(1, schedule.T + 1)
    c_0, _ = posterior_coefficients(schedule, t)
    variance = torch.zeros_like(schedule.alpha_bar)
    variance[1:] = c_0**2 * mse.to(variance)
    variance[2:] += beta_tilde(schedule)[2:]
    if first is not None:
        variance[1] = first
    return variance


def implied_mse(schedule: Schedule, variance: Tensor) -> Tensor:
    """The inverse of `calibrated_variance`: the mse_t, float64 [T], for a table sigma_t^2 [T+1].

    A table of variances holds for its own levels only, but the error of x0^ holds for any choice of levels. The result
    is sigma_1^2 at t = 1, and 0 where the table is below beta~_t.

    >>> from ddpm import schedule
    >>> s, mse = schedule.linear(), torch.linspace(1e-3, 0.3, 1000, dtype=torch.float64)
    >>> torch.allclose(implied_mse(s, calibrated_variance(s, mse)), mse)
    True
    """
    c_0, _ = posterior_coefficients(schedule, torch.arange(1, schedule.T + 1))
    variance, tilde = variance.to(c_0)[1:], beta_tilde(schedule)[1:].clone()
    tilde[0] = 0
    return ((variance - tilde) / c_0**2).clamp(min=0)


def sum_per_image(x: Tensor) -> Tensor:
    """Sum over all dimensions but the first: [B, ...] -> [B]."""
    return x.flatten(1).sum(1)


def kl(q: Gaussian, p: Gaussian) -> Tensor:
    """KL(q || p) of two Gaussians with diagonal covariances, nats per image [B].

    >>> a, b = Gaussian(torch.zeros(1, 2), torch.zeros(1, 2)), Gaussian(torch.ones(1, 2), torch.zeros(1, 2))
    >>> kl(a, a).item(), kl(a, b).item()  # 1/2 per dimension
    (0.0, 1.0)
    """
    r = q.log_variance - p.log_variance
    return sum_per_image(0.5 * (r.expm1() - r + (q.mean - p.mean) ** 2 * (-p.log_variance).exp()))


def bits_per_dim(nats: Tensor, dims: int) -> Tensor:
    """Convert nats per image, of any shape, to bits per dimension; dims = C H W.

    >>> bits_per_dim(torch.tensor(math.log(2) * 12), 12).item()
    1.0
    """
    return nats / (dims * math.log(2))

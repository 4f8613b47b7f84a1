"""The variational bound term by term (Eq. 5) and the discretised decoder (Eq. 13)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm import float64, pixels
from ddpm.denoiser import Denoiser, Estimate
from ddpm.gaussian import (
    Gaussian,
    beta_tilde,
    bits_per_dim,
    extract,
    kl,
    posterior_coefficients,
    q,
    q_posterior,
    q_sample,
    sum_per_image,
)
from ddpm.noise import Noise
from ddpm.pixels import EIGHT_BIT, Values


def _log_cdf(z: Tensor) -> Tensor:
    """log Phi(z). The float32 gradient of torch.special.log_ndtr is 4% off at -1e3, and 0 or inf at -1e5."""
    left, right = z.clamp(max=0), z.clamp(min=0)
    tail = torch.log(torch.special.erfcx(-left * 0.5**0.5) / 2) - left.square() / 2
    return torch.where(z < 0, tail, torch.log1p(-torch.erfc(right * 0.5**0.5) / 2))


def _log_mass(lower: Tensor, upper: Tensor, p: Gaussian) -> Tensor:
    """log of p's mass between two edges, log(Phi(b) - Phi(a)), elementwise and exact far into the tails."""
    inverse_sigma = (-0.5 * p.log_variance).exp()
    # An infinite edge is moved to where the normal CDF rounds to 0 or 1, so that gradients stay finite. There are two
    # clamps because the gradient of the product inside the second one would otherwise be 0 x inf, which is NaN.
    lower, upper = lower.clamp(min=-1e30), upper.clamp(max=1e30)
    a = ((lower - p.mean) * inverse_sigma).clamp(-1e6, 1e6)
    b = ((upper - p.mean) * inverse_sigma).clamp(-1e6, 1e6)
    flip = a + b > 0  # right of the mean, use the mirrored interval, where Phi does not round to 1
    a, b = torch.where(flip, -b, a), torch.where(flip, -a, b)
    log_a, log_b = _log_cdf(a), _log_cdf(b)
    log_mass: Tensor = log_b + torch.log(-torch.expm1((log_a - log_b).clamp(max=-1e-30)))
    return log_mass


def decoder_log_prob(x0: Tensor, p: Gaussian, values: Values = EIGHT_BIT) -> Tensor:
    """log p_theta(x_0 | x_1): the mass of p on each pixel's bin, x0 +- 1/255, open at -1 and 1  (Eq. 13).

    x0      [B, ...], the signal of pixels of these values
    p       p_theta(x_0 | x_1)
    values  tell how wide a bin is: 2/255 for 8-bit pixels

    Returns nats per image [B]. The normal CDF is exact. The official code approximates it by a tanh and floors the mass
    at 1e-12.

    >>> sure = Gaussian(torch.zeros(1, 3) + 1 / 255, torch.full((1, 1), -20.0))
    >>> decoder_log_prob(pixels.to_signal(torch.full((1, 3), 128, dtype=torch.uint8)), sure).item()
    0.0
    """
    half = values.bin / 2
    lower = torch.where(x0 < -1 + half, -torch.inf, x0 - half)
    upper = torch.where(x0 > 1 - half, torch.inf, x0 + half)
    return sum_per_image(_log_mass(lower, upper, p))


def decoder_mass(p: Gaussian, values: Values = EIGHT_BIT) -> Tensor:
    """The probability of all K pixel values in Eq. 13: [B, ..., K] for p.mean [B, ...]; the last dimension sums to 1.

    >>> mass = decoder_mass(Gaussian(torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)))
    >>> mass.shape, bool((mass.sum(-1) - 1).abs().max() < 1e-12)
    (torch.Size([1, 2, 256]), True)
    """
    _, lower, upper = pixels.bins(p.mean, values)
    wide = Gaussian(p.mean.unsqueeze(-1), p.log_variance.unsqueeze(-1))
    return _log_mass(lower, upper, wide).exp()


def prior(denoiser: Denoiser, x0: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, I))  (Eq. 5), nats per image [B]; about 1e-5 bits/dim for the paper's schedule."""
    T = torch.full((len(x0),), denoiser.schedule.T, device=x0.device)
    qT = q(denoiser.schedule, x0, T)
    return kl(qT, Gaussian(torch.zeros_like(qT.mean), torch.zeros_like(qT.log_variance)))


def term(denoiser: Denoiser, x0: Tensor, xt: Tensor, t: Tensor, y: Tensor | None = None) -> tuple[Tensor, Estimate]:
    """The bound's term at level t  (Eq. 5), nats per image [B], and the estimate that it uses.

    The term is L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p_theta) if t > 1, and L_0 = -log p_theta(x_0 | x_1) if t = 1.
    """
    estimate = denoiser(xt, t, y)
    divergence = kl(q_posterior(denoiser.schedule, x0, xt, t), estimate.p)
    if t.device.type == "cpu" and not (t == 1).any():  # on a GPU this test would have to wait for the GPU
        return divergence, estimate
    return torch.where(t == 1, -decoder_log_prob(x0, estimate.p, denoiser.values), divergence), estimate


@dataclass(frozen=True)
class Bound:
    """The terms of L in Eq. 5 for B images. -log p(x_0) is at most their sum.

    prior    L_T, nats per image [B]
    kl       L_1 .. L_{T-1}, nats per image [B, T-1]; kl[:, t-2] belongs to level t
    decoder  L_0, nats per image [B]
    mse      |x_0 - x0^(x_t)|^2 / D at levels 1..T, signal units squared [B, T]
    dims     D = C H W
    """

    prior: Tensor
    kl: Tensor
    decoder: Tensor
    mse: Tensor
    dims: int

    def bits_per_dim(self) -> Tensor:
        """The whole bound, bits per dimension [B]."""
        return bits_per_dim(self.prior + self.kl.sum(1) + self.decoder, self.dims)


@torch.no_grad()
def vlb(denoiser: Denoiser, x0: Tensor, noise: Noise, y: Tensor | None = None) -> Bound:
    """The variational bound with one draw at each of the T levels, as in the paper's evaluation (Eq. 5, Section 4).

    x0     [B, C, H, W], the signal of pixels
    noise  noise(t), of x0's shape, makes x_t
    y      int64 [B] class labels, or None

    Everything but the network is computed in float64. There are T network calls. Raises InputError if x0 is not on the
    values of pixels, for floating point pixels, and on a device without float64 (mps).

    >>> from ddpm import schedule
    >>> from ddpm.noise import per_image
    >>> grey = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear(10, 1e-3, 0.8), predict="x0")
    >>> bound = vlb(grey, torch.full((2, 1, 4, 4), 1 / 255), per_image([0, 1], (1, 4, 4)))
    >>> bound.kl.shape, bound.bits_per_dim().shape
    (torch.Size([2, 9]), torch.Size([2]))
    """
    x0 = pixels.on_grid(x0, denoiser.values)
    T = denoiser.schedule.T
    terms = torch.empty(len(x0), T, dtype=x0.dtype, device=x0.device)
    mse = torch.empty_like(terms)
    for level in range(T, 0, -1):
        t = torch.full((len(x0),), level, device=x0.device)
        xt = q_sample(denoiser.schedule, x0, t, noise(level).to(x0))
        terms[:, level - 1], estimate = term(denoiser, x0, xt, t, y)
        mse[:, level - 1] = (x0 - estimate.x0).square().flatten(1).mean(1)
    return Bound(prior(denoiser, x0), terms[:, 1:], terms[:, 0], mse, x0[0].numel())


def decoder_cost(x0: Tensor, mean: Tensor, variances: Tensor, values: Values = EIGHT_BIT) -> Tensor:
    """L_0 (Eq. 13) summed over images, nats [K], for each of K values of sigma_1^2: x0, mean [B, ...], variances [K].

    >>> x0 = pixels.to_signal(torch.tensor([[7, 9]], dtype=torch.uint8))
    >>> decoder_cost(x0, x0, torch.tensor([1e-7, 1e-4, 1e-1])).round().tolist()  # the mean is right
    [0.0, 2.0, 9.0]
    """
    x0, mean = float64.require(x0), float64.require(mean)
    ones = torch.ones_like(mean[:, :1])
    candidates = (Gaussian(mean, v.log() * ones) for v in variances.double())
    return torch.stack([-decoder_log_prob(x0, p, values).sum() for p in candidates])


def vlb_with_variance(bound: Bound, denoiser: Denoiser, x0: Tensor, noise: Noise, y: Tensor | None = None) -> Bound:
    """The bound that `vlb` would give for a denoiser with another variance, computed from `bound`.

    Every term but L_0 follows from mse: with r = beta~_t / sigma_t^2, KL = D/2 (r - 1 - log r + c_0^2 mse_t /
    sigma_t^2). L_0 takes one network call. x0, noise and y must be those of `bound`. Raises ValueError for mu
    prediction, whose mean is not computed from x0^, and for a learned variance.

    >>> from dataclasses import replace
    >>> from ddpm import schedule
    >>> from ddpm.noise import per_image
    >>> grey = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear(10, 1e-3, 0.8), predict="x0")
    >>> small, x0 = replace(grey, variance="fixed_small"), torch.full((2, 1, 4, 4), 1 / 255)
    >>> noise = per_image([0, 1], (1, 4, 4))
    >>> a, b = vlb_with_variance(vlb(grey, x0, noise), small, x0, noise), vlb(small, x0, noise)
    >>> bool((a.bits_per_dim() - b.bits_per_dim()).abs().max() < 1e-12)
    True
    """
    if not denoiser.bound_follows_from_mse:
        raise ValueError("the terms follow from mse only for a fixed variance, with eps, x0 or v prediction")
    x0, schedule = float64.require(x0), denoiser.schedule
    first = torch.ones(len(x0), dtype=torch.int64, device=x0.device)
    decoder, _ = term(denoiser, x0, q_sample(schedule, x0, first, noise(1).to(x0)), first, y)
    t = torch.arange(2, schedule.T + 1, device=x0.device)
    sigma2 = denoiser.log_variance(bound.mse[0, 1:], t, None).exp()  # [T-1]
    c_0, _ = (c.to(x0.device) for c in posterior_coefficients(schedule, t))
    log_r = extract(beta_tilde(schedule), t).log().to(x0.device) - sigma2.log()
    divergence = bound.dims / 2 * (log_r.expm1() - log_r + c_0**2 * bound.mse[:, 1:] / sigma2)
    return replace(bound, kl=divergence, decoder=decoder)


@torch.no_grad()
def sampled_terms(denoiser: Denoiser, x0: Tensor, t: Tensor, noise: Tensor, y: Tensor | None = None) -> Tensor:
    """The bound's terms at the given levels, nats [B, K]: t int64 [B, K] in 1..T, noise [B, K, C, H, W].

    x0 [B, C, H, W] is the signal of pixels. If the levels are drawn from q, the sum of the terms with weights 1 /
    (K q(t)) is an unbiased estimate of L - L_T (Eq. 5). There is one network call, with B K images. Raises InputError
    as `vlb` does.
    """
    B, K = t.shape
    repeated = pixels.on_grid(x0, denoiser.values).repeat_interleave(K, dim=0)
    xt = q_sample(denoiser.schedule, repeated, t.flatten(), noise.flatten(0, 1).to(repeated))
    labels = None if y is None else y.repeat_interleave(K)
    return term(denoiser, repeated, xt, t.flatten(), labels)[0].view(B, K)


class Received(NamedTuple):
    """What a receiver knows at level t.

    t     the level, T .. 0
    nats  the cost of everything sent so far, nats per image [B]
    x     x_t [B, C, H, W]; the image if t = 0
    x0    the estimate x0^ from x_t; the image if t = 0
    """

    t: int
    nats: Tensor
    x: Tensor
    x0: Tensor


@torch.no_grad()
def progressive_coding(denoiser: Denoiser, x0: Tensor, noise: Noise, y: Tensor | None = None) -> Iterator[Received]:
    """Algorithms 3 and 4 with an ideal coder (Eq. 5): the receiver's state at levels T .. 0.

    x_T costs L_T, each of x_{T-1} .. x_1 costs KL(q || p_theta), and x_0 costs L_0. Figure 10 shows the estimates x0.

    x0     [B, C, H, W], the signal of pixels
    noise  noise(t), of x0's shape, makes x_t ~ q(x_t | x_{t+1}, x_0)
    y      int64 [B] class labels, or None

    Yields T + 1 times, with one network call between two yields. The nats of the last one are one draw of the bound.
    Raises InputError as `vlb` does.

    >>> from ddpm import schedule
    >>> from ddpm.noise import per_image
    >>> grey = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear(10, 1e-3, 0.8), predict="x0")
    >>> states = list(progressive_coding(grey, torch.full((1, 1, 4, 4), 1 / 255), per_image([0], (1, 4, 4))))
    >>> [state.t for state in states], bool(states[0].nats < states[-1].nats)
    ([10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0], True)
    """
    x0, T = pixels.on_grid(x0, denoiser.values), denoiser.schedule.T
    nats = prior(denoiser, x0)
    xt = q_sample(denoiser.schedule, x0, torch.full((len(x0),), T, device=x0.device), noise(T).to(x0))
    for level in range(T, 0, -1):
        t = torch.full((len(x0),), level, device=x0.device)
        cost, estimate = term(denoiser, x0, xt, t, y)
        yield Received(level, nats, xt, estimate.x0)
        nats = nats + cost
        if level > 1:
            xt = q_posterior(denoiser.schedule, x0, xt, t).sample(noise(level - 1).to(x0))
    yield Received(0, nats, x0, x0)

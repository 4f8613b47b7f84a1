"""Likelihood by the probability-flow ODE (Song et al. 2021): another model of the same network than the chain."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from ddpm import likelihood, pixels
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError
from ddpm.gaussian import extract, q_sample, sum_per_image


def _even_levels(log_tan: Tensor, steps: int | None) -> list[int]:
    """`steps` levels from 1 to T, evenly spaced in log-SNR: the nearest that there are, each once (None: all)."""
    T = len(log_tan) - 1
    if steps is None:
        return list(range(1, T + 1))
    if not 2 <= steps <= T:
        raise InputError(f"steps {steps}: want 2 to {T}, the number of noise levels")
    even = torch.linspace(float(log_tan[1]), float(log_tan[T]), steps, dtype=torch.float64)
    nearest = (log_tan[1:] - even[:, None]).abs().argmin(1) + 1  # [steps]
    return sorted(set(nearest.tolist()))


@torch.no_grad()
def probability_flow(
    denoiser: Denoiser, x: Tensor, probe: Tensor, steps: int | None = None, y: Tensor | None = None
) -> Tensor:
    """-log p(x) under the ODE that carries N(0, I) at level T to level 1, nats per image float64 [B].

    Song et al. 2021 (score-based SDEs), Eq. 13, where cos^2 phi = abar, score = -eps^ / sin phi and
    1/2 beta dt = tan phi dphi:

        dx/dphi   = v = cos phi eps^(x) - sin phi x0^(x)
        -log p(x) = -log N(x_T; 0, I) - integral of div v dphi - D/2 log abar_1,   x_1 = sqrt(abar_1) x   (Eq. 39)
        div v     = E probe^T (dv/dx) probe                                        (Skilling-Hutchinson, Eq. 40)

    x [B, C, H, W] is continuous, in signal units; sqrt(abar_1) x is taken for x_1 with no noise added, so p is smooth
    on the scale of level 1's noise. probe, shape of x, holds +-1 at random (or standard normal draws, which err more),
    the same all along; its error has mean zero. steps levels, 2..T, are visited evenly in log-SNR (None: all T; fewer
    where one is the nearest twice). Heun's method between them errs by O(1/steps^2), mostly to too few nats. y int64
    [B] class labels or None. Nothing is clipped; everything but the network is float64. 2 (steps - 1) network calls,
    each with a vector-Jacobian product.

    This is the density of another model than the reverse chain that `vlb` bounds, and says nothing of the chain's.
    Raises InputError for steps out of range and for a schedule with abar_T = 0, whose log-SNR has no end.

    >>> from ddpm import schedule
    >>> normal = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear(), predict="v")  # v = 0: N(0, I)
    >>> nats = probability_flow(normal, torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4), steps=10)
    >>> [round(n, 2) for n in nats.tolist()], round(16 / 2 * math.log(2 * math.pi), 2)
    ([14.7, 14.7], 14.7)
    """
    schedule, denoiser = denoiser.schedule, denoiser.unclipped()
    if schedule.alpha_bar[-1] == 0:
        raise InputError("probability flow: the schedule ends at alpha_bar 0; want one that ends above it")
    tan = ((1 - schedule.alpha_bar.cpu()) / schedule.alpha_bar.cpu()).sqrt()
    phi, log_tan = tan.atan(), tan.log()
    cos, sin = phi.cos(), phi.sin()

    def flow(x: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """v = dx/dphi [B, C, H, W] and div v dphi/dlog tan phi [B], which is flat near data: div v ~ 1/phi there."""
        t = torch.full((len(x),), level, device=x.device)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            estimate = denoiser(x, t, y)
            v = cos[level] * estimate.eps - sin[level] * estimate.x0
            (row,) = torch.autograd.grad(v, x, probe)  # probe^T dv/dx
        return v.detach(), cos[level] * sin[level] * sum_per_image(row * probe)

    x, probe = cos[1] * x.double(), probe.to(x.device, torch.float64)
    log_det = x.new_full((len(x),), x[0].numel() * math.log(cos[1]))  # of x -> x_1
    for s, t in pairwise(_even_levels(log_tan, steps)):
        v, div = flow(x, s)
        v_t, div_t = flow(x + (phi[t] - phi[s]) * v, t)
        x = x + (phi[t] - phi[s]) / 2 * (v + v_t)
        log_det = log_det + (log_tan[t] - log_tan[s]) / 2 * (div + div_t)
    return sum_per_image(0.5 * x.square() + 0.5 * math.log(2 * math.pi)) - log_det


def bound(
    denoiser: Denoiser, x0: Tensor, u: Tensor, probe: Tensor, steps: int | None = None, y: Tensor | None = None
) -> Tensor:
    """-log P(x_0) of 8-bit pixels under the probability flow, bounded from above, nats per image float64 [B].

    Uniform dequantisation: P is the mass of the flow's density in the pixels' bins, and by Jensen's inequality
    -log P(x_0) <= E_u[-log p(x_0 + (u - 1/2) BIN)] - D log BIN; this is the right side for one u.

    x0 [B, C, H, W] is the signal of 8-bit pixels, u of its shape uniform in [0, 1); the rest is `probability_flow`'s.
    It bounds the flow's likelihood, not the reverse chain's. Where data are sharper than level 1's noise the exact flow
    is not: with the linear schedule, whose noise there is 1.3 grey levels, a pixel that is known for sure costs it 1.7
    bits. (A trained network's flow need not be exact, and may be sharper.)

    >>> from ddpm import schedule
    >>> from ddpm.gaussian import bits_per_dim
    >>> normal = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear(), predict="v")
    >>> x0, u = torch.full((1, 1, 4, 4), 1 / 255), torch.full((1, 1, 4, 4), 0.5)  # the bin 0 .. 2/255 of N(0, I)
    >>> round(bits_per_dim(bound(normal, x0, u, torch.ones(1, 1, 4, 4), steps=10), 16).item(), 2)
    8.32
    """
    x0 = pixels.eight_bit(x0)
    nats = probability_flow(denoiser, x0 + (u.double() - 0.5) * pixels.BIN, probe, steps, y)
    return nats - x0[0].numel() * math.log(pixels.BIN)


def decoder_bound(
    denoiser: Denoiser, x0: Tensor, eps: Tensor, probe: Tensor, steps: int | None = None, y: Tensor | None = None
) -> Tensor:
    """The same for the flow down to x_1 and then Eq. 13's decoder, nats per image float64 [B]: no loss at sharp pixels.

    -log P(x_0) <= E_q[log q(x_1|x_0) - log p(x_1) - log p_theta(x_0|x_1)]; this is the right side for one eps, standard
    normal of x0's shape, with the first term's mean. The rest is as in `bound`.

    >>> from ddpm import schedule
    >>> grey = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear(), predict="x0")  # x_0 = 0, surely
    >>> x0, zero = torch.full((1, 1, 4, 4), 1 / 255), torch.zeros(1, 1, 4, 4)
    >>> sharp = decoder_bound(grey, x0, zero, zero + 1), bound(grey, x0, zero + 0.5, zero + 1)
    >>> bool(sharp[0] < sharp[1])
    True
    """
    x0, D = pixels.eight_bit(x0), x0[0].numel()
    first = torch.ones(len(x0), dtype=torch.int64, device=x0.device)
    abar = extract(denoiser.schedule.alpha_bar, first)
    sigma = float((1 / abar[0] - 1).sqrt())
    entropy = D / 2 * math.log(2 * math.pi * math.e * sigma**2)
    flow = probability_flow(denoiser, x0 + sigma * eps.to(x0), probe, steps, y)
    with torch.no_grad():
        decoder, _ = likelihood.term(denoiser, x0, q_sample(denoiser.schedule, x0, first, eps.to(x0)), first, y)
    return flow - entropy + decoder

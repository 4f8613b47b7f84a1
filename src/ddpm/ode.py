"""Likelihood by the probability-flow ODE (Song et al. 2021).

The ODE and the reverse chain use the same network, but they are different models: they give an image different
probabilities.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from ddpm import float64, likelihood, pixels
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError, whole_number
from ddpm.gaussian import extract, q_sample, sum_per_image


def _even_levels(log_tan: Tensor, steps: int | None) -> list[int]:
    """Choose levels from 1 to T that are evenly spaced in log-SNR (steps None: all levels).

    The result holds the existing levels nearest to `steps` even points, each once. Raises InputError if steps is not in
    2..T.
    """
    T = len(log_tan) - 1
    if steps is None:
        return list(range(1, T + 1))
    steps = whole_number("steps", steps, 2, T)
    even = torch.linspace(float(log_tan[1]), float(log_tan[T]), steps, dtype=torch.float64)
    nearest = (log_tan[1:] - even[:, None]).abs().argmin(1) + 1  # [steps]
    return sorted(set(nearest.tolist()))


@torch.inference_mode(False)  # the divergence needs gradients, which inference mode cannot give
@torch.no_grad()
def probability_flow(
    denoiser: Denoiser, x: Tensor, probe: Tensor, steps: int | None = None, y: Tensor | None = None
) -> Tensor:
    """-log p(x) under the ODE that carries N(0, I) at level T to level 1, nats per image float64 [B].

    Song et al. 2021 (score-based SDEs), Eq. 13, with cos^2 phi = abar, score = -eps^ / sin phi and 1/2 beta dt = tan
    phi dphi:

        dx/dphi   = v = cos phi eps^(x) - sin phi x0^(x)
        -log p(x) = -log N(x_T; 0, I) - integral of div v dphi - D/2 log abar_1,   x_1 = sqrt(abar_1) x   (Eq. 39)
        div v     = E probe^T (dv/dx) probe                                        (Skilling-Hutchinson, Eq. 40)

    x      [B, C, H, W], continuous, in signal units. x_1 is sqrt(abar_1) x without added noise, so p is smooth on the
           scale of the noise at level 1
    probe  of x's shape, random +-1 (or standard normal draws, with a larger error); the same probe is used at all
           levels, and its error has mean zero
    steps  the number of levels, 2..T, evenly spaced in log-SNR (None: all T). Fewer levels are visited if two points
           have the same nearest level
    y      int64 [B] class labels, or None

    Heun's method between the levels has an error of O(1/steps^2), which mostly makes the result too small. Nothing is
    clipped, and everything but the network is computed in float64. There are 2 (steps - 1) network calls, each with a
    vector-Jacobian product.

    This is not the density of the reverse chain, which `likelihood.vlb` bounds. Raises InputError for steps out of
    range, for a schedule with abar_T = 0, whose log-SNR is not finite, and for x on a device without float64 (mps).

    >>> from ddpm import schedule
    >>> normal = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear(), predict="v")  # v = 0: N(0, I)
    >>> nats = probability_flow(normal, torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4), steps=10)
    >>> [round(n, 2) for n in nats.tolist()], round(16 / 2 * math.log(2 * math.pi), 2)
    ([14.7, 14.7], 14.7)
    """
    schedule, denoiser = denoiser.schedule, denoiser.unclipped()
    if schedule.alpha_bar[-1] == 0:
        raise InputError("probability flow: the schedule ends at alpha_bar 0; want a schedule that ends above 0")
    tan = ((1 - schedule.alpha_bar.cpu()) / schedule.alpha_bar.cpu()).sqrt()
    phi, log_tan = tan.atan(), tan.log()
    cos, sin = phi.cos(), phi.sin()

    def flow(x: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """v = dx/dphi [B, C, H, W] and div v dphi/dlog tan phi [B].

        div v grows as 1/phi near data. Its integrand over log tan phi is flat there.
        """
        t = torch.full((len(x),), level, device=x.device)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            estimate = denoiser(x, t, y)
            v = cos[level] * estimate.eps - sin[level] * estimate.x0
            (vjp,) = torch.autograd.grad(v, x, probe)  # probe^T dv/dx
        return v.detach(), cos[level] * sin[level] * sum_per_image(vjp * probe)

    y = None if y is None else y.clone()  # a clone of a tensor of inference mode is an ordinary tensor
    x, probe = cos[1] * float64.require(x), probe.to(x.device, torch.float64, copy=True)
    log_det = x.new_full((len(x),), x[0].numel() * math.log(cos[1]))  # of the map from x to x_1
    for s, t in pairwise(_even_levels(log_tan, steps)):
        v, div = flow(x, s)
        v_t, div_t = flow(x + (phi[t] - phi[s]) * v, t)
        x = x + (phi[t] - phi[s]) / 2 * (v + v_t)
        log_det = log_det + (log_tan[t] - log_tan[s]) / 2 * (div + div_t)
    return sum_per_image(0.5 * x.square() + 0.5 * math.log(2 * math.pi)) - log_det


def bound(
    denoiser: Denoiser, x0: Tensor, u: Tensor, probe: Tensor, steps: int | None = None, y: Tensor | None = None
) -> Tensor:
    """-log P(x_0) of integer pixels under the probability flow, bounded from above, nats per image float64 [B].

    The bound uses uniform dequantisation: P is the mass of the flow's density in the pixels' bins, and by Jensen's
    inequality -log P(x_0) <= E_u[-log p(x_0 + (u - 1/2) bin)] - D log bin. The result is the right side for one u.

    x0  [B, C, H, W], the signal of the pixels
    u   of x0's shape, uniform in [0, 1)

    The other arguments are those of `probability_flow`. The result bounds the likelihood of the flow and not that of
    the reverse chain. The density of an exact flow cannot be sharper than the noise at level 1. With the linear
    schedule that noise is 1.3 grey levels, and a pixel that is known for sure costs an exact flow 1.7 bits. (The flow
    of a trained network need not be exact and may be sharper.)

    >>> from ddpm import schedule
    >>> from ddpm.gaussian import bits_per_dim
    >>> normal = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear(), predict="v")
    >>> x0, u = torch.full((1, 1, 4, 4), 1 / 255), torch.full((1, 1, 4, 4), 0.5)  # the bin 0 .. 2/255 of N(0, I)
    >>> round(bits_per_dim(bound(normal, x0, u, torch.ones(1, 1, 4, 4), steps=10), 16).item(), 2)
    8.32
    """
    x0, width = pixels.on_grid(x0, denoiser.values), denoiser.values.bin
    nats = probability_flow(denoiser, x0 + (u.double() - 0.5) * width, probe, steps, y)
    return nats - x0[0].numel() * math.log(width)


def density(denoiser: Denoiser, x0: Tensor, probe: Tensor, steps: int | None = None, y: Tensor | None = None) -> Tensor:
    """-log p of floating point images in the data's own units, under the probability flow; nats per image float64 [B].

    It is `probability_flow` with the change of units: the signal is 2 / (high - low) per unit of the data, so each
    dimension adds -log(2 / (high - low)). The arguments are those of `probability_flow`.

    >>> from ddpm import schedule
    >>> from ddpm.pixels import Values
    >>> normal = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear(), predict="v")
    >>> x, probe = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    >>> wide = [Denoiser(normal.network, normal.schedule, "v", values=Values("float32", -w, w)) for w in (1, 10)]
    >>> one, ten = (density(denoiser, x, probe, steps=10) for denoiser in wide)
    >>> round(float(ten - one) / 16, 6), round(math.log(10), 6)
    (2.302585, 2.302585)
    """
    values = denoiser.values
    nats = probability_flow(denoiser, x0, probe, steps, y)
    return nats - x0[0].numel() * math.log(2 / (values.high - values.low))


def decoder_bound(
    denoiser: Denoiser, x0: Tensor, eps: Tensor, probe: Tensor, steps: int | None = None, y: Tensor | None = None
) -> Tensor:
    """A bound as in `bound`, but with the flow down to x_1 and then the decoder of Eq. 13; nats per image float64 [B].

    Unlike `bound`, it loses nothing where the model is sure of a pixel. The bound is

        -log P(x_0) <= E_q[log q(x_1|x_0) - log p(x_1) - log p_theta(x_0|x_1)]

    The result is the right side for one eps, standard normal noise of x0's shape; the first term is replaced by its
    mean. The other arguments are those of `bound`.

    >>> from ddpm import schedule
    >>> grey = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear(), predict="x0")  # x_0 is 0
    >>> x0, zero = torch.full((1, 1, 4, 4), 1 / 255), torch.zeros(1, 1, 4, 4)
    >>> sharp = decoder_bound(grey, x0, zero, zero + 1), bound(grey, x0, zero + 0.5, zero + 1)
    >>> bool(sharp[0] < sharp[1])
    True
    """
    x0, D = pixels.on_grid(x0, denoiser.values), x0[0].numel()
    first = torch.ones(len(x0), dtype=torch.int64, device=x0.device)
    abar = extract(denoiser.schedule.alpha_bar, first)
    sigma = float((1 / abar[0] - 1).sqrt())
    entropy = D / 2 * math.log(2 * math.pi * math.e * sigma**2)
    flow = probability_flow(denoiser, x0 + sigma * eps.to(x0), probe, steps, y)
    with torch.no_grad():
        decoder, _ = likelihood.term(denoiser, x0, q_sample(denoiser.schedule, x0, first, eps.to(x0)), first, y)
    return flow - entropy + decoder

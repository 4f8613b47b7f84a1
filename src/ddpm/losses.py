"""The training losses. Each returns one number per image, a mean over the image's dimensions."""

from dataclasses import replace

import torch
from torch import Tensor

from ddpm import likelihood
from ddpm.catalog import Weighting
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError
from ddpm.gaussian import bits_per_dim, broadcast, extract, q_sample
from ddpm.noise import forked


def simple(denoiser: Denoiser, x0: Tensor, t: Tensor, eps: Tensor, y: Tensor | None = None) -> Tensor:
    """L_simple  (Eq. 14): the mean squared error of the network's prediction over dimensions, [B].

    For eps prediction it is |eps - eps_theta(x_t, t)|^2 / D; for x0, mu and v the target differs (`Denoiser.target`).
    The paper writes a sum over dimensions, but the official code trains the mean.

    x0   [B, C, H, W], the signal
    t    int64 [B] in 1..T
    eps  standard normal noise of x0's shape
    y    int64 [B] class labels, or None

    >>> from ddpm import schedule
    >>> nothing = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear())
    >>> simple(nothing, torch.zeros(2, 1, 4, 4), torch.tensor([1, 1000]), torch.ones(2, 1, 4, 4)).tolist()
    [1.0, 1.0]
    """
    xt = q_sample(denoiser.schedule, x0, t, eps)
    prediction, _ = denoiser.output(xt, t, y)
    return (denoiser.target(x0, xt, t, eps) - prediction).square().flatten(1).mean(1)


def vlb(denoiser: Denoiser, x0: Tensor, t: Tensor, eps: Tensor, y: Tensor | None = None) -> Tensor:
    """The term of the true bound at level t  (Eq. 5), bits per dimension [B].

    The bound is T times the mean of this term over uniform t in 1..T, plus L_T. x0^ is not clipped, as in the official
    code. The arguments are those of `simple`.

    >>> from ddpm import schedule
    >>> nothing = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear())
    >>> vlb(nothing, torch.zeros(1, 1, 4, 4), torch.tensor([500]), torch.zeros(1, 1, 4, 4)).item() < 1e-3
    True
    """
    xt = q_sample(denoiser.schedule, x0, t, eps)
    nats, _ = likelihood.term(denoiser.unclipped(), x0, xt, t, y)
    return bits_per_dim(nats, x0[0].numel())


def hybrid(denoiser: Denoiser, x0: Tensor, t: Tensor, eps: Tensor, y: Tensor | None = None) -> Tensor:
    """L_simple + 0.001 L_vlb for a learned variance (Nichol & Dhariwal 2021, Eq. 16), [B].

    L_vlb is T times the bound's term at t in bits per dimension. Its gradient does not reach the mean, so it trains the
    variance only. There is one network call. The arguments are those of `simple`.

    >>> from ddpm import schedule
    >>> nothing = Denoiser(lambda x, timestep, y: torch.zeros(1, 2, 4, 4), schedule.linear(), variance="learned_range")
    >>> hybrid(nothing, torch.zeros(1, 1, 4, 4), torch.tensor([500]), torch.ones(1, 1, 4, 4)).item() > 1
    True
    """
    schedule = denoiser.schedule
    xt = q_sample(schedule, x0, t, eps)
    prediction, variance = denoiser.output(xt, t, y)
    mse = (denoiser.target(x0, xt, t, eps) - prediction).square().flatten(1).mean(1)
    mean_fixed = prediction.detach() if variance is None else torch.cat([prediction.detach(), variance], dim=1)
    same_output = replace(denoiser, network=lambda *_: mean_fixed)  # no second network call
    return mse + 0.001 * schedule.T * vlb(same_output, x0, t, eps, y)


HUBER = 0.00054
"""Errors of x_0 below which the consistency loss is quadratic (Song & Dhariwal 2024, Section 3.3), in signal units."""


def consistency(
    denoiser: Denoiser, x0: Tensor, t: Tensor, eps: Tensor, y: Tensor | None = None, r: Tensor | None = None,
    teacher: Denoiser | None = None,
) -> Tensor:  # fmt: skip
    """The loss of consistency tuning (Geng et al. 2024): |f(x_t, t) - f(x_r, r)| / (sigma_t - sigma_r), [B].

    f is x0^ without clipping, and sigma = sqrt((1 - abar)/abar) = tan phi. For v prediction f is cos phi x_t - sin phi
    v, the consistency function of Song et al. 2023 (Eq. 5) with sigma_data 1; for x0 prediction f is the network
    itself. Both have f(x_0, 0) = x_0: at r = 0 the second term is x_r. No gradient flows through it. Both terms have
    the same draws of dropout. |.| is the pseudo-Huber norm sqrt(m + c^2) - c of the mean square m over dimensions, with
    c = HUBER.

    r        int64 [B] in 0..T-1, below t (None: the next level down)
    teacher  x_r is one DDIM step of this denoiser from x_t, which may be guided (Song et al. 2023, Algorithm 2; Luo et
             al. 2023). None: x_r is made of the same x_0 and eps as x_t

    The other arguments are those of `simple`. Raises InputError for eps prediction, whose x0^ is divided by
    sqrt(abar_t), and for mu prediction.

    >>> from ddpm import schedule
    >>> truth = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.cosine(), "x0")
    >>> consistency(truth, torch.zeros(2, 1, 4, 4), torch.tensor([2, 1000]), torch.ones(2, 1, 4, 4)).tolist()
    [0.0, 0.0]
    """
    if denoiser.predict not in ("x0", "v"):
        raise InputError(f"predict {denoiser.predict}: loss consistency needs x0 or v prediction")
    r = t - 1 if r is None else r
    student, sigma = denoiser.unclipped(), (-denoiser.schedule.half_log_snr).exp()
    xt = q_sample(denoiser.schedule, x0, t, eps)
    with torch.no_grad(), forked(x0.device):
        if teacher is not None:
            estimate = teacher.unclipped()(xt, t, y)
            x0, eps = estimate.x0, estimate.eps
        xr = q_sample(denoiser.schedule, x0, r, eps)
        target = torch.where(broadcast(r, xt) == 0, xr, student(xr, r.clamp(min=1), y).x0)
    square = (student(xt, t, y).x0 - target).square().flatten(1).mean(1)
    gap = extract(sigma, t) - extract(sigma, r)
    return ((square + HUBER**2).sqrt() - HUBER) / gap.to(square.dtype).to(square.device)


def weight(denoiser: Denoiser, t: Tensor, weighting: Weighting) -> Tensor:
    """The factor of L_simple at levels t int64 [B] in 1..T: float32 [B] on t's device.

    none     1
    min_snr  min(SNR, 5) on the error of x_0, SNR = abar/(1 - abar) (Hang et al. 2023, Eq. 5, with gamma 5)
    p2       1/(1 + SNR) on the error of eps, which is abar on that of x_0 (Choi et al. 2022, Eq. 8, with k = gamma = 1)

    The squared error of eps is SNR times that of x_0, and the squared error of v is SNR + 1 times that of x_0. As in
    the papers, the weights are not normalised: their mean over levels is not 1. Raises InputError for mu prediction,
    whose error is scaled differently at each level.

    >>> from ddpm import schedule
    >>> eps, t = Denoiser(lambda x, timestep, y: x, schedule.linear()), torch.tensor([1, 500, 1000])
    >>> [f"{w:.4g}" for w in weight(eps, t, "min_snr").tolist()], [f"{w:.4g}" for w in weight(eps, t, "p2").tolist()]
    (['0.0005001', '1', '1'], ['0.0001', '0.9214', '1'])
    """
    if weighting == "none":
        return torch.ones(len(t), device=t.device)
    abar = extract(denoiser.schedule.alpha_bar, t)
    x0_weight = (abar / (1 - abar)).clamp(max=5) if weighting == "min_snr" else abar
    match denoiser.predict:
        case "x0":
            return x0_weight.float().to(t.device)
        case "eps":
            return (x0_weight * (1 - abar) / abar).float().to(t.device)
        case "v":
            return (x0_weight * (1 - abar)).float().to(t.device)
        case "mu":
            raise InputError(f"weighting {weighting}: needs eps, x0 or v prediction; want none for mu")


LOSSES = {"simple": simple, "vlb": vlb, "hybrid": hybrid, "consistency": consistency}

"""How training draws noise levels, and the weight of each level in the bound."""

import torch
from torch import Tensor

from ddpm.catalog import Prediction, TimestepSampling
from ddpm.errors import InputError
from ddpm.schedule import Schedule


def sample(
    schedule: Schedule, n: int, how: TimestepSampling, generator: torch.Generator, predict: Prediction = "eps"
) -> Tensor:
    """Draw the noise levels of a batch of n images, int64 [n] in 1..T.

    uniform     each image's level is independent and uniform over 1..T (Algorithm 1)
    stratified  each image's level is uniform, but the n levels are spread evenly: they are the quantiles (u + i)/n for
                i = 0..n-1 in random order, with one u for all. The mean over a batch then varies less (Kingma et al.
                2021, Section 5.3)
    lognormal   evenly spread quantiles of ln sigma ~ N(-1.2, 1.2^2), where sigma^2 = 1/SNR (Karras et al. 2022, Table
                1). This favours the levels where images take shape. The loss is not divided by this density, so the
                density also weights the loss
    lognormal_wide  the same with ln sigma ~ N(-1.1, 2^2), for the consistency loss (Song & Dhariwal 2024, Table 1)
    bound       evenly spread quantiles of the weight that the bound gives to the error of the prediction. The plain
                mean of squared errors is then proportional to L (Kingma et al. 2021). For eps the levels are even in
                log-SNR

    Raises InputError for bound with mu prediction.

    >>> from ddpm import noise, schedule
    >>> sample(schedule.cosine(), 5, "stratified", noise.generator(0)).sort().values.diff()  # T/n apart
    tensor([200, 200, 200, 200])
    """
    if how == "uniform":
        return torch.randint(1, schedule.T + 1, (n,), generator=generator)
    u = torch.rand((), generator=generator).double()  # u has 24 bits, so that (u + i)/n stays below 1 for every i
    quantile = (u + torch.randperm(n, generator=generator)) / n
    if how == "stratified":
        return 1 + (quantile * schedule.T).long()
    if how == "bound":
        cumulative = bound_weight(schedule, predict).cumsum(0)
        return 1 + torch.searchsorted(cumulative / cumulative[-1], quantile, right=True).clamp(max=schedule.T - 1)
    abar = schedule.alpha_bar[1:]
    log_sigma = 0.5 * (1 / abar - 1).log()  # [T], rising
    mean, spread = (-1.2, 1.2) if how == "lognormal" else (-1.1, 2.0)
    return 1 + torch.searchsorted(log_sigma, mean + spread * torch.special.ndtri(quantile)).clamp(max=schedule.T - 1)


STAGES = 8
"""Stages of the gap in training. A run that goes on stays at the last one, where sigma_r is sigma_t (1 - n/256)."""


def lower(schedule: Schedule, t: Tensor, stage: int) -> Tensor:
    """The level r < t with which the consistency loss compares each level t (Geng et al. 2024; q = 2, k = 8, b = 1).

    sigma_r = sigma_t (1 - n(sigma_t) / 2^stage) with n(sigma) = 1 + 8/(1 + e^sigma), where sigma^2 = (1 - abar)/abar.
    So the gap halves from one stage to the next, and is relatively wider near data. r is the highest level of no more
    noise than that: 0 if sigma_r is negative, and t - 1 if the gap is smaller than a level.

    t      int64 [n] in 1..T
    stage  1 for the first stage

    Returns int64 [n] in 0..T-1.

    >>> from ddpm import schedule
    >>> t = torch.tensor([1, 300, 700, 980])
    >>> [lower(schedule.cosine(), t, stage).tolist() for stage in (1, 4, 30)]
    [[0, 0, 12, 960], [0, 231, 664, 978], [0, 299, 699, 979]]
    """
    sigma = (-schedule.half_log_snr).exp()
    wanted = sigma[t] * (1 - (1 + 8 * torch.sigmoid(-sigma[t])) / 2.0 ** min(stage, 60))
    return torch.minimum(torch.searchsorted(sigma, wanted, right=True) - 1, t - 1).clamp(min=0)


def bound_weight(schedule: Schedule, predict: Prediction) -> Tensor:
    """The factor of the prediction's squared error in L_{t-1}, nats, at levels t = 1..T: float64 [T].

    L_{t-1} = (SNR_{t-1} - SNR_t) / 2 |x_0 - x0^|^2 for small steps (Eq. 8-10; Kingma et al. 2021, Eq. 13). The squared
    error of x_0 is that of v times 1 - abar_t, and that of eps times 1/SNR_t. L_0 gets the weight of L_1. Raises
    InputError for mu prediction.

    >>> from ddpm import schedule
    >>> s = schedule.linear()
    >>> f"{bound_weight(s, 'eps')[499]:.4f}", f"{s.half_log_snr[499] - s.half_log_snr[500]:.4f}"
    ('0.0055', '0.0055')
    """
    if predict == "mu":
        raise InputError("timestep_sampling bound: needs eps, x0 or v prediction; want uniform or stratified for mu")
    abar, snr = schedule.alpha_bar[1:], (2 * schedule.half_log_snr[1:]).exp()
    x0_weight = (snr[:-1] - snr[1:]) / 2
    x0_weight = torch.cat([x0_weight[:1], x0_weight])
    return x0_weight * {"x0": torch.ones_like(abar), "v": 1 - abar, "eps": 1 / snr}[predict]

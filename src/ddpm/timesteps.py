"""How the noise levels of a training batch are drawn, and the weight that the bound gives to each."""

import torch
from torch import Tensor

from ddpm.catalog import Prediction, TimestepSampling
from ddpm.errors import InputError
from ddpm.schedule import Schedule


def sample(
    schedule: Schedule, n: int, how: TimestepSampling, generator: torch.Generator, predict: Prediction = "eps"
) -> Tensor:
    """The noise levels of a batch of n images, int64 [n] in 1..T; all are drawn at once.

    uniform     independent, each of 1..T as likely (Algorithm 1)
    stratified  the same for each image, but the n lie evenly: quantiles (u + i)/n for i = 0..n-1 in random order, one u
                for all, so that the mean over a batch varies less (Kingma et al. 2021, Section 5.3)
    lognormal   as evenly, by quantiles of ln sigma ~ N(-1.2, 1.2^2), sigma^2 = 1/SNR (Karras et al. 2022, Table 1):
                more often where images take shape. The loss is not divided by this density, which so is a weighting
    bound       as evenly, by quantiles of the bound's own weight on the error of what is predicted: the plain mean of
                squared errors then is L but for a factor (Kingma et al. 2021). Of eps that is evenly in log-SNR.
                InputError for mu

    >>> from ddpm import noise, schedule
    >>> sample(schedule.cosine(), 5, "stratified", noise.generator(0)).sort().values.diff()  # T/n apart
    tensor([200, 200, 200, 200])
    """
    if how == "uniform":
        return torch.randint(1, schedule.T + 1, (n,), generator=generator)
    u = torch.rand((), generator=generator).double()  # 24 bits of a double: (u + i)/n is below 1 for every i
    quantile = (u + torch.randperm(n, generator=generator)) / n
    if how == "stratified":
        return 1 + (quantile * schedule.T).long()
    if how == "bound":
        share = bound_weight(schedule, predict).cumsum(0)
        return 1 + torch.searchsorted(share / share[-1], quantile, right=True).clamp(max=schedule.T - 1)
    abar = schedule.alpha_bar[1:]
    log_sigma = 0.5 * (1 / abar - 1).log()  # [T], rising
    return 1 + torch.searchsorted(log_sigma, -1.2 + 1.2 * torch.special.ndtri(quantile)).clamp(max=schedule.T - 1)


def bound_weight(schedule: Schedule, predict: Prediction) -> Tensor:
    """What L_{t-1} is, nats, for a squared error of 1 of what is predicted at levels t = 1..T: float64 [T].

    L_{t-1} = (SNR_{t-1} - SNR_t) / 2 |x_0 - x0^|^2 for steps as small as these (Eq. 8-10; Kingma et al. 2021, Eq. 13),
    and x_0's error is that of v times 1 - abar_t, that of eps times 1/SNR_t. L_0 counts as L_1. InputError for mu.

    >>> from ddpm import schedule
    >>> s = schedule.linear()
    >>> f"{bound_weight(s, 'eps')[499]:.4f}", f"{s.half_log_snr[499] - s.half_log_snr[500]:.4f}"
    ('0.0055', '0.0055')
    """
    if predict == "mu":
        raise InputError("timestep_sampling bound: is of eps, x0 and v prediction; want uniform or stratified for mu")
    abar, snr = schedule.alpha_bar[1:], (2 * schedule.half_log_snr[1:]).exp()
    on_x0 = (snr[:-1] - snr[1:]) / 2
    on_x0 = torch.cat([on_x0[:1], on_x0])
    return on_x0 * {"x0": torch.ones_like(abar), "v": 1 - abar, "eps": 1 / snr}[predict]

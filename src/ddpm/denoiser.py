"""What the network's output means: p_theta(x_{t-1} | x_t) and the estimate of x_0 (Section 3.2)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ddpm import kernels
from ddpm.catalog import Prediction, Variance
from ddpm.errors import InputError
from ddpm.gaussian import (
    Gaussian,
    at,
    beta_tilde,
    calibrated_variance,
    implied_mse,
    over,
    posterior_coefficients,
    q_posterior,
)
from ddpm.guidance import Guided
from ddpm.schedule import Schedule


def _dynamic(x0: Tensor, p: float) -> Tensor:
    """Dynamic thresholding: what sticks out of [-1, 1] in most pixels scales an image down rather than saturate it."""
    s = torch.stack([image.abs().flatten().quantile(p) for image in x0]).clamp(min=1)
    s = over(s.to(x0), x0)
    return x0.clamp(-s, s) / s


@dataclass(frozen=True)
class Estimate:
    """What a denoiser says of x_t.

    x0            x0^ (Eq. 15), shape of x_t; within [-1, 1] where the denoiser clips
    eps           the noise that goes with that x0^: x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps
    mean          of p_theta(x_{t-1} | x_t), shape of x_t
    log_variance  of p_theta(x_{t-1} | x_t), [B, 1, ...] where fixed, shape of x_t where learned
    """

    x0: Tensor
    eps: Tensor
    mean: Tensor
    log_variance: Tensor

    @property
    def p(self) -> Gaussian:
        """p_theta(x_{t-1} | x_t)  (Eq. 1)."""
        return Gaussian(self.mean, self.log_variance)


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A network and how to read it; samplers, losses, likelihood and codec are functions of this.

    network   (x [B, C, H, W], timestep int64 [B], y int64 [B] or None) -> [B, C, H, W], or 2C where the variance
              is learned
    schedule  its noise levels
    predict   what the network's first C channels are: eps (Eq. 11), x0, mu (mu~ of Eq. 7),
              or v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 (Salimans & Ho 2022), which is -F of EDM with
              sigma_data 1 (Karras et al. 2022, Table 1), and L_simple of v EDM's loss
    variance  sigma_t^2: fixed_large, beta_t; fixed_small, beta~_t (both with beta~_2 at t = 1, as in the official
              code); learned, the last C channels are log sigma^2; learned_range, they run from log beta~_t at -1
              to log beta_t at 1 (Nichol & Dhariwal 2021); or a table of variances, float64 [T+1]
    clip      x0^ goes through [-1, 1] before the mean is taken from it; with mu only the reported x0^ does. A float
              p in (0, 1): dynamic thresholding (Saharia et al. 2022, Section 2.3), x0^ is clipped to [-s, s] and
              divided by s, the larger of 1 and the p-quantile of an image's |x0^|

    The network may compute in any precision: what it returns is taken to x_t's dtype first.
    Raises InputError for a setting that does not exist, and for eps with a schedule that ends at abar_T = 0.

    >>> from ddpm import schedule
    >>> nothing = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear())
    >>> estimate = nothing(torch.full((1, 3, 8, 8), 0.5), torch.tensor([1]))
    >>> estimate.x0.shape, round(float(estimate.x0.mean()), 4)
    (torch.Size([1, 3, 8, 8]), 0.5)
    """

    network: Callable[..., Tensor]
    schedule: Schedule
    predict: Prediction = "eps"
    variance: Variance | Tensor = "fixed_large"
    clip: bool | float = True

    def __post_init__(self) -> None:
        if not isinstance(self.clip, bool) and not 0 < self.clip < 1:
            raise InputError(f"clip {self.clip}: want true, false, or a quantile between 0 and 1")
        if self.predict not in get_args(Prediction):
            raise InputError(f"predict {self.predict!r}: want {', '.join(get_args(Prediction))}")
        if isinstance(self.variance, Tensor):
            if self.variance.shape != self.schedule.alpha_bar.shape:
                raise InputError(
                    f"variance of shape {list(self.variance.shape)}: want [{self.schedule.T + 1}], one a level"
                )
        elif self.variance not in get_args(Variance):
            raise InputError(f"variance {self.variance!r}: want {', '.join(get_args(Variance))}, or a table")
        if self.predict == "eps" and self.schedule.ends_in_noise:
            raise InputError(
                "predict eps: the schedule ends at alpha_bar 0, where eps says nothing of x0; want x0, mu, v"
            )

    @property
    def learned(self) -> bool:
        """Whether the network gives the variance, and so 2C channels."""
        return self.variance in ("learned", "learned_range") if isinstance(self.variance, str) else False

    def output(self, xt: Tensor, t: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The network's raw prediction of `target`, and its raw variance where learned; each of x_t's shape."""
        out = self.network(xt, at(self.schedule.timestep, t).to(xt.device), y).to(xt.dtype)
        if not self.learned:
            return out, None
        prediction, variance = out.chunk(2, dim=1)
        return prediction, variance

    def target(self, x0: Tensor, xt: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What `output` should have been for this x_t = q_sample(x0, t, eps); shape of x_t."""
        match self.predict:
            case "eps":
                return eps
            case "x0":
                return x0
            case "mu":
                return q_posterior(self.schedule, x0, xt, t).mean
            case "v":
                abar = at(self.schedule.alpha_bar, t)
                return over(abar.sqrt(), xt) * eps - over((1 - abar).sqrt(), xt) * x0

    def log_variance(self, xt: Tensor, t: Tensor, raw: Tensor | None) -> Tensor:
        """log sigma_t^2 of p_theta(x_{t-1} | x_t), nats; `raw` is the second half of `output`."""
        beta, tilde = self.schedule.beta, beta_tilde(self.schedule)
        match self.variance:
            case "fixed_large":
                return over(torch.where(t.to(beta.device) == 1, tilde[1], at(beta, t)).log(), xt)
            case "fixed_small":
                return over(at(tilde, t).log(), xt)
            case "learned":
                assert raw is not None
                return raw
            case "learned_range":
                assert raw is not None
                large, small = over(at(beta, t).log(), xt), over(at(tilde, t).log(), xt)
                return small + (raw + 1) / 2 * (large - small)
            case table:
                return over(at(table, t).log(), xt)

    def __call__(self, xt: Tensor, t: Tensor, y: Tensor | None = None) -> Estimate:
        """The estimate at x_t [B, C, H, W], t int64 [B] in 1..T, or [1] for all; y int64 [B] labels, if it has them."""
        prediction, raw_variance = self.output(xt, t, y)
        abar = at(self.schedule.alpha_bar, t)
        signal, sigma = over(abar.sqrt(), xt), over((1 - abar).sqrt(), xt)
        match self.predict:
            case "eps":
                eps = prediction
                x0 = (xt - sigma * eps) / signal  # Eq. 15
            case "v":
                eps = sigma * xt + signal * prediction
                x0 = signal * xt - sigma * prediction
            case "x0":
                x0 = prediction
                eps = (xt - signal * x0) / sigma
            case "mu":
                c_0, c_x = posterior_coefficients(self.schedule, t)
                x0 = (prediction - over(c_x, xt) * xt) / over(c_0, xt)
                eps = (xt - signal * x0) / sigma
        if self.clip:
            clipped = x0.clamp(-1, 1) if self.clip is True else _dynamic(x0, self.clip)
            eps = eps + signal / sigma * (x0 - clipped)
            x0 = clipped
        mean = prediction if self.predict == "mu" else q_posterior(self.schedule, x0, xt, t).mean
        return Estimate(x0, eps, mean, self.log_variance(xt, t, raw_variance))

    def unclipped(self) -> "Denoiser":
        """The same without clipping, as the true bound is trained (official code)."""
        return replace(self, clip=False)

    def respace(self, levels: Sequence[int]) -> "Denoiser":
        """The same on fewer levels, rising within 1..T.

        A table of variances becomes the one of the same errors of x0^ (`gaussian.implied_mse`), and learned_range goes
        by the levels that there are. Raises InputError for what holds for one step of its own T levels only: mu, and
        variance learned.

        >>> from ddpm import schedule
        >>> Denoiser(lambda x, timestep, y: x, schedule.linear()).respace([500, 1000]).schedule.T
        2
        """
        if self.variance == "learned":
            raise InputError("respace: variance learned belongs to its own levels; want learned_range or a fixed one")
        if self.predict == "mu":
            raise InputError("respace: mu belongs to its own levels; want eps, x0 or v, or the ddim sampler")
        schedule, variance = self.schedule.respace(levels), self.variance
        if isinstance(variance, Tensor):
            mse = implied_mse(self.schedule, variance)[torch.tensor(levels) - 1]
            variance = calibrated_variance(schedule, mse)
            variance[1] = variance[1] if mse[0] > 0 else beta_tilde(schedule)[1]  # a density needs some
        return replace(self, schedule=schedule, variance=variance)

    def guided(self, scale: float, interval: tuple[int, int] | None = None) -> "Denoiser":
        """The same with classifier-free guidance, where it is called with labels: two network calls in one batch.

        prediction = without label + scale (with label - without), Eq. 6 of Ho & Salimans 2022 with scale = 1 + w: 1 is
        none, and as all four predictions are linear in x0^ it is x0^ that is guided. Only at levels t of `interval`,
        first and last (None: all), and one call elsewhere (Kynkäänniemi et al. 2024). A learned variance is that with
        label. Raises InputError for a scale that is not finite and an interval that is not within 1..T.

        >>> from ddpm import schedule
        >>> labelled = Denoiser(lambda x, timestep, y: torch.full_like(x, 0.1) * y.view(-1, 1, 1, 1), schedule.linear())
        >>> x, t, y = torch.zeros(1, 1, 2, 2), torch.tensor([500]), torch.tensor([3])
        >>> round(float(labelled.guided(1.5).output(x, t, y)[0].mean()), 3)  # -0.1 + 1.5 (0.3 + 0.1)
        0.5
        """
        first, last = interval or (1, self.schedule.T)
        if not math.isfinite(scale):
            raise InputError(f"guidance {scale}: want a finite number")
        if not 1 <= first <= last <= self.schedule.T:
            raise InputError(f"guidance interval {first}, {last}: want two levels in order, 1..{self.schedule.T}")
        ends = self.schedule.timestep[[first, last]].tolist()
        return replace(self, network=Guided(self.network, scale, ends[0], ends[1], self.learned))

    def to(self, device: torch.device | str) -> "Denoiser":
        """Network and tables on `device`; on one without float64 (mps) the tables stay where they are.

        Where tensor cores or our kernels want it, convolutions have channels-last weights, which their inputs and
        outputs follow. Shapes, and files, are the same.
        """
        if isinstance(self.network, Guided):
            inner = replace(self, network=self.network.network).to(device)
            return replace(inner, network=replace(self.network, network=inner.network))
        if isinstance(self.network, nn.Module):
            computes = getattr(self.network, "computes", None)  # a UNet's
            ours = torch.device(device).type == "cpu" and kernels.ready(computes)
            last = ours or torch.device(device).type == "cuda"
            layout = torch.channels_last if last else torch.contiguous_format
            self.network.to(device, memory_format=layout)  # type: ignore[call-overload]
        changes: dict[str, Any] = {}
        if torch.device(device).type != "mps":
            changes["schedule"] = self.schedule.to(device)
            if isinstance(self.variance, Tensor):
                changes["variance"] = self.variance.to(device)
        return replace(self, **changes)

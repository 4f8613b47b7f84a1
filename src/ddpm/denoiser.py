"""A denoiser turns the network's output into p_theta(x_{t-1} | x_t) and an estimate of x_0 (Section 3.2)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ddpm import float64, kernels
from ddpm.catalog import Prediction, Variance
from ddpm.conditions import Given
from ddpm.errors import InputError, finite_number, whole_number
from ddpm.gaussian import (
    Gaussian,
    beta_tilde,
    broadcast,
    calibrated_variance,
    check_levels,
    extract,
    implied_mse,
    posterior_coefficients,
    q_posterior,
)
from ddpm.guidance import Guided
from ddpm.pixels import EIGHT_BIT, Values
from ddpm.schedule import Schedule


def _dynamic_threshold(x0: Tensor, p: float) -> Tensor:
    """Clip each image to [-s, s] and divide it by s, where s is the p-quantile of its |x0| but at least 1."""
    s = torch.stack([image.abs().flatten().quantile(p) for image in x0]).clamp(min=1)
    s = broadcast(s.to(x0), x0)
    return x0.clamp(-s, s) / s


@dataclass(frozen=True)
class Estimate:
    """A denoiser's estimate at x_t.

    x0            x0^ (Eq. 15), of x_t's shape; it is in [-1, 1] if the denoiser clips
    eps           the noise that belongs to this x0^: x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps. If x0^ was clipped,
                  this is not what the network predicts; `Denoiser.output` is
    mean          the mean of p_theta(x_{t-1} | x_t), of x_t's shape
    log_variance  its log-variance, [B, 1, ...] if the variance is fixed and of x_t's shape if it is learned
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
    """A network and the meaning of its output. Samplers, losses, likelihood and codec take a denoiser.

    network   (x [B, C, H, W], timestep int64 [B], y int64 [B] or None) -> [B, C, H, W], or [B, 2C, H, W] if the
              variance is learned. A network with a condition on an image takes it as the argument `condition` (`given`)
    schedule  the noise levels
    predict   what the first C channels of the output are:
              eps  the noise (Eq. 11)
              x0   the image
              mu   mu~ of Eq. 7
              v    sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 (Salimans & Ho 2022); this is -F of EDM with sigma_data 1
                   (Karras et al. 2022, Table 1), and L_simple for v is the loss of EDM
    variance  sigma_t^2:
              fixed_large    beta_t, but beta~_2 at t = 1, as in the official code
              fixed_small    beta~_t, but beta~_2 at t = 1, as in the official code
              learned        the last C channels are log sigma_t^2
              learned_range  the last C channels interpolate from log beta~_t at -1 to log beta_t at 1 (Nichol &
                             Dhariwal 2021)
              a tensor       a table of variances, float64 [T+1]
    clip      True: x0^ is clipped to [-1, 1] before the mean is computed from it; with mu, only the reported x0^ is
              clipped. A float p in (0, 1): dynamic thresholding (Saharia et al. 2022, Section 2.3), in which x0^ is
              clipped to [-s, s] and divided by s, where s is the p-quantile of an image's |x0^| but at least 1
    values    what the numbers of its images are; likelihoods need their bins

    The network may compute in any precision: its output is converted to the dtype of x_t first.
    Raises InputError for an unknown setting, and for eps prediction with a schedule that ends at abar_T = 0.

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
    values: Values = EIGHT_BIT

    def __post_init__(self) -> None:
        if not isinstance(self.clip, bool) and not 0 < self.clip < 1:
            raise InputError(f"clip {self.clip}: want true, false, or a quantile between 0 and 1")
        if self.predict not in get_args(Prediction):
            raise InputError(f"predict {self.predict!r}: want {', '.join(get_args(Prediction))}")
        if isinstance(self.variance, Tensor):
            if self.variance.shape != self.schedule.alpha_bar.shape:
                raise InputError(
                    f"variance of shape {list(self.variance.shape)}: want [{self.schedule.T + 1}], one per level"
                )
        elif self.variance not in get_args(Variance):
            raise InputError(f"variance {self.variance!r}: want {', '.join(get_args(Variance))}, or a table")
        if self.predict == "eps" and self.schedule.ends_in_noise:
            raise InputError(
                "predict eps: the schedule ends at alpha_bar 0, where eps does not determine x0; want x0, mu, v"
            )

    @property
    def device(self) -> torch.device:
        """Where the network's weights are; for a network without any, where the tables are.

        The tables stay on the CPU if the device of the weights has no float64 (mps), so images belong here.
        """
        network = self.network
        while isinstance(network, Guided | Given):
            network = network.network
        weight = next(network.parameters(), None) if isinstance(network, nn.Module) else None
        return self.schedule.alpha_bar.device if weight is None else weight.device

    @property
    def learned(self) -> bool:
        """Whether the network outputs the variance, and so 2C channels."""
        return isinstance(self.variance, str) and self.variance.startswith("learned")

    @property
    def bound_follows_from_mse(self) -> bool:
        """Whether the error of x0^ determines the terms of the bound, and so the best variance (Bao et al. 2022).

        It does so for a fixed variance, unless the network predicts mu.
        """
        return not self.learned and self.predict != "mu"

    def output(self, xt: Tensor, t: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The network's raw prediction of `target`, and its raw variance if that is learned; each has x_t's shape.

        xt is [B, C, H, W], t int64 [B], or [1] for all, in 1..T, and y int64 [B] or None. Raises InputError for levels
        outside 1..T; those of a t on a GPU are not checked, because the check would have to wait for the GPU.
        """
        check_levels(t, 1, self.schedule.T)
        out = self.network(xt, extract(self.schedule.timestep, t).to(xt.device), y).to(xt.dtype)
        if not self.learned:
            return out, None
        prediction, variance = out.chunk(2, dim=1)
        return prediction, variance

    def target(self, x0: Tensor, xt: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The right value of `output` for x_t = q_sample(x0, t, eps); it has x_t's shape."""
        match self.predict:
            case "eps":
                return eps
            case "x0":
                return x0
            case "mu":
                return q_posterior(self.schedule, x0, xt, t).mean
            case "v":
                abar = extract(self.schedule.alpha_bar, t)
                return broadcast(abar.sqrt(), xt) * eps - broadcast((1 - abar).sqrt(), xt) * x0

    def log_variance(self, xt: Tensor, t: Tensor, raw: Tensor | None) -> Tensor:
        """log sigma_t^2 of p_theta(x_{t-1} | x_t), nats: [B, 1, ...] if it is fixed, and of x_t's shape if learned.

        `raw` is the second result of `output`.
        """
        beta, tilde = self.schedule.beta, beta_tilde(self.schedule)
        match self.variance:
            case "fixed_large":
                return broadcast(torch.where(t.to(beta.device) == 1, tilde[1], extract(beta, t)).log(), xt)
            case "fixed_small":
                return broadcast(extract(tilde, t).log(), xt)
            case "learned":
                assert raw is not None
                return raw
            case "learned_range":
                assert raw is not None
                large, small = broadcast(extract(beta, t).log(), xt), broadcast(extract(tilde, t).log(), xt)
                return small + (raw + 1) / 2 * (large - small)
            case table:
                return broadcast(extract(table, t).log(), xt)

    def __call__(self, xt: Tensor, t: Tensor, y: Tensor | None = None) -> Estimate:
        """The estimate at x_t [B, C, H, W].

        t  int64 [B] in 1..T, or [1] for all images
        y  int64 [B] class labels, or None
        """
        prediction, raw_variance = self.output(xt, t, y)
        abar = extract(self.schedule.alpha_bar, t)
        signal, sigma = broadcast(abar.sqrt(), xt), broadcast((1 - abar).sqrt(), xt)
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
                x0 = (prediction - broadcast(c_x, xt) * xt) / broadcast(c_0, xt)
                eps = (xt - signal * x0) / sigma
        if self.clip:
            clipped = x0.clamp(-1, 1) if self.clip is True else _dynamic_threshold(x0, self.clip)
            eps = eps + signal / sigma * (x0 - clipped)
            x0 = clipped
        mean = prediction if self.predict == "mu" else q_posterior(self.schedule, x0, xt, t).mean
        return Estimate(x0, eps, mean, self.log_variance(xt, t, raw_variance))

    def unclipped(self) -> "Denoiser":
        """The same denoiser without clipping, which the official code uses to train the true bound."""
        return replace(self, clip=False)

    def respace(self, levels: Sequence[int]) -> "Denoiser":
        """The same denoiser on fewer levels; `levels` rise within 1..T.

        A table of variances becomes the table for the same errors of x0^ (`gaussian.implied_mse`). learned_range
        interpolates between beta~_t and beta_t of the new levels. Raises InputError for mu and for variance learned,
        because both describe one step between the original levels.

        >>> from ddpm import schedule
        >>> Denoiser(lambda x, timestep, y: x, schedule.linear()).respace([500, 1000]).schedule.T
        2
        """
        if self.variance == "learned":
            raise InputError("respace: variance learned holds for all T levels only; want learned_range or a fixed one")
        if self.predict == "mu":
            raise InputError(
                "respace: mu prediction holds for all T levels only; want eps, x0 or v, or the ddim sampler"
            )
        schedule, variance = self.schedule.respace(levels), self.variance
        if isinstance(variance, Tensor):
            mse = implied_mse(self.schedule, variance)[torch.tensor([int(level) for level in levels]) - 1]
            variance = calibrated_variance(schedule, mse)
            variance[1] = variance[1] if mse[0] > 0 else beta_tilde(schedule)[1]  # a density needs a variance above 0
        return replace(self, schedule=schedule, variance=variance)

    def given(self, condition: Tensor | None) -> "Denoiser":
        """The same denoiser for images with this condition [B, c + 1, H, W], as `conditions.join` makes it.

        Samplers, losses and likelihoods take the result as they take any denoiser: their images are B, or K B with each
        condition for K images in a row. None gives the denoiser itself.

        >>> from ddpm import schedule
        >>> told = Denoiser(lambda x, timestep, y, condition: condition[:, :1], schedule.linear(), predict="x0")
        >>> x, t = torch.zeros(4, 1, 2, 2), torch.tensor([500])
        >>> told.given(torch.tensor([0.25, 0.5]).view(2, 1, 1, 1).expand(2, 2, 2, 2))(x, t).x0[:, 0, 0, 0].tolist()
        [0.25, 0.25, 0.5, 0.5]
        """
        return self if condition is None else replace(self, network=Given(self.network, condition))

    def guided(
        self, scale: float, interval: tuple[int, int] | None = None, guide: "Denoiser | None" = None
    ) -> "Denoiser":
        """The same denoiser with guidance: a second network call makes a weaker prediction, and takes it away.

        scale     prediction = weaker prediction + scale (prediction - weaker prediction); 1 is no guidance. All four
                  predictions are linear in x0^, so this guides x0^. Without `guide`, the weaker one is that without
                  label: Eq. 6 of Ho & Salimans 2022 with scale = 1 + w. Without labels there is then no guidance
        interval  the first and the last level t with guidance (None: all levels); at other levels there is one network
                  call (Kynkäänniemi et al. 2024)
        guide     the weaker denoiser, such as the same model earlier in its training or a smaller one (autoguidance;
                  Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself")

        Without labels, the condition of `given` takes the place of the label; `given` may come before or after, and the
        guide gets the same condition. A learned variance is that of this denoiser with the label. Raises InputError if
        scale is not finite, if interval is not within 1..T, and for a guide with another schedule or prediction.

        >>> from ddpm import schedule
        >>> labelled = Denoiser(lambda x, timestep, y: torch.full_like(x, 0.1) * y.view(-1, 1, 1, 1), schedule.linear())
        >>> x, t, y = torch.zeros(1, 1, 2, 2), torch.tensor([500]), torch.tensor([3])
        >>> round(float(labelled.guided(1.5).output(x, t, y)[0].mean()), 3)  # -0.1 + 1.5 (0.3 + 0.1)
        0.5
        """
        if isinstance(self.network, Given):
            inner = replace(self, network=self.network.network)
            return inner.guided(scale, interval, guide).given(self.network.condition)
        first, last = (whole_number("guidance interval", t) for t in interval or (1, self.schedule.T))
        scale = finite_number("guidance", scale)
        if not 1 <= first <= last <= self.schedule.T:
            raise InputError(f"guidance interval {first}, {last}: want two levels in order, 1..{self.schedule.T}")
        if guide is not None:
            if guide.predict != self.predict:
                raise InputError(f"guide: it predicts {guide.predict}; want one that predicts {self.predict}")
            tables = [(d.schedule.alpha_bar.tolist(), d.schedule.timestep.tolist()) for d in (self, guide)]
            if tables[0] != tables[1]:
                raise InputError("guide: it has another noise schedule; want one of the same schedule and T")
        ends = self.schedule.timestep[[first, last]].tolist()
        weaker = None if guide is None else guide.network
        return replace(self, network=Guided(self.network, scale, ends[0], ends[1], self.learned, weaker))

    def to(self, device: torch.device | str) -> "Denoiser":
        """The same denoiser with network and tables on `device`; the tables stay if `device` has no float64 (mps).

        On CUDA devices, and on CPUs where `ddpm.kernels` can be used, the weights of convolutions get the channels-last
        memory format, which their inputs and outputs then have too. Shapes and files do not change.
        """
        if isinstance(self.network, Guided):
            inner = replace(self, network=self.network.network).to(device)
            guide = self.network.guide and replace(self, network=self.network.guide).to(device).network
            return replace(inner, network=replace(self.network, network=inner.network, guide=guide))
        if isinstance(self.network, Given):
            return replace(self, network=self.network.network).to(device).given(self.network.condition.to(device))
        if isinstance(self.network, nn.Module):
            dtype = getattr(self.network, "computes", None)  # None for a network that is not a UNet
            has_kernels = torch.device(device).type == "cpu" and kernels.ready(dtype)
            channels_last = has_kernels or torch.device(device).type == "cuda"
            layout = torch.channels_last if channels_last else torch.contiguous_format
            self.network.to(device, memory_format=layout)  # type: ignore[call-overload]
        changes: dict[str, Any] = {}
        if float64.available(device):
            changes["schedule"] = self.schedule.to(device)
            if isinstance(self.variance, Tensor):
                changes["variance"] = self.variance.to(device)
        return replace(self, **changes)

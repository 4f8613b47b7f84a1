"""What is worth a warning before a long run: settings that are allowed and that will disappoint."""

import math
from collections.abc import Iterator

from ddpm.gaussian import beta_tilde
from ddpm.pixels import values
from ddpm.presets import Preset
from ddpm.schedule import SCHEDULES, Schedule

_FAR, _NEAR = 2e-3, 1e-4
"""abar_T above which a schedule is warned of, and abar_T of the one that is recommended. The paper's is 4e-5."""

_FEW = 4
"""Pixel values that sigma_1 may have. The paper's is 0.94 of 256."""


def advice(preset: Preset, schedule: Schedule) -> Iterator[str]:
    """Yield one line for each setting that will disappoint.

    >>> from dataclasses import replace
    >>> from ddpm import schedule
    >>> from ddpm.presets import PRESETS
    >>> print(*advice(replace(PRESETS["cifar10"], num_timesteps=100), schedule.linear(100)), sep="\\n")
    schedule linear: alpha_bar_T is 0.364 with T = 100 and beta_T = 0.02, so the last level keeps 60% of the image, ...
    """
    if (abar := float(schedule.alpha_bar[-1])) > _FAR:
        cause, use = f"beta_T = {preset.beta_T}", "schedule cosine"
        if preset.last_sigma:
            cause, use = f"last_sigma = {preset.last_sigma:g}", "a larger last_sigma"
        elif (beta_T := _enough(preset)) is not None:
            use = f"beta_T {beta_T:.2g}, or schedule cosine"
        yield (
            f"schedule {preset.schedule}: alpha_bar_T is {abar:.3g} with T = {preset.num_timesteps:,} and {cause}, so "
            f"the last level keeps {math.sqrt(abar):.0%} of the image, but sampling starts from pure noise; use {use}"
        )
    bins = values(preset.pixel_type, preset.value_range)
    if (bins.bins or 0) > 256 and not preset.variance.startswith("learned") and preset.loss != "consistency":
        sigma = math.sqrt(float(beta_tilde(schedule)[1])) / bins.bin
        if sigma > _FEW:
            yield (
                f"schedule {preset.schedule}: sigma_1, the standard deviation of p(x_0 | x_1), is {sigma:.3g} of "
                f"{bins.bins:,} pixel values, so L_0 costs at least {math.log2(sigma * math.sqrt(2 * math.pi)):.1f} "
                f"bits/dim, whatever the network learns; {'leave out init, and ' if preset.init else ''}use "
                f"schedule log_snr with beta_1 {bins.bin**2:.0e} and timestep_sampling lognormal"
            )
    if preset.warmup >= preset.steps > 1:
        yield (
            f"warmup {preset.warmup:,}: the run has {preset.steps:,} steps, so the learning rate never reaches lr "
            f"{preset.lr}; use a shorter warmup, or more steps"
        )
    left = preset.ema_decay**preset.steps
    if left > 0.01 and not preset.ema_warmup:
        yield (
            f"ema_decay {preset.ema_decay} averages over about {1 / (1 - preset.ema_decay):,.0f} steps; "
            f"after {preset.steps:,} steps {left:.0%} of the average is still the first weights, so its samples will "
            "look like noise; use ema_warmup, a lower ema_decay, or sample the raw weights"
        )


def few_steps(preset: Preset) -> str:
    """One line if the time of a run is enough for fewer than 200 steps, which learn next to nothing; or nothing.

    >>> from dataclasses import replace
    >>> from ddpm.presets import PRESETS
    >>> few_steps(replace(PRESETS["photos"], steps=40))[:38]
    'minutes: there is time for only 40 ste'
    """
    if preset.steps >= 200:
        return ""
    return (
        f"minutes: there is time for only {preset.steps:,} step{'s' * (preset.steps != 1)}, after which samples are "
        f"still noise; want more minutes, or a smaller width (now {preset.width}), batch_size (now "
        f"{preset.batch_size}) or size"
    )


def _enough(preset: Preset) -> float | None:
    """A beta_T of two digits with which abar_T is near 0; None if beta_T has no such effect, as with T = 1."""
    make, beta_T = SCHEDULES[preset.schedule], preset.beta_T
    while (beta_T := 1.05 * beta_T) < 0.99:
        rounded = float(f"{beta_T:.2g}")
        if make(preset.num_timesteps, preset.beta_1, rounded).alpha_bar[-1] < _NEAR:
            return rounded
    return None

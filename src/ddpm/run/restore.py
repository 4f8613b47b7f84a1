"""Restore images that an operator degraded, with a model that was not trained for it."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm import float64, kernels, pixels, restoration
from ddpm.editing import repaint_calls
from ddpm.errors import InputError, finite_number, suggestion
from ddpm.files import arrays, data, functions, images
from ddpm.files.models import Checkpoint
from ddpm.noise import normal, per_image
from ddpm.presets import Preset
from ddpm.restoration import Blur, Grey, Linear, Mask, SuperResolution
from ddpm.run.edit import SamplingSettings, Source, name_of, read_mask, signal
from ddpm.run.progress import Progress
from ddpm.samplers import Step

METHODS = {"ddnm": "log_snr", "dps": "uniform"}
"""The methods, and how each spaces its noise levels by default.

The last step of DDNM+ does not correct x0^. So its last level must be near data, as it is with log_snr, or the result
does not agree with the measurement.
"""
STEPS = 100
"""The number of noise levels by default."""
ROUNDING = 0.29
"""The standard deviation of rounding to whole numbers, 1/sqrt(12): the least noise of an image in a file."""


def superresolution(argument: str, preset: Preset, noise: float) -> Linear:
    """`superresolution:N`: blocks of N x N pixels become their mean."""
    factor = int(argument) if argument.isdecimal() and len(argument) < 6 else 0
    height, width = preset.size
    if factor < 2 or height % factor or width % factor:
        raise InputError(f"want superresolution:N with N of at least 2 that divides the model's {height}x{width}")
    return SuperResolution(factor)


def blur(argument: str, preset: Preset, noise: float) -> Linear:
    """`blur:SIGMA`: a Gaussian blur of SIGMA pixels. Singular values below 10 times the noise count as 0.

    DDNM+ meets the same noise at each step, and keeps too much of it where A^+ makes it large. The cut is at 0.1 at
    most, or at the noise if this is larger.
    """
    most, least = min(preset.size), max(noise, min(10 * noise, 0.1), 1e-6)
    try:
        return Blur(finite_number("sigma", float(argument), 0.1, most), preset.size, least)
    except ValueError:
        raise InputError(f"want blur:SIGMA with SIGMA in pixels, 0.1 to {most}") from None


def mask(argument: str, preset: Preset, noise: float) -> Linear:
    """`mask:FILE`: what is white in FILE is hidden, as in `ddpm inpaint`."""
    if not argument:
        raise InputError("want mask:FILE, a file that is white where pixels are hidden")
    return Mask(read_mask(argument, preset.size, "the model's", preset))


def grey(argument: str, preset: Preset, noise: float) -> Linear:
    """`grey`: colours become luma."""
    if argument or preset.channels != 3:
        raise InputError(f"want grey, and a model of images of 3 channels; this one has {preset.channels}")
    return Grey()


OPERATORS = {"superresolution": superresolution, "blur": blur, "mask": mask, "grey": grey}
"""The linear operators by name. Each function takes the argument, which follows the name and a colon, the settings of
the model, and the standard deviation of the measurement's noise in signal units."""


def operator_of(
    spec: str, preset: Preset, noise: float = 0.0, device: torch.device | str = "cpu"
) -> Callable[[Tensor], Tensor]:
    """The operator that `spec` names, for the images of `preset`: a `Linear`, or the user's function FILE.py:NAME.

    noise  the standard deviation of the measurement's noise, in signal units

    Raises InputError for another name, and for an argument that does not fit. So does the function that is returned if
    the user's function fails.
    """
    name, _, argument = spec.partition(":")
    if name in OPERATORS:
        try:
            operator = OPERATORS[name](argument, preset, noise)
        except InputError as fault:
            raise InputError(f"operator {spec}: {fault}") from None
        return Mask(operator.hidden.to(device)) if isinstance(operator, Mask) else operator
    if ".py:" not in spec:
        wanted = "superresolution:N, blur:SIGMA, mask:FILE, grey or FILE.py:NAME"
        raise InputError(f"operator {spec!r}: {suggestion(name, OPERATORS)}want {wanted}")
    function = functions.load(spec)

    def checked(x: Tensor) -> Tensor:
        result = function(x)
        if not isinstance(result, Tensor) or not result.shape or len(result) != len(x):
            have = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise InputError(f"operator {spec}: returned {have}; want a tensor [{len(x)}, ...], one row per image")
        if result.is_complex():
            raise InputError(f"operator {spec}: returned complex numbers; want real ones, as torch.view_as_real makes")
        return result

    return checked


@dataclass(frozen=True)
class Restoration:
    """How images are restored.

    method    ddnm, which needs a linear operator, or dps; None: ddnm for a linear operator
    noise     the standard deviation of the noise of the measured images in grey levels, which are 1/255 of the range of
              the model's numbers; at least that of rounding, if these are whole. None: ROUNDING, or this if it is more
    zeta      the size of the steps of dps; None: 1
    jump      levels to go back up in the time travel of ddnm; None: 1/25 of the visited ones
    resample  how often ddnm passes each level; None: once
    sampling  levels, classes and batch size; by default STEPS levels, spaced as METHODS says
    """

    method: str | None = None
    noise: float | None = None
    zeta: float | None = None
    jump: int | None = None
    resample: int | None = None
    sampling: SamplingSettings = SamplingSettings()


class Restored(NamedTuple):
    """The result of `restore` for I images.

    clean     pixels [I, C, H, W] of the images before they were degraded; None for images that were degraded already
    degraded  the measurements as pixels [I, C, H, W], enlarged where they are smaller; None if they are no images
    restored  pixels [I n, C, H, W], n of the first image, and so on
    method    ddnm or dps
    noise     the standard deviation of the noise that was assumed, in grey levels
    levels    the visited noise levels
    residual  the root mean square of A(restored) - measurement, in grey levels
    psnr      the peak signal-to-noise ratio of all restored pixels in dB; None without `clean`, and if they are equal
    """

    clean: Tensor | None
    degraded: Tensor | None
    restored: Tensor
    method: str
    noise: float
    levels: list[int]
    residual: float
    psnr: float | None

    def rows(self, count: int) -> tuple[Tensor, list[str]]:
        """The images of `count` rows, pixels [N, C, H, W], and their names: clean, degraded and restored ones."""
        n = len(self.restored) // count
        columns = [] if self.clean is None else [("clean", self.clean)]
        columns += [] if self.clean is None or self.degraded is None else [("degraded", self.degraded)]
        columns += [(str(i), self.restored[i::n]) for i in range(n)]
        names = [f"{row:03d}_{name}" for row in range(count) for name, _ in columns]
        return torch.stack([tiles for _, tiles in columns], 1).flatten(0, 1), names


def restore(
    checkpoint: Checkpoint,
    sources: Sequence[Source],
    operator: str,
    n: int = 1,
    settings: Restoration = Restoration(),
    seed: int = 0,
    degrade: bool = False,
    progress: bool = True,
) -> Restored:
    """`n` samples of what each image was before `operator` and noise degraded it.

    operator  superresolution:N, blur:SIGMA, mask:FILE, grey or FILE.py:NAME
    seed      seed of the first result; the next have +1, +2, ..., over all images
    degrade   the images are clean; they are degraded first, with noise of their own seeds

    Raises InputError for files that are no such images or not of the operator's size, for an operator or a method that
    does not fit, and for settings out of range.
    """
    preset, values = checkpoint.preset, checkpoint.denoiser.values
    if preset.loss == "consistency":
        raise InputError(f"{checkpoint.path}: a consistency model; want a model whose x0^ is a mean of images")
    device, least = checkpoint.denoiser.device, 0.0
    if values.bins:
        least = round(ROUNDING * values.bin / pixels.BIN, 4)
    given = max(ROUNDING, least) if settings.noise is None else settings.noise
    noise = finite_number("noise", given, least, 255) * pixels.BIN
    apply = operator_of(operator, preset, noise, device)
    method = _method(settings, apply, operator, degrade)
    levels = _levels(checkpoint, method, settings.sampling)
    sample: Callable[..., Iterator[Step]]
    if method == "ddnm":
        jump = max(1, len(levels) // 25) if settings.jump is None else settings.jump
        resample = 1 if settings.resample is None or len(levels) == 1 else settings.resample
        sample = partial(restoration.ddnm, sigma=noise, steps=levels, jump=jump, resample=resample)
        calls = repaint_calls(len(levels), jump, resample)
    else:
        sample = partial(restoration.dps, zeta=1.0 if settings.zeta is None else settings.zeta, steps=levels)
        calls = len(levels)

    clean = torch.stack([signal(source, checkpoint) for source in sources]) if degrade else None
    if clean is None:
        shape = apply(torch.zeros(1, *preset.shape, device=device)).shape[1:]
        measured = torch.stack([_measured(source, shape, operator, preset) for source in sources]).to(device)
    else:
        measured = apply(clean.to(device)).detach()
        seeds = range(seed, seed + n * len(clean), n)
        drawn = normal(seeds, measured.shape[1:], checkpoint.denoiser.schedule.T + 1)  # no method has this level
        measured = measured + noise * drawn.to(measured)
    if isinstance(apply, Mask):
        measured = apply(measured)  # what is hidden tells nothing

    made, squares, total = [], 0.0, len(sources) * n
    with kernels.frozen():
        for i in range(0, total, settings.sampling.batch_size):
            places = range(total)[i : i + settings.sampling.batch_size]
            told = measured[[place // n for place in places]]
            draws = per_image([seed + place for place in places], preset.shape, device)
            path = sample(checkpoint.denoiser, apply, told, draws, y=settings.sampling.labels(places, device))
            for step in Progress(path, total=calls, unit="step", desc="restoring", show=progress, leave=False):
                last = step.x  # the steps before it are not kept
            made.append(pixels.to_pixels(last, values).cpu())
            squares += float(float64.convert((apply(last) - told).detach()).square().sum())
    restored, residual = torch.cat(made), (squares / (n * measured.numel())) ** 0.5 / pixels.BIN
    shown = _shown(measured, preset)
    degraded = None if shown is None else pixels.to_pixels(shown, values).cpu()
    if clean is None:
        return Restored(None, degraded, restored, method, given, levels, residual, None)
    before = pixels.to_pixels(clean, values)
    psnr = _psnr(before.repeat_interleave(n, 0), restored, values.high - values.low)
    return Restored(before, degraded, restored, method, given, levels, residual, psnr)


def _method(settings: Restoration, operator: Callable[[Tensor], Tensor], spec: str, degrade: bool) -> str:
    """ddnm or dps. Raises InputError for a method that cannot use the operator, or has no such setting."""
    method = settings.method or ("ddnm" if isinstance(operator, Linear) else "dps")
    if method not in METHODS:
        raise InputError(f"method {method!r}: want {' or '.join(METHODS)}")
    if method == "ddnm" and not isinstance(operator, Linear):
        raise InputError(f"method ddnm: wants one of {', '.join(OPERATORS)}; want dps for {spec}")
    for name in ("zeta",) if method == "ddnm" else ("jump", "resample"):
        if getattr(settings, name) is not None:
            raise InputError(f"{name} {getattr(settings, name)}: the method {method} has no such setting")
    if method == "dps" and settings.noise is not None and not (degrade or isinstance(operator, Blur)):
        raise InputError(f"noise {settings.noise:g}: the method dps does not use it; want it with degrade, or no noise")
    if settings.jump is not None and settings.resample in (None, 1):
        raise InputError(f"jump {settings.jump}: each level is passed once; want resample of 2 or more with it")
    return method


def _levels(checkpoint: Checkpoint, method: str, sampling: SamplingSettings) -> list[int]:
    schedule = checkpoint.denoiser.schedule
    steps = min(STEPS, schedule.T) if sampling.steps is None else sampling.steps
    spacing = "uniform" if schedule.ends_in_noise else METHODS[method]  # where abar_T is 0, there is no log-SNR
    return replace(sampling, steps=steps, spacing=sampling.spacing or spacing).levels(checkpoint, schedule.T)


def _measured(source: Source, shape: Sequence[int], operator: str, preset: Preset) -> Tensor:
    """A measurement in a file, [C', H', W'] = shape. Raises InputError for a file of another size."""
    if len(shape) != 3:
        raise InputError(f"operator {operator}: its result {list(shape)} is no image; want to degrade images with it")
    name, notes = name_of(source), dict[str, tuple[str, int]]()
    channels, height, width = shape
    form = replace(data.form_of(preset), channels=channels, size=(height, width))
    file = source if isinstance(source, bytes) else Path(source)
    picture = images.read(file, name) if form.is_picture else None
    have = picture.size[::-1] if picture else arrays.read(file, name, form.pages, notes).shape[:2]
    if tuple(have) != form.size:
        wanted = f"want {height}x{width}, which {operator} makes of the model's {preset.size[0]}x{preset.size[1]}"
        parts = "; cut a larger picture into parts of this size" if have[0] > height or have[1] > width else ""
        raise InputError(f"{name}: {have[0]}x{have[1]} (height x width); {wanted}{parts}")
    array = images.fit(picture, form.size, channels, name, notes) if picture else form.array(file, name, notes)
    for what in notes:
        warnings.warn(f"{name}: {what}", stacklevel=4)
    return pixels.to_signal(torch.from_numpy(array.transpose(2, 0, 1).copy()), form.values)


def _shown(measured: Tensor, preset: Preset) -> Tensor | None:
    """Measurements as images of the model's size and channels; None if they are no images."""
    if measured.ndim != 4 or measured.shape[1] not in (1, preset.channels):
        return None
    return F.interpolate(measured, preset.size, mode="nearest-exact").expand(-1, preset.channels, -1, -1)


def _psnr(clean: Tensor, restored: Tensor, span: float) -> float | None:
    """10 log10(span^2 / mean squared error), dB; None for equal images."""
    error = (clean.double() - restored.double()).square().mean().item()
    return 10 * math.log10(span**2 / error) if error else None

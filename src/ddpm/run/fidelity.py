"""How close samples given a condition are to the images that the conditions were made of: PSNR and SSIM."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm import conditions, noise, pixels
from ddpm.errors import InputError, not_installed
from ddpm.files import data
from ddpm.files.models import Checkpoint
from ddpm.run import conditioning
from ddpm.run.parts import (
    compute_parts,
    labels_of,
    model_key,
    parts_folder,
    read_parts,
    state_of,
    subset,
)
from ddpm.run.processes import Processes
from ddpm.run.sample import generate, sampler_levels

DRAWS = 8
"""Samples of each image. Their mean comes closer to the image than one of them: it estimates E[x_0 | condition]."""
_SEEDS = 0xF1DE
"""Key of the samples' seeds."""


def psnr(x: Tensor, y: Tensor, peak: float) -> Tensor:
    """10 log10(peak^2 / MSE) of images x and y [B, C, H, W], dB [B]; peak is the range of their numbers.

    It is infinite for equal images.

    >>> psnr(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 25.5), 255).tolist()
    [20.0]
    """
    return 10 * torch.log10(peak**2 / (x - y).square().flatten(1).mean(1))


def ssim(x: Tensor, y: Tensor, peak: float) -> Tensor:
    """Structural similarity (Wang et al. 2004) by scikit-image, with its Gaussian window, [B]; arguments as in `psnr`.

    Raises InputError if scikit-image is not installed, and for images of less than 11 pixels a side.
    """
    if importlib.util.find_spec("skimage") is None:
        raise not_installed("skimage", "ssim")
    if min(x.shape[-2:]) < 11:
        raise InputError(f"metric ssim: its window has 11x11 pixels, and images {x.shape[-2]}x{x.shape[-1]}; want psnr")
    from skimage.metrics import structural_similarity

    settings = {"data_range": peak, "channel_axis": 0, "gaussian_weights": True, "use_sample_covariance": False}
    pairs = zip(x.double().numpy(), y.double().numpy(), strict=True)
    return torch.tensor([structural_similarity(a, b, **settings) for a, b in pairs], dtype=torch.float64)


class Fidelity(NamedTuple):
    """A measure of how close images are.

    function  (x, y, peak) -> one number per image
    unit      of this number
    meaning   one line for help
    """

    function: Callable[[Tensor, Tensor, float], Tensor]
    unit: str = ""
    meaning: str = ""


FIDELITY = {
    "psnr": Fidelity(psnr, unit="dB", meaning="PSNR of samples given the condition of held-out images"),
    "ssim": Fidelity(ssim, meaning="SSIM of the same, by scikit-image"),
}


def fidelity(
    checkpoint: Checkpoint,
    images: data.Images,
    names: Sequence[str],
    cache: Path,
    ranks: Processes,
    count: int | None = None,
    seed: int = 0,
    sampler: str = "ancestral",
    levels: Sequence[int] | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, Any]:
    """The means over `count` images (None: all) of the measures of these names, for the image beside

    NAME           one sample, given the image's condition
    NAME_of_mean   the mean of DRAWS samples, not rounded
    NAME_bicubic   with the condition lowres:N, the small image enlarged by bicubic interpolation

    and the standard errors of the first as NAME_standard_error, the number of images and of draws; plain JSON values.
    The PSNR of an image that equals its sample is infinite. It has no part in the mean, which is None if no image has,
    and NAME_infinite says how many there are.
    One sample lies below a regression by nature: its error is that of E[x_0 | condition] and its own spread. Finished
    batches are stored under `cache`. Raises InputError for a model without a condition, and as the measures do.
    """
    preset, denoiser = checkpoint.preset, checkpoint.denoiser
    if preset.condition == "none":
        raise InputError(f"metric {names[0]}: {checkpoint.path} was trained without a condition; want one with")
    for name in names:  # a measure that cannot be computed shows before hours of sampling
        FIDELITY[name].function(torch.zeros(1, *preset.shape), torch.ones(1, *preset.shape), 1.0)
    levels = sampler_levels(checkpoint, sampler) if levels is None else levels
    indices, values = subset(images, count), images.values
    key = [*model_key(checkpoint), state_of(images, ranks), seed, sampler, [*levels], [*names]]

    def measure(part: slice) -> dict[str, Tensor]:
        batch = indices[part]
        x0, y = pixels.to_signal(images.batch(batch), values), labels_of(checkpoint, images, batch, torch.device("cpu"))
        condition = conditioning.of_images(preset, images, batch, x0)
        assert condition is not None
        seeds = [noise.mix(seed, i, draw, _SEEDS) for i in batch for draw in range(DRAWS)]
        samples = generate(
            denoiser, preset.shape, seeds, sampler, levels, batch_size, ranks.device, progress=progress,
            y=None if y is None else y.repeat_interleave(DRAWS), condition=condition.repeat_interleave(DRAWS, dim=0),
        )  # fmt: skip
        drawn, truth = samples.double().view(-1, DRAWS, *preset.shape), pixels.to_pixels(x0, values).double()
        shown = {"": drawn[:, 0], "_of_mean": drawn.mean(1)}
        if preset.condition.startswith("lowres"):
            shown["_bicubic"] = pixels.to_pixels(conditions.shown(condition, preset.channels), values).double()
        peak = values.high - values.low
        return {f"{name}{how}": FIDELITY[name].function(x, truth, peak) for name in names for how, x in shown.items()}

    folder = parts_folder(cache, "fidelity", key)
    files = compute_parts(folder, len(indices), ranks, max(1, batch_size // DRAWS), "fidelity", progress, measure)
    rows = read_parts(files)
    finite = {name: value[value.isfinite()] for name, value in rows.items()}
    means = {name: float(value.mean()) if len(value) else None for name, value in finite.items()}
    errors = {
        f"{name}_standard_error": float(finite[name].std() / len(finite[name]) ** 0.5)
        for name in names
        if len(finite[name]) > 1
    }
    equal = {
        f"{name}_infinite": len(indices) - len(value) for name, value in finite.items() if len(value) < len(indices)
    }
    return {**means, **errors, **equal, "count": len(indices), "draws": DRAWS}

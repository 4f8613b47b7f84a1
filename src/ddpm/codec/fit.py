"""Setting a model's codec on training images, with the codec in the loop: its samples are not quite the model's own."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm import noise, pixels
from ddpm.codec import plan, progressive
from ddpm.codec.plan import SCALES, SPREADS, Group, Tables
from ddpm.codec.progressive import Array, Predictor
from ddpm.denoiser import Denoiser
from ddpm.gaussian import q_sample

_CHAIN = 301  # what a draw is for
_CALL = 5e-4  # bits a dimension that a level more of an archive's chain has to save


def fit(
    denoiser: Denoiser, mse: Tensor, images: Tensor, bits: int, tick: Callable[[int], object] = lambda groups: None
) -> Tables:
    """Tables for chunks of `bits` = K, from errors mse float64 [n, T] and images uint8 [m, C, H, W] to train on.

    The pixels' mixture takes off a part of what one Gaussian costs, which is known only once there are residuals: so a
    first plan, on a quarter of the images, serves to make the second. tick hears of every group that was coded.
    """
    dims = images[0].numel()
    some = images[: max(1, len(images) // 4)]
    first = _coded(denoiser, _planned(denoiser, mse, dims, bits, 0.0), some, tick)
    _, residuals, sigmas = first
    weights = np.array(plan.mixture(residuals, sigmas)) / 64
    gaussian = _entropy(residuals, sigmas, np.array([spread == 0 for spread in SPREADS]))
    gain = max(0.0, gaussian - _entropy(residuals, sigmas, weights))
    return _coded(denoiser, _planned(denoiser, mse, dims, bits, gain), images, tick)[0]


def fit_chain(denoiser: Denoiser, mse: Tensor, images: Tensor) -> Tables:
    """Tables for archives, whose x_t are exact draws of q; arguments as for `fit`."""
    dims = images[0].numel()
    chosen = plan.levels(denoiser.schedule, mse, dims, None, group_bits=_CALL * dims)
    tables = plan.empty(denoiser.schedule, mse, chosen, 8)
    true, t = pixels.to_signal(images).double(), torch.full((len(images),), chosen[-1])
    eps = noise.normal(range(len(images)), true.shape[1:], _CHAIN).to(true)
    xt = q_sample(denoiser.schedule.to("cpu"), true, t, eps).numpy()
    residuals = true.numpy() - Predictor(denoiser, careful=False)(xt, chosen[-1])
    scales = [progressive.scale_of(float(np.mean(r**2)), tables.last) for r in residuals]
    counts = np.bincount([tables.scale_symbol(scale) for scale in scales], minlength=2 * len(SCALES) - 1)
    sigmas = np.sqrt([tables.last.error(scale) for scale in scales]).repeat(dims)
    return replace(tables, scales=tuple(counts.tolist()), spread=plan.mixture(residuals.ravel(), sigmas))


def _planned(denoiser: Denoiser, mse: Tensor, dims: int, bits: int, gain: float) -> Tables:
    chosen = plan.levels(denoiser.schedule, mse, dims, bits, gain)
    return plan.empty(denoiser.schedule, mse, chosen, bits)


def _entropy(residuals: Array, sigmas: Array, weights: NDArray[np.float64]) -> float:
    """Bits a residual under a mixture of `SPREADS`."""
    return float(-np.log2(weights @ plan.masses(residuals, sigmas)).mean())


def _coded(
    denoiser: Denoiser, tables: Tables, images: Tensor, tick: Callable[[int], object]
) -> tuple[Tables, Array, Array]:
    """Code the images; the tables with what was counted, and the last stage's residuals and their sigma."""
    true = pixels.to_signal(images).double().numpy()
    real = np.ones(true.shape, bool)
    scales = np.zeros(2 * len(SCALES) - 1, np.int64)
    buckets = np.zeros((len(tables.buckets), tables.bits + plan.PAD + 1), np.int64)
    state = progressive.start(tables, true.shape, 0)
    dims = images[0].numel()

    def step(number: int, group: Group, x0: Array) -> bool:
        before = list(state.scales)
        sent = progressive.encode_group(state, group, x0, true, real, tables, 0)
        for scale, indices, last in zip(sent.scales, sent.indices, before, strict=True):
            scales[tables.scale_symbol(scale, last)] += 1
            _, load = group.chunks(scale, dims, tables.bits)
            np.add.at(buckets[load], np.frexp(indices + 1.0)[1] - 1, 1)
        tick(number + 1)
        return True

    x0 = progressive.run(Predictor(denoiser, careful=False), tables, state, step)
    sigmas = np.empty_like(true)
    for tile, residual in enumerate(true - x0):
        scale = progressive.scale_of(float(np.mean(residual**2)), tables.last)
        scales[tables.scale_symbol(scale, state.scales[tile])] += 1
        sigmas[tile] = math.sqrt(tables.last.error(scale))
    residuals, flat = (true - x0).ravel(), sigmas.ravel()
    spread = plan.mixture(residuals, flat)
    counts = tuple(map(tuple, buckets.tolist()))
    return replace(tables, scales=tuple(scales.tolist()), buckets=counts, spread=spread), residuals, flat

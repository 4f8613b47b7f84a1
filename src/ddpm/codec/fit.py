"""Fit a model's codec tables on training images. The codec runs in the loop, since its draws differ a little from
exact ones."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ddpm import noise, pixels
from ddpm.codec import plan, progressive, residual
from ddpm.codec.plan import SCALES, Group, Tables
from ddpm.codec.progressive import Array, Predictor
from ddpm.denoiser import Denoiser
from ddpm.gaussian import q_sample

_CHAIN = 301  # the purpose of a draw
_SCALE = 2.0  # bits of a group's scale
_GROUP = 1 / 512  # bits per dimension that one more group must save beyond its scale
_CALL = 5e-4  # bits per dimension that one more level of an archive's chain must save


def fit(
    denoiser: Denoiser, mse: Tensor, images: Tensor, gain: Array, bits: int,
    tick: Callable[[int], object] = lambda groups: None,
) -> Tables:  # fmt: skip
    """The tables for chunks of `bits` = K, from errors mse float64 [n, T] and training images uint8 [m, C, H, W].

    gain is the result of `gains` for these images. tick is called after every group.
    """
    dims, channels, schedule = images[0].numel(), images.shape[1], denoiser.schedule.to("cpu")
    chosen = plan.levels(schedule, mse, dims, bits, gain, _SCALE + _GROUP * dims)
    tables = plan.empty(schedule, mse, chosen, bits, channels)
    true = pixels.to_signal(images).double().numpy()
    real = np.ones(true.shape, bool)
    scales = np.zeros(2 * len(SCALES) - 1, np.int64)
    buckets = np.zeros((len(tables.buckets), bits + plan.PAD + 1), np.int64)
    state = progressive.start(true.shape, 0)
    pickers = progressive.pickers(images.numpy(), real, 0, use_pixels=False)

    def step(number: int, group: Group, x0: Array) -> bool:
        before = list(state.scales)
        symbols = progressive.encode_group(state, group, x0, true, real, tables, 0, pickers)
        for scale, indices, last in zip(symbols.scales, symbols.indices, before, strict=True):
            scales[tables.scale_symbol(scale, last)] += 1
            if not group.banded(dims):
                load = group.chunks(scale, dims, bits).load
                np.add.at(buckets[load], np.frexp(indices[0] + 1.0)[1] - 1, 1)
        tick(number + 1)
        return True

    [x0] = progressive.run_together(Predictor(denoiser, careful=False), [progressive.walk(tables, state, step)])
    tables, last = _pixels(tables, true - x0)
    for scale, before in zip(last, state.scales, strict=True):
        scales[tables.scale_symbol(scale, before)] += 1
    return replace(tables, scales=tuple(scales.tolist()), buckets=tuple(map(tuple, buckets.tolist())))


def fit_chain(denoiser: Denoiser, mse: Tensor, images: Tensor, gain: Array) -> Tables:
    """The tables for archives, whose x_t are exact draws of q; arguments as for `fit`."""
    dims, channels, schedule = images[0].numel(), images.shape[1], denoiser.schedule.to("cpu")
    chosen = plan.levels(schedule, mse, dims, None, gain, _CALL * dims)
    tables = plan.empty(schedule, mse, chosen, 8, channels)
    tables, last = _pixels(tables, _errors(denoiser, images, chosen[-1]))
    counts = np.bincount([tables.scale_symbol(scale) for scale in last], minlength=2 * len(SCALES) - 1)
    return replace(tables, scales=tuple(counts.tolist()))


def gains(denoiser: Denoiser, images: Tensor) -> Array:
    """The bits per dimension that prediction and mixture save against Gaussian errors, at each level [T].

    They are measured at the levels 1, 2, 4, ... up to T/4, and interpolated linearly in log t between these.
    """
    T = denoiser.schedule.T
    levels = [t for t in (1 << i for i in range(20)) if t <= max(1, T // 4)]
    saved = []
    for t in levels:
        errors = _errors(denoiser, images, t)
        sigma = np.sqrt((errors**2).mean((1, 2, 3), keepdims=True)) + 1e-9
        remaining = residual.remaining(residual.fit(errors / sigma), errors)
        sigma_remaining = np.sqrt((remaining**2).mean((1, 2, 3), keepdims=True)) + 1e-9
        values, sigmas = remaining.ravel(), np.broadcast_to(sigma_remaining, remaining.shape).ravel()
        spread = np.array(plan.mixture(values, sigmas))
        coded = -np.log2(spread / spread.sum() @ plan.masses(values, sigmas))
        gaussian = 0.5 * np.log2(2 * math.pi * math.e * (sigma**2 / pixels.BIN**2 + 1 / 12))
        saved.append(float(gaussian.mean() - coded.mean()))
    return np.interp(np.log(np.arange(1, T + 1)), np.log(levels), saved)


def _errors(denoiser: Denoiser, images: Tensor, t: int) -> Array:
    """The errors x_0 - x0^ for exact draws of x_t."""
    true = pixels.to_signal(images).double()
    eps = noise.normal(range(len(images)), true.shape[1:], _CHAIN, t).to(true)
    xt = q_sample(denoiser.schedule.to("cpu"), true, torch.full((len(images),), t), eps).numpy()
    errors: Array = true.numpy() - Predictor(denoiser, careful=False)(xt, t)
    return errors


def _pixels(tables: Tables, errors: Array) -> tuple[Tables, list[int]]:
    """The tables with prediction and mixture fitted to the last level's errors, and the scale of each image."""
    sigma = np.sqrt((errors**2).mean((1, 2, 3), keepdims=True)) + 1e-9
    weights = residual.fit(errors / sigma)
    remaining = residual.remaining(weights, errors)
    tables = replace(tables, weights=weights, mse=(*tables.mse[:-1], float((remaining**2).mean()) + 1e-12))
    scales = [progressive.scale_of(float(np.mean(part**2)), tables.last) for part in remaining]
    sigmas = np.sqrt([tables.last.error(scale) for scale in scales]).repeat(remaining[0].size)
    return replace(tables, spread=plan.mixture(remaining.ravel(), sigmas)), scales

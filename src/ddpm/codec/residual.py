"""The pixels given x0^ at the last level: L_0 (Eq. 13), with means that also use the pixels coded before.

The errors x_0 - x0^ of neighbouring pixels and colours are correlated. The small steps of the chain would learn this
little by little. A few numbers that are fitted on training images give most of it at once: the mean of a pixel is x0^
plus a linear prediction of its error. The prediction uses the errors of the pixels to the left and above, and of the
colours before it. So the chain can stop at a much higher level.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm import pixels

Array = NDArray[np.float64]
Frequencies = Callable[[Array, Array], NDArray[np.int64]]
"""(mean [m], sigma [m]) -> frequencies of the 256 grey levels [m, 256]."""
Symbols = Callable[[NDArray[np.int64], Any], NDArray[np.integer]]
"""(frequencies [m, 256], index) -> the pixels [m] at that index. The encoder codes them, the decoder reads them."""
_AT_ONCE = 1 << 12  # pixels whose frequencies are in memory at once
_ABOVE = ((0, -1), (-1, 0), (-1, -1), (-1, 1))
"""The known neighbours as (rows down, columns right): left, above, and both diagonals above."""


def counts(channels: int) -> list[int]:
    """The number of errors from which each channel's error is predicted.

    >>> counts(3)
    [12, 13, 14]
    """
    return [channel + channels * len(_ABOVE) for channel in range(channels)]


def _known(errors: Array, channel: int, y: NDArray[np.int64], x: NDArray[np.int64]) -> Array:
    """The errors [k, n, m] from which a channel's errors at (y, x) [m] are predicted.

    `errors` [n, C, H + 2, W + 2] has a border of one pixel. The errors of the earlier channels come first, and then the
    neighbours' errors of each channel.
    """
    down, right = np.array(_ABOVE).T[:, :, None]
    neighbours = errors[:, :, y + 1 + down, x + 1 + right]  # [n, C, neighbours, m]
    earlier_channels = errors[:, :channel, y + 1, x + 1]
    return np.concatenate([earlier_channels.swapaxes(0, 1), neighbours.reshape(len(errors), -1, len(y)).swapaxes(0, 1)])


def _predicted(weights: tuple[float, ...], known: Array) -> Array:
    """The weighted sum, one product at a time, so that IEEE 754 fixes its last bit."""
    total = np.zeros(known.shape[1:])
    for product in np.array(weights)[:, None, None] * known:
        total += product
    return total


def fit(errors: Array) -> tuple[tuple[float, ...], ...]:
    """The weights of the prediction for each channel, by least squares.

    errors are x_0 - x0^ [n, C, H, W], each image divided by its own standard deviation.

    >>> errors = np.random.default_rng(0).normal(size=(4, 1, 16, 16))
    >>> errors[:, :, :, 1:] += errors[:, :, :, :-1].copy()
    >>> round(fit(errors)[0][0], 1)  # the weight of the pixel to the left
    0.5
    """
    _, channels, height, width = errors.shape
    y, x = (a.ravel() for a in np.mgrid[:height, :width])
    padded = np.pad(errors, ((0, 0), (0, 0), (1, 1), (1, 1)))
    weights = []
    for channel in range(channels):
        known = _known(padded, channel, y, x).reshape(counts(channels)[channel], -1).T
        square = known.T @ known
        square += 1e-6 * np.trace(square) * np.eye(len(square)) + 1e-12 * np.eye(len(square))
        weights.append(tuple(np.linalg.solve(square, known.T @ errors[:, channel, y, x].ravel()).tolist()))
    return tuple(weights)


def remaining(weights: tuple[tuple[float, ...], ...], errors: Array) -> Array:
    """The errors [n, C, H, W] minus their prediction."""
    _, channels, height, width = errors.shape
    y, x = (a.ravel() for a in np.mgrid[:height, :width])
    padded = np.pad(errors, ((0, 0), (0, 0), (1, 1), (1, 1)))
    parts = [_predicted(weights[c], _known(padded, c, y, x)).reshape(-1, 1, height, width) for c in range(channels)]
    return errors - np.concatenate(parts, axis=1)


def walk(
    weights: tuple[tuple[float, ...], ...], x0: Array, sigma: Array, coded: NDArray[np.bool_],
    frequencies: Frequencies, symbols: Symbols, image: NDArray[np.uint8] | None = None, rows: slice | None = None,
) -> NDArray[np.uint8]:  # fmt: skip
    """Code or read the pixels uint8 [n, C, H, W] by `symbols`, and return them.

    x0 is x0^, sigma [n] the standard deviation of each tile's errors, and `coded` marks the pixels that are coded.
    Pixels of equal x + 2 y are coded together, in rising order of x + 2 y. So both sides already have every pixel that
    a prediction needs. With `rows` only these rows are coded, into `image`, which already holds the rows above.
    """
    centre = pixels.bins(torch.zeros((), dtype=torch.float64))[0].numpy()
    _, channels, height, width = x0.shape
    top, bottom = (rows.start, rows.stop) if rows else (0, height)
    if image is None:
        image = np.zeros(x0.shape, np.uint8)
    errors = np.zeros((len(x0), channels, height + 2, width + 2))
    above = np.s_[:, :, max(top - 1, 0) : top]
    errors[:, :, 1:-1, 1:-1][above] = np.where(coded[above], centre[image[above]] - x0[above], 0.0)
    for wave in range(2 * top, width + 2 * bottom - 2):
        y = np.arange(max(top, -(-(wave - width + 1) // 2)), min(bottom, wave // 2 + 1))
        x = wave - 2 * y
        for channel in range(channels):
            mask = coded[:, channel, y, x]
            if not mask.any():
                continue
            tile, place = np.nonzero(mask)
            predicted = _predicted(weights[channel], _known(errors, channel, y, x))[mask]
            for begin in range(0, len(tile), _AT_ONCE):
                n, p, mean = (a[begin : begin + _AT_ONCE] for a in (tile, place, predicted))
                at = (n, channel, y[p], x[p])
                symbols_at = symbols(frequencies(x0[at] + mean, sigma[n]), at)
                image[at] = symbols_at
                errors[n, channel, y[p] + 1, x[p] + 1] = centre[symbols_at] - x0[at]
    return image

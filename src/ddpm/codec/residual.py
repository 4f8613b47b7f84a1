"""The pixels given x0^ at the last level: L_0 (Eq. 13) with means that learn from the pixels before.

The chain's small steps would say little by little how the errors of neighbours and colours go together; a few numbers,
fitted on training images, say most of it: the mean of a pixel is x0^ plus a linear prediction of its error from those
of the pixels to the left and above, and of the colours before it. So the chain may stop at a much higher level.
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
"""Frequencies [m, 256] of the pixels at an index, to those pixels [m]: puts them, or gets them."""
_AT_ONCE = 1 << 12  # pixels whose frequencies are held
_ABOVE = ((0, -1), (-1, 0), (-1, -1), (-1, 1))
"""The neighbours that are known, down and right: left, above, and both diagonals above."""


def counts(channels: int) -> list[int]:
    """From how many errors each channel's is predicted.

    >>> counts(3)
    [12, 13, 14]
    """
    return [channel + channels * len(_ABOVE) for channel in range(channels)]


def _known(errors: Array, channel: int, y: NDArray[np.int64], x: NDArray[np.int64]) -> Array:
    """The errors [k, n, m] that those of a channel at (y, x) are predicted from; `errors` [n, C, ..] has a border of 1.

    First those of the channels before, then of each channel the neighbours'.
    """
    down, right = np.array(_ABOVE).T[:, :, None]
    around = errors[:, :, y + 1 + down, x + 1 + right]  # [n, C, neighbours, m]
    before = errors[:, :channel, y + 1, x + 1]
    return np.concatenate([before.swapaxes(0, 1), around.reshape(len(errors), -1, len(y)).swapaxes(0, 1)])


def _predicted(weights: tuple[float, ...], known: Array) -> Array:
    """Their sum, one product at a time, so that IEEE 754 fixes it."""
    total = np.zeros(known.shape[1:])
    for product in np.array(weights)[:, None, None] * known:
        total += product
    return total


def fit(errors: Array) -> tuple[tuple[float, ...], ...]:
    """Weights of the prediction for each channel, by least squares, from x_0 - x0^ [n, C, H, W] of one spread each.

    >>> some = np.random.default_rng(0).normal(size=(4, 1, 16, 16))
    >>> some[:, :, :, 1:] += some[:, :, :, :-1].copy()
    >>> round(fit(some)[0][0], 1)  # from the left
    0.5
    """
    _, channels, height, width = errors.shape
    y, x = (a.ravel() for a in np.mgrid[:height, :width])
    wide = np.pad(errors, ((0, 0), (0, 0), (1, 1), (1, 1)))
    found = []
    for channel in range(channels):
        known = _known(wide, channel, y, x).reshape(counts(channels)[channel], -1).T
        square = known.T @ known
        square += 1e-6 * np.trace(square) * np.eye(len(square)) + 1e-12 * np.eye(len(square))
        found.append(tuple(np.linalg.solve(square, known.T @ errors[:, channel, y, x].ravel()).tolist()))
    return tuple(found)


def left(weights: tuple[tuple[float, ...], ...], errors: Array) -> Array:
    """What is left of the errors [n, C, H, W] after the prediction."""
    _, channels, height, width = errors.shape
    y, x = (a.ravel() for a in np.mgrid[:height, :width])
    wide = np.pad(errors, ((0, 0), (0, 0), (1, 1), (1, 1)))
    parts = [_predicted(weights[c], _known(wide, c, y, x)).reshape(-1, 1, height, width) for c in range(channels)]
    return errors - np.concatenate(parts, axis=1)


def walk(
    weights: tuple[tuple[float, ...], ...], x0: Array, sigma: Array, said: NDArray[np.bool_],
    frequencies: Frequencies, symbols: Symbols, image: NDArray[np.uint8] | None = None, rows: slice | None = None,
) -> NDArray[np.uint8]:  # fmt: skip
    """The pixels uint8 [n, C, H, W], as `symbols` puts or gets them, where they are `said`; x0 is x0^, sigma [n].

    From left and top, x + 2 y at a time: so of all that a pixel is predicted from, both sides have it. With `rows` only
    these, into `image`, which has those above.
    """
    centre = pixels.bins(torch.zeros((), dtype=torch.float64))[0].numpy()
    _, channels, height, width = x0.shape
    top, bottom = (rows.start, rows.stop) if rows else (0, height)
    if image is None:
        image = np.zeros(x0.shape, np.uint8)
    errors = np.zeros((len(x0), channels, height + 2, width + 2))
    above = np.s_[:, :, max(top - 1, 0) : top]
    errors[:, :, 1:-1, 1:-1][above] = np.where(said[above], centre[image[above]] - x0[above], 0.0)
    for wave in range(2 * top, width + 2 * bottom - 2):
        y = np.arange(max(top, -(-(wave - width + 1) // 2)), min(bottom, wave // 2 + 1))
        x = wave - 2 * y
        for channel in range(channels):
            there = said[:, channel, y, x]
            if not there.any():
                continue
            tile, place = np.nonzero(there)
            predicted = _predicted(weights[channel], _known(errors, channel, y, x))[there]
            for some in range(0, len(tile), _AT_ONCE):
                n, p, mean = (a[some : some + _AT_ONCE] for a in (tile, place, predicted))
                at = (n, channel, y[p], x[p])
                found = symbols(frequencies(x0[at] + mean, sigma[n]), at)
                image[at] = found
                errors[n, channel, y[p] + 1, x[p] + 1] = centre[found] - x0[at]
    return image

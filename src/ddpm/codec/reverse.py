"""Reverse-channel coding: a draw from a Gaussian that only the encoder knows, by the index of a shared candidate.

Ordered random coding (Theis & Ahmed 2022). The candidates of a chunk are rows of one table of normals, with an order
and signs of the chunk's own: so all chunks of a group are weighed by one matrix product, which is hundreds of times
faster than drawing anew. The decoder draws the chosen rows alone.
"""

import functools

import numpy as np
from numpy.typing import NDArray

from ddpm.codec import shared
from ddpm.noise import mix

_ROWS, _SIGNS, _ORDER, _FIRST, _RACE = 101, 102, 103, 104, 105  # what a stream of shared randomness is for
_BLOCK = 1 << 22  # candidates' normals that are held at a time
_KEPT = 1 << 22  # of tables that are kept for the next group and image


def candidates(width: int, first: int, count: int) -> NDArray[np.float32]:
    """Rows first .. first + count - 1 of the table of normals of this width, float32 [count, width].

    >>> bool((candidates(20, 5, 2)[1] == candidates(20, 6, 1)[0]).all())
    True
    """
    stride = -(-width // 16)  # Philox counts in 16 draws
    rows = shared.normals(count * stride * 16, _ROWS, width, first=first * stride)
    return rows.reshape(count, -1)[:, :width]


@functools.lru_cache(maxsize=16)
def _kept(width: int, first: int, count: int) -> NDArray[np.float32]:
    return candidates(width, first, count)


def _layout(dims: int, chunks: int, keys: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Which dimension stands where, int64 [width, chunks] with -1 for none, and its sign, 0 for none."""
    width = -(-dims // chunks)
    place = np.full(width * chunks, -1)
    place[:dims] = shared.permutation(dims, _ORDER, *keys)  # chunk c has every chunks-th, so the last row may be short
    sign = shared.signs(width * chunks, _SIGNS, *keys) * (place >= 0)
    return place.reshape(width, chunks), sign.reshape(width, chunks)


def _first(chunks: int, bits: int, keys: tuple[int, ...]) -> NDArray[np.int64]:
    """The row that index 0 of each chunk means: small indices win, and should not be the same rows every time."""
    halves = shared.bits16(2 * chunks, _FIRST, *keys).astype(np.int64)
    return (halves[:chunks] << 16 | halves[chunks:]) & ((1 << bits) - 1)


def draw(indices: NDArray[np.int64], dims: int, bits: int, *keys: int) -> NDArray[np.float64]:
    """The normals z, float64 [dims], that `indices` [chunks] below 2^bits name; keys: of the image and the group.

    >>> draw(np.array([3, 0]), 5, 10, 1, 2).shape
    (5,)
    """
    place, sign = _layout(dims, len(indices), keys)
    numbers = (indices + _first(len(indices), bits, keys)) & ((1 << bits) - 1)
    rows = np.stack([candidates(len(place), int(i), 1)[0] for i in numbers], axis=1)  # [width, chunks]
    z = np.zeros(dims)
    z[place[sign != 0]] = (rows * sign)[sign != 0]
    return z


def choose(mean: NDArray[np.float64], variance: float, chunks: int, bits: int, *keys: int) -> NDArray[np.int64]:
    """Indices int64 [chunks], below 2^bits, whose `draw` is nearly N(mean, variance): mean [dims], variance in (0, 1].

    The larger 2^bits is beside 2^KL of a chunk, the nearer; an index is small where the divergence from N(0, 1) is.

    >>> mean = np.full(8, 2.0)
    >>> abs(float(draw(choose(mean, 0.5, 4, 12, 7), 8, 12, 7).mean()) - 2) < 1
    True
    """
    place, sign = _layout(len(mean), chunks, keys)
    # log w = -|z - m|^2 / (2 rho^2) + |z|^2 / 2, but for a constant: z . m / rho^2 + |z|^2 (1 - 1 / rho^2) / 2
    slope = (np.where(sign != 0, mean[place], 0.0) * sign / variance).astype(np.float32)  # [width, chunks]
    curve = np.float32((1 - 1 / variance) / 2)
    first, race = _first(chunks, bits, keys), np.random.Generator(np.random.Philox(key=mix(_RACE, *keys)))
    index = np.empty(chunks, np.int64)
    some = max(1, _BLOCK >> bits)  # chunks at a time
    for begin in range(0, chunks, some):
        part = slice(begin, begin + some)
        log_w = _weights(slope[:, part], curve, sign[-1, part] == 0, 1 << bits)
        for i, column in enumerate(log_w.T, begin):
            index[i] = _winner(np.roll(column, -first[i]), race)
    return index


def _weights(
    slope: NDArray[np.float32], curve: np.float32, short: NDArray[np.bool_], total: int
) -> NDArray[np.float32]:
    """log w of each row for each chunk, float32 [total, chunks]; `short` chunks have no last dimension."""
    width, chunks = slope.shape
    log_w = np.empty((total, chunks), np.float32)
    step = min(total, max(1, _BLOCK // width))
    for first in range(0, total, step):
        count = min(step, total - first)
        rows = (_kept if total * width <= _KEPT else candidates)(width, first, count)
        squares = rows * rows
        part = np.matmul(rows, slope, out=log_w[first : first + count])
        part += curve * squares.sum(1, keepdims=True)
        part[:, short] -= curve * squares[:, -1:]
    return log_w


def _winner(log_w: NDArray[np.float32], race: np.random.Generator) -> int:
    """argmin T_n / w_n with arrivals T_n = sum Exp(1) N / (N - i): the ordered exponentials of N runners."""
    total = len(log_w)
    waits = race.standard_exponential(total, np.float32) / np.arange(total, 0, -1, np.float32)
    arrivals = np.log(np.cumsum(waits, out=waits), out=waits)
    return int((arrivals - log_w).argmin())

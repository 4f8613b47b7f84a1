"""Reverse-channel coding: a draw from a Gaussian that only the encoder knows, by the index of a shared candidate.

Ordered random coding (Theis & Ahmed 2022). There is one table of normals, 2^bits rows of 64; a candidate is a row of it
for every 64 of a chunk's dimensions, each block of them counting from another row, with an order and signs of the
chunk's own. So one small table serves all, and all chunks of a group are weighed by one matrix product, where drawing
anew would take most of the time. The decoder draws the chosen rows alone.
"""

import functools

import numpy as np
from numpy.typing import NDArray

from ddpm.codec import shared
from ddpm.noise import mix

_ROWS, _SIGNS, _ORDER, _FIRST, _RACE = 101, 102, 103, 104, 105  # what a stream of shared randomness is for
WIDTH = 64
"""Dimensions of a row."""
_HELD = 1 << 24  # weights that are held at a time


def _row(number: int) -> NDArray[np.float32]:
    return shared.normals(WIDTH, _ROWS, first=number * (WIDTH // 16))  # Philox counts in 16 draws


@functools.lru_cache(maxsize=2)
def _table(bits: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """All rows as columns, float32 [64, 2^bits], and the sums of squares of their first 0 .. 64, [65, 2^bits]."""
    rows = shared.normals(WIDTH << bits, _ROWS).reshape(-1, WIDTH).T
    squares = np.zeros((WIDTH + 1, 1 << bits), np.float32)
    np.cumsum(rows * rows, axis=0, out=squares[1:])
    return np.ascontiguousarray(rows), squares


def _layout(dims: int, chunks: int, keys: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Which dimension stands where in each chunk, int64 [chunks, blocks, 64], and its sign; 0 where there is none."""
    width = -(-dims // chunks)
    blocks = -(-width // WIDTH)
    place = np.full((chunks, blocks * WIDTH), -1)
    # chunk c has every chunks-th, so some have one less
    place[:, :width] = (
        np.append(shared.permutation(dims, _ORDER, *keys), [-1] * (width * chunks - dims)).reshape(width, chunks).T
    )
    sign = shared.signs(place.size, _SIGNS, *keys).reshape(place.shape) * (place >= 0)
    return place.reshape(chunks, blocks, WIDTH), sign.reshape(chunks, blocks, WIDTH)


def _first(shape: tuple[int, ...], bits: int, keys: tuple[int, ...]) -> NDArray[np.int64]:
    """The row that index 0 means, for every block: small indices win, and should not be the same rows every time."""
    halves = shared.bits16(2 * int(np.prod(shape)), _FIRST, *keys).astype(np.int64).reshape(2, *shape)
    first: NDArray[np.int64] = (halves[0] << 16 | halves[1]) & ((1 << bits) - 1)
    return first


def draw(indices: NDArray[np.int64], dims: int, bits: int, *keys: int) -> NDArray[np.float64]:
    """The normals z, float64 [dims], that `indices` [chunks] below 2^bits name; keys: of the image and the group.

    >>> draw(np.array([3, 0]), 5, 10, 1, 2).shape
    (5,)
    """
    place, sign = _layout(dims, len(indices), keys)
    numbers = (indices[:, None] + _first(place.shape[:2], bits, keys)) & ((1 << bits) - 1)
    rows = np.stack([_row(int(number)) for number in numbers.ravel()]).reshape(place.shape)
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
    first = _first(place.shape[:2], bits, keys)
    # log w = -|z - m|^2 / (2 rho^2) + |z|^2 / 2, but for a constant: z . m / rho^2 + |z|^2 (1 - 1 / rho^2) / 2
    slope = (np.where(sign != 0, mean[place], 0.0) * sign / variance).astype(np.float32)
    curve = np.float32((1 - 1 / variance) / 2)
    rows, squares = _table(bits)
    race = np.random.Generator(np.random.Philox(key=mix(_RACE, *keys)))
    index = np.empty(chunks, np.int64)
    some = max(1, _HELD // (place.shape[1] << bits))  # chunks at a time
    for begin in range(0, chunks, some):
        part = slope[begin : begin + some]
        products = (part.reshape(-1, WIDTH) @ rows).reshape(*part.shape[:2], -1)  # [some, blocks, 2^bits]
        for i, blocks in enumerate(products, begin):
            log_w = np.zeros(1 << bits, np.float32)
            for block, there, start in zip(blocks, sign[i], first[i], strict=True):
                block += curve * squares[np.count_nonzero(there)]
                log_w[: len(log_w) - start] += block[start:]
                log_w[len(log_w) - start :] += block[:start]
            index[i] = _winner(log_w, race)
    return index


def _winner(log_w: NDArray[np.float32], race: np.random.Generator) -> int:
    """argmin T_n / w_n with arrivals T_n = sum Exp(1) N / (N - i): the ordered exponentials of N runners."""
    total = len(log_w)
    waits = race.standard_exponential(total, np.float32) / np.arange(total, 0, -1).astype(np.float32)
    arrivals = np.log(np.cumsum(waits, out=waits), out=waits)
    return int((arrivals - log_w).argmin())

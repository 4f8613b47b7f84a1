"""Reverse-channel coding: send a draw from a Gaussian q that only the encoder knows, as a shared candidate's index.

Both sides have the same N candidates from p. The encoder takes one of them with probability in proportion to
w = q / p, and sends its index. There are two ways to choose:

* Ordered random coding (`winner`) favours small indices, which cost about KL + log2(KL + 1) bits.
* Minimal random coding (Havasi et al. 2019, which the paper names) costs log2 N bits, a few more than the divergence.
  But the choice itself can carry data: `Picker` selects the candidate with bits of data still to be sent (bits-back
  coding). Someone who later knows q can compute these bits from the choice (`message_of`).

All draws use one table of normals: 2^bits rows of 64. A candidate takes one row for each 64 dimensions of a chunk.
Every block of 64 starts at another row, and every chunk has an order and signs of its own. So a few matrix products
weigh all chunks of a group, and a decoder, which weighs nothing, computes the chosen rows alone. Weights are whole
numbers in float64, which holds them exactly, so they are the same on every machine.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby, islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm.codec import shared
from ddpm.codec.entropy import BITS, Damaged, frequencies
from ddpm.noise import mix

# Keys of streams of shared random numbers.
_ROWS, _SIGNS, _ORDER, _FIRST, _RACE, _COINS = 101, 102, 103, 104, 105, 106
WIDTH = 64
"""Dimensions per row."""
_HELD = 1 << 21  # weights in memory at once
_LOG2_E = 1.4426950408889634
_UNIT = 4096  # a normal is a multiple of 1 / _UNIT
_SLOPE = 1024  # its factor is a multiple of 1 / _SLOPE
_STEPS = 256  # log2 w is looked up in steps of 1 / _STEPS
_LEAST = 20  # candidates below 2^-20 of the largest weight are never taken
_POWERS = "5d599a99"  # the first digits of the SHA-256 of `_powers`

Integers = NDArray[np.int64]


@functools.cache
def _powers() -> Integers:
    """2^(20 - i / 256) for i = 0 .. 255, rounded."""
    table = np.array([round(2.0 ** (_LEAST - i / _STEPS)) for i in range(_STEPS)], "<i8")
    return shared.verified("powers of two", table, _POWERS)


@functools.lru_cache(maxsize=32)
def _table(bits: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The rows as columns [64, 2^bits], times 4096, and the sums of squares of their first 0 .. 64 [65, 2^bits]."""
    rows = shared.normals(WIDTH << bits, _ROWS).reshape(-1, WIDTH).T.astype(np.float64) * _UNIT
    squares = np.zeros((WIDTH + 1, 1 << bits))
    np.cumsum(rows * rows, axis=0, out=squares[1:])
    return np.ascontiguousarray(rows), np.floor(squares / _UNIT)


def _layout(dims: int, chunks: int, keys: tuple[int, ...]) -> tuple[Integers, NDArray[np.float32]]:
    """The dimension at each place of each chunk, int64 [chunks, blocks, 64], and its sign; 0 marks no dimension."""
    width = -(-dims // chunks)
    blocks = -(-width // WIDTH)
    place = np.full((chunks, blocks * WIDTH), -1)
    # Chunk c takes every chunks-th dimension, so some chunks have one fewer.
    dealt = np.append(shared.permutation(dims, _ORDER, *keys), [-1] * (width * chunks - dims))
    place[:, :width] = dealt.reshape(width, chunks).T
    sign = shared.signs(place.size, _SIGNS, *keys).reshape(place.shape) * (place >= 0)
    return place.reshape(chunks, blocks, WIDTH), sign.reshape(chunks, blocks, WIDTH)


def _first(shape: tuple[int, ...], bits: int, keys: tuple[int, ...]) -> Integers:
    """The row of index 0 for every block, so that equal indices do not mean equal rows every time."""
    halves = shared.bits16(2 * int(np.prod(shape)), _FIRST, *keys).astype(np.int64).reshape(2, *shape)
    first: Integers = (halves[0] << 16 | halves[1]) & ((1 << bits) - 1)
    return first


def draw(indices: Integers, dims: int, bits: int, *keys: int) -> NDArray[np.float64]:
    """The normals z, float64 [dims], of the candidates `indices` [chunks], each below 2^bits.

    keys name the image and the group.

    >>> draw(np.array([3, 0]), 5, 10, 1, 2).shape
    (5,)
    """
    place, sign = _layout(dims, len(indices), keys)
    numbers = (indices[:, None] + _first(place.shape[:2], bits, keys)) & ((1 << bits) - 1)
    rows = shared.quantiles()[shared.rows16(WIDTH, numbers.ravel(), _ROWS)].reshape(place.shape)
    z = np.zeros(dims)
    z[place[sign != 0]] = (rows * sign)[sign != 0]
    return z


class Race(NamedTuple):
    """The candidates of a chunk that can be taken, in rising order, and their frequencies, which sum to 2^24."""

    candidates: Integers
    frequency: Integers

    def slot(self, index: int) -> tuple[int, int]:
        """The frequency of a candidate, and the sum of those before it. Raises Damaged if it cannot be taken."""
        i = int(np.searchsorted(self.candidates, index))
        if i == len(self.candidates) or self.candidates[i] != index:
            raise Damaged("payload: a candidate that no encoder takes; want the file as it was written")
        return int(self.frequency[i]), int(self.frequency[:i].sum())


class Draw(NamedTuple):
    """A draw to be sent: N(mean, variance), mean [dims], variance in (0, 1], in `chunks` chunks.

    bits  log2 of the number of candidates of each chunk
    keys  as in `draw`
    """

    mean: NDArray[np.float64]
    variance: float
    chunks: int
    bits: int
    keys: tuple[int, ...]


def races(draws: Iterable[Draw]) -> Iterator[Race]:
    """The race of each chunk of each draw. Successive draws with the same bits are weighed together, which is faster.

    A candidate that is taken by its frequency is a draw from N(mean, variance) in the limit of many candidates; 2^bits
    must be large beside 2^KL of a chunk.

    >>> picker = Picker(b"", 7)
    >>> taken = [picker.pick(race) for race in races([Draw(np.full(64, 2.0), 0.5, 16, 14, (7,))])]
    >>> abs(float(draw(np.array(taken), 64, 14, 7).mean()) - 2) < 0.4
    True
    """
    for bits, same_bits in groupby(draws, lambda each: each.bits):
        for log_w in _log_weights(chain.from_iterable(map(_blocks, same_bits)), bits):
            below = (log_w.max() - log_w) / (_UNIT * _SLOPE // _STEPS)
            candidates = np.flatnonzero(below < _LEAST * _STEPS)
            steps = below[candidates].astype(np.int64)
            yield Race(candidates, frequencies(_powers()[steps % _STEPS] >> steps // _STEPS))


class _Block(NamedTuple):
    """64 dimensions of a chunk with log2 w = slope . z + curve |z|^2; slope [64] and curve are whole numbers."""

    slope: NDArray[np.float64]
    curve: float
    dims: int  # how many of the 64 are dimensions
    first: int  # the row of index 0
    last: bool  # whether it is the chunk's last block


def _blocks(draw: Draw) -> Iterator[_Block]:
    place, sign = _layout(len(draw.mean), draw.chunks, draw.keys)
    first = _first(place.shape[:2], draw.bits, draw.keys)
    # Up to a constant, log w = -|z - m|^2 / (2 rho^2) + |z|^2 / 2 = z . m / rho^2 + |z|^2 (1 - 1 / rho^2) / 2.
    limit = float(1 << 15)
    slope = np.where(sign != 0, draw.mean[place], 0.0) * sign / draw.variance * (_LOG2_E * _SLOPE)
    slope = np.rint(slope.clip(-limit, limit))
    curve = max(float(np.rint((1 - 1 / draw.variance) / 2 * (_LOG2_E * _SLOPE))), -limit * 32)
    dims = np.count_nonzero(sign, axis=2)
    for chunk in range(draw.chunks):
        for block in range(last := place.shape[1]):
            at = chunk, block
            yield _Block(slope[at], curve, int(dims[at]), int(first[at]), block == last - 1)


def _log_weights(blocks: Iterator[_Block], bits: int) -> Iterator[NDArray[np.float64]]:
    """log2 w of all candidates of each chunk, [2^bits], whole numbers, up to a constant of the chunk."""
    rows, squares = _table(bits)
    log_w, curved = np.zeros(1 << bits), np.empty(1 << bits)
    at_once = max(1, _HELD >> bits)  # blocks at a time; the table is long, so few
    buffer = None
    while part := list(islice(blocks, at_once)):
        if buffer is None:  # allocated once: new memory costs as much as the product
            buffer = torch.empty((len(part), 1 << bits), dtype=torch.float64)
        slopes = torch.from_numpy(np.stack([block.slope for block in part]))
        # torch multiplies: NumPy's waiting threads would spin and slow the network, which runs between products.
        products = torch.mm(slopes, torch.from_numpy(rows), out=buffer[: len(part)]).numpy()
        for product, block in zip(products, part, strict=True):
            product += np.multiply(squares[block.dims], block.curve, out=curved)
            log_w[: len(log_w) - block.first] += product[block.first :]
            log_w[len(log_w) - block.first :] += product[: block.first]
            if block.last:
                yield log_w
                log_w = np.zeros(1 << bits)


def winner(race: Race, bits: int, *keys: int) -> int:
    """A candidate of 2^bits, taken by its frequency, with small indices favoured: ordered random coding.

    It is argmin T_n / w_n with the arrivals T_n = sum Exp(1) N / (N - i), the ordered exponentials of N runners
    (Theis & Ahmed 2022).
    """
    total = 1 << bits
    runners = np.random.Generator(np.random.Philox(key=mix(_RACE, *keys)))
    arrivals = np.cumsum(runners.standard_exponential(total) / np.arange(total, 0, -1))[race.candidates]
    return int(race.candidates[(arrivals / race.frequency).argmin()])


# -- choices that carry a message --------------------------------------------------------------------------------------

_PAGE = 512  # random bytes per page
_LOW = 1 << 32  # the state of a Picker lies in 2^32 .. 2^40 - 1
STATE = 40
"""Bits of a picker's state."""


class Picker:
    """Selects candidates with the bits of a message (bits-back coding), and after its end with shared random bits.

    It is the decoder of a range asymmetric numeral system (rANS) that reads a byte at a time.

    >>> race = Race(np.arange(4), frequencies([1, 2, 3, 4]))
    >>> picker = Picker(b"whatever", 5)
    >>> taken = [picker.pick(race) for _ in range(40)]
    >>> message_of(picker.state, [race.slot(index) for index in taken], 5)[:8]
    b'whatever'
    """

    def __init__(self, message: bytes, *keys: int) -> None:
        self._message, self._keys, self._next = message, keys, 4
        self.state = _LOW | int.from_bytes(_whitened(message, 0, 4, keys), "big")

    def pick(self, race: Race) -> int:
        """Select one of the candidates by the next bits."""
        slot = self.state & (1 << BITS) - 1
        ends = np.cumsum(race.frequency)
        i = int(np.searchsorted(ends, slot, "right"))
        chance = int(race.frequency[i])
        self.state = chance * (self.state >> BITS) + slot - int(ends[i]) + chance
        while self.state < _LOW:
            [byte] = _whitened(self._message, self._next, 1, self._keys)
            self.state, self._next = self.state << 8 | byte, self._next + 1
        return int(race.candidates[i])

    @property
    def used(self) -> bytes:
        """The part of the message that the choices so far have used."""
        return self._message[: self._next]


def _whitened(message: bytes, begin: int, count: int, keys: tuple[int, ...]) -> bytes:
    """Bytes of the message, followed by zeros, XORed with random bytes: plain pixels would not choose at random."""
    part = message[begin : begin + count].ljust(count, b"\0")
    return bytes(byte ^ _page(at // _PAGE, keys)[at % _PAGE] for at, byte in enumerate(part, begin))


@functools.lru_cache(maxsize=64)
def _page(number: int, keys: tuple[int, ...]) -> bytes:
    return shared.bits16(_PAGE // 2, _COINS, *keys, number).astype("<u2").tobytes()


def message_of(state: int, slots: Sequence[tuple[int, int]], *keys: int) -> bytes:
    """The used part of a `Picker`'s message, and what followed it, from its last state and the slots it selected.

    Raises Damaged if no picker selects these and ends in this state.
    """
    out = bytearray()
    for chance, start in reversed(slots):
        while state >= chance << 16:
            out.append(state & 255)
            state >>= 8
        state = (state // chance << BITS) + state % chance + start
    if state >> 32 != 1:
        raise Damaged("payload: picks that no encoder makes; want the file as it was written")
    out += (state - _LOW).to_bytes(4, "little")
    return _whitened(bytes(reversed(out)), 0, len(out), keys)

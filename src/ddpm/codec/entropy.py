"""Symbols to bytes and back: a range coder over integer frequencies.

A range coder writes a symbol of probability p in about -log2 p bits. It is first in, first out: the first bytes of a
message decode to its first symbols. The coder itself is constriction's. Every distribution is a table of positive
integers that sum to 2^24, so the bytes do not depend on how a machine rounds floats.
"""

import functools
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeAlias, TypeVar

import constriction
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ddpm.codec.shared import verified
from ddpm.errors import InputError

T = TypeVar("T")
model: Any = constriction.stream.model
queue: Any = constriction.stream.queue

BITS = 24
"""Frequencies sum to 2^24, which is the resolution of a probability."""
_WORD = 4  # bytes of a word, which constriction writes at a time
_PHI = "ccce9177"  # the first digits of the SHA-256 of the table of Phi
_STEPS = 256  # entries of the table of Phi per standard deviation
_REACH = 8  # standard deviations, beyond which Phi is taken as 0 or 1


class Damaged(InputError):
    """The bytes were not written by an encoder, or were changed since."""


def frequencies(weights: ArrayLike) -> NDArray[np.int64]:
    """Frequencies [..., n]: integers of at least 1 that sum to 2^24, in proportion to non-negative integer weights.

    >>> frequencies([3, 1, 0]).tolist()
    [12582910, 4194305, 1]
    """
    weights = np.asarray(weights, np.int64)
    edges = np.zeros((*weights.shape[:-1], weights.shape[-1] + 1), np.int64)
    edges[..., 1:] = weights.cumsum(-1)
    if not (weights >= 0).all() or not (0 < edges[..., -1]).all() or edges.max() > 1 << 38:
        raise ValueError("weights: want non-negative integers that sum to 1 .. 2^38")
    n, total = weights.shape[-1], edges[..., -1:]
    if total.size and (total == total.flat[0]).all():
        total = total.flat[0]  # one divisor is several times as fast as many
    scaled = edges * ((1 << BITS) - n) // total
    result: NDArray[np.int64] = np.diff(scaled) + 1
    return result


def categorical(frequency: NDArray[np.int64]) -> Any:
    """constriction's distribution with exactly these frequencies.

    constriction gives each of n symbols 1, and shares the rest of 2^24 in proportion to what it is given.
    """
    return model.Categorical((frequency - 1).astype(np.float64), perfect=False)


class Encoder:
    """Symbols in, bytes out. `Decoder` takes the same calls in the same order.

    >>> encoder = Encoder()
    >>> encoder.put(2, frequencies([1, 1, 6]))
    >>> encoder.put_bits(300, 9)
    >>> decoder = Decoder(encoder.finish())
    >>> decoder.get(frequencies([1, 1, 6])), decoder.get_bits(9)
    (2, 300)
    """

    def __init__(self) -> None:
        self._coder = queue.RangeEncoder()
        self.bits = 0.0
        """The cost of the symbols so far, -log2 of their probabilities."""

    def put(self, symbol: int, frequency: NDArray[np.int64]) -> None:
        """Code a symbol 0 .. n - 1 that has frequencies [n]."""
        self._coder.encode(int(symbol), categorical(frequency))
        self.bits += BITS - math.log2(frequency[symbol])

    def put_bits(self, value: int, bits: int) -> None:
        """Code a number 0 .. 2^bits - 1, all equally likely; bits is 0 to 23."""
        if bits:
            self._coder.encode(int(value), model.Uniform(1 << bits))
        self.bits += bits

    def put_each(self, symbols: NDArray[np.integer], frequency: NDArray[np.int64]) -> None:
        """Code symbols [m], each with its own frequencies [m, n]."""
        if len(symbols):
            self._coder.encode(
                np.ascontiguousarray(symbols, np.int32), model.Categorical(perfect=False), (frequency - 1.0)
            )
        chosen = np.take_along_axis(frequency, np.asarray(symbols, np.int64)[:, None], 1)
        self.bits += float((BITS - np.log2(chosen)).sum())

    def finish(self) -> bytes:
        """The shortest bytes that decode to the symbols if zeros follow; at most 7 bytes shorter than the cost."""
        words, (lower, extent) = self._coder.pos()  # integers
        size = _WORD * (int(words) + 2)  # the words that are written, and the two words of the state
        message = self._coder.get_compressed().astype(">u4").tobytes()  # one number that decodes to the symbols
        number = int.from_bytes(message.ljust(size, b"\0")[:size], "big")
        written = number >> 64
        low = (written << 64) + int(lower)
        if low > number:  # the coder has yet to carry
            low -= 1 << 64
        for length in range(max(0, int(self.bits / 8) - 7), size + 1):
            unit = 8 * (size - length)
            shortest = -(-low >> unit)
            if shortest << unit < low + extent:
                return shortest.to_bytes(length, "big")
        raise AssertionError("no number within the coder's interval")


class Decoder:
    """Bytes in, symbols out. After the last byte it reads `fill`, 0 or 255, without end.

    Raises Damaged for bytes that no encoder writes, and if the symbols cost 64 bits more than the bytes have. So a
    short file cannot cause much work.
    """

    def __init__(self, data: bytes, fill: int = 0) -> None:
        padded = data + bytes([fill]) * (64 + -len(data) % _WORD)
        self._coder = queue.RangeDecoder(np.frombuffer(padded, ">u4").astype(np.uint32))
        self._left = 8.0 * len(data) + 64

    def get(self, frequency: NDArray[np.int64]) -> int:
        symbol = int(self._decoded(categorical(frequency)))
        self._spend(BITS - math.log2(frequency[symbol]))
        return symbol

    def get_bits(self, bits: int) -> int:
        self._spend(bits)
        return int(self._decoded(model.Uniform(1 << bits))) if bits else 0

    def get_each(self, frequency: NDArray[np.int64]) -> NDArray[np.int32]:
        if not len(frequency):
            return np.zeros(0, np.int32)
        symbols = np.array(self._decoded(model.Categorical(perfect=False), frequency - 1.0))
        self._spend(float((BITS - np.log2(np.take_along_axis(frequency, symbols[:, None].astype(np.int64), 1))).sum()))
        return symbols

    def _spend(self, bits: float) -> None:
        self._left -= bits
        if self._left < 0:
            raise Damaged("payload: holds more symbols than its bytes allow; want the file as it was written")

    def _decoded(self, *distribution: Any) -> Any:
        try:
            return self._coder.decode(*distribution)
        except AssertionError as error:  # constriction raises it for a number beyond every symbol
            raise Damaged("payload: no encoder writes such bytes; want the file as it was written") from error


class EndOfPrefix(Exception):
    """The next symbol depends on bytes that are missing."""


class PrefixDecoder:
    """`Decoder` for the first bytes of a message. It gives the symbols that these bytes determine, and then raises
    EndOfPrefix.

    Two decoders read zeros and ones after the last byte. A symbol on which both agree is determined.

    >>> encoder, flat = Encoder(), frequencies([1, 1, 1, 1])
    >>> for symbol in (3, 0, 2, 2, 1, 3, 0, 1):
    ...     encoder.put(symbol, flat)
    >>> PrefixDecoder(encoder.finish()[:1]).get_each(np.stack([flat] * 8)).tolist()
    [3, 0, 2]
    """

    def __init__(self, data: bytes) -> None:
        self._decoders = Decoder(data, 0), Decoder(data, 255)

    def get(self, frequency: NDArray[np.int64]) -> int:
        return self._same(lambda decoder: decoder.get(frequency))

    def get_bits(self, bits: int) -> int:
        return self._same(lambda decoder: decoder.get_bits(bits))

    def get_each(self, frequency: NDArray[np.int64]) -> NDArray[np.int32]:
        """The symbols [m], or only those before the first one that is not determined."""
        symbols: list[int] = []
        with suppress(EndOfPrefix):  # one by one, so that an undetermined symbol does not lose those before it
            for row in frequency:
                symbols.append(self.get(row))
        return np.array(symbols, np.int32)

    def _same(self, get: Callable[[Decoder], int]) -> int:
        low, high = self._both(get)
        if low != high:
            raise EndOfPrefix
        return low

    def _both(self, get: Callable[[Decoder], T]) -> tuple[T, T]:
        try:
            low, high = map(get, self._decoders)
        except Damaged as error:  # the bytes after the last one are made up, so they may be invalid
            raise EndOfPrefix from error
        return low, high


Source: TypeAlias = Decoder | PrefixDecoder


@functools.cache
def _phi() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """2^32 Phi(i / 256 - 8) for i = 0 .. 4096, rounded, and the differences of neighbours.

    The table never falls and ends at 2^32.
    """
    half = [round(math.erfc(i / _STEPS / math.sqrt(2)) * (1 << 31)) for i in range(_STEPS * _REACH, -1, -1)]
    table = np.array([*half, *((1 << 32) - v for v in reversed(half[:-1]))], "<i8")
    table[0], table[-1] = 0, 1 << 32
    return verified("normal distribution function", table, _PHI), np.diff(table)


def cdf(z: NDArray[np.float64]) -> NDArray[np.int64]:
    """2^32 Phi(z) as integers, by linear interpolation in a table.

    It uses only float64 operations whose result IEEE 754 fixes to the bit.

    >>> cdf(np.array([-np.inf, 0.0, 1.0, np.inf])) / 2**32
    array([0.        , 0.5       , 0.84134475, 1.        ])
    """
    place = np.minimum(np.maximum(z, -_REACH), _REACH) * _STEPS + _STEPS * _REACH
    i = np.minimum(place, 2 * _STEPS * _REACH - 1).astype(np.int64)
    table, rises = _phi()
    result: NDArray[np.int64] = table[i] + (rises[i] * (place - i)).astype(np.int64)
    return result

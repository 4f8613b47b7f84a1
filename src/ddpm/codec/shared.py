"""Random numbers that the encoder and the decoder share. They are functions of integers, the same on every platform.

Philox, a counter-based generator, gives 16 bits at a time. A table of 65,536 quantiles turns each into a normal draw.
Libraries' own normal draws are not used, because they may change between releases and devices.
"""

import functools
import hashlib
from statistics import NormalDist
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ddpm.noise import mix

Integer = TypeVar("Integer", bound=np.integer)
_QUANTILES = "1ea009ce"  # the first digits of the table's SHA-256


def verified(what: str, table: NDArray[Integer], digest: str) -> NDArray[Integer]:
    """The table. Raises RuntimeError unless its SHA-256 begins with `digest`, so every platform has the same one."""
    found = hashlib.sha256(table.tobytes()).hexdigest()[: len(digest)]
    if found != digest:
        raise RuntimeError(f"{what} of {found} instead of {digest}: this platform rounds differently")
    return table


@functools.cache
def quantiles() -> NDArray[np.float32]:
    """The 65,536 standard normal quantiles of (i + 1/2) / 2^16, rising, float32.

    Each is rounded to a multiple of 2^-12, so it does not depend on the last bit of a platform's logarithm.

    >>> table = quantiles()
    >>> len(table), float(table[0]), float(table[32768]), bool((table == -table[::-1]).all())
    (65536, -4.324951171875, 0.0, True)
    """
    upper = [round(NormalDist().inv_cdf((i + 0.5) / 65536) * 4096) for i in range(32768, 65536)]
    table = np.array([-value for value in reversed(upper)] + upper, dtype="<i2")
    return verified("normal quantiles", table, _QUANTILES).astype(np.float32) / np.float32(4096)


def bits16(count: int, *keys: int, first: int = 0) -> NDArray[np.uint16]:
    """`count` draws of 16 bits, uint16, from the stream that `keys` names. They start at draw 16 `first`.

    >>> bool((bits16(40, 1, 2)[16:] == bits16(24, 1, 2, first=1)).all())
    True
    """
    philox = np.random.Philox(key=mix(*keys), counter=first)
    raw: NDArray[np.uint16] = philox.random_raw(-(-count // 4)).astype("<u8").view("<u2")
    return raw[:count]


def rows16(width: int, numbers: NDArray[np.int64], *keys: int) -> NDArray[np.uint16]:
    """Rows [m, width] of the same stream, by their numbers [m]. `width` is a multiple of 16.

    >>> bool((rows16(16, np.array([2, 0]), 1)[0] == bits16(16, 1, first=2)).all())
    True
    """
    philox, each, place = np.random.Philox(key=mix(*keys)), width // 16, 0
    rows = np.empty((len(numbers), width // 4), "<u8")
    for row, number in zip(rows, numbers.tolist(), strict=True):
        philox.advance((number * each - place) % (1 << 256))  # a new generator for each row takes several times as long
        row[:] = philox.random_raw(width // 4)
        place = (number + 1) * each
    return rows.view("<u2")


def normals(count: int, *keys: int, first: int = 0) -> NDArray[np.float32]:
    """`count` standard normal draws, float32, from the stream that `keys` names; `first` as in `bits16`.

    >>> z = normals(100_000, 7)
    >>> abs(float(z.mean())) < 0.01, abs(float(z.std()) - 1) < 0.01
    (True, True)
    """
    return quantiles()[bits16(count, *keys, first=first)]


def permutation(count: int, *keys: int) -> NDArray[np.int64]:
    """0 .. count - 1 in a random order that `keys` names.

    >>> sorted(permutation(5, 3)) == [0, 1, 2, 3, 4]
    True
    """
    philox = np.random.Philox(key=mix(*keys))
    return np.argsort(philox.random_raw(count), kind="stable")


def signs(count: int, *keys: int) -> NDArray[np.float32]:
    """`count` random signs, 1 or -1, float32, that `keys` names.

    >>> set(signs(100, 3).tolist()) == {1.0, -1.0}
    True
    """
    return (bits16(count, *keys) & 1).astype(np.float32) * 2 - 1

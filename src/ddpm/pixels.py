"""Pixels are numbers in a range low..high; the signal is float in [-1, 1] (Section 3.3). Only this module knows both.

Images of 8 bits are the default. `Values` describes others: 16 bits, a part of a range, and floating point.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from ddpm import float64
from ddpm.catalog import PixelType
from ddpm.errors import InputError, finite_number

_TYPES = {"uint8": torch.uint8, "uint16": torch.uint16, "float32": torch.float32}
_LIMITS = {"uint8": 255, "uint16": 65535}


@dataclass(frozen=True)
class Values:
    """What the numbers of an image are.

    dtype  uint8, uint16 or float32
    low    the number that becomes -1 of the signal
    high   the number that becomes 1

    Raises InputError for a range that is empty, or that the dtype does not have.

    >>> Values("uint8", 0, 255).bins, Values("uint16", 0, 4095).bins, Values("float32", -1, 1).bins
    (256, 4096, None)
    """

    dtype: PixelType
    low: float
    high: float

    def __post_init__(self) -> None:
        if self.dtype not in get_args(PixelType):
            raise InputError(f"pixel_type {self.dtype!r}: want {', '.join(get_args(PixelType))}")
        low, high = finite_number("value_range", self.low), finite_number("value_range", self.high)
        if low >= high:
            raise InputError(f"value_range {low:g},{high:g}: want LOW,HIGH with LOW below HIGH")
        limit = _LIMITS.get(self.dtype)
        if limit is not None and not (0 <= low and high <= limit and low.is_integer() and high.is_integer()):
            raise InputError(f"value_range {low:g},{high:g}: want whole numbers in 0..{limit} for {self.dtype}")
        largest = max(abs(low), abs(high))
        if limit is None and not (largest < 3e38 and high - low > 1e-6 * largest):
            raise InputError(f"value_range {low:g},{high:g}: float32 cannot tell these numbers apart well enough")

    @property
    def torch(self) -> torch.dtype:
        """The dtype of pixels as a tensor."""
        return _TYPES[self.dtype]

    @property
    def bins(self) -> int | None:
        """The number of different pixel values, one bin each; None for floating point."""
        return None if self.dtype == "float32" else int(self.high - self.low) + 1

    @property
    def bin(self) -> float:
        """The width of a bin in signal units. A signal distance divided by it is in pixel values.

        Raises InputError for floating point, which has no bins.

        >>> Values("uint16", 0, 65535).bin == 2 / 65535
        True
        """
        if self.bins is None:
            raise InputError(
                "pixel_type float32: has no bins (Eq. 13), so there are no bits per dimension; want uint8 or uint16, "
                "or `ddpm evaluate --metrics ode`, which gives a density"
            )
        return 2 / (self.bins - 1)

    def __str__(self) -> str:
        return f"{self.dtype} {self.low:.6g}..{self.high:.6g}"


EIGHT_BIT = Values("uint8", 0, 255)
"""The paper's pixels, 0..255."""
BIN = EIGHT_BIT.bin
"""The width of one of 256 grey levels in signal units."""


def values(dtype: PixelType, value_range: Sequence[float] = ()) -> Values:
    """`Values` of a dtype, with its whole range if `value_range` is empty; floats have -1..1 until data tell more.

    >>> values("uint16"), values("float32", (0, 0.5)).high
    (Values(dtype='uint16', low=0, high=65535), 0.5)
    """
    if not value_range:
        return Values(dtype, -1, 1) if dtype == "float32" else Values(dtype, 0, _LIMITS.get(dtype, 0))
    if len(value_range) != 2:
        raise InputError(f"value_range {','.join(f'{x:g}' for x in value_range)}: want two numbers, LOW,HIGH")
    return Values(dtype, *value_range)


def to_signal(pixels: Tensor, values: Values = EIGHT_BIT) -> Tensor:
    """Convert pixels of any shape to the signal, float32: low gives -1 and high gives 1.

    Raises TypeError unless the pixels have the dtype of `values`.

    >>> to_signal(torch.tensor([0, 255], dtype=torch.uint8))
    tensor([-1.,  1.])
    """
    if pixels.dtype != values.torch:
        raise TypeError(f"pixels are {values.dtype}, got {str(pixels.dtype).removeprefix('torch.')}")
    half = (values.high - values.low) / 2
    if values.dtype == "float32":  # in float64, because a range far from 0 would lose digits; mps has none
        return ((float64.convert(pixels) - values.low) / half - 1).float().to(pixels.device)
    return (pixels.float() - values.low) / half - 1


def to_pixels(signal: Tensor, values: Values = EIGHT_BIT) -> Tensor:
    """Convert the signal, float of any shape, to the nearest pixels; a signal outside [-1, 1] gives low or high.

    The result is on the signal's device. A device without float64 (mps) cannot round exactly, so there it is on the
    CPU.

    >>> to_pixels(torch.tensor([-1.5, -1.0, 0.0, 1.0]))
    tensor([  0,   0, 128, 255], dtype=torch.uint8)
    >>> to_pixels(torch.tensor([-1.0, 0.25]), Values("float32", 10, 18))
    tensor([10., 15.])
    """
    half, exact = (values.high - values.low) / 2, float64.convert(signal)
    if values.bins is None:
        return ((exact.clamp(-1, 1) + 1) * half + values.low).to(values.torch)
    levels = ((exact + 1) * half + 0.5).floor().clamp(0, values.bins - 1)
    return (levels + values.low).to(values.torch)


def on_grid(x0: Tensor, values: Values = EIGHT_BIT) -> Tensor:
    """Return the signal x0, of any shape, as float64 after a check that every value is that of a pixel.

    Raises InputError if a value lies between pixel values, for floating point pixels, and if x0's device has no float64
    (mps), which likelihoods need.

    >>> on_grid(to_signal(torch.tensor([3], dtype=torch.uint8))).dtype
    torch.float64
    """
    exact, width = float64.require(x0), values.bin
    distance = float((exact - to_signal(to_pixels(exact, values), values)).abs().max()) / width
    if not distance < max(1e-3, 2**-22 / width):  # float32 signals of 16 bits are up to 0.002 off
        raise InputError(
            f"x0: up to {distance:.2g} grey levels off the {values.bins:,} of Eq. 13's decoder, so bits per dimension "
            f"would mean nothing; want the signal of {values} pixels, which pixels.to_signal gives"
        )
    return exact


def bins(like: Tensor, values: Values = EIGHT_BIT) -> tuple[Tensor, Tensor, Tensor]:
    """The K pixel values as signal values, and the lower and the upper edge of each value's bin (Eq. 13), each [K].

    For K = 256, the bin of x is x - 1/255 .. x + 1/255. The first bin is open below and the last is open above. The
    dtype and the device are those of `like`.

    >>> centre, lower, upper = bins(torch.zeros((), dtype=torch.float64))
    >>> float(lower[0]), float(upper[255]), bool((upper[:-1] == lower[1:]).all())
    (-inf, inf, True)
    """
    half, K = 1 / values.bin, values.bins or 0
    centre = torch.arange(K, dtype=like.dtype, device=like.device) / half - 1
    edges = (torch.arange(K + 1, dtype=like.dtype, device=like.device) - 0.5) / half - 1
    edges[0], edges[K] = -torch.inf, torch.inf
    return centre, edges[:-1], edges[1:]

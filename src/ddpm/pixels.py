"""Pixels are uint8 in 0..255; the signal is float in [-1, 1] (Section 3.3). Only this module knows both scales."""

import torch
from torch import Tensor

from ddpm import float64
from ddpm.errors import InputError

BIN = 2 / 255
"""The width of one grey level in signal units. A signal distance divided by BIN is in grey levels."""


def to_signal(pixels: Tensor) -> Tensor:
    """Convert pixels, uint8 of any shape, to the signal, float32 in [-1, 1]: 0 gives -1 and 255 gives 1.

    Raises TypeError for another dtype.

    >>> to_signal(torch.tensor([0, 255], dtype=torch.uint8))
    tensor([-1.,  1.])
    """
    if pixels.dtype != torch.uint8:
        raise TypeError(f"pixels are uint8, got {pixels.dtype}")
    return pixels.float() / 127.5 - 1


def to_pixels(signal: Tensor) -> Tensor:
    """Round the signal, float of any shape, to the nearest pixel value, uint8; values outside [-1, 1] saturate.

    The result is on the signal's device. A device without float64 (mps) cannot round exactly, so there it is on the
    CPU.

    >>> to_pixels(torch.tensor([-1.5, -1.0, 0.0, 1.0]))
    tensor([  0,   0, 128, 255], dtype=torch.uint8)
    """
    return ((float64.convert(signal) + 1) * 127.5 + 0.5).floor().clamp(0, 255).to(torch.uint8)


def eight_bit(x0: Tensor) -> Tensor:
    """Return the signal x0, of any shape, as float64 after a check that every value is one of the 256 grey levels.

    Raises InputError if a value lies between grey levels, and if x0's device has no float64 (mps), which likelihoods
    need.

    >>> eight_bit(to_signal(torch.tensor([3], dtype=torch.uint8))).dtype
    torch.float64
    """
    exact = float64.require(x0)
    distance = float((exact - to_signal(to_pixels(exact))).abs().max()) / BIN
    if not distance < 1e-3:
        raise InputError(
            f"x0: up to {distance:.2g} grey levels off the 256 of Eq. 13's decoder, so bits per dimension would mean "
            "nothing; want the signal of 8-bit pixels, pixels.to_signal(uint8)"
        )
    return exact


def bins(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The 256 grey levels as signal values, and the lower and the upper edge of each level's bin (Eq. 13), each [256].

    The bin of x is x - 1/255 .. x + 1/255. The first bin is open below and the last is open above. The dtype and the
    device are those of `like`.

    >>> centre, lower, upper = bins(torch.zeros((), dtype=torch.float64))
    >>> float(lower[0]), float(upper[255]), bool((upper[:-1] == lower[1:]).all())
    (-inf, inf, True)
    """
    centre = torch.arange(256, dtype=like.dtype, device=like.device) / 127.5 - 1
    edges = (torch.arange(257, dtype=like.dtype, device=like.device) - 0.5) / 127.5 - 1
    edges[0], edges[256] = -torch.inf, torch.inf
    return centre, edges[:-1], edges[1:]

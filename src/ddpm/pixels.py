"""Pixels, uint8 in 0..255, and the signal, float in [-1, 1] (Section 3.3). The only place that knows both."""

import torch
from torch import Tensor

from ddpm.errors import InputError

BIN = 2 / 255
"""Width of one grey level in signal units; a distance over BIN is in grey levels."""


def to_signal(pixels: Tensor) -> Tensor:
    """Pixels uint8 of any shape, to the signal float32 in [-1, 1]: 0 -> -1, 255 -> 1.

    >>> to_signal(torch.tensor([0, 255], dtype=torch.uint8))
    tensor([-1.,  1.])
    """
    if pixels.dtype != torch.uint8:
        raise TypeError(f"pixels are uint8, got {pixels.dtype}")
    return pixels.float() / 127.5 - 1


def to_pixels(signal: Tensor) -> Tensor:
    """The signal, float of any shape, to the nearest pixel uint8; beyond [-1, 1] it saturates.

    >>> to_pixels(torch.tensor([-1.5, -1.0, 0.0, 1.0]))
    tensor([  0,   0, 128, 255], dtype=torch.uint8)
    """
    if signal.device.type == "mps":  # it has no float64
        signal = signal.cpu()
    return ((signal.double() + 1) * 127.5 + 0.5).floor().clamp(0, 255).to(torch.uint8)


def eight_bit(x0: Tensor) -> Tensor:
    """The signal x0, of any shape, as float64; InputError where it is not on the 256 grey levels, as random floats are.

    >>> eight_bit(to_signal(torch.tensor([3], dtype=torch.uint8))).dtype
    torch.float64
    """
    apart = float((x0 - to_signal(to_pixels(x0)).to(x0)).abs().max()) / BIN
    if not apart < 1e-3:
        raise InputError(
            f"x0: up to {apart:.2g} grey levels off the 256 that Eq. 13's decoder knows, so bits per dimension would "
            "mean nothing; want the signal of 8-bit pixels, pixels.to_signal(uint8)"
        )
    return x0.double()


def bins(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The 256 grey levels as signal, and the lower and upper edge of each one's bin (Eq. 13), each [256].

    The bins are x - 1/255 .. x + 1/255, open-ended at -1 and 1; dtype and device are those of `like`.

    >>> centre, lower, upper = bins(torch.zeros((), dtype=torch.float64))
    >>> float(lower[0]), float(upper[255]), bool((upper[:-1] == lower[1:]).all())
    (-inf, inf, True)
    """
    centre = torch.arange(256, dtype=like.dtype, device=like.device) / 127.5 - 1
    edges = (torch.arange(257, dtype=like.dtype, device=like.device) - 0.5) / 127.5 - 1
    edges[0], edges[256] = -torch.inf, torch.inf
    return centre, edges[:-1], edges[1:]

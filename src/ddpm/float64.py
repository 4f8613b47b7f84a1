"""float64 on devices that may not have it. Apple's mps has none; CPUs and CUDA devices do.

Sampling and training work on such a device: tables stay on the CPU, and what must be float64 moves there first.
Likelihoods are float64 throughout, so they ask for another device.
"""

import torch
from torch import Tensor

from ddpm.errors import InputError


def available(device: torch.device | str) -> bool:
    """Whether the device has float64."""
    return torch.device(device).type != "mps"


def device_with(device: torch.device | str) -> torch.device:
    """Return the device if it has float64, and the CPU if not.

    >>> device_with("mps")
    device(type='cpu')
    """
    return torch.device(device if available(device) else "cpu")


def convert(x: Tensor) -> Tensor:
    """Return x as float64, on its own device if that has float64 and on the CPU if not.

    >>> convert(torch.ones(2)).dtype
    torch.float64
    """
    return x.to(device_with(x.device)).double()


def require(x: Tensor) -> Tensor:
    """Return x as float64 on its own device. Raises InputError if the device has no float64.

    >>> require(torch.ones(2)).dtype
    torch.float64
    """
    if not available(x.device):
        raise InputError(f"device {x.device.type}: has no float64, which likelihoods need; want the CPU or CUDA")
    return x.double()

"""Classifier-free guidance: a network that is called with and without the label."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Guided:
    """A network under classifier-free guidance, see `Denoiser.guided`; first and last are timesteps."""

    network: Callable[..., Tensor]
    scale: float
    first: int
    last: int
    learned: bool

    def __call__(self, x: Tensor, timestep: Tensor, y: Tensor | None = None) -> Tensor:
        inside = (timestep >= self.first) & (timestep <= self.last)
        if y is None or self.scale == 1 or not inside.any():
            return self.network(x, timestep, y)
        labels = torch.cat([y, torch.full_like(y, -1)])
        given, free = self.network(torch.cat([x, x]), torch.cat([timestep, timestep]), labels).chunk(2)
        out = torch.where(inside.view(-1, 1, 1, 1), free + self.scale * (given - free), given)
        if self.learned:
            out = torch.cat([out.chunk(2, dim=1)[0], given.chunk(2, dim=1)[1]], dim=1)
        return out

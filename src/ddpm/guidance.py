"""Classifier-free guidance: the network is called with the label or the condition, and without it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Guided:
    """A network with classifier-free guidance; see `Denoiser.guided`.

    network  the network without guidance
    scale    how far to go from the prediction without label to that with label, and beyond: 1 is no guidance. In a call
             without label, it is the condition that is given and hidden
    first    the first timestep with guidance
    last     the last timestep with guidance
    learned  whether the network outputs the variance too, which is not guided
    """

    network: Callable[..., Tensor]
    scale: float
    first: int
    last: int
    learned: bool

    def __call__(self, x: Tensor, timestep: Tensor, y: Tensor | None = None, *condition: Tensor) -> Tensor:
        inside = (timestep >= self.first) & (timestep <= self.last)
        if (y is None and not condition) or self.scale == 1 or not inside.any():
            return self.network(x, timestep, y, *condition)
        timestep, inside = (a.expand(len(x)) for a in (timestep, inside))  # [1] stands for all images
        told = [torch.cat([c, torch.zeros_like(c) if y is None else c]) for c in condition]
        if y is not None:
            y = y.expand(len(x))
            y = torch.cat([y, torch.full_like(y, -1)])
        with_it, without = self.network(torch.cat([x, x]), torch.cat([timestep, timestep]), y, *told).chunk(2)
        out = torch.where(inside.view(-1, 1, 1, 1), without + self.scale * (with_it - without), with_it)
        if self.learned:
            out = torch.cat([out.chunk(2, dim=1)[0], with_it.chunk(2, dim=1)[1]], dim=1)
        return out

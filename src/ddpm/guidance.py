"""Classifier-free guidance: the network is called with the label and without it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Guided:
    """A network with classifier-free guidance; see `Denoiser.guided`.

    network  the network without guidance
    scale    how far to go from the prediction without label to that with label, and beyond: 1 is no guidance
    first    the first timestep with guidance
    last     the last timestep with guidance
    learned  whether the network outputs the variance too, which is not guided
    """

    network: Callable[..., Tensor]
    scale: float
    first: int
    last: int
    learned: bool

    def __call__(self, x: Tensor, timestep: Tensor, y: Tensor | None = None) -> Tensor:
        inside = (timestep >= self.first) & (timestep <= self.last)
        if y is None or self.scale == 1 or not inside.any():
            return self.network(x, timestep, y)
        timestep, inside, y = (a.expand(len(x)) for a in (timestep, inside, y))  # [1] stands for all images
        labels = torch.cat([y, torch.full_like(y, -1)])
        with_label, without = self.network(torch.cat([x, x]), torch.cat([timestep, timestep]), labels).chunk(2)
        out = torch.where(inside.view(-1, 1, 1, 1), without + self.scale * (with_label - without), with_label)
        if self.learned:
            out = torch.cat([out.chunk(2, dim=1)[0], with_label.chunk(2, dim=1)[1]], dim=1)
        return out

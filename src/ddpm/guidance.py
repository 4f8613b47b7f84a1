"""Guidance: from the prediction of a weaker denoiser to that of the better one, and beyond."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Guided:
    """A network with guidance; see `Denoiser.guided`.

    network  the network without guidance
    scale    how far to go from the weaker prediction to that of `network`, and beyond: 1 is no guidance
    first    the first timestep with guidance
    last     the last timestep with guidance
    learned  whether the network outputs the variance too, which is not guided
    guide    the network of the weaker prediction (autoguidance), whose output may hold a variance of its own; None:
             `network` without the label (classifier-free guidance)
    """

    network: Callable[..., Tensor]
    scale: float
    first: int
    last: int
    learned: bool
    guide: Callable[..., Tensor] | None = None

    def __call__(self, x: Tensor, timestep: Tensor, y: Tensor | None = None) -> Tensor:
        inside = (timestep >= self.first) & (timestep <= self.last)
        if (y is None and self.guide is None) or self.scale == 1 or not inside.any():
            return self.network(x, timestep, y)
        timestep, inside = timestep.expand(len(x)), inside.expand(len(x))  # [1] stands for all images
        if self.guide is None:
            assert y is not None
            y = y.expand(len(x))
            labels = torch.cat([y, torch.full_like(y, -1)])
            strong, weak = self.network(torch.cat([x, x]), torch.cat([timestep, timestep]), labels).chunk(2)
        else:
            strong, weak = self.network(x, timestep, y), self.guide(x, timestep, y)
        C = x.shape[1]
        guided = weak[:, :C] + self.scale * (strong[:, :C] - weak[:, :C])
        guided = torch.where(inside.view(-1, 1, 1, 1), guided, strong[:, :C])
        return torch.cat([guided, strong[:, C:]], dim=1) if self.learned else guided

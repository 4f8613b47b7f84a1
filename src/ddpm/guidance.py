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
             `network` without the label, or in a call without label, without the condition (classifier-free guidance)
    """

    network: Callable[..., Tensor]
    scale: float
    first: int
    last: int
    learned: bool
    guide: Callable[..., Tensor] | None = None

    def __call__(self, x: Tensor, timestep: Tensor, y: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        inside = (timestep >= self.first) & (timestep <= self.last)
        told = {} if condition is None else {"condition": condition}
        alone = self.guide is None and y is None and condition is None
        if alone or self.scale == 1 or not inside.any():
            return self.network(x, timestep, y, **told)
        timestep, inside = timestep.expand(len(x)), inside.expand(len(x))  # [1] stands for all images
        if self.guide is not None:
            strong, weak = self.network(x, timestep, y, **told), self.guide(x, timestep, y, **told)
        else:
            if condition is not None:
                told["condition"] = torch.cat([condition, torch.zeros_like(condition) if y is None else condition])
            if y is not None:
                y = y.expand(len(x))
                y = torch.cat([y, torch.full_like(y, -1)])
            strong, weak = self.network(torch.cat([x, x]), torch.cat([timestep, timestep]), y, **told).chunk(2)
        C = x.shape[1]
        guided = weak[:, :C] + self.scale * (strong[:, :C] - weak[:, :C])
        guided = torch.where(inside.view(-1, 1, 1, 1), guided, strong[:, :C])
        return torch.cat([guided, strong[:, C:]], dim=1) if self.learned else guided

"""Random turns and mirrors of training images, as functions of (seed, step)."""

import torch
from torch import Tensor

from ddpm import noise
from ddpm.presets import Preset

_PURPOSE = 4
"""It keeps these draws apart from the others of a step (run/step.py)."""


def draw(preset: Preset, step: int) -> Tensor:
    """Whether each image of a step's batch is turned by 90 and by 180 degrees, and mirrored: bool [3, batch_size]."""
    g = noise.generator(preset.seed, step, _PURPOSE)
    chosen = torch.rand(3, preset.batch_size, generator=g) < 0.5
    return chosen & torch.tensor([[preset.turn], [preset.turn], [preset.mirror]])


def apply(x: Tensor, chosen: Tensor) -> Tensor:
    """The images [n, C, H, W] after what `draw` chose for them, bool [3, n].

    >>> x = torch.tensor([[[[1, 2], [3, 4]]]])
    >>> apply(x, torch.tensor([[True], [False], [False]])).tolist()  # a quarter to the left
    [[[[2, 4], [1, 3]]]]
    """
    quarter, half, mirrored = chosen[:, :, None, None, None]
    if x.shape[-1] == x.shape[-2]:  # else nothing is turned
        x = torch.where(quarter, x.rot90(1, (-2, -1)), x)
        x = torch.where(half, x.rot90(2, (-2, -1)), x)
    return torch.where(mirrored, x.flip(-2), x)

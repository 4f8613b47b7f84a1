"""The moving average of the weights (Section 4)."""

from collections.abc import Iterable

import torch
from torch import Tensor


def decay_at(step: int, decay: float, warmup: bool) -> float:
    """The decay of update `step`, counted from 0. The first update copies the weights; the others use `decay`.

    With `warmup` the decay of update n rises as (1 + n)/(10 + n) up to `decay`, so a short run forgets its first
    weights. While it rises, for n below 9/(1 - decay), the average is a power function average with gamma 8 and a
    relative width of 0.09: the decay is (1 - 1/n)^9 to first order in 1/n (Karras et al. 2024, Eq. 127).

    >>> decay_at(0, 0.9999, False), decay_at(1, 0.9999, False), decay_at(1, 0.9999, True)
    (0.0, 0.9999, 0.18181818181818182)
    """
    if step == 0:
        return 0.0
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


@torch.no_grad()
def update(average: Iterable[Tensor], weights: Iterable[Tensor], decay: float) -> None:
    """Set average to decay * average + (1 - decay) * weights, in place. Both are lists of float32 tensors.

    >>> a = torch.zeros(1)
    >>> update([a], [torch.ones(1)], 0.75)
    >>> a.item()
    0.25
    """
    torch._foreach_lerp_(list(average), list(weights), 1 - decay)

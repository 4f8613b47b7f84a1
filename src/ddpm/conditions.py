"""Conditions on an image: what the network is told of x_0 besides x_t (Saharia et al. 2022, SR3, Section 2.2).

A condition is a picture, brought to the size of x_0, and one more channel that says where the picture is known: 1
there, and 0 elsewhere. It is concatenated to x_t at the network's input. Where nothing is known, all channels are 0,
so a hidden condition is all zeros.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.pixels import EIGHT_BIT, Values, to_pixels, to_signal

LUMA = (0.299, 0.587, 0.114)
"""The weights of red, green and blue in grey (ITU-R 601), as in Pillow."""


# -- pictures ----------------------------------------------------------------------------------------------------------


def lowres(x0: Tensor, factor: str) -> Tensor:
    """The means of blocks of `factor` x `factor` pixels: [B, C, H, W] to [B, C, H / factor, W / factor].

    >>> lowres(torch.tensor([[[[0.0, 1.0], [1.0, 0.0]]]]), "2").item()
    0.5
    """
    return F.avg_pool2d(x0, int(factor))


def grey(x0: Tensor, _: str = "") -> Tensor:
    """Luma of RGB images, and the mean over the channels of others: [B, C, H, W] to [B, 1, H, W].

    >>> grey(torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)).item() == torch.tensor(0.299).item()
    True
    """
    if x0.shape[1] != len(LUMA):
        return x0.mean(1, keepdim=True)
    return (x0 * x0.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)


def whole(x0: Tensor, _: str = "") -> Tensor:
    """The image itself, of which a mask may hide a part; for `pairs`, the other image of the pair."""
    return x0


class Kind(NamedTuple):
    """A kind of condition, KIND or KIND:ARGUMENT.

    picture   (x0 [B, C, H, W], argument) -> [B, c, h, w]: the picture that a person could give in its place
    argument  the name of its argument in help, or none
    channels  c; 0 for those of the image
    """

    picture: Callable[[Tensor, str], Tensor]
    argument: str = ""
    channels: int = 0


CONDITIONS = {
    "lowres": Kind(lowres, argument="N"),
    "grey": Kind(grey, channels=1),
    "mask": Kind(whole, argument="LAW"),
    "pairs": Kind(whole),
}


# -- masks -------------------------------------------------------------------------------------------------------------


def half(n: int, size: tuple[int, int], g: torch.Generator) -> Tensor:
    """The left, right, upper or lower half is hidden, each with probability 1/4."""
    rows, columns = _places(size)
    side, (height, width) = torch.randint(4, (n, 1, 1), generator=g), size
    first = torch.where(side < 2, columns < width // 2, rows < height // 2)
    return torch.where(side % 2 == 0, first, ~first)


def box(n: int, size: tuple[int, int], g: torch.Generator) -> Tensor:
    """A rectangle is hidden: its sides are uniform between 1/4 and 3/4 of the image's, and so is its place."""
    inside = torch.ones(n, *size, dtype=torch.bool)
    for place, side in zip(_places(size), size, strict=True):
        least, most = max(1, side // 4), max(1, 3 * side // 4)
        length = torch.randint(least, most + 1, (n, 1, 1), generator=g)
        start = (torch.rand(n, 1, 1, generator=g) * (side - length + 1)).long()
        inside &= (place >= start) & (place < start + length)
    return ~inside


def dots(n: int, size: tuple[int, int], g: torch.Generator) -> Tensor:
    """Each pixel is known with probability 1/4, and hidden otherwise."""
    return torch.rand(n, *size, generator=g) < 0.25


LAWS = {"half": half, "box": box, "dots": dots}
"""The laws of masks: (n, (H, W), generator) -> bool [n, H, W], true where a pixel is known."""


def _places(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The numbers of the rows [H, 1] and of the columns [1, W]."""
    return torch.arange(size[0])[:, None], torch.arange(size[1])[None]


# -- conditions --------------------------------------------------------------------------------------------------------


def picture(condition: str, x0: Tensor, values: Values = EIGHT_BIT) -> Tensor:
    """The picture of x0 [B, C, H, W] under a condition, such as lowres:4: [B, c, h, w], rounded to pixel values.

    Because of the rounding, a saved picture gives the same condition. For `pairs`, x0 is the other image.

    >>> picture("lowres:2", torch.zeros(1, 3, 8, 8)).shape, picture("grey", torch.zeros(1, 3, 8, 8)).shape
    (torch.Size([1, 3, 4, 4]), torch.Size([1, 1, 8, 8]))
    """
    kind, _, argument = condition.partition(":")
    found = CONDITIONS[kind].picture(x0, argument)
    return to_signal(to_pixels(found, values), values).to(x0.device)


def known(condition: str, n: int, size: tuple[int, int], g: torch.Generator) -> Tensor:
    """Where n pictures are known, float32 [n, 1, H, W]: everywhere, or as the law of a mask says.

    >>> known("mask:half", 2, (4, 4), torch.Generator()).sum((1, 2, 3)).tolist()
    [8.0, 8.0]
    """
    kind, _, law = condition.partition(":")
    where = LAWS[law](n, size, g) if kind == "mask" else torch.ones(n, *size, dtype=torch.bool)
    return where[:, None].float()


def join(picture: Tensor, known: Tensor) -> Tensor:
    """The condition [B, c + 1, H, W] of pictures [B, c, h, w], known where `known` [B, 1, H, W] is 1.

    Smaller pictures are enlarged by PyTorch's bicubic interpolation (a = -0.75).

    >>> join(torch.ones(1, 3, 4, 4), torch.zeros(1, 1, 8, 8)).shape
    torch.Size([1, 4, 8, 8])
    """
    if picture.shape[-2:] != known.shape[-2:]:
        picture = F.interpolate(picture, known.shape[-2:], mode="bicubic", align_corners=False)
    return torch.cat([picture * known, known], dim=1)


def noisy(condition: Tensor, s: Tensor, eps: Tensor) -> Tensor:
    """The condition [B, c + 1, H, W] with noise s eps on its picture (conditioning augmentation, Ho et al. 2022).

    s    standard deviations [B], 0 .. 1. The last channel becomes 1 - s where the picture is known, which tells it s
    eps  standard normal noise [B, c, H, W]

    >>> noisy(torch.ones(1, 2, 1, 1), torch.tensor([0.25]), torch.full((1, 1, 1, 1), -2.0)).flatten().tolist()
    [0.5, 0.75]
    """
    s, picture, known = s.view(-1, 1, 1, 1), condition[:, :-1], condition[:, -1:]
    return torch.cat([picture + s * eps * (known > 0), (1 - s) * known], dim=1)


def shown(condition: Tensor, channels: int) -> Tensor:
    """The picture of conditions [B, c + 1, H, W] for people to see, as a signal [B, channels, H, W].

    >>> shown(torch.zeros(2, 2, 8, 8), 3).shape
    torch.Size([2, 3, 8, 8])
    """
    return condition[:, :-1].expand(-1, channels, -1, -1)


@dataclass(frozen=True, eq=False)
class Given:
    """A network whose condition is given; see `Denoiser.given`.

    network    the network, which takes the argument `condition`
    condition  [B, c + 1, H, W]; a call with K B images takes each condition K times in a row
    """

    network: Callable[..., Tensor]
    condition: Tensor

    def __call__(self, x: Tensor, timestep: Tensor, y: Tensor | None = None) -> Tensor:
        each = len(x) // max(1, len(self.condition))
        condition = self.condition if each == 1 else self.condition.repeat_interleave(each, dim=0)
        return self.network(x, timestep, y, condition=condition)

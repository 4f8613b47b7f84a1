"""Training images are warped at random, and the network is told how (Karras et al. 2022, Appendix F.2).

The network is never told of a warp when it samples, so samples do not show any. `NUMBERS` numbers describe a warp:

0     1 if the image is mirrored left to right
1     1 if it is mirrored top to bottom
2     s: it is scaled by 2^(s/5)
3, 4  cos a - 1 and sin a: it is turned by the angle a, counter-clockwise
5, 6  w cos 2r and w sin 2r: it is stretched by 2^(w/5) along the direction r, and shrunk by as much across it
7, 8  it is moved by this many eighths of its width to the right, and of its height down

This is the order in which they are applied. All are 0 for an image that is not warped. Numbers 5 and 6 hold 2r where
EDM has r, so that each map has its own numbers. With r, a stretch and its reverse may get the same ones.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NUMBERS = 9
_RATE = math.log(2) / 5  # 2^(s/5) = exp(_RATE s)


def sample(n: int, probability: float, flip: bool, generator: torch.Generator) -> Tensor:
    """Draw the warps of n images, float32 [n, NUMBERS].

    An image is scaled, turned, stretched and moved, each with this probability and independently. Then s, w, and the
    eighths are standard normal, a is uniform, and r is uniform in half of the cases and 0 in the others. It is mirrored
    top to bottom with half of the probability, and so it is left to right, but with 1/2 if `flip`.

    >>> from ddpm import noise
    >>> sample(4, 0.0, False, noise.generator(0)).count_nonzero().item()
    0
    """
    chances = torch.tensor([0.5 if flip else probability / 2, probability / 2, *[probability] * 4])
    mirrored, upside_down, *chosen = (torch.rand(6, n, generator=generator) < chances[:, None]).float()
    scaled, turned, stretched, moved = chosen
    s, w, right, down = torch.randn(4, n, generator=generator)
    a, r = math.pi * (2 * torch.rand(2, n, generator=generator) - 1)
    r = r * (torch.rand(n, generator=generator) < 0.5)
    numbers = [
        mirrored, upside_down, scaled * s, turned * (a.cos() - 1), turned * a.sin(),
        stretched * w * (2 * r).cos(), stretched * w * (2 * r).sin(), moved * right, moved * down,
    ]  # fmt: skip
    return torch.stack(numbers, dim=1)


def apply(x: Tensor, warp: Tensor) -> Tensor:
    """The signal x [n, C, H, W] after the warps [n, NUMBERS], in [-1, 1].

    Each pixel is interpolated once, by bicubic weights of the 16 pixels around its place in x. Beyond the edge x is
    reflected. Images that are not warped, or only mirrored, keep every bit. (EDM enlarges x by a wavelet filter before
    a bilinear interpolation, which aliases less in shrunk images.)

    >>> x = torch.tensor([[[[-1.0, -0.5, 0.0, 0.5]]]])
    >>> apply(x, torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0, 0]])).tolist()
    [[[[0.5, 0.0, -0.5, -1.0]]]]
    >>> apply(x, torch.tensor([[0.0, 0, 0, 0, 0, 0, 0, 2, 0]])).tolist()  # a quarter of the width to the right
    [[[[-1.0, -1.0, -0.5, 0.0]]]]
    """
    if x.device.type == "mps":  # has no bicubic grid_sample
        return apply(x.cpu(), warp.cpu()).to(x.device)
    mirrored, upside_down, s, cos_less_1, sin, w_cos, w_sin, right, down = warp.unbind(1)
    x = torch.where(mirrored.bool()[:, None, None, None], x.flip(-1), x)
    x = torch.where(upside_down.bool()[:, None, None, None], x.flip(-2), x)
    # the matrix from a place in the result, seen from its centre, back to one in x; y points down
    cos, size = 1 + cos_less_1, (_RATE * torch.hypot(w_cos, w_sin)).clamp(min=1e-6)
    along, by = size.cosh(), _RATE * size.sinh() / size
    turn_back = torch.stack([cos, -sin, sin, cos], dim=1).view(-1, 2, 2)
    stretch_back = torch.stack([along - by * w_cos, by * w_sin, by * w_sin, along + by * w_cos], dim=1).view(-1, 2, 2)
    back = (-_RATE * s).exp()[:, None, None] * turn_back @ stretch_back
    back[:, 0, 1] *= x.shape[-2] / x.shape[-1]  # places are halves of the width and of the height
    back[:, 1, 0] *= x.shape[-1] / x.shape[-2]
    shift = torch.stack([right, down], dim=1)[:, :, None] / 4
    places = F.affine_grid(torch.cat([back, -back @ shift], dim=2), list(x.shape), align_corners=False)
    warped = F.grid_sample(x, places, mode="bicubic", padding_mode="reflection", align_corners=False).clamp(-1, 1)
    return torch.where((warp[:, 2:] != 0).any(1)[:, None, None, None], warped, x)

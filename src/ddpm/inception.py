"""Inception-v3 as FID and the Inception score use it: TensorFlow's graph of 5 December 2015.

It is the network of Szegedy et al. (2015), but this graph differs from later ones in three ways: it has its own
bilinear resize, its average pools do not count padding, and the last block has a maximum where an average belongs. The
modules have the names of the published weights (`Mixed_5b.branch5x5_1.conv.weight`, ...), which `ddpm.files.features`
loads.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm import float64

SIDE = 299
"""Height and width of the first convolution's input, pixels."""


def resize_matrix(n: int, out: int) -> Tensor:
    """TensorFlow 1's bilinear interpolation of n samples at `out` points: float64 [out, n], whose rows sum to 1.

    Point i lies at position i n/out, between two samples: point 0 is sample 0, and the last points repeat the last
    sample. There is no antialiasing. (The half-pixel centres of today would put it at (i + 1/2) n/out - 1/2.)

    >>> resize_matrix(2, 4)
    tensor([[1.0000, 0.0000],
            [0.5000, 0.5000],
            [0.0000, 1.0000],
            [0.0000, 1.0000]], dtype=torch.float64)
    """
    position = torch.arange(out, dtype=torch.float64) * n / out
    below = position.long()
    above = (below + 1).clamp(max=n - 1)
    weight = (position - below)[:, None]
    eye = torch.eye(n, dtype=torch.float64)
    return (1 - weight) * eye[below] + weight * eye[above]


def resize(x: Tensor, size: tuple[int, int] = (SIDE, SIDE)) -> Tensor:
    """Resize images [B, C, H, W] of any real dtype to float64 [B, C, *size] in the same units; see `resize_matrix`.

    The result is on the images' device, or on the CPU if that device has no float64 (mps).

    >>> resize(torch.tensor([[[[0, 100]]]]), (1, 4)).tolist()
    [[[[0.0, 50.0, 100.0, 100.0]]]]
    """
    x = float64.convert(x)
    rows, columns = (resize_matrix(n, out).to(x.device) for n, out in zip(x.shape[2:], size, strict=True))
    return rows @ x @ columns.T


class Conv(nn.Module):
    """Convolution, batch normalisation (epsilon 1e-3) and ReLU."""

    def __init__(self, c_in: int, c_out: int, kernel: tuple[int, int], stride: int, padding: tuple[int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


Pool = Callable[[Tensor], Tensor]
_average: Pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_maximum: Pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_halve: Pool = partial(F.max_pool2d, kernel_size=3, stride=2)


class _Layer(NamedTuple):
    """A convolution: the name of its module, its output channels, kernel and stride."""

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


_Branch = Sequence[_Layer | tuple[_Layer, _Layer] | Pool]
"""Consecutive layers: an optional pool, then convolutions. A pair is two convolutions of the same input."""


class Mixed(nn.Module):
    """Branches of one input [B, C, H, W], concatenated over channels. Layers of stride 2 have no padding."""

    def __init__(self, c_in: int, branches: Sequence[_Branch]) -> None:
        super().__init__()
        self.branches = branches
        self.channels = 0
        for branch in branches:
            c = c_in
            for layer in branch:
                pair = (layer,) if isinstance(layer, _Layer) else layer if isinstance(layer, tuple) else ()
                for name, c_out, (h, w), stride in pair:
                    self.add_module(name, Conv(c, c_out, (h, w), stride, (h // 2, w // 2) if stride == 1 else (0, 0)))
                c = sum(part.channels for part in pair) or c
            self.channels += c

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._run(branch, x) for branch in self.branches], 1)

    def _run(self, branch: _Branch, x: Tensor) -> Tensor:
        for layer in branch:
            if isinstance(layer, _Layer):
                x = self.get_submodule(layer.name)(x)
            elif isinstance(layer, tuple):
                x = torch.cat([self.get_submodule(part.name)(x) for part in layer], 1)
            else:
                x = layer(x)
        return x


def block_a(c_in: int, c_pool: int) -> Mixed:
    """Mixed_5b, 5c and 5d."""
    return Mixed(
        c_in,
        [
            [_Layer("branch1x1", 64)],
            [_Layer("branch5x5_1", 48), _Layer("branch5x5_2", 64, (5, 5))],
            [_Layer("branch3x3dbl_1", 64), _Layer("branch3x3dbl_2", 96, (3, 3)), _Layer("branch3x3dbl_3", 96, (3, 3))],
            [_average, _Layer("branch_pool", c_pool)],
        ],
    )


def block_b(c_in: int) -> Mixed:
    """Mixed_6a, which halves height and width."""
    return Mixed(
        c_in,
        [
            [_Layer("branch3x3", 384, (3, 3), 2)],
            [
                _Layer("branch3x3dbl_1", 64),
                _Layer("branch3x3dbl_2", 96, (3, 3)),
                _Layer("branch3x3dbl_3", 96, (3, 3), 2),
            ],
            [_halve],
        ],
    )


def block_c(c_in: int, c: int) -> Mixed:
    """Mixed_6b to 6e. c is the number of channels inside the 7x7 branches."""
    return Mixed(
        c_in,
        [
            [_Layer("branch1x1", 192)],
            [_Layer("branch7x7_1", c), _Layer("branch7x7_2", c, (1, 7)), _Layer("branch7x7_3", 192, (7, 1))],
            [
                _Layer("branch7x7dbl_1", c),
                _Layer("branch7x7dbl_2", c, (7, 1)),
                _Layer("branch7x7dbl_3", c, (1, 7)),
                _Layer("branch7x7dbl_4", c, (7, 1)),
                _Layer("branch7x7dbl_5", 192, (1, 7)),
            ],
            [_average, _Layer("branch_pool", 192)],
        ],
    )


def block_d(c_in: int) -> Mixed:
    """Mixed_7a, which halves height and width."""
    return Mixed(
        c_in,
        [
            [_Layer("branch3x3_1", 192), _Layer("branch3x3_2", 320, (3, 3), 2)],
            [
                _Layer("branch7x7x3_1", 192),
                _Layer("branch7x7x3_2", 192, (1, 7)),
                _Layer("branch7x7x3_3", 192, (7, 1)),
                _Layer("branch7x7x3_4", 192, (3, 3), 2),
            ],
            [_halve],
        ],
    )


def block_e(c_in: int, pool: Pool) -> Mixed:
    """Mixed_7b, whose pool is an average, and 7c, whose pool is a maximum."""
    return Mixed(
        c_in,
        [
            [_Layer("branch1x1", 320)],
            [_Layer("branch3x3_1", 384), (_Layer("branch3x3_2a", 384, (1, 3)), _Layer("branch3x3_2b", 384, (3, 1)))],
            [
                _Layer("branch3x3dbl_1", 448),
                _Layer("branch3x3dbl_2", 384, (3, 3)),
                (_Layer("branch3x3dbl_3a", 384, (1, 3)), _Layer("branch3x3dbl_3b", 384, (3, 1))),
            ],
            [pool, _Layer("branch_pool", 192)],
        ],
    )


class Inception(nn.Module):
    """Map images [B, 3, H, W] of any size, 0..255, uint8 or float, to (features [B, 2048], logits [B, 1008]).

    The features are the averages of the last block's output over positions. FID, KID, precision and recall use them.
    The logits do not contain the classifier's bias, as in the original program of the Inception score, which multiplied
    the features by the weights alone. A new module has random weights; only with the weights that
    `ddpm.files.features.inception` loads can its values be compared with published ones. Use it in evaluation mode.

    Sources: tensorflow/models' inception-2015-12-05; mseitzer/pytorch-fid; toshas/torch-fidelity.

    >>> features, logits = Inception().eval()(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    >>> features.shape, logits.shape
    (torch.Size([1, 2048]), torch.Size([1, 1008]))
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, (3, 3), 2, (0, 0))
        self.Conv2d_2a_3x3 = Conv(32, 32, (3, 3), 1, (0, 0))
        self.Conv2d_2b_3x3 = Conv(32, 64, (3, 3), 1, (1, 1))
        self.Conv2d_3b_1x1 = Conv(64, 80, (1, 1), 1, (0, 0))
        self.Conv2d_4a_3x3 = Conv(80, 192, (3, 3), 1, (0, 0))
        self.Mixed_5b = block_a(192, 32)
        self.Mixed_5c = block_a(256, 64)
        self.Mixed_5d = block_a(288, 64)
        self.Mixed_6a = block_b(288)
        self.Mixed_6b = block_c(768, 128)
        self.Mixed_6c = block_c(768, 160)
        self.Mixed_6d = block_c(768, 160)
        self.Mixed_6e = block_c(768, 192)
        self.Mixed_7a = block_d(768)
        self.Mixed_7b = block_e(1280, _average)
        self.Mixed_7c = block_e(2048, _maximum)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"want images [B, 3, H, W], got shape {list(pixels.shape)}")
        x = ((resize(pixels) - 128) / 128).to(self.fc.weight.dtype).to(pixels.device)  # [B, 3, 299, 299]
        x = self.Conv2d_1a_3x3(x)  # [B, 32, 149, 149]
        x = self.Conv2d_2a_3x3(x)  # [B, 32, 147, 147]
        x = self.Conv2d_2b_3x3(x)  # [B, 64, 147, 147]
        x = _halve(x)  # [B, 64, 73, 73]
        x = self.Conv2d_3b_1x1(x)  # [B, 80, 73, 73]
        x = self.Conv2d_4a_3x3(x)  # [B, 192, 71, 71]
        x = _halve(x)  # [B, 192, 35, 35]
        x = self.Mixed_5b(x)  # [B, 256, 35, 35]
        x = self.Mixed_5c(x)  # [B, 288, 35, 35]
        x = self.Mixed_5d(x)  # [B, 288, 35, 35]
        x = self.Mixed_6a(x)  # [B, 768, 17, 17]
        x = self.Mixed_6b(x)  # [B, 768, 17, 17]
        x = self.Mixed_6c(x)  # [B, 768, 17, 17]
        x = self.Mixed_6d(x)  # [B, 768, 17, 17]
        x = self.Mixed_6e(x)  # [B, 768, 17, 17]
        x = self.Mixed_7a(x)  # [B, 1280, 8, 8]
        x = self.Mixed_7b(x)  # [B, 2048, 8, 8]
        x = self.Mixed_7c(x)  # [B, 2048, 8, 8]
        features = x.mean((2, 3))  # [B, 2048]
        return features, features @ self.fc.weight.T

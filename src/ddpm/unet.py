"""The paper's U-Net (Appendix B and the official code); it knows nothing of diffusion.

Shapes: images [B, C, H, W], time embedding [B, 4 width].
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddpm.errors import InputError, check_size

GROUPS = 32


def _xavier(layer: nn.Conv2d | nn.Linear, scale: float = 1.0) -> None:
    """Uniform with variance scale / fan_avg, bias 0 (official code)."""
    nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(scale))
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)


def conv(
    c_in: int, c_out: int, kernel: int = 3, stride: int = 1, padding: int | None = None, scale: float = 1.0
) -> nn.Conv2d:
    """A convolution as the official code initialises it; `scale` 1e-10 starts it at nearly nothing."""
    layer = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2 if padding is None else padding)
    _xavier(layer, scale)
    return layer


def linear(c_in: int, c_out: int) -> nn.Linear:
    """A dense layer as the official code initialises it."""
    layer = nn.Linear(c_in, c_out)
    _xavier(layer)
    return layer


def norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of 32 groups, eps 1e-6."""
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


def time_embedding(timestep: Tensor, width: int) -> Tensor:
    """Sinusoids of the integer timestep [B] -> float32 [B, width]: sines, then cosines, at 1 .. 1e-4 radians a level.

    >>> time_embedding(torch.tensor([0]), 4).tolist()
    [[0.0, 0.0, 1.0, 1.0]]
    """
    half = width // 2
    frequency = torch.exp(-math.log(1e4) / (half - 1) * torch.arange(half, device=timestep.device))
    angle = timestep.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class ResidualBlock(nn.Module):
    """Norm, swish, conv, + time, norm, swish, dropout, conv; + the input, through a 1x1 iff the channels change."""

    def __init__(self, c_in: int, c_out: int, c_time: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), conv(c_in, c_out)
        self.time = linear(c_time, c_out)
        self.norm2, self.conv2 = norm(c_out), conv(c_out, c_out, scale=1e-10)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = conv(c_in, c_out, kernel=1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, c_in, H, W], time [B, c_time] after its swish -> [B, c_out, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(time)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        out: Tensor = self.shortcut(x) + h
        return out


class Attention(nn.Module):
    """Self-attention over the H W positions, one head, scale C^-0.5; + the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        for part in self.qkv.weight.data.chunk(3):  # three layers of the official code, held as one
            nn.init.xavier_uniform_(part)
        nn.init.zeros_(self.qkv.bias)  # type: ignore[arg-type]
        self.out = conv(channels, channels, kernel=1, scale=1e-10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        B, C, H, W = x.shape
        q, k, v = self.qkv(self.norm(x)).view(B, 3, C, H * W).transpose(2, 3).unbind(1)  # each [B, HW, C]
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]  # [B, HW, C]
        out: Tensor = x + self.out(h.transpose(1, 2).reshape(B, C, H, W))
        return out


class Downsample(nn.Module):
    """Conv3x3 of stride 2, padded right and bottom only: [B, C, H, W] -> [B, C, H/2, W/2]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Nearest neighbour, then conv3x3: [B, C, H, W] -> [B, C, 2H, 2W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Stage(nn.Module):
    """A residual block and the attention that may follow it."""

    def __init__(self, c_in: int, c_out: int, c_time: int, dropout: float, attention: bool) -> None:
        super().__init__()
        self.block = ResidualBlock(c_in, c_out, c_time, dropout)
        self.attention = Attention(c_out) if attention else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        out: Tensor = self.attention(self.block(x, time))
        return out


class UNet(nn.Module):
    """(x [B, C, H, W], timestep int64 [B], y int64 [B] or None) -> [B, out_channels, H, W].

    channels       C of the images
    out_channels   C, or 2C where the variance is learned; None: C
    width          channels of the first level, a multiple of 32
    multipliers    channels of each level over `width`; every level but the last halves H and W
    blocks         residual blocks a level on the way down, one more on the way up
    attention      levels, from 0, with attention after every block; between the middle blocks it always is
    dropout        probability, in every residual block
    classes        number of class labels, 0 for none
    bf16           compute in bfloat16 (autocast); weights and what is returned stay float32
    checkpointing  keep the blocks' inputs only and compute the rest again on the way back: less memory, more time

    H and W need not be equal; each must divide by 2^(levels - 1), else InputError names the nearest that do.

    >>> with torch.device("meta"):
    ...     net = UNet(channels=3)
    >>> sum(p.numel() for p in net.parameters())  # the paper's CIFAR-10 network
    35746307
    """

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        width: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (1,),
        dropout: float = 0.0,
        classes: int = 0,
        checkpointing: bool = False,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        if width % GROUPS:
            raise InputError(f"width {width}: want a multiple of {GROUPS}, the groups of its norms")
        self.width, self.levels = width, len(multipliers)
        self.checkpointing, self.bf16 = checkpointing, bf16
        c_time = 4 * width
        self.time1, self.time2 = linear(width, c_time), linear(c_time, c_time)
        self.label = nn.Embedding(classes, c_time) if classes else None

        def stage(c_in: int, c_out: int, level: int) -> Stage:
            return Stage(c_in, c_out, c_time, dropout, attention=level in attention)

        self.conv_in = conv(channels, width)
        skips = [c := width]
        self.down = nn.ModuleList()
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                self.down.append(stage(c, c := width * multiplier, level))
                skips.append(c)
            if level < self.levels - 1:
                self.down.append(Downsample(c))
                skips.append(c)
        self.middle = nn.ModuleList([Stage(c, c, c_time, dropout, True), Stage(c, c, c_time, dropout, False)])
        self.up = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for _ in range(blocks + 1):
                self.up.append(stage(c + skips.pop(), c := width * multiplier, level))
            if level > 0:
                self.up.append(Upsample(c))
        self.norm_out = norm(c)
        self.conv_out = conv(c, out_channels or channels, scale=1e-10)

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor | None = None) -> Tensor:
        check_size(x.shape[-2:], self.levels)
        x = x.to(self.conv_in.weight.dtype)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return self._forward(x, timestep, y).to(x.dtype)

    def _forward(self, x: Tensor, timestep: Tensor, y: Tensor | None) -> Tensor:
        time = self.time2(F.silu(self.time1(time_embedding(timestep, self.width).to(x.dtype))))  # [B, 4 width]
        if self.label is not None and y is not None:
            time = time + self.label(y)
        time = F.silu(time)

        h = self.conv_in(x)
        skips = [h]
        for layer in self.down:
            h = self._run(layer, h, time) if isinstance(layer, Stage) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = self._run(layer, h, time)
        for layer in self.up:
            if isinstance(layer, Stage):
                h = self._run(layer, torch.cat([h, skips.pop()], dim=1), time)
            else:
                h = layer(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out

    def _run(self, stage: nn.Module, h: Tensor, time: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            out: Tensor = checkpoint(stage, h, time, use_reentrant=False)
        else:
            out = stage(h, time)
        return out

"""The paper's U-Net (Appendix B and the official code). This module knows nothing about diffusion.

Shapes: images are [B, C, H, W], and the time embedding is [B, 4 width].
"""

import functools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddpm import kernels
from ddpm.details import Details
from ddpm.errors import InputError, check_size
from ddpm.warp import NUMBERS

CHANNEL_STEP = 32  # the channels of every level are a multiple of this
PAPER = Details()


def _xavier(layer: nn.Conv2d | nn.Linear, scale: float = 1.0) -> None:
    """Initialise the weight uniformly with variance scale / fan_avg and the bias with 0 (official code)."""
    nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(scale))
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)


def conv(c_in: int, c_out: int, kernel: int = 3, scale: float = 1.0) -> nn.Conv2d:
    """A convolution with the official code's initialisation; with `scale` 1e-10 its output starts near 0."""
    layer = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)
    _xavier(layer, scale)
    return layer


def linear(c_in: int, c_out: int) -> nn.Linear:
    """A dense layer with the official code's initialisation."""
    layer = nn.Linear(c_in, c_out)
    _xavier(layer)
    return layer


def groups_of(width: int) -> int:
    """The number of groups of every norm in a network: 32, or fewer so that each has 4 channels at the first level.

    A group of one channel would remove what the time embedding adds to the channel. EDM has the same rule, and the
    groups of the paper's networks have at least 4 channels.

    >>> groups_of(128), groups_of(32)
    (32, 8)
    """
    return min(32, width // 4)


def norm(channels: int, groups: int, eps: float = 1e-6) -> nn.GroupNorm:
    """GroupNorm. Raises InputError if the groups do not divide the channels."""
    if channels % groups:
        raise InputError(f"norm_groups {groups}: want a divisor of {channels}, the channels of a norm")
    return nn.GroupNorm(groups, channels, eps=eps)


def convolve(
    layer: nn.Conv2d, x: Tensor, norm: nn.GroupNorm | None = None, swish: bool = False, dropout: float = 0.0,
    add: Tensor | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """layer(dropout(swish(norm(x)))) + add + residual, [B, c_out, H, W]; x [B, c_in, H, W], add [B or 1, c_out].

    `ddpm.kernels` computes it if the machine and the layers allow.
    """
    if kernels.usable(x, layer, norm, add, residual):
        return kernels.convolution(x, layer, norm, swish, dropout, add, residual)
    if norm is not None:
        x = norm(x)
    if swish:
        x = F.silu(x)
    x = layer(F.dropout(x, dropout))
    if add is not None:
        x = x + add[:, :, None, None]
    return x if residual is None else residual + x


def exact_convolutions() -> AbstractContextManager[None]:
    """A context without TensorFloat-32 in CUDA's float32 convolutions: a seed then gives one image on every device."""
    cudnn = torch.backends.cudnn
    unchanged = {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
    return cudnn.flags(**unchanged, allow_tf32=False)


def time_embedding(
    timestep: Tensor, width: int, dtype: torch.dtype = torch.float32, shift: float = 1.0, scale: float = 1.0
) -> Tensor:
    """Sinusoids of the integer timestep [B]: [B, width], sines and then cosines, at 1 .. 1e-4 radians per level.

    shift and scale are `frequency_shift` and `timestep_scale` of `Details`.

    >>> time_embedding(torch.tensor([0]), 4).tolist()
    [[0.0, 0.0, 1.0, 1.0]]
    """
    half = width // 2
    frequency = torch.exp(-math.log(1e4) / (half - shift) * torch.arange(half, dtype=dtype, device=timestep.device))
    angle = (timestep.to(dtype) * scale)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class ResidualBlock(nn.Module):
    """Norm, swish, conv, + time, norm, swish, dropout, conv, + input (through a 1x1 conv if the channels change).

    With `scale_shift` of `Details`, the time embedding is not added: it scales and shifts the second norm.
    """

    def __init__(
        self, c_in: int, c_out: int, c_time: int, dropout: float, groups: int, details: Details = PAPER
    ) -> None:
        super().__init__()
        self.scale_shift = details.scale_shift
        self.norm1, self.conv1 = norm(c_in, groups, details.norm_eps), conv(c_in, c_out)
        self.time = linear(c_time, 2 * c_out if self.scale_shift else c_out)
        self.norm2, self.conv2 = norm(c_out, groups, details.norm_eps), conv(c_out, c_out, scale=1e-10)
        self.dropout = dropout
        self.shortcut = conv(c_in, c_out, kernel=1) if c_in != c_out else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, c_in, H, W] and time [B, c_time], which has passed its swish: [B, c_out, H, W]."""
        h = convolve(self.conv1, x, self.norm1, swish=True, add=None if self.scale_shift else self.time(time))
        shortcut = x if self.shortcut is None else convolve(self.shortcut, x)
        dropout = self.dropout if self.training else 0.0
        if self.scale_shift:
            scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)
            h = F.silu(self.norm2(h) * (1 + scale) + shift)
            return convolve(self.conv2, F.dropout(h, dropout), residual=shortcut)
        return convolve(self.conv2, h, self.norm2, swish=True, dropout=dropout, residual=shortcut)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T C^-0.5) v, each [B, N, C]."""
    if q.device.type == "cpu" and q.shape[1] <= 1024:  # PyTorch's fused attention is twice as slow in the backward pass
        weights: Tensor = (q @ k.transpose(1, 2) * q.shape[2] ** -0.5).softmax(dim=2)
        return weights.to(v.dtype) @ v
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]


class Attention(nn.Module):
    """Self-attention over the H W positions with scale C^-0.5, where C is the channels of a head, + input."""

    def __init__(self, channels: int, groups: int, details: Details = PAPER) -> None:
        super().__init__()
        self.heads = details.heads_of(channels)
        self.norm = norm(channels, groups, details.norm_eps)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        for part in self.qkv.weight.data.chunk(3):  # q, k and v are three layers in the official code
            nn.init.xavier_uniform_(part)
        nn.init.zeros_(self.qkv.bias)  # type: ignore[arg-type]
        self.out = conv(channels, channels, kernel=1, scale=1e-10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        qkv = convolve(self.qkv, x, self.norm).flatten(2).transpose(1, 2)  # [B, HW, 3C]
        B, heads = x.shape[0], self.heads  # len(x) would fix the batch of an exported graph
        if heads > 1:  # each head is one more image of the batch
            N, C = qkv.shape[1], x.shape[1] // heads
            qkv = qkv.reshape(B, N, 3, heads, C).permute(0, 3, 1, 2, 4).reshape(B * heads, N, 3 * C)
        h = attend(*qkv.chunk(3, dim=-1))
        if heads > 1:
            h = h.reshape(B, heads, N, C).transpose(1, 2).flatten(2)
        return convolve(self.out, h.transpose(1, 2).reshape(*x.shape), residual=x)


class Downsample(nn.Module):
    """A 3x3 conv of stride 2: [B, c_in, H, W] to [B, c_out, H/2, W/2].

    It is padded at the right and the bottom only, or with `even_padding` at all four sides.
    """

    def __init__(self, c_in: int, c_out: int, even_padding: bool = False) -> None:
        super().__init__()
        self.even_padding = even_padding
        self.conv = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1 if even_padding else 0)
        _xavier(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        if kernels.usable(x, self.conv, halving=True) and not torch.is_autocast_enabled("cpu"):
            # The kernels compute four times as many outputs, each at a quarter of the cost.
            all_outputs = kernels.convolution(x, self.conv)
            first = 0 if self.even_padding else 1
            return all_outputs[:, :, first::2, first::2].contiguous(memory_format=torch.channels_last)
        out: Tensor = self.conv(x if self.even_padding else F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Nearest-neighbour upsampling and then a 3x3 conv: [B, C, H, W] to [B, C, 2H, 2W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return convolve(self.conv, F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.Module):
    """A residual block, with attention after it if `attention` is set."""

    def __init__(
        self, c_in: int, c_out: int, c_time: int, dropout: float, attention: bool, groups: int, details: Details = PAPER
    ) -> None:
        super().__init__()
        self.block = ResidualBlock(c_in, c_out, c_time, dropout, groups, details)
        self.attention = Attention(c_out, groups, details) if attention else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        out: Tensor = self.attention(self.block(x, time))
        return out


class Patches(nn.Module):
    """A 3x3 conv whose output channels are then arranged as 2x2 patches: [B, c_in, H/2, W/2] to [B, c_out, H, W]."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv = conv(c_in, 4 * c_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(convolve(self.conv, x), 2)


@functools.cache
def fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("amx_bf16"))


class UNet(nn.Module):
    """(x [B, C, H, W], timestep int64 [B], or [1] for all, y int64 [B] or None) -> [B, out_channels, H, W].

    y is the class of each image, 0 .. num_classes - 1, or -1 for an image without class; None is no class for any
    image. In training, warp tells how each image was warped (`ddpm.warp`): float32 [B, 9], where zeros and None are no
    warp. condition is [B, condition_channels, H, W], or None for a network without condition.

    channels                C of the images
    out_channels            C, or 2C if the variance is learned; None means C
    width                   channels of the first level, a multiple of 32
    channel_multipliers     channels of each level divided by `width`; every level but the last halves H and W
    num_res_blocks          residual blocks per level on the way down; there is one more per level on the way up
    attention_levels        levels, counted from 0, with attention after every block. There is always attention between
                            the two middle blocks
    dropout                 its probability in every residual block
    num_classes             number of class labels, 0 for none
    warped                  True if it can be told of warps. This adds a linear map of them to the time embedding, which
                            is 0 at first
    patch                   2 starts the levels at half of H and W, and puts a level of 32 channels at full size around
                            them. This level has no blocks on the way down and one block on the way up, which sees x
                            beside the inner levels' output for each 2x2 patch. The network costs about a quarter, and
                            the patches do not show
    gradient_checkpointing  keep only the inputs of the blocks and compute the rest again in the backward pass, which
                            saves memory and costs time
    always_labelled         it was never trained without a label, so it refuses to be called without one
    bf16                    compute in bfloat16 (autocast); the weights and the result stay float32. None: do so on
                            devices with `fast_bf16`, wherever the network is
    details                 where the network of another package differs from the paper's
    condition_channels      channels of a condition on an image, which is concatenated to x (Saharia et al. 2022); 0 for
                            a network without condition

    H and W may differ. Each must be divisible by patch 2^(levels - 1); otherwise InputError names the nearest sizes
    that are.

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
        channel_multipliers: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attention_levels: Sequence[int] = (1,),
        dropout: float = 0.0,
        num_classes: int = 0,
        patch: Literal[1, 2] = 1,
        gradient_checkpointing: bool = False,
        bf16: bool | None = False,
        always_labelled: bool = False,
        details: Details = PAPER,
        warped: bool = False,
        condition_channels: int = 0,
    ) -> None:
        super().__init__()
        if width % CHANNEL_STEP:
            raise InputError(f"width {width}: want a multiple of {CHANNEL_STEP}")
        self.width, self.levels = width, len(channel_multipliers) + patch - 1
        self.gradient_checkpointing, self.bf16, self.details = gradient_checkpointing, bf16, details
        self.always_labelled, self.condition_channels = always_labelled, condition_channels
        c_time = 4 * width
        self.time1, self.time2 = linear(width, c_time), linear(c_time, c_time)
        self.label: nn.Embedding | None = None
        if num_classes:  # N(0, 1), as in nn.Embedding, which imports torch._dynamo on the meta device and takes seconds
            weight = torch.randn(num_classes, c_time)
            self.label = nn.Embedding.from_pretrained(weight, freeze=False)  # type: ignore[no-untyped-call]
        self.warp = nn.Parameter(torch.zeros(c_time, NUMBERS)) if warped else None

        def stage(c_in: int, c_out: int, level: int, attention: bool = False) -> Stage:
            groups = inner_groups if level >= 0 else groups_of(CHANNEL_STEP)
            return Stage(c_in, c_out, c_time, dropout, attention or level in attention_levels, groups, details)

        inner_groups = details.norm_groups or groups_of(width)

        outer = width if patch == 1 else CHANNEL_STEP
        self.conv_in = conv(channels + condition_channels, outer)
        skips = [outer]
        self.down = nn.ModuleList()
        if patch > 1:
            self.down.append(Downsample(outer, width, details.even_padding))
            skips.append(width)
        c = width
        for level, multiplier in enumerate(channel_multipliers):
            for _ in range(num_res_blocks):
                self.down.append(stage(c, c := width * multiplier, level))
                skips.append(c)
            if level < len(channel_multipliers) - 1:
                self.down.append(Downsample(c, c, details.even_padding))
                skips.append(c)
        bottom = len(channel_multipliers)
        self.middle = nn.ModuleList([stage(c, c, bottom, details.middle_attention), stage(c, c, bottom)])
        self.up = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(channel_multipliers))):
            for _ in range(num_res_blocks + 1):
                self.up.append(stage(c + skips.pop(), c := width * multiplier, level))
            if level > 0:
                self.up.append(Upsample(c))
        if patch > 1:
            self.up.append(Patches(c, outer))
            self.up.append(stage(outer + skips.pop(), c := outer, level=-1))
        self.norm_out = norm(c, inner_groups if patch == 1 else groups_of(outer), details.norm_eps)
        self.conv_out = conv(c, out_channels or channels, scale=1e-10)

    @property
    def computes(self) -> torch.dtype:
        """The dtype in which convolutions are computed."""
        weight = self.conv_in.weight
        in_bf16 = fast_bf16(weight.device) if self.bf16 is None else self.bf16
        return torch.bfloat16 if in_bf16 else weight.dtype

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor | None = None,
        warp: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        check_size(x.shape[-2:], self.levels)
        if (told := 0 if condition is None else condition.shape[1]) != self.condition_channels:
            raise InputError(f"condition: {told} channels; want {self.condition_channels or 'no condition'}")
        x = x.to(self.conv_in.weight.dtype)
        if condition is not None:
            x = torch.cat([x, condition.to(x)], dim=1)
        bf16 = self.computes == torch.bfloat16
        exact = x.device.type == "cuda" and not bf16
        with (
            torch.autocast(x.device.type, torch.bfloat16, enabled=bf16),
            exact_convolutions() if exact else nullcontext(),
        ):
            return self._forward(x, timestep, y, warp).to(x.dtype)

    def _forward(self, x: Tensor, timestep: Tensor, y: Tensor | None, warp: Tensor | None) -> Tensor:
        if y is None and self.always_labelled:
            raise InputError("class: this network never saw an image without its label; want a class")
        at_least_float32 = torch.promote_types(x.dtype, torch.float32)
        shift, scale = self.details.frequency_shift, self.details.timestep_scale
        embedding = time_embedding(timestep, self.width, at_least_float32, shift, scale)
        time = self.time2(F.silu(self.time1(embedding.to(x.dtype))))  # [B, 4 width]
        if y is not None:
            if self.label is None:
                raise InputError("y: this network has no classes; want None")
            time = time + torch.where(y[:, None] >= 0, self.label(y.clamp(min=0)), 0)
        if warp is not None:
            if self.warp is None:
                raise InputError("warp: this network was not trained with augment; want None")
            time = time + F.linear(warp.to(x.dtype), self.warp)
        time = F.silu(time)

        h = convolve(self.conv_in, x)
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
        return convolve(self.conv_out, h, self.norm_out, swish=True)

    def _run(self, stage: nn.Module, h: Tensor, time: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            out: Tensor = checkpoint(stage, h, time, use_reentrant=False)
        else:
            out = stage(h, time)
        return out

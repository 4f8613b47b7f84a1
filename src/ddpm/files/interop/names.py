"""Names and shapes of the same weights in our network, in diffusers and in ermongroup/ddim."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ddpm.errors import InputError
from ddpm.presets import Preset, build

Package = Literal["diffusers", "ddim"]
# Ours: (diffusers, ddim). Where there are three, ours is their concatenation. `level` is 0 at full size, `up` at the
# bottom; `n` is the number within a level.
NAMES: dict[str, tuple[str, str]] = {
    "time1": ("time_embedding.linear_1", "temb.dense.0"),
    "time2": ("time_embedding.linear_2", "temb.dense.1"),
    "label": ("class_embedding", "label"),  # ddim has none
    "conv_in": ("conv_in", "conv_in"),
    "norm_out": ("conv_norm_out", "norm_out"),
    "conv_out": ("conv_out", "conv_out"),
    # where a part of the network lies
    "down.block": ("down_blocks.{level}.resnets.{n}", "down.{level}.block.{n}"),
    "down.attention": ("down_blocks.{level}.attentions.{n}", "down.{level}.attn.{n}"),
    "down.conv": ("down_blocks.{level}.downsamplers.0.conv", "down.{level}.downsample.conv"),
    "middle.block": ("mid_block.resnets.{n}", "mid.block_{after}"),
    "middle.attention": ("mid_block.attentions.{n}", "mid.attn_{after}"),
    "up.block": ("up_blocks.{up}.resnets.{n}", "up.{level}.block.{n}"),
    "up.attention": ("up_blocks.{up}.attentions.{n}", "up.{level}.attn.{n}"),
    "up.conv": ("up_blocks.{up}.upsamplers.0.conv", "up.{level}.upsample.conv"),
    # the layers of a part
    "block.norm1": ("norm1", "norm1"),
    "block.conv1": ("conv1", "conv1"),
    "block.time": ("time_emb_proj", "temb_proj"),
    "block.norm2": ("norm2", "norm2"),
    "block.conv2": ("conv2", "conv2"),
    "block.shortcut": ("conv_shortcut", "nin_shortcut"),
    "attention.norm": ("group_norm", "norm"),
    "attention.qkv": ("to_q to_k to_v", "q k v"),
    "attention.out": ("to_out.0", "proj_out"),
}
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What diffusers called the layers of attention at first, as the published files still do."""


def their_names(key: str, preset: Preset, package: Package) -> list[str]:
    """What a package calls the weights that our network keeps as `key`; three names where ours are three in one.

    >>> from ddpm.presets import PRESETS
    >>> cifar10 = PRESETS["cifar10"]
    >>> their_names("up.12.block.norm1.bias", cifar10, "diffusers")
    ['up_blocks.3.resnets.0.norm1.bias']
    >>> their_names("up.12.block.norm1.bias", cifar10, "ddim")
    ['up.0.block.0.norm1.bias']
    >>> their_names("down.3.attention.qkv.weight", cifar10, "ddim")
    ['down.1.attn.0.q.weight', 'down.1.attn.0.k.weight', 'down.1.attn.0.v.weight']
    """
    column = get_args(Package).index(package)
    *path, leaf = key.split(".")
    if path[0] not in ("down", "middle", "up"):
        return [f"{NAMES[path[0]][column]}.{leaf}"]
    part, index, kind, *layer = path
    each = {"down": preset.num_res_blocks + 1, "middle": 2, "up": preset.num_res_blocks + 2}[
        part
    ]  # a level's layers, its sampler last
    level, n = divmod(int(index), each)
    up = level
    if part == "up":
        level = len(preset.channel_multipliers) - 1 - up
    place = NAMES[f"{part}.{kind}"][column].format(level=level, up=up, n=n, after=n + 1)
    inner = NAMES[f"{kind}.{layer[0]}"][column].split() if layer else []
    return [f"{place}.{name}.{leaf}" for name in inner] or [f"{place}.{leaf}"]


def _is_matrix(key: str, package: Package) -> bool:
    """Whether the package keeps our 1x1 convolution `key` as a dense layer."""
    return package == "diffusers" and ".attention." in key and key.endswith(("qkv.weight", "out.weight"))


def to_theirs(state: Mapping[str, Tensor], preset: Preset, package: Package) -> dict[str, Tensor]:
    """Our state dict under a package's names and in its shapes; the values are shared, not copied.

    >>> from ddpm.presets import PRESETS
    >>> with torch.device("meta"):
    ...     state = build(PRESETS["cifar10"]).network.state_dict()
    >>> theirs = to_theirs(state, PRESETS["cifar10"], "diffusers")
    >>> len(state), len(theirs), list(theirs["mid_block.attentions.0.to_k.weight"].shape)
    (304, 328, [256, 256])
    """
    theirs: dict[str, Tensor] = {}
    for key, value in state.items():
        called = their_names(key, preset, package)
        if _is_matrix(key, package):
            value = value.flatten(1)
        theirs.update(zip(called, value.chunk(len(called)), strict=True))
    return theirs


def to_ours(given: Mapping[str, Tensor], preset: Preset, package: Package) -> dict[str, Tensor]:
    """`to_theirs` mirrored: float32 tensors for the preset's network.

    Raises InputError that names weights which are missing, of another shape, or too many.
    """
    left, ours = dict(given), {}
    for key, shape in shapes(preset).items():
        called, parts = their_names(key, preset, package), []
        wanted = [shape[0] // len(called), *shape[1:]]
        if _is_matrix(key, package):
            wanted = wanted[:2]
        for name in called:
            if name not in left:
                raise InputError(f"{name} is missing; want {wanted}")
            parts.append(left.pop(name).float())
            if list(parts[-1].shape) != wanted:
                raise InputError(f"{name} of shape {list(parts[-1].shape)}: want {wanted}")
        ours[key] = (torch.cat(parts) if len(parts) > 1 else parts[0]).reshape(shape)
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise InputError(f"{min(left)}{more}: not of this network; want {len(given) - len(left)} names without it")
    return ours


@functools.lru_cache(maxsize=4)
def _network(preset: Preset) -> nn.Module:
    """The preset's network without memory for its weights."""
    with torch.device("meta"):
        network = build(preset).network
    assert isinstance(network, nn.Module)
    return network


def shapes(preset: Preset) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in _network(preset).state_dict().items()}


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an InputError begin with the path that it is of."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error.__cause__

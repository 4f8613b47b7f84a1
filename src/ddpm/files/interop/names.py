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
# Our name: (the name in diffusers, the name in ddim). Three names: our weights are the concatenation of theirs. {level}
# is 0 at full size, {up} is 0 at the smallest size, and {n} is the number within a level.
NAMES: dict[str, tuple[str, str]] = {
    "time1": ("time_embedding.linear_1", "temb.dense.0"),
    "time2": ("time_embedding.linear_2", "temb.dense.1"),
    "label": ("class_embedding", "label"),  # not in ddim
    "conv_in": ("conv_in", "conv_in"),
    "norm_out": ("conv_norm_out", "norm_out"),
    "conv_out": ("conv_out", "conv_out"),
    # the parts of the network
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
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""The first names of attention's layers in diffusers, which the published files still have -> those of today."""


def names_in(key: str, preset: Preset, package: Package) -> list[str]:
    """The name in a package of the weights that our network calls `key`; for query, key and value, three names.

    >>> from ddpm.presets import PRESETS
    >>> cifar10 = PRESETS["cifar10"]
    >>> names_in("up.12.block.norm1.bias", cifar10, "diffusers")
    ['up_blocks.3.resnets.0.norm1.bias']
    >>> names_in("up.12.block.norm1.bias", cifar10, "ddim")
    ['up.0.block.0.norm1.bias']
    >>> names_in("down.3.attention.qkv.weight", cifar10, "ddim")
    ['down.1.attn.0.q.weight', 'down.1.attn.0.k.weight', 'down.1.attn.0.v.weight']
    """
    column = get_args(Package).index(package)
    *path, leaf = key.split(".")
    if path[0] not in ("down", "middle", "up"):
        return [f"{NAMES[path[0]][column]}.{leaf}"]
    part, index, kind, *layer = path
    # the number of layers of a level; the last one of a level on the way down or up changes the size
    layers = {"down": preset.num_res_blocks + 1, "middle": 2, "up": preset.num_res_blocks + 2}[part]
    level, n = divmod(int(index), layers)
    up = level
    if part == "up":
        level = len(preset.channel_multipliers) - 1 - up
    place = NAMES[f"{part}.{kind}"][column].format(level=level, up=up, n=n, after=n + 1)
    inner = NAMES[f"{kind}.{layer[0]}"][column].split() if layer else []
    return [f"{place}.{name}.{leaf}" for name in inner] or [f"{place}.{leaf}"]


def _is_matrix(key: str, package: Package) -> bool:
    """Whether our 1x1 convolution `key` is a dense layer in the package."""
    return package == "diffusers" and ".attention." in key and key.endswith(("qkv.weight", "out.weight"))


def export_state(state: Mapping[str, Tensor], preset: Preset, package: Package) -> dict[str, Tensor]:
    """Our state dict with a package's names and shapes. The values are shared, not copied.

    >>> from ddpm.presets import PRESETS
    >>> with torch.device("meta"):
    ...     state = build(PRESETS["cifar10"]).network.state_dict()
    >>> theirs = export_state(state, PRESETS["cifar10"], "diffusers")
    >>> len(state), len(theirs), list(theirs["mid_block.attentions.0.to_k.weight"].shape)
    (304, 328, [256, 256])
    """
    exported: dict[str, Tensor] = {}
    for key, value in state.items():
        names = names_in(key, preset, package)
        if _is_matrix(key, package):
            value = value.flatten(1)
        exported.update(zip(names, value.chunk(len(names)), strict=True))
    return exported


def import_state(state: Mapping[str, Tensor], preset: Preset, package: Package) -> dict[str, Tensor]:
    """The reverse of `export_state`: the state dict of the preset's network, float32, from a package's state dict.

    Raises InputError, which names the weights, for missing weights, weights of another shape, and unknown weights.
    """
    unused, imported = dict(state), {}
    for key, shape in shapes(preset).items():
        names, parts = names_in(key, preset, package), []
        wanted = [shape[0] // len(names), *shape[1:]]
        if _is_matrix(key, package):
            wanted = wanted[:2]
        for name in names:
            if name not in unused:
                raise InputError(f"{name} is missing; want {wanted}")
            parts.append(unused.pop(name).float())
            if list(parts[-1].shape) != wanted:
                raise InputError(f"{name} of shape {list(parts[-1].shape)}: want {wanted}")
        imported[key] = (torch.cat(parts) if len(parts) > 1 else parts[0]).reshape(shape)
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        known = len(state) - len(unused)
        raise InputError(f"{min(unused)}{more}: not of this network; want only its {known} names")
    return imported


@functools.lru_cache(maxsize=4)
def _network(preset: Preset) -> nn.Module:
    """The preset's network on the meta device, which takes no memory."""
    with torch.device("meta"):
        network = build(preset).network
    assert isinstance(network, nn.Module)
    return network


def shapes(preset: Preset) -> dict[str, torch.Size]:
    """The names and shapes of the weights of the preset's network."""
    return {name: value.shape for name, value in _network(preset).state_dict().items()}


@contextmanager
def errors_named(path: Path) -> Iterator[None]:
    """Put `path` in front of the message of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error.__cause__

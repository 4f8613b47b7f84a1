"""Names and shapes of the same weights in our network and in those of other packages."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ddpm.errors import InputError
from ddpm.presets import Preset, build

Package = Literal["diffusers", "ddim", "improved_diffusion", "pytorch_ddpm"]
"""diffusers, ermongroup/ddim, openai/improved-diffusion, w86763777/pytorch-ddpm."""
# Our name: its names in the packages, in their order. Three names: our weights are the concatenation of theirs.
# {level} is 0 at full size, {up} is 0 at the smallest size, and {n} is the number within a level. {index} counts all
# layers on the way down or up, and {stage} only those with blocks; {last} is the place after block and attention.
NAMES: dict[str, tuple[str, str, str, str]] = {
    "time1": ("time_embedding.linear_1", "temb.dense.0", "time_embed.0", "time_embedding.timembedding.1"),
    "time2": ("time_embedding.linear_2", "temb.dense.1", "time_embed.2", "time_embedding.timembedding.3"),
    "label": ("class_embedding", "label", "label_emb", "label"),  # not in ddim and pytorch_ddpm
    "conv_in": ("conv_in", "conv_in", "input_blocks.0.0", "head"),
    "norm_out": ("conv_norm_out", "norm_out", "out.0", "tail.0"),
    "conv_out": ("conv_out", "conv_out", "out.2", "tail.2"),
    # the parts of the network
    "down.block": ("down_blocks.{level}.resnets.{n}", "down.{level}.block.{n}", "input_blocks.{next}.0",
                   "downblocks.{index}"),
    "down.attention": ("down_blocks.{level}.attentions.{n}", "down.{level}.attn.{n}", "input_blocks.{next}.1",
                       "downblocks.{index}.attn"),
    "down.conv": ("down_blocks.{level}.downsamplers.0.conv", "down.{level}.downsample.conv", "input_blocks.{next}.0.op",
                  "downblocks.{index}.main"),
    "middle.block": ("mid_block.resnets.{n}", "mid.block_{next}", "middle_block.{twice}", "middleblocks.{index}"),
    "middle.attention": ("mid_block.attentions.{n}", "mid.attn_{next}", "middle_block.1", "middleblocks.{index}.attn"),
    "up.block": ("up_blocks.{up}.resnets.{n}", "up.{level}.block.{n}", "output_blocks.{stage}.0", "upblocks.{index}"),
    "up.attention": ("up_blocks.{up}.attentions.{n}", "up.{level}.attn.{n}", "output_blocks.{stage}.1",
                     "upblocks.{index}.attn"),
    "up.conv": ("up_blocks.{up}.upsamplers.0.conv", "up.{level}.upsample.conv", "output_blocks.{stage}.{last}.conv",
                "upblocks.{index}.main"),
    # the layers of a part
    "block.norm1": ("norm1", "norm1", "in_layers.0", "block1.0"),
    "block.conv1": ("conv1", "conv1", "in_layers.2", "block1.2"),
    "block.time": ("time_emb_proj", "temb_proj", "emb_layers.1", "temb_proj.1"),
    "block.norm2": ("norm2", "norm2", "out_layers.0", "block2.0"),
    "block.conv2": ("conv2", "conv2", "out_layers.3", "block2.3"),
    "block.shortcut": ("conv_shortcut", "nin_shortcut", "skip_connection", "shortcut"),
    "attention.norm": ("group_norm", "norm", "norm", "group_norm"),
    "attention.qkv": ("to_q to_k to_v", "q k v", "qkv", "proj_q proj_k proj_v"),
    "attention.out": ("to_out.0", "proj_out", "proj_out", "proj"),
}  # fmt: skip
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
    i = int(index)
    level, n = divmod(i, layers)
    up = level
    if part == "up":
        level = len(preset.channel_multipliers) - 1 - up
    stage = i - up - (kind == "conv")  # there is one change of size per level
    last = 2 if level in preset.attention_levels else 1
    place = NAMES[f"{part}.{kind}"][column].format(
        level=level, up=up, n=n, index=i, next=i + 1, twice=2 * i, stage=stage, last=last
    )
    inner = NAMES[f"{kind}.{layer[0]}"][column].split() if layer else []
    return [f"{place}.{name}.{leaf}" for name in inner] or [f"{place}.{leaf}"]


def _is_projection(key: str) -> bool:
    return ".attention." in key and key.endswith(("qkv.weight", "out.weight"))


def _arrange(key: str, value: Tensor, preset: Preset, package: Package) -> Tensor:
    """Our weights `key` in the shape and the order of the package."""
    if key == "time1.weight":  # its inputs are our sines and then cosines
        sines, cosines = value.chunk(2, dim=1)
        if package == "improved_diffusion":
            return torch.cat([cosines, sines], dim=1)
        if package == "pytorch_ddpm":
            return torch.stack([sines, cosines], dim=2).flatten(1)
    if package == "improved_diffusion" and ".attention.qkv." in key:  # query, key and value of each head in turn
        heads = preset.details.heads_of(len(value) // 3)
        value = value.reshape(3, heads, -1, *value.shape[1:]).transpose(0, 1).flatten(0, 2)
    if _is_projection(key):  # our 1x1 convolution is a dense layer in diffusers, and has one dimension in OpenAI's code
        return value.flatten({"diffusers": 1, "improved_diffusion": 2}.get(package, 3))
    return value


def _arrange_back(key: str, value: Tensor, preset: Preset, package: Package) -> Tensor:
    """The reverse of `_arrange`, but for the shape."""
    if key == "time1.weight":
        if package == "improved_diffusion":
            cosines, sines = value.chunk(2, dim=1)
            return torch.cat([sines, cosines], dim=1)
        if package == "pytorch_ddpm":
            return torch.cat([value[:, ::2], value[:, 1::2]], dim=1)
    if package == "improved_diffusion" and ".attention.qkv." in key:
        heads = preset.details.heads_of(len(value) // 3)
        return value.reshape(heads, 3, -1, *value.shape[1:]).transpose(0, 1).flatten(0, 2)
    return value


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
        exported.update(zip(names, _arrange(key, value, preset, package).chunk(len(names)), strict=True))
    return exported


def import_state(state: Mapping[str, Tensor], preset: Preset, package: Package) -> dict[str, Tensor]:
    """The reverse of `export_state`: the state dict of the preset's network, float32, from a package's state dict.

    Raises InputError, which names the weights, for missing weights, weights of another shape, and unknown weights.
    """
    unused, imported = dict(state), {}
    for key, shape in shapes(preset).items():
        names, parts = names_in(key, preset, package), []
        wanted = [shape[0] // len(names), *shape[1:]]
        if _is_projection(key):
            wanted = wanted[: {"diffusers": 2, "improved_diffusion": 3}.get(package, 4)]
        for name in names:
            if name not in unused:
                raise InputError(f"{name} is missing; want {wanted}")
            parts.append(unused.pop(name).float())
            if list(parts[-1].shape) != wanted:
                raise InputError(f"{name} of shape {list(parts[-1].shape)}: want {wanted}")
        value = torch.cat(parts) if len(parts) > 1 else parts[0]
        imported[key] = _arrange_back(key, value, preset, package).reshape(shape)
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

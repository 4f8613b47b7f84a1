"""Weights of openai/improved-diffusion and w86763777/pytorch-ddpm, which number the layers of all levels in one row."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ddpm.details import Details
from ddpm.errors import InputError
from ddpm.files.interop.ddim import completed, norm_groups
from ddpm.presets import Preset

_OPENAI = Preset(
    channels=3, predict="eps", variance="learned_range", loss="hybrid", schedule="cosine", num_timesteps=4000,
    num_res_blocks=3, attention_resolutions=(16, 8),
    details=Details(
        norm_eps=1e-5, heads=4, scale_shift=True, even_padding=True, frequency_shift=0, timestep_scale=0.25
    ),
)  # fmt: skip
_64 = replace(_OPENAI, size=(64, 64), channel_multipliers=(1, 2, 3, 4), dropout=0.0)
_1000 = tuple(map(str, range(1000)))
PUBLISHED = (
    replace(_OPENAI, size=(32, 32), channel_multipliers=(1, 2, 2, 2), dropout=0.3),  # CIFAR-10
    _64,  # ImageNet
    replace(
        _64, width=192, classes=True, class_names=_1000, label_dropout=0.0,
        details=replace(_64.details, timestep_scale=1.0),
    ),
    replace(  # LSUN bedrooms
        _OPENAI, size=(256, 256), channel_multipliers=(1, 1, 2, 2, 4, 4), dropout=0.0, num_res_blocks=2,
        attention_resolutions=(16,), schedule="linear", num_timesteps=1000,
        details=Details(norm_eps=1e-5, even_padding=True, frequency_shift=0),
    ),
)  # fmt: skip
"""The networks that openai/improved-diffusion published, by the flags in its README. The files hold weights only."""


def infer_improved_diffusion(state: Mapping[str, Tensor]) -> Preset:
    """The preset of the published network that has these weights. Raises InputError for other networks.

    Heads, T and the schedule do not follow from weights, so a network that was not published cannot be inferred.
    """
    levels = _levels(state, "input_blocks.{}.0", 1, ".in_layers.2.weight", ".op.weight", "input_blocks.{}.1.qkv.weight")
    label, conv_in = state.get("label_emb.weight"), state.get("input_blocks.0.0.weight")
    if conv_in is None or conv_in.ndim != 4:
        raise InputError("not weights of improved-diffusion's network; want input_blocks.0.0.weight and so on")
    if conv_in.shape[1] != 3:
        raise InputError(f"input_blocks.0.0.weight: takes {conv_in.shape[1]} channels; want 3, not an upsampler's 6")
    time = state.get("input_blocks.1.0.emb_layers.1.weight")
    for preset in PUBLISHED:
        shape = [[(preset.width * m, level in preset.attention_levels)] * preset.num_res_blocks
                 for level, m in enumerate(preset.channel_multipliers)]  # fmt: skip
        rows = preset.width * (2 if preset.details.scale_shift else 1)
        same_time = time is not None and len(time) == rows
        if levels == shape and len(preset.class_names) == (0 if label is None else len(label)) and same_time:
            return preset
    raise InputError(
        "not one of the networks that improved-diffusion published (CIFAR-10, ImageNet 64x64 with and without classes, "
        "LSUN bedrooms), and the file does not say heads, levels and schedule; want one of these"
    )


def fit_improved_diffusion(preset: Preset, state: Mapping[str, Tensor]) -> Preset:
    """The preset itself. Raises InputError if it has no details: they are not the paper's in this package."""
    if preset.details == Details():
        raise InputError(
            "preset: does not say the heads of this network; want no preset, or in Python one with details"
        )
    return preset


TIME, TABLE = "time_embedding.timembedding.1.weight", "time_embedding.timembedding.0.weight"
"""Weights of pytorch-ddpm's time embedding, and its table of sinusoids."""


def infer_pytorch_ddpm(state: Mapping[str, Tensor]) -> Preset:
    """The preset of w86763777/pytorch-ddpm's network with these weights.

    The size is a guess, as for ddim: the first level with attention is taken for 16x16. T is that of the file's table
    of sinusoids. The other settings are those of the first of PRESETS with this network, or else the defaults.

    Raises InputError if the size is not known, or if the table is not the one of the code.
    """
    levels = _levels(state, "downblocks.{}", 0, ".block1.2.weight", ".main.weight", "downblocks.{}.attn.proj_q.weight")
    with_attention = [number for number, blocks in enumerate(levels) if blocks and blocks[0][1]]
    if "head.weight" not in state or state["head.weight"].ndim != 4 or not all(levels):
        raise InputError("not weights of pytorch-ddpm's network; want head.weight, downblocks.0.main.weight and so on")
    if not with_attention:
        raise InputError("no attention on the way down, so the size is not known; want a preset, which has it")
    (width, channels), side = state["head.weight"].shape[:2], 16 << with_attention[0]
    network: dict[str, Any] = {
        "size": (side, side), "channels": channels, "width": width, "num_res_blocks": len(levels[0]), "patch": 1,
        "channel_multipliers": tuple(blocks[0][0] // width for blocks in levels),
        "attention_resolutions": tuple(side >> number for number in with_attention),
    }  # fmt: skip
    return fit_pytorch_ddpm(completed(network), state)


def fit_pytorch_ddpm(preset: Preset, state: Mapping[str, Tensor]) -> Preset:
    """The preset with the details of pytorch-ddpm's network, and T of the file's table of sinusoids.

    Raises InputError for another table.
    """
    table, width = state.get(TABLE, torch.empty(0)), preset.width
    angle = torch.arange(len(table))[:, None] * torch.exp(-math.log(1e4) * torch.arange(0, width, 2) / width)
    wanted = torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)
    if not len(table) or table.shape != wanted.shape or not torch.allclose(table.float(), wanted, atol=1e-3):
        raise InputError(f"{TABLE}: not the sinusoids of pytorch-ddpm for a width of {width}")
    details = Details(norm_groups=norm_groups(width), norm_eps=1e-5, even_padding=True, frequency_shift=0)
    T = len(table)
    return replace(preset, details=details, num_timesteps=T, sample_steps=min(T, preset.sample_steps))


def _levels(
    state: Mapping[str, Tensor], place: str, first: int, convolution: str, down: str, attention: str
) -> list[list[tuple[int, bool]]]:
    """For each level on the way down, the channels of its blocks and whether attention follows."""
    levels: list[list[tuple[int, bool]]] = [[]]
    for i in range(first, len(state) + first):
        if (weight := state.get(place.format(i) + convolution)) is not None:
            levels[-1].append((len(weight), attention.format(i) in state))
        elif place.format(i) + down in state:
            levels.append([])
        else:
            break
    return levels

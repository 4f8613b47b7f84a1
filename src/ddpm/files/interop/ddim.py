"""Weights of ermongroup/ddim and pesser/pytorch_diffusion."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ddpm.details import Details
from ddpm.errors import InputError
from ddpm.presets import PRESETS, Preset
from ddpm.unet import groups_of


def infer_preset(state: Mapping[str, Tensor]) -> Preset:
    """The preset of the network that has these weights, under ddim's names.

    Channels, width, multipliers, blocks and the levels with attention follow from the weights. The size is a guess: the
    first level with attention is taken for 16x16, as in all published models. The other settings are those of the first
    of PRESETS with this network, or else the defaults. Raises InputError if the size or the network cannot be inferred.

    >>> import torch
    >>> from ddpm.files.interop.names import export_state
    >>> from ddpm.presets import build
    >>> with torch.device("meta"):
    ...     state = build(PRESETS["lsun_cat"]).network.state_dict()
    >>> preset = infer_preset(export_state(state, PRESETS["lsun_cat"], "ddim"))
    >>> preset.size, preset.channel_multipliers, preset.attention_resolutions, preset.variance
    ((256, 256), (1, 1, 2, 2, 4, 4), (16,), 'fixed_small')
    """
    levels = range(_count(state, "down.{}.block.0.conv1.weight"))
    blocks = _count(state, "down.0.block.{}.conv1.weight")
    if "conv_in.weight" not in state or state["conv_in.weight"].ndim != 4 or not blocks:
        raise InputError("not weights of ddim's network; want conv_in.weight, down.0.block.0.conv1.weight and so on")
    width, channels = state["conv_in.weight"].shape[:2]
    with_attention = [level for level in levels if f"down.{level}.attn.0.q.weight" in state]
    if not with_attention:
        raise InputError("no attention on the way down, so the size is not known; want a preset, which has it")
    side = 16 << with_attention[0]
    network: dict[str, Any] = {
        "details": _details(width),
        "size": (side, side), "channels": channels, "width": width, "num_res_blocks": blocks,
        "channel_multipliers": tuple(state[f"down.{level}.block.0.conv1.weight"].shape[0] // width for level in levels),
        "attention_resolutions": tuple(side >> level for level in with_attention), "patch": 1,
    }  # fmt: skip
    return completed(network)


def fit_preset(preset: Preset, state: Mapping[str, Tensor]) -> Preset:
    """The preset with the details of ddim's network."""
    return replace(preset, details=_details(preset.width))


def _details(width: int) -> Details:
    return Details(norm_groups=norm_groups(width))


def norm_groups(width: int) -> int:
    """The detail of a network whose norms all have 32 groups."""
    return 0 if groups_of(width) == 32 else 32


def completed(network: Mapping[str, Any]) -> Preset:
    """The first of PRESETS with these settings of the network, or else the defaults; without data.

    The details do not matter for the choice.
    """
    wanted = {name: value for name, value in network.items() if name != "details"}
    same = (row for row in PRESETS.values() if all(getattr(row, name) == value for name, value in wanted.items()))
    return replace(next(same, Preset()), data="", **network)


def _count(state: Mapping[str, Tensor], name: str) -> int:
    """The number of weights name.format(0), name.format(1), ... in the state dict."""
    n = 0
    while name.format(n) in state:
        n += 1
    return n

"""Weights of ermongroup/ddim and pesser/pytorch_diffusion."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm.errors import InputError
from ddpm.files.interop.names import naming, to_ours
from ddpm.files.tensors import as_state_dict, read_tensors, read_torch
from ddpm.presets import PRESETS, Preset
from ddpm.unet import groups_of


def from_ddim(file: Path, preset: Preset) -> dict[str, Tensor]:
    """Our state dict, float32, of the weights that `read_ddim` finds; `preset` is the network they are of.

    They do not say what they were trained for: the sizes may come from `shape_of`, the rest is the caller's. The
    published ones predict eps on the linear schedule, with fixed_large for CIFAR-10 and fixed_small for LSUN.
    Raises InputError for a file that cannot be read, a network whose norms are not of 32 groups or that ddim has not,
    and for weights that are missing, of another shape, or too many.

    >>> from_ddim(Path("model-790000.ckpt"), PRESETS["cifar10"])
    Traceback (most recent call last):
    ...
    ddpm.errors.InputError: model-790000.ckpt: not plain weights ([Errno 2] No such file or directory: ...
    """
    if preset.patch != 1:
        raise InputError(f"{file}: patch {preset.patch}: ddim has no such level; want 1")
    if groups_of(preset.width) != 32:
        raise InputError(
            f"{file}: width {preset.width}: ddim's norms have 32 groups, ours then fewer; want at least 128"
        )
    given = read_ddim(file)
    with naming(file):
        return to_ours(given, preset, "ddim")


def read_ddim(file: Path) -> dict[str, Tensor]:
    """A file's weights under ddim's names: .safetensors, or what torch.save wrote, without running any of it.

    A state dict, or ddim's training checkpoint [model, optimizer, epoch, step, average], of which the average is taken
    where there is one. A "module." before the names is left off.
    """
    given = read_tensors(file) if file.suffix == ".safetensors" else read_torch(file)
    with naming(file):
        if isinstance(given, list):
            average = [one for one in given[4:5] if isinstance(one, dict)]
            given = next(iter(average or given), None)
        state = as_state_dict(given)
        if all(name.startswith("module.") for name in state):
            state = {name.removeprefix("module."): value for name, value in state.items()}
        if "temb.dense.0.weight" not in state:
            raise InputError("not weights of ddim, as those with temb.dense.0.weight; one of our own needs no import")
    return state


def shape_of(state: Mapping[str, Tensor]) -> Preset:
    """The preset whose network has these weights, which are under ddim's names (`read_ddim`).

    Channels, width, multipliers, blocks and the levels with attention are read from them. The size is a guess: the
    first level with attention is taken to be 16x16, as in every published one. The rest is that of the first of
    PRESETS with this network, or of none, the defaults. Raises InputError where they tell no size or are too few.

    >>> import torch
    >>> from ddpm.files.interop.names import to_theirs
    >>> from ddpm.presets import build
    >>> with torch.device("meta"):
    ...     state = build(PRESETS["lsun_cat"]).network.state_dict()
    >>> preset = shape_of(to_theirs(state, PRESETS["lsun_cat"], "ddim"))
    >>> preset.size, preset.channel_multipliers, preset.attention_resolutions, preset.variance
    ((256, 256), (1, 1, 2, 2, 4, 4), (16,), 'fixed_small')
    """
    levels = range(_count(state, "down.{}.block.0.conv1.weight"))
    blocks = _count(state, "down.0.block.{}.conv1.weight")
    if "conv_in.weight" not in state or state["conv_in.weight"].ndim != 4 or not blocks:
        raise InputError("no weights of ddim's network; want conv_in.weight, down.0.block.0.conv1.weight and so on")
    width, channels = state["conv_in.weight"].shape[:2]
    with_attention = [level for level in levels if f"down.{level}.attn.0.q.weight" in state]
    if not with_attention:
        raise InputError("no attention on the way down, which would tell the size; want a preset that says it")
    side = 16 << with_attention[0]
    found: dict[str, Any] = {
        "size": (side, side), "channels": channels, "width": width, "num_res_blocks": blocks,
        "channel_multipliers": tuple(state[f"down.{level}.block.0.conv1.weight"].shape[0] // width for level in levels),
        "attention_resolutions": tuple(side >> level for level in with_attention), "patch": 1,
    }  # fmt: skip
    same = (row for row in PRESETS.values() if all(getattr(row, name) == value for name, value in found.items()))
    return replace(next(same, Preset()), data="", **found)


def _count(state: Mapping[str, Tensor], name: str) -> int:
    """How many of name.format(0), name.format(1), .. there are."""
    n = 0
    while name.format(n) in state:
        n += 1
    return n

"""Weights of ermongroup/ddim and pesser/pytorch_diffusion."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm.errors import InputError
from ddpm.files.interop.names import errors_named, import_state
from ddpm.files.tensors import as_state_dict, read_tensors, read_torch
from ddpm.presets import PRESETS, Preset
from ddpm.unet import groups_of


def from_ddim(file: Path, preset: Preset) -> dict[str, Tensor]:
    """The state dict of the preset's network, float32, from a file that `read_ddim` reads.

    The file does not hold the settings. `infer_preset` infers the network's; the caller must know the others.
    The published models predict eps on the linear schedule, with fixed_large for CIFAR-10 and fixed_small for LSUN.
    Raises InputError for a file that cannot be read, a preset whose network ddim does not have, and weights that are
    missing, unknown or of another shape.

    >>> from_ddim(Path("model-790000.ckpt"), PRESETS["cifar10"])
    Traceback (most recent call last):
    ...
    ddpm.errors.InputError: model-790000.ckpt: not plain weights ([Errno 2] No such file or directory: ...
    """
    if preset.patch != 1:
        raise InputError(f"{file}: patch {preset.patch}: ddim does not have it; want 1")
    if groups_of(preset.width) != 32:
        raise InputError(
            f"{file}: width {preset.width}: ddim's norms have 32 groups, and this network's fewer; want at least 128"
        )
    state = read_ddim(file)
    with errors_named(file):
        return import_state(state, preset, "ddim")


def read_ddim(file: Path) -> dict[str, Tensor]:
    """The weights in a file, under ddim's names. The file is .safetensors or of torch.save; no code in it runs.

    It holds a state dict, or a training checkpoint of ddim, [model, optimizer, epoch, step, average]. The average is
    taken if there is one. The prefix "module." of the names is removed. Raises InputError for other files.
    """
    content = read_tensors(file) if file.suffix == ".safetensors" else read_torch(file)
    with errors_named(file):
        if isinstance(content, list):
            average = [entry for entry in content[4:5] if isinstance(entry, dict)]
            content = next(iter(average or content), None)
        state = as_state_dict(content)
        if all(name.startswith("module.") for name in state):
            state = {name.removeprefix("module."): value for name, value in state.items()}
        if "temb.dense.0.weight" not in state:
            raise InputError("not weights of ddim, which have temb.dense.0.weight; a model of ddpm needs no import")
    return state


def infer_preset(state: Mapping[str, Tensor]) -> Preset:
    """The preset of the network that has these weights, as `read_ddim` returns them.

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
        "size": (side, side), "channels": channels, "width": width, "num_res_blocks": blocks,
        "channel_multipliers": tuple(state[f"down.{level}.block.0.conv1.weight"].shape[0] // width for level in levels),
        "attention_resolutions": tuple(side >> level for level in with_attention), "patch": 1,
    }  # fmt: skip
    same = (row for row in PRESETS.values() if all(getattr(row, name) == value for name, value in network.items()))
    return replace(next(same, Preset()), data="", **network)


def _count(state: Mapping[str, Tensor], name: str) -> int:
    """The number of weights name.format(0), name.format(1), ... in the state dict."""
    n = 0
    while name.format(n) in state:
        n += 1
    return n

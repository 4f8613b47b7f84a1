"""Weights of any package that can be read, and the file of ours that they become."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ddpm.errors import InputError
from ddpm.files.interop.ddim import from_ddim, infer_preset, read_ddim
from ddpm.files.interop.diffusers import from_diffusers, is_diffusers
from ddpm.files.interop.names import Package, errors_named, shapes
from ddpm.files.tensors import save_tensors
from ddpm.presets import Preset, to_json
from ddpm.version import __version__


def recognise(path: Path) -> Package:
    """The package whose weights a path holds: diffusers (a folder) or ddim (a file). Raises InputError for others.

    >>> recognise(Path("README.md"))
    Traceback (most recent call last):
    ...
    ddpm.errors.InputError: README.md: ... want a diffusers folder or a file of ddim's weights (.ckpt, .pt, .pth, ...
    """
    wanted = "want a diffusers folder or a file of ddim's weights (.ckpt, .pt, .pth, .safetensors)"
    if path.is_dir():
        if is_diffusers(path):
            return "diffusers"
        raise InputError(f"{path}: not a diffusers folder; {wanted}")
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; {wanted}")
    try:
        read_ddim(path)
    except InputError as error:
        raise InputError(f"{error}; {wanted}") from error
    return "ddim"


def read(path: Path, preset: Preset | None = None) -> tuple[Preset, dict[str, Tensor]]:
    """The preset and the state dict of our network, float32, from a path that `recognise` accepts.

    preset  the settings of a file of ddim; None: inferred from the shapes of its weights

    Raises InputError if the weights cannot be read or are not those of a network of ours.
    """
    if recognise(path) == "diffusers":
        if preset is not None:
            raise InputError(f"preset: {path} is a diffusers folder, which has its own settings; want no preset")
        return from_diffusers(path)
    if preset is None:
        with errors_named(path):
            preset = infer_preset(read_ddim(path))
    return preset, from_ddim(path, preset)


def save(path: Path, preset: Preset, state: Mapping[str, Tensor], about: str) -> None:
    """Write a state dict as a weights file that `ddpm.load` opens, in float32, completely or not at all.

    about  the origin of the weights, for the file's metadata

    The file says step 0, because the weights were not trained here. Raises InputError for another suffix than
    .safetensors, and for weights that are not those of the preset's network.

    >>> import tempfile
    >>> import ddpm
    >>> from ddpm.files.opening import open_checkpoint
    >>> digits, path = open_checkpoint("digits"), Path(tempfile.mkdtemp()) / "copy.safetensors"
    >>> save(path, digits.preset, digits.denoiser.network.state_dict(), "the package's own")
    >>> ddpm.load(path).predict
    'v'
    """
    if path.suffix != ".safetensors":
        raise InputError(f"out {path}: want a name that ends in .safetensors")
    wanted = shapes(preset)
    for name in sorted(wanted.keys() ^ state.keys()):
        raise InputError(f"{name}: {'missing' if name in wanted else 'not of the network of this preset'}")
    for name, value in state.items():
        if value.shape != wanted[name]:
            raise InputError(f"{name} of shape {list(value.shape)}: want {list(wanted[name])}")
    metadata = {
        "config": json.dumps(to_json(preset)),
        "step": "0",
        "weights": "ema",
        "version": __version__,
        "about": about,
    }
    save_tensors(path, {name: value.float() for name, value in state.items()}, metadata)

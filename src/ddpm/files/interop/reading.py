"""Weights of any package that can be read, and the file of ours that they become."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ddpm.errors import InputError
from ddpm.files.interop import ddim, flat
from ddpm.files.interop.diffusers import from_diffusers, is_diffusers
from ddpm.files.interop.names import Package, errors_named, import_state, shapes
from ddpm.files.interop.wrapping import unwrap
from ddpm.files.tensors import read_tensors, read_torch, save_tensors
from ddpm.presets import Preset, to_json
from ddpm.version import __version__


class Layout(NamedTuple):
    """Files of weights of one package.

    marker  weights that only this package has
    infer   the preset of a state dict
    fit     the user's preset with the settings that the package, or the state dict, fixes
    extra   what the state dict holds besides weights
    """

    marker: str
    infer: Callable[[Mapping[str, Tensor]], Preset]
    fit: Callable[[Preset, Mapping[str, Tensor]], Preset]
    extra: tuple[str, ...] = ()


LAYOUTS: dict[Package, Layout] = {
    "ddim": Layout("temb.dense.0.weight", ddim.infer_preset, ddim.fit_preset),
    "improved_diffusion": Layout("time_embed.0.weight", flat.infer_improved_diffusion, flat.fit_improved_diffusion),
    "pytorch_ddpm": Layout(flat.TIME, flat.infer_pytorch_ddpm, flat.fit_pytorch_ddpm, (flat.TABLE,)),
}
REFUSED = {
    "downs.0.0.block1.proj.weight": "weights of lucidrains/denoising-diffusion-pytorch, whose network has other layers "
    "(docs/interop.md)",
    "time_embedding.linear_1.weight": "weights of diffusers without their settings; want the folder with config.json",
}
"""Weights that tell a package whose files cannot be read, and the reason."""
WANTED = (
    "want a diffusers folder, or a file (.ckpt, .pt, .pth, .safetensors) of the weights of ermongroup/ddim, "
    "openai/improved-diffusion or w86763777/pytorch-ddpm"
)


def recognise(path: Path) -> Package:
    """The package whose weights a path holds: diffusers (a folder) or another (a file). Raises InputError for others.

    >>> recognise(Path("README.md"))
    Traceback (most recent call last):
    ...
    ddpm.errors.InputError: README.md: ... want a diffusers folder, or a file (.ckpt, .pt, ...
    """
    if path.is_dir():
        if is_diffusers(path):
            return "diffusers"
        raise InputError(f"{path}: not a diffusers folder; {WANTED}")
    return read_file(path)[0]


def read_file(path: Path) -> tuple[Package, dict[str, Tensor]]:
    """The package and the state dict of a file of weights, by its own names; wrapped or not, as `unwrap` reads it.

    Raises InputError for a file that is none.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; {WANTED}")
    try:
        content = read_tensors(path) if path.suffix == ".safetensors" else read_torch(path)
    except InputError as error:
        raise InputError(f"{error}; {WANTED}") from error
    with errors_named(path):
        for package, layout in LAYOUTS.items():
            if (state := unwrap(content, layout.marker)) is not None:
                return package, state
        for marker, reason in REFUSED.items():
            if unwrap(content, marker) is not None:
                raise InputError(reason)
        raise InputError(f"not weights of a known package; {WANTED}")


def read(path: Path, preset: Preset | None = None) -> tuple[Preset, dict[str, Tensor]]:
    """The preset and the state dict of our network, float32, from a path that `recognise` accepts.

    preset  the settings of a file, whose details become those of the package; None: inferred from the weights

    Raises InputError if the weights cannot be read or are not those of a network of ours.
    """
    if path.is_dir() and is_diffusers(path):
        if preset is not None:
            raise InputError(f"preset: {path} is a diffusers folder, which has its own settings; want no preset")
        return from_diffusers(path)
    if path.is_dir():
        recognise(path)
    package, state = read_file(path)
    layout = LAYOUTS[package]
    with errors_named(path):
        if preset is None:
            preset = layout.infer(state)
        elif preset.patch != 1:
            raise InputError(f"patch {preset.patch}: the network of this file does not have it; want 1")
        else:
            preset = layout.fit(preset, state)
        weights = {name: value for name, value in state.items() if name not in layout.extra}
        return preset, import_state(weights, preset, package)


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

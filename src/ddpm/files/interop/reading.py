"""Any weights that we can read, and the file that they become."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ddpm.errors import InputError
from ddpm.files.interop.ddim import from_ddim, read_ddim, shape_of
from ddpm.files.interop.diffusers import from_diffusers, is_diffusers
from ddpm.files.interop.names import Package, naming, shapes
from ddpm.files.tensors import save_tensors
from ddpm.presets import Preset, to_json
from ddpm.version import __version__


def recognise(path: Path) -> Package:
    """Whose weights a path has: diffusers (a folder) or ddim (a file); InputError names what is accepted.

    >>> recognise(Path("README.md"))
    Traceback (most recent call last):
    ...
    ddpm.errors.InputError: README.md: ... want a folder of diffusers or a file of ddim's weights (.ckpt, .pt, .pth, ...
    """
    wanted = "want a folder of diffusers or a file of ddim's weights (.ckpt, .pt, .pth, .safetensors)"
    if path.is_dir():
        if is_diffusers(path):
            return "diffusers"
        raise InputError(f"{path}: not a folder of diffusers; {wanted}")
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; {wanted}")
    try:
        read_ddim(path)
    except InputError as error:
        raise InputError(f"{error}; {wanted}") from error
    return "ddim"


def read(path: Path, preset: Preset | None = None) -> tuple[Preset, dict[str, Tensor]]:
    """The preset and our state dict of whatever `recognise` knows; `preset` for a file of ddim, else its shapes tell.

    Raises InputError where it is neither, or not what our network has.
    """
    if recognise(path) == "diffusers":
        if preset is not None:
            raise InputError(f"{path}: a folder of diffusers says its settings itself; want no --preset")
        return from_diffusers(path)
    if preset is None:
        with naming(path):
            preset = shape_of(read_ddim(path))
    return preset, from_ddim(path, preset)


def save(path: Path, preset: Preset, state: Mapping[str, Tensor], about: str) -> None:
    """Write our state dict as a weights file that `ddpm.load` opens, float32, whole or not at all.

    about  where the weights are from; kept in the file's metadata. The step is 0: none of our training is in them.

    Raises InputError for another suffix, and for weights that are not of the preset's network.

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

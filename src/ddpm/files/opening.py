"""Find a model by a path or a name, and open it."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ddpm.denoiser import Denoiser
from ddpm.errors import InputError
from ddpm.files import hub
from ddpm.files.checkpoints import best, damage, newest, saved
from ddpm.files.interop import diffusers as interop
from ddpm.files.models import MODELS, Checkpoint, Weights, with_variance
from ddpm.files.tensors import read_tensors
from ddpm.presets import Preset, build, from_json, to_json


def packaged(path: Path) -> Path:
    """The package's model where `path` is the name of one and there is nothing else of that name; else `path` itself.

    >>> packaged(Path("digits")).name, packaged(Path("runs/digits")).name
    ('digits.safetensors', 'digits')
    """
    file = MODELS / f"{path.name}.safetensors"
    return file if path == Path(path.name) and file.is_file() and not path.exists() else path


def _wanted() -> str:
    names = ", ".join(sorted(p.stem for p in MODELS.glob("*.safetensors")))
    own = "want a run folder, a checkpoint folder or a .safetensors file"
    return f"{own}; a model of the package: {names}; a folder of diffusers; or hf:OWNER/NAME"


def find(path: Path, which: str = "last", weights: Weights = "ema") -> Path:
    """The weights file that `path` means: a run folder (`which`: last, best or a step), a checkpoint folder, a file.

    Or the name of a model of the package, where nothing else has it. InputError names what there is.
    """
    path = packaged(path)
    single = path.is_file() or (path / "state.json").is_file()
    if single and which != "last":
        raise InputError(f"checkpoint {which!r}: {path} is one checkpoint already; want the run to choose from")
    if path.is_file():
        return path
    if single:
        return _whole(path) / f"{weights}.safetensors"
    if not (path / "config.json").is_file():
        raise InputError(f"{path}: {'not a run' if path.exists() else 'no such file or folder'}; {_wanted()}")
    if which.isdecimal():
        folder = path / "checkpoints" / f"{int(which):08d}"
        if not folder.is_dir():
            there = ", ".join(str(int(p.name)) for p in reversed(saved(path))) or "none"
            raise InputError(f"checkpoint {which}: {path} has {there}")
        return _whole(folder) / f"{weights}.safetensors"
    if which not in ("last", "best"):
        raise InputError(f"checkpoint {which!r}: want last, best or a step")
    folder_or_none = newest(path) if which == "last" else best(path)
    if folder_or_none is None:
        raise InputError(f"{path}: the run has no whole checkpoint yet; train it first")
    return folder_or_none / f"{weights}.safetensors"


def _whole(folder: Path) -> Path:
    if reason := damage(folder):
        raise InputError(f"checkpoint {folder}: {reason}; want another one of the run")
    return folder


def open_checkpoint(
    path: str | Path, weights: Weights = "ema", which: str = "last", precision: str | None = None
) -> Checkpoint:
    """Read a model from a run folder, a checkpoint folder or one weights file, or by its name, to the CPU.

    weights    ema, the moving average, or raw; of a single file it is what the file holds
    which      of a run: last, best (by held-out loss) or a step
    precision  the network's: float32, bf16, or None for the run's own

    path may also be hf:OWNER/NAME or a folder of diffusers. InputError where there is nothing to read or it is damaged.
    """
    name = ""
    if hub.is_name(path):
        name, path = str(path).rpartition("/")[2].partition("@")[0], hub.fetch(str(path))
    if (folder := Path(path)).is_dir() and interop.is_diffusers(folder):
        preset, state = interop.from_diffusers(folder)
        if precision is not None:
            preset = from_json({**to_json(preset), "precision": precision})
        if which != "last":
            raise InputError(f"checkpoint {which!r}: {path} is one model; want a run to choose from")
        file, name = interop.weights_of(folder), name or folder.absolute().name
        denoiser, stored = _filled(preset, state, folder), partial(_of_diffusers, folder)
        return Checkpoint(denoiser, preset, 0, "ema", file, name, foreign=True, stored=stored)
    file = find(Path(path), which, weights)
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a whole safetensors file ({error}); {_wanted()}") from error
    if "config" not in metadata or metadata.get("weights") not in ("ema", "raw"):
        raise InputError(f"{file}: not a checkpoint of ddpm; want ema.safetensors or raw.safetensors of a run")
    try:
        preset, step = from_json(json.loads(metadata["config"])), int(metadata["step"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: its configuration is damaged ({error})") from error
    if precision is not None:
        preset = from_json({**to_json(preset), "precision": precision})
    denoiser = _filled(preset, read_tensors(file), file)
    return Checkpoint(denoiser, preset, step, metadata["weights"], file, name, stored=partial(read_tensors, file))


def _of_diffusers(folder: Path) -> Mapping[str, Tensor]:
    return interop.from_diffusers(folder)[1]


def _filled(preset: Preset, state: Mapping[str, Tensor], path: Path) -> Denoiser:
    """The preset's denoiser with these weights, in float32 (`ddpm export` may have rounded them), for evaluation."""
    with torch.device("meta"):  # no weights are drawn only to be replaced
        denoiser = build(preset)
    assert isinstance(denoiser.network, nn.Module)
    try:
        denoiser.network.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    except RuntimeError as error:
        raise InputError(f"{path}: its tensors are not those of its configuration") from error
    denoiser.network.eval().requires_grad_(False)
    return denoiser


def load(
    path: str | Path, weights: Weights = "ema", device: torch.device | str = "cpu", variance: str | None = None
) -> Denoiser:
    """The denoiser of a run folder, a checkpoint folder or one weights file (.safetensors), ready to sample.

    Or of a model that comes with the package, by its name, as digits; a file or folder of that name goes first. Or of
    a folder of diffusers (UNet2DModel), or of hf:OWNER/NAME, a model of either kind on the Hugging Face hub.
    weights is ema or raw; variance is fixed_large, fixed_small, calibrated (see `with_variance`), or None for the
    run's own. The network computes in the precision that it was trained in. Raises InputError where there is nothing
    to read or what there is is damaged.

    >>> import ddpm
    >>> ddpm.load("digits").predict
    'v'
    >>> ddpm.load("runs/nothing")
    Traceback (most recent call last):
    ...
    ddpm.errors.InputError: runs/nothing: no such file or folder; want a run folder, a checkpoint folder or a ...
    """
    found = open_checkpoint(path, weights)
    return (found if variance is None else with_variance(found, variance)).denoiser.to(device)

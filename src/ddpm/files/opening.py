"""Find a model by a path or a name, and open it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ddpm.catalog import Precision
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError, parse_json, suggestion, whole_number
from ddpm.files import hub
from ddpm.files.checkpoints import best, damage, newest, saved
from ddpm.files.interop import diffusers as interop
from ddpm.files.models import CHECKOUT, MODELS, Average, Checkpoint, Weights, with_variance
from ddpm.files.tensors import identity, not_finite
from ddpm.presets import Preset, build, from_json


def models_by_name() -> dict[str, Path]:
    """Name -> weights file of the models of the package and, where its source is installed, of models/ beside it.

    >>> models_by_name()["digits"].name
    'digits.safetensors'
    """
    return {file.stem: file for folder in (CHECKOUT, MODELS) for file in sorted(folder.glob("*.safetensors"))}


def named(path: Path) -> Path:
    """The file of the model that `path` names. If no model or a file has that name, `path` itself.

    >>> named(Path("digits")).name, named(Path("runs/digits")).name
    ('digits.safetensors', 'digits')
    """
    return path if path != Path(path.name) or path.exists() else models_by_name().get(path.name, path)


def _accepted(path: Path | None = None) -> str:
    names = models_by_name()
    hint = ""
    if path is not None and not path.exists():
        runs = [str(folder.parent) for folder in path.parent.glob("*/config.json")]
        hint = suggestion(path, [*names, *runs])
    ours = "want a run folder, a checkpoint folder or a .safetensors file"
    return f"{hint}{ours}; a model by name: {', '.join(names)}; a diffusers folder; or hf:OWNER/NAME"


def find(path: Path, which: str = "last", weights: Weights = "ema") -> Path:
    """The weights file of a run folder, a checkpoint folder, a file, or a model by name.

    which  the checkpoint of a run: last, best (the lowest held-out loss) or a step

    Raises InputError if there is none or it is damaged.
    """
    path = named(path)
    single = path.is_file() or (path / "state.json").is_file()
    if single and which != "last":
        raise InputError(f"checkpoint {which!r}: {path} is one checkpoint already; want the run to choose from")
    if path.is_file():
        return path
    if single:
        return _undamaged(path, weights) / f"{weights}.safetensors"
    if not (path / "config.json").is_file():
        raise InputError(f"{path}: {'not a run' if path.exists() else 'no such file or folder'}; {_accepted(path)}")
    if which.isdecimal():
        folder = path / "checkpoints" / f"{int(which):08d}"
        if not folder.is_dir():
            steps = ", ".join(str(int(p.name)) for p in reversed(saved(path))) or "none"
            raise InputError(f"checkpoint {which}: {path} has {steps}")
        return _undamaged(folder, weights) / f"{weights}.safetensors"
    if which not in ("last", "best"):
        raise InputError(f"checkpoint {which!r}: want last, best or a step")
    chosen = newest(path, weights) if which == "last" else best(path, weights)
    if chosen is None:
        try:
            from_json(parse_json((path / "config.json").read_bytes()))
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            raise InputError(f"{path}: its config.json is not that of a run; {_accepted()}") from None
        if which == "best" and newest(path, weights) is not None:
            raise InputError(f"checkpoint best: no checkpoint of {path} has a held-out loss; want last or a step")
        raise InputError(f"{path}: the run has no whole checkpoint yet; train it first")
    return chosen / f"{weights}.safetensors"


def _undamaged(folder: Path, weights: Weights) -> Path:
    """The folder itself, if it is a checkpoint whose weights are whole. Raises InputError if not."""
    if reason := damage(folder, weights):
        raise InputError(f"checkpoint {folder}: {reason}; want another one of the run")
    return folder


def open_checkpoint(
    path: str | Path, weights: Weights = "ema", which: str = "last", precision: Precision | None = None
) -> Checkpoint:
    """Read a model to the CPU.

    path       a run folder, a checkpoint folder, a weights file, a model by name, a diffusers folder, or
               hf:OWNER/NAME
    weights    ema, the moving average, or raw; a single file holds only one of them, which is taken
    which      the checkpoint of a run: last, best (the lowest held-out loss) or a step
    precision  the network's: float32, bf16, or None for that of the run

    Raises InputError if there is no model, or it is damaged or not finite.
    """
    name = ""
    if hub.is_name(path):
        name, path = str(path).rpartition("/")[2].partition("@")[0], hub.fetch(str(path))
    if (folder := Path(path)).is_dir() and interop.is_diffusers(folder):
        preset, state = interop.from_diffusers(folder)
        if which != "last":
            raise InputError(f"checkpoint {which!r}: {path} is one model; want a run to choose from")
        file, name = interop.weights_of(folder), name or folder.absolute().name
        preset = replace(preset, precision=precision or preset.precision)
        denoiser = _denoiser(preset, state, folder)
        return Checkpoint(denoiser, preset, 0, "ema", file, name, foreign=True, identity=identity(state))
    file, metadata, state = _read(Path(path), which, weights)
    if file == named(Path(path)) != Path(path):
        name = file.stem
    if "config" not in metadata or metadata.get("weights") not in ("ema", "raw"):
        raise InputError(f"{file}: not a checkpoint of ddpm; want ema.safetensors or raw.safetensors of a run")
    try:
        preset = from_json(parse_json(metadata["config"]))
        step = whole_number("step", int(metadata["step"]), 0, 2**63 - 1)
        average = Average(**parse_json(metadata["average"])) if "average" in metadata else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: its configuration is damaged ({error})") from error
    preset = replace(preset, precision=precision or preset.precision)
    denoiser = _denoiser(preset, state, file)
    return Checkpoint(denoiser, preset, step, metadata["weights"], file, name, False, identity(state), average)


def _read(path: Path, which: str, weights: Weights) -> tuple[Path, dict[str, str], dict[str, Tensor]]:
    """The file that `find` finds, its metadata and its tensors."""
    for tries_left in reversed(range(20)):
        file = find(path, which, weights)
        try:
            with safe_open(file, "pt") as opened:
                return file, opened.metadata() or {}, {name: opened.get_tensor(name) for name in opened.keys()}
        except FileNotFoundError as error:  # the run is training, and deleted the checkpoint meanwhile
            if not tries_left:
                raise InputError(f"{file}: the run deleted it meanwhile; want a larger keep, or the end") from error
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: not a whole safetensors file ({error}); {_accepted()}") from error
    raise AssertionError


def _denoiser(preset: Preset, state: Mapping[str, Tensor], path: Path) -> Denoiser:
    """The preset's denoiser with these weights, in float32 and in evaluation mode; `path` is for errors.

    The weights are copied, so that they stay as they are whatever happens to the file.
    """
    if name := not_finite(state):
        raise InputError(f"{path}: {name} holds values that are not finite; want another checkpoint")
    with torch.device("meta"):  # do not draw weights that are replaced at once
        denoiser = build(preset)
    assert isinstance(denoiser.network, nn.Module)
    copies = {name: value.to(torch.float32, copy=True) for name, value in state.items()}
    try:
        denoiser.network.load_state_dict(copies, assign=True)
    except RuntimeError as error:
        raise InputError(f"{path}: its tensors are not those of its configuration") from error
    denoiser.network.eval().requires_grad_(False)
    return denoiser


def load(
    path: str | Path, weights: Weights = "ema", device: torch.device | str = "cpu", variance: str | None = None
) -> Denoiser:
    """Load a denoiser that is ready to sample.

    path      a run folder, a checkpoint folder, a .safetensors file, the name of a model in the package such as digits
              (unless a file or folder has that name), a diffusers folder (UNet2DModel), or hf:OWNER/NAME, a model on
              the Hugging Face hub
    weights   ema or raw
    variance  fixed_large, fixed_small, calibrated (see `with_variance`), or None for that of the run

    The network computes in the precision in which it was trained, but in float32 on devices where bf16 is slow, also
    after it has been moved. Raises InputError if there is no model or it is damaged.

    >>> import ddpm
    >>> ddpm.load("digits").predict
    'v'
    >>> ddpm.load("runs/nothing")
    Traceback (most recent call last):
    ...
    ddpm.errors.InputError: runs/nothing: no such file or folder; want a run folder, a checkpoint folder or a ...
    """
    checkpoint = open_checkpoint(path, weights)
    if checkpoint.preset.precision == "bf16":
        checkpoint.denoiser.network.bf16 = None  # type: ignore[attr-defined]
    return (checkpoint if variance is None else with_variance(checkpoint, variance)).denoiser.to(device)

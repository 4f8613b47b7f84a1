"""Runs and checkpoints on disk.

RUN/config.json                      the preset the run was made from
RUN/checkpoints/STEP/ema.safetensors the averaged weights, raw.safetensors the others; each holds the configuration,
                                     so that one file alone can be sampled
RUN/checkpoints/STEP/optimizer.safetensors, state.json   what training needs to go on, and the SHA-256 of each file
RUN/checkpoints/STEP/ema.calibration.json   beside the weights that it is of: mse_t, for the calibrated variance

A checkpoint is written under another name, synced and renamed: a folder that has its name is whole.
ddpm/models/NAME.safetensors         a model that comes with the package and goes by NAME
"""

import functools
import hashlib
import json
import math
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ddpm
from ddpm.denoiser import Denoiser, Variance
from ddpm.errors import InputError
from ddpm.files import atomic, hub
from ddpm.gaussian import calibrated_variance
from ddpm.presets import Preset, build, from_json, to_json

Weights = Literal["ema", "raw"]

MODELS = Path(__file__).parents[1] / "models"
"""Where the models that come with the package lie."""


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(state: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(state, sort_keys=True).encode())


def save(run: Path, preset: Preset, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Write RUN/checkpoints/STEP whole or not at all, and return it.

    `state` is plain JSON with "step"; `tensors` maps a file's stem (ema, raw, optimizer) to what goes into it.
    Raises OSError where the disk is full; what is there already stays as it is.
    """
    folder = run / "checkpoints" / f"{state['step']:08d}"
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        hashes = {}
        for stem, values in tensors.items():
            path = temporary / f"{stem}.safetensors"
            metadata = {
                "config": json.dumps(to_json(preset)),
                "step": str(state["step"]),
                "weights": stem,
                "version": ddpm.__version__,
            }
            save_tensors(path, values, metadata)
            hashes[path.name] = file_sha256(path)
        sealed = {**state, "files": hashes, "version": ddpm.__version__}
        atomic.write(temporary / "state.json", json.dumps({**sealed, "seal": _seal(sealed)}, indent=1))
        atomic.sync(temporary)
        if folder.exists():  # a damaged one that was skipped
            shutil.rmtree(folder)
        temporary.rename(folder)
        atomic.sync(folder.parent)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file, whole or not at all, the same bytes for the same values; OSError where the disk is full."""
    with atomic.whole(path) as part:
        try:
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, part, dict(metadata or {}))
        except SafetensorError as error:  # how safetensors says that the disk is full
            raise OSError(str(error)) from error
        _sort_metadata(part)


def _sort_metadata(path: Path) -> None:
    """Put a safetensors file's metadata, which are written in an order of chance, in that of their names."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(text) == size
        file.seek(8)
        file.write(text)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None where every byte is as it was written."""
    try:
        state = json.loads((folder / "state.json").read_text())
        seal = state.pop("seal")
        if seal != _seal(state):
            return "state.json is altered"
        for name, digest in state["files"].items():
            if file_sha256(folder / name) != digest:
                return f"{name} is truncated or altered"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"state.json cannot be read ({error})"
    return None


def saved(run: Path) -> list[Path]:
    """The run's checkpoint folders, newest first."""
    found = [p for p in (run / "checkpoints").glob("*") if p.name.isdecimal() and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name), reverse=True)


def newest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run; warns of each damaged one that it passes over."""
    for folder in saved(run):
        if (reason := damage(folder)) is None:
            return folder
        warnings.warn(f"checkpoint {folder}: {reason}; going back to the one before it", stacklevel=2)
    return None


def best(run: Path) -> Path | None:
    """The whole checkpoint of lowest held-out loss, or None."""
    scored = [(loss, p) for p in saved(run) if (loss := _held_out(p)) is not None and damage(p) is None]
    return min(scored, default=(0.0, None), key=lambda pair: pair[0])[1]


def _held_out(folder: Path) -> float | None:
    try:
        loss = json.loads((folder / "state.json").read_text()).get("held_out")
        return loss if isinstance(loss, float) else None
    except (OSError, ValueError, AttributeError):
        return None


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, the best by held-out loss and those that are calibrated.

    A calibrated one may have compressed pictures, which nothing else reads.
    """
    folders = saved(run)
    scored = [p for p in folders if _held_out(p) is not None]
    top = min(scored, key=lambda p: _held_out(p) or 0.0, default=None)
    for folder in folders[keep:]:
        if folder != top and not any(folder.glob("*.calibration.json")):
            shutil.rmtree(folder)
    for leftover in (run / "checkpoints").glob(".*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def read_state(folder: Path) -> dict[str, Any]:
    """What `save` was given as `state`."""
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return state


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file's tensors; InputError where it is not one."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error})") from error


@dataclass(frozen=True)
class Checkpoint:
    """A model from disk: its denoiser in evaluation mode, what it was made from, and which weights these are."""

    denoiser: Denoiser
    preset: Preset
    step: int
    weights: str
    path: Path
    name: str = ""  # where it is another's: where its results go, ./ddpm-NAME
    foreign: bool = False  # of diffusers, whose settings lie in other files than the weights

    @property
    def packaged(self) -> bool:
        """Whether it came with the package, whose folder nothing is written to."""
        return self.path.parent == MODELS

    @property
    def home(self) -> Path:
        """Where results go: the run's folder; for a file that lies elsewhere, a folder of its name beside it.

        Those of the package's model NAME go to ./ddpm-NAME, since ./NAME would be taken for a run from then on, and so
        do those of hf:OWNER/NAME and of a folder of diffusers.
        """
        path = self.path.absolute()
        if self.packaged or self.name:
            return Path(f"ddpm-{self.name or path.stem}")
        checkpoints = path.parent.parent
        inside = checkpoints.name == "checkpoints" and (checkpoints.parent / "config.json").is_file()
        return checkpoints.parent if inside else path.with_suffix("")

    @functools.cached_property
    def sha256(self) -> str:
        """The SHA-256 of the weights file, of one of diffusers with what it was read as."""
        digest = file_sha256(self.path)
        settings = json.dumps(to_json(replace(self.preset, precision="auto")), sort_keys=True)
        return _sha256((digest + settings).encode()) if self.foreign else digest

    def about(self) -> dict[str, Any]:
        """What results of this model are of, as plain JSON values."""
        variance = self.denoiser.variance
        return {
            "run": self.home.name, "step": self.step, "weights": self.weights, "sha256": self.sha256,
            "variance": variance if isinstance(variance, str) else "calibrated",
            "network_precision": self.preset.precision,
            "version": ddpm.__version__,
        }  # fmt: skip


def calibration_file(weights: Path) -> Path:
    """Where the calibration of a weights file is kept."""
    return weights.with_name(f"{weights.stem}.calibration.json")


def save_calibration(found: Checkpoint, mse: Tensor, first: float, about: Mapping[str, Any]) -> Path:
    """Keep mse_t, levels 1..T, float64 [T], sigma_1^2, and what they were measured on beside the weights."""
    measured = {"first_variance": first, "mse": mse.tolist()}
    values = {**about, "weights": found.sha256, "version": ddpm.__version__, **measured}
    atomic.write_json(calibration_file(found.path), values)
    return calibration_file(found.path)


def read_calibration(found: Checkpoint) -> tuple[Tensor, float] | None:
    """mse_t, float64 [T], and sigma_1^2 that `save_calibration` left for these weights; None where there is none.

    Raises InputError for a file that is damaged or of other weights.
    """
    file, T = calibration_file(found.path), found.denoiser.schedule.T
    again = "measure it again with `ddpm calibrate`"
    try:
        values = json.loads(file.read_text())
        mse, first = torch.tensor(values["mse"], dtype=torch.float64), float(values["first_variance"])
        weights = values["weights"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RuntimeError) as error:
        raise InputError(f"{file}: damaged ({error}); {again}") from error
    if weights != found.sha256:
        raise InputError(f"{file}: of other weights than {found.path.name}; {again}")
    if mse.shape != (T,) or not (mse.isfinite() & (mse > 0)).all() or not 0 < first < math.inf:
        raise InputError(f"{file}: want {T} positive numbers and one more; {again}")
    return mse, first


def with_variance(found: Checkpoint, variance: str) -> Checkpoint:
    """The model with sigma_t^2 fixed_large, fixed_small or calibrated, as `ddpm calibrate` left it beside the weights.

    Raises InputError for another name, where nothing was calibrated, and for a network that gives the variance itself.
    """
    accepted = ("fixed_large", "fixed_small", "calibrated")
    if variance not in accepted:
        raise InputError(f"variance {variance!r}: want {', '.join(accepted)}")
    if found.denoiser.learned:
        raise InputError(f"variance {variance}: the network of {found.path} gives its own")
    if variance == "calibrated" and found.denoiser.predict == "mu":
        raise InputError(f"variance calibrated: {found.path} predicts mu; want fixed_large or fixed_small")
    chosen: Variance | Tensor = cast(Variance, variance)
    if variance == "calibrated":
        measured = read_calibration(found)
        if measured is None:
            raise InputError(f"variance calibrated: {found.path} is not calibrated; run `ddpm calibrate` on it first")
        chosen = calibrated_variance(found.denoiser.schedule, *measured)
    return replace(found, denoiser=replace(found.denoiser, variance=chosen))


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
    from ddpm.files import interop  # which writes checkpoints

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
        return Checkpoint(_filled(preset, state, folder), preset, 0, "ema", file, name, foreign=True)
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
    return Checkpoint(denoiser, preset, step, metadata["weights"], file, name)


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

"""The checkpoints of a run on disk: how they are written, checked, found and deleted."""

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm.errors import InputError
from ddpm.files import atomic
from ddpm.files.tensors import file_sha256, save_tensors, sha256_of
from ddpm.presets import Preset, from_json, to_json
from ddpm.version import __version__


def _seal(state: Mapping[str, Any]) -> str:
    """The hash of a state, which shows later whether it was altered."""
    return sha256_of(json.dumps(state, sort_keys=True).encode())


def save(run: Path, preset: Preset, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Write the folder run/checkpoints/STEP completely or not at all, and return it.

    state    plain JSON values, among them "step"
    tensors  the stem of a file (ema, raw, optimizer) -> the tensors that it holds

    Raises OSError if that fails, as on a full disk; other checkpoints stay as they are.
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
                "version": __version__,
            }
            save_tensors(path, values, metadata)
            hashes[path.name] = file_sha256(path)
        sealed = {**state, "files": hashes, "version": __version__}
        atomic.write(temporary / "state.json", json.dumps({**sealed, "seal": _seal(sealed)}, indent=1))
        atomic.sync(temporary)
        if folder.exists():  # it is damaged, and `newest` passed over it
            shutil.rmtree(folder)
        temporary.rename(folder)
        atomic.sync(folder.parent)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def read_settings(run: Path) -> Preset:
    """The settings of a run, RUN/config.json. Raises InputError if they cannot be read."""
    config = run / "config.json"
    try:
        return from_json(json.loads(config.read_text()))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{config}: cannot be read ({error}); want another out") from error


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder; None if every byte is as it was written."""
    try:
        state = json.loads((folder / "state.json").read_bytes())
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
    """The run's checkpoint folders, the newest first, damaged ones too."""
    folders = [p for p in (run / "checkpoints").glob("*") if p.name.isdecimal() and p.is_dir()]
    return sorted(folders, key=lambda p: int(p.name), reverse=True)


def newest(run: Path) -> Path | None:
    """The newest undamaged checkpoint of a run, or None. Warns of each damaged one that is newer."""
    for folder in saved(run):
        if (reason := damage(folder)) is None:
            return folder
        warnings.warn(f"checkpoint {folder}: {reason}; going back to the one before it", stacklevel=2)
    return None


def best(run: Path) -> Path | None:
    """The undamaged checkpoint with the lowest held-out loss, or None."""
    scored = [(loss, p) for p in saved(run) if (loss := _held_out(p)) is not None and damage(p) is None]
    return min(scored, default=(0.0, None), key=lambda pair: pair[0])[1]


def _held_out(folder: Path) -> float | None:
    """The held-out loss of a checkpoint; None if it was not measured or cannot be read."""
    try:
        loss = json.loads((folder / "state.json").read_bytes()).get("held_out")
        return loss if isinstance(loss, float) else None
    except (OSError, ValueError, AttributeError):
        return None


def prune(run: Path, keep: int, steps: Sequence[int] = ()) -> None:
    """Delete checkpoints, except the newest `keep`, the one with the lowest held-out loss, `steps` and calibrated ones.

    Pictures may have been compressed with a calibrated checkpoint, and only that checkpoint can decompress them.
    """
    folders = saved(run)
    scored = [p for p in folders if _held_out(p) is not None]
    top = min(scored, key=lambda p: _held_out(p) or 0.0, default=None)
    for folder in folders[keep:]:
        if folder != top and int(folder.name) not in steps and not any(folder.glob("*.calibration.json")):
            shutil.rmtree(folder)
    for leftover in (run / "checkpoints").glob(".*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def read_state(folder: Path) -> dict[str, Any]:
    """The `state` that `save` wrote, with the hashes of the files."""
    state: dict[str, Any] = json.loads((folder / "state.json").read_bytes())
    return state

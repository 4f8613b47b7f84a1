"""The checkpoints and snapshots of a run on disk: how they are written, checked, found and deleted."""

import functools
import json
import math
import os
import stat
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm.errors import InputError, parse_json
from ddpm.files import atomic
from ddpm.files.tensors import file_sha256, not_finite, read_metadata, read_tensors, save_tensors, sha256_of
from ddpm.presets import Preset, from_json, to_json
from ddpm.version import __version__

CHECKPOINTS, SNAPSHOTS = "checkpoints", "snapshots"
"""The folders of a run that hold a folder for each saved step. `prune` deletes checkpoints only."""


def _seal(state: Mapping[str, Any]) -> str:
    """The hash of a state, which shows later whether it was altered."""
    return sha256_of(json.dumps(state, sort_keys=True).encode())


def save(
    run: Path,
    preset: Preset,
    state: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    place: str = CHECKPOINTS,
) -> Path:
    """Write the folder run/PLACE/STEP completely or not at all, and return it.

    state    plain JSON values, among them "step"
    tensors  the stem of a file (ema, raw, optimizer) -> the tensors that it holds
    place    CHECKPOINTS or SNAPSHOTS

    Raises OSError if that fails, as on a full disk, and FloatingPointError for tensors that are not finite. Other
    checkpoints stay as they are.
    """
    for stem, values in tensors.items():
        if name := not_finite(values):
            raise FloatingPointError(f"{stem}.safetensors: {name} is not finite")
    folder = run / place / f"{state['step']:08d}"
    with atomic.temporary_folder(folder) as part:  # a folder that is there is damaged, and `newest` passed over it
        hashes = {}
        for stem, values in tensors.items():
            path = part / f"{stem}.safetensors"
            metadata = {
                "config": json.dumps(to_json(preset)),
                "step": str(state["step"]),
                "weights": stem,
                "version": __version__,
            }
            save_tensors(path, values, metadata)
            hashes[path.name] = file_sha256(path)
        sealed = {**state, "files": hashes, "version": __version__}
        atomic.write(part / "state.json", json.dumps({**sealed, "seal": _seal(sealed)}, indent=1))
    return folder


# -- what is whole -----------------------------------------------------------------------------------------------------

_Version = tuple[int, ...]


def _version(file: str) -> _Version:
    """Numbers that change when the file does. Raises OSError if it is no plain file.

    A file that changed in the last two seconds can change again without a new time. It is never the same.
    """
    about = os.stat(file)
    if not stat.S_ISREG(about.st_mode):
        raise OSError(None, "not a plain file", file)
    changed, now = max(about.st_mtime_ns, about.st_ctime_ns), time.time_ns()
    fresh = now if now - changed < 2_000_000_000 else 0
    return about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns, fresh


@functools.lru_cache(maxsize=1 << 14)
def _read_state(file: str, version: _Version) -> dict[str, Any]:
    try:
        state: dict[str, Any] = parse_json(Path(file).read_bytes())
        seal, _ = state.pop("seal"), state["files"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"state.json cannot be read ({error})") from error
    if seal != _seal(state):
        raise ValueError("state.json is altered")
    return state


@functools.lru_cache(maxsize=1 << 16)
def _fault(file: str, digest: str, version: _Version) -> str | None:
    """What is wrong with a file of tensors that has this hash."""
    if file_sha256(Path(file)) != digest:
        return "is truncated or altered"
    return "holds values that are not finite" if not_finite(read_tensors(Path(file))) else None


def read_state(folder: Path) -> dict[str, Any]:
    """The `state` that `save` wrote, with the hashes of the files. Raises OSError or ValueError if it is damaged."""
    file = os.path.join(folder, "state.json")
    return dict(_read_state(file, _version(file)))


def damage(folder: Path, *stems: str) -> str | None:
    """What is wrong with a checkpoint folder; None if its bytes are as they were written, and its numbers finite.

    stems  the files that matter (ema, raw, optimizer); none given: all. Only these are read, and only if they changed
           since the last time.
    """
    try:
        files = read_state(folder)["files"]
        for name in [f"{stem}.safetensors" for stem in stems] or files:
            if name not in files or os.path.basename(name) != name:
                return f"{name} is missing"
            file = os.path.join(folder, name)
            if fault := _fault(file, files[name], _version(file)):
                return f"{name} {fault}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"
    except ValueError as error:
        return str(error)
    return None


# -- which there are ---------------------------------------------------------------------------------------------------


def saved(run: Path, place: str = CHECKPOINTS) -> list[Path]:
    """The run's checkpoint folders, or those of its snapshots, the newest first, damaged ones too."""
    try:
        with os.scandir(run / place) as entries:
            names = [entry.name for entry in entries if entry.name.isdecimal() and entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [run / place / name for name in sorted(names, key=int, reverse=True)]


def newest(run: Path, *stems: str) -> Path | None:
    """The newest undamaged checkpoint of a run, or None; `stems` as in `damage`. Warns of damaged ones that are newer.

    The run may be training, and delete checkpoints meanwhile.
    """
    folders = saved(run)
    while folders:
        for folder in folders:
            if (reason := damage(folder, *stems)) is None:
                return folder
            if folder.is_dir():
                warnings.warn(f"checkpoint {folder}: {reason}; going back to the one before it", stacklevel=2)
        before, folders = folders, saved(run)
        if folders == before:
            return None
    return None


def best(run: Path, *stems: str) -> Path | None:
    """The undamaged checkpoint with the lowest held-out loss, or None; `stems` as in `damage`."""
    return next((folder for folder in _by_held_out_loss(saved(run)) if damage(folder, *stems) is None), None)


def _by_held_out_loss(folders: Collection[Path]) -> list[Path]:
    """Those of the folders that have a held-out loss, the best first."""
    losses = {}
    for folder in folders:
        with suppress(OSError, ValueError):
            loss = read_state(folder).get("held_out")
            if isinstance(loss, float) and math.isfinite(loss):
                losses[folder] = loss
    return sorted(losses, key=losses.__getitem__)


def settings(run: Path) -> Preset | None:
    """The settings of a run, from config.json or else from its newest checkpoint; None for a folder that is not a run.

    Raises InputError if neither can be read.
    """
    file = run / "config.json"
    if not file.is_file() and not saved(run):
        return None
    if file.exists() and not file.is_file():  # a pipe would make the reader wait, and the writer, too
        raise InputError(f"{file}: not a plain file; want it removed")
    try:
        return from_json(parse_json(file.read_bytes()))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        folder = newest(run, "raw")
        if folder is None:
            raise InputError(f"{file}: cannot be read ({error}); want another out") from error
        warnings.warn(f"{file}: cannot be read ({error}); the settings are those of {folder}", stacklevel=2)
        return from_json(parse_json(read_metadata(folder / "raw.safetensors")["config"]))


def prune(run: Path, keep: int, steps: Sequence[int] = (), protected: Collection[Path] = ()) -> None:
    """Delete checkpoints, except the newest `keep`, the one with the lowest held-out loss, `steps` and calibrated ones.

    protected  folders that stay in any case

    A damaged one is neither counted nor the best. It stays if it is newer or says that it is better, or if its loss
    cannot be read, since what cannot be read now may be whole. Pictures may have been compressed with a calibrated
    checkpoint, and only that checkpoint can decompress them. What cannot be deleted stays until the next time.
    """
    folders = saved(run)
    if len(folders) <= keep:
        return
    kept, whole = {*protected, *(folder for folder in folders if int(folder.name) in steps)}, 0
    for folder in folders:
        if whole < keep:
            whole += damage(folder) is None
            kept.add(folder)
    for folder in _by_held_out_loss(folders):
        kept.add(folder)
        if damage(folder) is None:
            break
    for folder in folders:
        if folder not in kept and _has_state(folder) and not any(folder.glob("*.calibration.json")):
            with suppress(OSError):
                atomic.remove_folder(folder)


def _has_state(folder: Path) -> bool:
    try:
        return bool(read_state(folder))
    except (OSError, ValueError):
        return False

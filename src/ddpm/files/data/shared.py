"""Decoded images in a file that all processes of a machine map: one copy, made once.

The file lies in the folder `decoded` of the data cache. Its key holds all that the pixels depend on, so another run
with the same images and settings uses it, too. One that no run has used for 7 days is deleted when another one is made.
A disk that is too full, or a cache that cannot be written, is no error: then each process decodes into its own memory.
"""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from numpy.typing import DTypeLike, NDArray

from ddpm.errors import brief
from ddpm.files import atomic
from ddpm.files.data.index import data_cache, forget, mark_used
from ddpm.files.images import Notes

PLAIN = 64 * 2**20
"""Fewer bytes than this stay in the memory of a process, if it is the only one of the run."""
_DAYS = 7

Report = tuple[dict[int, str], Notes]
"""Index of a bad image -> error; and the notes of conversions."""


def decoded_once(
    key: str, shape: tuple[int, ...], dtype: DTypeLike, decode: Callable[[NDArray[Any]], Report]
) -> tuple[NDArray[Any], Report]:
    """The pixels under a key, and what was said when they were decoded: decode(pixels) fills them once.

    The first process decodes, and others wait for it. The array is mapped: a change of it stays in this process.
    Raises what `decode` raises; then nothing is kept.
    """
    path = data_cache() / "decoded" / f"{key}.npy"
    try:
        atomic.make_folder(path.parent)
        with filelock.FileLock(path.with_suffix(".lock")):
            if (found := _mapped(path, shape, dtype)) is not None:
                return found
            forget(path.parent, "*.*", _DAYS)
            with atomic.temporary(path) as part:
                _reserve(part, shape, dtype)
                pixels = np.lib.format.open_memmap(part, "r+")
                report = decode(pixels)
                pixels.flush()
                del pixels  # Windows renames no file that is mapped
                about = path.with_suffix(".json")
                atomic.write_json(about, {"faults": list(report[0].items()), "notes": report[1]})
            found = _mapped(path, shape, dtype)
            if found is not None:
                return found
    except OSError as fault:
        reason = brief(fault)
        warnings.warn(f"{path}: not written ({reason}), so each process holds its own images", stacklevel=3)
    own = np.zeros(shape, dtype)
    return own, decode(own)


def _reserve(path: Path, shape: tuple[int, ...], dtype: DTypeLike) -> None:
    """Make an .npy file of zeros whose place on the disk is taken; a full disk would end a process that writes later.

    Raises OSError.
    """
    header = np.lib.format.open_memmap(path, "w+", dtype, shape)
    size = path.stat().st_size
    del header
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)


def _mapped(path: Path, shape: tuple[int, ...], dtype: DTypeLike) -> tuple[NDArray[Any], Report] | None:
    """The pixels of a whole file, which then count as used, and its report; None if it is missing or another one's."""
    try:
        about = json.loads(path.with_suffix(".json").read_text())
        pixels = np.load(path, mmap_mode="c")
        if pixels.shape != shape or pixels.dtype != dtype:
            return None
        mark_used(path)
        mark_used(path.with_suffix(".json"))
        faults = {int(index): str(fault) for index, fault in about["faults"]}
        notes = {what: (str(first), int(count)) for what, (first, count) in about["notes"].items()}
        return pixels, (faults, notes)
    except (OSError, ValueError, KeyError, TypeError):
        return None

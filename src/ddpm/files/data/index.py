"""Indexes of sources: what is slow to find out about files, found out once and kept in the user's cache.

An index is an Arrow table under a key that holds all it depends on: names, sizes and times of files, or their ETags.
The files lie in the folder `index` of `data_cache`. One that no run has used for 30 days is deleted when another one is
written. A damaged one is made again.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import filelock
import pyarrow as pa  # type: ignore[import-untyped]

from ddpm.files import atomic
from ddpm.files.features import cache
from ddpm.version import __version__

_VERSION = 1
"""Of what the tables hold."""
_DAYS = 30


def data_cache() -> Path:
    """The folder for what is kept of datasets: $DDPM_DATA_CACHE, by default $XDG_CACHE_HOME/ddpm or ~/.cache/ddpm."""
    chosen = os.environ.get("DDPM_DATA_CACHE")
    return Path(os.path.expanduser(chosen)) if chosen else cache()


def key_of(*parts: Any) -> str:
    """A key of JSON values, 64 hex digits.

    >>> key_of("tar", "a.tar", 7) == key_of("tar", "a.tar", 7) != key_of("tar", "a.tar", 8)
    True
    """
    return hashlib.sha256(json.dumps([_VERSION, __version__, *parts]).encode()).hexdigest()


def indexed(key: str, build: Callable[[], pa.Table], fresh: bool = False) -> pa.Table:
    """The table that is kept under a key, or else the one that `build` makes, which is kept then.

    fresh  whether to build it in any case

    Processes that start together wait for the first one. Raises what `build` raises. A cache that cannot be written is
    no error.
    """
    path = data_cache() / "index" / f"{key}.arrow"
    if not fresh and (table := _read(path)) is not None:
        return table
    with ExitStack() as stack:
        with suppress(OSError):
            atomic.make_folder(path.parent)
            stack.enter_context(filelock.FileLock(path.with_suffix(".lock")))
            if not fresh and (table := _read(path)) is not None:  # another process made it meanwhile
                return table
        table = build()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        data = sink.getvalue().to_pybytes()
        with suppress(OSError):
            atomic.write(path, hashlib.sha256(data).digest() + data)
            forget(path.parent, "*.*", _DAYS)
    return table


def _read(path: Path) -> pa.Table | None:
    """The table in a file, which then counts as used; None if it is missing or damaged."""
    try:
        data = path.read_bytes()
        if hashlib.sha256(memoryview(data)[32:]).digest() != data[:32]:
            return None
        with pa.ipc.open_file(pa.py_buffer(data).slice(32)) as reader:
            table = reader.read_all()
    except (OSError, pa.ArrowInvalid):
        return None
    mark_used(path)
    return table


def mark_used(path: Path) -> None:
    """Note that a file of the cache was used now, if this user may change its time."""
    with suppress(OSError):
        os.utime(path)


def forget(folder: Path, pattern: str, days: float) -> None:
    """Delete files that have not been used for so many days."""
    for path in folder.glob(pattern):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > 86_400 * days:
                path.unlink()

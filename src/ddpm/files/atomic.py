"""Files that appear whole or not at all: written under another name, synced, and only then renamed."""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_WINDOWS = os.name == "nt"


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Another name to write to; the file gets its own once nothing was raised. Missing folders are made.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "new" / "a.txt"
    >>> with whole(target) as part:
    ...     _ = part.write_text("all of it")
    >>> target.read_text(), len(list(target.parent.iterdir()))
    ('all of it', 1)
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.touch()
        mode = part.stat().st_mode  # as the user's files are; some libraries make theirs for the owner only
        yield part
        part.chmod(mode)
        sync(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write(path: str | Path, data: str | bytes) -> None:
    """Write a file whole or not at all; raises OSError where the disk is full."""
    with whole(path) as part:
        part.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: str | Path, values: Any) -> None:
    """`write` of plain values as indented JSON."""
    write(path, json.dumps(values, indent=1) + "\n")


def write_csv(path: str | Path, header: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    """`write` of a table."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    write(path, text.getvalue())


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Windows cannot do it for folders."""
    if _WINDOWS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if _WINDOWS else os.O_RDONLY)  # Windows syncs only what is open for writing
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Files that appear complete or not at all: each is written under a temporary name, synced, and then renamed."""

import csv
import io
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_WINDOWS = os.name == "nt"


@contextmanager
def temporary(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name to write to, and rename that file to `path` unless an exception was raised.

    Missing folders are made. A link goes on pointing where it points, and the file is made there. What is no plain
    file, as a pipe or a device, is written into and stays.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "new" / "a.txt"
    >>> with temporary(target) as part:
    ...     _ = part.write_text("all of it")
    >>> target.read_text(), len(list(target.parent.iterdir()))
    ('all of it', 1)
    """
    if _is_special(path):
        with tempfile.TemporaryDirectory() as folder:
            yield (part := Path(folder) / "part")
            with part.open("rb") as source, open(path, "wb") as target:
                shutil.copyfileobj(source, target)
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.touch()
        mode = part.stat().st_mode  # the user's default; some libraries make files that only the owner can read
        yield part
        part.chmod(mode)
        sync(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _is_special(path: str | Path) -> bool:
    """Whether there is something that is neither a plain file nor a folder, also behind a link such as /dev/stdout."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def make_folder(path: str | Path) -> Path:
    """Make a folder and its parents if they do not exist, also where a link points to nothing; returns the path."""
    Path(os.path.realpath(path)).mkdir(parents=True, exist_ok=True)
    return Path(path)


def write(path: str | Path, data: str | bytes) -> None:
    r"""Write a file completely or not at all. Raises OSError if that fails, as on a full disk.

    Names of files need not be valid Unicode. Where they are part of a text, their bytes are written as \udcXX.
    """
    with temporary(path) as part:
        part.write_bytes(data.encode(errors="backslashreplace") if isinstance(data, str) else data)


def write_json(path: str | Path, values: Any) -> None:
    """`write` plain values as indented JSON."""
    write(path, json.dumps(values, indent=1) + "\n")


def write_csv(path: str | Path, header: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    """`write` a table as CSV."""
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

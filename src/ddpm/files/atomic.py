"""Files and folders that appear complete or not at all: each gets a temporary name, is synced, and then renamed.

What a function here has written is on the disk when it returns, its name too. A loss of power does not take it back.

A temporary name is random and must not exist yet, so that no link that lies there is followed. What a killed process
left under such names is deleted by the next one that writes to the folder.
"""

import csv
import errno
import functools
import hashlib
import io
import json
import os
import platform
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_WINDOWS = os.name == "nt"
_SUFFIX = ".part"
_DAY = 86_400


class CannotWrite(OSError):
    """No file can be made in this place. The error names the file that was wanted, not its temporary name."""


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
    if is_special(path):
        with tempfile.TemporaryDirectory() as folder:
            yield (part := Path(folder) / "part")
            with part.open("rb") as source, open(path, "wb") as target:
                shutil.copyfileobj(source, target)
        return
    path = Path(os.path.realpath(path))
    part = _temporary_name(path.parent)
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)
    try:
        descriptor = os.open(part, flags, 0o666)
    except OSError as error:
        raise CannotWrite(error.errno, error.strerror, str(path)) from None
    try:
        mode = os.fstat(descriptor).st_mode  # the user's default; safetensors' files are for their owner only
        os.close(descriptor)
        yield part
        part.chmod(mode)
        sync(part)
        os.replace(part, path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """The same for a folder: yield a new one, and rename it to `path`. A folder that has this name already is replaced.

    The files in it must be synced, as those of `write` are. The old folder is set aside just before the new one gets
    its name, and power that is lost between the two leaves neither. So replace only what is empty or damaged.
    """
    path = Path(os.path.realpath(path))
    part = _temporary_name(path.parent)
    part.mkdir()
    try:
        yield part
        for folder in (*(p for p in part.rglob("*") if p.is_dir()), part):
            sync(folder)
        old = _set_aside(path) if path.exists() else None  # Windows does not rename onto a folder
        try:
            os.rename(part, path)
        except OSError:
            if old is not None:
                os.rename(old, path)
            raise
        try:
            sync(path.parent)
        finally:
            if old is not None:
                shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Delete a folder so that nobody sees a part of it. Raises OSError if that fails."""
    shutil.rmtree(_set_aside(path), ignore_errors=True)


def _set_aside(folder: Path) -> Path:
    """Give a folder a temporary name, and return it."""
    part = _temporary_name(folder.parent)
    os.rename(folder, part)
    return part


def is_special(path: str | Path) -> bool:
    """Whether there is something that is neither a plain file nor a folder, also behind a link such as /dev/stdout."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def make_folder(path: str | Path) -> Path:
    """Make a folder and its parents if they do not exist, also where a link points to nothing; returns the path.

    Its name, and those of its new parents, are then on the disk.
    """
    folder = Path(os.path.realpath(path))
    if folder.is_symlink():  # links that go round
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    for new in reversed(missing):  # one by one: Python's own way to make parents fails for a thousand of them
        try:
            new.mkdir(exist_ok=True)
        except FileNotFoundError as error:  # its parent is there, but takes no folders, as /proc
            raise CannotWrite(error.errno, error.strerror, str(path)) from None
        sync(new.parent)
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
    """Wait until a file, or the names in a folder, are on the disk. Not every file system can do it for folders."""
    is_folder = path.is_dir()
    if _WINDOWS and is_folder:
        return
    try:
        descriptor = os.open(path, os.O_RDWR if _WINDOWS else os.O_RDONLY)  # Windows syncs only what it may write
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
            raise


# -- temporary names ---------------------------------------------------------------------------------------------------


def _temporary_name(folder: Path) -> Path:
    """A new name in a folder, which is made if it is missing. It tells which process will use it."""
    make_folder(folder)
    _remove_leftovers(folder.absolute())
    return folder / f".ddpm-{_machine()}-{os.getpid()}-{secrets.token_hex(8)}{_SUFFIX}"


@functools.cache
def _machine() -> str:
    """Eight hex digits for where process ids are unique: this start of this machine, and its container."""
    try:
        facts = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:
        facts = platform.node()
    return hashlib.sha256(facts.encode()).hexdigest()[:8]


@functools.cache  # once per folder: a folder may hold many thousand images
def _remove_leftovers(folder: Path) -> None:
    """Delete what processes that do not run any more left under temporary names; of other machines, after a day."""
    for part in folder.glob(f".ddpm-*{_SUFFIX}"):
        machine, _, rest = part.name.removeprefix(".ddpm-").partition("-")
        with suppress(OSError, ValueError):
            here = machine == _machine() and not _WINDOWS
            if not _is_running(int(rest.partition("-")[0])) if here else time.time() - part.lstat().st_mtime > _DAY:
                part.unlink() if part.is_symlink() or not part.is_dir() else shutil.rmtree(part)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True

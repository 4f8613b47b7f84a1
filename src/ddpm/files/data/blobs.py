"""Files that are read in parts, wherever they lie."""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol


class Blob(Protocol):
    """A file of `size` bytes. Its text is its name in errors."""

    @property
    def size(self) -> int: ...

    def facts(self) -> list[object]:
        """JSON values that change when the file does: its place, its size, and its time or ETag."""

    def read(self, start: int, size: int) -> bytes:
        """A part of the file, less where it ends early. Raises OSError."""

    def open(self) -> BinaryIO:
        """The file, for reading from one end to the other. Raises OSError."""


@dataclass(frozen=True)
class LocalFile:
    """A file of this machine."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def facts(self) -> list[object]:
        return [os.path.realpath(self.path), *facts_of(self.path)]

    def read(self, start: int, size: int) -> bytes:
        with self.path.open("rb", buffering=0) as file:
            file.seek(start)
            return file.read(size)

    def open(self) -> BinaryIO:
        return io.BufferedReader(io.FileIO(self.path), 1 << 16)


def facts_of(file: Path | os.DirEntry[str]) -> tuple[int, int]:
    """The size of a file and the time of its change in nanoseconds; -1 if there is none, as for a link to nothing.

    The time is also that of its inode, which a copy with `cp -p` or `rsync -t` in its place does not keep.
    """
    try:
        status = file.stat()
    except OSError:
        return -1, -1
    return status.st_size, max(status.st_mtime_ns, status.st_ctime_ns)

"""What a source of images holds, nothing decoded: its splits, labels and class names."""

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddpm.errors import InputError
from ddpm.files import images as pictures

SKIP_HINT = "`ddpm train --skip-bad` goes on without such"

ACCEPTED = "want digits, a folder of images, a .zip or .parquet file, or a hub data set OWNER/NAME"
SPLIT_NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing", "validation", "valid", "val"),
    "validation": ("validation", "valid", "val"),
}
"""A split asked for -> names it may go by, the best first."""
Encoded: TypeAlias = bytes | Path | Image.Image


class Source(Protocol):
    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What errors call an image."""

    def fetch(self, indices: Sequence[int]) -> list[Encoded | InputError]:
        """The encoded images; in place of one that cannot be had, the error."""

    def identity(self) -> Iterable[bytes]:
        """Names and sizes, for the fingerprint."""


@dataclass
class Listing:
    """One split of a source, nothing decoded."""

    source: Source
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] | None = None


Splits: TypeAlias = dict[str, Callable[[], Listing]]


def is_image(file: str) -> bool:
    return PurePosixPath(file).suffix.lower() in pictures.SUFFIXES


def is_hidden(file: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in file.split("/"))


def walk(root: Path) -> Iterator[str]:
    """Relative paths of all files but hidden ones, with "/"; links to folders are followed, each folder once."""
    seen = set[str]()
    for folder, folders, files in os.walk(root, followlinks=True):
        here = os.path.realpath(folder)
        if here in seen:
            folders.clear()
            continue
        seen.add(here)
        folders[:] = sorted(f for f in folders if not is_hidden(f))
        for file in files:
            if not is_hidden(file):
                yield (Path(folder) / file).relative_to(root).as_posix()


def natural(path: str) -> tuple[tuple[tuple[str | int, ...], ...], str]:
    """Sort key of a relative path: folder by folder, numbers by value, the same on every platform.

    >>> sorted(["b/10.png", "b/9.png", "a.png"], key=natural)
    ['a.png', 'b/9.png', 'b/10.png']
    """
    parts = unicodedata.normalize("NFC", path).split("/")
    split = (re.split(r"([0-9]+)", part) for part in parts)  # text and digits in turn, so like meets like
    return tuple(tuple(int(s) if k % 2 else s for k, s in enumerate(part)) for part in split), path


def refuse_columns(source: str, columns: tuple[str | None, str | None]) -> None:
    for option, column in zip(("image column", "label column"), columns, strict=True):
        if column is not None:
            raise InputError(f"{option} {column}: {source} holds images only and has no columns")

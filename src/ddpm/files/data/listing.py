"""What a source of images holds before anything is decoded: its splits, labels and class names."""

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

from ddpm import catalog
from ddpm.errors import InputError
from ddpm.files import images as pictures

SKIP_HINT = "the setting skip_bad of `ddpm train` skips such images"

ACCEPTED = f"want {catalog.accepted_sources()}"
SPLIT_NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing", "validation", "valid", "val"),
    "validation": ("validation", "valid", "val"),
}
"""The split that is asked for -> the names that it may have in a source, the preferred one first."""
Columns: TypeAlias = tuple[str | None, str | None]
"""The names of the image column and of the label column; None for one that is to be found."""
Encoded: TypeAlias = bytes | Path | Image.Image
"""One image: the bytes of a file, the path of a file, or an image that needs no decoding."""


class EncodedImages(Protocol):
    """The images of one split, by index."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The name of an image in errors."""

    def fetch(self, indices: Sequence[int]) -> list[Encoded | InputError]:
        """The encoded images; an error in the place of each one that cannot be read."""

    def identity(self) -> Iterable[bytes]:
        """Names and sizes of the images, for the fingerprint."""


@dataclass
class Listing:
    """One split of a source.

    labels       int64 [N] in 0..K-1, or None
    class_names  K names, or None
    """

    encoded: EncodedImages
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] | None = None


Splits: TypeAlias = dict[str, Callable[[], Listing]]
"""The name of a split -> a function that lists it."""


def is_image(file: str) -> bool:
    return PurePosixPath(file).suffix.lower() in pictures.SUFFIXES


def is_hidden(file: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in file.split("/"))


def walk(root: Path) -> Iterator[str]:
    """The relative paths, with "/", of all files below `root` that are not hidden.

    Links to folders are followed, and each folder is visited once.
    """
    seen = set[str]()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
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
    # each list alternates text and digits, so text is compared with text, and numbers with numbers
    split = (re.split(r"([0-9]+)", part) for part in parts)
    return tuple(tuple(int(s) if k % 2 else s for k, s in enumerate(part)) for part in split), path


def refuse_columns(source: str, columns: Columns) -> None:
    """Raise InputError if a column is named, for a source that has none."""
    for option, column in zip(("image_column", "label_column"), columns, strict=True):
        if column is not None:
            raise InputError(f"{option} {column}: {source} holds images only and has no columns")

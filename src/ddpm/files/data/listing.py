"""What a source of images holds before anything is decoded: its splits, labels and class names."""

import functools
import os
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddpm import catalog
from ddpm.errors import InputError
from ddpm.files import codecs
from ddpm.files import images as pictures
from ddpm.files.data.blobs import facts_of

SKIP_HINT = "the setting skip_bad of `ddpm train` skips such images"

ACCEPTED = f"want {catalog.accepted_sources()}"
GIVEN = re.compile(r"(array|tensor) \w+ \[[\d, ]+\]|Dataset \w+ of [\d,]+|datasets\.Dataset(Dict)?")
"""What the setting `data` of a run is if its images were given as a Python object (`objects`)."""
LABELS = ("label", "labels", "class", "fine_label", "cls")
"""Usual names of what holds the labels, the preferred one first."""
_COMPANIONS = frozenset(
    ".bib .cfg .cls .csv .css .db .doc .docx .htm .html .ini .ipynb .js .json .jsonl .lnk .log .md .md5 .pdf .py .rst "
    ".sha256 .toml .tsv .txt .url .xml .yaml .yml".split()
)
"""Suffixes of files that often lie beside images. Leaving them out needs no warning."""
TEXTS = frozenset(
    "AUTHORS CHANGELOG CITATION CONTRIBUTING COPYING INSTALL LICENCE LICENSE MANIFEST NOTICE README".split()
)
"""Names, without a suffix, of texts that often lie beside images."""
Encoded: TypeAlias = bytes | Path | Image.Image | NDArray[Any]
"""One image: the bytes of a file, the path of a file, or a picture or an array that needs no decoding."""


@dataclass(frozen=True)
class Options:
    """How a source is to be read.

    image_column, label_column  names of columns; None for one that is to be found
    pair_column                 the column of the other images of condition pairs; None if there is none
    allow_paths                 whether a row may name an image file outside the source's folder
    progress                    whether to show a bar
    pages                       what is taken of a TIFF file of several pages: first, channels or images
    fresh                       whether to look at the files themselves, and not at an index of them
    cache_bytes                 what parts of remote files may take on this machine
    """

    image_column: str | None = None
    label_column: str | None = None
    allow_paths: bool = False
    progress: bool = False
    pages: str = "first"
    fresh: bool = False
    cache_bytes: int = 4 * 2**30
    pair_column: str | None = None

    def refuse_columns(self, source: str) -> None:
        """Raise InputError if a column is named, for a source that has none."""
        for option in ("image_column", "label_column", "pair_column"):
            if (column := getattr(self, option)) is not None:
                raise InputError(f"{option} {column}: {source} holds images only and has no columns")


class EncodedImages(Protocol):
    """The images of one split, by index."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The name of an image in errors."""

    def fetch(self, indices: Sequence[int]) -> Iterator[Encoded | InputError]:
        """The encoded images, of which few are in memory; an error in the place of each one that cannot be read."""

    def identity(self) -> Iterable[bytes]:
        """Names and sizes of the images, for the fingerprint."""

    def stamp(self) -> Any:
        """JSON values that change whenever an image may have: places and times of files. None if nothing tells."""


@dataclass
class Listing:
    """One split of a source.

    labels       int64 [N] in 0..K-1, or None
    class_names  K names, or None
    shards       int64 [S], where each shard ends, if the images must be read in order; None if they need not
    """

    encoded: EncodedImages
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] | None = None
    shards: NDArray[np.int64] | None = None


@dataclass
class Contents:
    """What a source holds.

    splits    name of a split -> a function that lists it
    left_out  kind of file that is not read, such as ".heic" -> number of files
    """

    splits: Mapping[str, Callable[[], Listing]]
    left_out: Mapping[str, int] = field(default_factory=dict)

    def warn(self, source: str) -> None:
        """Warn of files that are left out, if there are `unexpected` ones."""
        if kinds := unexpected(self.left_out):
            number = sum(kinds.values())
            data = {".parquet", ".arrow", ".tar", ".zip", ".npz"} & set(kinds)
            missing = ", ".join(sorted(codecs.MISSING & set(kinds)))
            hint = f"; {codecs.INSTALL} reads {missing}" if missing else ""
            hint += f"; the images are read, and not the data in {', '.join(sorted(data))}" if data else ""
            warnings.warn(
                f"{source}: {number:,} file{'s' * (number != 1)} left out, which cannot be read as images: "
                f"{counted(kinds)}{hint}",
                stacklevel=4,
            )


def unexpected(kinds: Mapping[str, int]) -> dict[str, int]:
    """The kinds of files that seldom lie beside images, unless they are images or data themselves.

    >>> unexpected({".heic": 8, ".txt": 1, "LICENSE": 1})
    {'.heic': 8}
    """
    return {kind: n for kind, n in kinds.items() if kind not in _COMPANIONS | TEXTS}


def counted(kinds: Mapping[str, int]) -> str:
    """Kinds of files with their numbers, the most frequent first.

    >>> counted({".txt": 1, ".heic": 8})
    '8 .heic, 1 .txt'
    """
    parts = [f"{n:,} {kind}" for kind, n in sorted(kinds.items(), key=lambda item: (-item[1], item[0]))]
    return ", ".join([*parts[:6], ".."] if len(parts) > 6 else parts)


def number_values(values: Iterable[str | int]) -> tuple[dict[str | int, int], tuple[str, ...]]:
    """Different values numbered 0..K-1 in natural order, and their names.

    >>> number_values(["b10", "b9", "b10"])
    ({'b9': 0, 'b10': 1}, ('b9', 'b10'))
    """
    ordered = sorted(
        set(values), key=lambda value: (isinstance(value, str), natural(value) if isinstance(value, str) else value)
    )
    return {value: k for k, value in enumerate(ordered)}, tuple(map(str, ordered))


def names_and_sizes(files: Sequence[str], sizes: Iterable[int]) -> Iterator[bytes]:
    """A line for each file, for `EncodedImages.identity`."""
    for file, size in zip(files, sizes, strict=True):
        yield f"{file} {size}\n".encode(errors="surrogateescape")


def is_image(file: str) -> bool:
    """Whether a name ends as those of images do.

    >>> is_image("a/1.JPG"), is_image("a/.png"), is_image("png")
    (True, False, False)
    """
    stem, dot, suffix = file.rpartition("/")[2].rpartition(".")
    return bool(stem and dot) and f".{suffix.lower()}" in pictures.SUFFIXES


def holds_image(file: str) -> bool:
    """Whether a file is an image: a picture, or an array in an .npy file."""
    return is_image(file) or file.lower().endswith(".npy")


def is_hidden(file: str) -> bool:
    """Whether a path leads to what a system keeps for itself, as macOS and Synology do."""
    return any(part.startswith(".") or part in ("__MACOSX", "@eaDir") for part in file.split("/"))


def walk(root: Path) -> Iterator[str]:
    """The relative paths, with "/", of all files below `root` that are not hidden.

    Links to folders are followed, and each folder is visited once. Raises InputError for a folder that cannot be read.
    """
    return (file for file, _ in _entries(root))


def image_files(root: Path, arrays: bool = False) -> list[str]:
    """The images among the files of `walk`, in natural order of their names; with `arrays`, .npy files too.

    Raises InputError as `walk` does.
    """
    return sorted(filter(holds_image if arrays else is_image, walk(root)), key=natural)


def facts(root: Path) -> dict[str, tuple[int, int]]:
    """`facts_of` each file of `walk`."""
    return {file: facts_of(entry) for file, entry in _entries(root)}


def _entries(root: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    seen, folders = set[str](), [""]
    while folders:
        relative = folders.pop()
        folder = os.path.join(root, relative) if relative else str(root)
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        below = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if is_hidden(entry.name):
                        continue
                    name = f"{relative}/{entry.name}" if relative else entry.name
                    if entry.is_dir():
                        below.append(name)
                    else:
                        yield name, entry
        except OSError as fault:
            why = (fault.strerror or str(fault)).lower()
            raise InputError(f"{fault.filename}: {why}; want a folder that can be read") from None
        folders += sorted(below, reverse=True)


def natural(path: str) -> tuple[tuple[tuple[str | int, ...], ...], str]:
    """Sort key of a relative path: folder by folder, numbers by value, the same on every platform.

    >>> sorted(["b/10.png", "b/9.png", "a.png"], key=natural)
    ['a.png', 'b/9.png', 'b/10.png']
    """
    parts = (path if path.isascii() else unicodedata.normalize("NFC", path)).split("/")
    return (*map(_numbers, parts[:-1]), _split_numbers(parts[-1])), path


def _split_numbers(part: str) -> tuple[str | int, ...]:
    """Text and digits in turn, so that text is compared with text, and numbers with numbers."""
    return tuple(int(piece) if k % 2 else piece for k, piece in enumerate(_DIGITS.split(part)))


_DIGITS = re.compile(r"([0-9]+)")
_numbers = functools.lru_cache(maxsize=2**14)(_split_numbers)
"""For folders, of which there are few."""

"""Where images can come from: `SOURCES` has a row for each kind of source, with the functions beside it.

`hugging_face` reads the data sets of Hugging Face layout, in a folder, in a file or on the hub.
"""

import difflib
import functools
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ddpm.errors import InputError
from ddpm.files import images as pictures
from ddpm.files.data import hugging_face
from ddpm.files.data.listing import (
    ACCEPTED,
    SPLIT_NAMES,
    Columns,
    Encoded,
    EncodedImages,
    Listing,
    Splits,
    is_hidden,
    is_image,
    natural,
    refuse_columns,
    walk,
)
from ddpm.noise import generator


class Source(NamedTuple):
    """A kind of source.

    recognises  (SOURCE, SOURCE as a path) -> whether it is of this kind
    splits      (SOURCE, SOURCE as a path, columns, whether to show progress) -> its splits
    meaning     what help and errors call this kind of source
    """

    recognises: Callable[[str, Path], bool]
    splits: Callable[[str, Path, Columns, bool], Splits]
    meaning: str


def open_source(source: str, image_column: str | None, label_column: str | None, progress: bool) -> Splits:
    """The splits of SOURCE, by the first row of SOURCES that recognises it. Raises InputError if none does."""
    path = Path(os.path.expanduser(source))  # "~name" stays as it is if there is no user of that name
    if source:  # Path("") is the working directory
        for kind in SOURCES.values():
            if kind.recognises(source, path):
                return kind.splits(source, path, (image_column, label_column), progress)
    if source and path.is_dir():
        raise InputError(f"{source}: no images in this folder; {ACCEPTED}")
    if path.is_file():
        raise InputError(f"{source}: not a file of images that can be read; {ACCEPTED}")
    raise InputError(f"{source or repr(source)}: no such file or folder; {ACCEPTED}")


# -- digits ------------------------------------------------------------------------------------------------------------

_DIGITS = 0xD161
"""Key of the permutation that shuffles the digits."""


@dataclass
class Arrays:
    """Images in memory, uint8 [N, H, W]."""

    title: str
    arrays: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.arrays)

    def name(self, index: int) -> str:
        return f"image {index} of {self.title}"

    def fetch(self, indices: Sequence[int]) -> list[Encoded | InputError]:
        return [Image.fromarray(self.arrays[i]) for i in indices]

    def identity(self) -> Iterable[bytes]:
        yield self.arrays.tobytes()


def _is_digits(source: str, path: Path) -> bool:
    return source == "digits"


def _digits(source: str, path: Path, columns: Columns, progress: bool) -> Splits:
    from sklearn.datasets import load_digits

    refuse_columns(source, columns)
    values, labels = load_digits(return_X_y=True)  # 0..16
    arrays = np.round(values * 255 / 16).astype(np.uint8).reshape(-1, 8, 8)
    names = tuple(map(str, range(10)))
    # scikit-learn lists the digits writer by writer, so without shuffling the test split would have other writers
    shuffled = torch.randperm(len(arrays), generator=generator(_DIGITS)).numpy()
    arrays, labels = arrays[shuffled], labels[shuffled]

    def part(title: str, rows: slice) -> Listing:
        return Listing(Arrays(title, arrays[rows]), labels[rows].astype(np.int64), names)

    return {
        "train": functools.partial(part, "digits (train)", slice(1500)),
        "test": functools.partial(part, "digits (test)", slice(1500, None)),
    }


# -- image files in a folder or a zip file -----------------------------------------------------------------------------


@dataclass
class Folder:
    """Image files of a folder; `files` are paths relative to `root`, with "/"."""

    root: Path
    files: list[str]

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.root / self.files[index])

    def fetch(self, indices: Sequence[int]) -> list[Encoded | InputError]:
        return [self.root / self.files[i] for i in indices]

    def identity(self) -> Iterable[bytes]:
        for file in self.files:
            path = self.root / file
            yield f"{file} {path.stat().st_size if path.exists() else -1}\n".encode(errors="surrogateescape")


def _is_image_folder(source: str, path: Path) -> bool:
    return path.is_dir() and any(map(is_image, walk(path)))


def _image_folder(source: str, path: Path, columns: Columns, progress: bool) -> Splits:
    refuse_columns(source, columns)
    return _tree(source, walk(path), lambda files: Folder(path, files))


@dataclass
class Zip:
    """Image files of a zip file."""

    path: Path
    files: list[str]
    opened: tuple[int, zipfile.ZipFile] | None = field(default=None, repr=False)  # with the id of the process

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return f"{self.files[index]} in {self.path}"

    def fetch(self, indices: Sequence[int]) -> list[Encoded | InputError]:
        archive, members = self._archive(), list[Encoded | InputError]()
        for i in indices:
            try:
                members.append(archive.read(self.files[i]))
            # zipfile raises RuntimeError for an encrypted member
            except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as fault:
                members.append(InputError(f"{self.name(i)}: cannot be read ({pictures.one_line(fault)})"))
        return members

    def identity(self) -> Iterable[bytes]:
        archive = self._archive()
        for file in self.files:
            yield f"{file} {archive.getinfo(file).file_size}\n".encode(errors="surrogateescape")

    def _archive(self) -> zipfile.ZipFile:
        if self.opened is None or self.opened[0] != os.getpid():  # a forked process must not share the file position
            self.opened = (os.getpid(), zipfile.ZipFile(self.path))
        return self.opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "opened": None}


def _is_zip(source: str, path: Path) -> bool:
    return path.is_file() and (path.suffix.lower() == ".zip" or zipfile.is_zipfile(path))


def _zip(source: str, path: Path, columns: Columns, progress: bool) -> Splits:
    if not zipfile.is_zipfile(path):
        raise InputError(f"{source}: damaged or empty zip file; {ACCEPTED}")
    try:
        with zipfile.ZipFile(path) as archive:
            files = [name for name in archive.namelist() if not name.endswith("/") and not is_hidden(name)]
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as fault:
        raise InputError(f"{source}: damaged zip file ({pictures.one_line(fault)}); {ACCEPTED}") from fault
    if not any(map(is_image, files)):
        raise InputError(f"{source}: no images in this zip file")
    refuse_columns(source, columns)
    return _tree(source, files, lambda names: Zip(path, names))


def _tree(source: str, files: Iterable[str], images_of: Callable[[list[str]], EncodedImages]) -> Splits:
    """The splits of files in folders. A folder called train, test, ... is a split; the folders in it are classes."""
    files = sorted(filter(is_image, files), key=natural)
    split_names = {alias for aliases in SPLIT_NAMES.values() for alias in aliases}
    root = ""
    while True:  # down to the folder where the tree branches
        tops = {file[len(root) :].partition("/")[0] for file in files}
        top = tops.pop()
        if tops or root + top in files or top.lower() in split_names:
            break
        root += top + "/"
    groups: dict[str, list[str]] = {}  # split -> files
    for file in files:
        top, slash, _ = file[len(root) :].partition("/")
        if slash and top.lower() in split_names:
            groups.setdefault(top, []).append(file)
    if others := len(files) - sum(map(len, groups.values())) if groups else 0:
        kinds = ", ".join(sorted(split_names))
        raise InputError(
            f"{source}: {', '.join(sorted(groups))}: the name of a split, but {others:,} images lie beside it; want "
            f"all in folders of such names ({kinds}), or none"
        )
    prefix = {split: f"{root}{split}/" for split in groups}
    if not groups:
        groups, prefix = {"train": files}, {"train": root}

    tops = {
        file[len(prefix[split]) :].partition("/")[0]
        for split, group in groups.items()
        for file in group
        if "/" in file[len(prefix[split]) :]
    }
    names = tuple(sorted(tops, key=natural))

    def listing(split: str) -> Listing:
        below = [file[len(prefix[split]) :] for file in groups[split]]
        if len(names) < 2 or not all("/" in file for file in below):
            return Listing(images_of(groups[split]))
        number = {name: k for k, name in enumerate(names)}
        labels = np.array([number[file.partition("/")[0]] for file in below], np.int64)
        return Listing(images_of(groups[split]), labels, names)

    return {split: functools.partial(listing, split) for split in groups}


# -- data sets in Hugging Face layout ----------------------------------------------------------------------------------


def _is_dataset_folder(source: str, path: Path) -> bool:
    return path.is_dir() and (
        hugging_face.is_saved(path) or any(file.lower().endswith((".parquet", ".arrow", ".tar")) for file in walk(path))
    )


def _is_parquet(source: str, path: Path) -> bool:
    return path.is_file() and path.suffix.lower() == ".parquet"


def _local_dataset(source: str, path: Path, columns: Columns, progress: bool) -> Splits:
    return hugging_face.listings(source, hugging_face.load_local(source, path, progress), columns)


def _is_hub_name(source: str, path: Path) -> bool:
    """Whether SOURCE has the form of OWNER/NAME, NAME, OWNER/NAME:CONFIG or NAME:CONFIG, and is not a missing file."""
    is_file_name = source.lower().endswith((".zip", ".parquet", *pictures.SUFFIXES))
    return not (path.exists() or is_file_name) and bool(re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?", source))


def _hub_dataset(source: str, path: Path, columns: Columns, progress: bool) -> Splits:
    if difflib.get_close_matches(source.lower(), ["digits"], cutoff=0.75):
        raise InputError(f"{source}: no such data set, did you mean digits? ({ACCEPTED})")
    return hugging_face.listings(source, hugging_face.load_hub(source, progress), columns)


SOURCES = {
    "digits": Source(_is_digits, _digits, meaning="digits"),
    "folder": Source(_is_image_folder, _image_folder, meaning="a folder of images"),
    "data set": Source(_is_dataset_folder, _local_dataset, meaning="a folder of a Hugging Face data set"),
    "parquet": Source(_is_parquet, _local_dataset, meaning="a .parquet file"),
    "zip": Source(_is_zip, _zip, meaning="a .zip file of images"),
    "hub": Source(_is_hub_name, _hub_dataset, meaning="a hub data set OWNER/NAME"),
}
"""The kinds of source. The first that recognises a SOURCE opens it."""

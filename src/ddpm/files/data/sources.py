"""The kinds of source: digits, a folder, a zip file; data sets in Hugging Face layout are in `hugging_face`."""

import difflib
import functools
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    Encoded,
    Listing,
    Source,
    Splits,
    is_hidden,
    is_image,
    natural,
    refuse_columns,
    walk,
)
from ddpm.noise import generator

_DIGITS = 0xD161


@dataclass
class Arrays:
    title: str
    arrays: NDArray[np.uint8]  # [N, H, W]

    def __len__(self) -> int:
        return len(self.arrays)

    def name(self, index: int) -> str:
        return f"image {index} of {self.title}"

    def fetch(self, indices: Sequence[int]) -> list[Encoded | InputError]:
        return [Image.fromarray(self.arrays[i]) for i in indices]

    def identity(self) -> Iterable[bytes]:
        yield self.arrays.tobytes()


@dataclass
class Folder:
    root: Path
    files: list[str]  # relative to root

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


@dataclass
class Zip:
    path: Path
    files: list[str]
    opened: tuple[int, zipfile.ZipFile] | None = field(default=None, repr=False)  # by which process

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return f"{self.files[index]} in {self.path}"

    def fetch(self, indices: Sequence[int]) -> list[Encoded | InputError]:
        archive, found = self._archive(), list[Encoded | InputError]()
        for i in indices:
            try:
                found.append(archive.read(self.files[i]))
            except (
                zipfile.BadZipFile,
                zlib.error,
                EOFError,
                OSError,
                RuntimeError,
            ) as fault:  # RuntimeError: encrypted
                found.append(InputError(f"{self.name(i)}: cannot be read ({pictures.one_line(fault)})"))
        return found

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


def open_source(source: str, image_column: str | None, label_column: str | None, progress: bool) -> Splits:
    columns = (image_column, label_column)
    if source == "digits":
        refuse_columns(source, columns)
        return _digits()
    path = Path(os.path.expanduser(source))  # which leaves a user that there is not
    if source and path.is_dir():
        files = list(walk(path))
        if any(map(is_image, files)):
            return _tree(source, files, columns, lambda names: Folder(path, names))
        saved = any((path / mark).is_file() for mark in ("state.json", "dataset_dict.json"))
        if saved or any(file.lower().endswith((".parquet", ".arrow", ".tar")) for file in files):
            return hugging_face.listings(source, hugging_face.load_local(source, path, files, saved, progress), columns)
        raise InputError(f"{source}: no images in this folder; {ACCEPTED}")
    if path.is_file():
        if path.suffix.lower() == ".parquet":
            return hugging_face.listings(source, hugging_face.load_local(source, path, [""], False, progress), columns)
        if zipfile.is_zipfile(path):
            try:
                with zipfile.ZipFile(path) as archive:
                    files = [name for name in archive.namelist() if not name.endswith("/") and not is_hidden(name)]
            except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as fault:
                raise InputError(f"{source}: damaged zip file ({pictures.one_line(fault)}); {ACCEPTED}") from fault
            if not any(map(is_image, files)):
                raise InputError(f"{source}: no images in this zip file")
            return _tree(source, files, columns, lambda names: Zip(path, names))
        kind = "damaged or empty zip file" if path.suffix.lower() == ".zip" else "neither a zip nor a parquet file"
        raise InputError(f"{source}: {kind}; {ACCEPTED}")
    known = (".zip", ".parquet", *pictures.SUFFIXES)
    if source.lower().endswith(known) or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?", source):
        raise InputError(f"{source or repr(source)}: no such file or folder; {ACCEPTED}")
    if difflib.get_close_matches(source.lower(), ["digits"], cutoff=0.75):
        raise InputError(f"{source}: no such data set, did you mean digits? ({ACCEPTED})")
    return hugging_face.listings(source, hugging_face.load_hub(source, progress), columns)


def _digits() -> Splits:
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)  # 0..16
    arrays = np.round(values * 255 / 16).astype(np.uint8).reshape(-1, 8, 8)
    names = tuple(map(str, range(10)))
    shuffled = torch.randperm(len(arrays), generator=generator(_DIGITS)).numpy()  # it is sorted by writer
    arrays, labels = arrays[shuffled], labels[shuffled]

    def part(title: str, rows: slice) -> Listing:
        return Listing(Arrays(title, arrays[rows]), labels[rows].astype(np.int64), names)

    return {
        "train": functools.partial(part, "digits (train)", slice(1500)),
        "test": functools.partial(part, "digits (test)", slice(1500, None)),
    }


def _tree(
    source: str, files: list[str], columns: tuple[str | None, str | None], make: Callable[[list[str]], Source]
) -> Splits:
    """Splits by folders called train, test, ...; classes by the folders in these."""
    refuse_columns(source, columns)
    files = sorted(filter(is_image, files), key=natural)
    split_names = {alias for aliases in SPLIT_NAMES.values() for alias in aliases}
    root = ""
    while True:  # down to where the tree branches
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
            return Listing(make(groups[split]))
        number = {name: k for k, name in enumerate(names)}
        labels = np.array([number[file.partition("/")[0]] for file in below], np.int64)
        return Listing(make(groups[split]), labels, names)

    return {split: functools.partial(listing, split) for split in groups}

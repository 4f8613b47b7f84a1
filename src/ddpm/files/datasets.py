"""From a SOURCE to batches of images, in an order that is a function of (seed, step).

SOURCE is `digits` (scikit-learn's, built in); a folder (nested), zip or parquet file of images; a local data set in
Hugging Face layout; or the name of one on the hub, OWNER/NAME or OWNER/NAME:CONFIG. (A folder called digits: ./digits.)

Small sets are decoded once and sit in memory as uint8; larger ones are decoded by worker processes ahead of the step.
"""

import difflib
import functools
import hashlib
import os
import re
import signal
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ddpm.errors import InputError
from ddpm.files import images as pictures
from ddpm.noise import generator

ACCEPTED = "want digits, a folder of images, a .zip or .parquet file, or a hub data set OWNER/NAME"

_SKIP = "`ddpm train --skip-bad` goes on without such"

_SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "validation", "valid", "val"),
    "validation": ("validation", "valid", "val"),
}
"""A split asked for -> names it may go by, the best first."""
_LABELS = ("label", "labels", "class", "fine_label")
_ORDER, _HOLDOUT, _DIGITS = 0x0DE5, 0x401D, 0xD161
"""Keys that keep these draws apart from others of the same seed."""


# -- sources: encoded images by index ----------------------------------------------------------------------------------


_Encoded: TypeAlias = bytes | Path | Image.Image


class _Source(Protocol):
    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What errors call an image."""

    def fetch(self, indices: Sequence[int]) -> list[_Encoded | InputError]:
        """The encoded images; in place of one that cannot be had, the error."""

    def identity(self) -> Iterable[bytes]:
        """Names and sizes, for the fingerprint."""


@dataclass
class _Arrays:
    title: str
    arrays: NDArray[np.uint8]  # [N, H, W]

    def __len__(self) -> int:
        return len(self.arrays)

    def name(self, index: int) -> str:
        return f"image {index} of {self.title}"

    def fetch(self, indices: Sequence[int]) -> list[_Encoded | InputError]:
        return [Image.fromarray(self.arrays[i]) for i in indices]

    def identity(self) -> Iterable[bytes]:
        yield self.arrays.tobytes()


@dataclass
class _Folder:
    root: Path
    files: list[str]  # relative to root

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.root / self.files[index])

    def fetch(self, indices: Sequence[int]) -> list[_Encoded | InputError]:
        return [self.root / self.files[i] for i in indices]

    def identity(self) -> Iterable[bytes]:
        for file in self.files:
            path = self.root / file
            yield f"{file} {path.stat().st_size if path.exists() else -1}\n".encode(errors="surrogateescape")


@dataclass
class _Zip:
    path: Path
    files: list[str]
    opened: tuple[int, zipfile.ZipFile] | None = field(default=None, repr=False)  # by which process

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return f"{self.files[index]} in {self.path}"

    def fetch(self, indices: Sequence[int]) -> list[_Encoded | InputError]:
        archive, found = self._archive(), list[_Encoded | InputError]()
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


@dataclass
class _Rows:
    title: str
    rows: Any  # datasets.Dataset of one column, in arrow format

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"row {index} of {self.title}"

    def fetch(self, indices: Sequence[int]) -> list[_Encoded | InputError]:
        lo, hi = min(indices), max(indices) + 1
        dense = list(indices) == list(range(lo, hi))
        column = (self.rows[lo:hi] if dense else self.rows[list(indices)]).column(0).to_pylist()
        return [self._encoded(i, cell) for i, cell in zip(indices, column, strict=True)]

    def _encoded(self, index: int, cell: Any) -> _Encoded | InputError:
        if isinstance(cell, dict):
            cell = cell.get("bytes") if cell.get("bytes") is not None else cell.get("path")
        if isinstance(cell, str):
            return Path(cell)
        return cell if isinstance(cell, bytes) else InputError(f"{self.name(index)}: no image in that row")

    def identity(self) -> Iterable[bytes]:
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.compute as pc  # type: ignore[import-untyped]

        for start in range(0, len(self), 10_000):
            column = self.rows[start : start + 10_000].column(0)
            parts = [column]
            if pa.types.is_struct(column.type):
                names = [name for name in ("path", "bytes") if column.type.get_field_index(name) >= 0]
                parts = [pc.struct_field(column, name) for name in names]
            for part in parts:
                part = part.cast(pa.string()) if pa.types.is_null(part.type) else part  # no path in any row
                yield np.asarray(pc.fill_null(pc.binary_length(part), -1)).astype("<i8").tobytes()


@dataclass
class _Listing:
    """One split of a source, nothing decoded."""

    source: _Source
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] | None = None


_Splits: TypeAlias = dict[str, Callable[[], _Listing]]


# -- finding what a source holds ---------------------------------------------------------------------------------------


def _open(source: str, image_column: str | None, label_column: str | None, progress: bool) -> _Splits:
    columns = (image_column, label_column)
    if source == "digits":
        _no_columns(source, columns)
        return _digits()
    path = Path(os.path.expanduser(source))  # which leaves a user that there is not
    if source and path.is_dir():
        files = list(walk(path))
        if any(map(_is_image, files)):
            return _tree(source, files, columns, lambda names: _Folder(path, names))
        saved = any((path / mark).is_file() for mark in ("state.json", "dataset_dict.json"))
        if saved or any(file.lower().endswith((".parquet", ".arrow", ".tar")) for file in files):
            return _hugging_face(source, _load_local(source, path, files, saved, progress), columns)
        raise InputError(f"{source}: no images in this folder; {ACCEPTED}")
    if path.is_file():
        if path.suffix.lower() == ".parquet":
            return _hugging_face(source, _load_local(source, path, [""], False, progress), columns)
        if zipfile.is_zipfile(path):
            try:
                with zipfile.ZipFile(path) as archive:
                    files = [name for name in archive.namelist() if not name.endswith("/") and not _is_hidden(name)]
            except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as fault:
                raise InputError(f"{source}: damaged zip file ({pictures.one_line(fault)}); {ACCEPTED}") from fault
            if not any(map(_is_image, files)):
                raise InputError(f"{source}: no images in this zip file")
            return _tree(source, files, columns, lambda names: _Zip(path, names))
        kind = "damaged or empty zip file" if path.suffix.lower() == ".zip" else "neither a zip nor a parquet file"
        raise InputError(f"{source}: {kind}; {ACCEPTED}")
    known = (".zip", ".parquet", *pictures.SUFFIXES)
    if source.lower().endswith(known) or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?", source):
        raise InputError(f"{source or repr(source)}: no such file or folder; {ACCEPTED}")
    if difflib.get_close_matches(source.lower(), ["digits"], cutoff=0.75):
        raise InputError(f"{source}: no such data set, did you mean digits? ({ACCEPTED})")
    return _hugging_face(source, _load_hub(source, progress), columns)


def _digits() -> _Splits:
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)  # 0..16
    arrays = np.round(values * 255 / 16).astype(np.uint8).reshape(-1, 8, 8)
    names = tuple(map(str, range(10)))
    shuffled = torch.randperm(len(arrays), generator=generator(_DIGITS)).numpy()  # it is sorted by writer
    arrays, labels = arrays[shuffled], labels[shuffled]

    def part(title: str, rows: slice) -> _Listing:
        return _Listing(_Arrays(title, arrays[rows]), labels[rows].astype(np.int64), names)

    return {
        "train": functools.partial(part, "digits (train)", slice(1500)),
        "test": functools.partial(part, "digits (test)", slice(1500, None)),
    }


def _is_image(file: str) -> bool:
    return PurePosixPath(file).suffix.lower() in pictures.SUFFIXES


def _is_hidden(file: str) -> bool:
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
        folders[:] = sorted(f for f in folders if not _is_hidden(f))
        for file in files:
            if not _is_hidden(file):
                yield (Path(folder) / file).relative_to(root).as_posix()


def natural(path: str) -> tuple[tuple[tuple[str | int, ...], ...], str]:
    """Sort key of a relative path: folder by folder, numbers by value, the same on every platform.

    >>> sorted(["b/10.png", "b/9.png", "a.png"], key=natural)
    ['a.png', 'b/9.png', 'b/10.png']
    """
    parts = unicodedata.normalize("NFC", path).split("/")
    split = (re.split(r"([0-9]+)", part) for part in parts)  # text and digits in turn, so like meets like
    return tuple(tuple(int(s) if k % 2 else s for k, s in enumerate(part)) for part in split), path


def _no_columns(source: str, columns: tuple[str | None, str | None]) -> None:
    for option, column in zip(("image column", "label column"), columns, strict=True):
        if column is not None:
            raise InputError(f"{option} {column}: {source} holds images only and has no columns")


def _tree(
    source: str, files: list[str], columns: tuple[str | None, str | None], make: Callable[[list[str]], _Source]
) -> _Splits:
    """Splits by folders called train, test, ...; classes by the folders in these."""
    _no_columns(source, columns)
    files = sorted(filter(_is_image, files), key=natural)
    split_names = {alias for aliases in _SPLITS.values() for alias in aliases}
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

    def listing(split: str) -> _Listing:
        below = [file[len(prefix[split]) :] for file in groups[split]]
        if len(names) < 2 or not all("/" in file for file in below):
            return _Listing(make(groups[split]))
        number = {name: k for k, name in enumerate(names)}
        labels = np.array([number[file.partition("/")[0]] for file in below], np.int64)
        return _Listing(make(groups[split]), labels, names)

    return {split: functools.partial(listing, split) for split in groups}


# -- Hugging Face ------------------------------------------------------------------------------------------------------


@contextmanager
def _quiet(progress: bool, offline: bool) -> Iterator[None]:
    """Set the bars of `datasets`; offline, it neither tells its servers of a local load nor retries half a minute."""
    import datasets
    import huggingface_hub.constants

    bars = datasets.are_progress_bars_disabled()
    before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    (datasets.enable_progress_bars if progress else datasets.disable_progress_bars)()
    if offline:
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        (datasets.disable_progress_bars if bars else datasets.enable_progress_bars)()
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = before


def _load_local(source: str, path: Path, files: list[str], saved: bool, progress: bool) -> Any:
    import datasets
    import pyarrow.parquet  # type: ignore[import-untyped]

    for file in files:  # `datasets` does not say which one is damaged
        if (path / file).suffix.lower() == ".parquet":
            try:
                pyarrow.parquet.ParquetFile(path / file).close()
            except (OSError, ValueError) as fault:
                raise InputError(f"{path / file}: damaged or empty parquet file ({pictures.one_line(fault)})") from None
    with _quiet(progress, offline=True):
        try:
            if saved:
                return datasets.load_from_disk(str(path))
            if path.is_file():
                return datasets.load_dataset("parquet", data_files={"train": str(path)})
            return datasets.load_dataset(str(path))
        except Exception as fault:  # whatever `datasets` raises, it is about these files
            raise InputError(f"{source}: not a data set ({pictures.one_line(fault.__cause__ or fault)})") from fault


def _load_hub(source: str, progress: bool) -> Any:
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    name, _, config = source.partition(":")
    unreachable = False
    try:
        HfApi().dataset_info(name, timeout=10)
    except RepositoryNotFoundError:
        raise InputError(f"{source}: no such file or folder, and no such data set on the hub; {ACCEPTED}") from None
    except Exception:  # no network: what was loaded before is still in the cache
        unreachable = True
    with _quiet(progress, offline=unreachable):
        try:
            if unreachable and "/" not in name:  # in the cache a local folder of that name looks the same
                raise ConnectionError(name)
            return datasets.load_dataset(name, config or None)
        except Exception as fault:
            if unreachable:
                reason = "no such file or folder, and the Hugging Face hub cannot be reached"
                raise InputError(f"{source}: {reason}; {ACCEPTED}") from fault
            raise InputError(f"{source}: cannot be loaded from the hub ({pictures.one_line(fault)})") from fault


def _hugging_face(source: str, loaded: Any, columns: tuple[str | None, str | None]) -> _Splits:
    splits = dict(loaded) if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}

    def listing(split: str) -> _Listing:
        rows = splits[split]
        column = _image_column(source, rows.features, columns[0])
        labels, names = _labels(source, splits, split, columns[1])
        plain = rows.select_columns([column]).with_format("arrow")
        return _Listing(_Rows(f"{source} ({split})", plain), labels, names)

    return {split: functools.partial(listing, split) for split in splits}


def _image_column(source: str, features: Any, named: str | None) -> str:
    import datasets

    def holds_files(feature: Any) -> bool:
        return isinstance(feature, dict) and "bytes" in feature

    def holds_bytes(feature: Any) -> bool:
        return getattr(feature, "dtype", None) in ("binary", "large_binary")

    def is_image(feature: Any) -> bool:
        return isinstance(feature, datasets.Image)

    kinds = (is_image, holds_files, holds_bytes)
    if named is not None:
        _known(source, "image column", named, features)
        if any(kind(features[named]) for kind in kinds):
            return named
        raise InputError(f"image column {named}: holds no images, the columns of {source} are {', '.join(features)}")
    for kind in kinds:
        found: list[str] = [name for name, feature in features.items() if kind(feature)]
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError(f"{source}: columns {', '.join(found)} hold images, want the image column named")
    raise InputError(f"{source}: no column of images among {', '.join(features)}")


def _labels(
    source: str, splits: dict[str, Any], split: str, named: str | None
) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None]:
    """Labels 0..K-1 and class names, which are those of all splits together; None if there are none or some lack."""
    import datasets

    features = splits[split].features
    whole = ("bool", "string", "large_string", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32")
    able = [name for name, feature in features.items() if getattr(feature, "dtype", None) in whole]
    classes = [name for name in able if isinstance(features[name], datasets.ClassLabel)]
    if named is not None:
        _known(source, "label column", named, features)
        if named not in able:
            raise InputError(f"label column {named}: no labels; those of {source} with any are {', '.join(able)}")
        column = named
    else:
        usual = [name for group in (classes, able) for name in _LABELS if name in group]
        if not (usual or len(classes) == 1):
            return None, None
        column = (usual or classes)[0]
    cells: list[Any] = splits[split].select_columns([column]).with_format("arrow")[:].column(0).to_pylist()
    if isinstance(features[column], datasets.ClassLabel):
        names = tuple(features[column].names)
        missing = any(cell is None or cell < 0 for cell in cells)  # -1: a test set that keeps its labels secret
        labels = None if missing else np.array(cells, np.int64)
    else:
        values = {v for rows in splits.values() if column in rows.features for v in rows.unique(column)} - {None}
        number = {
            value: k for k, value in enumerate(sorted(values, key=lambda v: natural(v) if isinstance(v, str) else v))
        }
        names = tuple(map(str, number))
        missing = any(cell is None for cell in cells)
        labels = None if missing else np.array([number[cell] for cell in cells], np.int64)
    if missing and named is not None:
        raise InputError(f"label column {named}: some rows of {source} ({split}) have no label")
    return (None, None) if labels is None else (labels, names)


def _known(source: str, option: str, named: str, features: Any) -> None:
    if named not in features:
        raise InputError(f"{option} {named}: no such column, {source} has {', '.join(features)}")


# -- decoding ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Decoder:
    source: _Source
    size: tuple[int, int]
    channels: int
    first: tuple[str, int]  # the first image's name and native channels, which all must share

    def decode(self, indices: Sequence[int]) -> tuple[NDArray[np.uint8], dict[int, str], pictures.Notes]:
        """Images uint8 [B, C, H, W]; position -> fault of those that are not to be had; what was converted."""
        pixels = np.zeros((len(indices), self.channels, *self.size), np.uint8)
        faults, notes = dict[int, str](), pictures.Notes()
        for k, (i, encoded) in enumerate(zip(indices, self.source.fetch(indices), strict=True)):
            name = self.source.name(i)
            try:
                image = _decoded(encoded, name)
                if (found := pictures.native(image)) != self.first[1]:
                    raise InputError(
                        f"{name}: {_kind(found)}, but {self.first[0]} is {_kind(self.first[1])}, want one kind"
                    )
                pixels[k] = pictures.fit(image, self.size, self.channels, name, notes).transpose(2, 0, 1)
            except InputError as fault:
                faults[k] = str(fault)
        return pixels, faults, notes


def _decoded(encoded: _Encoded | InputError, name: str) -> Image.Image:
    if isinstance(encoded, InputError):
        raise encoded
    return encoded if isinstance(encoded, Image.Image) else pictures.read(encoded, name)


def _kind(channels: int) -> str:
    return f"{pictures.MODES[channels]} ({channels} channel{'s' * (channels > 1)})".replace("L (", "grey (")


@dataclass(eq=False)
class Images:
    """Images of one size by index, 0..len - 1; made by `load` and `load_pair`.

    name: the source; split: the split's name in it; decoded: whether all sit in memory; labels: int64 [N] in 0..K-1
    or None; class_names: K names or None; skipped: bad images met so far; fingerprint: 64 hex digits that say which
    images these are, a hash of the pixels if decoded, else of names and sizes of the files.
    """

    name: str
    split: str
    size: tuple[int, int]
    channels: int
    labels: Tensor | None
    class_names: tuple[str, ...] | None
    decoder: _Decoder = field(repr=False)
    rows: Tensor = field(repr=False)  # int64 [N], into pixels, or into the source
    pixels: Tensor | None = field(repr=False)  # uint8 [>= N, C, H, W]
    skip_bad: bool = False
    faults: dict[int, str] = field(default_factory=dict, repr=False)  # index in the source -> what is wrong
    notes: pictures.Notes = field(default_factory=pictures.Notes, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        height, width = self.size
        return f"{self.name} ({self.split}): {len(self):,} images {height}x{width}x{self.channels}"

    @property
    def decoded(self) -> bool:
        return self.pixels is not None

    @property
    def skipped(self) -> int:
        return len(self.faults)

    @functools.cached_property
    def fingerprint(self) -> str:
        height, width = self.size
        digest = hashlib.sha256(f"{len(self)} {height} {width} {self.channels}\n".encode())
        if self.pixels is not None:
            for start in range(0, len(self), 4096):
                digest.update(self.pixels[self.rows[start : start + 4096]].numpy().data)
        else:
            for part in self.decoder.source.identity():
                digest.update(part)
            digest.update(self.rows.numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def batch(self, indices: Sequence[int] | Tensor) -> Tensor:
        """The images uint8 [B, C, H, W] at these indices.

        With skip_bad the place of a bad image is taken by the next good one, of the same label if there are labels.
        Raises InputError naming the file for a bad one otherwise.

        >>> load("digits", (8, 8), 1).batch([0, 7]).shape
        torch.Size([2, 1, 8, 8])
        """
        indices = torch.as_tensor(indices, dtype=torch.int64)
        if self.pixels is not None:
            return self.pixels[self.rows[indices]]
        pixels, faults, notes = self.decode(indices)
        self.report(faults, notes)
        return pixels

    def decode(self, indices: Tensor) -> tuple[Tensor, dict[int, str], pictures.Notes]:
        """`batch` for worker processes: beside the images what `report` wants to be told; nothing is warned of."""
        rows: list[int] = self.rows[indices].tolist()
        pixels, bad, notes = self.decoder.decode(rows)
        if bad and not self.skip_bad:
            raise InputError(f"{next(iter(bad.values()))}; {_SKIP}")
        faults = {rows[k]: fault for k, fault in bad.items()}
        for k in bad:
            pixels[k] = self._next_good(int(indices[k]) % len(self), faults, notes)
        return torch.from_numpy(pixels), faults, notes

    def _next_good(self, index: int, faults: dict[int, str], notes: pictures.Notes) -> NDArray[np.uint8]:
        for step in range(1, len(self)):
            other = (index + step) % len(self)
            if self.labels is not None and self.labels[other] != self.labels[index]:
                continue
            row = int(self.rows[other])
            pixels, bad, noted = self.decoder.decode([row])
            if not bad:
                _merge(notes, noted)
                return np.asarray(pixels[0])
            faults[row] = bad[0]
        raise InputError(
            f"{self.name}: no image left that could take a bad one's place; {faults[int(self.rows[index])]}"
        )

    def report(self, faults: dict[int, str], notes: pictures.Notes) -> None:
        """Count what was met while decoding, and warn of each kind once."""
        if faults and not self.faults:
            warnings.warn(
                f"{self.name}: bad images are skipped, the first: {next(iter(faults.values()))}", stacklevel=3
            )
        self.faults.update(faults)
        for what, (first, count) in notes.items():
            if what not in self.notes:
                many = f"{count:,} image{'s' * (count != 1)}" if self.decoded else "images"
                warnings.warn(f"{self.name}: {many}: {what}; the first: {first}", stacklevel=3)
        _merge(self.notes, notes)


def _merge(notes: pictures.Notes, more: pictures.Notes) -> None:
    for what, (first, count) in more.items():
        pictures.note(notes, what, first, count)


def _build(
    source: str,
    split: str,
    listing: _Listing,
    size: tuple[int, int],
    channels: int,
    skip_bad: bool,
    cache_bytes: int,
    progress: bool,
) -> Images:
    n = len(listing.source)
    if n == 0:
        raise InputError(f"{source} ({split}): no images")
    start, fault, image = 0, "", None
    while image is None and start < n:  # the first image says how many channels all have
        name = listing.source.name(start)
        try:
            image = _decoded(listing.source.fetch([start])[0], name)
            pictures.fit(image, size, channels, name, {})
        except InputError as error:
            if not skip_bad:
                raise InputError(f"{error}; {_SKIP}") from error
            image, start, fault = None, start + 1, fault or str(error)
    if image is None:
        raise InputError(f"{source} ({split}): none of {n:,} images can be used, the first: {fault}")
    decoder = _Decoder(listing.source, size, channels, (listing.source.name(start), pictures.native(image)))

    labels = None if listing.labels is None else torch.from_numpy(listing.labels)
    found = Images(source, split, size, channels, labels, listing.class_names, decoder, torch.arange(n), None, skip_bad)
    if n * size[0] * size[1] * channels > cache_bytes:
        found.batch([0])  # warns early of conversions
        return found
    small = image.width * image.height < 128 * 128  # threads would only wait for the interpreter
    pixels, faults, notes = _decode_all(decoder, n, 1 if small else min(8, os.cpu_count() or 1), skip_bad, progress)
    good = torch.tensor([i for i in range(n) if i not in faults])
    if faults:
        pixels = pixels[good]
        found.labels = None if labels is None else labels[good]
        warnings.warn(
            f"{source}: {len(faults):,} of {n:,} images skipped, the first: {min(faults.items())[1]}", stacklevel=3
        )
    found.pixels, found.rows, found.faults = pixels, torch.arange(len(good)), faults
    found.report({}, notes)
    return found


def _decode_all(
    decoder: _Decoder, n: int, threads: int, skip_bad: bool, progress: bool
) -> tuple[Tensor, dict[int, str], pictures.Notes]:
    from tqdm import tqdm

    pixels = np.empty((n, decoder.channels, *decoder.size), np.uint8)
    faults, notes = dict[int, str](), pictures.Notes()
    bar = tqdm(total=n, desc="decoding", unit="image", disable=None if progress else True)
    chunks = [range(start, min(start + 256, n)) for start in range(0, n, 256)]

    def work(chunk: range) -> tuple[dict[int, str], pictures.Notes]:
        pixels[chunk.start : chunk.stop], bad, noted = decoder.decode(chunk)
        return {chunk[k]: fault for k, fault in bad.items()}, noted

    pool = ThreadPoolExecutor(threads)
    try:
        for chunk, (bad, noted) in zip(chunks, pool.map(work, chunks), strict=True):  # in order, as are the errors
            if bad and not skip_bad:
                raise InputError(f"{next(iter(bad.values()))}; {_SKIP}")
            faults.update(bad)
            _merge(notes, noted)
            bar.update(len(chunk))
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
    return torch.from_numpy(pixels), faults, notes


# -- what others call --------------------------------------------------------------------------------------------------


def _match(split: str, available: Iterable[str]) -> str | None:
    names = {name.lower(): name for name in available}
    return next((names[alias] for alias in _SPLITS.get(split.lower(), (split.lower(),)) if alias in names), None)


def _pick(source: str, split: str, splits: _Splits) -> str:
    found = _match(split, splits)
    if found is None:
        raise InputError(f"{source}: no split {split}, it has {', '.join(splits)}")
    return found


def load(
    source: str,
    size: tuple[int, int],
    channels: int,
    *,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    skip_bad: bool = False,
    cache_bytes: int = 4 * 2**30,
    progress: bool = False,
    as_trained: bool = False,
) -> Images:
    """The images of one split of SOURCE (above), scaled and cropped at the centre to `size` = (H, W), as uint8.

    channels: 1 grey, 3 RGB, 4 RGBA; images of another kind are converted, with a warning.
    split: `test` also finds one called validation, valid or val; a source without splits is all `train`. `digits` has
    1,500 images for training and 297 for testing.
    image_column, label_column: in Hugging Face layout; found if there is but one of a kind. In folders and zip files
    the labels are the folders under the split's, if all images lie in such.
    skip_bad: count images that cannot be used and go on. cache_bytes: sets that fit are decoded now, in memory.
    as_trained: `train` and `test` are the two sets that `load_pair` makes: where the source has no second split, what
    `split_holdout` leaves and what it sets apart.
    Raises InputError, one line naming the file, for: a damaged or empty file, no images, images of mixed channels
    (all must have the first one's), a missing split or column, and a source that is not there.

    >>> digits = load("digits", (8, 8), 1, split="test")
    >>> len(digits), digits.labels[:3].tolist(), str(digits)
    (297, [5, 7, 4], 'digits (test): 297 images 8x8x1')
    """
    splits = _open(source, image_column, label_column, progress)
    held_out = as_trained and split == "test" and _match("test", splits) is None
    found = _pick(source, "train" if held_out else split, splits)
    images = _build(source, found, splits[found](), size, channels, skip_bad, cache_bytes, progress)
    alone = _match("test", (name for name in splits if name != found)) is None
    if held_out or (as_trained and split == "train" and alone):
        return split_holdout(images)[held_out]
    return images


def load_pair(
    source: str,
    size: tuple[int, int],
    channels: int,
    *,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    skip_bad: bool = False,
    cache_bytes: int = 4 * 2**30,
    progress: bool = False,
) -> tuple[Images, Images]:
    """Images to train on and images held out: the source's test or else validation split, or else `split_holdout`.

    Arguments and errors are those of `load`; fewer than 2 images are an InputError too.

    >>> train, held_out = load_pair("digits", (8, 8), 1)
    >>> len(train), len(held_out)
    (1500, 297)
    """
    splits = _open(source, image_column, label_column, progress)
    found = _pick(source, split, splits)
    train = _build(source, found, splits[found](), size, channels, skip_bad, cache_bytes, progress)
    other = _match("test", (name for name in splits if name != found))
    if other is None:
        return split_holdout(train)
    return train, _build(source, other, splits[other](), size, channels, skip_bad, cache_bytes, progress)


def split_holdout(images: Images) -> tuple[Images, Images]:
    """Set apart min(max(1, N // 20), 1000) images, ever the same for one N: (the rest, those). Pixels are shared.

    Raises InputError if there are fewer than 2.

    >>> rest, held_out = split_holdout(load("digits", (8, 8), 1))
    >>> len(rest), len(held_out), held_out.split
    (1425, 75, 'held out of train')
    """
    n = len(images)
    if n < 2:
        raise InputError(f"{images.name} ({images.split}): {n} image, want at least 2, one of them to be held out")
    shuffled = torch.randperm(n, generator=generator(_HOLDOUT))
    k = min(max(1, n // 20), 1000)

    def view(indices: Tensor, split: str, faults: dict[int, str]) -> Images:
        labels = None if images.labels is None else images.labels[indices]
        rows, notes = images.rows[indices], dict(images.notes)
        return replace(images, split=split, labels=labels, rows=rows, faults=faults, notes=notes)

    rest = view(shuffled[k:].sort().values, images.split, dict(images.faults))
    return rest, view(shuffled[:k].sort().values, f"held out of {images.split}", {})


@functools.lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, epoch, _ORDER))


def order(n: int, seed: int, step: int, batch_size: int) -> Tensor:
    """Indices int64 [batch_size] in 0..n-1 of the images of step 0, 1, ...

    Place p = step * batch_size + i of the stream is place p mod n of a permutation keyed by (seed, p // n): every
    epoch visits each image once, and a run resumes at any step by asking for it.

    >>> torch.cat([order(4, 0, step, 2) for step in (0, 1)]).sort().values
    tensor([0, 1, 2, 3])
    """
    if n < 1 or step < 0 or batch_size < 1:
        raise ValueError(f"want n >= 1, step >= 0, batch_size >= 1, got {n}, {step}, {batch_size}")
    start, stop = step * batch_size, (step + 1) * batch_size
    parts = [
        _permutation(n, seed, epoch)[max(start - epoch * n, 0) : stop - epoch * n]
        for epoch in range(start // n, (stop - 1) // n + 1)
    ]
    return torch.cat(parts)


_Step: TypeAlias = tuple[Tensor, dict[int, str], pictures.Notes] | str


@dataclass
class _Steps(Dataset[_Step]):
    """Step -> its images; an error as a string, since torch makes many lines of one raised in a worker."""

    images: Images
    seed: int
    batch_size: int
    part: slice

    def __getitem__(self, step: int) -> _Step:
        try:
            return self.images.decode(order(len(self.images), self.seed, step, self.batch_size)[self.part])
        except InputError as fault:
            return str(fault)


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """x on `device`; to a CUDA device through pinned memory, so that nobody waits for the copy.

    >>> send(torch.ones(2), "cpu")
    tensor([1., 1.])
    """
    if torch.device(device).type == "cuda" and not x.is_cuda:
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def _fits(pixels: Tensor, device: torch.device) -> bool:
    """Whether they take less than a quarter of a CUDA device's free memory; the rest is for the network."""
    return device.type == "cuda" and pixels.nbytes < torch.cuda.mem_get_info(device)[0] // 4


def _in_worker(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair; it ends its workers


def batches(
    images: Images,
    seed: int,
    batch_size: int,
    start: int,
    stop: int,
    *,
    part: slice | None = None,
    workers: int = 2,
    device: torch.device | str = "cpu",
) -> Iterator[Tensor]:
    """For each step in start..stop-1 its images on `device`, uint8 [b, C, H, W], as `order` lists them.

    part: the slice of each batch of batch_size that this rank takes; all by default. workers: processes that decode
    ahead if the images are not in memory (0: none); closing the iterator ends them. A CUDA device holds all images
    that are in memory, where they fit. Raises what `Images.batch` raises.

    >>> next(batches(load("digits", (8, 8), 1), seed=0, batch_size=16, start=5, stop=9)).shape
    torch.Size([16, 1, 8, 8])
    """
    part, device = part or slice(None), torch.device(device)
    if images.pixels is not None:
        pixels = images.pixels.to(device) if _fits(images.pixels, device) else images.pixels
        for step in range(start, stop):
            rows = images.rows[order(len(images), seed, step, batch_size)[part]]
            yield send(pixels[send(rows, pixels.device)], device)
        return
    if workers == 0:
        for step in range(start, stop):
            yield send(images.batch(order(len(images), seed, step, batch_size)[part]), device)
        return
    loader = DataLoader(
        _Steps(images, seed, batch_size, part),
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        prefetch_factor=4,
        worker_init_fn=_in_worker,
        generator=torch.Generator(),  # else it would draw from the global one
    )
    steps = iter(loader)
    try:
        for found in steps:
            if isinstance(found, str):
                raise InputError(found)
            pixels, faults, notes = found
            images.report(faults, notes)
            yield send(pixels, device)
    finally:
        del steps  # the last reference: ends the workers

"""Datasets in Hugging Face layout: parquet files, folders of these or saved by `datasets`, and the hub."""

import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm.errors import InputError, brief, suggestion
from ddpm.files import images as pictures
from ddpm.files.data.blobs import facts_of
from ddpm.files.data.listing import ACCEPTED, LABELS, Contents, Encoded, Listing, Options, number_values, walk

SUFFIXES = (".parquet", ".arrow")
"""Endings, in lower case, of the names of files that hold rows."""


@dataclass
class Rows:
    """The images of one split.

    rows         a datasets.Dataset of one column, in arrow format
    folder       the source's folder, from which relative names of files count; None for a dataset of the hub
    allow_paths  whether a row may name any file
    """

    title: str
    rows: Any
    folder: Path | None = None
    allow_paths: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"row {index} of {self.title}"

    def fetch(self, indices: Sequence[int]) -> Iterator[Encoded | InputError]:
        start, stop = min(indices, default=0), max(indices, default=-1) + 1
        consecutive = list(indices) == list(range(start, stop))
        column = (self.rows[start:stop] if consecutive else self.rows[list(indices)]).column(0)
        for start in range(0, len(indices), 4):  # few for the memory, and several at once for speed
            yield from map(self.encoded, indices[start : start + 4], column.slice(start, 4).to_pylist())

    def encoded(self, index: int, cell: Any) -> Encoded | InputError:
        """The image in a cell: {"bytes", "path"}, a path, or bytes."""
        if isinstance(cell, dict):
            cell = cell.get("bytes") if cell.get("bytes") is not None else cell.get("path")
        if isinstance(cell, str):
            return self._file(index, cell)
        return cell if isinstance(cell, bytes) else InputError(f"{self.name(index)}: no image in that row")

    def _file(self, index: int, name: str) -> Path | InputError:
        """The file that a row names: in the source's folder or in the caches of `datasets` and the hub."""
        import datasets
        import huggingface_hub.constants

        path = Path(name) if self.folder is None else self.folder / name
        if self.allow_paths:
            return path
        folders = [datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE]
        folders += [] if self.folder is None else [self.folder]
        if any(Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)) for folder in folders):
            return path
        place = "the caches" if self.folder is None else self.folder
        return InputError(
            f"{self.name(index)}: names the file {name!r}, which is not in {place}; want the setting allow_paths of "
            "`ddpm train` if that is meant"
        )

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
                part = part.cast(pa.string()) if pa.types.is_null(part.type) else part  # if no row has a path
                yield np.asarray(pc.fill_null(pc.binary_length(part), -1)).astype("<i8").tobytes()

    def stamp(self) -> list[object] | None:
        """The files that hold the rows; None if rows name other files."""
        import pyarrow as pa
        import pyarrow.compute as pc

        column = self.rows[:].column(0)
        cells = pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column
        if not (pa.types.is_binary(cells.type) or pa.types.is_large_binary(cells.type)) or cells.null_count:
            return None
        files = [Path(each["filename"]) for each in self.rows.cache_files]
        return [self.rows._fingerprint, [[str(file), *facts_of(file)] for file in files]] if files else None


@contextmanager
def _quiet(progress: bool, offline: bool) -> Iterator[None]:
    """Switch the progress bars of `datasets`, and with `offline` its network.

    Offline, `datasets` does not report a local load to its servers, and does not retry for half a minute.
    """
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


def is_data_set(folder: Path) -> bool:
    """Whether `datasets` saved a dataset as this folder, or it holds files with rows."""
    return folder.is_dir() and (_is_saved(folder) or any(file.lower().endswith(SUFFIXES) for file in walk(folder)))


def _is_saved(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in ("state.json", "dataset_dict.json"))


def load_local(source: str, path: Path, configuration: str | None, progress: bool) -> Any:
    """The dataset in a parquet file or a folder, as `datasets` gives it. Raises InputError if it cannot be read."""
    import datasets
    import pyarrow.parquet  # type: ignore[import-untyped]

    for file in [path] if path.is_file() else [path / name for name in walk(path)]:
        if file.suffix.lower() in SUFFIXES and not file.is_file():
            raise InputError(f"{file}: a pipe or a device; want a plain file")
        if file.suffix.lower() == ".parquet":  # `datasets` does not say which file is damaged
            try:
                with pyarrow.parquet.ParquetFile(file) as rows:
                    groups = [rows.metadata.row_group(k) for k in range(rows.metadata.num_row_groups)]
            except (OSError, ValueError) as fault:
                raise InputError(f"{file}: damaged or empty parquet file ({brief(fault)})") from None
            pictures.check_unpacked(sum(group.total_byte_size for group in groups), file.stat().st_size, str(file))
    with _quiet(progress, offline=True):
        try:
            if path.is_dir() and _is_saved(path) and configuration is None:
                return datasets.load_from_disk(str(path))
            if path.is_file():
                return datasets.load_dataset("parquet", data_files={"train": str(path)})
            return datasets.load_dataset(str(path), configuration)
        except Exception as fault:  # `datasets` raises exceptions of many kinds
            _explain_configurations(source, str(path), configuration, fault)
            raise InputError(f"{source}: not a dataset ({brief(fault.__cause__ or fault)})") from fault


def _explain_configurations(source: str, name: str, configuration: str | None, fault: Exception) -> None:
    """Raise InputError with the names of the configurations if `datasets` missed one."""
    listed = re.search(r"(?i)config\b.*?\[(.*?)\]|BuilderConfig.*?\[(.*?)\]", str(fault), re.DOTALL)
    if isinstance(fault, ValueError) and listed:
        known = re.findall(r"'([^']*)'", listed[1] or listed[2])
        what = "it has several configurations" if configuration is None else f"no configuration {configuration}"
        raise InputError(f"{source}: {what}; want {' or '.join(f'{name}:{each}' for each in known)}") from fault


def load_hub(source: str, progress: bool) -> Any:
    """The dataset OWNER/NAME or OWNER/NAME:CONFIG, from the hub, or from the cache without a network.

    Raises InputError if it cannot be loaded.
    """
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    name, _, config = source.partition(":")
    unreachable = False
    try:
        HfApi().dataset_info(name, timeout=10)
    except RepositoryNotFoundError:
        raise InputError(f"{source}: no such file or folder, and no such dataset on the hub; {ACCEPTED}") from None
    except Exception:  # no network; the cache has what was loaded before
        unreachable = True
    with _quiet(progress, offline=unreachable):
        try:
            if unreachable and "/" not in name:  # the cache cannot tell it from a local folder of that name
                raise ConnectionError(name)
            return datasets.load_dataset(name, config or None)
        except Exception as fault:
            if unreachable:
                reason = "no such file or folder, and the Hugging Face hub cannot be reached"
                raise InputError(f"{source}: {reason}; {ACCEPTED}") from fault
            _explain_configurations(source, name, config or None, fault)
            raise InputError(f"{source}: cannot be loaded from the hub ({brief(fault)})") from fault


def contents(
    source: str, loaded: Any, folder: Path | None, options: Options, left_out: Mapping[str, int] | None = None
) -> Contents:
    """The splits of a dataset as `load_local` and `load_hub` return it. Listing one may raise InputError."""
    splits = dict(loaded) if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}

    def listing(split: str) -> Listing:
        rows = splits[split]
        column = image_column(source, rows.features, options.image_column)
        label = label_column(source, rows.features, options.label_column)
        found, names = None, None
        if label is not None:
            found, names = labels(source, splits, split, label, options.label_column is not None)
        plain = rows.select_columns([column]).with_format("arrow")
        return Listing(Rows(f"{source} ({split})", plain, folder, options.allow_paths), found, names)

    return Contents({split: functools.partial(listing, split) for split in splits}, left_out or {})


def image_column(source: str, features: Any, named: str | None) -> str:
    """The column of images, which is `named` or else the only one. Raises InputError if there is no such column."""
    import datasets

    def holds_files(feature: Any) -> bool:
        return isinstance(feature, dict) and "bytes" in feature

    def holds_bytes(feature: Any) -> bool:
        return getattr(feature, "dtype", None) in ("binary", "large_binary")

    def is_image(feature: Any) -> bool:
        return isinstance(feature, datasets.Image)

    kinds = (is_image, holds_files, holds_bytes)
    found = [[name for name, feature in features.items() if kind(feature)] for kind in kinds]
    known: list[str] = [name for names in found for name in names]
    if named is not None and known:
        if named in known:
            return named
        what = "holds no images" if named in features else "no such column"
        images = f"the columns of images in {source} are {', '.join(known)}"
        raise InputError(f"image_column {named}: {what}; {suggestion(named, known)}{images}")
    names: list[str] = next(filter(None, found), [])
    if len(names) == 1:
        return names[0]
    if names:
        raise InputError(f"{source}: columns {', '.join(names)} hold images; want one of them as image_column")
    raise InputError(f"{source}: no column of images among {', '.join(features)}")


def label_column(source: str, features: Any, named: str | None) -> str | None:
    """The column of labels, which is `named`, or else has a usual name, or is the only one of class labels; or None.

    Raises InputError if the column is `named` and holds no labels.
    """
    import datasets

    discrete = ("bool", "string", "large_string", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32")
    usable = [name for name, feature in features.items() if getattr(feature, "dtype", None) in discrete]
    classes = [name for name in usable if isinstance(features[name], datasets.ClassLabel)]
    if named is not None:
        if named not in features:
            raise InputError(f"label_column {named}: no such column, {source} has {', '.join(features)}")
        if named not in usable:
            raise InputError(f"label_column {named}: holds no labels; columns of {source} that do: {', '.join(usable)}")
        return named
    usual = [name for group in (classes, usable) for name in LABELS if name in group]
    return (usual or classes)[0] if usual or len(classes) == 1 else None


def labels(
    source: str, splits: Mapping[str, Any], split: str, column: str, named: bool
) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None]:
    """Labels 0..K-1 of the split, and the K class names of all splits; (None, None) if a row has no label.

    Raises InputError if the column is `named` and does not give a label to every row.
    """
    import datasets

    features = splits[split].features
    cells = splits[split].select_columns([column]).with_format("arrow")[:].column(0)
    missing = cells.null_count > 0
    if isinstance(features[column], datasets.ClassLabel):
        names = tuple(features[column].names)
        found = None if missing else np.asarray(cells).astype(np.int64)
        if found is not None and (found < 0).any():  # -1 stands for a secret label of a test set
            found, missing = None, True
    else:
        values = {v for rows in splits.values() if column in rows.features for v in rows.unique(column)} - {None}
        number, names = number_values(values)
        found = None if missing else _numbered(cells, number)
    if missing and named:
        raise InputError(f"label_column {column}: some rows of {source} ({split}) have no label")
    return (None, None) if found is None else (found, names)


def _numbered(cells: Any, number: Mapping[str | int, int]) -> NDArray[np.int64]:
    """The numbers of the values in a column without nulls."""
    codes = cells.combine_chunks().dictionary_encode()
    numbers = np.array([number[value] for value in codes.dictionary.to_pylist()], np.int64)
    found: NDArray[np.int64] = numbers[np.asarray(codes.indices)]
    return found

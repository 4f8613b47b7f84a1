"""Parquet files at a URL, read a row group at a time: a row of parquet has no place of its own in the file."""

import base64
import functools
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from numpy.typing import NDArray

from ddpm.errors import InputError, brief
from ddpm.files.data import hugging_face
from ddpm.files.data.index import indexed, key_of
from ddpm.files.data.layout import meanings
from ddpm.files.data.listing import Contents, Encoded, Listing, Options
from ddpm.files.data.remote import GROUP, RemoteFile

_OPEN = 4
"""Row groups that a process keeps open."""


@dataclass
class RemoteRows:
    """The images of one split.

    files   the parquet files
    groups  int64 [G, 2]: of each row group the file, and its number there
    ends    int64 [G], the number of rows up to the end of each group
    column  the column of images
    cells   reads a cell
    """

    files: list[RemoteFile]
    groups: NDArray[np.int64]
    ends: NDArray[np.int64]
    column: str
    cells: hugging_face.Rows
    opened: dict[int, pa.Table] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def name(self, index: int) -> str:
        return self.cells.name(index)

    def fetch(self, indices: Sequence[int]) -> Iterator[Encoded | InputError]:
        found: dict[int, Encoded | InputError] = {}
        wanted = defaultdict[int, list[int]](list)
        for index in indices:
            wanted[int(np.searchsorted(self.ends, index, side="right"))].append(index)
        for group, rows in wanted.items():
            first = int(self.ends[group - 1]) if group else 0
            try:
                cells = self._group(group).column(0).take([row - first for row in rows]).to_pylist()
            except (OSError, pa.ArrowException) as fault:
                error = f"cannot be read ({brief(fault)})"
                found.update((row, InputError(f"{self.name(row)}: {error}")) for row in rows)
                continue
            found.update((row, self.cells.encoded(row, cell)) for row, cell in zip(rows, cells, strict=True))
        return (found[index] for index in indices)

    def _group(self, group: int) -> pa.Table:
        """The images of a row group. Raises OSError."""
        if (table := self.opened.get(group)) is None:
            file, number = (int(each) for each in self.groups[group])
            name = f"{number}-{hashlib.sha256(self.column.encode()).hexdigest()[:16]}{GROUP}"
            data = self.files[file].kept(name, lambda: self._read(self.files[file], number))
            with pa.ipc.open_stream(data) as reader:
                table = reader.read_all()
            for old in list(self.opened)[: 1 - _OPEN]:
                self.opened.pop(old, None)  # another thread may have
            self.opened[group] = table
        return table

    def _read(self, file: RemoteFile, number: int) -> bytes:
        with file.parts() as source, pq.ParquetFile(source) as rows:
            table = rows.read_row_group(number, columns=[self.column])
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        data: bytes = sink.getvalue().to_pybytes()
        return data

    def identity(self) -> Iterable[bytes]:
        for file in self.files:
            yield f"{file.url.rpartition('/')[2]} {file.size}\n".encode()
        yield np.column_stack([self.groups[:, 1], self.ends]).astype("<i8").tobytes()

    def stamp(self) -> None:
        return None  # rows may name other files

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "opened": {}}


def contents(source: str, files: Sequence[RemoteFile], options: Options) -> Contents:
    """The splits of parquet files at a URL. Files whose names speak of a split belong to it, and others to "train"."""
    splits = defaultdict[str, list[RemoteFile]](list)
    for file in files:
        spoken = meanings(file.url.rpartition("/")[2].rpartition(".")[0])
        splits[next(iter(spoken)) if len(spoken) == 1 else "train"].append(file)

    def listing(split: str) -> Listing:
        import datasets

        about = {name: [_about(file, options.fresh) for file in splits[name]] for name in splits}
        features = datasets.Features.from_arrow_schema(_schema(about[split][0]))
        column = hugging_face.image_column(source, features, options.image_column)
        label = hugging_face.label_column(source, features, options.label_column)
        labels, names = None, None
        if label is not None:
            columns = {
                name: datasets.Dataset(
                    pa.concat_tables([_column(file, label, options.fresh) for file in splits[name]]).cast(
                        datasets.Features({label: features[label]}).arrow_schema
                    )
                )
                for name in splits
            }
            labels, names = hugging_face.labels(source, columns, split, label, options.label_column is not None)
        groups = [(k, g) for k, each in enumerate(about[split]) for g in range(len(each))]
        ends = np.cumsum([int(n) for each in about[split] for n in each["rows"].to_pylist()], dtype=np.int64)
        cells = hugging_face.Rows(f"{source} ({split})", None, None, options.allow_paths)
        rows = RemoteRows(splits[split], np.array(groups, np.int64).reshape(-1, 2), ends, column, cells)
        return Listing(rows, labels, names, ends)

    return Contents({split: functools.partial(listing, split) for split in splits})


def _about(file: RemoteFile, fresh: bool) -> pa.Table:
    """The rows of each row group; `_schema` gives the schema of the file."""

    def build() -> pa.Table:
        with _opened(file) as rows:
            counts = [rows.metadata.row_group(k).num_rows for k in range(rows.num_row_groups)]
            schema = rows.schema_arrow
        about = {"schema": base64.b64encode(schema.serialize().to_pybytes())}
        return pa.table({"rows": pa.array(counts, pa.int64())}).replace_schema_metadata(about)

    return indexed(key_of("row groups", file.facts()), build, fresh)


def _schema(about: pa.Table) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(about.schema.metadata[b"schema"])))


def _column(file: RemoteFile, column: str, fresh: bool) -> pa.Table:
    def build() -> pa.Table:
        with _opened(file) as rows:
            return rows.read(columns=[column]).replace_schema_metadata(None)

    return indexed(key_of("column", file.facts(), column), build, fresh)


def _opened(file: RemoteFile) -> Any:
    """The parquet file. Raises InputError if it cannot be read."""
    try:
        return pq.ParquetFile(file.parts())
    except (OSError, pa.ArrowException) as fault:
        raise InputError(f"{file}: damaged parquet file, or cannot be read ({brief(fault)})") from None

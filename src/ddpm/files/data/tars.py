"""Image files in tar files, read in place: an index says where each file lies."""

import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from numpy.typing import NDArray

from ddpm.errors import InputError, brief
from ddpm.files import images as pictures
from ddpm.files.data.blobs import Blob, LocalFile
from ddpm.files.data.index import indexed, key_of
from ddpm.files.data.listing import Encoded, names_and_sizes
from ddpm.files.data.remote import THREADS

_BLOCK = 512
_TEXT = 1 << 16
"""The most bytes of a file whose text is kept in the index."""


@dataclass
class Tar:
    """Image files of tar files.

    shards    the tar files
    files     the names of the images; if there are several shards, each begins with that of its shard and "/"
    places    int64 [N, 3]: for each image the number of its shard, where it begins there, and its size
    prefixed  whether the names begin with that of a shard
    """

    shards: list[Blob]
    files: list[str]
    places: NDArray[np.int64]
    prefixed: bool

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        file = self.files[index]
        return f"{file.partition('/')[2] if self.prefixed else file} in {self.shards[self.places[index, 0]]}"

    def fetch(self, indices: Sequence[int]) -> Iterator[Encoded | InputError]:
        if all(isinstance(shard, LocalFile) for shard in self.shards):
            yield from map(self._read, indices)
            return
        with ThreadPoolExecutor(THREADS) as pool:
            for start in range(0, len(indices), THREADS):
                yield from pool.map(self._read, indices[start : start + THREADS])

    def _read(self, index: int) -> bytes | InputError:
        try:
            return self.read(index)
        except InputError as fault:
            return fault

    def read(self, index: int) -> bytes:
        """The bytes of a file. Raises InputError if it is too large or cannot be read."""
        name = self.name(index)
        shard, start, size = self.places[index].tolist()
        pictures.check_memory(size, name)
        try:
            data: bytes = self.shards[shard].read(start, size)
        except OSError as fault:
            raise InputError(f"{name}: cannot be read ({brief(fault)})") from None
        if len(data) < size:
            raise InputError(f"{name}: the tar file ends early")
        return data

    def identity(self) -> Iterable[bytes]:
        return names_and_sizes(self.files, self.places[:, 2].tolist())

    def stamp(self) -> list[object]:
        return [shard.facts() for shard in self.shards]


class Member(NamedTuple):
    """A plain file in a tar file. Small files that may hold labels are read at once, where they are passed anyway."""

    name: str
    start: int
    size: int
    text: bytes | None


def members(shard: Blob, fresh: bool = False) -> tuple[list[str], NDArray[np.int64], list[bytes | None]]:
    """The names of the files in a tar file; int64 [N, 2], where each begins and its size; and texts, from the index.

    Raises InputError if it is no whole tar file without compression.
    """

    def build() -> pa.Table:
        try:
            with shard.open() as file:
                found = _quick(file, shard.size)
                if found is None:
                    file.seek(0)
                    found = _thorough(file)
        except (tarfile.TarError, OSError, EOFError, ValueError) as fault:
            reason = brief(fault)
            raise InputError(f"{shard}: not a whole tar file without compression ({reason})") from None
        columns = {
            "name": pa.array([each.name.encode(errors="surrogateescape") for each in found], pa.large_binary()),
            "start": pa.array([each.start for each in found], pa.int64()),
            "size": pa.array([each.size for each in found], pa.int64()),
            "text": pa.array([each.text for each in found], pa.large_binary()),
        }
        return pa.table(columns)

    table = indexed(key_of("tar", shard.facts()), build, fresh)
    names = [name.decode(errors="surrogateescape") for name in table["name"].to_pylist()]
    return names, np.stack([table["start"].to_numpy(), table["size"].to_numpy()], 1), table["text"].to_pylist()


def _has_text(name: str, size: int) -> bool:
    return size <= _TEXT and name.lower().endswith((".cls", ".json"))


def _thorough(file: BinaryIO) -> list[Member]:
    """The plain files as Python's tarfile finds them."""
    with tarfile.open(fileobj=file, mode="r:") as archive:
        plain = [member for member in archive if member.isfile() and not member.issparse()]
        found = []
        for member in plain:
            file.seek(member.offset_data)
            text = file.read(member.size) if _has_text(member.name, member.size) else None
            found.append(Member(member.name, member.offset_data, member.size, text))
        return found


def _quick(file: BinaryIO, size: int) -> list[Member] | None:
    """The same for the usual tar file, ten times as fast; None for one that `_thorough` must read.

    Usual is what the programs for WebDataset write: headers of ustar with a checksum, and pax headers before them.
    """
    found, at, pax = list[Member](), 0, dict[bytes, bytes]()
    while at + _BLOCK <= size:
        file.seek(at)
        header = file.read(_BLOCK)
        at += _BLOCK
        if len(header) < _BLOCK:
            return None
        kind = header[156:157]
        if header[:1] == b"\0":
            return found if not any(header) and not pax else None
        try:
            length = int(header[124:136].rstrip(b" \0"), 8)
            sums = sum(header) - sum(header[148:156]) + 256 == int(header[148:156].split(b"\0")[0], 8)
        except ValueError:
            return None
        if not sums or header[257:262] != b"ustar" or kind not in b"0x5" or length < 0:
            return None
        if kind == b"x" and length > _TEXT:
            return None
        if kind == b"x":
            try:
                pax = dict(_pax(file.read(length)))
            except ValueError:
                return None
            if any(key.startswith(b"GNU.") or key in (b"size", b"hdrcharset") for key in pax):
                return None
        else:
            name, prefix = (part.split(b"\0")[0] for part in (header[:100], header[345:500]))
            if header[257:265] == b"ustar\x0000" and prefix:
                name = prefix + b"/" + name
            name = pax.pop(b"path", name).rstrip(b"/")
            if kind == b"0":
                file_name = name.decode(errors="surrogateescape")
                text = file.read(length) if _has_text(file_name, length) else None
                found.append(Member(file_name, at, length, text))
            pax = {}
        at += -(-length // _BLOCK) * _BLOCK
    return None


def _pax(data: bytes) -> Iterable[tuple[bytes, bytes]]:
    """Keys and values of a pax header, of lines LENGTH KEY=VALUE. Raises ValueError for other text."""
    while data:
        number, space, _ = data.partition(b" ")
        length = int(number)
        if not space or not len(number) + 3 <= length <= len(data) or data[length - 1 : length] != b"\n":
            raise ValueError("damaged pax header")
        key, equals, value = data[len(number) + 1 : length - 1].partition(b"=")
        if not key or not equals or any(part != part.strip() for part in (number, key)):
            raise ValueError("damaged pax header")
        yield key, value
        data = data[length:]

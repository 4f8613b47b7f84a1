"""Files that fsspec reads: s3://, gs://, https://, hf:// and others, in parts that are kept on this machine.

A part that was read lies in the folder `parts` of the data cache. When these parts take more than `cache_bytes`, the
ones that were not used for longest are deleted. A server that does not answer ranges sends whole files, and these are
kept in the same way.
"""

import io
import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import filelock

from ddpm.errors import InputError, brief
from ddpm.files import atomic
from ddpm.files.data.index import data_cache, key_of, mark_used

T = TypeVar("T")

THREADS = 16
"""Requests at once, since each waits for the network."""
_TRIES, _WAIT, _TIMEOUT = 5, 0.5, 60.0
"""How often a request is tried; the seconds before the second try, twice as many before each next one; and the seconds
that one try may take."""
_MARKS = ("ETag", "etag", "Content-MD5", "md5Hash", "blob_id", "Last-Modified", "LastModified", "updated", "mtime")
"""What file systems call that which changes when a file does, the best first."""
_AHEAD = 1 << 18
"""Bytes that are read at once for an index."""


def is_url(source: str) -> bool:
    """Whether a SOURCE is a URL, which fsspec reads.

    >>> is_url("s3://bucket/a.tar"), is_url("C:/a.tar"), is_url("file.tar")
    (True, False, False)
    """
    return bool(re.match(r"[a-z][a-z0-9+.-]+://", source))


@dataclass(frozen=True)
class RemoteFile:
    """A file at a URL.

    mark         its ETag, or its time; "" if the server tells neither
    ranges       whether the server answers with a part of it
    cache_bytes  what all parts may take on this machine
    """

    url: str
    size: int
    mark: str
    ranges: bool
    cache_bytes: int

    def __str__(self) -> str:
        return self.url

    def facts(self) -> list[object]:
        return [self.url, self.size, self.mark]

    def read(self, start: int, size: int) -> bytes:
        if not self.ranges:
            with self.open() as whole:
                whole.seek(start)
                return whole.read(size)
        data = self.kept(f"{start}-{size}", lambda: self._range(start, min(start + size, self.size)))
        return data

    def kept(self, name: str, make: Callable[[], bytes]) -> bytes:
        """What make() returns, kept on this machine under a name, which begins with a digit. Raises what it raises."""
        path = self._folder / name
        with suppress(OSError):
            data = path.read_bytes()
            mark_used(path)
            return data
        data = make()
        with suppress(OSError):  # a full disk makes it slower, and not wrong
            atomic.write(path, data)
            _tidy(len(data), self.cache_bytes)
        return data

    def parts(self) -> Any:
        """The file, for reading just the parts that are asked for. Raises OSError."""
        return _Parts(self) if self.ranges else self.open()

    def copy(self, path: Path) -> None:
        """Copy the file to a path of this machine, if it is not there. Raises OSError."""
        with _locked(path):
            if not path.exists() or path.stat().st_size != self.size:
                with atomic.temporary(path) as part:
                    retried(self.url, lambda fs, place: self._get(fs, place, part))

    def open(self) -> BinaryIO:
        if self.ranges:
            return io.BufferedReader(_Parts(self), _AHEAD)
        path = self._folder / WHOLE
        for _ in range(3):  # another process may delete it between two lines
            with suppress(FileNotFoundError):
                if not path.exists():
                    self.copy(path)
                    _tidy(self.size, self.cache_bytes)
                mark_used(path)
                return path.open("rb")
        raise OSError(f"its copy {path} vanishes; want a larger cache_bytes")

    @property
    def _folder(self) -> Path:
        return data_cache() / "parts" / key_of(self.facts())[:32]

    def _range(self, start: int, stop: int) -> bytes:
        def get(fs: Any, place: str) -> bytes:
            data = _cat(fs, place, start, stop)
            if len(data) != stop - start:
                raise OSError(f"{len(data):,} bytes in place of {stop - start:,}")
            return data

        return retried(self.url, get)

    def _get(self, fs: Any, place: str, to: Path) -> None:
        fs.get_file(place, str(to))
        if to.stat().st_size != self.size:
            raise OSError(f"{to.stat().st_size:,} bytes in place of {self.size:,}")


class _Parts(io.RawIOBase):
    """A remote file, each read of which is a request."""

    def __init__(self, file: RemoteFile) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + {0: 0, 1: self._at, 2: self._file.size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._file.size)
        data = self._file._range(self._at, stop) if stop > self._at else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def found(source: str, endings: Sequence[str], cache_bytes: int) -> list[RemoteFile]:
    """The files of a URL with one of these endings, by name.

    {000..012} and {a,b} stand for several URLs, * for any names, and a URL without an ending for all files below it.

    Raises InputError, one line with the URL, if one cannot be reached or is not there.
    """
    try:
        urls = [each for url in _expanded(source) for each in _named(url, _listed, endings)]
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(lambda url: _named(url, _about, cache_bytes), urls))
    except ImportError as fault:
        raise InputError(f"{source}: {brief(fault)}; want `pip install 'ddpm-kit[remote]'`") from None
    except ValueError as fault:
        raise InputError(f"{source}: {brief(fault)}; want a URL of s3://, gs://, https:// or the like") from None
    except OSError as fault:
        raise InputError(f"{fault.filename}: cannot be read ({fault.strerror})") from None


def _named(url: str, call: Callable[..., T], *arguments: Any) -> T:
    """call(url, ...), whose errors have the URL as the name of their file."""
    try:
        return call(url, *arguments)
    except OSError as fault:
        raise OSError(fault.errno or 0, str(fault), url) from fault


def _expanded(url: str) -> Iterator[str]:
    """The URLs that braces stand for."""
    pieces = re.split(r"\{([^{}]*)\}", url)
    choices = [_choices(piece) if k % 2 else [piece] for k, piece in enumerate(pieces)]
    return map("".join, itertools.product(*choices))


def _choices(braces: str) -> list[str]:
    if match := re.fullmatch(r"(\d+)\.\.(\d+)", braces):
        numbers = range(int(match[1]), int(match[2]) + 1)
        return [str(number).zfill(len(match[1])) for number in numbers]
    return braces.split(",")


def _listed(url: str, endings: Sequence[str]) -> list[str]:
    if url.lower().endswith(tuple(endings)) and "*" not in url:
        return [url]

    def look(fs: Any, place: str) -> list[str]:
        names = fs.glob(place) if "*" in place else fs.find(place)
        return [fs.unstrip_protocol(name) for name in sorted(names) if name.lower().endswith(tuple(endings))]

    return retried(url, look)


def _about(url: str, cache_bytes: int) -> RemoteFile:
    about = retried(url, lambda fs, place: fs.info(place))
    mark = next((str(about[name]) for name in _MARKS if about.get(name)), "")
    if about.get("size") is None:
        raise OSError("the server does not tell its size")
    size = int(about["size"])
    ranges = about.get("partial") is not False and size > 1
    ranges = ranges and len(retried(url, lambda fs, place: _cat(fs, place, 0, 1))) == 1
    return RemoteFile(url, size, mark, ranges, cache_bytes)


def _cat(fs: Any, place: str, start: int, stop: int) -> bytes:
    """A range of a file, within the time for one try if the file system can stop."""
    from fsspec.asyn import AsyncFileSystem, sync  # type: ignore[import-untyped]

    if isinstance(fs, AsyncFileSystem):
        data: bytes = sync(fs.loop, fs._cat_file, place, start=start, end=stop, timeout=_TIMEOUT)
        return data
    data = fs.cat_file(place, start=start, end=stop)
    return data


def retried(url: str, call: Callable[[Any, str], T]) -> T:
    """call(file system, path), tried again after errors that may pass. Raises OSError without the URL."""
    import fsspec  # type: ignore[import-untyped]

    for k in range(_TRIES):
        try:
            fs, place = fsspec.core.url_to_fs(url)  # fsspec keeps one a process
            return call(fs, place)
        except (ImportError, ValueError):  # of a protocol
            raise
        except Exception as fault:  # each file system has its own
            status = _status(fault)
            gone = isinstance(fault, FileNotFoundError | PermissionError) and status is None
            if gone or (status is not None and status < 500 and status != 429):
                raise OSError(str(status or "not there")) from fault
            reason = str(status) if status else brief(fault)
        if k + 1 < _TRIES:
            time.sleep(_WAIT * 2**k)
    raise OSError(f"{reason}, tried {_TRIES} times")


def _status(fault: BaseException | None) -> int | None:
    """The HTTP status behind an error, if there is one."""
    while fault is not None:
        status = getattr(fault, "status", getattr(fault, "status_code", None))
        if isinstance(status, int):
            return status
        fault = fault.__cause__
    return None


# -- the parts on this machine -----------------------------------------------------------------------------------------

WHOLE, GROUP = "whole", "g"
"""How the names of the parts end that are whole files, and row groups. Other parts are ranges of bytes."""
_IN_USE = 60
"""Seconds in which a whole file or row group that was used is not deleted: many images of it are wanted in turn."""
_written, _guard = 0, threading.Lock()


def _locked(path: Path) -> Any:
    atomic.make_folder(path.parent)
    return filelock.FileLock(path.with_name(f".{path.name}.lock"))


def _tidy(count: int, most: int) -> None:
    """Note that `count` bytes were written; at times delete the parts that were not used for longest."""
    global _written
    with _guard:
        _written += count
        if _written <= most // 16:
            return
        _written = 0
    parts = []
    for path in (data_cache() / "parts").glob("*/[0-9w]*"):
        with suppress(OSError):
            parts.append((path.stat().st_mtime_ns, path.stat().st_size, path))
    excess = sum(size for _, size, _ in parts) - most
    for used, size, path in sorted(parts)[:-1]:  # the last one is in use
        if excess <= 0:
            return
        if path.name.endswith((WHOLE, GROUP)) and time.time_ns() - used < _IN_USE * 10**9:
            continue
        with suppress(OSError):
            path.unlink()
            excess -= size

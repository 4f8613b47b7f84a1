"""The two kinds of file: their headers, identities and checksums. picture.py and archive.py write the payloads.

A file of one picture:

    bytes   what
    3       "DPC"
    1       version << 4 | whole << 2 | local << 1 | lossless
    1       K << 2 | channels
    4       the model: the first bytes of SHA-256 over its tensors and tables
    varints width, height, seed, groups, length of the payload
    2       local profile only: the machine, device and release that wrote the file
    1       CRC-8 of the header
    length  the payload: the scale and the indices of each tile of each group; in a lossless file then the pixels
    7       lossless only: a check byte of x after 1/4, 1/2 and 3/4 of the groups; CRC-32 of the pixels
    4       CRC-32 of the file

An archive:

    bytes   what
    3       "DPA"
    1       version << 4 | local << 1
    1       K of the pictures that are coded as files
    4       the model, as above
    varints pictures, how many of them are coded as files, length of the names, of these files, of the stack
    2       local profile only, as above
    1       CRC-8 of the header
    ...     sizes and names as deflated JSON; the stack: words of 4 bytes
    8       CRC-32 of all pixels, CRC-32 of the file

A varint holds 7 bits a byte, the lowest first; the high bit says that another byte follows.
"""

import zlib
from dataclasses import dataclass
from typing import NamedTuple

from ddpm.codec.entropy import Damaged

PICTURE, PICTURE_VERSION = b"DPC", 1
ARCHIVE, ARCHIVE_VERSION = b"DPA", 2
MOST_PIXELS = 1 << 24
"""The largest picture, for the encoder and the decoder: a damaged header cannot ask for any amount of memory."""

AS_WRITTEN = "want the file as it was written"


@dataclass(frozen=True)
class Header:
    """The header of one picture's file: width, height and channels of the picture, and

    bits      K, the bits of a chunk
    lossless  whether the pixels follow the groups
    local     whether the file decodes only on the kind of machine that wrote it
    whole     whether the picture is one tile of its own size
    identity  4 bytes that name the model
    seed      seed of the shared noise
    groups    how many groups the payload holds
    length    length of the payload, bytes
    where     in the local profile 2 bytes that name machine, device and release, otherwise empty
    """

    width: int
    height: int
    channels: int
    bits: int
    lossless: bool
    local: bool
    whole: bool
    identity: bytes
    seed: int
    groups: int
    length: int
    where: bytes = b""

    def to_bytes(self) -> bytes:
        """The header as it stands in a file, with its check byte."""
        flags = PICTURE_VERSION << 4 | self.whole << 2 | self.local << 1 | self.lossless
        numbers = b"".join(map(varint, (self.width, self.height, self.seed, self.groups, self.length)))
        text = PICTURE + bytes([flags, self.bits << 2 | self.channels]) + self.identity + numbers + self.where
        return text + crc8(text)

    @property
    def trailer(self) -> int:
        """The number of bytes after the payload."""
        return 11 if self.lossless else 4


class Contents(NamedTuple):
    """The header of an archive; local, identity and where are as in `Header`.

    bits        K of the pictures that are coded as files
    pictures    how many pictures there are
    files       how many of them are coded as files of their own, which lie on the stack
    about       length of the sizes and names, bytes
    file_bytes  length of those files, bytes
    stack       length of the stack, bytes
    """

    local: bool
    bits: int
    identity: bytes
    pictures: int
    files: int
    about: int
    file_bytes: int
    stack: int
    where: bytes

    def to_bytes(self) -> bytes:
        """The header as it stands in a file, with its check byte."""
        numbers = b"".join(map(varint, (self.pictures, self.files, self.about, self.file_bytes, self.stack)))
        flags = ARCHIVE_VERSION << 4 | self.local << 1
        text = ARCHIVE + bytes([flags, self.bits]) + self.identity + numbers + self.where
        return text + crc8(text)


def is_archive(data: bytes) -> bool:
    """Whether these are the bytes of an archive."""
    return data[:3] == ARCHIVE


def read_header(data: bytes) -> tuple[Header, int]:
    """The header of a picture's file, and its length in bytes. Raises Damaged if data has no header of this version.

    >>> header = Header(32, 32, 3, 12, True, False, False, b"abcd", 0, 40, 1500)
    >>> read_header(header.to_bytes())[0] == header
    True
    """
    flags, kind, identity, (width, height, seed, groups, length), where, end = _read_start(
        data, PICTURE, PICTURE_VERSION
    )
    lossless, local, whole = (bool(flags & bit) for bit in (1, 2, 4))
    header = Header(width, height, kind & 3, kind >> 2, lossless, local, whole, identity, seed, groups, length, where)
    if flags & 8 or header.channels not in (1, 3) or not 1 <= width * height <= MOST_PIXELS:
        raise Damaged(
            f"header: {width}x{height} of {header.channels} channels; want 1 to {MOST_PIXELS:,} pixels, 1 or 3"
        )
    return header, end


def read_contents(data: bytes) -> tuple[Contents, int]:
    """The header of an archive, and its length in bytes. Raises Damaged if data has no header of this version."""
    flags, bits, identity, numbers, where, end = _read_start(data, ARCHIVE, ARCHIVE_VERSION)
    if flags & 13:
        raise Damaged("header: has flags that this release does not know")
    pictures, files, about, file_bytes, stack = numbers
    contents = Contents(bool(flags & 2), bits, identity, pictures, files, about, file_bytes, stack, where)
    if not 1 <= contents.files <= contents.pictures <= MOST_PIXELS or contents.stack % 4:
        raise Damaged(f"header: damaged; {AS_WRITTEN}")
    return contents, end


def _read_start(data: bytes, magic: bytes, version: int) -> tuple[int, int, bytes, list[int], bytes, int]:
    """What both headers have: flags, the next byte, identity, five numbers, where, and the header's length."""
    if not data:
        raise Damaged("0 bytes: want a file of `ddpm compress`")
    if data[:3] != magic[: len(data)]:
        raise Damaged(f"starts with {data[:3]!r}: not a file of `ddpm compress`, which starts with {magic!r}")
    short = Damaged(f"{len(data)} bytes: ends within its header; want the whole file or a longer part of it")
    if len(data) < 9:
        raise short
    flags, kind, at = data[3], data[4], 9
    if flags >> 4 != version:
        raise Damaged(f"version {flags >> 4}: this release reads version {version}")
    numbers = []
    for _ in range(5):
        value = shift = 0
        while True:
            if at >= len(data):
                raise short
            value |= (data[at] & 127) << shift
            shift, at = shift + 7, at + 1
            if data[at - 1] < 128:
                break
            if shift > 35:
                raise Damaged(f"header: damaged (a number without end); {AS_WRITTEN}")
        numbers.append(value)
    end = at + (2 if flags & 2 else 0)
    if end >= len(data):
        raise short
    if crc8(data[:end]) != data[end : end + 1]:
        raise Damaged(f"header: damaged (its check byte does not agree); {AS_WRITTEN}")
    return flags, kind, data[5:9], numbers, data[at:end], end + 1


def varint(value: int) -> bytes:
    """A number in 7 bits a byte, the lowest first.

    >>> varint(300)
    b'\\xac\\x02'
    """
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def crc8(data: bytes) -> bytes:
    """The check byte of a header."""
    return bytes([zlib.crc32(data) & 255])


def sealed(data: bytes) -> bytes:
    """The data followed by their CRC-32."""
    return data + zlib.crc32(data).to_bytes(4, "big")


def intact(data: bytes) -> bool:
    """Whether the last four bytes are the CRC-32 of the others."""
    return zlib.crc32(data[:-4]) == int.from_bytes(data[-4:], "big")


def check_intact(data: bytes) -> None:
    """Raise Damaged if a bit was changed."""
    if not intact(data):
        raise Damaged(f"checksum of the file does not agree: bits were changed; {AS_WRITTEN}")


def check_identity(file: bytes, model: bytes) -> None:
    """Raise Damaged if the file belongs to another model."""
    if file != model:
        raise Damaged(
            f"of model {file.hex()}; this one is {model.hex()}: other weights (checkpoint, ema or raw) or tables"
        )

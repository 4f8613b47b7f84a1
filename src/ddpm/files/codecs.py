"""HEIC and JPEG XL, which the packages pillow-heif and imagecodecs decode. `images` reads all other formats.

Both are recognised by their signature. What the package does not tell is read from the header: the depth of JPEG XL,
its size, before memory is spent on it, and whether it is turned or an animation.
"""

import importlib
import importlib.util
import io
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddpm.errors import InputError, brief

INSTALL = "pip install 'ddpm-kit[formats]'"
_PACKAGES = {".heic": "pillow_heif", ".heif": "pillow_heif", ".jxl": "imagecodecs"}
SUFFIXES = frozenset(suffix for suffix, module in _PACKAGES.items() if importlib.util.find_spec(module))
"""Endings of names of images that can be read here."""
MISSING = frozenset(_PACKAGES) - SUFFIXES
"""Endings of names of images that could be read with the extra `formats`."""

_JXL_BOX = b"\0\0\0\x0cJXL \r\n\x87\n"
_HEVC = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"))


def versions() -> dict[str, str]:
    """The packages here that decode images, and their versions."""
    found = dict[str, str]()
    for package in ("Pillow", "pillow-heif", "imagecodecs", "tifffile"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


class Decoded(NamedTuple):
    """An image as its package decodes it.

    pixels   [H, W, C], uint8, uint16 or float, with the levels of the file: 0..1023 for 10 bits; turned upright
    depth    bits of a channel
    several  whether the file holds more pictures, or maps
    turned   whether the file says to turn the image, which was done
    profile  its ICC profile, or nothing
    """

    pixels: NDArray[Any]
    depth: int
    several: bool
    turned: bool
    profile: bytes


def is_jxl(data: bytes) -> bool:
    """Whether a file is JPEG XL, by its signature.

    >>> is_jxl(b"\\xff\\x0a"), is_jxl(b"\\xff\\xd8")
    (True, False)
    """
    return data.startswith((b"\xff\x0a", _JXL_BOX))


def is_heic(data: bytes) -> bool:
    """Whether a file is HEIC, by the brands of its first box.

    >>> is_heic(b"\\0\\0\\0\\x18ftypmif1\\0\\0\\0\\0mif1heic"), is_heic(b"\\0\\0\\0\\x18ftypmif1\\0\\0\\0\\0mif1avif")
    (True, False)
    """
    end = min(int.from_bytes(data[:4], "big"), 256)
    brands = {data[at : at + 4] for at in (8, *range(16, end, 4))}
    return data[4:8] == b"ftyp" and bool(brands & _HEVC)


def size(data: bytes, name: str) -> tuple[int, int]:
    """(H, W) of a file of `is_jxl` or `is_heic`, from its header. Raises InputError if it is damaged."""
    if is_jxl(data):
        header = _header(data, name)
        return header.height, header.width
    width, height = _heif(data, name).size
    return height, width


def decode(data: bytes, name: str) -> Decoded:
    """Decode a file of `is_jxl` or `is_heic`; the first picture of several.

    Raises InputError, one line with the name, if it is damaged, or if the package is not installed.
    """
    return _decode_jxl(data, name) if is_jxl(data) else _decode_heic(data, name)


def package(module: str, name: str, what: str) -> Any:
    """A package of the extra `formats`, which reads a file of the kind `what`. Raises InputError if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"{name}: {what}, and {module} is not installed; want {INSTALL}") from None


def _damaged(name: str, fault: Exception) -> InputError:
    return InputError(f"{name}: damaged image ({brief(fault)})")


# -- HEIC --------------------------------------------------------------------------------------------------------------


def _heif(data: bytes, name: str) -> Any:
    heif = package("pillow_heif", name, "HEIC")
    try:
        return heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=False)
    except Exception as fault:  # pillow-heif raises exceptions of many kinds
        raise _damaged(name, fault) from None


def _decode_heic(data: bytes, name: str) -> Decoded:
    file = _heif(data, name)
    try:
        pixels, info = np.asarray(file), file.info
    except Exception as fault:
        raise _damaged(name, fault) from None
    depth = int(info["bit_depth"])
    if pixels.dtype == np.uint16:
        pixels = pixels >> (16 - depth)  # pillow-heif shifts the levels up
    several = len(file) > 1 or bool(info.get("depth_images")) or bool(info.get("aux"))
    turned = re.search(rb"\0\0\0\x09(irot[\1-\3]|imir)", data) is not None  # the properties that libheif applies
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    return Decoded(pixels, depth, several, turned, info.get("icc_profile") or b"")


# -- JPEG XL -----------------------------------------------------------------------------------------------------------


def _decode_jxl(data: bytes, name: str) -> Decoded:
    header, imagecodecs = _header(data, name), package("imagecodecs", name, "JPEG XL")
    try:
        pixels: NDArray[Any] = imagecodecs.jpegxl_decode(data, index=0)
    except Exception as fault:  # imagecodecs raises exceptions of many kinds
        raise _damaged(name, fault) from None
    if pixels.shape[:2] != (header.height, header.width):
        raise InputError(f"{name}: JPEG XL of {list(pixels.shape)}; want one picture, grey or RGB, with alpha or not")
    pixels = pixels.reshape(header.height, header.width, -1)
    return Decoded(pixels, header.depth, header.animated, header.orientation != 1, b"")


class _Header(NamedTuple):
    """What the header of JPEG XL says (ISO/IEC 18181-1, Annex D); height and width are of the upright image."""

    height: int
    width: int
    depth: int
    orientation: int
    animated: bool


class _Bits:
    """The bits of a code stream, the lowest bit of a byte first."""

    def __init__(self, data: bytes) -> None:
        self.value, self.left = int.from_bytes(data, "little"), 8 * len(data)

    def take(self, n: int) -> int:
        if n > self.left:
            raise ValueError("the header ends early")
        taken = self.value & ((1 << n) - 1)
        self.value, self.left = self.value >> n, self.left - n
        return taken

    def choose(self, *choices: tuple[int, int]) -> int:
        """A number in one of four codes (offset, number of bits), which two bits name."""
        offset, bits = choices[self.take(2)]
        return offset + self.take(bits)


def _header(data: bytes, name: str) -> _Header:
    try:
        return _read_header(_Bits(_code_stream(data)[2:66]))
    except ValueError as fault:
        raise _damaged(name, fault) from None


def _code_stream(data: bytes) -> bytes:
    """The code stream, or its first part, without the boxes around it."""
    at = 0
    while data.startswith(_JXL_BOX) and at + 8 <= len(data):
        length, kind, start = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8], at + 8
        if length == 1:
            length, start = int.from_bytes(data[at + 8 : at + 16], "big"), at + 16
        if kind in (b"jxlc", b"jxlp"):
            return data[start + 4 * (kind == b"jxlp") :]
        if length < 8:
            raise ValueError("no code stream")
        at += length
    return data


_RATIOS = {1: (1, 1), 2: (12, 10), 3: (4, 3), 4: (3, 2), 5: (16, 9), 6: (5, 4), 7: (2, 1)}
"""Code -> width to height."""


def _read_header(bits: _Bits) -> _Header:
    height, width = _read_size(bits)
    depth, orientation, animated = 8, 1, False
    if not bits.take(1):  # not all values are the usual ones
        if bits.take(1):  # extra fields
            orientation = 1 + bits.take(3)
            if bits.take(1):
                _read_size(bits)  # that a viewer should use
            if bits.take(1):
                raise ValueError("a JPEG XL with a preview, which is not read")
            if animated := bool(bits.take(1)):
                bits.choose((100, 0), (1000, 0), (1, 10), (1, 30))
                bits.choose((1, 0), (1001, 0), (1, 8), (1, 10))
                bits.choose((0, 0), (0, 3), (0, 16), (0, 32))
                bits.take(1)
        is_float = bits.take(1)
        depth = (
            bits.choose((32, 0), (16, 0), (24, 0), (1, 6))
            if is_float
            else bits.choose((8, 0), (10, 0), (12, 0), (1, 6))
        )
    if orientation > 4:
        height, width = width, height
    return _Header(height, width, depth, orientation, animated)


def _read_size(bits: _Bits) -> tuple[int, int]:
    small = bits.take(1)

    def side() -> int:
        return 8 * (1 + bits.take(5)) if small else bits.choose((1, 9), (1, 13), (1, 18), (1, 30))

    height = side()
    ratio = bits.take(3)
    if not ratio:
        return height, side()
    over, under = _RATIOS[ratio]
    return height, height * over // under

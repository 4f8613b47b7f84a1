"""Pictures in and out: files to 8-bit grey, RGB or RGBA of one size, and images to PNG, contact sheets and npz.

An image here is uint8 [H, W, C], C = 1 (grey), 3 (RGB) or 4 (RGBA, alpha not premultiplied).
"""

import functools
import importlib.util
import io
import math
import os
import re
import stat
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageCms, ImageOps

from ddpm.catalog import Fit
from ddpm.errors import InputError, brief
from ddpm.files import atomic, codecs

if TYPE_CHECKING:
    from torch import Tensor

Pixels: TypeAlias = NDArray[np.uint8]

Notes: TypeAlias = dict[str, tuple[str, int]]
"""What was done to images beyond decoding -> (the first file, the number of files)."""

Place: TypeAlias = tuple[float, float]
"""The place of a crop: two numbers in 0 <= u < 1, from the top to the bottom and from the left to the right."""

SUFFIXES = frozenset(".png .jpg .jpeg .jpe .jfif .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm .jp2 .avif".split())
SUFFIXES |= codecs.SUFFIXES
"""Endings, in lower case, of the names of image files."""

DEEP = "more than 8 bits a channel, rounded to 8 (pixel_type uint16 keeps them)"
"""The note of an image that was rounded to 8 bits. Bits per dimension are not measured for such an image."""

SEVERAL = "several pictures in one file, only the first is taken"
"""The note of an animation, and of a file with pages, thumbnails or maps beside its picture."""

TURNED = "turned as the EXIF data say"
"""The note of an image whose file says that it lies on a side, or is mirrored."""

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Number of channels -> Pillow's mode."""

if not re.fullmatch(r"[1-9][0-9]{,8}", _MEGABYTES := os.environ.get("DDPM_PICTURE_MB") or "600"):
    raise InputError(f"DDPM_PICTURE_MB {_MEGABYTES!r}: want a number of megabytes, an integer of at least 1")
MEMORY = 1_000_000 * int(_MEGABYTES)
"""The bytes that one file and its pixels may take. The environment variable DDPM_PICTURE_MB changes the limit."""

# Only formats with a signature: Pillow takes garbage for an image of other formats, and EPS starts a program.
Image.init()
_FORMATS = [f for f in "PNG JPEG WEBP BMP GIF TIFF PPM JPEG2000 AVIF".split() if f in Image.OPEN]
_FAULTS: tuple[type[Exception], ...] = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError)
_FAULTS += (OverflowError, struct.error)
_WANTED = "PNG, JPEG, WebP, BMP, GIF, TIFF, PPM, JPEG 2000, AVIF, HEIC or JPEG XL"
_ORIENTATION = 274
_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2}
"""Bytes of a pixel in Pillow's memory; 4 in every other mode."""


def read(source: str | Path | bytes | BinaryIO, name: str | None = None) -> Image.Image:
    """Decode one image, or the first picture of a file of several, and turn it as its EXIF orientation says.

    source  a path, the bytes of a file, or a binary file
    name    its name in errors; None: the path

    The image's `info` holds what Pillow's mode does not tell and `convert` needs: "deep", whether the file has more
    than 8 bits a channel; "top", the grey level of white; "several", whether the file holds more pictures; and
    "turned", whether the image was turned.

    Raises InputError, one line with the name, if the file is missing, empty, cut short, no plain file, not an image, or
    takes more than MEMORY bytes.

    >>> import numpy as np
    >>> read(to_png(np.zeros((2, 3, 1), np.uint8))).size
    (3, 2)
    >>> read(b"", "a.png")
    Traceback (most recent call last):
    ...
    ddpm.errors.InputError: a.png: empty file, want an image
    """
    name = name or (str(source) if isinstance(source, str | Path) else "the image")
    data = file_bytes(source, name)
    if not data:
        raise InputError(f"{name}: empty file, want an image")
    if codecs.is_jxl(data) or codecs.is_heic(data):
        return _of_codec(data, name)
    try:
        image = _open(data, name)
        width, height = image.size
        check_memory(width * height * _BYTES.get(image.mode, 4), f"{name}: {width}x{height} pixels")
        several = _holds_several(image)
        deep, depth, top, inverted = _depth(image, data, name)  # before Pillow cuts 16-bit colour to 8 bits
        turned = image.getexif().get(_ORIENTATION, 1) in range(2, 9)  # before Pillow turns a TIFF
        image.load()
    except InputError:
        raise
    except Image.DecompressionBombError as fault:  # some formats ask Pillow's own limit
        raise InputError(f"{name}: too large ({brief(fault)}), want a smaller image") from None
    except _FAULTS as fault:
        raise InputError(f"{name}: damaged image ({brief(fault)})") from None
    info = {**image.info, "deep": deep, "top": top, "several": several, "turned": turned}
    if (key := info.get("transparency")) is not None and image.mode in ("L", "RGB") and image.format == "PNG":
        levels = [key] if isinstance(key, int) else key  # in the file's own depth
        levels = [level >> 8 if depth == 16 else level * 255 // (2**depth - 1) for level in levels]
        info["transparency"] = levels[0] if image.mode == "L" else tuple(levels)
    if inverted:
        image = Image.fromarray((top - np.asarray(image).astype(np.int64)).astype(np.int32))
    elif image.mode in MODES.values() and top < 255:
        image = image.point([min(255, (level * 255 + top // 2) // top) for level in range(256)] * len(image.getbands()))
    image.info = info
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except _FAULTS as fault:
        raise InputError(f"{name}: damaged image ({brief(fault)})") from None
    return image


def size(data: bytes, name: str = "the image") -> tuple[int, int]:
    """Width and height of an image file, from its header: nothing is decoded. Raises InputError as `read` does.

    >>> import numpy as np
    >>> size(to_png(np.zeros((2, 3, 1), np.uint8)))
    (3, 2)
    """
    if codecs.is_jxl(data) or codecs.is_heic(data):
        height, width = codecs.size(data, name)
        return width, height
    try:
        return _open(data, name).size
    except InputError:
        raise
    except _FAULTS as fault:
        raise InputError(f"{name}: damaged image ({brief(fault)})") from None


def _of_codec(data: bytes, name: str) -> Image.Image:
    """What `read` gives, for a file of `codecs`. Colour of more than 8 bits is rounded to 8."""
    pixels, depth, several, turned, profile = unpack(data, name)
    channels, top = pixels.shape[2], 2**depth - 1
    if channels > 4 or (pixels.dtype.kind == "f" and channels > 1):
        raise InputError(f"{name}: {pixels.dtype} of {channels} channels; want pixel_type float32, or 8 or 16 bits")
    if pixels.dtype != np.uint8 and channels > 1:
        pixels = ((pixels.astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if channels == 1 else pixels))
    image.info = {"deep": depth > 8, "top": top, "several": several, "turned": turned, "icc_profile": profile}
    return image


def unpack(data: bytes, name: str) -> codecs.Decoded:
    """`codecs.decode` of a file that fits in memory."""
    height, width = codecs.size(data, name)
    check_memory(8 * height * width, f"{name}: {width}x{height} pixels")
    return codecs.decode(data, name)


def check_memory(size: int, what: str) -> None:
    """Raise InputError if `size` bytes are more than one picture may take; `what` begins the message.

    >>> check_memory(10**10, "a.png")
    Traceback (most recent call last):
    ...
    ddpm.errors.InputError: a.png: 10,000 MB; want at most 600 MB, or set DDPM_PICTURE_MB=10000
    """
    if size > MEMORY:
        megabytes = -(-size // 1_000_000)
        raise InputError(
            f"{what}: {megabytes:,} MB; want at most {MEMORY // 1_000_000:,} MB, or set DDPM_PICTURE_MB={megabytes}"
        )


def check_unpacked(unpacked: int, packed: int, what: str) -> None:
    """Raise InputError for a small file that would fill the memory; `what` begins the message.

    >>> check_unpacked(10**10, 10**9, "a.npz")
    """
    if unpacked > 100 * packed:
        check_memory(unpacked, f"{what}: unpacked")


def file_bytes(source: str | Path | bytes | BinaryIO, name: str | None = None) -> bytes:
    """The bytes of a file, whose kind and size are looked at first. Raises InputError, as `read` does."""
    name = name or str(source)
    if isinstance(source, bytes):
        check_memory(len(source), name)
        return source
    try:
        if isinstance(source, str | Path):
            check_memory(check_plain(source, name), name)
            return Path(source).read_bytes()
        data = source.read(MEMORY + 1)
    except (OSError, ValueError) as fault:
        if isinstance(fault, InputError):
            raise
        raise InputError(f"{name}: {(getattr(fault, 'strerror', '') or str(fault)).lower()}, want an image") from None
    check_memory(len(data), name)
    return data


def check_plain(path: str | Path, name: str) -> int:
    """The size of a file, bytes. Raises InputError for a pipe or a device, since reading it might never end."""
    status = os.stat(path)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise InputError(f"{name}: a pipe or a device, want a plain file with an image")
    return status.st_size


def _open(data: bytes, name: str) -> Image.Image:
    """`Image.open` for _FORMATS, but without Pillow's limit of pixels, which is one number for the whole process."""
    for form in _FORMATS:
        factory, accepts = Image.OPEN[form]
        recognised = accepts is not None and accepts(data[:16])
        if not recognised or isinstance(recognised, str):  # a string: this build of Pillow cannot decode it
            continue
        try:
            return factory(io.BytesIO(data), "")
        except (SyntaxError, LookupError, TypeError, struct.error) as fault:
            raise InputError(f"{name}: damaged image, or a kind of {form} that is not read ({brief(fault)})") from None
    raise InputError(f"{name}: not an image ({_WANTED}), or a damaged one")


def _holds_several(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except _FAULTS:
        return True  # there is another one, which is damaged
    finally:
        if image.tell():
            image.seek(0)


def _depth(image: Image.Image, data: bytes, name: str) -> tuple[bool, int, int, bool]:
    """What the file says of its pixels, which Pillow's mode does not tell.

    Returns whether there are more than 8 bits a channel, the bits of a channel, the level of white as Pillow decodes
    it, and whether Pillow leaves white at 0. Raises InputError for a kind that Pillow decodes wrongly.
    """
    depth, top, inverted = 8, 255, False
    grey = image.mode.startswith("I")
    if image.format == "PNG":
        depth = data[24]  # IHDR is the first chunk
    elif image.format == "PPM":
        [(*_, args)] = image.tile  # type: ignore[attr-defined]
        depth = 16 if grey or (isinstance(args, tuple) and isinstance(args[1], int) and args[1] > 255) else 8
    elif image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        depth, signed = max(tags.get(258, (1,))), 2 in tags.get(339, (1,))
        if signed and not grey and image.mode != "F":
            raise InputError(f"{name}: signed levels of {depth} bits; want levels from 0")
        if depth > 8 and tags.get(284) == 2 and tags.get(259, 1) == 1:
            raise InputError(
                f"{name}: separate planes of {depth} bits, which Pillow mixes up; want interleaved channels"
            )
        top = 2 ** (depth - signed) - 1
        largest = tags.get(281, (0,))[0]  # MaxSampleValue; if it is no 2^k - 1, it only describes this picture
        if grey and 255 < largest < top and largest & (largest + 1) == 0:
            top = largest
        inverted = grey and tags.get(262) == 0
    elif image.format == "JPEG2000":
        at = data.index(b"\xff\x4f\xff\x51") + 40  # of the number of components, each with three bytes
        components = data[at + 2 : at + 2 + 3 * int.from_bytes(data[at : at + 2], "big") : 3]
        depth = max((each & 0x7F) + 1 for each in components)
        if depth > 8 and not grey:
            raise InputError(
                f"{name}: JPEG 2000 colour of {depth} bits, whose white Pillow makes black; want PNG or TIFF"
            )
        most = 16 if grey else 8  # Pillow shifts the levels up to as many bits
        top = (2**depth - 1) << (most - depth) if depth < most else 2**most - 1
    elif image.format == "AVIF":
        depth = max((12 if flags & 0x20 else 10 for flags in _av1_flags(data) if flags & 0x40), default=8)
    if not grey and image.format != "JPEG2000":
        top = 255
    elif depth > 16 or image.format in ("PNG", "PPM"):
        top = 65535
    return depth > 8 or grey, depth, top, inverted


def _av1_flags(data: bytes) -> Iterator[int]:
    """The byte with the depth of each AV1 configuration of an AVIF file; the boxes with pixels are passed over."""
    at = 0
    while at + 8 <= len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        end = at + size if size >= 8 else len(data)
        if kind != b"mdat":
            yield from (match[1][0] for match in re.finditer(rb"av1C..(.)", data[at:end], re.DOTALL))
        at = end


def native(image: Image.Image) -> int:
    """The number of channels that an image has: 1 for grey (1, L, I;16), 3 for colour (RGB, P, CMYK), 4 with alpha.

    >>> native(Image.new("CMYK", (1, 1))), native(Image.new("LA", (1, 1))), native(Image.new("1", (1, 1)))
    (3, 4, 1)
    """
    if _may_be_transparent(image):
        return 4
    return 1 if image.mode in ("1", "L", "F") or image.mode.startswith("I") else 3


def _may_be_transparent(image: Image.Image) -> bool:
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return True
    return image.mode == "P" and image.palette is not None and image.palette.mode == "RGBA"


def alpha(image: Image.Image) -> Image.Image | None:
    """The alpha channel (mode L) of an image of which a part is transparent; None if all of it is opaque.

    Transparency may be a channel, a part of the palette, or one grey level or colour (a PNG's tRNS).

    >>> alpha(Image.new("RGBA", (1, 1), (1, 2, 3, 255))) is None
    True
    """
    if not _may_be_transparent(image):
        return None
    if image.mode in ("P", "PA"):
        channel = image.convert("RGBA").getchannel("A")
    elif "A" in image.mode or "a" in image.mode:
        channel = image.getchannel(len(image.getbands()) - 1)
    else:
        pixels, key = np.asarray(image), image.info["transparency"]
        if image.mode == "1":
            key = bool(key)
        clear = (pixels.reshape(*pixels.shape[:2], -1) == np.array(key).reshape(-1)).all(-1)
        channel = Image.fromarray(np.where(clear, 0, 255).astype(np.uint8))
    return None if channel.getextrema() == (255, 255) else channel


def keeps_colour(image: Image.Image, channels: int) -> bool:
    """Whether `convert` loses no colour. Transparency, which it lays on white, may be lost.

    >>> [keeps_colour(Image.new("RGBA", (1, 1), colour), 1) for colour in ((7, 7, 7, 0), (7, 8, 7, 255))]
    [True, False]
    """
    if channels != 1 or native(image) == 1:
        return True
    red, *others = convert(image, 3, notes={}).split()
    return all(ImageChops.difference(red, other).getextrema() == (0, 0) for other in others)


def keeps(image: Image.Image, channels: int) -> bool:
    """Whether `convert` loses nothing: from grey and palette to RGB, from an opaque image to one without alpha, ...

    >>> [keeps(Image.new("RGB", (1, 1), colour), 1) for colour in ((7, 7, 7), (7, 8, 7))]
    [True, False]
    """
    have = native(image)
    if have == channels or channels == 4:
        return True
    if have == 4 and alpha(image) is not None:
        return False
    return keeps_colour(image, channels)


def convert(image: Image.Image, channels: int, name: str = "the image", notes: Notes | None = None) -> Image.Image:
    """The image in mode L (channels 1), RGB (3) or RGBA (4). An image that has this mode is returned itself.

    Grey of more than 8 bits is scaled to 8, from the levels that the file has (`read`). A transparent image that loses
    its alpha channel is laid on white. A conversion is added to `notes`, or warned of without `notes`.

    Raises InputError for floating point and for integers of more than 16 bits.

    >>> convert(Image.new("RGBA", (1, 1), (0, 0, 0, 0)), 3, notes={}).getpixel((0, 0))
    (255, 255, 255)
    """
    target = MODES[channels]
    mask = None if image.mode == target == "RGBA" else alpha(image)
    converted = image if image.mode == target and mask is None else _converted(image, target, mask, name)
    note_file(image.info, name, notes)
    if image.info.get("deep") or image.mode.startswith("I"):
        note(notes, DEEP, name)
    elif image.mode != target:
        on_white = ", laid on white" * (mask is not None and target != "RGBA")
        note(notes, f"mode {image.mode} is converted to {target}{on_white}", name)
    elif mask is not None:
        note(notes, "a transparent colour is laid on white", name)
    return converted


def note_file(info: Mapping[Any, Any], name: str, notes: Notes | None) -> None:
    """Note what `read` did with a file, and what in it is not used; `info` is the image's."""
    if info.get("several"):
        note(notes, SEVERAL, name)
    if info.get("turned"):
        note(notes, TURNED, name)
    if info.get("icc_profile") and (profile := _profile(info["icc_profile"])):
        note(notes, f"the colour profile {profile} is not applied", name)


@functools.lru_cache(maxsize=64)
def _profile(data: bytes) -> str:
    """What a colour profile calls itself; nothing for sRGB, which needs no conversion."""
    try:
        described = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(data)))
    except (ImageCms.PyCMSError, ImportError, OSError, TypeError, ValueError):
        return "(damaged)"
    name = " ".join(described.split())[:60]
    is_srgb = "srgb" in name.lower() and "linear" not in name.lower()
    return "" if is_srgb or name in ("c2", "c2ci") else name or "(without a name)"  # c2: a small file of sRGB


def _converted(image: Image.Image, target: str, mask: Image.Image | None, name: str) -> Image.Image:
    """`convert` for an image that is not of the target's mode, or of which `mask` is the alpha channel."""
    if image.mode == "F":
        raise InputError(f"{name}: mode F (floating point), want 8 bits per channel")
    if image.mode.startswith("I"):
        image = _to_8_bits(image, name)
    elif image.mode not in MODES.values():
        mode = MODES[native(image)]
        # Pillow converts some modes only in two steps.
        via = {"La": "LA", "RGBa": "RGBA", "LAB": None, "HSV": "RGB"}.get(image.mode, mode)
        if via is None:
            raise InputError(f"{name}: mode {image.mode}, want grey, RGB or RGBA of 8 bits per channel")
        image = image.convert(via).convert(mode)
    if mask is not None and image.mode != "RGBA":
        image = image.copy()
        image.info.pop("transparency", None)  # Pillow would apply it again
        image = image.convert("RGBA")
        image.putalpha(mask)
    if mask is not None and target != "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == target else image.convert(target)


def _to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """Grey of more than 8 bits as mode L."""
    levels, top = np.asarray(image), image.info.get("top", 65535)
    low, high = int(levels.min()), int(levels.max())
    top = max(top, 65535) if high > top else top  # the file said less than it holds
    if low < 0 or high > top:
        raise InputError(f"{name}: grey levels {low}..{high}, want 8 or 16 bits per channel")
    scaled = levels.astype(np.uint32)
    scaled *= 255
    scaled += top // 2
    scaled //= top
    return Image.fromarray(scaled.astype(np.uint8))


def fit(
    image: Image.Image, size: tuple[int, int], channels: int, name: str = "the image", notes: Notes | None = None,
    how: Fit = "crop", place: Place | None = None,
) -> Pixels:  # fmt: skip
    """Convert the image, and bring it to size = (H, W): uint8 [H, W, C].

    how    crop scales the image until it just covers the size and crops it at the centre; pad scales it until it just
           fits and fills the rest with black, or clear for RGBA; stretch scales both sides apart; random-crop scales
           nothing but an image that does not cover the size, and crops it
    place  of a random-crop; None: the centre

    Scaling is Pillow's antialiased bicubic. An image of this size and mode keeps its pixels exactly. Enlarging and
    converting are added to `notes`, or warned of without `notes`. Raises what `convert` raises.

    >>> fit(Image.new("L", (8, 4), 7), (2, 2), 1)[..., 0]
    array([[7, 7],
           [7, 7]], dtype=uint8)
    """
    height, width = size
    image = fitted(image, size, channels, name, notes, how, place)
    return np.asarray(image, dtype=np.uint8).reshape(height, width, channels)


def fitted(
    image: Image.Image, size: tuple[int, int], channels: int, name: str = "the image", notes: Notes | None = None,
    how: Fit = "crop", place: Place | None = None,
) -> Image.Image:  # fmt: skip
    """What `fit` describes, as a picture of Pillow's mode MODES[channels].

    >>> fitted(Image.new("L", (8, 4), 7), (2, 2), 3).mode
    'RGB'
    """
    height, width = size
    image = convert(image, channels, name, notes)
    if image.size != (width, height):
        if image.width < width or image.height < height:
            note(notes, f"smaller than {height}x{width}, enlarged", name)
        image = resized(image, (width, height), how, place=place)
    return image


def write_planes(image: Image.Image, out: Pixels) -> None:
    """Write the pixels of a picture of mode L, RGB or RGBA into `out`, uint8 [C, H, W].

    Shifting whole words costs numpy half of what gathering every third byte costs.

    >>> out = np.zeros((3, 1, 1), np.uint8)
    >>> write_planes(Image.new("RGB", (1, 1), (1, 2, 3)), out)
    >>> out.tolist()
    [[[1]], [[2]], [[3]]]
    """
    if image.mode == "L":
        out[0] = np.asarray(image)
        return
    words = np.frombuffer(image.tobytes("raw", "RGBX" if image.mode == "RGB" else "RGBA"), "<u4")
    words = words.reshape(image.height, image.width)
    for channel, plane in enumerate(out):
        np.right_shift(words, 8 * channel, out=plane, casting="unsafe")


def corner(have: tuple[int, int], size: tuple[int, int], place: Place | None = None) -> tuple[int, int]:
    """The top and the left side of a crop of `size` in an image of `have`, both (H, W). Every place is as likely.

    place  two numbers in 0 <= u < 1 for top and left; None: the centre

    >>> corner((100, 8), (10, 8)), corner((100, 8), (10, 8), (0.9999, 0.3))
    ((45, 0), (90, 0))
    """
    rooms = [outer - inner for outer, inner in zip(have, size, strict=True)]
    if place is None:
        return rooms[0] // 2, rooms[1] // 2
    top, left = (min(int(u * (room + 1)), room) for u, room in zip(place, rooms, strict=True))
    return top, left


def resized(
    image: Image.Image, size: tuple[int, int], how: Fit, fill: float = 0, place: Place | None = None
) -> Image.Image:
    """The image in `size` = (width, height), as `fit` describes; `fill` is around it for how "pad"."""
    if how == "random-crop":
        scale = max(1, size[0] / image.width, size[1] / image.height)
        if scale > 1:
            covering = max(size[0], round(image.width * scale)), max(size[1], round(image.height * scale))
            image = image.resize(covering, Image.Resampling.BICUBIC)
        top, left = corner((image.height, image.width), (size[1], size[0]), place)
        return image.crop((left, top, left + size[0], top + size[1]))
    if how == "crop":
        return ImageOps.fit(image, size, Image.Resampling.BICUBIC)
    if how == "stretch":
        return image.resize(size, Image.Resampling.BICUBIC)
    scale = min(size[0] / image.width, size[1] / image.height)
    inner = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    padded = Image.new(image.mode, size, (0,) * len(image.getbands()) if len(image.getbands()) > 1 else fill)
    place = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    padded.paste(image.resize(inner, Image.Resampling.BICUBIC), place)
    return padded


def note(notes: Notes | None, what: str, name: str, count: int = 1) -> None:
    """Count `what` in `notes`, with the first name that it was done to; without notes, warn."""
    if notes is None:
        warnings.warn(f"{name}: {what}", stacklevel=3)
    else:
        first, before = notes.get(what, (name, 0))
        notes[what] = (first, before + count)


def channels_last(samples: "Tensor") -> NDArray[Any]:
    """Samples [N, C, H, W], a tensor on the CPU, as the array [N, H, W, C] that this module writes.

    >>> import torch
    >>> channels_last(torch.zeros(2, 3, 8, 4, dtype=torch.uint8)).shape
    (2, 8, 4, 3)
    """
    return np.asarray(samples.permute(0, 2, 3, 1).contiguous().numpy())


def grid(pixels: Pixels, columns: int | None = None, padding: int = 2, minimum_tile: int = 32) -> Pixels:
    """A contact sheet of images uint8 [N, H, W, C], row by row: uint8 [H', W', C].

    columns       of the sheet; None: ceil(sqrt(N))
    padding       white pixels around each tile
    minimum_tile  tiles with a shorter side are enlarged by a whole factor, so that pixels stay squares

    Raises ValueError if N is 0.

    >>> import numpy as np
    >>> grid(np.zeros((5, 8, 8, 3), np.uint8)).shape
    (70, 104, 3)
    """
    if pixels.ndim != 4 or len(pixels) == 0:
        raise ValueError(f"want images [N, H, W, C] with N >= 1, got shape {pixels.shape}")
    factor = max(1, math.ceil(minimum_tile / min(pixels.shape[1:3])))
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    n, height, width, channels = pixels.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = math.ceil(n / columns)
    down, right = height + padding, width + padding
    sheet = np.full((rows * down + padding, columns * right + padding, channels), 255, np.uint8)
    for i, tile in enumerate(pixels):
        y, x = i // columns * down + padding, i % columns * right + padding
        sheet[y : y + height, x : x + width] = tile
    return sheet


def check_grid(n: int, height: int, width: int, channels: int, tiles: int = 1, minimum_tile: int = 32) -> None:
    """Raise InputError if a `grid` of n images, each of so many tiles, takes more than the MEMORY of a picture.

    >>> check_grid(10**6, 256, 256, 3)
    Traceback (most recent call last):
    ...
    ddpm.errors.InputError: n 1000000: a grid takes 199,692 MB, and may take 600 MB; want at most 3,004, or a folder
    """
    factor = max(1, math.ceil(minimum_tile / min(height, width)))
    tile = tiles * (factor * height + 2) * (factor * width + 2) * channels
    if n * tile > MEMORY:
        taken, most = f"{n * tile // 1_000_000:,} MB", f"{MEMORY // 1_000_000:,} MB"
        raise InputError(
            f"n {n}: a grid takes {taken}, and may take {most}; want at most {max(1, MEMORY // tile):,}, or a folder"
        )


def to_png(pixels: NDArray[Any]) -> bytes:
    """The bytes of a PNG file of one image, uint8 [H, W, C] or uint16 [H, W, 1].

    >>> import numpy as np
    >>> to_png(np.zeros((1, 1, 1), np.uint8))[1:4]
    b'PNG'
    """
    deep = pixels.dtype == np.uint16 and pixels.shape[2:] == (1,)
    if not deep and (pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in MODES):
        raise ValueError(f"want uint8 [H, W, 1, 3 or 4] or uint16 [H, W, 1], got {pixels.dtype} {list(pixels.shape)}")
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels if pixels.shape[2] > 1 else pixels[..., 0])).save(file, "PNG")
    return file.getvalue()


def save(path: str | Path, pixels: NDArray[Any]) -> None:
    """Write one image, uint8 [H, W, C] or uint16 [H, W, 1], as PNG, completely or not at all. Missing folders are made.

    >>> import numpy as np, tempfile
    >>> save(tempfile.mkdtemp() + "/black.png", np.zeros((4, 4, 3), np.uint8))
    """
    atomic.write(path, to_png(pixels))


KINDS = {".png": "png", ".npz": "npz", ".npy": "npy", ".tif": "tif", ".tiff": "tif"}
"""What `save_many` writes, by the ending of the name."""
ENDS = "a name that ends in .png, .npz, .npy or .tif"


def check_out(
    out: str | Path, record: str | None = None, kinds: Mapping[str, str] = KINDS, ends: str = ENDS
) -> str:  # fmt: skip
    """What `save_many` will write to `out`. Call this before the work, so that a mistake is found early.

    An existing folder, a name that ends in "/" and a name without a suffix stand for a folder, which must be new or
    empty, or hold a file named `record`, so that the work can resume. Raises InputError for another suffix, a folder
    that is not empty, and a place that cannot be written. `kinds` and `ends` are for a program that writes more kinds.

    >>> check_out("new/samples.png"), check_out("samples.npz"), check_out("samples")
    ('png', 'npz', 'folder')
    >>> check_out("samples.jpg")
    Traceback (most recent call last):
    ...
    ddpm.errors.InputError: samples.jpg: want a name that ends in .png, .npz, .npy or .tif, or a folder
    """
    if not str(out):
        raise InputError(f"out '': want {ends}, or a folder")
    path = Path(out)
    folder = path.is_dir() or not path.suffix or str(out).endswith(("/", os.sep))
    if not folder and path.suffix.lower() not in kinds:
        raise InputError(f"{out}: want {ends}, or a folder")
    if path.is_dir() and any(path.iterdir()) and not (record and (path / record).is_file()):
        raise InputError(f"{out}: the folder is not empty, want a new or an empty one")
    if folder and path.exists() and not path.is_dir():
        raise InputError(f"{out}: a file of that name exists, want a folder or {ends}")
    place = _first_existing(path if path.is_dir() else path.absolute().parent)
    if not _is_writable(place):
        raise InputError(f"{out}: cannot write in {place}")
    kind = "folder" if folder else kinds[path.suffix.lower()]
    if kind == "tif" and importlib.util.find_spec("tifffile") is None:
        raise InputError(f"{out}: tifffile is not installed; want {codecs.INSTALL}, or a .npy file")
    return kind


def check_folder(out: str | Path) -> Path:
    """The path of a folder for results, new or not. Call this before the work, so that a mistake is found early.

    Raises InputError if the folder, or for a new one the place where it would be made, is a file or cannot be written.

    >>> check_folder("new/results").name
    'results'
    """
    if not str(out):
        raise InputError("out '': want a folder")
    path = Path(out)
    place = _first_existing(path)
    if not _is_writable(place):
        raise InputError(f"{out}: cannot write in {place}; want a folder")
    return path


def _first_existing(path: Path) -> Path:
    """The path itself if it exists, or else the nearest parent that does."""
    return next(p for p in [path.absolute(), *path.absolute().parents] if p.exists())


def _is_writable(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def suffix(dtype: Any, channels: int) -> str:
    """The ending of the name of a file that holds an image exactly: .png, or .npy for what PNG cannot hold.

    >>> suffix("uint16", 1), suffix("uint16", 3), suffix("uint8", 13)
    ('.png', '.npy', '.npy')
    """
    dtype = np.dtype(dtype)
    has_png = (dtype == np.uint8 and channels in MODES) or (dtype == np.uint16 and channels == 1)
    return ".png" if has_png else ".npy"


def image_bytes(image: NDArray[Any]) -> bytes:
    """The bytes of the file that `save_image` writes.

    >>> import numpy as np
    >>> image_bytes(np.zeros((2, 2, 1), np.uint8))[1:4], image_bytes(np.zeros((2, 2, 7), np.uint8))[1:6]
    (b'PNG', b'NUMPY')
    """
    if suffix(image.dtype, image.shape[2]) == ".png":
        return to_png(image)
    file = io.BytesIO()
    np.save(file, image, allow_pickle=False)
    return file.getvalue()


def save_image(path: Path, image: NDArray[Any]) -> None:
    """Write one image [H, W, C] exactly, with the ending that `suffix` gives. Missing folders are made."""
    kind = suffix(image.dtype, image.shape[2])
    file = path.with_name(path.name + kind)
    if kind == ".png":
        save(file, image)
    else:
        _save_npy(file, image)


def _save_npy(path: Path, array: NDArray[Any]) -> None:
    with atomic.temporary(path) as part, part.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def _save_tiff(path: Path, images: NDArray[Any]) -> None:
    """Images [N, H, W, C] as pages; 3 and 4 channels are RGB and RGBA, and others are samples of a grey picture."""
    import tifffile

    channels = images.shape[3]
    options: dict[str, Any] = {"photometric": "rgb" if channels in (3, 4) else "minisblack"}
    if channels > 1:
        options["planarconfig"] = "contig"
    if channels not in (1, 3, 4):
        options["extrasamples"] = ["unspecified"] * (channels - 1)
    with atomic.temporary(path) as part, part.open("wb") as file:
        tifffile.imwrite(file, images[..., 0] if channels == 1 else images, **options)


def save_many(
    out: str | Path, pixels: NDArray[Any], names: Sequence[str] = (), columns: int | None = None,
    shown: Pixels | None = None,
) -> None:  # fmt: skip
    """Write images [N, H, W, C] to `out`. Each file is written completely or not at all.

    out      NAME.png for a contact sheet (for one image, the image itself), NAME.npz for the array `arr_0`, NAME.npy
             for the array itself, NAME.tif for pages, or a folder for one file per image, which `suffix` names
    names    names of the files in a folder, without the suffix
    columns  of the contact sheet
    shown    the same images as 8-bit pictures, for the contact sheet; None if they are such pictures themselves

    Raises what `check_out` raises.

    >>> import numpy as np, tempfile
    >>> out = tempfile.mkdtemp() + "/out.npz"
    >>> save_many(out, np.zeros((2, 8, 8, 1), np.uint8), ["a", "b"])
    >>> np.load(out)["arr_0"].shape
    (2, 8, 8, 1)
    """
    kind, path = check_out(out), Path(out)
    if kind == "png":
        sheet = pixels if shown is None else shown
        exact = len(pixels) == 1 and suffix(pixels.dtype, pixels.shape[3]) == ".png"
        save(path, pixels[0] if exact else sheet[0] if len(sheet) == 1 else grid(sheet, columns))
    elif kind == "npz":
        with atomic.temporary(path) as part, part.open("wb") as file:
            np.savez(file, pixels)
    elif kind == "npy":
        _save_npy(path, pixels)
    elif kind == "tif":
        _save_tiff(path, pixels)
    else:
        atomic.make_folder(path)
        for name, image in zip(names, pixels, strict=True):
            save_image(path / name, image)

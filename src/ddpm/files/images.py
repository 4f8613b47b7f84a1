"""Pictures in and out: files to 8-bit grey, RGB or RGBA of one size, and images to PNG, contact sheets and npz.

An image here is uint8 [H, W, C], C = 1 (grey), 3 (RGB) or 4 (RGBA, alpha not premultiplied).
"""

import io
import math
import os
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ddpm.errors import InputError
from ddpm.files import atomic

if TYPE_CHECKING:
    from torch import Tensor

Pixels: TypeAlias = NDArray[np.uint8]

Notes: TypeAlias = dict[str, tuple[str, int]]
"""What was done to images beyond decoding -> (the first file, the number of files)."""

SUFFIXES = frozenset(".png .jpg .jpeg .jpe .jfif .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm .jp2 .avif".split())
"""Endings, in lower case, of the names of image files."""

DEEP = "more than 8 bits a channel, rounded to 8"
"""The note of an image that was rounded to 8 bits. Bits per dimension are not measured for such an image."""

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Number of channels -> Pillow's mode."""

# Only formats with a signature: Pillow takes garbage for an image of other formats, and EPS starts a program.
Image.init()
_FORMATS = [f for f in "PNG JPEG WEBP BMP GIF TIFF PPM JPEG2000 AVIF".split() if f in Image.OPEN]
_FAULTS: tuple[type[Exception], ...] = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError)
_FAULTS += (OverflowError, struct.error, Image.DecompressionBombError)


def read(source: str | Path | bytes | BinaryIO, name: str | None = None) -> Image.Image:
    """Decode one image, or the first picture of an animation, and turn it as its EXIF orientation says.

    source  a path, the bytes of a file, or a binary file
    name    its name in errors; None: the path

    Raises InputError, one line with the name, if the file is missing, empty, cut short, too big or not an image.

    >>> import numpy as np
    >>> read(to_png(np.zeros((2, 3, 1), np.uint8))).size
    (3, 2)
    >>> read(b"", "a.png")
    Traceback (most recent call last):
    ...
    ddpm.errors.InputError: a.png: empty file, want an image
    """
    name = name or (str(source) if isinstance(source, str | Path) else "the image")
    try:
        data = Path(source).read_bytes() if isinstance(source, str | Path) else source
        data = data if isinstance(data, bytes) else data.read()
    except OSError as fault:
        raise InputError(f"{name}: {(fault.strerror or str(fault)).lower()}, want an image") from None
    if not data:
        raise InputError(f"{name}: empty file, want an image")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        # Pillow cuts 16-bit colour to 8 bits when it loads the image
        deep = any(";16" in str(tile[3]) for tile in getattr(image, "tile", []))
        image.load()
        image.info["deep"] = deep
        ImageOps.exif_transpose(image, in_place=True)
    except UnidentifiedImageError:
        raise InputError(f"{name}: not an image (PNG, JPEG, WebP, BMP, GIF, TIFF, PPM), or a damaged one") from None
    except _FAULTS as fault:
        raise InputError(f"{name}: damaged image ({one_line(fault)})") from None
    return image


def native(image: Image.Image) -> int:
    """The number of channels that an image has: 1 for grey (1, L, I;16), 3 for colour (RGB, P, CMYK), 4 with alpha.

    >>> native(Image.new("CMYK", (1, 1))), native(Image.new("LA", (1, 1))), native(Image.new("1", (1, 1)))
    (3, 4, 1)
    """
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        return 4
    if image.mode == "P":
        return 4 if "transparency" in image.info or (image.palette and image.palette.mode == "RGBA") else 3
    return 1 if image.mode in ("1", "L", "F") or image.mode.startswith("I") else 3


def convert(image: Image.Image, channels: int, name: str = "the image", notes: Notes | None = None) -> Image.Image:
    """The image in mode L (channels 1), RGB (3) or RGBA (4). An image that has this mode is returned itself.

    16-bit grey is scaled to 8 bits (65535 becomes 255), not clipped. A transparent image that loses its alpha channel
    is laid on white. A conversion is added to `notes`, or warned of without `notes`. Raises InputError for floating
    point and for integers of more than 16 bits.

    >>> convert(Image.new("RGBA", (1, 1), (0, 0, 0, 0)), 3, notes={}).getpixel((0, 0))
    (255, 255, 255)
    """
    target = MODES[channels]
    deep = image.info.get("deep") or image.mode.startswith("I")
    if deep:
        note(notes, DEEP, name)
    if image.mode == target:
        return image
    if not deep:
        note(notes, f"mode {image.mode} is converted to {target}", name)
    if image.mode == "F":
        raise InputError(f"{name}: mode F (floating point), want 8 bits per channel")
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise InputError(f"{name}: grey levels {levels.min()}..{levels.max()}, want 8 or 16 bits per channel")
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    elif image.mode not in MODES.values():
        mode = MODES[native(image)]
        # Pillow converts some modes only in two steps.
        via = {"La": "LA", "RGBa": "RGBA", "LAB": None, "HSV": "RGB"}.get(image.mode, mode)
        if via is None:
            raise InputError(f"{name}: mode {image.mode}, want grey, RGB or RGBA of 8 bits per channel")
        image = image.convert(via).convert(mode)
    if image.mode == "RGBA" and target != "RGBA" and image.getchannel("A").getextrema() != (255, 255):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == target else image.convert(target)


def fit(
    image: Image.Image, size: tuple[int, int], channels: int, name: str = "the image", notes: Notes | None = None
) -> Pixels:
    """Convert the image, scale it until it just covers size = (H, W), and crop it at the centre: uint8 [H, W, C].

    Scaling is Pillow's antialiased bicubic. An image of this size and mode keeps its pixels exactly. Enlarging and
    converting are added to `notes`, or warned of without `notes`. Raises what `convert` raises.

    >>> fit(Image.new("L", (8, 4), 7), (2, 2), 1)[..., 0]
    array([[7, 7],
           [7, 7]], dtype=uint8)
    """
    height, width = size
    image = convert(image, channels, name, notes)
    if image.size != (width, height):
        if image.width < width or image.height < height:
            note(notes, f"smaller than {height}x{width}, enlarged", name)
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.uint8).reshape(height, width, channels)


def note(notes: Notes | None, what: str, name: str, count: int = 1) -> None:
    """Count `what` in `notes`, with the first name that it was done to; without notes, warn."""
    if notes is None:
        warnings.warn(f"{name}: {what}", stacklevel=3)
    else:
        first, before = notes.get(what, (name, 0))
        notes[what] = (first, before + count)


def one_line(fault: BaseException) -> str:
    """The message of an exception in one line of at most 200 characters."""
    return " ".join(str(fault).split())[:200] or type(fault).__name__


def channels_last(samples: "Tensor") -> Pixels:
    """Samples uint8 [N, C, H, W], a tensor on the CPU, as the array [N, H, W, C] that this module writes.

    >>> import torch
    >>> channels_last(torch.zeros(2, 3, 8, 4, dtype=torch.uint8)).shape
    (2, 8, 4, 3)
    """
    pixels: Pixels = samples.permute(0, 2, 3, 1).contiguous().numpy()
    return pixels


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


def to_png(pixels: Pixels) -> bytes:
    """The bytes of a PNG file of one image uint8 [H, W, C].

    >>> import numpy as np
    >>> to_png(np.zeros((1, 1, 1), np.uint8))[1:4]
    b'PNG'
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in MODES:
        raise ValueError(f"want uint8 [H, W, 1, 3 or 4], got {pixels.dtype} {list(pixels.shape)}")
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels if pixels.shape[2] > 1 else pixels[..., 0])).save(file, "PNG")
    return file.getvalue()


def save(path: str | Path, pixels: Pixels) -> None:
    """Write one image uint8 [H, W, C] as PNG, completely or not at all. Missing folders are made.

    >>> import numpy as np, tempfile
    >>> save(tempfile.mkdtemp() + "/black.png", np.zeros((4, 4, 3), np.uint8))
    """
    atomic.write(path, to_png(pixels))


def check_out(out: str | Path, record: str | None = None) -> Literal["png", "npz", "folder"]:
    """What `save_many` will write to `out`. Call this before the work, so that a mistake is found early.

    An existing folder, a name that ends in "/" and a name without a suffix stand for a folder, which must be new or
    empty, or hold a file named `record`, so that the work can resume. Raises InputError for another suffix, a folder
    that is not empty, and a place that cannot be written.

    >>> check_out("new/samples.png"), check_out("samples.npz"), check_out("samples")
    ('png', 'npz', 'folder')
    >>> check_out("samples.jpg")
    Traceback (most recent call last):
    ...
    ddpm.errors.InputError: samples.jpg: want a name that ends in .png or .npz, or a folder
    """
    if not str(out):
        raise InputError("out '': want a name that ends in .png or .npz, or a folder")
    path = Path(out)
    folder = path.is_dir() or not path.suffix or str(out).endswith(("/", os.sep))
    if not folder and path.suffix.lower() not in (".png", ".npz"):
        raise InputError(f"{out}: want a name that ends in .png or .npz, or a folder")
    if path.is_dir() and any(path.iterdir()) and not (record and (path / record).is_file()):
        raise InputError(f"{out}: the folder is not empty, want a new or an empty one")
    if folder and path.exists() and not path.is_dir():
        raise InputError(f"{out}: a file of that name exists, want a folder or a name that ends in .png or .npz")
    place = _first_existing(path if path.is_dir() else path.absolute().parent)
    if not _is_writable(place):
        raise InputError(f"{out}: cannot write in {place}")
    return "folder" if folder else "npz" if path.suffix.lower() == ".npz" else "png"


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


def save_many(out: str | Path, pixels: Pixels, names: Sequence[str] = (), columns: int | None = None) -> None:
    """Write images uint8 [N, H, W, C] to `out`. Each file is written completely or not at all.

    out      NAME.png for a contact sheet (for one image, the image itself), NAME.npz for the array `arr_0`, or a folder
             for one PNG file per image
    names    names of the files in a folder, without the suffix
    columns  of the contact sheet

    Raises what `check_out` raises.

    >>> import numpy as np, tempfile
    >>> out = tempfile.mkdtemp() + "/out.npz"
    >>> save_many(out, np.zeros((2, 8, 8, 1), np.uint8), ["a", "b"])
    >>> np.load(out)["arr_0"].shape
    (2, 8, 8, 1)
    """
    kind, path = check_out(out), Path(out)
    if kind == "png":
        save(path, pixels[0] if len(pixels) == 1 else grid(pixels, columns))
    elif kind == "npz":
        with atomic.temporary(path) as part, part.open("wb") as file:
            np.savez(file, pixels)
    else:
        atomic.make_folder(path)
        for name, image in zip(names, pixels, strict=True):
            save(path / f"{name}.png", image)

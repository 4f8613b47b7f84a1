"""Images of any dtype and number of channels, from .npy files, TIFF, PNG of 16 bits, and memory.

`images` reads the pictures that most people have, 8-bit grey, RGB and RGBA. An image here is [H, W, C] of any dtype.
"""

import io
import logging
import re
import tokenize
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddpm.catalog import Fit
from ddpm.errors import InputError, brief
from ddpm.files import codecs
from ddpm.files import images as pictures

if TYPE_CHECKING:
    import tifffile
    from torch import Tensor

    from ddpm.pixels import Values
    from ddpm.presets import Preset

Array = NDArray[Any]
_NPY, TIFF, _PNG = b"\x93NUMPY", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), b"\x89PNG\r\n\x1a\n"
_FAULTS = (OSError, ValueError, SyntaxError, TypeError, EOFError, OverflowError, MemoryError, tokenize.TokenError)


def read(
    source: str | Path | bytes | Array | Image.Image, name: str, pages: str = "first",
    notes: pictures.Notes | None = None,
) -> Array:  # fmt: skip
    """Decode one image to its own numbers, [H, W, C] in its own dtype: nothing is scaled or rounded.

    source  a path, the bytes of a file, an array [H, W] or [H, W, C], or a picture
    name    its name in errors
    pages   of a TIFF file with several: first takes the first, and channels takes all of them as channels
    notes   gets what was done to the file, and what in it is not used

    Raises InputError, one line with the name, for a file that is no image or damaged, for an array of another shape,
    and if a package that reads this kind of file is not installed.

    >>> read(np.zeros((4, 5)), "a").shape
    (4, 5, 1)
    """
    notes = {} if notes is None else notes
    if isinstance(source, np.ndarray):
        return _checked(source, name)
    if isinstance(source, Image.Image):
        return _of_picture(source, name, notes)
    if isinstance(source, str | Path) and str(source).lower().endswith(".npy"):  # mapped, so only what is used is read
        return _checked(read_npy(source), name)
    data = pictures.file_bytes(source, name)
    if data.startswith(_NPY):
        return _checked(_npy(io.BytesIO(data), name), name)
    if data.startswith(TIFF):
        return _tiff(data, name, pages, notes)
    if codecs.is_jxl(data) or codecs.is_heic(data):
        found = pictures.unpack(data, name)
        pictures.note_file({**found._asdict(), "icc_profile": found.profile}, name, notes)
        return _checked(found.pixels, name)
    if data.startswith(_PNG) and len(data) > 25 and data[24] == 16 and data[25] != 0:  # Pillow drops the low bytes
        return _png_of_16_bits(data, name, notes)
    return _of_picture(pictures.read(data, name), name, notes)


def read_npy(path: str | Path) -> Array:
    """The array of an .npy file, mapped into memory. Raises InputError if it is damaged or holds objects."""
    with _whole_npy(str(path)):
        pictures.check_plain(path, str(path))
        return np.lib.format.open_memmap(path, mode="r")


def _npy(file: io.BytesIO, name: str) -> Array:
    with _whole_npy(name):
        return np.asarray(np.load(file, allow_pickle=False))


@contextmanager
def _whole_npy(name: str) -> Iterator[None]:
    """What NumPy raises for an .npy file becomes an InputError of one line."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{name}: no such file") from None
    except _FAULTS as fault:
        raise InputError(f"{name}: not a whole .npy file of numbers ({brief(fault)})") from None


def _checked(array: Array, name: str) -> Array:
    if array.dtype.kind not in "uif" or array.ndim not in (2, 3) or 0 in array.shape:
        raise InputError(f"{name}: {array.dtype} {list(array.shape)}; want an image, numbers [H, W] or [H, W, C]")
    pictures.check_memory(array.nbytes, f"{name}: {list(array.shape)}")
    return array[..., None] if array.ndim == 2 else array


@contextmanager
def _opened(source: str | Path | bytes, name: str) -> "Iterator[tifffile.TiffFile]":
    """A TIFF file. What tifffile raises becomes an InputError of one line."""
    module = codecs.package("tifffile", name, "TIFF")
    try:
        with (
            _damage_is_an_error(),
            module.TiffFile(io.BytesIO(source) if isinstance(source, bytes) else source) as file,
        ):
            yield file
    except InputError:
        raise
    except ImportError as fault:
        raise InputError(f"{name}: {brief(fault)}; want {codecs.INSTALL}") from None
    except Exception as fault:  # tifffile raises exceptions of many kinds
        raise InputError(f"{name}: damaged TIFF ({brief(fault)})") from None


_OF_PIXELS = frozenset(map(str, (256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 317, 322, 323, 324, 325, 338, 339)))
"""The tags of TIFF that pixels depend on."""


class _Damage(logging.Handler):
    """Raises what tifffile only logs, and then fills with zeros; but not for a tag that no pixel depends on."""

    def emit(self, record: logging.LogRecord) -> None:
        tag = re.search(r"TiffTag (\d+)", record.getMessage())
        if record.levelno >= logging.ERROR and (tag is None or tag[1] in _OF_PIXELS):
            raise ValueError(record.getMessage())


@contextmanager
def _damage_is_an_error() -> Iterator[None]:
    logger, handler = logging.getLogger("tifffile"), _Damage()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _tiff(data: bytes, name: str, pages: str, notes: pictures.Notes) -> Array:
    """The first series of a TIFF file; planes and samples are channels."""
    with _opened(data, name) as file:
        series = file.series[0]
        pictures.check_memory(series.nbytes, f"{name}: unpacked")
        array, axes, rest = np.asarray(series.asarray()), str(series.axes), len(file.series) > 1
        if not {"Y", "X"} <= set(axes) or len(axes) != array.ndim or 0 in array.shape:
            raise InputError(f"{name}: a TIFF with axes {axes} {list(array.shape)}; want an image")
        order = [axes.index("Y"), axes.index("X")]
        others = [k for k in range(array.ndim) if k not in order]
        array = array.transpose(*order, *others)
        several = any(axes[k] not in "SC" and series.shape[k] > 1 for k in others)
        if several and pages != "channels":
            index = tuple(slice(None) if k in order or axes[k] in "SC" else 0 for k in (*order, *others))
            array = array[index]
        return _of_page(array, file.pages[0], name, notes, rest or (several and pages != "channels"))


def find_pages(source: Path | bytes, name: str) -> list[int]:
    """The numbers, from 0, of the pages of a TIFF file that are images, and no thumbnails or smaller copies.

    Raises InputError if it is damaged, or stores pages that it does not list.
    """
    with _opened(source, name) as file:
        if len(file.pages) == 1 and file.series[0].is_truncated:
            raise InputError(
                f"{name}: lists one page, and stores {list(file.series[0].shape)}; want pages that are listed"
            )
        return [0, *(k for k in range(1, len(file.pages)) if not file.pages[k].aspage().is_reduced)]


def read_page(source: Path | bytes, page: int, name: str) -> Array:
    """One of the pages that `find_pages` finds, as `read` gives an image: [H, W, C].

    Raises what `read` raises.
    """
    with _opened(source, name) as file:
        found = file.pages[page].aspage()
        pictures.check_memory(found.nbytes, f"{name}: unpacked")
        axes = str(found.axes)
        array = np.asarray(found.asarray())
        if not {"Y", "X"} <= set(axes) <= set("YXS") or len(axes) != array.ndim or 0 in array.shape:
            raise InputError(f"{name}: a page with axes {axes} {list(array.shape)}; want an image")
        array = np.moveaxis(array, [axes.index("Y"), axes.index("X")], [0, 1])
        return _of_page(array, found, name, {}, False)


def _of_page(array: Array, page: Any, name: str, notes: pictures.Notes, several: bool) -> Array:
    """The numbers of a page [H, W, ..] as [H, W, C]: white is high, palettes are colours, and the image is upright."""
    page = page.aspage()
    kind, array = int(page.photometric), array.reshape(*array.shape[:2], -1)
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
        array = 255 - array if kind == 0 else array
    elif kind == 0 and array.dtype.kind == "u":
        array = 2 ** min(int(np.max(page.bitspersample)), 8 * array.itemsize) - 1 - array
    elif kind == 3 and array.shape[2] == 1:
        array = (page.colormap.T[array[..., 0]] >> 8).astype(np.uint8)
    elif kind == 5:
        raise InputError(f"{name}: CMYK, of which only pictures of 8 bits are read; want RGB or grey")
    orientation = page.tags.valueof(274, default=1)
    info = {"several": several, "turned": orientation in range(2, 9), "icc_profile": page.iccprofile}
    pictures.note_file(info, name, notes)
    return _checked(upright(np.asarray(array), orientation), name)


def upright(array: Array, orientation: int) -> Array:
    """An image [H, W, C] turned and mirrored as the EXIF orientation 1..8 says; another number is no orientation.

    >>> upright(np.array([[[1], [2]]]), 6).tolist()
    [[[1]], [[2]]]
    """
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return array[::-1] if orientation in (3, 4, 7, 8) else array


def _png_of_16_bits(data: bytes, name: str, notes: pictures.Notes) -> Array:
    imagecodecs = codecs.package("imagecodecs", name, "16 bits a channel")
    height, width = (int.from_bytes(data[at : at + 4], "big") for at in (20, 16))
    pictures.check_memory(8 * width * height, f"{name}: {width}x{height} pixels")
    try:
        array: Array = imagecodecs.png_decode(data)
    except Exception as fault:  # imagecodecs raises exceptions of many kinds
        raise InputError(f"{name}: damaged image ({brief(fault)})") from None
    array, orientation, profile = array.reshape(*array.shape[:2], -1), 1, None
    if b"eXIf" in data or b"iCCP" in data:
        try:
            with Image.open(io.BytesIO(data)) as picture:
                orientation, profile = picture.getexif().get(274, 1), picture.info.get("icc_profile")
        except (OSError, SyntaxError, ValueError, TypeError, LookupError) as fault:
            raise InputError(f"{name}: damaged image ({brief(fault)})") from None
    info = {"turned": orientation in range(2, 9), "icc_profile": profile}
    pictures.note_file(info, name, notes)
    return upright(array, orientation)


def _of_picture(picture: Image.Image, name: str, notes: pictures.Notes) -> Array:
    """The numbers of a picture that Pillow opened; palettes become colours."""
    pictures.note_file(picture.info, name, notes)
    if picture.mode not in ("1", "L", "LA", "RGB", "RGBA", "F") and not picture.mode.startswith("I"):
        picture = pictures.convert(picture, pictures.native(picture), name, {})
    array = np.asarray(picture)
    if picture.mode.startswith("I") and picture.info.get("top", 65535) <= 65535 and array.min() >= 0:
        array = array.astype(np.uint16)
    return _checked(array.astype(np.uint8) * 255 if picture.mode == "1" else array, name)


# -- to pixels of one size ---------------------------------------------------------------------------------------------


def to_values(array: Array, values: "Values", name: str, clip: bool, notes: pictures.Notes) -> Array:
    """The numbers of an image as pixels of these values; none changes, but floats are rounded to float32.

    clip  clips numbers outside the range, which is added to `notes`; otherwise they are an error

    Raises InputError for fractions where integers are wanted, for NaN and infinity, and for numbers out of range.

    >>> from ddpm.pixels import Values
    >>> to_values(np.array([[7]]), Values("uint16", 0, 65535), "a", False, {})
    array([[7]], dtype=uint16)
    """
    if array.dtype.kind == "f":
        if values.bins is not None:
            raise InputError(f"{name}: {array.dtype} numbers; want pixel_type float32, or integers for {values.dtype}")
        if not np.isfinite(array).all():
            what = "NaN" if np.isnan(array).any() else "infinity"
            raise InputError(f"{name}: holds {what}; want finite numbers")
    low, high = array.min(), array.max()
    if low < values.low or high > values.high:
        if not clip:
            raise InputError(
                f"{name}: numbers {low:.6g}..{high:.6g}, outside the range {values.low:.6g}..{values.high:.6g}; "
                "want another value_range, or clip_values"
            )
        pictures.note(notes, f"numbers outside {values.low:.6g}..{values.high:.6g} are clipped", name)
        array = array.clip(values.low, values.high)
    if array.dtype == np.float64:
        pictures.note(notes, "float64 is rounded to float32", name)
    return array.astype(values.dtype, copy=False)


def cropped(array: Array, size: tuple[int, int], place: pictures.Place | None = None) -> Array:
    """The part of an image [H, W, C] of `size` = (H', W') at a place, or at the centre. It is a view, not a copy.

    An image that does not cover the size is returned itself.

    >>> cropped(np.arange(5).reshape(5, 1, 1), (1, 1)).item()
    2
    """
    if array.shape[0] < size[0] or array.shape[1] < size[1]:
        return array
    top, left = pictures.corner((array.shape[0], array.shape[1]), size, place)
    return array[top : top + size[0], left : left + size[1]]


def fit(
    array: Array, size: tuple[int, int], channels: int, how: Fit, name: str, notes: pictures.Notes,
    place: pictures.Place | None = None, fill: float = 0,
) -> Array:  # fmt: skip
    """An image [H, W, C] in another size = (H', W'), scaled and cropped as `images.fit` does: [H', W', C].

    fill  is around it for how "pad"

    Numbers stay in the range of the image, and integers are rounded. Raises InputError unless C is `channels`.

    >>> fit(np.array([[[3], [3]]], np.uint16), (1, 1), 1, "crop", "a", {}).item()
    3
    """
    if array.shape[2] != channels:
        stack = "; a file of several images is a SOURCE by itself" if array.shape[0] > 4 * array.shape[1] else ""
        raise InputError(
            f"{name}: [H, W, C] is {list(array.shape)}; want channels {array.shape[2]}, or C = {channels}{stack}"
        )
    if array.shape[:2] == size:
        return array
    if how == "random-crop" and array.shape[0] >= size[0] and array.shape[1] >= size[1]:
        return cropped(array, size, place)
    if array.shape[0] < size[0] or array.shape[1] < size[1]:
        pictures.note(notes, f"smaller than {size[0]}x{size[1]}, enlarged", name)
    planes = [Image.fromarray(np.ascontiguousarray(array[..., c], np.float32)) for c in range(channels)]
    scaled = [np.asarray(pictures.resized(plane, (size[1], size[0]), how, np.nan, place)) for plane in planes]
    numbers = np.stack(scaled, axis=-1).clip(array.min(), array.max())
    numbers[np.isnan(numbers)] = fill  # no number of the image is NaN, and clip leaves NaN as it is
    return (numbers if array.dtype.kind == "f" else np.rint(numbers)).astype(array.dtype)


# -- to look at --------------------------------------------------------------------------------------------------------


class View(NamedTuple):
    """How pixels of any kind become a picture to look at.

    values      what the numbers are
    channels    the channels to show, one or three, counted from 1; empty for all of 1, 3 or 4 channels, the first of 2,
                and the first three of more
    show_range  the numbers that are black and white in the picture; empty for the range of `values`
    """

    values: "Values"
    channels: Sequence[int] = ()
    show_range: Sequence[float] = ()


def view_of(preset: "Preset", values: "Values") -> View:
    """How the pictures of a run look."""
    return View(values, preset.show, preset.show_range)


def shown(pixels: Array, view: View) -> pictures.Pixels:
    """Pixels [..., C] as 8-bit grey, RGB or RGBA, for a picture to look at.

    >>> from ddpm.pixels import Values
    >>> shown(np.array([[[0, 9, 65535]]], np.uint16), View(Values("uint16", 0, 65535), (3,))).item()
    255
    """
    channels, show = pixels.shape[-1], view.channels
    if not show and channels not in pictures.MODES:
        show = (1,) if channels == 2 else (1, 2, 3)
    if show:
        pixels = pixels[..., [c - 1 for c in show]]
    low, high = view.show_range or (view.values.low, view.values.high)
    if view.values.dtype == "uint8" and (low, high) == (0, 255):
        return np.asarray(pixels, np.uint8)
    scaled = (pixels.astype(np.float64) - low) * (255 / (high - low))
    return np.asarray(np.rint(scaled.clip(0, 255)), np.uint8)


def sheet(samples: "Tensor", view: View) -> pictures.Pixels:
    """Samples [N, C, H, W], a tensor on the CPU, as 8-bit pictures [N, H, W, 1, 3 or 4] (`shown`).

    >>> import torch
    >>> from ddpm.pixels import Values
    >>> sheet(torch.zeros(2, 13, 8, 4), View(Values("float32", 0, 1))).shape
    (2, 8, 4, 3)
    """
    return shown(pictures.channels_last(samples), view)

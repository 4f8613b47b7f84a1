"""From encoded images to pixels of one size and one number of channels."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddpm.catalog import Fit
from ddpm.errors import InputError
from ddpm.files import arrays
from ddpm.files import images as pictures
from ddpm.files.data.listing import SKIP_HINT, Encoded, EncodedImages
from ddpm.pixels import EIGHT_BIT, Values


@dataclass(frozen=True)
class Form:
    """What images become.

    size      (H, W)
    channels  of an image
    values    what its numbers are
    fit       how it gets its size: crop, pad, stretch or random-crop, as `images.fit` describes
    clip      whether numbers outside the range are clipped; otherwise they are errors
    pages     what is taken of a TIFF file with several pages, as `arrays.read` describes
    """

    size: tuple[int, int]
    channels: int
    values: Values = EIGHT_BIT
    fit: Fit = "crop"
    clip: bool = False
    pages: str = "first"

    @property
    def is_picture(self) -> bool:
        """Whether images are 8-bit grey, RGB or RGBA. Then colour is converted; otherwise numbers stay as they are."""
        return self.values == EIGHT_BIT and self.channels in pictures.MODES and self.pages != "channels"

    def is_as_it_is(self, encoded: Encoded | InputError) -> TypeGuard[NDArray[np.uint8]]:
        """Whether this is an array with the pixels of a picture of this form, so that nothing is left to do.

        >>> form = Form((2, 2), 1)
        >>> form.is_as_it_is(np.zeros((2, 2), np.uint8)), form.is_as_it_is(np.zeros((2, 2), np.float32))
        (True, False)
        """
        shapes = [(*self.size, self.channels), *([self.size] if self.channels == 1 else [])]
        is_pixels = isinstance(encoded, np.ndarray) and encoded.dtype == np.uint8 and encoded.shape in shapes
        return self.is_picture and is_pixels

    def zeros(self, count: int) -> NDArray[Any]:
        """`count` images of pixels 0, [count, C, H, W]."""
        return np.zeros((count, self.channels, *self.size), self.values.dtype)

    def read(self, encoded: Encoded | InputError, name: str, notes: pictures.Notes) -> NDArray[Any]:
        """The numbers of an image [H, W, C] that is no picture, as they are. Raises what `array` raises."""
        if isinstance(encoded, InputError):
            raise encoded
        array = arrays.read(encoded, name, self.pages, notes)
        if array.dtype == np.uint8 and self.values.dtype == "uint16" and not isinstance(encoded, np.ndarray):
            raise InputError(f"{name}: 8 bits a channel; want 16, as pixel_type uint16 says")
        return array

    def array(
        self, encoded: Encoded | InputError, name: str, notes: pictures.Notes, place: pictures.Place | None = None
    ) -> NDArray[Any]:
        """One image [H, W, C] that is no picture. Raises InputError if it cannot be used; `name` is for errors."""
        array = self.read(encoded, name, notes)
        if self.fit == "random-crop":  # first, so that only this part of an array on the disk is read
            array = arrays.cropped(array, self.size, place)
        array = arrays.to_values(array, self.values, name, self.clip, notes)
        return arrays.fit(array, self.size, self.channels, self.fit, name, notes, place, self.values.low)


@dataclass(frozen=True)
class Decoder:
    """Decodes images to one `form`.

    usual  native channels of most pictures. If that is 1, a picture that would lose its colours is bad
    """

    encoded: EncodedImages
    form: Form
    usual: int = 0

    def decode(
        self, indices: Sequence[int], places: Sequence[pictures.Place] | None = None, out: NDArray[Any] | None = None
    ) -> tuple[NDArray[Any], dict[int, str], pictures.Notes]:
        """Images [B, C, H, W]; position -> error, for bad images, which are 0; and notes of conversions.

        places  of random crops, one for each image; None: the centre
        out     where the images are written
        """
        form, pixels = self.form, self.form.zeros(len(indices)) if out is None else out
        faults, notes = dict[int, str](), pictures.Notes()
        for k, (i, encoded) in enumerate(zip(indices, self.encoded.fetch(indices), strict=True)):
            name, place = self.encoded.name(i), places[k] if places else None
            try:
                if form.is_as_it_is(encoded):
                    pixels[k] = encoded.reshape(*form.size, form.channels).transpose(2, 0, 1)
                    continue
                if not form.is_picture:
                    pixels[k] = form.array(encoded, name, notes, place).transpose(2, 0, 1)
                    continue
                image = decoded(encoded, name)
                if self.usual == 1 and not pictures.keeps_colour(image, form.channels):
                    raise InputError(
                        f"{name}: {pictures.MODES[pictures.native(image)]}, but most images are grey, and as grey "
                        "it would lose its colours; want it converted beforehand, or skip_bad, which leaves such "
                        "images out"
                    )
                image = pictures.fitted(image, form.size, form.channels, name, notes, form.fit, place)
                pictures.write_planes(image, pixels[k])
            except InputError as fault:
                pixels[k], faults[k] = 0, str(fault)
        return pixels, faults, notes


def decoded(encoded: Encoded | InputError, name: str) -> Image.Image:
    """The decoded image. Raises InputError if it cannot be read; `name` is for errors."""
    if isinstance(encoded, InputError):
        raise encoded
    if isinstance(encoded, Path) and encoded.suffix.lower() == ".npy":
        encoded = arrays.read(encoded, name)
    if isinstance(encoded, np.ndarray):
        return _picture(encoded, name)
    return encoded if isinstance(encoded, Image.Image) else pictures.read(encoded, name)


def _picture(array: NDArray[Any], name: str) -> Image.Image:
    """An array [H, W] or [H, W, C] as a picture."""
    array = arrays.read(array, name)
    if array.dtype != np.uint8:
        wanted = "float32" if array.dtype.kind == "f" else "uint16"
        wanted += "" if array.shape[2] in pictures.MODES else f" and channels {array.shape[2]}"
        raise InputError(f"{name}: {array.dtype} numbers; want pixel_type {wanted}, or uint8 numbers")
    if array.shape[2] not in pictures.MODES:
        raise InputError(f"{name}: [H, W, C] is {list(array.shape)}; want channels {array.shape[2]}, or C of 1, 3 or 4")
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array))


def merge_notes(notes: pictures.Notes, more: pictures.Notes) -> None:
    """Add the notes `more` to `notes`."""
    for what, (first, count) in more.items():
        pictures.note(notes, what, first, count)


def decode_all(
    decoder: Decoder, pixels: NDArray[Any], threads: int, skip_bad: bool, progress: bool
) -> tuple[dict[int, str], pictures.Notes]:
    """Write images 0..n-1 into `pixels` [n, C, H, W] by several threads.

    Returns index -> error, for bad images, and notes of conversions. Raises InputError for the first bad image, unless
    `skip_bad`.
    """
    from tqdm import tqdm

    n = len(pixels)
    faults, notes = dict[int, str](), pictures.Notes()
    bar = tqdm(total=n, desc="decoding", unit="image", disable=None if progress else True)
    chunks = [range(start, min(start + 256, n)) for start in range(0, n, 256)]

    def work(chunk: range) -> tuple[dict[int, str], pictures.Notes]:
        _, faults_in_chunk, notes_of_chunk = decoder.decode(chunk, out=pixels[chunk.start : chunk.stop])
        return {chunk[k]: fault for k, fault in faults_in_chunk.items()}, notes_of_chunk

    pool = ThreadPoolExecutor(threads)
    try:
        # map keeps the order of the chunks, so the first bad image is always the same one
        for chunk, (more_faults, more_notes) in zip(chunks, pool.map(work, chunks), strict=True):
            if more_faults and not skip_bad:
                raise InputError(f"{next(iter(more_faults.values()))}; {SKIP_HINT}")
            faults.update(more_faults)
            merge_notes(notes, more_notes)
            bar.update(len(chunk))
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
    return faults, notes

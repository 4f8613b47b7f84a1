"""From encoded images to pixels of one size and one number of channels."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ddpm.errors import InputError
from ddpm.files import images as pictures
from ddpm.files.data.listing import SKIP_HINT, Encoded, EncodedImages


@dataclass(frozen=True)
class Decoder:
    """Decodes images to `size` = (H, W) and `channels`.

    usual  native channels of most images. An image of another kind is bad if converting it loses something
    """

    encoded: EncodedImages
    size: tuple[int, int]
    channels: int
    usual: int

    def decode(self, indices: Sequence[int]) -> tuple[NDArray[np.uint8], dict[int, str], pictures.Notes]:
        """Images uint8 [B, C, H, W]; position -> error, for bad images, which are 0; and notes of conversions."""
        pixels = np.zeros((len(indices), self.channels, *self.size), np.uint8)
        faults, notes = dict[int, str](), pictures.Notes()
        for k, (i, encoded) in enumerate(zip(indices, self.encoded.fetch(indices), strict=True)):
            name = self.encoded.name(i)
            try:
                image = decoded(encoded, name)
                if (have := pictures.native(image)) != self.usual and not pictures.keeps(image, self.channels):
                    raise InputError(
                        f"{name}: {_kind(have)}, but most images are {_kind(self.usual)}, and as "
                        f"{_kind(self.channels)} it would lose something; want it converted beforehand, or skip_bad, "
                        "which leaves such images out"
                    )
                pixels[k] = pictures.fit(image, self.size, self.channels, name, notes).transpose(2, 0, 1)
            except InputError as fault:
                faults[k] = str(fault)
        return pixels, faults, notes


def decoded(encoded: Encoded | InputError, name: str) -> Image.Image:
    """The decoded image. Raises InputError if it cannot be read; `name` is for errors."""
    if isinstance(encoded, InputError):
        raise encoded
    return encoded if isinstance(encoded, Image.Image) else pictures.read(encoded, name)


def _kind(channels: int) -> str:
    return f"{pictures.MODES[channels]} ({channels} channel{'s' * (channels > 1)})".replace("L (", "grey (")


def merge_notes(notes: pictures.Notes, more: pictures.Notes) -> None:
    """Add the notes `more` to `notes`."""
    for what, (first, count) in more.items():
        pictures.note(notes, what, first, count)


def decode_all(
    decoder: Decoder, n: int, threads: int, skip_bad: bool, progress: bool
) -> tuple[Tensor, dict[int, str], pictures.Notes]:
    """Images 0..n-1 by several threads: uint8 [n, C, H, W]; index -> error, for bad images; notes of conversions.

    Raises InputError for the first bad image, unless `skip_bad`.
    """
    from tqdm import tqdm

    pixels = np.empty((n, decoder.channels, *decoder.size), np.uint8)
    faults, notes = dict[int, str](), pictures.Notes()
    bar = tqdm(total=n, desc="decoding", unit="image", disable=None if progress else True)
    chunks = [range(start, min(start + 256, n)) for start in range(0, n, 256)]

    def work(chunk: range) -> tuple[dict[int, str], pictures.Notes]:
        pixels[chunk.start : chunk.stop], faults_in_chunk, notes_of_chunk = decoder.decode(chunk)
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
    return torch.from_numpy(pixels), faults, notes

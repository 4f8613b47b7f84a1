"""From encoded images to pixels of one size and kind."""

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
    encoded: EncodedImages
    size: tuple[int, int]
    channels: int
    first: tuple[str, int]  # the first image's name and native channels, which all must share

    def decode(self, indices: Sequence[int]) -> tuple[NDArray[np.uint8], dict[int, str], pictures.Notes]:
        """Images uint8 [B, C, H, W]; position -> fault of those that are not to be had; what was converted."""
        pixels = np.zeros((len(indices), self.channels, *self.size), np.uint8)
        faults, notes = dict[int, str](), pictures.Notes()
        for k, (i, encoded) in enumerate(zip(indices, self.encoded.fetch(indices), strict=True)):
            name = self.encoded.name(i)
            try:
                image = decoded(encoded, name)
                if (found := pictures.native(image)) != self.first[1]:
                    raise InputError(
                        f"{name}: {_kind(found)}, but {self.first[0]} is {_kind(self.first[1])}, want one kind"
                    )
                pixels[k] = pictures.fit(image, self.size, self.channels, name, notes).transpose(2, 0, 1)
            except InputError as fault:
                faults[k] = str(fault)
        return pixels, faults, notes


def decoded(encoded: Encoded | InputError, name: str) -> Image.Image:
    if isinstance(encoded, InputError):
        raise encoded
    return encoded if isinstance(encoded, Image.Image) else pictures.read(encoded, name)


def _kind(channels: int) -> str:
    return f"{pictures.MODES[channels]} ({channels} channel{'s' * (channels > 1)})".replace("L (", "grey (")


def merge_notes(notes: pictures.Notes, more: pictures.Notes) -> None:
    for what, (first, count) in more.items():
        pictures.note(notes, what, first, count)


def decode_all(
    decoder: Decoder, n: int, threads: int, skip_bad: bool, progress: bool
) -> tuple[Tensor, dict[int, str], pictures.Notes]:
    from tqdm import tqdm

    pixels = np.empty((n, decoder.channels, *decoder.size), np.uint8)
    faults, notes = dict[int, str](), pictures.Notes()
    bar = tqdm(total=n, desc="decoding", unit="image", disable=None if progress else True)
    chunks = [range(start, min(start + 256, n)) for start in range(0, n, 256)]

    def work(chunk: range) -> tuple[dict[int, str], pictures.Notes]:
        pixels[chunk.start : chunk.stop], bad, noted = decoder.decode(chunk)
        return {chunk[k]: fault for k, fault in bad.items()}, noted

    pool = ThreadPoolExecutor(threads)
    try:
        for chunk, (bad, noted) in zip(chunks, pool.map(work, chunks), strict=True):  # in order, as are the errors
            if bad and not skip_bad:
                raise InputError(f"{next(iter(bad.values()))}; {SKIP_HINT}")
            faults.update(bad)
            merge_notes(notes, noted)
            bar.update(len(chunk))
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
    return torch.from_numpy(pixels), faults, notes

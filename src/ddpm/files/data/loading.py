"""From a SOURCE to images by index. They are decoded once into memory if they fit, or else on demand."""

import functools
import hashlib
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm.errors import InputError
from ddpm.files import images as pictures
from ddpm.files.data.decoding import Decoder, decode_all, decoded, merge_notes
from ddpm.files.data.listing import SKIP_HINT, SPLIT_NAMES, Listing, Splits
from ddpm.files.data.sources import open_source
from ddpm.noise import generator

_HOLDOUT = 0x401D
"""Key of the permutation that chooses the held-out images."""


@dataclass(eq=False)
class Images:
    """Images of one size by index, 0..N-1. `load` and `load_pair` make them.

    name         the SOURCE
    split        the name of the split in the source
    size         (H, W)
    channels     1 grey, 3 RGB, 4 RGBA
    labels       int64 [N] in 0..K-1, or None
    class_names  K names, or None
    rows         int64 [N], the place of each image in `pixels`, or in the source if `pixels` is None
    pixels       all images in memory, uint8 [>= N, C, H, W], or None
    origin       int64, the place in the source of each image of `pixels`, or None if that is its own place
    faults       the bad images so far: index in the source -> error
    notes        the conversions so far
    """

    name: str
    split: str
    size: tuple[int, int]
    channels: int
    labels: Tensor | None
    class_names: tuple[str, ...] | None
    decoder: Decoder = field(repr=False)
    rows: Tensor = field(repr=False)
    pixels: Tensor | None = field(repr=False)
    skip_bad: bool = False
    origin: Tensor | None = field(default=None, repr=False)
    faults: dict[int, str] = field(default_factory=dict, repr=False)
    notes: pictures.Notes = field(default_factory=pictures.Notes, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        height, width = self.size
        return f"{self.name} ({self.split}): {len(self):,} images {height}x{width}x{self.channels}"

    @property
    def decoded(self) -> bool:
        """Whether all images are in memory."""
        return self.pixels is not None

    @property
    def skipped(self) -> int:
        """The number of bad images so far."""
        return len(self.faults)

    def names(self) -> list[str]:
        """The images' names in the source: paths of files, or numbers of rows.

        >>> load("digits", (8, 8), 1, split="test").names()[:2]
        ['image 0 of ...', 'image 1 of ...']
        """
        rows = self.rows if self.origin is None else self.origin[self.rows]
        return [self.decoder.encoded.name(row) for row in rows.tolist()]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Which images these are, 64 hex digits: a hash of the pixels in memory, or else of file names and sizes."""
        height, width = self.size
        digest = hashlib.sha256(f"{len(self)} {height} {width} {self.channels}\n".encode())
        if self.pixels is not None:
            for start in range(0, len(self), 4096):
                digest.update(self.pixels[self.rows[start : start + 4096]].numpy().data)
        else:
            for part in self.decoder.encoded.identity():
                digest.update(part)
            digest.update(self.rows.numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def batch(self, indices: Sequence[int] | Tensor) -> Tensor:
        """The images at these indices, uint8 [B, C, H, W].

        With skip_bad, the next good image, of the same label if there are labels, takes the place of a bad one.
        Otherwise a bad image raises an InputError that names the file.

        >>> load("digits", (8, 8), 1).batch([0, 7]).shape
        torch.Size([2, 1, 8, 8])
        """
        indices = torch.as_tensor(indices, dtype=torch.int64)
        if self.pixels is not None:
            return self.pixels[self.rows[indices]]
        pixels, faults, notes = self.decode(indices)
        self.report(faults, notes)
        return pixels

    def decode(self, indices: Tensor) -> tuple[Tensor, dict[int, str], pictures.Notes]:
        """`batch` for worker processes: the images and the arguments of `report`, without warnings."""
        rows: list[int] = self.rows[indices].tolist()
        pixels, bad, notes = self.decoder.decode(rows)
        if bad and not self.skip_bad:
            raise InputError(f"{next(iter(bad.values()))}; {SKIP_HINT}")
        faults = {rows[k]: fault for k, fault in bad.items()}
        for k in bad:
            pixels[k] = self._next_good(int(indices[k]) % len(self), faults, notes)
        return torch.from_numpy(pixels), faults, notes

    def _next_good(self, index: int, faults: dict[int, str], notes: pictures.Notes) -> NDArray[np.uint8]:
        """The image uint8 [C, H, W] that takes the place of a bad one. Faults and notes are added to the arguments."""
        for step in range(1, len(self)):
            other = (index + step) % len(self)
            if self.labels is not None and self.labels[other] != self.labels[index]:
                continue
            row = int(self.rows[other])
            pixels, bad, more_notes = self.decoder.decode([row])
            if not bad:
                merge_notes(notes, more_notes)
                return np.asarray(pixels[0])
            faults[row] = bad[0]
        raise InputError(
            f"{self.name}: no good image is left to take the place of a bad one; {faults[int(self.rows[index])]}"
        )

    def report(self, faults: dict[int, str], notes: pictures.Notes) -> None:
        """Count bad and converted images, and warn once of bad ones and once of each kind of conversion."""
        if faults and not self.faults:
            warnings.warn(
                f"{self.name}: bad images are skipped, the first: {next(iter(faults.values()))}", stacklevel=3
            )
        self.faults.update(faults)
        for what, (first, count) in notes.items():
            if what not in self.notes:
                number = f"{count:,} image{'s' * (count != 1)}" if self.decoded else "images"
                warnings.warn(f"{self.name}: {number}: {what}; the first: {first}", stacklevel=3)
        merge_notes(self.notes, notes)


def _build(
    source: str,
    split: str,
    listing: Listing,
    size: tuple[int, int],
    channels: int,
    skip_bad: bool,
    cache_bytes: int,
    progress: bool,
) -> Images:
    """The images of one split, decoded into memory if they take at most `cache_bytes`."""
    n = len(listing.encoded)
    if n == 0:
        raise InputError(f"{source} ({split}): no images")
    start, fault, image = 0, "", None
    while image is None and start < n:  # all images must have as many channels as the first good one
        name = listing.encoded.name(start)
        try:
            image = decoded(listing.encoded.fetch([start])[0], name)
            pictures.fit(image, size, channels, name, {})
        except InputError as error:
            if not skip_bad:
                raise InputError(f"{error}; {SKIP_HINT}") from error
            image, start, fault = None, start + 1, fault or str(error)
    if image is None:
        raise InputError(f"{source} ({split}): none of {n:,} images can be used, the first: {fault}")
    decoder = Decoder(listing.encoded, size, channels, (listing.encoded.name(start), pictures.native(image)))

    labels = None if listing.labels is None else torch.from_numpy(listing.labels)
    rows, names = torch.arange(n), listing.class_names
    images = Images(source, split, size, channels, labels, names, decoder, rows, None, skip_bad)
    if n * size[0] * size[1] * channels > cache_bytes:
        images.batch([0])  # warns of conversions before the work starts
        return images
    small = image.width * image.height < 128 * 128  # for small images, threads would only wait for the interpreter
    pixels, faults, notes = decode_all(decoder, n, 1 if small else min(8, os.cpu_count() or 1), skip_bad, progress)
    good = torch.tensor([i for i in range(n) if i not in faults])
    if faults:
        pixels, images.origin = pixels[good], good
        images.labels = None if labels is None else labels[good]
        warnings.warn(
            f"{source}: {len(faults):,} of {n:,} images skipped, the first: {min(faults.items())[1]}", stacklevel=3
        )
    images.pixels, images.rows, images.faults = pixels, torch.arange(len(good)), faults
    images.report({}, notes)
    return images


def _match(split: str, available: Iterable[str]) -> str | None:
    """The name in `available` that the split has there, or None."""
    names = {name.lower(): name for name in available}
    return next((names[alias] for alias in SPLIT_NAMES.get(split.lower(), (split.lower(),)) if alias in names), None)


def _pick(source: str, split: str, splits: Splits) -> str:
    """The name of the split in the source. Raises InputError if the source does not have it."""
    name = _match(split, splits)
    if name is None:
        raise InputError(f"{source}: no split {split}, it has {', '.join(splits)}")
    return name


def load(
    source: str,
    size: tuple[int, int],
    channels: int,
    *,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    skip_bad: bool = False,
    cache_bytes: int = 4 * 2**30,
    progress: bool = False,
    as_trained: bool = False,
) -> Images:
    """The images of one split of `source`, scaled and cropped at the centre to `size` = (H, W).

    channels      1 grey, 3 RGB, 4 RGBA; other images are converted, with a warning
    split         "test" also finds a split called validation, valid or val; a source without splits is all "train".
                  `digits` has 1,500 images for training and 297 for testing
    image_column  the column that holds the images in Hugging Face layout; None: the only one
    label_column  the column that holds the labels there; None: label, labels, class or fine_label, or else the only
                  column of class labels. In folders and zip files, the labels are the names of the folders within a
                  split, if all images lie in such folders
    skip_bad      skip and count images that cannot be used
    cache_bytes   images that take at most this much memory are decoded at once
    progress      show a bar
    as_trained    "train" and "test" are the two sets of `load_pair`, so if the source has one split they are the two
                  sets of `split_holdout`

    Raises InputError, one line that names the file, for a damaged or empty file, no images, images with other channels
    than the first, a missing split or column, and a missing source.

    >>> digits = load("digits", (8, 8), 1, split="test")
    >>> len(digits), digits.labels[:3].tolist(), str(digits)
    (297, [5, 7, 4], 'digits (test): 297 images 8x8x1')
    """
    splits = open_source(source, image_column, label_column, progress)
    held_out = as_trained and split == "test" and _match("test", splits) is None
    name = _pick(source, "train" if held_out else split, splits)
    images = _build(source, name, splits[name](), size, channels, skip_bad, cache_bytes, progress)
    is_alone = _match("test", (each for each in splits if each != name)) is None
    if held_out or (as_trained and split == "train" and is_alone):
        return split_holdout(images)[held_out]
    return images


def load_pair(
    source: str,
    size: tuple[int, int],
    channels: int,
    *,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    skip_bad: bool = False,
    cache_bytes: int = 4 * 2**30,
    progress: bool = False,
) -> tuple[Images, Images]:
    """The images to train on, and held-out images.

    The held-out images are the source's test split or else its validation split. If it has neither, `split_holdout`
    sets some apart. Arguments and errors are those of `load`; fewer than 2 images also raise InputError.

    >>> train, held_out = load_pair("digits", (8, 8), 1)
    >>> len(train), len(held_out)
    (1500, 297)
    """
    splits = open_source(source, image_column, label_column, progress)
    name = _pick(source, split, splits)
    train = _build(source, name, splits[name](), size, channels, skip_bad, cache_bytes, progress)
    other = _match("test", (each for each in splits if each != name))
    if other is None:
        return split_holdout(train)
    return train, _build(source, other, splits[other](), size, channels, skip_bad, cache_bytes, progress)


def split_holdout(images: Images) -> tuple[Images, Images]:
    """Set min(max(1, N // 20), 1000) random images apart, and return (the rest, these images).

    The choice depends on N only. The pixels are shared, not copied. Raises InputError if N < 2.

    >>> rest, held_out = split_holdout(load("digits", (8, 8), 1))
    >>> len(rest), len(held_out), held_out.split
    (1425, 75, 'held out of train')
    """
    n = len(images)
    if n < 2:
        raise InputError(f"{images.name} ({images.split}): {n} image, want at least 2, because one is held out")
    shuffled = torch.randperm(n, generator=generator(_HOLDOUT))
    k = min(max(1, n // 20), 1000)

    def view(indices: Tensor, split: str, faults: dict[int, str]) -> Images:
        labels = None if images.labels is None else images.labels[indices]
        rows, notes = images.rows[indices], dict(images.notes)
        return replace(images, split=split, labels=labels, rows=rows, faults=faults, notes=notes)

    rest = view(shuffled[k:].sort().values, images.split, dict(images.faults))
    return rest, view(shuffled[:k].sort().values, f"held out of {images.split}", {})

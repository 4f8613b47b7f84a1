"""From a SOURCE to images by index: decoded once into memory where they fit, else when they are asked for."""

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


@dataclass(eq=False)
class Images:
    """Images of one size by index, 0..len - 1; made by `load` and `load_pair`.

    name: the source; split: the split's name in it; decoded: whether all sit in memory; labels: int64 [N] in 0..K-1
    or None; class_names: K names or None; skipped: bad images met so far; fingerprint: 64 hex digits that say which
    images these are, a hash of the pixels if decoded, else of names and sizes of the files.
    """

    name: str
    split: str
    size: tuple[int, int]
    channels: int
    labels: Tensor | None
    class_names: tuple[str, ...] | None
    decoder: Decoder = field(repr=False)
    rows: Tensor = field(repr=False)  # int64 [N], into pixels, or into the source
    pixels: Tensor | None = field(repr=False)  # uint8 [>= N, C, H, W]
    skip_bad: bool = False
    faults: dict[int, str] = field(default_factory=dict, repr=False)  # index in the source -> what is wrong
    notes: pictures.Notes = field(default_factory=pictures.Notes, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        height, width = self.size
        return f"{self.name} ({self.split}): {len(self):,} images {height}x{width}x{self.channels}"

    @property
    def decoded(self) -> bool:
        return self.pixels is not None

    @property
    def skipped(self) -> int:
        return len(self.faults)

    @functools.cached_property
    def fingerprint(self) -> str:
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
        """The images uint8 [B, C, H, W] at these indices.

        With skip_bad the place of a bad image is taken by the next good one, of the same label if there are labels.
        Raises InputError naming the file for a bad one otherwise.

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
        """`batch` for worker processes: beside the images what `report` wants to be told; nothing is warned of."""
        rows: list[int] = self.rows[indices].tolist()
        pixels, bad, notes = self.decoder.decode(rows)
        if bad and not self.skip_bad:
            raise InputError(f"{next(iter(bad.values()))}; {SKIP_HINT}")
        faults = {rows[k]: fault for k, fault in bad.items()}
        for k in bad:
            pixels[k] = self._next_good(int(indices[k]) % len(self), faults, notes)
        return torch.from_numpy(pixels), faults, notes

    def _next_good(self, index: int, faults: dict[int, str], notes: pictures.Notes) -> NDArray[np.uint8]:
        for step in range(1, len(self)):
            other = (index + step) % len(self)
            if self.labels is not None and self.labels[other] != self.labels[index]:
                continue
            row = int(self.rows[other])
            pixels, bad, noted = self.decoder.decode([row])
            if not bad:
                merge_notes(notes, noted)
                return np.asarray(pixels[0])
            faults[row] = bad[0]
        raise InputError(
            f"{self.name}: no image left that could take a bad one's place; {faults[int(self.rows[index])]}"
        )

    def report(self, faults: dict[int, str], notes: pictures.Notes) -> None:
        """Count what was met while decoding, and warn of each kind once."""
        if faults and not self.faults:
            warnings.warn(
                f"{self.name}: bad images are skipped, the first: {next(iter(faults.values()))}", stacklevel=3
            )
        self.faults.update(faults)
        for what, (first, count) in notes.items():
            if what not in self.notes:
                many = f"{count:,} image{'s' * (count != 1)}" if self.decoded else "images"
                warnings.warn(f"{self.name}: {many}: {what}; the first: {first}", stacklevel=3)
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
    n = len(listing.encoded)
    if n == 0:
        raise InputError(f"{source} ({split}): no images")
    start, fault, image = 0, "", None
    while image is None and start < n:  # the first image says how many channels all have
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
    found = Images(source, split, size, channels, labels, listing.class_names, decoder, torch.arange(n), None, skip_bad)
    if n * size[0] * size[1] * channels > cache_bytes:
        found.batch([0])  # warns early of conversions
        return found
    small = image.width * image.height < 128 * 128  # threads would only wait for the interpreter
    pixels, faults, notes = decode_all(decoder, n, 1 if small else min(8, os.cpu_count() or 1), skip_bad, progress)
    good = torch.tensor([i for i in range(n) if i not in faults])
    if faults:
        pixels = pixels[good]
        found.labels = None if labels is None else labels[good]
        warnings.warn(
            f"{source}: {len(faults):,} of {n:,} images skipped, the first: {min(faults.items())[1]}", stacklevel=3
        )
    found.pixels, found.rows, found.faults = pixels, torch.arange(len(good)), faults
    found.report({}, notes)
    return found


def _match(split: str, available: Iterable[str]) -> str | None:
    names = {name.lower(): name for name in available}
    return next((names[alias] for alias in SPLIT_NAMES.get(split.lower(), (split.lower(),)) if alias in names), None)


def _pick(source: str, split: str, splits: Splits) -> str:
    found = _match(split, splits)
    if found is None:
        raise InputError(f"{source}: no split {split}, it has {', '.join(splits)}")
    return found


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
    """The images of one split of SOURCE (above), scaled and cropped at the centre to `size` = (H, W), as uint8.

    channels: 1 grey, 3 RGB, 4 RGBA; images of another kind are converted, with a warning.
    split: `test` also finds one called validation, valid or val; a source without splits is all `train`. `digits` has
    1,500 images for training and 297 for testing.
    image_column, label_column: in Hugging Face layout; found if there is but one of a kind. In folders and zip files
    the labels are the folders under the split's, if all images lie in such.
    skip_bad: count images that cannot be used and go on. cache_bytes: sets that fit are decoded now, in memory.
    as_trained: `train` and `test` are the two sets that `load_pair` makes: where the source has no second split, what
    `split_holdout` leaves and what it sets apart.
    Raises InputError, one line naming the file, for: a damaged or empty file, no images, images of mixed channels
    (all must have the first one's), a missing split or column, and a source that is not there.

    >>> digits = load("digits", (8, 8), 1, split="test")
    >>> len(digits), digits.labels[:3].tolist(), str(digits)
    (297, [5, 7, 4], 'digits (test): 297 images 8x8x1')
    """
    splits = open_source(source, image_column, label_column, progress)
    held_out = as_trained and split == "test" and _match("test", splits) is None
    found = _pick(source, "train" if held_out else split, splits)
    images = _build(source, found, splits[found](), size, channels, skip_bad, cache_bytes, progress)
    alone = _match("test", (name for name in splits if name != found)) is None
    if held_out or (as_trained and split == "train" and alone):
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
    """Images to train on and images held out: the source's test or else validation split, or else `split_holdout`.

    Arguments and errors are those of `load`; fewer than 2 images are an InputError too.

    >>> train, held_out = load_pair("digits", (8, 8), 1)
    >>> len(train), len(held_out)
    (1500, 297)
    """
    splits = open_source(source, image_column, label_column, progress)
    found = _pick(source, split, splits)
    train = _build(source, found, splits[found](), size, channels, skip_bad, cache_bytes, progress)
    other = _match("test", (name for name in splits if name != found))
    if other is None:
        return split_holdout(train)
    return train, _build(source, other, splits[other](), size, channels, skip_bad, cache_bytes, progress)


def split_holdout(images: Images) -> tuple[Images, Images]:
    """Set apart min(max(1, N // 20), 1000) images, ever the same for one N: (the rest, those). Pixels are shared.

    Raises InputError if there are fewer than 2.

    >>> rest, held_out = split_holdout(load("digits", (8, 8), 1))
    >>> len(rest), len(held_out), held_out.split
    (1425, 75, 'held out of train')
    """
    n = len(images)
    if n < 2:
        raise InputError(f"{images.name} ({images.split}): {n} image, want at least 2, one of them to be held out")
    shuffled = torch.randperm(n, generator=generator(_HOLDOUT))
    k = min(max(1, n // 20), 1000)

    def view(indices: Tensor, split: str, faults: dict[int, str]) -> Images:
        labels = None if images.labels is None else images.labels[indices]
        rows, notes = images.rows[indices], dict(images.notes)
        return replace(images, split=split, labels=labels, rows=rows, faults=faults, notes=notes)

    rest = view(shuffled[k:].sort().values, images.split, dict(images.faults))
    return rest, view(shuffled[:k].sort().values, f"held out of {images.split}", {})

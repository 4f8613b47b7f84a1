"""From a SOURCE to images by index. They are decoded once into memory if they fit, or else on demand."""

import functools
import hashlib
import itertools
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm.catalog import Fit
from ddpm.errors import InputError
from ddpm.files import arrays, codecs
from ddpm.files import images as pictures
from ddpm.files.data.decoding import Decoder, Form, decode_all, decoded, merge_notes
from ddpm.files.data.index import key_of
from ddpm.files.data.layout import find_split
from ddpm.files.data.listing import SKIP_HINT, Contents, Encoded, EncodedImages, Options, counted, unexpected
from ddpm.files.data.objects import Given, Items
from ddpm.files.data.ordering import Shards, order
from ddpm.files.data.pages import Pages
from ddpm.files.data.shared import PLAIN, decoded_once
from ddpm.files.data.sources import Folder, Lmdb, Zip, open_source
from ddpm.files.data.tars import Tar
from ddpm.noise import generator
from ddpm.pixels import EIGHT_BIT, Values
from ddpm.pixels import values as values_of
from ddpm.presets import Preset

_HOLDOUT = 0x401D
"""Key of the permutation that chooses the held-out images."""


@dataclass(eq=False)
class Images:
    """Images of one size by index, 0..N-1. `load` and `load_pair` make them.

    name         the SOURCE
    split        the name of the split in the source
    labels       int64 [N] in 0..K-1, or None
    class_names  K names, or None
    rows         int64 [N], the place of each image in the source, and in `pixels`
    pixels       all images in memory, [>= N, C, H, W], or None
    faults       the bad images so far: index in the source -> error
    notes        the conversions so far
    bounds       int64 [S], where the shards end in the source if they must be read in order, or None
    window       images of such shards that are shuffled together
    splits       the names of all splits of the source
    left_out     kind of file that the source holds and that is not read -> number of files
    highest      the largest number of the images that were looked at, which are all if they are in memory
    looks_grey   whether some images were looked at to choose the decoding, and all are grey without transparency
    pair         the other images of the condition `pairs`, in the same order, or None
    """

    name: str
    split: str
    labels: Tensor | None
    class_names: tuple[str, ...] | None
    decoder: Decoder = field(repr=False)
    rows: Tensor = field(repr=False)
    pixels: Tensor | None = field(repr=False)
    skip_bad: bool = False
    faults: dict[int, str] = field(default_factory=dict, repr=False)
    notes: pictures.Notes = field(default_factory=pictures.Notes, repr=False)
    bounds: Tensor | None = field(default=None, repr=False)
    window: int = 1
    splits: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict, repr=False)
    highest: float = field(default=math.inf, repr=False)
    looks_grey: bool = field(default=False, repr=False)
    pair: "Images | None" = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        height, width = self.size
        kind = "" if self.values == EIGHT_BIT else f" of {self.values}"
        return f"{self.name} ({self.split}): {len(self):,} images {height}x{width}x{self.channels}{kind}"

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.decoder.form.size

    @property
    def channels(self) -> int:
        """1 for grey, 3 for RGB, 4 for RGBA, or another number."""
        return self.decoder.form.channels

    @property
    def values(self) -> Values:
        """What the numbers of the images are."""
        return self.decoder.form.values

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
        return [self.decoder.encoded.name(row) for row in self.rows.tolist()]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Which images these are, 64 hex digits: a hash of their names, sizes and labels, and of the size asked for.

        Arrays in memory are hashed themselves. It is the same whether the images are decoded or not, unless bad ones
        are left out, since then the order is another one.
        """
        height, width = self.size
        kind = "" if self.values == EIGHT_BIT else f" {self.values}"
        kind += "" if self.decoder.form.fit == "crop" else f" {self.decoder.form.fit}"
        digest = hashlib.sha256(f"{len(self)} {height} {width} {self.channels}{kind}\n".encode())
        for part in self.decoder.encoded.identity():
            digest.update(part)
        digest.update(self.rows.numpy().astype("<i8").tobytes())
        if self.shards is not None:
            digest.update(f"in order {self.window}\n".encode() + self.shards.ends.astype("<i8").tobytes())
        if self.labels is not None:
            digest.update("\n".join(("", *(self.class_names or ()), "")).encode(errors="surrogateescape"))
            digest.update(self.labels.numpy().astype("<i8").tobytes())
        if self.pair is not None:
            digest.update(f"\npairs {self.pair.fingerprint}".encode())
        return digest.hexdigest()

    @functools.cached_property
    def state(self) -> str:
        """The fingerprint with the places and times of the files: another one whenever a file may have changed.

        Measurements are stored by it.
        """
        return key_of(self.fingerprint, self.decoder.encoded.stamp(), self.pair and self.pair.state)

    @functools.cached_property
    def contents(self) -> str:
        """A hash of the encoded images and their order, 64 hex digits: every file is read."""
        digest, rows = hashlib.sha256(), self.rows.tolist()
        for start in range(0, len(rows), 64):
            group = rows[start : start + 64]
            for row, data in zip(group, self.decoder.encoded.fetch(group), strict=True):
                content = _content(data, self.decoder.encoded.name(row))
                digest.update(f"{len(content)}\n".encode() + content)
        if self.pair is not None:
            digest.update(self.pair.contents.encode())
        return digest.hexdigest()

    @functools.cached_property
    def shards(self) -> Shards | None:
        """The shards of these images, if they must be read in order."""
        if self.bounds is None:
            return None
        ends = torch.searchsorted(self.rows, self.bounds)
        return Shards(ends.diff(prepend=torch.zeros(1, dtype=torch.int64)).tolist(), self.window)

    def order(self, seed: int, step: int, batch_size: int) -> Tensor:
        """The indices of the images of a step, int64 [batch_size], as the function `order` says.

        >>> digits = load("digits", (8, 8), 1)
        >>> torch.equal(digits.order(0, 7, 64), order(len(digits), 0, 7, 64))
        True
        """
        return order(len(self), seed, step, batch_size, self.shards)

    def batch(self, indices: Sequence[int] | Tensor, places: Tensor | None = None) -> Tensor:
        """The images at these indices, [B, C, H, W] of the dtype of `values`.

        places  of random crops, [B, 2] (`batches.crop_places`); None: the centre of each image

        With skip_bad, the next good image takes the place of a bad one: one of the same label, if there is one.
        Otherwise a bad image raises an InputError that names the file.

        >>> load("digits", (8, 8), 1).batch([0, 7]).shape
        torch.Size([2, 1, 8, 8])
        """
        indices = torch.as_tensor(indices, dtype=torch.int64)
        if self.pixels is not None:
            return take(self.pixels, self.rows[indices])
        pixels, faults, notes = self.decode(indices, places)
        self.report(faults, notes)
        return pixels

    def decode(
        self, indices: Tensor, places: Tensor | None = None, out: NDArray[Any] | None = None
    ) -> tuple[Tensor, dict[int, str], pictures.Notes]:
        """`batch` for worker processes: the images and the arguments of `report`, without warnings.

        out  where the images are written, [B, C, H, W]
        """
        rows: list[int] = self.rows[indices].tolist()
        crops = None if places is None else [(top, left) for top, left in places.tolist()]
        pixels, bad, notes = self.decoder.decode(rows, crops, out)
        if bad and not self.skip_bad:
            raise InputError(f"{next(iter(bad.values()))}; {SKIP_HINT}")
        faults = {rows[k]: fault for k, fault in bad.items()}
        for k in bad:
            pixels[k] = self._next_good(int(indices[k]) % len(self), faults, notes, crops and crops[k : k + 1])
        return torch.from_numpy(pixels), faults, notes

    def _next_good(
        self, index: int, faults: dict[int, str], notes: pictures.Notes, place: list[pictures.Place] | None
    ) -> NDArray[Any]:
        """The image [C, H, W] that takes the place of a bad one. Faults and notes are added to the arguments."""
        steps = range(1, len(self))
        for same, other in ((same, (index + step) % len(self)) for same in (True, False) for step in steps):
            if same != (self.labels is None or bool(self.labels[other] == self.labels[index])):
                continue
            row = int(self.rows[other])
            pixels, bad, more_notes = self.decoder.decode([row], place)
            if not bad:
                merge_notes(notes, more_notes)
                if not same:
                    name = self.decoder.encoded.name(int(self.rows[index]))
                    pictures.note(notes, "bad like all of the class, so one of another class takes its place", name)
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


def take(pixels: Tensor, rows: Tensor) -> Tensor:
    """The images at these rows. torch has no indexing for uint16 on every device, so their bits are taken as int16.

    >>> take(torch.zeros(3, 1, dtype=torch.uint16), torch.tensor([2, 0])).dtype
    torch.uint16
    """
    if pixels.dtype != torch.uint16:
        return pixels[rows]
    return pixels.view(torch.int16)[rows].view(torch.uint16)


def describe(train: Images, held_out: Images) -> str:
    """One line about the two sets of `load_pair`: their splits, classes, and what is left out.

    >>> describe(*load_pair("digits", (8, 8), 1))
    'digits: train 1,500 images, held out 297 of test; classes 0, 1, 2, 3, 4, 5, ..'
    """
    others = [name for name in train.splits if name not in (train.split, held_out.split)]
    from_split = held_out.split.removeprefix("held out of ")
    parts = [f"{train.split} {len(train):,} images, held out {len(held_out):,} of {from_split}"]
    parts += [f"not used: {', '.join(others)}"] if others else []
    if isinstance(encoded := train.decoder.encoded, Pages):
        parts += [f"each page of {encoded.described()} is an image"]
    if not train.decoder.form.is_picture:
        channels = f"{train.channels} channel{'s' * (train.channels != 1)}"
        parts += [f"{'x'.join(map(str, train.size))}, {channels} of {train.values}"]
    names = [" ".join(name.split())[:40] for name in train.class_names or ()]
    parts += [f"classes {', '.join([*names[:6], '..'] if len(names) > 6 else names)}"] if names else ["no classes"]
    if train.left_out:
        parts += [f"{'warning: ' * bool(unexpected(train.left_out))}left out {counted(train.left_out)}"]
    if train.looks_grey and train.channels > 1:
        parts += ["all images that were looked at are grey; --channels 1 would train a smaller model of grey images"]
    if hint := _range_hint(train.values, max(train.highest, held_out.highest)):
        parts += [hint]
    return f"{train.name}: {'; '.join(parts)}"


def _range_hint(values: Values, highest: float) -> str:
    """What to say if integers use less than an eighth of their range, as 12 bits in 16 do."""
    if values.bins is None or not values.low < highest < values.low + (values.high - values.low) / 8:
        return ""
    if values == EIGHT_BIT:
        return (
            f"all numbers are at most {highest:.0f}, and white is 255, so all pictures are nearly black; --value-range "
            "says what is white; the preset grey16 and --pixel-type uint16 keep more than 8 bits"
        )
    top = max(2 ** int(highest).bit_length() - 1, int(values.low) + 1)
    return (
        f"all numbers are at most {highest:,.0f}, and white is {values.high:,.0f}; "
        f"--value-range {values.low:.0f},{top} would use the whole range, and show brighter pictures"
    )


def _values_of(source: str, contents: Contents, pages: str, skip_bad: bool) -> Values:
    """float32 with the range of the numbers of all splits.

    Raises InputError if they are all equal, and for the first image that is bad, or with `skip_bad` if all are.
    """
    low, high, first = math.inf, -math.inf, ""
    for split in contents.splits.values():
        encoded = split().encoded
        for i in range(len(encoded)):
            [found] = encoded.fetch([i])
            try:
                if isinstance(found, InputError):
                    raise found
                array = arrays.read(found, encoded.name(i), pages)
                least, most = float(array.min()), float(array.max())
                if not math.isfinite(least + most):
                    raise InputError(f"{encoded.name(i)}: holds NaN or infinity; want finite numbers")
            except InputError as fault:
                if not skip_bad:
                    raise InputError(f"{fault}; {SKIP_HINT}") from None
                first = first or str(fault)
            else:
                low, high = min(low, least), max(high, most)
    if low > high:
        raise InputError(f"{source}: no image can be used, the first: {first}")
    if low == high:
        raise InputError(f"{source}: all numbers are {low:.6g}; want images, or a value_range")
    return Values("float32", low, high)


_PROBES = 32
"""How many images, spread over the split, tell what most images are."""


def _build(
    source: str, split: str, contents: Contents, form: Form, options: Options, skip_bad: bool, window: int,
    on_demand: bool = False,
) -> Images:  # fmt: skip
    """The images of one split, decoded into memory if they take at most `cache_bytes`, and not `on_demand`."""
    listing = contents.splits[split]()
    n = len(listing.encoded)
    if n == 0:
        raise InputError(f"{source} ({split}): no images")
    usual, largest, grey, highest = _probe(source, split, listing.encoded, form, skip_bad)
    decoder = Decoder(listing.encoded, form, usual)
    labels = None if listing.labels is None else torch.from_numpy(listing.labels)
    rows, names = torch.arange(n), listing.class_names
    images = Images(source, split, labels, names, decoder, rows, None, skip_bad)
    images.splits, images.left_out, images.looks_grey = tuple(contents.splits), contents.left_out, grey
    images.highest = highest
    images.bounds, images.window = None if listing.shards is None else torch.from_numpy(listing.shards), window
    if on_demand or form.fit == "random-crop" or n * form.zeros(1).nbytes > options.cache_bytes:
        images.batch([0])  # warns of conversions before the work starts
        return images
    # for small images, threads would only wait for the interpreter; large ones must not fill the memory together; and a
    # user's Dataset may seek and read in one open file
    one = largest < 128 * 128 or isinstance(listing.encoded, Items)
    most = 1 if one else max(1, pictures.MEMORY // (4 * largest))
    threads = min(most, 8, os.cpu_count() or 1)
    shape, dtype = form.zeros(n).shape, form.zeros(0).dtype

    def decode(pixels: NDArray[Any]) -> tuple[dict[int, str], pictures.Notes]:
        return decode_all(decoder, pixels, threads, skip_bad, options.progress)

    stamp = listing.encoded.stamp()
    if options.fresh:  # a copy of the same files may be older than their contents
        stamp = [stamp, images.contents]
    if stamp is None or (math.prod(shape) * dtype.itemsize < PLAIN and os.environ.get("WORLD_SIZE", "1") == "1"):
        pixels = form.zeros(n)
        faults, notes = decode(pixels)
    else:
        identity = _hash(listing.encoded.identity())
        key = key_of("decoded", stamp, identity, repr(form), usual, skip_bad, pictures.MEMORY, n, codecs.versions())
        pixels, (faults, notes) = decoded_once(key, shape, dtype, decode)
    good = torch.tensor([i for i in range(n) if i not in faults], dtype=torch.int64)
    if not len(good):
        raise InputError(f"{source} ({split}): none of {n:,} images can be used, the first: {faults[0]}")
    if faults:
        images.labels = None if labels is None else labels[good]
        warnings.warn(
            f"{source}: {len(faults):,} of {n:,} images skipped, the first: {min(faults.items())[1]}", stacklevel=3
        )
    if form.values.dtype == "uint16":
        images.highest = float(pixels.max())
    images.pixels, images.rows, images.faults = torch.from_numpy(pixels), good, faults
    images.report({}, notes)
    return images


def _content(data: Encoded | InputError, name: str) -> bytes:
    """The bytes of an encoded image; none of one that cannot be read."""
    try:
        if isinstance(data, bytes | Path):
            return pictures.file_bytes(data, name)
    except InputError:
        return b""
    return b"" if isinstance(data, InputError) else np.ascontiguousarray(data).tobytes()


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _probe(source: str, split: str, encoded: EncodedImages, form: Form, skip_bad: bool) -> tuple[int, int, bool, float]:
    """What a few images tell: the usual native channels, the pixels of the largest picture or the numbers of the
    largest array, whether all are grey, and the largest number.

    Raises InputError if the first image is bad, but with `skip_bad` only if there is no good one.
    """
    n = len(encoded)
    spread = sorted({k * n // _PROBES for k in range(_PROBES)})
    kinds, largest, grey, fault, highest, tried = Counter[int](), 0, form.is_picture, "", -math.inf, 0
    for i, data in _fetched(encoded, [spread[k : k + 8] for k in range(0, len(spread), 8)]):
        if kinds and tried >= len(spread):
            break
        tried += 1
        name = encoded.name(i)
        try:
            if not form.is_picture:
                array = form.read(data, name, {})
                highest = max(highest, float(form.array(array, name, {}).max()))
                kinds[form.channels] += 1
                largest = max(largest, array.size)
                continue
            image = decoded(data, name)
            fitted = pictures.fit(image, form.size, form.channels, name, {}, form.fit)
            highest = max(highest, float(fitted.max()))
            kinds[pictures.native(image)] += 1
            largest = max(largest, image.width * image.height)
            grey = grey and pictures.keeps(image, 1)
        except InputError as error:
            if not skip_bad and i == 0:
                raise InputError(f"{error}; {SKIP_HINT}") from error
            fault = fault or str(error)
    if not kinds:
        raise InputError(f"{source} ({split}): none of {n:,} images can be used, the first: {fault}")
    return kinds.most_common(1)[0][0], largest, grey, highest


def _fetched(encoded: EncodedImages, groups: list[list[int]]) -> Iterator[tuple[int, Encoded | InputError]]:
    """Places of images and what `fetch` gives of them: groups that are fetched at once, and then all one by one."""
    for group in itertools.chain(groups, ([i] for i in range(len(encoded)))):
        yield from zip(group, encoded.fetch(group), strict=True)


def _pick(source: str, split: str, splits: Iterable[str]) -> str:
    """The name of the split in the source. Raises InputError if the source does not have it."""
    name = find_split(split, splits)
    if name is None:
        hint = "; want its folder or file itself as the SOURCE" if split == "train" else ""
        raise InputError(f"{source}: no split {split}, it has {', '.join(splits)}{hint}")
    return name


def load(
    source: str | Path,
    size: tuple[int, int],
    channels: int,
    *,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    skip_bad: bool = False,
    allow_paths: bool = False,
    cache_bytes: int = 4 * 2**30,
    shuffle_window: int = 10_000,
    verify: bool = False,
    progress: bool = False,
    values: Values | None = EIGHT_BIT,
    fit: Fit = "crop",
    clip_values: bool = False,
    pages: str = "first",
    as_trained: bool = False,
) -> Images:
    """The images of one split of `source`, scaled and cropped at the centre to `size` = (H, W).

    channels      1 grey, 3 RGB, 4 RGBA; other pictures are converted, with a warning. Images of another number must
                  have it
    split         a name in the source, or train, validation or test, which other names may stand for: train2017,
                  training_set, val, dev. Where there is no test split, validation images serve. A source without
                  splits is all "train". `digits` has 1,500 images for training and 297 for testing
    image_column  the column that holds the images in Hugging Face layout; None: the only one. In tar files, the
                  extension of one of several images of a sample; in an .npz, the name of the array
    label_column  the column that holds the labels there; None: label, labels, class, fine_label or cls, or else the
                  only column of class labels. Files of images have their labels in metadata.csv or .jsonl, in NAME.cls
                  or NAME.json beside NAME.png, or else by the names of the folders within a split, if all images lie
                  in such folders
    skip_bad      skip and count images that cannot be used
    allow_paths   let a row of a dataset name an image file outside the source's folder
    cache_bytes   images that take at most this much memory are decoded at once
    shuffle_window  images that are shuffled together where shards must be read in order, at least 1
    verify        look at the files themselves, and not at what is kept of earlier runs
    progress      show a bar
    values        what the numbers of the images are. Numbers of other than 8 bits are never converted. None: float32,
                  with the least and the largest number of all splits as its range
    fit           how images get their size: crop, pad, stretch or random-crop (`images.fit`). Random crops are for
                  training (`batches`); otherwise they are at the centre. Such images are always decoded on demand
    clip_values   clip numbers outside the range of `values`; otherwise they are errors
    pages         what is taken of a TIFF file of several pages: first; channels, for all of them as channels; or
                  images, for each as an image with the labels of its file. A .tif file as the source is such a stack
    as_trained    "train" and "test" are the two sets of `load_pair`, so if the source has one split they are the two
                  sets of `split_holdout`

    Raises InputError, one line that names the file, for a damaged or empty file, no images, an image that would lose
    colour or transparency where most images would not, splits or labels that can be read in two ways, a missing split
    or column, and a missing source. Warns of files that are left out.

    >>> digits = load("digits", (8, 8), 1, split="test")
    >>> len(digits), digits.labels[:3].tolist(), str(digits)
    (297, [5, 7, 4], 'digits (test): 297 images 8x8x1')
    """
    options = Options(image_column, label_column, allow_paths, progress, pages, verify, cache_bytes)
    source = os.fspath(source)
    contents = open_source(source, options)
    form = Form(size, channels, values or _values_of(source, contents, pages, skip_bad), fit, clip_values, pages)
    splits = contents.splits
    held_out = as_trained and split == "test" and find_split("test", splits) is None
    name = _pick(source, "train" if held_out else split, splits)
    images = _build(source, name, contents, form, options, skip_bad, shuffle_window)
    is_alone = find_split("test", (each for each in splits if each != name)) is None
    if held_out or (as_trained and split == "train" and is_alone):
        return split_holdout(images)[held_out]
    return images


def load_pair(
    source: str | Path | Given,
    size: tuple[int, int],
    channels: int,
    *,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    skip_bad: bool = False,
    allow_paths: bool = False,
    cache_bytes: int = 4 * 2**30,
    shuffle_window: int = 10_000,
    verify: bool = False,
    progress: bool = False,
    values: Values | None = EIGHT_BIT,
    fit: Fit = "crop",
    clip_values: bool = False,
    pages: str = "first",
    on_demand: bool = False,
) -> tuple[Images, Images]:
    """The images to train on, and held-out images.

    The held-out images are the source's test split or else its validation split. If it has neither, `split_holdout`
    sets some apart. Arguments and errors are those of `load`; fewer than 2 images also raise InputError. The source may
    also be Python objects (`given`). With on_demand, no image is decoded before it is asked for.

    >>> train, held_out = load_pair("digits", (8, 8), 1)
    >>> len(train), len(held_out)
    (1500, 297)
    """
    options = Options(image_column, label_column, allow_paths, progress, pages, verify, cache_bytes)
    if isinstance(source, Given):
        contents, source = source.contents, source.name
    else:
        contents = open_source(source := os.fspath(source), options)
    form = Form(size, channels, values or _values_of(source, contents, pages, skip_bad), fit, clip_values, pages)
    name = _pick(source, split, contents.splits)
    train = _build(source, name, contents, form, options, skip_bad, shuffle_window, on_demand)
    other = find_split("test", (each for each in contents.splits if each != name))
    if other is None:
        return split_holdout(train)
    return train, _build(source, other, contents, form, options, skip_bad, shuffle_window, on_demand)


def paired(images: Images, other: Images, columns: tuple[str, str] = ("", "")) -> Images:
    """The images, with those of `other` as their `pair`.

    columns  the columns of both, if they are named; that of files is what follows the first dot of their names

    Raises InputError unless `other` has as many images, and if both sources have files, of the same names without their
    suffixes or columns, in the same order.

    >>> digits = load("digits", (8, 8), 1, split="test")
    >>> len(paired(digits, digits).pair)
    297
    """
    if len(other) != len(images):
        raise InputError(
            f"pairs {other.name}: {len(other):,} images in {other.split}; want {len(images):,}, one per image"
        )
    names, others = _file_names(images, columns[0]), _file_names(other, columns[1])
    for one, another in zip(names, others, strict=True) if names and others else ():
        if one != another:
            raise InputError(f"pairs {other.name}: {another} is in the place of {one}; want files of the same names")
    if images.shards is None:
        bounds = None
    else:  # where these shards end among the rows of the other source, so that both have one order
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), other.rows + 1])[torch.from_numpy(images.shards.ends)]
    return replace(images, pair=replace(other, bounds=bounds, window=images.window))


def _file_names(images: Images, column: str) -> list[str] | None:
    """The names of the files without their suffixes or this column; None if images have no files with names to compare.

    A page after the first has its number, too. The pages of a single file may be paired with those of any other one.
    """
    encoded, places = images.decoder.encoded, [(row, 0) for row in images.rows.tolist()]
    if isinstance(encoded, Pages) and len(encoded.files) > 1:
        places = [encoded.places[row] for row, _ in places]
        encoded = encoded.files
    if not isinstance(encoded, Folder | Zip | Tar | Lmdb):
        return None
    listed = encoded.files
    files = [(Path(listed[file]), page) for file, page in places]
    names = [(path.name.partition(".")[0] if column else path.stem, page) for path, page in files]
    return [f"page {page + 1} of {name}" if page > 0 else name for name, page in names]


@contextmanager
def settings_of_pairs(preset: Preset, images: Images) -> Iterator[dict[str, Any]]:
    """The keywords of `load` and `load_pair` for the other images of the condition `pairs`, beside these `images`.

    An InputError of the block that names image_column names pair_column.

    >>> from ddpm.presets import PRESETS
    >>> with settings_of_pairs(PRESETS["digits"], load("digits", (8, 8), 1)) as settings:
    ...     settings["image_column"] is None
    True
    """
    own = {"image_column": preset.pair_column or None, "label_column": None, "values": images.values}
    try:
        yield {**settings_of(preset), **own}
    except InputError as fault:
        raise InputError(str(fault).replace("image_column", "pair_column")) from None


def settings_of(preset: Preset) -> dict[str, Any]:
    """The keywords of `load` and `load_pair` that a preset sets.

    >>> from ddpm.presets import PRESETS
    >>> settings_of(PRESETS["digits"])["fit"]
    'crop'
    """
    form, unknown = form_of(preset), preset.pixel_type == "float32" and not preset.value_range
    return {
        "image_column": preset.image_column or None,
        "label_column": preset.label_column or None,
        "skip_bad": preset.skip_bad,
        "allow_paths": preset.allow_paths,
        "cache_bytes": preset.cache_bytes,
        "shuffle_window": preset.shuffle_window,
        "values": None if unknown else form.values,
        "fit": form.fit,
        "clip_values": form.clip,
        "pages": form.pages,
    }


def form_of(preset: Preset) -> Form:
    """What images become for a preset.

    >>> from ddpm.presets import PRESETS
    >>> form_of(PRESETS["digits"]).is_picture
    True
    """
    values = values_of(preset.pixel_type, preset.value_range)
    return Form(preset.size, preset.channels, values, preset.fit, preset.clip_values, preset.pages)


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

    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[shuffled[:k]] = True
    rest = view((~chosen).nonzero()[:, 0], images.split, dict(images.faults))
    return rest, view(chosen.nonzero()[:, 0], f"held out of {images.split}", {})

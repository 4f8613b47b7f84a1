"""The pages of TIFF files as images of their own."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ddpm.errors import InputError
from ddpm.files import arrays
from ddpm.files.data.listing import Contents, Encoded, EncodedImages, Listing


@dataclass
class Pages:
    """Images of which some are pages of a file.

    files   the files
    places  for each image the file, and the page from 0; a page of -1 is the file itself
    faults  file -> error, for files whose pages cannot be found
    """

    files: EncodedImages
    places: list[tuple[int, int]]
    faults: dict[int, InputError] = field(default_factory=dict)
    last: tuple[int, Encoded | InputError] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.places)

    def described(self) -> str:
        """How many files have pages.

        >>> from ddpm.files.data.sources import Folder
        >>> Pages(Folder(Path(), ["a.tif"]), [(0, 0), (0, 1)]).described()
        '1 TIFF file'
        """
        count = len({file for file, page in self.places if page >= 0})
        return f"{count:,} TIFF file{'s' * (count != 1)}"

    def name(self, index: int) -> str:
        file, page = self.places[index]
        name = self.files.name(file)
        return name if page < 0 else f"page {page + 1} of {name}"

    def fetch(self, indices: Sequence[int]) -> Iterator[Encoded | InputError]:
        return map(self._fetch, indices)

    def _fetch(self, index: int) -> Encoded | InputError:
        file, page = self.places[index]
        if file in self.faults:
            return self.faults[file]
        last = self.last  # the pages of a file are often read one after the other
        if last is None or last[0] != file:
            self.last = last = file, next(self.files.fetch([file]))
        source = last[1]
        if page < 0 or not isinstance(source, bytes | Path):
            return source
        try:
            return arrays.read_page(source, page, self.name(index))
        except InputError as fault:
            return fault

    def identity(self) -> Iterable[bytes]:
        yield from self.files.identity()
        yield np.array(self.places, "<i8").tobytes()

    def stamp(self) -> Any:
        stamp = self.files.stamp()
        return None if stamp is None else [stamp, hashlib.sha256(np.array(self.places, "<i8").tobytes()).hexdigest()]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None}


def each_page(source: str, contents: Contents) -> Contents:
    """The contents with each page of a TIFF file as an image. Listing a split may raise InputError."""
    splits = {split: lambda listing=listing: by_pages(source, listing()) for split, listing in contents.splits.items()}
    return replace(contents, splits=splits)


def by_pages(source: str, listing: Listing) -> Listing:
    """The listing with each page of a TIFF file as an image, which has the labels of its file.

    A file that cannot be read stays one image, and fetching it gives the error. Raises InputError if the images must
    be read in order.
    """
    if isinstance(listing.encoded, Pages):
        return listing
    if listing.shards is not None:
        raise InputError(f"pages images: {source} is read in order; want a copy of its files, or pages first")
    files, places, faults = listing.encoded, list[tuple[int, int]](), dict[int, InputError]()
    for i in range(len(files)):
        name = files.name(i)
        pages = [-1]
        [file] = files.fetch([i])
        if isinstance(file, bytes | Path) and _is_tiff(file):
            try:
                pages = arrays.find_pages(file, name)
            except InputError as fault:
                faults[i] = fault
        places += [(i, page) for page in pages]
    labels = None if listing.labels is None else listing.labels[[file for file, _ in places]]
    return Listing(Pages(files, places, faults), labels, listing.class_names)


def _is_tiff(source: bytes | Path) -> bool:
    if isinstance(source, bytes):
        return source.startswith(arrays.TIFF)
    return source.suffix.lower() in (".tif", ".tiff")

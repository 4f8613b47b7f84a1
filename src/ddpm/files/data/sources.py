"""Where images can come from: `SOURCES` has a row for each kind of source, with the functions beside it.

`hugging_face` reads the datasets of Hugging Face layout, in a folder, in a file or on the hub.
"""

import difflib
import functools
import hashlib
import os
import re
import weakref
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm.errors import InputError, brief
from ddpm.files import codecs
from ddpm.files import images as pictures
from ddpm.files.arrays import read_npy
from ddpm.files.data import hugging_face, remote, remote_rows
from ddpm.files.data.blobs import Blob, LocalFile, facts_of
from ddpm.files.data.index import indexed, key_of
from ddpm.files.data.layout import Layout, arrange, kind, meanings, other_words
from ddpm.files.data.listing import (
    ACCEPTED,
    GIVEN,
    Contents,
    Encoded,
    EncodedImages,
    Listing,
    Options,
    counted,
    facts,
    holds_image,
    is_image,
    names_and_sizes,
    natural,
    number_values,
    walk,
)
from ddpm.files.data.pages import by_pages, each_page
from ddpm.files.data.tars import Tar, members
from ddpm.files.features import read_arrays
from ddpm.noise import generator


class Source(NamedTuple):
    """A kind of source.

    recognises  (SOURCE, SOURCE as a path) -> whether it is of this kind
    contents    (SOURCE, SOURCE as a path, options) -> its splits, and what is left out
    meaning     what help and errors call this kind of source
    """

    recognises: Callable[[str, Path], bool]
    contents: Callable[[str, Path, Options], Contents]
    meaning: str


def open_source(source: str, options: Options) -> Contents:
    """What SOURCE holds, by the first row of SOURCES that recognises it. Warns of files that are left out.

    Raises InputError if no row recognises it.
    """
    path = Path(os.path.expanduser(source))  # "~name" stays as it is if there is no user of that name
    if source:  # Path("") is the working directory
        for row in SOURCES.values():
            if row.recognises(source, path):
                contents = row.contents(source, path, options)
                contents.warn(source)
                return each_page(source, contents) if options.pages == "images" else contents
    if source and path.is_dir():
        raise InputError(f"{source}: no images in this folder{_files(walk(path))}; {ACCEPTED}")
    if path.is_file():
        raise InputError(f"{source}: not a file of images that can be read; {ACCEPTED}")
    if GIVEN.fullmatch(source):
        raise InputError(f"data: the images of this run were given in Python, {source}; want them as data again")
    if source and path.exists():
        raise InputError(f"{source}: a pipe or a device; {ACCEPTED}")
    raise InputError(f"{source or repr(source)}: no such file or folder; {ACCEPTED}")


def folder_of(source: str) -> Path | None:
    """The folder that a SOURCE is; None if it is anything else.

    >>> folder_of("digits") is None, folder_of(".") == Path(".")
    (True, True)
    """
    path = Path(os.path.expanduser(source))
    return path if source and path.is_dir() and not _is_digits(source, path) else None


def _files(names: Iterable[str]) -> str:
    """The kinds of files, in brackets for an error."""
    kinds = Counter(map(kind, names))
    return f" ({counted(kinds)})" if kinds else ""


# -- digits ------------------------------------------------------------------------------------------------------------

_DIGITS = 0xD161
"""Key of the permutation that shuffles the digits."""


@dataclass
class Arrays:
    """Images in one array, [N, H, W] or [N, H, W, C] of any dtype.

    path  the .npy file that the array maps, which another process maps again; None if it is in memory
    """

    title: str
    arrays: NDArray[Any]
    path: Path | None = None

    def __len__(self) -> int:
        return len(self.arrays)

    def name(self, index: int) -> str:
        return f"image {index} of {self.title}"

    def fetch(self, indices: Sequence[int]) -> Iterator[Encoded | InputError]:
        return (self.arrays[i] for i in indices)

    def identity(self) -> Iterable[bytes]:
        for start in range(0, len(self), 256):  # the array may be a file that is larger than the memory
            yield self.arrays[start : start + 256].tobytes()

    def stamp(self) -> list[object]:
        return []  # the identity holds the numbers themselves

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ if self.path is None else {**self.__dict__, "arrays": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.path is not None:
            self.arrays = read_npy(self.path)


def _is_digits(source: str, path: Path) -> bool:
    return source == "digits"


def _digits(source: str, path: Path, options: Options) -> Contents:
    options.refuse_columns(source)
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        values, labels = file["images"], file["labels"]  # values 0..16
    arrays = np.round(values * (255 / 16)).astype(np.uint8)
    names = tuple(map(str, range(10)))
    # the file lists the digits writer by writer, so without shuffling the test split would have other writers
    shuffled = torch.randperm(len(arrays), generator=generator(_DIGITS)).numpy()
    arrays, labels = arrays[shuffled], labels[shuffled]

    def part(title: str, rows: slice) -> Listing:
        return Listing(Arrays(title, arrays[rows]), labels[rows].astype(np.int64), names)

    return Contents(
        {
            "train": functools.partial(part, "digits (train)", slice(1500)),
            "test": functools.partial(part, "digits (test)", slice(1500, None)),
        }
    )


# -- image files in a folder, a zip file or tar shards -----------------------------------------------------------------


def _contents(
    source: str,
    names: Iterable[str],
    images_of: Callable[[list[str]], EncodedImages],
    read: Callable[[str], bytes],
    options: Options,
    key: Sequence[Any],
    shards: bool = False,
) -> Contents:
    """The splits of files, as `layout.arrange` finds them. images_of(names) gives the images of some of them.

    key  JSON values that change whenever a file does, under which the layout is kept
    """
    endings = sorted(pictures.SUFFIXES)  # an extra that is installed later adds some
    whole_key = key_of("layout", key, endings, options.image_column, options.label_column, shards)
    table = indexed(whole_key, lambda: arrange(source, names, read, options, shards).to_table(), options.fresh)
    layout = Layout.from_table(table)

    def listing(split: str) -> Listing:
        labels = None if layout.labels is None else layout.labels[split]
        return Listing(images_of(layout.splits[split]), labels, layout.class_names)

    return Contents({split: functools.partial(listing, split) for split in layout.splits}, layout.left_out)


@dataclass
class Folder:
    """Image files of a folder; `files` are paths relative to `root`, with "/".

    facts  int64 [N, 2], the size of each file and the nanoseconds of its change; None: they are looked up when needed
    """

    root: Path
    files: list[str]
    facts: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.root / self.files[index])

    def fetch(self, indices: Sequence[int]) -> Iterator[Encoded | InputError]:
        return (self.root / self.files[i] for i in indices)

    def identity(self) -> Iterable[bytes]:
        return names_and_sizes(self.files, self._facts()[:, 0].tolist())

    def stamp(self) -> list[object]:
        return [os.path.realpath(self.root), hashlib.sha256(self._facts().tobytes()).hexdigest()]

    def _facts(self) -> NDArray[np.int64]:
        if self.facts is None:
            found = [facts_of(self.root / file) for file in self.files]
            self.facts = np.array(found, np.int64).reshape(-1, 2)
        return self.facts


def _is_image_folder(source: str, path: Path) -> bool:
    if not path.is_dir():
        return False
    files = list(walk(path))
    return any(map(is_image, files)) or (any(map(holds_image, files)) and not hugging_face.is_data_set(path))


def _image_folder(source: str, path: Path, options: Options) -> Contents:
    found = facts(path)

    def images_of(files: list[str]) -> Folder:
        return Folder(path, files, np.array([found[file] for file in files], np.int64).reshape(-1, 2))

    key = hashlib.sha256()
    for file, (size, changed) in found.items():
        key.update(f"{file} {size} {changed}\n".encode(errors="surrogateescape"))
    return _contents(
        source, found, images_of, lambda file: pictures.file_bytes(path / file), options, ["folder", key.hexdigest()]
    )


@dataclass
class Zip:
    """Image files of a zip file."""

    path: Path
    files: list[str]
    opened: tuple[int, zipfile.ZipFile] | None = field(default=None, repr=False)  # with the id of the process

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return f"{self.files[index]} in {self.path}"

    def fetch(self, indices: Sequence[int]) -> Iterator[Encoded | InputError]:
        return (_or_error(self.read, self.files[i]) for i in indices)

    def read(self, file: str) -> bytes:
        """The bytes of a file in the archive. Raises InputError if it is too large or damaged."""
        name, archive = f"{file} in {self.path}", self._archive()
        pictures.check_memory(archive.getinfo(file).file_size, name)  # zipfile reads no more than this
        try:
            return archive.read(file)
        except Exception as fault:  # zipfile and the codecs under it raise exceptions of many kinds
            raise InputError(f"{name}: cannot be read ({brief(fault)})") from None

    def identity(self) -> Iterable[bytes]:
        archive = self._archive()
        return names_and_sizes(self.files, (archive.getinfo(file).file_size for file in self.files))

    def stamp(self) -> list[object]:
        return [os.path.realpath(self.path), *facts_of(self.path)]

    def _archive(self) -> zipfile.ZipFile:
        if self.opened is None or self.opened[0] != os.getpid():  # a forked process must not share the file position
            self.opened = (os.getpid(), zipfile.ZipFile(self.path))
        return self.opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "opened": None}


def _or_error(read: Callable[[str], bytes], file: str) -> Encoded | InputError:
    try:
        return read(file)
    except InputError as fault:
        return fault


def _is_zip(source: str, path: Path) -> bool:
    return path.is_file() and (path.suffix.lower() == ".zip" or zipfile.is_zipfile(path))


def _zip(source: str, path: Path, options: Options) -> Contents:
    if not zipfile.is_zipfile(path):
        raise InputError(f"{source}: damaged or empty zip file; {ACCEPTED}")
    try:
        with zipfile.ZipFile(path) as archive:
            files = [name for name in archive.namelist() if not name.endswith(("/", "\\"))]
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as fault:
        raise InputError(f"{source}: damaged zip file ({brief(fault)}); {ACCEPTED}") from fault
    if not any(map(holds_image, files)):
        raise InputError(f"{source}: no images in this zip file{_files(files)}")
    key = ["zip", *facts_of(path), os.path.realpath(path)]
    return _contents(source, files, lambda names: Zip(path, names), Zip(path, []).read, options, key)


def _is_tar(source: str, path: Path) -> bool:
    return (path.is_file() and bool(re.search(r"\.(tar|tgz|tar\.\w+)$", path.name.lower()))) or (
        path.is_dir() and not hugging_face.is_data_set(path) and any(_shards(path))
    )


def _shards(path: Path) -> Iterable[str]:
    return (file for file in walk(path) if file.lower().endswith(".tar") and (path / file).is_file())


def _tar(source: str, path: Path, options: Options) -> Contents:
    if path.is_file():
        return _tar_contents(source, [("", LocalFile(path))], options)
    files = [(file, LocalFile(path / file)) for file in sorted(_shards(path), key=natural)]
    contents = _tar_contents(source, files, options)
    others = Counter(kind(file) for file in walk(path) if not file.lower().endswith(".tar"))
    return Contents(contents.splits, Counter(contents.left_out) + others)


def _tar_contents(source: str, files: Sequence[tuple[str, Blob]], options: Options) -> Contents:
    """The contents of tar files. Their names may name splits, but a single one that is the SOURCE has the name ""."""
    prefixed = files[0][0] != ""
    shards, names, places = [shard for _, shard in files], list[str](), list[NDArray[np.int64]]()
    texts = list[bytes | None]()
    for k, (file, shard) in enumerate(files):
        # one part of a path for a shard: it may name a split, but no class
        prefix = f"{file[: -len('.tar')].replace('/', ' ')}/" if prefixed else ""
        found, where, contained = members(shard, options.fresh)
        texts += contained
        names += [prefix + name for name in found] if prefix else found
        places.append(np.column_stack([np.full(len(where), k), where]))
    if not any(map(holds_image, names)):
        raise InputError(f"{source}: no images in {'these tar files' if prefixed else 'this tar file'}{_files(names)}")
    every = Tar(shards, names, np.concatenate(places), prefixed)
    row = {name: i for i, name in enumerate(names)}

    def images_of(wanted: list[str]) -> Tar:
        return Tar(shards, wanted, every.places[[row[name] for name in wanted]], prefixed)

    def read(file: str) -> bytes:
        text = texts[row[file]]
        return every.read(row[file]) if text is None else text

    key = ["tar", [(file, shard.facts()) for file, shard in files]]
    return _contents(source, names, images_of, read, options, key, shards=prefixed)


# -- shards at a URL ---------------------------------------------------------------------------------------------------


def _is_url(source: str, path: Path) -> bool:
    return remote.is_url(source)


def _url(source: str, path: Path, options: Options) -> Contents:
    """Tar or parquet files at a URL. Rows of parquet, and tar files that come only as a whole, are read in order."""
    shards = remote.found(source, (".tar", ".parquet"), options.cache_bytes)
    tars = [shard for shard in shards if shard.url.lower().endswith(".tar")]
    if not shards or 0 < len(tars) < len(shards):
        raise InputError(f"{source}: {len(shards)} files, {len(tars)} of them .tar; want .tar files, or .parquet files")
    if not tars:
        return remote_rows.contents(source, shards, options)
    names = [shard.url.rpartition("/")[2] for shard in tars] if len(tars) > 1 else [""]
    contents = _tar_contents(source, list(zip(names, tars, strict=True)), options)
    if all(shard.ranges for shard in tars):
        return contents

    def in_order(split: str) -> Listing:
        listing = contents.splits[split]()
        assert isinstance(listing.encoded, Tar)
        by_place = np.lexsort((listing.encoded.places[:, 1], listing.encoded.places[:, 0]))
        files, places = [listing.encoded.files[i] for i in by_place], listing.encoded.places[by_place]
        labels = None if listing.labels is None else listing.labels[by_place]
        ends = np.searchsorted(places[:, 0], np.unique(places[:, 0]), side="right").astype(np.int64)
        return replace(
            listing, encoded=replace(listing.encoded, files=files, places=places), labels=labels, shards=ends
        )

    return Contents({split: functools.partial(in_order, split) for split in contents.splits}, contents.left_out)


# -- arrays in a file --------------------------------------------------------------------------------------------------


def _is_npz(source: str, path: Path) -> bool:
    return path.is_file() and path.suffix.lower() == ".npz"


def _npz(source: str, path: Path, options: Options) -> Contents:
    """Arrays of images [N, H, W] or [N, H, W, C]. x_train and x_test are splits, and y_train holds labels."""
    arrays = read_arrays(path)
    images = {name: array for name, array in arrays.items() if array.dtype.kind in "uif" and array.ndim in (3, 4)}
    if options.image_column is not None:
        images = {name: array for name, array in images.items() if name == options.image_column}
    split_of = {name: name if meanings(name) else "train" for name in images}
    if len(images) == 1:
        split_of = dict.fromkeys(images, "train")
    if not images or len({meanings(split) for split in split_of.values()}) < len(images):
        described = ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in arrays.items())
        asked = "" if options.image_column is None else f"image_column {options.image_column}: "
        raise InputError(
            f"{asked}{source}: has {described}; want an .npz with images [N, H, W] or [N, H, W, C] in one array, "
            "or in one array a split, as x_train and x_test"
        )
    labels = {name: _labels_of_array(source, arrays, name, options.label_column) for name in images}
    known = [values for values in labels.values() if values is not None]
    numbers, class_names = number_values(value for values in known for value in values)

    def listing(name: str) -> Listing:
        array, values = images[name], labels[name]
        encoded = Arrays(f"{source} ({name})", array)
        if values is None or len(known) < len(images):
            return Listing(encoded)
        return Listing(encoded, np.array([numbers[value] for value in values], np.int64), class_names)

    return Contents({split: functools.partial(listing, name) for name, split in split_of.items()})


def _labels_of_array(source: str, arrays: dict[str, NDArray[Any]], images: str, column: str | None) -> list[int] | None:
    """The labels of an array of images: an array of as many integers, whose name speaks of the same split."""
    n = len(arrays[images])
    fitting = {
        name: array.reshape(-1)
        for name, array in arrays.items()
        if array.dtype.kind in "iu" and array.shape in ((n,), (n, 1)) and meanings(name) == meanings(images)
    }
    if column is not None:
        fitting = {
            name: array
            for name, array in fitting.items()
            if name == column or other_words(name) == other_words(column) != set()
        }
        if not fitting:
            raise InputError(
                f"label_column {column}: {source} has no such array of {n:,} integers; it has {', '.join(arrays)}"
            )
    return next(iter(fitting.values())).tolist() if len(fitting) == 1 else None


def _is_npy(source: str, path: Path) -> bool:
    return path.is_file() and path.suffix.lower() == ".npy"


def _npy(source: str, path: Path, options: Options) -> Contents:
    """One array of images [N, H, W] or [N, H, W, C], which stays on the disk until it is used."""
    options.refuse_columns(source)
    array = read_npy(path)
    if array.dtype.kind not in "uif" or array.ndim not in (3, 4) or 0 in array.shape:
        raise InputError(f"{source}: {array.dtype} {list(array.shape)}; want images, [N, H, W] or [N, H, W, C]")
    return Contents({"train": lambda: Listing(Arrays(source, array, path))})


def _is_tif(source: str, path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in (".tif", ".tiff")


def _tif(source: str, path: Path, options: Options) -> Contents:
    """The pages of one TIFF file."""
    options.refuse_columns(source)
    if options.pages == "channels":
        raise InputError(f"pages channels: {source} would be one image; want a folder of such files, or pages images")
    return Contents({"train": lambda: by_pages(source, Listing(Folder(path.parent, [path.name])))})


# -- LMDB, as LSUN is distributed --------------------------------------------------------------------------------------


@dataclass
class Lmdb:
    """Image files of an LMDB: each value is a file, and its key is its name."""

    path: Path
    keys: list[bytes]
    opened: tuple[int, Any] | None = field(default=None, repr=False)  # with the id of the process

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def files(self) -> list[str]:
        """The names of all images."""
        return [key.decode(errors="backslashreplace") for key in self.keys]

    def name(self, index: int) -> str:
        return f"{self.keys[index].decode(errors='backslashreplace')} in {self.path}"

    def fetch(self, indices: Sequence[int]) -> Iterator[Encoded | InputError]:
        if self.opened is None or self.opened[0] != os.getpid():  # LMDB must not be used across a fork
            self.opened = (os.getpid(), open_lmdb(self.path))
        with self.opened[1].begin() as transaction:
            for i in indices:
                found = transaction.get(self.keys[i])
                yield InputError(f"{self.name(i)}: is gone") if found is None else found

    def identity(self) -> Iterable[bytes]:
        yield from self.keys
        yield str((self.path / "data.mdb").stat().st_size).encode()

    def stamp(self) -> list[object]:
        return [os.path.realpath(self.path), *facts_of(self.path / "data.mdb")]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "opened": None}


_OPENED = weakref.WeakValueDictionary[tuple[int, str, int, int], Any]()
"""Id of a process, place, size and time of an LMDB -> the LMDB, which a process may open only once at a time."""


def open_lmdb(path: Path) -> Any:
    """The LMDB in a folder, for reading; its last user closes it by letting go of it.

    Raises InputError if it is damaged, or lmdb is not installed.
    """
    lmdb = codecs.package("lmdb", str(path), "LMDB")
    for (process, *_), inherited in list(_OPENED.items()):
        if process != os.getpid():  # a fork copies what is open, which cannot be used there, nor opened beside it
            inherited.close()
    key = os.getpid(), os.path.realpath(path), *facts_of(path / "data.mdb")
    if (opened := _OPENED.get(key)) is None:
        try:
            opened = lmdb.open(str(path), readonly=True, lock=False, readahead=False, max_readers=1024)
        except lmdb.Error as fault:
            raise InputError(f"{path}: damaged LMDB ({brief(fault)})") from None
        _OPENED[key] = opened
    return opened


def _lmdb_folders(path: Path) -> list[Path]:
    return [path] if (path / "data.mdb").is_file() else sorted(p.parent for p in path.glob("*/data.mdb"))


def _is_lmdb(source: str, path: Path) -> bool:
    return path.is_dir() and bool(_lmdb_folders(path))


def _lmdb(source: str, path: Path, options: Options) -> Contents:
    """An LMDB, or a folder of LMDBs whose names say their split, as church_outdoor_train_lmdb does."""
    options.refuse_columns(source)
    folders = _lmdb_folders(path)
    if len(folders) == 1:
        splits = {"train": folders[0]}
    else:
        splits = {next(iter(meanings(folder.name)), folder.name): folder for folder in folders}
        if len(splits) < len(folders):
            names = ", ".join(folder.name for folder in folders)
            raise InputError(f"{source}: {names}: several of one split; want one of them as the SOURCE")

    def listing(folder: Path) -> Listing:
        with open_lmdb(folder).begin() as transaction:
            return Listing(Lmdb(folder, [bytes(key) for key in transaction.cursor().iternext(values=False)]))

    return Contents({name: functools.partial(listing, folder) for name, folder in splits.items()})


# -- datasets in Hugging Face layout -----------------------------------------------------------------------------------


def _folder_and_configuration(source: str, path: Path) -> tuple[Path, str | None]:
    """FOLDER:CONFIG in two parts, unless there is a file of that name."""
    folder, _, configuration = source.rpartition(":")
    if folder and configuration and not path.exists() and Path(os.path.expanduser(folder)).is_dir():
        return Path(os.path.expanduser(folder)), configuration
    return path, None


def _is_dataset_folder(source: str, path: Path) -> bool:
    return hugging_face.is_data_set(_folder_and_configuration(source, path)[0])


def _is_parquet(source: str, path: Path) -> bool:
    return path.is_file() and path.suffix.lower() == ".parquet"


def _local_dataset(source: str, path: Path, options: Options) -> Contents:
    folder, configuration = _folder_and_configuration(source, path)
    loaded = hugging_face.load_local(source, folder, configuration, options.progress)
    others = (
        (file for file in walk(folder) if not file.lower().endswith(hugging_face.SUFFIXES)) if folder.is_dir() else ()
    )
    place = folder if folder.is_dir() else folder.parent
    return hugging_face.contents(source, loaded, place, options, Counter(map(kind, others)))


def _is_hub_name(source: str, path: Path) -> bool:
    """Whether SOURCE has the form of OWNER/NAME, NAME, OWNER/NAME:CONFIG or NAME:CONFIG, and is not a missing file."""
    is_file_name = source.lower().endswith((".zip", ".parquet", ".npz", ".npy", ".tar", *pictures.SUFFIXES))
    return not (path.exists() or is_file_name) and bool(re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?", source))


def _hub_dataset(source: str, path: Path, options: Options) -> Contents:
    if difflib.get_close_matches(source.lower(), ["digits"], cutoff=0.75):
        raise InputError(f"{source}: no such dataset, did you mean digits? ({ACCEPTED})")
    return hugging_face.contents(source, hugging_face.load_hub(source, options.progress), None, options)


SOURCES = {
    "digits": Source(_is_digits, _digits, meaning="digits"),
    "lmdb": Source(_is_lmdb, _lmdb, meaning="an LMDB of images (LSUN)"),
    "folder": Source(_is_image_folder, _image_folder, meaning="a folder of images"),
    "dataset": Source(_is_dataset_folder, _local_dataset, meaning="a folder of a Hugging Face dataset"),
    "parquet": Source(_is_parquet, _local_dataset, meaning="a .parquet file"),
    "npz": Source(_is_npz, _npz, meaning="an .npz file of images"),
    "npy": Source(_is_npy, _npy, meaning="an .npy file of images"),
    "tif": Source(_is_tif, _tif, meaning="a .tif file of pages"),
    "tar": Source(_is_tar, _tar, meaning="a .tar file of images or a folder of them (WebDataset)"),
    "zip": Source(_is_zip, _zip, meaning="a .zip file of images"),
    "url": Source(_is_url, _url, meaning="a URL of .tar or .parquet files (s3://, gs://, https://, hf://)"),
    "hub": Source(_is_hub_name, _hub_dataset, meaning="a hub dataset OWNER/NAME"),
}
"""The kinds of source. The first that recognises a SOURCE opens it."""

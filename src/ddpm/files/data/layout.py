"""From the names of files, wherever they lie, to splits, classes and what is left out.

A folder, a zip file and tar shards are all read by `arrange`. What could be read in two ways is refused.
"""

import csv
import functools
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from numpy.typing import NDArray

from ddpm.errors import InputError, brief, parse_json
from ddpm.files.data.listing import LABELS, TEXTS, Options, holds_image, is_hidden, is_image, natural, number_values

# -- the names of splits -----------------------------------------------------------------------------------------------

_WORDS = {
    "train": ("train", "training", "trainval"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation", "holdout", "heldout"),
}
_MEANING = {word: split for split, words in _WORDS.items() for word in words}
_MAY_MEAN = re.compile("|".join(_MEANING), re.IGNORECASE)
_FILLERS = tuple(
    "sets set datasets dataset data images image imgs img pictures photos files folder samples split".split()
)


@functools.lru_cache(maxsize=2**14)
def words(name: str) -> tuple[str, ...]:
    """The words of a name in lower case: those of train_images2, TrainImages and trainimages are train, images."""
    words = re.findall(r"[^\W\d_]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())
    split = (_glued(word) for word in words)
    return tuple(part for parts in split for part in parts)


def _glued(word: str) -> tuple[str, ...]:
    for filler in _FILLERS:
        if word.endswith(filler) and word.removesuffix(filler) in _MEANING:
            return word.removesuffix(filler), filler
    return (word,)


@functools.lru_cache(maxsize=2**14)
def meanings(name: str) -> frozenset[str]:
    """The splits that a name speaks of: train, validation or test; usually none or one.

    >>> [sorted(meanings(name)) for name in ("train2017", "my-Test.set", "ValImages", "contest", "train_test")]
    [['train'], ['test'], ['validation'], [], ['test', 'train']]
    """
    if not _MAY_MEAN.search(name):  # quick, for a million names
        return frozenset()
    splits = frozenset(_MEANING[word] for word in words(name) if word in _MEANING)
    return frozenset({"test"}) if splits == {"validation", "test"} else splits  # COCO's test-dev


def other_words(name: str) -> frozenset[str]:
    """The words of a name that speak of no split.

    >>> sorted(other_words("train_labels"))
    ['labels']
    """
    return frozenset(word for word in words(name) if word not in _MEANING)


def find_split(split: str, available: Iterable[str]) -> str | None:
    """The name in `available` of the split that is asked for, or None. For "test", validation images serve, too.

    >>> find_split("test", ["train2017", "val2017"]), find_split("train", ["train", "train_extra"])
    ('val2017', 'train')
    """
    names = list(available)
    by_lower = {name.lower(): name for name in names}
    asked = _MEANING.get(split.lower())
    if asked is None or split.lower() in by_lower:
        return by_lower.get(split.lower())
    for wanted in (asked, "validation") if asked == "test" else (asked,):
        exact = (by_lower[word] for word in _WORDS[wanted] if word in by_lower)
        if (name := next(exact, None)) or (name := next((n for n in names if meanings(n) == {wanted}), None)):
            return name
    return None


class _Reading(NamedTuple):
    """One way to find the split of a file.

    depth  of the folder that names it, from 0; None: the file's own name does
    of     for every file, the name that was read
    """

    depth: int | None
    of: list[str]


def _name_at(parts: Sequence[str], depth: int | None) -> str:
    """The name of the folder at this depth, "" if there is none; the file's name without its suffix for None."""
    if depth is None:
        return parts[-1].rpartition(".")[0]
    return parts[depth] if depth < len(parts) - 1 else ""


def _splits_by(source: str, files: Sequence[Sequence[str]], shards: bool) -> _Reading | None:
    """How files, each the parts of a path, are split; None if they are not. Raises InputError if that is unclear."""
    deepest = max(len(parts) for parts in files) - 1
    full = list[_Reading]()
    for depth in range(deepest):
        reading = _Reading(depth, [_name_at(parts, depth) for parts in files])
        if all(len(meanings(name)) == 1 for name in reading.of):
            full.append(reading)
    if len(full) > 1:
        kinds = {reading.depth: [meanings(name) for name in reading.of] for reading in full}
        dividing = [reading for reading in full if len(set(kinds[reading.depth])) > 1] or full
        if any(kinds[reading.depth] != kinds[dividing[0].depth] for reading in dividing[1:]):
            first, second = (_some(reading.of) for reading in dividing[:2])
            raise InputError(
                f"{source}: folders {first}, and in or above them {second}, name splits; want only one kind"
            )
        full = dividing
    if full:
        _check_names(source, full[0], shards)
        return full[0]
    for depth in range(deepest):
        _check_beside(source, [_name_at(parts, depth) for parts in files])
    stems = _Reading(None, [_name_at(parts, None) for parts in files])
    kinds_of_stems = Counter(meanings(name) for name in stems.of)
    named = {kind for kind in kinds_of_stems if len(kind) == 1}
    if len(named) > 1 and {"train"} in named:
        if sum(kinds_of_stems[kind] for kind in named) == len(files):
            return stems
        plain = [name for name in stems.of if _is_plain(name)]
        if len({meanings(name) for name in plain}) > 1:
            raise InputError(
                f"{source}: the names of {len(plain):,} of {len(files):,} images, as {_some(plain)}, name splits; "
                "want such names for all images, or for none"
            )
    return None


def _is_plain(name: str) -> bool:
    """Whether a name says nothing but a split: train2017 or test_images, and not freight_train."""
    return bool(meanings(name)) and all(word in _MEANING or word in _FILLERS for word in words(name))


def _check_names(source: str, reading: _Reading, shards: bool) -> None:
    """Raise InputError if different names stand for one split: train and train_masks may be anything."""
    if shards and reading.depth == 0:
        return
    by_split: dict[frozenset[str], dict[tuple[str, ...], str]] = {}
    for name in dict.fromkeys(reading.of):
        by_split.setdefault(meanings(name), {}).setdefault(words(name), name)
    for split, names in by_split.items():
        if len(names) > 1:
            raise InputError(
                f"{source}: {_some(names.values())}: each reads as the split {next(iter(split))}, or they are classes; "
                f"want one folder a split, or one of these as the SOURCE"
            )


def _check_beside(source: str, names: Sequence[str]) -> None:
    """Raise InputError if some folders of a depth name a split and the others do not."""
    if len(set(names)) == 1:  # a folder around all, such as train_test_split
        return
    telling = [name for name in names if meanings(name)]
    # freight_train among other names is a class
    if telling and any(_is_plain(name) or meanings(name) != {"train"} for name in telling):
        raise InputError(
            f"{source}: {_some(telling)}: the name of a split, or of a class; {len(names) - len(telling):,} images lie "
            f"beside it; want all in folders of such names ({', '.join(sorted(_MEANING))}), or none"
        )


def _some(names: Iterable[str]) -> str:
    different = sorted(set(names), key=natural)
    return ", ".join(different[:5]) + (", .." if len(different) > 5 else "")


# -- files to splits and classes ---------------------------------------------------------------------------------------


@dataclass
class Layout:
    """How files are arranged.

    splits       name -> the files of the split, in natural order
    labels       name of a split -> int64 [N] in 0..K-1; None if not every image has a label
    class_names  K names, or None
    left_out     kind of file that is not read, such as ".heic" -> number of files
    """

    splits: dict[str, list[str]]
    labels: dict[str, NDArray[np.int64]] | None
    class_names: tuple[str, ...] | None
    left_out: Counter[str]

    def to_table(self) -> pa.Table:
        """The layout as a table that `from_table` reads: a row for each file."""
        names = [name.encode(errors="surrogateescape") for files in self.splits.values() for name in files]
        split = np.repeat(np.arange(len(self.splits)), [len(files) for files in self.splits.values()])
        columns = {"name": pa.array(names, pa.large_binary()), "split": split.astype(np.int32)}
        if self.labels is not None:
            columns["label"] = np.concatenate([self.labels[name] for name in self.splits])
        about = {"splits": list(self.splits), "class_names": self.class_names, "left_out": self.left_out}
        return pa.table(columns).replace_schema_metadata({"about": json.dumps(about)})

    @classmethod
    def from_table(cls, table: pa.Table) -> "Layout":
        """The layout of `to_table`."""
        about = json.loads(table.schema.metadata[b"about"])
        names = [name.decode(errors="surrogateescape") for name in table["name"].to_pylist()]
        counts = np.bincount(table["split"].to_numpy(), minlength=len(about["splits"]))
        ends = np.cumsum(counts)
        parts = {name: slice(int(e - n), int(e)) for name, e, n in zip(about["splits"], ends, counts, strict=True)}
        labels = table["label"].to_numpy() if "label" in table.column_names else None
        return cls(
            {name: names[part] for name, part in parts.items()},
            None if labels is None else {name: labels[part].astype(np.int64) for name, part in parts.items()},
            None if about["class_names"] is None else tuple(about["class_names"]),
            Counter(about["left_out"]),
        )


def arrange(
    source: str, names: Iterable[str], read: Callable[[str], bytes], options: Options, shards: bool = False
) -> Layout:
    """The splits and classes of files by their paths, which may be written with "/" or "\\\\".

    Folders of one depth may name the splits, as may the files themselves. Labels are those of metadata files
    (metadata.csv, .jsonl or .parquet), of files NAME.cls or NAME.json beside NAME.png, or else the names of the folders
    below the split, from where they branch, if all images lie in such folders.

    read    gives the bytes of a file
    shards  whether the first part of each path is a shard, which may name a split, but no class

    Raises InputError if there are no images, and for a listing or a label that can be read in two ways.
    """
    files = {name: parts for name in dict.fromkeys(names) if (parts := _parts(name)) and not is_hidden("/".join(parts))}
    images = [name for name, parts in files.items() if is_image(parts[-1])]
    images = images or [name for name, parts in files.items() if holds_image(parts[-1])]  # .npy beside pictures is none
    images = _one_of_each_sample(source, images, files, options.image_column)
    if not images:
        raise InputError(f"{source}: no images")
    images.sort(key=lambda name: natural("/".join(files[name])))
    paths = [files[name] for name in images]
    reading = _splits_by(source, paths, shards)
    written = _written_labels(source, files, images, read, options.label_column)
    label_of, used = written or (_classes_of_folders(paths, reading, int(shards)), set[str]())

    split_of = ["train"] * len(images) if reading is None else _split_names(reading)
    splits: dict[str, list[str]] = {}
    labels: dict[str, list[int]] = {}
    number, class_names = number_values(label_of or ())
    for k, (name, split) in enumerate(zip(images, split_of, strict=True)):
        splits.setdefault(split, []).append(name)
        if label_of is not None:
            labels.setdefault(split, []).append(number[label_of[k]])
    taken = {*images, *used}
    return Layout(
        splits,
        None if label_of is None else {split: np.array(values, np.int64) for split, values in labels.items()},
        None if label_of is None else class_names,
        Counter(kind(parts[-1]) for name, parts in files.items() if name not in taken),
    )


def _parts(name: str) -> tuple[str, ...]:
    """The parts of a path of any system: without a drive, "." and ".."."""
    if (
        "\\" not in name
        and ":" not in name
        and "./" not in name
        and "//" not in name
        and name[:1] not in "/"
        and name[-1] != "."
    ):
        return tuple(name.split("/"))  # quick, for a million names
    return tuple(part for part in re.sub(r"^[A-Za-z]:", "", name.replace("\\", "/")).split("/") if part.strip("."))


def kind(file: str) -> str:
    """The kind of a file that is not read: its suffix; without one the name, if it is a usual text such as LICENSE.

    What follows a dot is a suffix if it is short and not only a number: 0001.2024 has none.

    >>> kind("a/IMG_1.HEIC"), kind("a/LICENSE"), kind("a.b/c"), kind("a/IMG_0001"), kind("0001.2024")
    ('.heic', 'LICENSE', 'no suffix', 'no suffix', 'no suffix')
    """
    file = file.rpartition("/")[2]
    suffix = file.rpartition(".")[2].lower() if "." in file else ""
    if re.fullmatch(r"(?=.*[a-z])[a-z0-9_+-]{1,12}", suffix):
        return f".{suffix}"
    return file if file in TEXTS else "no suffix"


def _split_names(reading: _Reading) -> list[str]:
    """For every file the name of its split: the name in the source, if there is only one, or else the usual one."""
    names: dict[frozenset[str], str] = {}
    for name in dict.fromkeys(reading.of):
        [usual] = split = meanings(name)
        names[split] = usual if split in names or reading.depth is None else name
    return [names[meanings(name)] for name in reading.of]


def _classes_of_folders(paths: Sequence[Sequence[str]], reading: _Reading | None, first: int) -> list[str] | None:
    """For every file the folder that is its class, from part `first` on; None if there are no two such folders."""
    split = None if reading is None else reading.depth
    folders = [[part for k, part in enumerate(parts[:-1]) if k >= first and k != split] for parts in paths]
    depth = 0
    while all(len(below) > depth for below in folders):
        if len({below[depth] for below in folders}) > 1:
            return [below[depth] for below in folders]
        depth += 1
    return None


# -- labels that are written in files ----------------------------------------------------------------------------------


def _sample(parts: Sequence[str]) -> tuple[str, str]:
    """The key and the extension of a WebDataset file: a/1.seg.png is ("a/1", "seg.png")."""
    stem, _, extension = parts[-1].partition(".")
    return "/".join((*parts[:-1], stem)), extension.lower()


def _one_of_each_sample(
    source: str, images: list[str], files: dict[str, tuple[str, ...]], column: str | None
) -> list[str]:
    """The images of one extension, if every sample has several (WebDataset's 1.jpg and 1.seg.png)."""
    if column is None and not any("." in files[name][-1].rpartition(".")[0] for name in images):
        return images
    extensions: dict[str, set[str]] = {}
    for name in images:
        key, extension = _sample(files[name])
        extensions.setdefault(key, set()).add(extension)
    sets = {frozenset(each) for each in extensions.values()}
    columns = next(iter(sets)) if len(sets) == 1 else frozenset[str]()
    several = len(columns) > 1 and len(extensions) > 1 and any("." in each for each in columns)
    if column is None and not several:
        return images
    if column is None:
        raise InputError(f"{source}: every sample has images {', '.join(sorted(columns))}; want one as image_column")
    if not several:
        raise InputError(f"image_column {column}: {source} holds images only and has no columns")
    if column not in columns:
        raise InputError(f"image_column {column}: want one of {', '.join(sorted(columns))}, which {source} has")
    return [name for name in images if _sample(files[name])[1] == column]


def _written_labels(
    source: str,
    files: dict[str, tuple[str, ...]],
    images: Sequence[str],
    read: Callable[[str], bytes],
    column: str | None,
) -> tuple[list[Any] | None, set[str]] | None:
    """For every image the label that a file gives it, and the files that hold labels; None if no file does.

    The labels are None if some images have none.

    Raises InputError if `column` is named and does not give a label to every image.
    """
    tables = [name for name, parts in files.items() if parts[-1].lower() in _TABLES]
    rows: dict[str, dict[str, Any]] = {}  # path of an image -> its columns
    for table in tables:
        folder = files[table][:-1]
        for row in _rows(f"{table} of {source}", _TABLES[files[table][-1].lower()], read(table)):
            rows["/".join((*folder, *_parts(str(row["file_name"]))))] = row
    if rows:
        known = list(dict.fromkeys(key for row in rows.values() for key in row if key != "file_name"))
        chosen = column if column in known else None if column else next((c for c in LABELS if c in known), None)
        if chosen is not None:
            labels = [rows.get("/".join(files[name]), {}).get(chosen) for name in images]
            return _complete(source, column, labels), set(tables)
        if column:
            raise InputError(f"label_column {column}: no such column, {_some(tables)} has {', '.join(known)}")
    beside = _labels_beside(files, images, read, column)
    if beside is not None:
        labels, used = beside
        return _complete(source, column, labels), {*tables, *used}
    if column is not None:
        raise InputError(
            f"label_column {column}: {source} has no columns; want a metadata.csv with the columns file_name and "
            f"{column}, or files NAME.json with {column}"
        )
    return None


def _complete(source: str, column: str | None, labels: list[Any]) -> list[Any] | None:
    """The labels, or None if some are missing. Raises InputError in that case if the column was named."""
    missing = sum(not isinstance(label, (str, int)) or label == "" for label in labels)
    if missing and column is not None:
        raise InputError(f"label_column {column}: {missing:,} of {len(labels):,} images of {source} have no label")
    return None if missing else labels


def _rows_of_csv(data: bytes) -> list[Any]:
    return list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"))))


def _rows_of_jsonl(data: bytes) -> list[Any]:
    return [parse_json(line) for line in data.decode("utf-8-sig").splitlines() if line.strip()]


def _rows_of_parquet(data: bytes) -> list[Any]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    rows: list[Any] = pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    return rows


_TABLES = {"metadata.csv": _rows_of_csv, "metadata.jsonl": _rows_of_jsonl, "metadata.parquet": _rows_of_parquet}
"""The files in which Hugging Face's image folders keep columns -> what reads them."""


def _rows(title: str, read: Callable[[bytes], list[Any]], data: bytes) -> list[dict[str, Any]]:
    """The rows of a metadata file with the column file_name; none without this column, as it has another purpose then.

    Raises InputError if it is damaged.
    """
    try:
        rows = read(data)
    except (ValueError, OSError, csv.Error, RecursionError) as fault:
        raise InputError(f"{title}: cannot be read ({brief(fault)})") from None
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("file_name"), str)]


def _labels_beside(
    files: dict[str, tuple[str, ...]], images: Sequence[str], read: Callable[[str], bytes], column: str | None
) -> tuple[list[Any], set[str]] | None:
    """For every image the label in NAME.cls, or in NAME.json, and those files; None if there are none."""
    for extension in ("cls", "json"):
        candidates = ((name, *_sample(parts)) for name, parts in files.items() if parts[-1].lower().endswith(extension))
        by_key = {key: name for name, key, its in candidates if its == extension}
        if not by_key:
            continue
        beside = [by_key.get(_sample(files[name])[0]) for name in images]
        present = [name for name in beside if name is not None]
        if not present or (extension == "cls" and column not in (None, "cls")):
            continue
        if extension == "cls":
            values = [None if name is None else read(name).decode(errors="replace").strip() for name in beside]
            return values, set(present)
        first = _json(read(present[0]))
        chosen = next((each for each in ([column] if column else LABELS) if each in first), None)
        if chosen is not None:
            return [None if name is None else _json(read(name)).get(chosen) for name in beside], set(present)
    return None


def _json(data: bytes) -> dict[str, Any]:
    """A JSON object; an empty one for anything else."""
    try:
        values = parse_json(data)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}

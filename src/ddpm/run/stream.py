"""Samples that are written while they are made: folders, tar files for WebDataset, and arrays.

No process holds more than a batch of images. A stopped command goes on where it was: images of a folder and whole tar
files of one are kept, and what is to become one file is kept in parts beside it, in the folder FILE.parts.
"""

import json
import math
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ddpm.errors import InputError, parse_json
from ddpm.files import atomic
from ddpm.files import images as pictures
from ddpm.files.models import Checkpoint
from ddpm.run.forecast import free_bytes, gib
from ddpm.run.processes import Processes
from ddpm.run.progress import Progress
from ddpm.run.sample import Sampling, cycled_labels, forecast

RECORD = "samples.json"
"""The file in a folder of samples that says how they are made, so that the same command resumes."""
STREAMED = ("folder", "tar", "npy", "npz")
"""The kinds of `write_samples`, as `files.images.check_out` names them."""
_LEAST = 512
"""The least bytes that an image takes on a disk: a block of a tar file or of a file system."""
_BLOCK, _END = 512, bytes(1024)
"""The block of a tar file, and its end."""


def write_samples(
    checkpoint: Checkpoint, n: int, ranks: Processes, out: Path, sampling: Sampling,
    kind: str = "folder", shard: int | None = None, progress: bool = False,
) -> tuple[dict[str, Any], int]:  # fmt: skip
    """Write the images of `sample` to `out` while they are made, in bounded memory.

    Returns how they are made, as `sample` does, and how many were made now and not before.

    kind   folder: SEED.png, or SEED.npy for what PNG cannot hold; tar: one file of these for WebDataset, each with its
           class in SEED.cls, its number among the model's classes; npy: the array [n, H, W, C]; npz: the same as arr_0
    shard  images a tar file; a folder then holds NAME-000000.tar, NAME-000001.tar and so on, NAME being its own name

    The images, the tar files or the parts are shared by the processes, which must see the same disk. If the same call
    was stopped, only what is missing is made. Raises InputError as `Sampling.maker` does, if the images do not fit on
    the disk, and if there are samples of other settings in the folder, or in the parts of the file.

    >>> import tempfile, torch
    >>> from ddpm.files.opening import open_checkpoint
    >>> alone, folder = Processes(0, 1, torch.device("cpu")), Path(tempfile.mkdtemp())
    >>> about, made = write_samples(open_checkpoint("digits"), 3, alone, folder, Sampling("ddim", 2), shard=2)
    >>> made, sorted(file.suffix for file in folder.iterdir())
    (3, ['.json', '.tar', '.tar'])
    """
    make, about = sampling.maker(checkpoint, ranks.device)
    _, labels = sampling.conditions.resolved(checkpoint).apply(checkpoint)
    if sampling.inputs is not None and not labels:
        labels = list(sampling.inputs.labels)
    values, shape = checkpoint.denoiser.values, checkpoint.preset.shape
    ending = pictures.suffix(values.dtype, shape[0])
    work = _Work(make, about, n, ranks, sampling, labels, ending, progress)
    if kind == "folder":
        _check_disk(out, n, _LEAST * n)
        with _no_record_of_nothing(out, ranks):
            if shard is None:
                _begin(work, out)
                return {"count": n, **about}, work.run(_Images(work, out))
            tars = _Tars(work, out, shard)
            _begin(work, out, {"shard": shard}, grow=tars.grow)
            return {"count": n, **about}, work.run(tars)
    dims, folder = math.prod(shape), Path(f"{out}.parts")
    size = n * (dims * values.torch.itemsize if kind != "tar" else _LEAST)
    _check_disk(out, n, 2 * size - sum(file.stat().st_size for file in folder.glob("*.part")))
    remedy = f"delete {folder}, or want another name"
    with _no_record_of_nothing(folder, ranks):
        record = _begin(work, folder, {"kind": kind}, remedy, {"part": sampling.batch_size})
        parts = _Parts(work, folder, kind, record["part"])
        made = work.run(parts)
    if ranks.first:
        shown = (n, *shape[1:], shape[0])
        with atomic.temporary(out) as part, part.open("wb") as file:
            _join(file, kind, shown, np.dtype(values.dtype), [parts.file(k) for k in range(len(parts))], progress)
        atomic.remove_folder(folder)
    ranks.exchange()  # wait until the file is there
    return {"count": n, **about}, made


@dataclass(frozen=True)
class _Work:
    """Images 0 to n - 1 of a series: what makes them, their labels, and who makes which."""

    make: Callable[..., Tensor]
    about: dict[str, Any]
    n: int
    ranks: Processes
    sampling: Sampling
    labels: list[int]
    ending: str
    progress: bool

    def run(self, target: "_Target") -> int:
        """Make this process's share of what the target misses, and wait for the others. Returns what all made."""
        mine = self.ranks.mine(len(target))
        missing = sum(len(target.places(k)) for k in mine if not target.file(k).is_file())
        watch, made = forecast(missing, self.about, self.progress, self.ranks), 0
        total = sum(len(target.places(k)) for k in mine)
        with Progress[None](
            total=total, initial=total - missing, unit="image", desc="sampling", show=self.progress, leave=False
        ) as bar:

            def images(places: Sequence[int]) -> NDArray[Any]:
                nonlocal made
                result = pictures.channels_last(self.make(places, watch=watch, progress=self.progress))
                made += len(places)
                bar.update(len(places))
                return result

            try:
                target.write([k for k in mine if not target.file(k).is_file()], images)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(self._left(target)) from None
        return sum(self.ranks.exchange(made))

    def _left(self, target: "_Target") -> str:
        """What a stopped command leaves for the next one."""
        left = [k for k in range(len(target)) if not target.file(k).is_file()]
        count = sum(len(target.places(k)) for k in left)
        first = self.sampling.seed + target.places(left[0])[0] if left else self.sampling.seed + self.n
        return f"{count:,} of {self.n:,} images are left, from seed {first} on; the same command resumes"

    def batches(self, places: Sequence[int]) -> Iterator[Sequence[int]]:
        size = self.sampling.batch_size
        return (places[start : start + size] for start in range(0, len(places), size))

    def name(self, place: int) -> str:
        return f"{self.sampling.seed + place:06d}"

    def members(self, places: Sequence[int], images: NDArray[Any]) -> bytes:
        """Files of a tar file: each image, and its class if it has one."""
        labels, found = cycled_labels(self.labels, places), []
        for k, (place, image) in enumerate(zip(places, images, strict=True)):
            if labels is not None:
                found.append(_member(f"{self.name(place)}.cls", str(int(labels[k])).encode()))
            found.append(_member(self.name(place) + self.ending, pictures.image_bytes(image)))
        return b"".join(found)


Make = Callable[[Sequence[int]], NDArray[Any]]
"""From places of the series to their images [B, H, W, C]."""


class _Target:
    """Files numbered 0, 1, ..., each with the images of some places. A file that is there is whole."""

    def __init__(self, work: _Work, folder: Path, size: int) -> None:
        self.work, self.folder, self.size = work, folder, size

    def __len__(self) -> int:
        return -(-self.work.n // self.size)

    def places(self, k: int) -> range:
        return range(k * self.size, min((k + 1) * self.size, self.work.n))

    def file(self, k: int) -> Path:
        raise NotImplementedError

    def write(self, missing: Sequence[int], make: Make) -> None:
        raise NotImplementedError


class _Images(_Target):
    """A file for each image."""

    def __init__(self, work: _Work, folder: Path) -> None:
        super().__init__(work, folder, 1)

    def file(self, k: int) -> Path:
        return self.folder / (self.work.name(k) + self.work.ending)

    def write(self, missing: Sequence[int], make: Make) -> None:
        for places in self.work.batches(missing):
            for place, image in zip(places, make(places), strict=True):
                pictures.save_image(self.folder / self.work.name(place), image)


class _Tars(_Target):
    """A tar file for each `size` images."""

    def file(self, k: int) -> Path:
        return self.folder / f"{self.folder.resolve().name or 'samples'}-{k:06d}.tar"

    def grow(self, count: int) -> None:
        """Delete the file that was the last one of `count` images and is to be longer."""
        if count % self.size:
            self.file(count // self.size).unlink(missing_ok=True)

    def write(self, missing: Sequence[int], make: Make) -> None:
        for k in missing:
            with atomic.temporary(self.file(k)) as part, part.open("wb") as file:
                for places in self.work.batches(self.places(k)):
                    file.write(self.work.members(places, make(places)))
                file.write(_END)


class _Parts(_Target):
    """What will be between the head and the end of one file, in parts."""

    def __init__(self, work: _Work, folder: Path, kind: str, size: int) -> None:
        super().__init__(work, folder, size)
        self.kind = kind

    def file(self, k: int) -> Path:
        places = self.places(k)
        return self.folder / f"{places.start:08d}-{places.stop:08d}.part"

    def write(self, missing: Sequence[int], make: Make) -> None:
        for k in missing:
            places = self.places(k)
            images = make(places)
            atomic.write(self.file(k), self.work.members(places, images) if self.kind == "tar" else images.tobytes())


def _member(name: str, data: bytes) -> bytes:
    """A file in a tar file. The same image gives the same bytes."""
    about = tarfile.TarInfo(name)
    about.size = len(data)
    return about.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % _BLOCK)


def _join(
    file: BinaryIO, kind: str, shape: tuple[int, ...], dtype: np.dtype[Any], parts: Sequence[Path], progress: bool
) -> None:
    """Write one file from its parts. Raises InputError if they are not as long as they must be."""
    with ExitStack() as stack:
        to: Any = file
        if kind == "npz":
            archive = stack.enter_context(zipfile.ZipFile(file, "w"))
            to = stack.enter_context(archive.open("arr_0.npy", "w", force_zip64=True))
        if kind != "tar":
            head = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(to, head)
        length = 0
        for part in Progress(parts, desc="writing", unit="part", show=progress, leave=False):
            length += part.stat().st_size
            with part.open("rb") as source:
                shutil.copyfileobj(source, to, 1 << 20)
        if kind == "tar":
            to.write(_END)
        elif length != math.prod(shape) * dtype.itemsize:
            raise InputError(f"{parts[0].parent}: damaged, its parts have {length:,} bytes; want to delete it")


# -- records and space -------------------------------------------------------------------------------------------------


@contextmanager
def _no_record_of_nothing(folder: Path, ranks: Processes) -> Iterator[None]:
    """Take back a new record of this block if a sampler refuses the model when it begins: no image is there."""
    new, first = not folder.exists(), not (folder / RECORD).exists()
    try:
        yield
    except InputError:
        if first and ranks.first and [file.name for file in folder.glob("*")] == [RECORD]:
            (folder / RECORD).unlink()
            if new:
                atomic.remove_folder(folder)
        raise


def _begin(
    work: _Work, folder: Path, fixed: dict[str, Any] | None = None, remedy: str = "want a new or an empty folder",
    free: dict[str, Any] | None = None, grow: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:  # fmt: skip
    """Check the folder's record, or make it on the first process. Returns what the record says now.

    fixed  what must be as it was, besides how the images are made
    free   what stays as it was, if the folder has a record
    grow   is told the old number of images before the record says the new one
    """
    record = folder / RECORD
    now: dict[str, Any] = {"count": work.n, **work.about, **(fixed or {}), **(free or {})}
    old = _check_record(record, now, list(free or {}), remedy) if record.exists() else now
    now |= {name: old[name] for name in free or {}}
    work.ranks.exchange()  # all have looked
    if work.ranks.first:
        if old["count"] < work.n:
            grow(old["count"])
        atomic.write_json(record, now)
    work.ranks.exchange()  # the record is there
    return now


def _check_record(record: Path, about: dict[str, Any], free: Sequence[str], remedy: str) -> dict[str, Any]:
    """The record. Raises InputError unless the folder's images are made as `about` says, and are no more."""
    try:
        found: dict[str, Any] = parse_json(record.read_bytes())
        old = {name: value for name, value in found.items() if name not in ("count", *free)}
        count, rest = found["count"], [found[name] for name in free]
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{record}: damaged ({type(error).__name__}); {remedy}") from None
    now = json.loads(json.dumps({name: value for name, value in about.items() if name not in ("count", *free)}))
    if differs := [name for name in {**old, **now} if old.get(name) != now.get(name)]:
        raise InputError(
            f"{record.parent}: holds samples with {differs[0]} {old.get(differs[0])!r}, and these have "
            f"{now.get(differs[0])!r}; {remedy}"
        )
    if not isinstance(count, int) or count > about["count"]:
        raise InputError(f"{record.parent}: holds {count} samples; want n of at least that, or another folder")
    if not all(isinstance(value, int) and value > 0 for value in rest):
        raise InputError(f"{record}: damaged; {remedy}")
    return found


def _check_disk(out: Path, n: int, size: int) -> None:
    """Raise InputError if `size` bytes are not free where `out` will be."""
    place = next(p for p in (out.absolute(), *out.absolute().parents) if p.is_dir())
    if size > (free := free_bytes(place)):
        raise InputError(f"n {n}: the images take {gib(size)} or more, and {gib(free)} are free in {place}; want fewer")

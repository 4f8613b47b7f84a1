"""Samples on disk, read batch by batch: finished parts of a measurement, folders of images, .npy and .npz files."""

import zipfile
import zlib
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm.errors import InputError, brief
from ddpm.files import arrays, data, features, tensors
from ddpm.files import images as pictures
from ddpm.presets import Preset


class Samples(Protocol):
    """Images by index. A call of `batch` reads what it needs, and holds no more than a few batches."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> Tensor:
        """The images at these indices, pixels [len(indices), C, H, W]."""


class Parts:
    """The images of files of `parts.compute_parts`, of `size` rows each but in the last."""

    def __init__(self, files: Sequence[Path], size: int, count: int) -> None:
        self._files, self._size, self._count = files, size, count
        self._held: tuple[int, NDArray[Any]] | None = None

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: Sequence[int]) -> Tensor:
        found = []
        for number, group in groupby(indices, lambda i: i // self._size):
            if self._held is None or self._held[0] != number:
                self._held = number, tensors.read_tensors(self._files[number])["images"].numpy()
            found.append(self._held[1][[i - number * self._size for i in group]])
        return torch.from_numpy(np.concatenate(found))


class _Files:
    """Files of a folder, one image each, which must be as the model's are."""

    def __init__(self, files: Sequence[Path], preset: Preset) -> None:
        self._files, self._shape, self._form = files, preset.shape, data.form_of(preset)

    def __len__(self) -> int:
        return len(self._files)

    def batch(self, indices: Sequence[int]) -> Tensor:
        read = self._picture if self._form.is_picture else self._array
        return torch.from_numpy(np.stack([read(self._files[i]) for i in indices])).permute(0, 3, 1, 2)

    def _array(self, file: Path) -> NDArray[Any]:
        array = arrays.read(file, str(file), self._form.pages)
        if array.shape[:2] != self._form.size:
            have = "x".join(map(str, array.shape[:2]))
            raise InputError(f"{file}: {have}; want samples of the model's size, {_size(self._shape)}")
        return self._form.array(array, str(file), {})

    def _picture(self, file: Path) -> NDArray[Any]:
        picture, (channels, height, width) = pictures.read(file), self._shape
        if picture.size != (width, height):
            have = f"{picture.height}x{picture.width}"
            raise InputError(f"{file}: {have}; want samples of the model's size, {_size(self._shape)}")
        if pictures.native(picture) not in (channels, 4) or not pictures.keeps(picture, channels):
            mode = pictures.MODES[channels]
            raise InputError(f"{file}: mode {picture.mode}; want {mode}, as samples of the model have")
        return np.array(pictures.convert(picture, channels, str(file), notes={})).reshape(height, width, -1)


class _Array:
    """An array [N, H, W, C] in memory, or mapped into it."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __len__(self) -> int:
        return len(self.array)

    def batch(self, indices: Sequence[int]) -> Tensor:
        return torch.from_numpy(self.array[list(indices)]).permute(0, 3, 1, 2)


class _Packed:
    """The first array of an .npz file, [N, H, W, C], of which rows are unpacked in order.

    Raises InputError if the file is damaged; for this all of it is read once.
    """

    def __init__(self, path: Path, member: str) -> None:
        self._path, self._member = path, member
        try:
            with zipfile.ZipFile(path) as archive, archive.open(member) as file:
                while file.read(1 << 20):
                    pass  # the end checks the CRC
            self._open()
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError) as fault:
            reason = brief(fault)
            raise InputError(f"{path}: not a whole .npz of plain arrays ({reason})") from fault

    def _open(self) -> None:
        self._file, self._at = zipfile.ZipFile(self._path).open(self._member), 0
        version = np.lib.format.read_magic(self._file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        self.shape, self.in_columns, self.dtype = header(self._file)

    def __len__(self) -> int:
        return int(self.shape[0])

    def batch(self, indices: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.stack([self._row(i) for i in indices])).permute(0, 3, 1, 2)

    def _row(self, i: int) -> NDArray[Any]:
        if i < self._at:
            self._open()
        size = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        self._file.seek((i - self._at) * size, 1)
        self._at = i + 1
        return np.frombuffer(self._file.read(size), self.dtype).reshape(self.shape[1:])


def read_samples(path: Path, preset: Preset) -> Samples:
    """Saved samples of an .npz or .npy that `ddpm sample` wrote, or of a folder of files in natural order of names.

    An image of another shape than the model's is an error, because a resized image would get another score. Raises
    InputError for it, also when it is read, and if there are no images.
    """
    form = data.form_of(preset)
    if path.suffix.lower() not in (".npz", ".npy"):
        if not path.is_dir():
            raise InputError(f"{path}: want an .npz or .npy file of `ddpm sample`, or a folder of images")
        names = data.image_files(path, arrays=not form.is_picture)
        if not names:
            raise InputError(f"{path}: no images in this folder; want samples of {_size(preset.shape)}")
        files = _Files([path / name for name in names], preset)
        files.batch([0])  # raises now for samples of another model
        return files
    found, wanted = _array(path), (*preset.shape[1:], preset.shape[0])
    dtype, shape = found.dtype, found.shape
    if dtype != np.dtype(form.values.dtype) or len(shape) != 4 or shape[1:] != wanted or not shape[0]:
        shown = f"{form.values.dtype} [N, {', '.join(map(str, wanted))}]"
        raise InputError(f"{path}: holds {dtype} {list(shape)}; want {shown}")
    return found


def _array(path: Path) -> "_Array | _Packed":
    """The array of a file, of which rows are read when they are wanted. An array in Fortran's order is read at once."""
    if path.suffix.lower() == ".npy":
        return _Array(arrays.read_npy(path))
    names = features.array_names(path)
    if not names:
        raise InputError(f"{path}: no arrays in it")
    with zipfile.ZipFile(path) as archive:
        member = f"{names[0]}.npy" if f"{names[0]}.npy" in archive.namelist() else ""
    if member:
        packed = _Packed(path, member)
        if not packed.in_columns and not packed.dtype.hasobject:
            return packed
    return _Array(features.read_arrays(path, names[:1])[names[0]])


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]}x{shape[2]}"

"""Tensors on disk: safetensors files, files of torch.save, and a hash that identifies tensors."""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpm.errors import InputError
from ddpm.files import atomic


def sha256_of(data: bytes) -> str:
    """The SHA-256 of bytes, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identity(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of tensors by name, dtype, shape and values, 64 hex digits.

    It does not depend on the file that holds them or on settings, so a renamed setting does not change it.

    >>> a = {"w": torch.zeros(2), "b": torch.ones(())}
    >>> identity(a) == identity(dict(reversed(a.items()))), identity(a) == identity({**a, "w": torch.zeros(2, 1)})
    (True, False)
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a value that is not a finite number, or None.

    >>> not_finite({"a": torch.zeros(2), "b": torch.tensor([1.0, torch.nan])})
    'b'
    """
    for name, value in tensors.items():
        wide = value.float() if value.element_size() == 1 else value  # there is no isfinite for 8-bit floats
        if value.is_floating_point() and not wide.isfinite().all():
            return name
    return None


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file completely or not at all. The same values give the same bytes.

    Raises OSError if that fails, as on a full disk.
    """
    with atomic.temporary(path) as part:
        try:
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, part, dict(metadata or {}))
        except SafetensorError as error:  # safetensors raises it for a full disk, too
            raise OSError(str(error)) from error
        _sort_metadata(part)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file by name, because the library writes them in a random order."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(text) == size
        file.seek(8)
        file.write(text)


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """What safetensors raises for a file that is missing or damaged becomes an InputError of one line."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error})") from error


def read_tensors(path: Path, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or those of these names. Raises InputError if it is not a complete one."""
    with _whole(path):
        if names is None:
            return load_file(path)
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name).clone() for name in names}  # a view would keep the whole file mapped


def each_tensor(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The names and tensors of a safetensors file, one at a time. Raises InputError if it is not a complete one."""
    with _whole(path), safe_open(path, "pt") as file:
        for name in file.keys():
            yield name, file.get_tensor(name)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file. Raises InputError if it is not a complete one."""
    with _whole(path), safe_open(path, "pt") as file:
        return file.metadata() or {}


def read_torch(file: Path) -> Any:
    """What torch.save wrote, if it holds only tensors and plain values. No code of the file runs.

    Raises InputError for any other file.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # which exception torch.load raises depends on the damage
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]  # advice follows in torch's text
        raise InputError(f"{file}: not plain weights ({reason})") from error


def as_state_dict(value: Any) -> dict[str, Tensor]:
    """`value` itself, if it is a state dict, {name: tensor}. Raises InputError if it is not."""
    if not isinstance(value, dict) or not value:
        raise InputError(f"not a state dict but {type(value).__name__}; want names and tensors")
    for name, entry in value.items():
        if not isinstance(entry, Tensor):
            raise InputError(f"{name} is {type(entry).__name__}; want names and tensors")
    return {str(name): entry for name, entry in value.items()}

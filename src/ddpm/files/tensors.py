"""Tensors on disk: safetensors files, whole or not at all, and what identifies their values."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpm.errors import InputError
from ddpm.files import atomic


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identity(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of tensors by name, dtype, shape and values, 64 hex digits.

    Neither the file that holds them nor any setting enters it, so a renamed setting leaves it as it is.

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


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file, whole or not at all, the same bytes for the same values; OSError where the disk is full."""
    with atomic.whole(path) as part:
        try:
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, part, dict(metadata or {}))
        except SafetensorError as error:  # how safetensors says that the disk is full
            raise OSError(str(error)) from error
        _sort_metadata(part)


def _sort_metadata(path: Path) -> None:
    """Put a safetensors file's metadata, which are written in an order of chance, in that of their names."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(text) == size
        file.seek(8)
        file.write(text)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file's tensors; InputError where it is not one."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error})") from error


def read_torch(file: Path) -> Any:
    """What torch.save wrote, if it is of tensors and plain values only; InputError otherwise, and nothing is run."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, by what the bytes are taken for
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]  # torch's goes on with advice
        raise InputError(f"{file}: not plain weights ({reason})") from error


def as_state_dict(given: Any) -> dict[str, Tensor]:
    """`given`, if it is a state dict."""
    if not isinstance(given, dict) or not given:
        raise InputError(f"not a state dict but {type(given).__name__}; want names and tensors")
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise InputError(f"{name} is {type(value).__name__}; want names and tensors")
    return {str(name): value for name, value in given.items()}

"""The codec and files: models with their tables, pictures to files of `ddpm compress` and back."""

import hashlib
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ddpm import kernels
from ddpm.catalog import Precision
from ddpm.codec import Model, archive, container, fit, picture
from ddpm.codec.entropy import Damaged
from ddpm.codec.plan import Tables
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError
from ddpm.files import atomic, images
from ddpm.files.models import Checkpoint, Weights, calibration_file, codec_tables, read_calibration
from ddpm.files.opening import open_checkpoint
from ddpm.run.processes import opened
from ddpm.unet import UNet

BITS = (8, 12, 14)
"""K that `ddpm calibrate` makes tables for, from fast to small."""
_SUFFIX = ".ddpm"


def tables(denoiser: Denoiser, mse: Tensor, some: Tensor, progress: bool = True) -> dict[str, Any]:
    """The codec's tables from errors mse [n, T] and images uint8 [m, C, H, W], as `load_codec` finds them."""
    gain = fit.gains(denoiser, some)
    with tqdm(desc="setting the codec", unit="group", disable=None if progress else True) as bar:
        made = [fit.fit(denoiser, mse, some, gain, bits, lambda _: bar.update()) for bits in BITS]
        chain = fit.fit_chain(denoiser, mse, some, gain)
    return {"tables": [table.to_json() for table in made], "chain": chain.to_json()}


def load_codec(
    path: str | Path,
    device: torch.device | str = "cpu",
    precision: Precision | None = None,
    which: str = "last",
    weights: Weights | None = None,
) -> Model:
    """The codec of a calibrated model, by what `ddpm.load` takes: for `ddpm.codec.compress` and `decompress`.

    precision is the network's in the local profile (None: the run's own, but float32 where bf16 would only be slow).
    mps has no float64: there it runs on the CPU. Raises InputError where there is no model, where it is not one of grey
    or RGB images, and where its codec's tables are not there; `ddpm calibrate` makes them.

    >>> import numpy as np
    >>> from ddpm import codec
    >>> model = load_codec("digits")
    >>> grey = np.full((8, 8, 1), 128, np.uint8)
    >>> data = codec.compress(model, grey, bits=8)
    >>> bool((codec.decompress(model, data) == grey).all())
    True
    """
    device = torch.device("cpu" if torch.device(device).type == "mps" else device)
    found = opened(path, device, weights or "ema", which, precision)
    if weights and found.weights != weights:
        raise InputError(f"--weights {weights}: {found.path} holds the {found.weights} weights; want the run")
    if found.preset.channels not in (1, 3):
        raise InputError(f"{path}: of images with {found.preset.channels} channels; the codec takes grey and RGB")
    read_calibration(found)  # says what is wrong with the file, if anything
    try:
        codec = codec_tables(found) or {}
        by_bits = {t.bits: t for t in map(Tables.from_json, codec["tables"])}
        chain = Tables.from_json(codec["chain"])
    except (KeyError, TypeError, ValueError) as error:
        reason = f" ({error})" if isinstance(error, InputError) else ""
        given = f" --weights {weights}" * bool(weights) + f" --checkpoint {which}" * (which != "last")
        make = f"ddpm calibrate {path}{given}"
        if found.foreign:
            make = f"ddpm import {path} --out FILE.safetensors` and `ddpm calibrate FILE.safetensors"
        raise InputError(f"{calibration_file(found.path)}: no tables for the codec{reason}; want `{make}`") from error
    exact = open_checkpoint(path, weights or "ema", which, "float32").denoiser
    assert isinstance(exact.network, UNet)
    exact.network.double()
    settings = json.dumps([t.to_json() for t in (*by_bits.values(), chain)], sort_keys=True)
    denoiser = found.denoiser.to(device)
    place = denoiser.schedule.alpha_bar.device
    build = _kernels(found) if place.type == "cpu" else ""
    channels, height, width = found.preset.shape
    return Model(
        denoiser, exact.to(device), (channels, height, width), by_bits,
        hashlib.sha256((found.identity + settings).encode()).digest()[:4],
        chain, 2 ** (exact.network.levels - 1), _here(found, place, build), bool(build),
    )  # fmt: skip


def _here(found: Checkpoint, device: torch.device, build: str) -> bytes:
    """Two bytes that name what the local profile hangs on: the kind of machine, the device, the release of torch, the
    build of our kernels."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    about = [device.type, name, torch.__version__, found.preset.precision, build]
    return hashlib.sha256(json.dumps(about).encode()).digest()[:2]


def _kernels(found: Checkpoint) -> str:
    """The kernels of our own that the network runs through on a CPU; empty for none."""
    assert isinstance(found.denoiser.network, UNet)
    return kernels.identity(found.denoiser.network.computes)


def read_image(path: str | Path) -> picture.Image:
    """An image file as uint8 [H, W, C], C of 1 or 3, with nothing lost. InputError for more than that holds."""
    image = images.read(path)
    channels, deep = images.native(image), image.info.get("deep") or image.mode.startswith(("I", "F"))
    if deep or channels == 4:
        what = "more than 8 bits a channel" if deep else "transparency"
        raise InputError(f"{path}: has {what}, which the codec would lose; want 8-bit grey or RGB")
    if image.mode not in ("1", "L", "P", "RGB"):
        raise InputError(f"{path}: mode {image.mode}; want 8-bit grey or RGB")
    pixels = np.asarray(images.convert(image, channels, str(path), notes={}))
    return pixels.reshape(*pixels.shape[:2], channels)


def compress(
    model: Model, paths: Sequence[Path], out: Path, archived: bool = False, progress: bool = True, **settings: Any
) -> list[dict[str, Any]]:
    """Image files to one file each, or to one archive; what came of each. `settings` are `codec.compress`'s.

    out is a file for one image or an archive, and a folder for more. Everything is read before anything is written.
    """
    found = [read_image(path) for path in paths]
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{twice}: the name of two images; want names that differ")
    bar = tqdm(total=len(found), desc="compressing", unit="image", disable=None if progress else True)
    with bar:
        if archived:
            data = archive.compress(model, found, names, tick=lambda done: bar.update(done - bar.n), **settings)
            atomic.write(out, data)
            return [_about(str(out), data, sum(image.size for image in found), len(found))]
        written = []
        for name, image, data in zip(names, found, picture.compress_each(model, found, **settings), strict=True):
            target = out if len(found) == 1 and not out.is_dir() else out / f"{name}{_SUFFIX}"
            atomic.write(target, data)
            written.append(_about(str(target), data, image.size, 1))
            bar.update()
    return written


def _about(name: str, data: bytes, dims: int, count: int) -> dict[str, Any]:
    return {"file": name, "images": count, "bytes": len(data), "bits_per_dim": round(8 * len(data) / dims, 4)}


def decompress(model: Model, path: Path, out: Path, at: int | None = None) -> dict[str, Any]:
    """A file of `compress` to a PNG, or an archive to a folder of them; what came of it."""
    data = read(path)
    with _of(path):
        agrees = model_agrees(model, data)
    if not agrees:
        warn = f"{path}: written in the local profile on another machine, device or release; it may not decode here"
        tqdm.write(f"warning: {warn}", file=sys.stderr)
    if container.is_archive(data):
        if at is not None:
            raise InputError(f"--at {at}: {path} is an archive, which cannot be read in part")
        with _of(path):
            made = list(archive.decompress(model, data))
        taken: set[str] = set()
        for number, (name, image) in enumerate(made):
            safe = _safe(name)
            while not safe or safe.casefold() in taken:  # as two names may look on some file system
                safe = f"{safe}{number:0{len(str(len(made)))}d}"
            taken.add(safe.casefold())
            images.save(out / f"{safe}.png", image)
        return {"out": str(out), "images": len(made), "exact": True}
    with _of(path):
        *_, last = picture.pictures(model, data, at)
    images.save(out, last.image)
    about = {name: value for name, value in last._asdict().items() if name != "image"}
    return {"out": str(out), "images": 1, **about}


def _safe(name: str) -> str:
    """A name out of a file, which may try to leave the folder."""
    return "".join(c if c.isalnum() or c in "-_. " else "_" for c in name).strip(". ")[:200]


def model_agrees(model: Model, data: bytes) -> bool:
    """Whether a file was written here, or in the portable profile, where it does not matter."""
    header, _ = container.read_contents(data) if container.is_archive(data) else container.read_header(data)
    return not header.local or header.where == model.where


@contextmanager
def _of(path: Path) -> Iterator[None]:
    """What is wrong with a file names it."""
    try:
        yield
    except Damaged as error:
        raise InputError(f"{path}: {error}") from error


def read(path: Path) -> bytes:
    """The bytes of a file; InputError where there is none."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}, want a file of `ddpm compress`") from error


def _state(data: bytes, length: int) -> str:
    """Whether a file is as it was written, by its length and its CRC-32."""
    if len(data) != length:
        return f"{length - len(data)} bytes are missing" if len(data) < length else f"{len(data) - length} bytes more"
    return "whole" if container.intact(data) else "damaged"


def inspect(path: Path, model: Model | None = None) -> dict[str, Any]:
    """What a file says of itself; with its model, what each group takes and shows."""
    data = read(path)
    if container.is_archive(data):
        with _of(path):
            contents, size = container.read_contents(data)
        return {
            "file": str(path), "kind": "archive", "bytes": len(data), "pictures": contents.pictures,
            "profile": "local" if contents.local else "portable", "chunk_bits": contents.bits,
            "model": contents.identity.hex(), "header_bytes": size, "names_bytes": contents.about,
            "stack_bytes": contents.stack, "files": contents.files, "files_bytes": contents.file_bytes,
            "state": _state(data, size + contents.about + contents.stack + 8),
        }  # fmt: skip
    with _of(path):
        header, size = container.read_header(data)
    about: dict[str, Any] = {
        "file": str(path), "kind": "lossless" if header.lossless else "lossy", "bytes": len(data),
        "bits_per_dim": round(8 * len(data) / (header.width * header.height * header.channels), 4),
        "width": header.width, "height": header.height, "channels": header.channels,
        "profile": "local" if header.local else "portable", "tiles_of": "picture" if header.whole else "model",
        "chunk_bits": header.bits, "model": header.identity.hex(), "seed": header.seed, "groups": header.groups,
        "header_bytes": size, "payload_bytes": header.length, "checksum_bytes": header.trailer,
        "state": _state(data, size + header.length + header.trailer),
    }  # fmt: skip
    if model is not None:
        with _of(path):
            about["by_group"] = [row._asdict() for row in picture.group_costs(model, data)]
    return about

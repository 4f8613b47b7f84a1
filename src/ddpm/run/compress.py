"""Open a model's codec, and turn picture files into compressed files and back."""

import copy
import hashlib
import json
import platform
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm import kernels
from ddpm.catalog import Precision
from ddpm.codec import Model, archive, container, fit, picture
from ddpm.codec.entropy import Damaged
from ddpm.codec.plan import Tables
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError
from ddpm.files import animation, atomic, images
from ddpm.files.models import (
    Checkpoint,
    Weights,
    calibration_file,
    calibration_remedy,
    codec_tables,
    read_calibration,
    why_no_codec,
    without_condition,
)
from ddpm.run.processes import Processes, open_for_device
from ddpm.run.progress import Progress
from ddpm.unet import UNet

BITS = (8, 12, 14)
"""Bits per chunk, K, that `ddpm calibrate` fits tables for: from the fastest to the smallest files."""
_SUFFIX = ".ddpm"
_ALONE = Processes(0, 1, torch.device("cpu"))


def fit_tables(denoiser: Denoiser, mse: Tensor, examples: Tensor, progress: bool = True) -> dict[str, Any]:
    """Fit the codec's tables; returns the JSON values that `load_codec` reads.

    mse       squared errors of x0^ at levels 1..T, float64 [n, T]
    examples  training images, uint8 [m, C, H, W]
    """
    gain = fit.gains(denoiser, examples)
    with Progress[None](desc="fitting the codec", unit="group", show=progress) as bar:
        tables = [fit.fit(denoiser, mse, examples, gain, bits, lambda _: bar.update()) for bits in BITS]
        chain = fit.fit_chain(denoiser, mse, examples, gain)
    return {"tables": [table.to_json() for table in tables], "chain": chain.to_json()}


def load_codec(
    path: str | Path,
    device: torch.device | str = "cpu",
    precision: Precision | None = None,
    which: str = "last",
    weights: Weights | None = None,
) -> Model:
    """Open a calibrated model for `ddpm.codec.compress` and `decompress`.

    path       everything that `ddpm.load` takes
    device     mps has no float64, so the codec runs on the CPU instead
    precision  of the network in the local profile; None is the run's own, but float32 if the device has no fast bf16
    which      checkpoint of a run: last, best or a step
    weights    ema or raw; None is ema for a run, and for a file what it holds

    Raises InputError if there is no model, if its images are neither grey nor RGB, and if it has no codec tables
    (`ddpm calibrate` makes them).

    >>> import numpy as np
    >>> from ddpm import codec
    >>> model = load_codec("digits")
    >>> grey = np.full((8, 8, 1), 128, np.uint8)
    >>> data = codec.compress(model, grey, bits=8)
    >>> bool((codec.decompress(model, data) == grey).all())
    True
    """
    device = torch.device("cpu" if torch.device(device).type == "mps" else device)
    checkpoint = without_condition(open_for_device(path, device, weights, which, precision), "the codec")
    if reason := why_no_codec(checkpoint):
        raise InputError(f"{path}: {reason}")
    read_calibration(checkpoint)  # raises if the file is damaged
    try:
        stored = codec_tables(checkpoint) or {}
        by_bits = {t.bits: t for t in map(Tables.from_json, stored["tables"])}
        chain = Tables.from_json(stored["chain"])
    except (KeyError, TypeError, ValueError) as error:
        reason = f" ({error})" if isinstance(error, InputError) else ""
        options = f" --weights {weights}" * bool(weights) + f" --checkpoint {which}" * (which != "last")
        remedy = f"`ddpm calibrate {path}{options}`"
        if checkpoint.foreign:
            remedy = f"`ddpm import {path} --out FILE.safetensors` and `ddpm calibrate FILE.safetensors`"
        raise InputError(
            f"{calibration_file(checkpoint.path)}: no tables for the codec{reason}; "
            f"{calibration_remedy(checkpoint, f'want {remedy}')}"
        ) from error
    network = copy.deepcopy(checkpoint.denoiser.network)
    assert isinstance(network, UNet)
    network.bf16 = False
    exact = replace(checkpoint.denoiser, network=network.double())
    all_tables = json.dumps([t.to_json() for t in (*by_bits.values(), chain)], sort_keys=True)
    denoiser = checkpoint.denoiser.to(device)
    device = denoiser.device  # with its index
    build = _kernel_build(checkpoint) if device.type == "cpu" else ""
    channels, height, width = checkpoint.preset.shape
    return Model(
        denoiser, exact.to(device), (channels, height, width), by_bits,
        hashlib.sha256((checkpoint.identity + all_tables).encode()).digest()[:4],
        chain, 2 ** (network.levels - 1), _environment(checkpoint, device, build), bool(build),
    )  # fmt: skip


def _environment(checkpoint: Checkpoint, device: torch.device, build: str) -> bytes:
    """Two bytes that name what the bits of the local profile depend on: machine, device, torch, precision, kernels."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    facts = [device.type, name, torch.__version__, checkpoint.preset.precision, build]
    return hashlib.sha256(json.dumps(facts).encode()).digest()[:2]


def _kernel_build(checkpoint: Checkpoint) -> str:
    """The name of the kernels that the network uses on a CPU; empty if PyTorch computes it."""
    assert isinstance(checkpoint.denoiser.network, UNet)
    return kernels.identity(checkpoint.denoiser.network.computes)


def read_image(source: str | Path | bytes) -> picture.Image:
    """Read an image file, or the bytes of one, as uint8 [H, W, C], where C is 1 or 3.

    Warns of a colour profile, which is not kept. Raises InputError if the file has more: a transparent part, more than
    8 bits per channel, or several pictures.
    """
    path = "the image" if isinstance(source, bytes) else str(source)
    image = images.read(source, path)
    extra = {
        "more than 8 bits per channel": image.info["deep"] or image.mode == "F",
        "transparency": images.alpha(image) is not None,
        "several pictures": image.info["several"],
    }
    if lost := [what for what, is_there in extra.items() if is_there]:
        raise InputError(
            f"{path}: has {' and '.join(lost)}, which the codec would lose; want one 8-bit grey or RGB picture"
        )
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        raise InputError(f"{path}: mode {image.mode}; want 8-bit grey or RGB")
    if image.info.get("icc_profile"):
        warnings.warn(f"{path}: its colour profile is not kept; its pixel values are", stacklevel=2)
    channels = 1 if image.mode in ("1", "L", "LA") else 3
    array = np.asarray(images.convert(image, channels, path, notes={}))
    return array.reshape(*array.shape[:2], channels)


def compress(
    model: Model, paths: Sequence[Path], out: Path, archived: bool = False, progress: bool = True,
    ranks: Processes = _ALONE, **settings: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """Compress image files to one file each, or to one archive. `settings` are those of `codec.compress`.

    `out` is a file for one image or an archive, and a folder for several images. All images are read before anything is
    written, so that a mistake in one shows at once. The images of single files are divided over the processes, and each
    holds one image at a time. An archive is made by the first process, which holds all images. Returns one summary per
    file as plain JSON values; none for an archive on the other processes.
    """
    names = [path.stem for path in paths]
    taken = names if archived else [name.casefold() for name in names]  # some file systems ignore case
    if len(set(taken)) < len(taken):
        twice = next(name for name, safe in zip(names, taken, strict=True) if taken.count(safe) > 1)
        raise InputError(f"{twice}: two images have this name, in small or capital letters; want different names")
    if archived:
        if not ranks.first:
            return []
        pictures = [read_image(path) for path in paths]
        with Progress[None](total=len(pictures), desc="compressing", unit="image", show=progress) as bar:
            data = archive.compress(model, pictures, names, tick=lambda done: bar.update(done - bar.n), **settings)
        atomic.write(out, data)
        return [_summary(out, len(data), sum(image.size for image in pictures), len(pictures))]
    sizes, work = [], []
    for image in map(read_image, paths):
        sizes.append(image.size)
        work.append(picture.work(model, image, **settings))
    single = len(paths) == 1 and not out.is_dir()
    targets = [out if single else out / f"{name}{_SUFFIX}" for name in names]
    mine, written = ranks.mine(len(paths)), []
    with _counting(model, "compressing", [work[i] for i in mine], progress) as model:
        files = picture.compress_each(model, (read_image(paths[i]) for i in mine), **settings)
        for i, data in zip(mine, files, strict=True):
            atomic.write(targets[i], data)
            written.append((i, len(data)))
    lengths = dict(pair for some in ranks.exchange(written) for pair in some)  # when all are written
    return [_summary(target, lengths[i], size, 1) for i, (target, size) in enumerate(zip(targets, sizes, strict=True))]


@contextmanager
def _counting(model: Model, what: str, work: Sequence[tuple[int, int]], progress: bool) -> Iterator[Model]:
    """The model with a bar of the tiles that its network sees, and of the time left. `work` is as of `picture.work`."""
    tiles, total = sum(tiles for tiles, _ in work), sum(tiles * times for tiles, times in work)
    form = "{l_bar}{bar}| {elapsed} so far, {remaining} left"
    what = f"{what}, {tiles:,} tile{'s' * (tiles != 1)}"
    with Progress[None](total=total, desc=what, unit="call", form=form, show=progress, leave=False) as bar:
        yield replace(model, tick=bar.update)


def _summary(file: Path, length: int, dims: int, count: int) -> dict[str, Any]:
    return {"file": str(file), "images": count, "bytes": length, "bits_per_dim": round(8 * length / dims, 4)}


def decompress(model: Model, path: Path, out: Path, at: int | None = None, progress: bool = False) -> dict[str, Any]:
    """Write the picture of a compressed file as the PNG `out`, or those of an archive as PNGs in the folder `out`.

    If the name `out` ends in .gif, .webp or .mp4, an animation shows how the picture develops while the file is read.

    `at` reads only the first `at` bytes of the file. Returns a summary as plain JSON values. Warns about a file that
    may not decode here, and raises InputError for one that does not.
    """
    data = read_file(path)
    with naming(path):
        decodes = decodes_here(model, data)
    if not decodes:
        elsewhere = "written in the local profile on another machine, device or release"
        warnings.warn(f"{path}: {elsewhere}; it may not decode here", stacklevel=2)
    if container.is_archive(data):
        if at is not None:
            raise InputError(f"at {at}: {path} is an archive, which cannot be read in part")
        with naming(path):
            pictures = list(archive.decompress(model, data))
        taken: set[str] = set()
        for number, (name, image) in enumerate(pictures):
            safe = _safe_name(name)
            while not safe or safe.casefold() in taken:  # some file systems ignore case
                safe = f"{safe}{number:0{len(str(len(pictures)))}d}"
            taken.add(safe.casefold())
            images.save(out / f"{safe}.png", image)
        return {"out": str(out), "images": len(pictures), "exact": True}
    if animation.is_animation(out):
        with naming(path):
            header, _ = container.read_header(data)
        animation.check_size(out, 1, header.height, header.width)
    with naming(path), _counting(model, "decompressing", [picture.work(model, data)], progress) as model:
        frames = []
        for last in picture.pictures(model, data, at):
            frames += [last.image[None]] * animation.is_animation(out)
    if frames:
        animation.save(out, [frames[i] for i in animation.spread(len(frames))])
    else:
        images.save(out, last.image)
    summary = {name: value for name, value in last._asdict().items() if name != "image"}
    return {"out": str(out), "images": 1, **summary}


def _safe_name(name: str) -> str:
    """A file name from an archive, without characters that could lead out of the folder."""
    return "".join(c if c.isalnum() or c in "-_. " else "_" for c in name).strip(". ")[:200]


def decodes_here(model: Model, data: bytes) -> bool:
    """Whether a file decodes with this model on this machine: it is portable, or was written on such a machine."""
    header, _ = container.read_contents(data) if container.is_archive(data) else container.read_header(data)
    return not header.local or header.where == model.where


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Put the path, or what a file is called, before the message of a `Damaged` error."""
    try:
        yield
    except Damaged as error:
        raise InputError(f"{path}: {error}") from error


def read_file(path: Path) -> bytes:
    """The bytes of a file. Raises InputError if it cannot be read."""
    if path.exists() and not (path.is_file() or path.is_dir()):  # reading it might never end
        raise InputError(f"{path}: a pipe or a device; want a file of `ddpm compress`")
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}; want a file of `ddpm compress`") from error


def _state(data: bytes, length: int) -> str:
    """Whether a file of this length by its header is whole, by its true length and its CRC-32."""
    if len(data) < length:
        return f"{length - len(data)} bytes are missing"
    if len(data) > length:
        return f"{len(data) - length} bytes too many"
    return "whole" if container.intact(data) else "damaged"


def inspect(path: Path, model: Model | None = None) -> dict[str, Any]:
    """The header of a compressed file as plain JSON values.

    With the model that wrote it, by_group also lists each group's bits, and the error of x0^ before it.
    """
    data = read_file(path)
    if container.is_archive(data):
        with naming(path):
            contents, size = container.read_contents(data)
        return {
            "file": str(path), "kind": "archive", "bytes": len(data), "pictures": contents.pictures,
            "profile": "local" if contents.local else "portable", "chunk_bits": contents.bits,
            "model": contents.identity.hex(), "header_bytes": size, "names_bytes": contents.about,
            "stack_bytes": contents.stack, "files": contents.files, "files_bytes": contents.file_bytes,
            "state": _state(data, size + contents.about + contents.stack + 8),
        }  # fmt: skip
    with naming(path):
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
        with naming(path):
            about["by_group"] = [row._asdict() for row in picture.group_costs(model, data)]
    return about

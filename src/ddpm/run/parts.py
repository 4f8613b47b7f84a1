"""What is measured or made in parts that are kept, so that the same command goes on where it stopped."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ddpm import noise, pixels
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError
from ddpm.files import data, tensors
from ddpm.files import images as pictures
from ddpm.files.models import Checkpoint
from ddpm.run.processes import Processes
from ddpm.version import __version__

CALIBRATION, SUBSET = 0xCA1B, 0x5B5E7
"""Keys that keep the draws of these apart from others of the same seed."""


def subset(images: data.Images, count: int | None) -> list[int]:
    """`count` of the images, ever the same and of a larger count the first, in no order; None: all."""
    return torch.randperm(len(images), generator=noise.generator(SUBSET)).tolist()[:count]


def as_signal(images: data.Images, rows: Sequence[int]) -> Tensor:
    """These images as x_0; InputError where they are not 8-bit by nature."""
    x0 = pixels.to_signal(images.batch(rows))
    if pictures.DEEP in images.notes:
        first, _ = images.notes[pictures.DEEP]
        raise InputError(
            f"{first}: {pictures.DEEP}; bits per dimension (Eq. 13) are of 256 grey levels, and of its 8-bit version "
            "they are not those of the image; want 8-bit images"
        )
    return x0


def batches(
    images: data.Images, rows: Sequence[int], ranks: Processes, batch_size: int, what: str, progress: bool
) -> Iterator[tuple[slice, list[int], Tensor]]:
    """This process's share of the images `rows`, every so many: their places in `rows`, themselves, x_0."""
    starts = range(0, len(rows), batch_size)
    with progress_bar(len(ranks.mine(len(starts))), what, "batch", progress) as bar:
        for i in ranks.mine(len(starts)):
            places = slice(starts[i], min(starts[i] + batch_size, len(rows)))
            yield places, list(rows[places]), as_signal(images, rows[places]).to(ranks.device)
            bar.update()


def progress_bar(total: int, what: str, unit: str, progress: bool) -> "tqdm[Any]":
    return tqdm(total=total, desc=what, unit=unit, disable=None if progress else True)


def draws_of(seed: int, images: Sequence[int], draw: int, key: int, shape: Sequence[int]) -> noise.Noise:
    """The noise of these images of a data set: a function of (seed, image, draw, level), not of the batch."""
    return noise.per_image([noise.mix(seed, image, draw, key) for image in images], shape)


def parts_folder(cache: Path, name: str, about: Sequence[Any]) -> Path:
    """Where parts of something that is made bit by bit are kept, by all that they depend on."""
    digest = hashlib.sha256(json.dumps([*about, __version__]).encode()).hexdigest()
    return cache / f"{name}-{digest[:16]}"


def in_parts(
    folder: Path, count: int, ranks: Processes, batch_size: int, what: str, progress: bool,
    make: Callable[[slice], dict[str, Tensor]],
) -> list[Path]:  # fmt: skip
    """Files of make(rows) for all of 0..count-1, every so many: those that are not there yet, split over processes."""
    parts = [slice(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    files = [folder / f"{rows.start:08d}-{rows.stop:08d}.safetensors" for rows in parts]
    with progress_bar(len(ranks.mine(len(parts))), what, "batch", progress) as bar:
        try:
            for i in ranks.mine(len(parts)):
                if not files[i].is_file():
                    tensors.save_tensors(files[i], make(parts[i]))
                bar.update()
        except KeyboardInterrupt:
            raise KeyboardInterrupt("whole batches that were done are kept, the same command goes on") from None
    ranks.any(False)  # all parts are there
    return files


def joined(files: Sequence[Path]) -> dict[str, Tensor]:
    """The rows of all parts, by name."""
    try:
        parts = [tensors.read_tensors(file) for file in files]
    except InputError as error:
        raise InputError(f"{error}; delete it, and it is made again") from error
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def model_key(found: Checkpoint) -> list[Any]:
    """What a measurement of a model depends on: its weights, and how its denoiser reads them."""
    denoiser = found.denoiser
    levels = [denoiser.schedule.alpha_bar.tolist(), denoiser.schedule.timestep.tolist()]
    return [found.identity, found.preset.precision, denoiser.predict, denoiser.clip, variance_key(denoiser), levels]


def variance_key(denoiser: Denoiser) -> Any:
    """Which one, for a key: a name or a list of numbers."""
    return denoiser.variance.tolist() if isinstance(denoiser.variance, Tensor) else denoiser.variance

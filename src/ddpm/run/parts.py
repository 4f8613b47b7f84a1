"""Measurements in stored parts, so that the same command resumes where it stopped, and their images and noise."""

import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm import noise, pixels
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError
from ddpm.files import data, tensors
from ddpm.files import images as pictures
from ddpm.files.models import Checkpoint
from ddpm.guidance import Guided
from ddpm.presets import to_json
from ddpm.run.processes import Processes
from ddpm.run.progress import Progress
from ddpm.unet import UNet
from ddpm.version import __version__

CALIBRATION, SUBSET = 0xCA1B, 0x5B5E7
"""Keys of random draws: of `calibrate`, and of `subset`. They keep these draws apart from others of the same seed."""


def subset(images: data.Images, count: int | None) -> list[int]:
    """Indices of a fixed random subset of `count` images (None: all); smaller subsets are prefixes of larger ones.

    >>> digits = data.load("digits", (8, 8), 1)
    >>> subset(digits, 2) == subset(digits, 5)[:2]
    True
    """
    return torch.randperm(len(images), generator=noise.generator(SUBSET)).tolist()[:count]


def state_of(images: data.Images, ranks: Processes) -> str:
    """What all processes store measurements of these images by: `Images.state` of the first one."""
    return str(ranks.exchange(images.state)[0])


def as_signal(images: data.Images, indices: Sequence[int]) -> Tensor:
    """The images of these indices as x_0 in [-1, 1], float32 [len(indices), C, H, W].

    Raises InputError if one of them has more than 8 bits per channel.
    """
    x0 = pixels.to_signal(images.batch(indices), images.values)
    if pictures.DEEP in images.notes:
        first, _ = images.notes[pictures.DEEP]
        raise InputError(
            f"{first}: {pictures.DEEP}; bits per dimension (Eq. 13) are defined for 256 grey levels, and those of an "
            "8-bit copy are not those of the image; want 8-bit images"
        )
    return x0


def labels_of(
    checkpoint: Checkpoint, images: data.Images, indices: Sequence[int], device: torch.device
) -> Tensor | None:
    """The model's labels of these images, int64 [len(indices)] on `device`, or None if it can do without labels.

    A model that never saw an image without its label has a likelihood only given the label. Raises InputError as
    `classes_of` does.
    """
    return classes_of(checkpoint, images, indices).to(device) if checkpoint.preset.always_labelled else None


def classes_of(checkpoint: Checkpoint, images: data.Images, indices: Sequence[int]) -> Tensor:
    """The model's labels of these images, int64 [len(indices)].

    Raises InputError if the images have no labels, or classes that the model does not have.
    """
    names, known = images.class_names, checkpoint.preset.class_names
    if images.labels is None or names is None:
        raise InputError(
            f"{images.name}: {images.split} has no labels, which {checkpoint.path} needs; want labelled images"
        )
    labels = images.labels[list(indices)].tolist()
    if unknown := sorted({names[label] for label in labels} - set(known)):
        raise InputError(f"{images.name}: has the class {unknown[0]}, which {checkpoint.path} does not have")
    return torch.tensor([known.index(names[label]) for label in labels])


def batches(
    images: data.Images, indices: Sequence[int], ranks: Processes, batch_size: int, title: str, progress: bool
) -> Iterator[tuple[slice, list[int], Tensor]]:
    """This process's share of the images of these indices, in batches of at most `batch_size`.

    Yields (part, indices[part], x_0 on the process's device). `title` names the progress bar.
    """
    parts = _parts(len(indices), batch_size)
    with _progress_bar(parts, ranks, title, progress) as bar:
        for i in ranks.mine(len(parts)):
            batch = list(indices[parts[i]])
            yield parts[i], batch, as_signal(images, batch).to(ranks.device)
            bar.update(len(batch))
    ranks.exchange()  # wait for the other processes as long as they live: a collective call waits for minutes only


def _parts(count: int, batch_size: int) -> list[slice]:
    """0..count-1 in slices of `batch_size`; the last may be shorter."""
    return [slice(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]


def _progress_bar(parts: Sequence[slice], ranks: Processes, title: str, progress: bool) -> Progress[None]:
    mine = sum(parts[i].stop - parts[i].start for i in ranks.mine(len(parts)))
    return Progress(total=mine, desc=title, unit="image", show=progress)


def image_noise(seed: int, indices: Sequence[int], draw: int, key: int, shape: Sequence[int]) -> noise.Noise:
    """The noise of the images of these indices: a function of (seed, index, draw, key, level), not of the batch.

    >>> both, second = (image_noise(0, indices, 0, CALIBRATION, (1, 8, 8))(5) for indices in ([3, 4], [4]))
    >>> torch.equal(both[1], second[0])
    True
    """
    return noise.per_image([noise.mix(seed, index, draw, key) for index in indices], shape)


def parts_folder(cache: Path, name: str, about: Sequence[Any]) -> Path:
    """The folder for parts of the work `name`. `about` is what they depend on besides the code, as JSON values."""
    digest = hashlib.sha256(json.dumps([*about, _code()]).encode()).hexdigest()
    return cache / f"{name}-{digest[:16]}"


@functools.cache
def _code() -> str:
    """A hash of this package without its command line: parts that other code made are not read."""
    package, digest = Path(__file__).parents[1], hashlib.sha256(__version__.encode())
    for file in sorted(package.rglob("*")):
        name = file.relative_to(package).as_posix()
        if file.suffix in (".py", ".c", ".h") and not name.startswith("cli/"):
            content = file.read_bytes()
            digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def compute_parts(
    folder: Path, count: int, ranks: Processes, batch_size: int, title: str, progress: bool,
    make: Callable[[slice], dict[str, Tensor]],
) -> list[Path]:  # fmt: skip
    """Store make(part) for every part of 0..count-1, in files under `folder`, and return these in order.

    A part has at most `batch_size` rows. Files that are whole, by a hash in them, are not made again. The rest is split
    over the processes, and all files exist when the function returns. `title` names the progress bar.
    """
    parts = _parts(count, batch_size)
    files = [folder / f"{part.start:08d}-{part.stop:08d}.safetensors" for part in parts]
    with _progress_bar(parts, ranks, title, progress) as bar:
        try:
            for i in ranks.mine(len(parts)):
                if not _is_whole(files[i]):
                    values = make(parts[i])
                    tensors.save_tensors(files[i], values, {_HASH: tensors.identity(values)})
                bar.update(parts[i].stop - parts[i].start)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("finished batches are kept; the same command resumes") from None
    ranks.exchange()  # wait for the parts of the other processes
    return files


_HASH = "sha256"
"""The name of the hash of a part's tensors in its file."""


def _is_whole(file: Path) -> bool:
    """Whether a part exists with the values that were written. Warns of a damaged one."""
    if not file.exists():
        return False
    with suppress(InputError):
        if tensors.read_metadata(file).get(_HASH) == tensors.identity(tensors.read_tensors(file)):
            return True
    warnings.warn(f"{file}: damaged; it is made again", stacklevel=2)
    return False


def read_parts(files: Sequence[Path], names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """The tensors of all parts that `compute_parts` returned, by name, joined along the first dimension.

    names  which tensors; None: all
    """
    parts = [tensors.read_tensors(file, names) for file in files]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def sum_parts(files: Sequence[Path], names: Sequence[str]) -> dict[str, Tensor]:
    """The sums over all rows of the tensors of these names, float64, from one part at a time.

    The order of the sums is that of the parts, so the result does not depend on the number of processes.
    """
    total: dict[str, Tensor] = {}
    for file in files:
        for name, value in tensors.read_tensors(file, names).items():
            total[name] = total.get(name, 0) + value.double().sum(0)
    return total


def model_key(checkpoint: Checkpoint) -> list[Any]:
    """What a measurement of a model depends on, as JSON values: its weights, and how its denoiser uses them."""
    denoiser = checkpoint.denoiser
    levels = [denoiser.schedule.alpha_bar.tolist(), denoiser.schedule.timestep.tolist()]
    precision, details = checkpoint.preset.precision, to_json(checkpoint.preset).get("details")
    condition = [] if checkpoint.preset.condition == "none" else [checkpoint.preset.condition]
    key = [checkpoint.identity, *condition, precision, denoiser.predict, denoiser.clip, variance_key(denoiser), levels]
    key += guidance_key(denoiser)
    return [*key, details] if details else key


def guidance_key(denoiser: Denoiser) -> list[Any]:
    """The guidance of a denoiser as JSON values; [] without guidance.

    They are the scale, the interval, and of a guide the weights and the precision.
    """
    network = denoiser.network
    if not isinstance(network, Guided):
        return []
    guide = network.guide
    weights = [tensors.identity(guide.state_dict()), str(guide.computes)] if isinstance(guide, UNet) else []
    return [network.scale, network.first, network.last, *weights]


def variance_key(denoiser: Denoiser) -> Any:
    """The variance of a denoiser as a JSON value: a name, or a list of numbers."""
    return denoiser.variance.tolist() if isinstance(denoiser.variance, Tensor) else denoiser.variance

"""Edit images with a model: redraw them from a noise level, interpolate between two, and inpaint under a mask.

Each edit has two functions: one prepares it and returns a `Batch`, whose steps can be watched, and the other makes all
images of it.
"""

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ddpm import editing, kernels, pixels
from ddpm.errors import InputError
from ddpm.files import arrays, data, images
from ddpm.files.models import Checkpoint
from ddpm.noise import Noise, mix, per_image
from ddpm.pixels import Values
from ddpm.presets import Preset
from ddpm.run.progress import Progress
from ddpm.run.sample import cycled_labels, sampler_levels
from ddpm.samplers import SAMPLERS, Step, named

Source: TypeAlias = str | Path | bytes
"""An image file: its path, or its bytes."""
Batch: TypeAlias = Callable[[range], Iterator[Step]]
"""batch(places) gives the steps of the images at these places of a series, which end with the images themselves."""


@dataclass(frozen=True)
class SamplingSettings:
    """How an edit runs the reverse process.

    sampler     a name in SAMPLERS
    steps       the number of noise levels to visit; None is the sampler's own
    spacing     a name in `sample.SPACING_NAMES`; None is the sampler's own
    classes     labels, over which the images cycle; empty for no label
    batch_size  images at a time; no result depends on it
    """

    sampler: str = "ancestral"
    steps: int | None = None
    spacing: str | None = None
    classes: tuple[int, ...] = ()
    batch_size: int = 64

    def levels(self, checkpoint: Checkpoint, start: int) -> list[int]:
        """The levels to visit, in rising order up to `start`; none for 0. Raises InputError if `start` is not 0..T."""
        T = checkpoint.denoiser.schedule.T
        if not 0 <= start <= T:
            raise InputError(f"t {start}: want 0 to {T}")
        return sampler_levels(checkpoint, self.sampler, self.steps, self.spacing, start) if start else []

    def labels(self, places: range, device: torch.device) -> Tensor | None:
        """The labels of the images at these places, int64 [len(places)]; None without classes."""
        y = cycled_labels(self.classes, places)
        return None if y is None else y.to(device)

    def images(self, n: int, batch: Batch, values: Values, progress: bool) -> Tensor:
        """The first `n` images, pixels [n, C, H, W], `batch_size` at a time."""
        with kernels.frozen():
            batches = (batch(range(n)[i : i + self.batch_size]) for i in range(0, n, self.batch_size))
            return torch.cat([_last(steps, values, progress) for steps in batches])

    def versions(self, x: Tensor, seed: int, sample: Callable[[Tensor, Noise, Tensor | None], Iterator[Step]]) -> Batch:
        """Versions of x [1, C, H, W], each with its own seed and label; sample(x, noise, y) gives the steps of some."""

        def batch(places: range) -> Iterator[Step]:
            noise = per_image([seed + place for place in places], x.shape[1:], x.device)
            return sample(x.expand(len(places), -1, -1, -1), noise, self.labels(places, x.device))

        return batch


def redraw(
    checkpoint: Checkpoint,
    image: Source,
    n: int = 1,
    t: int | None = None,
    settings: SamplingSettings = SamplingSettings("ddim"),
    seed: int = 0,
    iterations: int = 0,
    progress: bool = True,
) -> Tensor:
    """`n` versions of an image, sampled from its x_t at noise level t (None: T/2): pixels [n, C, H, W].

    The other arguments, and what is raised, are those of `redrawing`.
    """
    batch = redrawing(checkpoint, image, n, t, settings, seed, iterations)
    return settings.images(n, batch, checkpoint.denoiser.values, progress)


def redrawing(
    checkpoint: Checkpoint,
    image: Source,
    n: int = 1,
    t: int | None = None,
    settings: SamplingSettings = SamplingSettings("ddim"),
    seed: int = 0,
    iterations: int = 0,
) -> Batch:
    """`n` versions of an image, sampled from its x_t at noise level t (None: T/2).

    With iterations 0, x_t is drawn from q(x_t | x_0) with the seeds seed, seed + 1, and so on (SDEdit). Otherwise DDIM
    is inverted without a label, with so many iterations per level, and x_t is the same for all versions.

    Raises InputError for a file that is no image, for t or steps out of range, and in an inversion for a sampler that
    draws noise and for more versions than classes.
    """
    T, device = checkpoint.denoiser.schedule.T, checkpoint.denoiser.device
    t = T // 2 if t is None else t
    x0 = signal(image, checkpoint).to(device)[None]
    levels, run = settings.levels(checkpoint, t), named(settings.sampler).run
    if iterations == 0:

        def noised(x: Tensor, noise: Noise, y: Tensor | None) -> Iterator[Step]:
            return editing.redraw(checkpoint.denoiser, x, t, noise, levels, y, run)

        return settings.versions(x0, seed, noised)
    if SAMPLERS[settings.sampler].noisy:
        quiet = ", ".join(name for name, sampler in SAMPLERS.items() if not sampler.noisy)
        raise InputError(f"sampler {settings.sampler}: draws noise, which an inversion cannot use; want {quiet}")
    most = max(len(settings.classes), 1)
    if n > most:
        raise InputError(f"n {n}: an inversion has one result per class; want at most {most}")
    if t == 0:
        return settings.versions(x0, seed, lambda x, noise, y: iter([Step(0, x, x)]))
    with kernels.frozen():
        *_, inverted = editing.invert(checkpoint.denoiser, x0, levels, t, iterations)
    unclipped = checkpoint.denoiser.unclipped()

    def back(x: Tensor, noise: Noise, y: Tensor | None) -> Iterator[Step]:
        return run(unclipped, x, noise, levels, y, t)

    return settings.versions(inverted.x, seed, back)


def interpolate(
    checkpoint: Checkpoint,
    a: Source,
    b: Source,
    n: int = 11,
    t: int | None = None,
    settings: SamplingSettings = SamplingSettings(),
    seed: int = 0,
    progress: bool = True,
) -> Tensor:
    """Figure 8: `n` images from image a to image b, mixed at noise level t (None: T/2): pixels [n, C, H, W].

    The other arguments, and what is raised, are those of `interpolating`.
    """
    batch = interpolating(checkpoint, a, b, n, t, settings, seed)
    return settings.images(n, batch, checkpoint.denoiser.values, progress)


def interpolating(
    checkpoint: Checkpoint,
    a: Source,
    b: Source,
    n: int = 11,
    t: int | None = None,
    settings: SamplingSettings = SamplingSettings(),
    seed: int = 0,
) -> Batch:
    """Figure 8: `n` images from image a to image b, mixed at noise level t (None: T/2).

    Raises InputError for files that are no images, and for t or steps out of range.
    """
    T, device = checkpoint.denoiser.schedule.T, checkpoint.denoiser.device
    t = T // 2 if t is None else t
    first, last = (signal(path, checkpoint).to(device) for path in (a, b))
    eps_a, eps_b = per_image([mix(seed, 0), mix(seed, 1)], checkpoint.preset.shape, device)(T)
    weights, levels, run = torch.linspace(0, 1, n), settings.levels(checkpoint, t), named(settings.sampler).run

    def between(places: range) -> Iterator[Step]:
        noise = per_image([seed] * len(places), checkpoint.preset.shape, device)  # the same for all: a smooth change
        w, y = weights[places.start : places.stop], settings.labels(places, device)
        return editing.interpolate(checkpoint.denoiser, first, last, w, t, eps_a, eps_b, noise, levels, y, run)

    return between


def inpaint(
    checkpoint: Checkpoint,
    image: Source,
    mask: Source | Tensor,
    n: int = 1,
    settings: SamplingSettings = SamplingSettings(),
    jump: int | None = None,
    resample: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> Tensor:
    """`n` versions of an image, redrawn by RePaint where a mask is white: pixels [n, C, H, W].

    The other arguments, and what is raised, are those of `inpainting`.
    """
    batch = inpainting(checkpoint, image, mask, settings, jump, resample, seed)
    return settings.images(n, batch, checkpoint.denoiser.values, progress)


def inpainting(
    checkpoint: Checkpoint,
    image: Source,
    mask: Source | Tensor,
    settings: SamplingSettings = SamplingSettings(),
    jump: int | None = None,
    resample: int = 10,
    seed: int = 0,
) -> Batch:
    """Versions of an image, redrawn by RePaint where a mask is white.

    mask  an image file of the image's size, or bool [1, H, W] of the model's size

    The ancestral sampler visits 250 levels by default. jump None is 1/25 of the visited levels.

    Raises InputError for files that are no images, for a mask that is not black and white or not of the image's size,
    and for settings out of range.
    """
    device = checkpoint.denoiser.device
    x0 = signal(image, checkpoint).to(device)[None]
    if not isinstance(mask, Tensor):
        mask = mask_of(mask, image, checkpoint.preset)
    redrawn = mask.to(device)[None]
    levels, jump, resample = repaint_settings(checkpoint, settings, jump, resample)
    run = named(settings.sampler).run

    def sample(x: Tensor, noise: Noise, y: Tensor | None) -> Iterator[Step]:
        return editing.inpaint(checkpoint.denoiser, x, redrawn, noise, levels, jump, resample, y, run)

    return settings.versions(x0, seed, sample)


def repaint_settings(
    checkpoint: Checkpoint, settings: SamplingSettings, jump: int | None, resample: int
) -> tuple[list[int], int, int]:
    """The levels that `inpainting` visits, and its jump and resample for them."""
    T = checkpoint.denoiser.schedule.T
    if settings.sampler == "ancestral" and settings.steps is None:
        settings = replace(settings, steps=min(250, T))
    levels = settings.levels(checkpoint, T)
    jump = max(1, len(levels) // 25) if jump is None else jump
    return levels, jump, 1 if len(levels) == 1 else resample  # from one level there is none to go back up to


def _last(steps: Iterator[Step], values: Values, progress: bool) -> Tensor:
    """The pixels of the last step, on the CPU."""
    (last,) = deque(Progress(steps, unit="call", desc="editing", show=progress, leave=False), maxlen=1)
    return pixels.to_pixels(last.x, values).cpu()


def signal(image: Source, checkpoint: Checkpoint) -> Tensor:
    """An image as the model takes it, x_0 [C, H, W]. Raises InputError for what is no such image."""
    form = data.form_of(checkpoint.preset)
    if form.is_picture:
        return pixels.to_signal(fitted(image, checkpoint.preset))
    notes: images.Notes = {}
    array = form.array(image if isinstance(image, bytes) else Path(image), name_of(image), notes)
    for what in notes:
        warnings.warn(f"{name_of(image)}: {what}", stacklevel=3)
    return pixels.to_signal(torch.from_numpy(array.transpose(2, 0, 1).copy()), form.values)


def fitted(image: Source, preset: Preset, notes: images.Notes | None = None) -> Tensor:
    """A picture in the model's size and channels: pixels uint8 [C, H, W].

    What had to be done to it is added to `notes`, or warned of without `notes`. Raises InputError for what is no image.
    """
    height, width = preset.size
    name, picture = name_of(image), images.read(image, name_of(image))
    if picture.height > height or picture.width > width:  # `fit` notes smaller images
        how = "cropped at the centre" if preset.fit == "random-crop" else "scaled and cropped"
        size = f"{picture.height}x{picture.width}"
        images.note(notes, f"{size} is {how} to {height}x{width}, the model's size", name)
    array = images.fit(picture, (height, width), preset.channels, name, notes, preset.fit)
    return torch.from_numpy(array.copy()).permute(2, 0, 1)


def name_of(image: Source) -> str:
    """What errors call an image."""
    return "the image" if isinstance(image, bytes) else str(image)


def mask_of(mask: Source, image: Source, preset: Preset) -> Tensor:
    """`read_mask` of a mask for this image."""
    form, name = data.form_of(preset), name_of(image)
    if form.is_picture:
        size = images.read(image, name).size[::-1]
    else:
        height, width = arrays.read(image if isinstance(image, bytes) else Path(image), name, form.pages).shape[:2]
        size = height, width
    return read_mask(mask, size, "the image's", preset)


def read_mask(mask: Source, size: tuple[int, int], whose: str, preset: Preset) -> Tensor:
    """A black and white mask file, scaled and cropped like an image of the same size: bool [1, H, W], true for white.

    size   (H, W) that the file must have
    whose  the owner of this size, for errors

    Raises InputError for what is no such mask.
    """
    name = name_of(mask)
    picture = images.convert(images.read(mask, name), 1, name, {})
    have = picture.height, picture.width
    if have != size:
        raise InputError(
            f"{name}: {have[0]}x{have[1]} (height x width); want a mask of {whose} size, {size[0]}x{size[1]}"
        )
    levels = np.unique(np.asarray(picture)).tolist()
    if not set(levels) <= {0, 255} or 255 not in levels:
        seen = ", ".join(map(str, levels[:4])) + ", .." * (len(levels) > 4)
        raise InputError(f"{name}: grey levels {seen}; want 255 (white) where to redraw and 0 (black) elsewhere")
    return fitted(mask, replace(preset, channels=1, show=())) > 127

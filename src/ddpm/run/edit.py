"""Images edited by a model: drawn anew from a level on, between two files, and where a mask file is white."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ddpm import editing, kernels, pixels
from ddpm.errors import InputError
from ddpm.files import images
from ddpm.files.models import Checkpoint
from ddpm.noise import Noise, mix, per_image
from ddpm.presets import Preset
from ddpm.run.sample import in_turn, visited
from ddpm.samplers import SAMPLERS, Step, named


@dataclass(frozen=True)
class Way:
    """How the reverse process goes down: a sampler by name, its levels as in `sample.visited`, class labels, and how
    many images at a time."""

    sampler: str = "ancestral"
    steps: int | None = None
    spacing: str | None = None
    classes: tuple[int, ...] = ()
    batch_size: int = 64

    def levels(self, found: Checkpoint, start: int) -> list[int]:
        """Those visited from `start` on; none at 0. InputError where there is no such level."""
        T = found.denoiser.schedule.T
        if not 0 <= start <= T:
            raise InputError(f"t {start}: want 0 to {T}")
        return visited(found, self.sampler, self.steps, self.spacing, start) if start else []

    def labels(self, places: range, device: torch.device) -> Tensor | None:
        """int64 [len(places)]: of classes in turn those at these places, or None where there are none."""
        y = in_turn(self.classes, places)
        return None if y is None else y.to(device)

    def images(self, n: int, steps: Callable[[range], Iterator[Step]], progress: bool) -> Tensor:
        """Of `n` images, uint8 [n, C, H, W], what `steps` comes to at these places of them, a batch at a time."""
        with kernels.frozen():
            parts = (steps(range(n)[i : i + self.batch_size]) for i in range(0, n, self.batch_size))
            return torch.cat([_last(part, progress) for part in parts])

    def versions(
        self, x: Tensor, n: int, seed: int, steps: Callable[[Tensor, Noise, Tensor | None], Iterator[Step]],
        progress: bool,
    ) -> Tensor:  # fmt: skip
        """`images` of x [1, C, H, W], a seed and a class each: what steps(x, noise, y) comes to."""

        def some(i: range) -> Iterator[Step]:
            noise = per_image([seed + k for k in i], x.shape[1:], x.device)
            return steps(x.expand(len(i), -1, -1, -1), noise, self.labels(i, x.device))

        return self.images(n, some, progress)


def redraw(
    found: Checkpoint,
    image: str | Path,
    n: int = 1,
    t: int | None = None,
    way: Way = Way("ddim"),
    seed: int = 0,
    iterations: int = 0,
    progress: bool = True,
) -> Tensor:
    """`n` versions of an image file made from its x_t (t None: T/2), uint8 [n, C, H, W].

    x_t is drawn from q(x_t | x_0), a seed a version (SDEdit); with iterations > 0 it is the one that DDIM comes back
    from, by so many iterations a level, without label. Raises InputError for a file that is no image, for t or steps
    out of range, and for a sampler that draws noise where DDIM is inverted.
    """
    T, device = found.denoiser.schedule.T, found.denoiser.schedule.alpha_bar.device
    t = T // 2 if t is None else t
    x0 = pixels.to_signal(_read(image, found.preset)).to(device)[None]
    levels, run = way.levels(found, t), named(way.sampler).run
    if iterations == 0:
        return way.versions(
            x0, n, seed, lambda x, noise, y: editing.redraw(found.denoiser, x, t, noise, levels, y, run), progress
        )
    if SAMPLERS[way.sampler].noisy:
        quiet = ", ".join(name for name, sampler in SAMPLERS.items() if not sampler.noisy)
        raise InputError(f"sampler {way.sampler}: draws noise, which inversion knows nothing of; want {quiet}")
    if n > max(len(way.classes), 1):
        raise InputError(f"n {n}: inversion has one answer for a class; want {max(len(way.classes), 1)} at most")
    if t == 0:
        return pixels.to_pixels(x0).expand(n, -1, -1, -1).cpu()
    with kernels.frozen():
        *_, up = editing.invert(found.denoiser, x0, levels, t, iterations)
    free = found.denoiser.unclipped()
    return way.versions(up.x, n, seed, lambda x, noise, y: run(free, x, noise, levels, y, t), progress)


def interpolate(
    found: Checkpoint,
    a: str | Path,
    b: str | Path,
    n: int = 11,
    t: int | None = None,
    way: Way = Way(),
    seed: int = 0,
    progress: bool = True,
) -> Tensor:
    """Figure 8: `n` images from file a to file b, mixed at level t (None: T/2), uint8 [n, C, H, W].

    Raises InputError for files that are no images, and for t or steps out of range.
    """
    T, device = found.denoiser.schedule.T, found.denoiser.schedule.alpha_bar.device
    t = T // 2 if t is None else t
    first, last = (pixels.to_signal(_read(path, found.preset)).to(device) for path in (a, b))
    eps_a, eps_b = per_image([mix(seed, 0), mix(seed, 1)], found.preset.shape, device)(T)
    weights, levels, run = torch.linspace(0, 1, n), way.levels(found, t), named(way.sampler).run

    def between(i: range) -> Iterator[Step]:
        noise = per_image([seed] * len(i), found.preset.shape, device)  # one for all, for a smooth change
        some, y = weights[i.start : i.stop], way.labels(i, device)
        return editing.interpolate(found.denoiser, first, last, some, t, eps_a, eps_b, noise, levels, y, run)

    return way.images(n, between, progress)


def inpaint(
    found: Checkpoint,
    image: str | Path,
    mask: str | Path,
    n: int = 1,
    way: Way = Way(),
    jump: int | None = None,
    resample: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> Tensor:
    """`n` versions of an image file with what is white in a mask file made anew (RePaint), uint8 [n, C, H, W].

    Of ancestral's levels 250 are visited where `way` says no number; jump None is 1/25 of those visited. Raises
    InputError for files that are no images, a mask that is not black and white or not of the image's size, and for
    settings out of range.
    """
    device = found.denoiser.schedule.alpha_bar.device
    x0 = pixels.to_signal(_read(image, found.preset)).to(device)[None]
    made = _read_mask(mask, image, found.preset).to(device)
    T = found.denoiser.schedule.T
    if way.sampler == "ancestral" and way.steps is None:
        way = replace(way, steps=min(250, T))
    levels = way.levels(found, T)
    jump = max(1, len(levels) // 25) if jump is None else jump
    if len(levels) == 1:  # there is nothing to go up to
        resample = 1
    run = named(way.sampler).run
    return way.versions(
        x0, n, seed,
        lambda x, noise, y: editing.inpaint(found.denoiser, x, made[None], noise, levels, jump, resample, y, run),
        progress,
    )  # fmt: skip


def _last(way: Iterator[Step], progress: bool) -> Tensor:
    *_, last = tqdm(way, unit="call", desc="editing", disable=None if progress else True, leave=False)
    return pixels.to_pixels(last.x).cpu()


def _read(path: str | Path, preset: Preset) -> Tensor:
    """An image file as the model takes it: pixels uint8 [C, H, W]."""
    height, width = preset.size
    read = images.read(path)
    if read.height > height or read.width > width:  # enlarging is warned of by fit
        size = f"{read.height}x{read.width}"
        warnings.warn(f"{path}: {size} is scaled and cropped to {height}x{width}, the model's size", stacklevel=3)
    picture = images.fit(read, (height, width), preset.channels, str(path))
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)


def _read_mask(path: str | Path, image: str | Path, preset: Preset) -> Tensor:
    """A mask file of the image's own size, black and white, scaled and cropped as the image is: bool [1, H, W]."""
    mask = images.convert(images.read(path), 1, str(path), {})
    size = images.read(image).size
    if mask.size != size:
        raise InputError(f"{path}: {mask.size[0]}x{mask.size[1]}; want a mask of the image's size, {size[0]}x{size[1]}")
    levels = np.unique(np.asarray(mask)).tolist()
    if not set(levels) <= {0, 255} or 255 not in levels:
        seen = ", ".join(map(str, levels[:4])) + ", .." * (len(levels) > 4)
        raise InputError(f"{path}: grey levels {seen}; want white, 255, where it is to be made, else black, 0")
    return _read(path, replace(preset, channels=1)) > 127

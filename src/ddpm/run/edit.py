"""Images edited by a model: between two files, and where a mask file is white."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ddpm import editing, pixels
from ddpm.errors import InputError
from ddpm.files import images
from ddpm.files.checkpoints import Checkpoint
from ddpm.noise import mix, per_image
from ddpm.presets import Preset
from ddpm.samplers import Step


def interpolate(
    found: Checkpoint,
    a: str | Path,
    b: str | Path,
    n: int = 11,
    t: int | None = None,
    steps: int | None = None,
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
    noise = per_image([seed] * n, found.preset.shape, device)  # one for all, for a smooth change
    weights = torch.linspace(0, 1, n)
    return _last(editing.interpolate(found.denoiser, first, last, weights, t, eps_a, eps_b, noise, steps), progress)


def inpaint(
    found: Checkpoint,
    image: str | Path,
    mask: str | Path,
    n: int = 1,
    steps: int | None = None,
    jump: int | None = None,
    resample: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> Tensor:
    """`n` versions of an image file with what is white in a mask file made anew (RePaint), uint8 [n, C, H, W].

    steps: levels visited (None: 250, or all of fewer); jump: None, 1/25 of these. Raises InputError for files that are
    no images, a mask that is not black and white or not of the image's size, and for settings out of range.
    """
    device = found.denoiser.schedule.alpha_bar.device
    x0 = pixels.to_signal(_read(image, found.preset)).to(device).expand(n, -1, -1, -1)
    made = _read_mask(mask, image, found.preset).to(device)
    noise = per_image([seed + i for i in range(n)], found.preset.shape, device)
    steps = min(250, found.denoiser.schedule.T) if steps is None else steps
    jump = max(1, steps // 25) if jump is None else jump
    if steps == 1:  # there is nothing to go up to
        resample = 1
    return _last(editing.inpaint(found.denoiser, x0, made[None], noise, steps, jump, resample), progress)


def _last(way: Iterator[Step], progress: bool) -> Tensor:
    *_, last = tqdm(way, unit="call", desc="editing", disable=None if progress else True, leave=False)
    return pixels.to_pixels(last.x).cpu()


def _read(path: str | Path, preset: Preset) -> Tensor:
    """An image file as the model takes it: pixels uint8 [C, H, W]."""
    height, width = preset.size
    picture = images.fit(images.read(path), (height, width), preset.channels, str(path))
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

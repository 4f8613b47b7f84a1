"""What a person gives to a model with a condition: small, grey or masked pictures, in the place of a dataset's."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import ImageChops
from torch import Tensor

from ddpm import conditions, pixels
from ddpm.errors import InputError
from ddpm.files import arrays, data
from ddpm.files import images as pictures
from ddpm.files.models import Checkpoint
from ddpm.presets import Preset
from ddpm.run.edit import mask_of
from ddpm.run.sample import Inputs, Sampling, sampler_of

_SECOND = 1 << 40
"""What is added to the seeds of the second model of a cascade."""


def read_inputs(checkpoint: Checkpoint, path: str | Path, each: int = 1, mask: str | Path | None = None) -> Inputs:
    """The conditions that image files give a model, each for `each` images.

    path  an image file, or a folder of them in natural order of their names. With the condition lowres:N, a file of the
          small size is taken as it is. Other files are brought to the model's size and then reduced, with a warning
    mask  with the condition `mask`: a black and white file of the picture's size, white where the model is to draw.
          None: the model draws where a picture is transparent

    Raises InputError for a model without a condition, for what is no image, and for a mask that is missing or not fit.
    """
    preset = checkpoint.preset
    if preset.condition == "none":
        raise InputError(f"input {path}: {checkpoint.path} was not trained with a condition; want no input")
    if mask is not None and not preset.condition.startswith("mask"):
        raise InputError(f"mask {mask}: {checkpoint.path} has the condition {preset.condition}; want no mask")
    if mask is not None and Path(path).is_dir():
        raise InputError(f"mask {mask}: is for one picture; want one as input, or pictures with transparent parts")
    files, notes = _files(path, data.form_of(preset)), pictures.Notes()
    found = [_input(file, mask, preset, notes) for file in files]
    for what, (first, count) in notes.items():
        warnings.warn(f"{path}: {count:,} picture{'s' * (count != 1)}: {what}; the first: {first}", stacklevel=2)
    told, known = (torch.stack(each) for each in zip(*found, strict=True))
    return Inputs(told, known, data.form_of(preset).values, each, str(path))


def check_cascade(small: Checkpoint, large: Checkpoint, sampling: Sampling) -> None:
    """Raise InputError unless `large` enlarges the images of `small`, and can be sampled as `sampling` says."""
    preset, name = large.preset, f"then {large.path}"
    if not preset.condition.startswith("lowres"):
        raise InputError(f"{name}: has condition {preset.condition}; want a model with condition lowres:N")
    if small.preset.condition != "none":
        raise InputError(
            f"{name}: {small.path} has condition {small.preset.condition} itself; want a model without one"
        )
    wanted = (preset.channels, *small_size(preset)), preset.pixel_type
    if (small.preset.shape, small.preset.pixel_type) != wanted:
        shown = f"{small.preset.kind} images of {'x'.join(map(str, small.preset.size))}"
        size = "x".join(map(str, small_size(preset)))
        raise InputError(f"{name}: enlarges {preset.kind} images of {size}; {small.path} makes {shown}")
    if sampling.conditions.classes == ("all",) and preset.class_names not in ((), small.preset.class_names):
        raise InputError(f"{name}: class all: has other classes than {small.path}; want classes by their names")
    nothing = torch.zeros(1, *small.preset.shape, dtype=small.denoiser.values.torch)
    cascade(small, large, nothing, sampling, {}).maker(large, torch.device("cpu"))


def own_sampler(model: Checkpoint, sampling: Sampling) -> Sampling:
    """`sampling` for one model of a cascade, or the model's own defaults in its place.

    A consistency model and another model have no sampler in common, so `sampling` fits one of the two.
    """
    if (model.preset.loss == "consistency") == (sampling.sampler == "consistency"):
        return sampling
    return replace(sampling, sampler=sampler_of(model.preset), steps=None, spacing=None, eta=0.0, sigma_hat=False)


def cascade(
    small: Checkpoint, large: Checkpoint, images: Tensor, sampling: Sampling, made: Mapping[str, Any]
) -> Sampling:
    """How `large` enlarges images of `small`, pixels [n, C, h, w], made by `sampling` as `made` says (Ho et al. 2022).

    Classes and guidance are those of `sampling`, if the model has classes. The noise of image i is that of the seed
    seed + i + 2^40, because the noise of the seed itself begins with that of the small image.
    """
    asked, labels = sampling.conditions, list[int]()
    if not large.preset.class_names:
        _, labels = asked.resolved(small).apply(small)
        asked = replace(asked, classes=(), guidance=None, guidance_interval=None)
    known = torch.ones(1, 1, *large.preset.size, dtype=torch.bool).expand(len(images), -1, -1, -1)
    made = {name: value for name, value in made.items() if name != "count"}  # more of them may follow
    inputs = Inputs(images, known, large.denoiser.values, 1, f"samples of {small.home.name}", made, labels)
    return replace(own_sampler(large, sampling), conditions=asked, inputs=inputs, shift=_SECOND)


def small_size(preset: Preset) -> tuple[int, int]:
    """(h, w) of the pictures of a preset's condition: smaller than `size` for lowres:N.

    >>> small_size(Preset(condition="lowres:4"))
    (8, 8)
    """
    kind, _, factor = preset.condition.partition(":")
    height, width = preset.size
    return (height // int(factor), width // int(factor)) if kind == "lowres" else preset.size


def _files(path: str | Path, form: data.Form) -> list[Path]:
    path = Path(path)
    if not path.is_dir():
        return [path]
    names = data.image_files(path, arrays=not form.is_picture)
    if not names:
        raise InputError(f"input {path}: no images in this folder; want an image file, or a folder of them")
    return [path / name for name in names]


def _input(file: Path, mask: str | Path | None, preset: Preset, notes: pictures.Notes) -> tuple[Tensor, Tensor]:
    """The picture of one file, pixels [c, h, w], and where it is known, bool [1, H, W]."""
    by_alpha = preset.condition.startswith("mask") and mask is None
    picture, clear = _picture(file, preset, notes, by_alpha)
    drawn = clear if mask is None else mask_of(mask, file, preset)
    if by_alpha and drawn is None:
        raise InputError(f"{file}: no part is transparent; want --mask FILE, white where the model is to draw")
    return picture, torch.ones(1, *preset.size, dtype=torch.bool) if drawn is None else ~drawn


def _picture(file: Path, preset: Preset, notes: pictures.Notes, by_alpha: bool) -> tuple[Tensor, Tensor | None]:
    """The picture of a file, pixels [c, h, w]. With `by_alpha`, also where it is transparent, bool [1, H, W], if a
    part of it is.
    """
    form, small, clear = data.form_of(preset), small_size(preset), None
    channels, name = preset.condition_channels - 1, str(file)
    if form.is_picture:
        read = pictures.read(file, name)
        height, width = have = read.height, read.width
        size = small if have == small else preset.size
        if small == preset.size and have != small:
            pictures.note(notes, f"{height}x{width} is brought to {small[0]}x{small[1]}, the model's size", name)
        if by_alpha and (alpha := pictures.alpha(read)) is not None:
            # inverted, since what `fit` adds at the edges is 0: it is not hidden, as in training
            hidden = pictures.fit(ImageChops.invert(alpha), preset.size, 1, name, {}, preset.fit)
            clear = torch.from_numpy(hidden[None, ..., 0] > 127)
            if channels < 4:  # what is transparent is hidden, so nothing is laid on white
                read = read.convert("L" if read.mode in ("LA", "La") else "RGB")
        array = pictures.fit(read, size, channels, name, notes, preset.fit)
    else:
        have = arrays.read(file, name, form.pages).shape[:2]
        wanted = replace(form, size=small if have == small else form.size, channels=channels)
        array = wanted.array(file, name, notes)
    found = torch.from_numpy(array.transpose(2, 0, 1).copy())
    if small not in (have, preset.size):
        pictures.note(notes, f"reduced to {small[0]}x{small[1]}", name)
        reduced = conditions.picture(preset.condition, pixels.to_signal(found[None], form.values), form.values)
        found = pixels.to_pixels(reduced, form.values)[0]
    return found, clear

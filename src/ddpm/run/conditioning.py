"""The conditions of a dataset's images, for training and for measurements."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm import conditions, noise, pixels
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError
from ddpm.files import data
from ddpm.files.models import Checkpoint
from ddpm.presets import Preset
from ddpm.run.parts import labels_of

_TRAINING, _IMAGE = 6, 0xC0DD
"""Keys of the draws of masks and dropout: those of a step (run/step.py), and those of an image."""


def of_batch(preset: Preset, x0: Tensor, step: int, mine: slice) -> tuple[Tensor, Tensor | None]:
    """This process's images of a step [b, C, H, W], and their condition [b, c + 1, H, W] or None.

    x0    what `data.batches` gave for the places `mine` of the whole batch, as a signal: the images, and with the
          condition `pairs` the other images in channels C + 1 .. 2C

    Masks, dropout and noise are functions of (seed, step, place in the whole batch). A hidden condition is all zeros.
    """
    if preset.condition == "none":
        return x0, None
    g = noise.generator(preset.seed, step, _TRAINING)
    known = conditions.known(preset.condition, preset.batch_size, preset.size, g)
    shown = torch.rand(preset.batch_size, generator=g) >= preset.condition_dropout
    x0, told = x0[:, : preset.channels], x0[:, -preset.channels :]  # of one image for both, but for `pairs`
    picture = conditions.picture(preset.condition, told, pixels.values(preset.pixel_type, preset.value_range))
    condition = conditions.join(picture, known[mine].to(x0.device))
    if preset.condition_noise:
        s = preset.condition_noise * torch.rand(preset.batch_size, generator=g)[mine].to(x0.device)
        eps = torch.randn(preset.batch_size, *condition[0, :-1].shape, generator=g)[mine].to(x0.device)
        condition = conditions.noisy(condition, s, eps)
    return x0, condition * shown[mine].to(x0.device)[:, None, None, None]


def of_images(preset: Preset, images: data.Images, indices: Sequence[int], x0: Tensor) -> Tensor | None:
    """The condition of the images of these indices, x0 [B, C, H, W]: [B, c + 1, H, W], or None.

    The mask of an image is a function of its index. Raises InputError for the condition `pairs` if the images have no
    pairs.
    """
    if preset.condition == "none":
        return None
    told = x0
    if preset.condition == "pairs":
        if images.pair is None:
            raise InputError(f"{images.name}: has no pairs; want --pairs SOURCE")
        told = pixels.to_signal(images.pair.batch(indices), images.values).to(x0)
    known = [conditions.known(preset.condition, 1, preset.size, noise.generator(_IMAGE, i)) for i in indices]
    shown = torch.cat([torch.zeros(0, 1, *preset.size), *known]).to(x0)  # a process may have no image
    return conditions.join(conditions.picture(preset.condition, told, images.values), shown)


def given(
    checkpoint: Checkpoint, images: data.Images, indices: Sequence[int], x0: Tensor
) -> tuple[Denoiser, Tensor | None]:
    """The model's denoiser, given the condition of these images (`of_images`), and their labels (`labels_of`)."""
    condition = of_images(checkpoint.preset, images, indices, x0)
    return checkpoint.denoiser.given(condition), labels_of(checkpoint, images, indices, x0.device)

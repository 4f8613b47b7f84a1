"""The tab Edit: a picture redrawn under a mask, a picture redrawn from a noise level, and two pictures mixed."""

import base64
import binascii
import functools
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from starlette.routing import Route
from torch import Tensor

from ddpm import kernels, pixels
from ddpm.editing import repaint_calls
from ddpm.errors import InputError
from ddpm.files import data, images
from ddpm.files.models import Checkpoint
from ddpm.page.state import State, field, optional
from ddpm.page.tabs.sample import frame
from ddpm.page.work import Job
from ddpm.run.edit import Batch, SamplingSettings, fitted, inpainting, interpolating, redrawing, repaint_settings
from ddpm.run.sample import Conditions, sampler_of
from ddpm.samplers import named

MOST = 16
"""Images at a time."""
PAUSE = 0.1
"""Seconds between two pictures of a job."""


def routes(state: State) -> list[Route]:
    jobs = {"fit": fit, "inpaint": inpaint, "redraw": redraw, "interpolate": interpolate}
    return [state.work.route(f"/api/edit/{name}", functools.partial(job, state)) for name, job in jobs.items()]


def fit(state: State, body: dict[str, Any]) -> Job:
    """A picture in the model's size and channels, and what was done to it."""
    model, notes = _model(state, body), images.Notes()
    picture = fitted(_file(state, body, "picture"), model.preset, notes)
    yield {"kind": "picture", **state.keep(images.channels_last(picture[None])[0]), "notes": list(notes)}


def inpaint(state: State, body: dict[str, Any]) -> Job:
    """Redraw what is set in "mask", the bits of all pixels row by row, in base64."""
    asked = _asked(state, body, "ancestral")
    mask = _mask(field(body, "mask", str, None, high=1_000_000), asked.model.preset.size)
    resample = field(body, "resample", int, 10, 1, 100)
    levels, jump, resample = repaint_settings(asked.model, asked.settings, None, resample)
    batch = inpainting(
        asked.model, _file(state, body, "picture"), mask, asked.settings, resample=resample, seed=asked.seed
    )
    white = state.keep(255 * mask[0, ..., None].numpy().astype(np.uint8))
    options = [*asked.options, "--resample", str(resample)]
    yield {"kind": "about", "command": asked.command("inpaint", "picture.png mask.png", options), "mask": white}
    yield from _run(state, asked, batch, repaint_calls(len(levels), jump, resample))


def redraw(state: State, body: dict[str, Any]) -> Job:
    """Versions of a picture from its x_t."""
    asked = _asked(state, body, "ddim")
    t = field(body, "t", int, None, 0, asked.model.denoiser.schedule.T)
    batch = redrawing(asked.model, _file(state, body, "picture"), asked.n, t, asked.settings, asked.seed)
    yield {"kind": "about", "command": asked.command("edit", "picture.png", ["--t", str(t), *asked.options])}
    yield from _run(state, asked, batch, len(asked.settings.levels(asked.model, t)))


def interpolate(state: State, body: dict[str, Any]) -> Job:
    """A strip between two pictures."""
    asked = _asked(state, body, "ancestral")
    t = field(body, "t", int, None, 0, asked.model.denoiser.schedule.T)
    a, b = (_file(state, body, name) for name in ("picture", "other"))
    batch = interpolating(asked.model, a, b, asked.n, t, asked.settings, asked.seed)
    yield {"kind": "about", "command": asked.command("interpolate", "a.png b.png", ["--t", str(t), *asked.options])}
    yield from _run(state, asked, batch, len(asked.settings.levels(asked.model, t)))


class Asked(NamedTuple):
    """What all edits are asked for.

    model     with the denoiser of the wanted class and guidance
    settings  how it samples
    n         the number of images
    options   the same as words of the command line
    """

    name: str
    model: Checkpoint
    settings: SamplingSettings
    n: int
    seed: int
    options: list[str]

    def command(self, verb: str, files: str, options: Sequence[str]) -> str:
        """The command line that makes the same images."""
        return shlex.join(["ddpm", verb, self.name, *files.split(), "-n", str(self.n), *options])


def _model(state: State, body: dict[str, Any]) -> Checkpoint:
    model = state.model(name := field(body, "model", str))
    if not data.form_of(model.preset).is_picture:
        raise InputError(f"model {name}: its images are {model.preset.kind}; the page edits 8-bit grey, RGB and RGBA")
    return model


def _asked(state: State, body: dict[str, Any], sampler: str) -> Asked:
    model, n = _model(state, body), field(body, "n", int, 4, 1, MOST)
    name, sampler = field(body, "model", str), field(body, "sampler", str, sampler_of(model.preset, sampler))
    named(sampler)  # raises for one that does not exist
    steps, guidance = optional(body, "steps", int, 1), optional(body, "guidance", float)
    classes = tuple(map(str, field(body, "classes", list, [])))
    seed = field(body, "seed", int, 0, 0, 2**62)
    denoiser, labels = Conditions(classes, guidance).apply(model)
    options = ["--class", *classes] if classes else []
    given = {"guidance": guidance, "sampler": sampler, "steps": steps, "seed": seed}
    options += [word for option, value in given.items() if value is not None for word in (f"--{option}", str(value))]
    settings = SamplingSettings(sampler, steps, None, tuple(labels), MOST)
    return Asked(name, replace(model, denoiser=denoiser), settings, n, seed, options)


def _file(state: State, body: dict[str, Any], name: str) -> bytes:
    """The bytes of the picture whose id a request gives."""
    return state.kept(field(body, name, str)).data


def _mask(text: str, size: tuple[int, int]) -> Tensor:
    """A mask that the page painted: bool [1, H, W]."""
    height, width = size
    try:
        bits = np.unpackbits(np.frombuffer(base64.b64decode(text, validate=True), np.uint8))
    except binascii.Error:
        raise InputError("mask: no base64; want the bits of all pixels") from None
    if len(bits) != -(-height * width // 8) * 8:
        raise InputError(f"mask: {len(bits):,} bits; want one for each of {height}x{width} pixels, in whole bytes")
    mask = torch.from_numpy(bits[: height * width].reshape(1, height, width).astype(bool))
    if not mask.any():
        raise InputError("mask: nothing is painted; paint over the part that is to be redrawn")
    return mask


def _run(state: State, asked: Asked, batch: Batch, calls: int) -> Job:
    """The steps of a batch, a picture each PAUSE, and the images."""
    values, said = asked.model.denoiser.values, 0.0
    with kernels.frozen():
        for i, step in enumerate(batch(range(asked.n))):
            if time.monotonic() - said < PAUSE:
                yield None
                continue
            said = time.monotonic()
            x, x0 = (images.channels_last(pixels.to_pixels(signal, values).cpu()) for signal in (step.x, step.x0))
            yield frame(step.t, i + 1, calls, x, x0)
    made = images.channels_last(pixels.to_pixels(step.x, values).cpu())
    sheet = made[0] if len(made) == 1 else images.grid(made, len(made))
    yield frame(0, calls, calls, made, made)
    file = state.keep_file(images.to_png(sheet), "image/png")
    yield {"kind": "done", "pictures": [state.keep(picture) for picture in made], "file": file}

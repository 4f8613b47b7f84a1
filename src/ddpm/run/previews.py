"""The grids of samples that a run writes while it trains."""

import math
from collections.abc import Callable
from pathlib import Path

import torch

from ddpm import conditions, pixels
from ddpm.denoiser import Denoiser
from ddpm.files import arrays, data, images
from ddpm.presets import Preset
from ddpm.run import conditioning
from ddpm.run.processes import Processes
from ddpm.run.sample import cycled_labels, generate, sampler_of

LEAST_CALLS = 10
"""DDIM steps below which a picture shows little."""


def has_grid(step: int, preset: Preset) -> bool:
    """Whether a grid of samples belongs to this step."""
    return bool(preset.sample_every) and (step % preset.sample_every == 0 or step == preset.steps)


def grid_file(out: Path, step: int) -> Path:
    """The grid of samples of a step."""
    return out / "samples" / f"{step:08d}.png"


def draw(
    denoiser: Denoiser, preset: Preset, out: Path, step: int, ranks: Processes, size: tuple[int, int],
    stop: Callable[[], bool], held_out: data.Images,
) -> None:  # fmt: skip
    """Write RUN/samples/STEP.png, a grid, unless `stop` returns true. `size` is images, and calls for each.

    A consistency model makes them in its own number of calls. If the run has a condition, each sample stands to the
    right of the condition of a held-out image, and has the class of this image.
    """
    sampler, count = sampler_of(preset, "ddim"), size[0]
    calls = None if sampler == "consistency" else min(size[1], denoiser.schedule.T)
    mine = list(ranks.mine(count))
    classes = cycled_labels(range(len(preset.class_names)), mine)
    condition = None
    if preset.condition != "none":
        places = [i % len(held_out) for i in mine]
        classes = held_out.labels[places] if preset.classes and held_out.labels is not None else classes
        x0 = pixels.to_signal(held_out.batch(places), denoiser.values)
        condition = conditioning.of_images(preset, held_out, places, x0)
    samples = generate(
        denoiser, preset.shape, mine, sampler, calls, device=ranks.device, stop=stop, y=classes, condition=condition
    )
    columns = None
    if condition is not None:
        shown = conditions.shown(condition, preset.channels)
        samples = torch.stack([pixels.to_pixels(shown, denoiser.values), samples], dim=1)
        columns = 2 * math.ceil(math.sqrt(count / 2))
    samples = ranks.interleave(samples, count)
    samples = samples.flatten(0, 1) if condition is not None else samples
    if not ranks.any(stop()) and ranks.first:
        images.save(
            grid_file(out, step), images.grid(arrays.sheet(samples, arrays.view_of(preset, denoiser.values)), columns)
        )


def affordable(preset: Preset, seconds: float, image_call: float) -> tuple[int, int]:
    """The images, and the network calls for each, that take at most `seconds`; 0 images if there is no time for one.

    image_call  seconds of a network call for an image

    >>> from ddpm.presets import PRESETS
    >>> [affordable(PRESETS["cifar10"], seconds, image_call=0.01) for seconds in (0.05, 0.1, 2, 1000)]
    [(0, 10), (1, 10), (14, 14), (64, 50)]
    """
    total = int(seconds / image_call + 1e-9)
    calls = min(preset.sample_steps, max(LEAST_CALLS, math.isqrt(total)))
    return min(preset.sample_count, total // calls), calls

"""The grids of samples that a run writes while it trains."""

import math
from collections.abc import Callable
from pathlib import Path

from ddpm.denoiser import Denoiser
from ddpm.files import arrays, images
from ddpm.presets import Preset
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
    stop: Callable[[], bool],
) -> None:  # fmt: skip
    """Write RUN/samples/STEP.png, a grid, unless `stop` returns true. `size` is images, and calls for each.

    A consistency model makes them in its own number of calls.
    """
    sampler, count = sampler_of(preset, "ddim"), size[0]
    calls = None if sampler == "consistency" else min(size[1], denoiser.schedule.T)
    mine = list(ranks.mine(count))
    classes = cycled_labels(range(len(preset.class_names)), mine)
    samples = generate(denoiser, preset.shape, mine, sampler, calls, device=ranks.device, stop=stop, y=classes)
    samples = ranks.interleave(samples, count)
    if not ranks.any(stop()) and ranks.first:
        images.save(grid_file(out, step), images.grid(arrays.sheet(samples, arrays.view_of(preset, denoiser.values))))


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

"""Images from a denoiser: batches of seeds through a sampler, and the strip of Figure 6."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ddpm import kernels, pixels, spacing
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError
from ddpm.files.models import Checkpoint, read_calibration
from ddpm.noise import ahead, per_image
from ddpm.run.device import replayed
from ddpm.samplers import SAMPLERS, Levels, Sampler, Step, named

SPACED = (*spacing.SPACINGS, "bound")
"""How levels are chosen, by name: `bound` is `spacing.optimised` for this model."""


def visited(
    found: Checkpoint, sampler: str = "ancestral", steps: int | None = None, spaced: str | None = None,
    start: int | None = None,
) -> list[int]:  # fmt: skip
    """The levels that a sampler of that name visits from `start` (None: T) on; steps or `spaced`, of SPACED, None are
    its own.

    Raises InputError for what there is not, and for `bound` where the model is not calibrated.

    >>> from ddpm.files.opening import open_checkpoint
    >>> visited(open_checkpoint("digits"), "unipc", 4), len(visited(open_checkpoint("digits"), "ddim", 4, "bound"))
    ([1, 477, 995, 1000], 4)
    """
    how = named(sampler)
    if spaced is not None and spaced not in SPACED:
        raise InputError(f"spacing {spaced!r}: want {', '.join(SPACED)}")
    if spaced != "bound":
        return (how if spaced is None else how._replace(spacing=spaced)).levels(found.denoiser, steps, start)
    measured = read_calibration(found)
    if measured is None:
        raise InputError(f"spacing bound: {found.path} is not calibrated; run `ddpm calibrate` on it first")
    levels = how.levels(found.denoiser, steps, start)
    cost = spacing.bound_cost(found.denoiser.schedule, measured[0])[: levels[-1] + 1, : levels[-1] + 1]
    return spacing.optimised(cost, len(levels))


def sampled(denoiser: Denoiser, sampler: str, levels: Sequence[int], spaced: str | None) -> dict[str, Any]:
    """How samples are made that visit these levels, as plain JSON values; `spaced` as in `visited`."""
    how = SAMPLERS[sampler]
    calls = how.calls(denoiser, levels)
    return {"sampler": sampler, "spacing": spaced or how.spacing, "steps": len(levels), "network_calls": calls}


def in_turn(classes: Sequence[int], places: Sequence[int]) -> Tensor | None:
    """The labels int64 [len(places)] of images at these places of a row where the classes take turns; None of none.

    >>> in_turn([7, 3], range(5))
    tensor([7, 3, 7, 3, 7])
    """
    return torch.tensor([classes[i % len(classes)] for i in places], dtype=torch.int64) if classes else None


def trajectory(
    denoiser: Denoiser,
    shape: Sequence[int],
    seeds: Sequence[int],
    sampler: str | Sampler = "ancestral",
    steps: Levels | None = None,
    device: torch.device | str = "cpu",
    y: Tensor | None = None,
) -> Iterator[Step]:
    """The steps from noise to the images of these seeds, each a Step of [len(seeds), *shape] on `device`.

    sampler is a name or what `samplers.named` gives; steps a number, None for its own, or the levels themselves; y
    int64 [len(seeds)] class labels or None.
    """
    sampler = named(sampler) if isinstance(sampler, str) else sampler
    levels = sampler.levels(denoiser, steps)
    noise = per_image(seeds, shape, device)
    if torch.device(device).type == "cuda" and sampler.noisy:  # the others draw x_T only
        noise = ahead(seeds, shape, device, levels[::-1])
    if y is not None:
        y = y.to(device)
    return sampler.run(denoiser, noise(denoiser.schedule.T), noise, levels, y, None)


@kernels.frozen()
def generate(
    denoiser: Denoiser,
    shape: Sequence[int],
    seeds: Sequence[int],
    sampler: str | Sampler = "ancestral",
    steps: Levels | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    progress: bool = False,
    stop: Callable[[], bool] = lambda: False,
    y: Tensor | None = None,
) -> Tensor:
    """The images of these seeds, uint8 [len(seeds), C, H, W] on the CPU; each depends on its own seed only.

    shape is [C, H, W]; sampler, steps and y as in `trajectory`. Where `stop` comes true it returns early, with images
    that are not finished.

    >>> from ddpm import schedule
    >>> grey = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear(10, 1e-3, 0.8), predict="x0")
    >>> generate(grey, (1, 4, 4), seeds=range(3)).shape
    torch.Size([3, 1, 4, 4])
    """
    images = torch.zeros(len(seeds), *shape, dtype=torch.uint8)
    denoiser = replayed(denoiser, device)
    sampler = named(sampler) if isinstance(sampler, str) else sampler
    total = len(seeds) * len(sampler.levels(denoiser, steps))
    with tqdm(total=total, unit="step", desc="sampling", disable=None if progress else True, leave=False) as bar:
        for start in range(0, len(seeds), batch_size):
            part = slice(start, start + batch_size)
            labels = None if y is None else y[part]
            for step in trajectory(denoiser, shape, seeds[part], sampler, steps, device, labels):
                bar.update(len(step.x))
                if stop():
                    return images
                if step.t == 0:
                    images[part] = pixels.to_pixels(step.x).cpu()
    return images


@kernels.frozen()
def progressive(
    denoiser: Denoiser,
    shape: Sequence[int],
    seeds: Sequence[int],
    sampler: str | Sampler = "ancestral",
    steps: Levels | None = None,
    columns: int = 11,
    device: torch.device | str = "cpu",
    progress: bool = False,
    y: Tensor | None = None,
) -> Tensor:
    """Figure 6: x0^ (Eq. 15) at `columns` times evenly over the way, then the image last.

    Returns uint8 [len(seeds), columns, C, H, W].

    >>> from ddpm import schedule
    >>> grey = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear(20, 1e-3, 0.6), predict="x0")
    >>> progressive(grey, (1, 4, 4), seeds=range(3)).shape
    torch.Size([3, 11, 1, 4, 4])
    """
    sampler = named(sampler) if isinstance(sampler, str) else sampler
    n = len(sampler.levels(denoiser, steps))
    columns = min(columns, n)
    denoiser = replayed(denoiser, device)
    wanted = [round((n - 1) * i / max(columns - 1, 1)) for i in range(columns)]
    strip = []
    way = trajectory(denoiser, shape, seeds, sampler, steps, device, y)
    bar = tqdm(way, total=n, unit="step", desc="sampling", disable=None if progress else True, leave=False)
    for i, step in enumerate(bar):
        if i in wanted:
            strip.append(pixels.to_pixels(step.x if step.t == 0 else step.x0).cpu())
    return torch.stack(strip, dim=1)

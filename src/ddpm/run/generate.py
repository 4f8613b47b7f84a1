"""Images from a denoiser: batches of seeds through a sampler, and the strip of Figure 6."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ddpm import kernels, pixels
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError
from ddpm.noise import ahead, per_image
from ddpm.run.gpu import replayed
from ddpm.samplers import Levels, Sampler, Step, named
from ddpm.spacing import SPACINGS


def visited(
    denoiser: Denoiser, sampler: str = "ancestral", steps: int | None = None, spacing: str | None = None,
    start: int | None = None,
) -> list[int]:  # fmt: skip
    """The levels that a sampler of that name visits from `start` (None: T) on; steps or spacing None are its own.

    >>> from ddpm import schedule
    >>> visited(Denoiser(lambda x, timestep, y: x, schedule.linear()), "unipc", 4)
    [1, 74, 604, 1000]
    """
    how = named(sampler)
    if spacing is not None:
        if spacing not in SPACINGS:
            raise InputError(f"spacing {spacing!r}: want {', '.join(SPACINGS)}")
        how = how._replace(spacing=spacing)
    return how.levels(denoiser, steps, start)


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

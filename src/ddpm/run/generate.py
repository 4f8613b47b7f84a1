"""Images from a denoiser: batches of seeds through a sampler, and the strip of Figure 6."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ddpm import kernels, pixels, samplers
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError
from ddpm.noise import ahead, per_image
from ddpm.run.gpu import replayed

SAMPLERS = ("ancestral", "ddim")


def trajectory(
    denoiser: Denoiser,
    shape: Sequence[int],
    seeds: Sequence[int],
    sampler: str = "ancestral",
    steps: int | None = None,
    eta: float = 0.0,
    device: torch.device | str = "cpu",
) -> Iterator[samplers.Step]:
    """The steps from noise to the images of these seeds, each a Step of [len(seeds), *shape] on `device`."""
    noise = per_image(seeds, shape, device)
    if torch.device(device).type == "cuda" and (sampler == "ancestral" or eta > 0):  # ddim else draws x_T only
        noise = ahead(seeds, shape, device, denoiser.schedule.levels(calls(denoiser, sampler, steps))[::-1])
    x = noise(denoiser.schedule.T)
    if sampler == "ancestral":
        return samplers.ancestral(denoiser, x, noise, steps)
    if sampler == "ddim":
        return samplers.ddim(denoiser, x, calls(denoiser, sampler, steps), eta, noise)
    raise InputError(f"sampler {sampler!r}: want {', '.join(SAMPLERS)}")


def calls(denoiser: Denoiser, sampler: str, steps: int | None) -> int:
    """How many network calls one batch takes."""
    T = denoiser.schedule.T
    return steps if steps is not None else min(50, T) if sampler == "ddim" else T


@kernels.frozen()
def generate(
    denoiser: Denoiser,
    shape: Sequence[int],
    seeds: Sequence[int],
    sampler: str = "ancestral",
    steps: int | None = None,
    eta: float = 0.0,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    progress: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Tensor:
    """The images of these seeds, uint8 [len(seeds), C, H, W] on the CPU; each depends on its own seed only.

    shape is [C, H, W]; sampler is ancestral or ddim; steps is its network calls (None: all T, or 50 for ddim).
    Where `stop` comes true it returns early, with images that are not finished.

    >>> from ddpm import schedule
    >>> grey = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear(10, 1e-3, 0.8), predict="x0")
    >>> generate(grey, (1, 4, 4), seeds=range(3)).shape
    torch.Size([3, 1, 4, 4])
    """
    images = torch.zeros(len(seeds), *shape, dtype=torch.uint8)
    denoiser = replayed(denoiser, device)
    total = len(seeds) * calls(denoiser, sampler, steps)
    with tqdm(total=total, unit="call", desc="sampling", disable=None if progress else True, leave=False) as bar:
        for start in range(0, len(seeds), batch_size):
            part = seeds[start : start + batch_size]
            for step in trajectory(denoiser, shape, part, sampler, steps, eta, device):
                bar.update(len(part))
                if stop():
                    return images
                if step.t == 0:
                    images[start : start + batch_size] = pixels.to_pixels(step.x).cpu()
    return images


@kernels.frozen()
def progressive(
    denoiser: Denoiser,
    shape: Sequence[int],
    seeds: Sequence[int],
    sampler: str = "ancestral",
    steps: int | None = None,
    eta: float = 0.0,
    columns: int = 11,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Tensor:
    """Figure 6: x0^ (Eq. 15) at `columns` times evenly over the way, then the image last.

    Returns uint8 [len(seeds), columns, C, H, W].

    >>> from ddpm import schedule
    >>> grey = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear(20, 1e-3, 0.6), predict="x0")
    >>> progressive(grey, (1, 4, 4), seeds=range(3)).shape
    torch.Size([3, 11, 1, 4, 4])
    """
    n = calls(denoiser, sampler, steps)
    columns = min(columns, n)
    denoiser = replayed(denoiser, device)
    wanted = [round((n - 1) * i / max(columns - 1, 1)) for i in range(columns)]
    strip = []
    way = trajectory(denoiser, shape, seeds, sampler, steps, eta, device)
    bar = tqdm(way, total=n, unit="call", desc="sampling", disable=None if progress else True, leave=False)
    for i, step in enumerate(bar):
        if i in wanted:
            strip.append(pixels.to_pixels(step.x if step.t == 0 else step.x0).cpu())
    return torch.stack(strip, dim=1)

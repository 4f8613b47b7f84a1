"""Images from a denoiser: batches of seeds through a sampler, and the strip of Figure 6."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
from ddpm.run.processes import Processes
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


# -- the program -------------------------------------------------------------------------------------------------------

GUIDANCE = 1.5
"""The guidance scale if a class is asked for and no scale is given."""


@dataclass(frozen=True)
class Conditions:
    """What samples are made under; each None is the model's own default.

    classes            names of classes, over which the images cycle; ("all",) for every class; () for no class
    guidance           scale of classifier-free guidance: 1 for none
    guidance_interval  the first and the last noise level t with guidance
    clip               True clips x0^ to [-1, 1], False does not, and a number in (0, 1) is a quantile
    """

    classes: tuple[str, ...] = ()
    guidance: float | None = None
    guidance_interval: tuple[int, int] | None = None
    clip: bool | float | None = None

    def about(self) -> dict[str, Any]:
        """The conditions that were given, as plain JSON values."""
        values = {
            "classes": list(self.classes) or None,
            "guidance": self.guidance,
            "guidance_interval": self.guidance_interval,
            "clip": self.clip,
        }
        return {name: value for name, value in values.items() if value is not None}

    def resolved(self, checkpoint: Checkpoint) -> "Conditions":
        """The same with the guidance that this model gets by default."""
        if not self.classes or self.guidance is not None:
            return self
        return replace(self, guidance=GUIDANCE if checkpoint.preset.label_dropout > 0 else 1.0)

    def apply(self, checkpoint: Checkpoint) -> tuple[Denoiser, list[int]]:
        """The model's denoiser under these conditions, and the labels of the classes.

        Raises InputError for guidance without a class, for a model without classes, for a class that the model does not
        have, and for guidance of a model that never saw an image without its label.
        """
        denoiser, names, label = checkpoint.denoiser, checkpoint.preset.class_names, self.resolved(checkpoint)
        if self.clip is not None:
            denoiser = replace(denoiser, clip=self.clip)
        if not self.classes:
            for name in ("guidance", "guidance_interval"):
                if getattr(self, name) is not None:
                    raise InputError(f"{name}: needs a class; want class NAME")
            return denoiser, []
        if not names:
            raise InputError(f"class {self.classes[0]}: {checkpoint.path} was not trained with classes; want no class")
        wanted = names if self.classes == ("all",) and "all" not in names else self.classes
        for name in wanted:
            if name not in names:
                raise InputError(f"class {name!r}: want {', '.join(names)}, or all")
        guidance = label.guidance
        assert guidance is not None
        if guidance != 1 and checkpoint.preset.label_dropout == 0:
            raise InputError(f"guidance {guidance}: {checkpoint.path} never saw an image without its label; want 1")
        return denoiser.guided(guidance, self.guidance_interval), [names.index(name) for name in wanted]


def sample(
    checkpoint: Checkpoint,
    n: int,
    ranks: Processes,
    sampler: str = "ancestral",
    steps: int | None = None,
    spacing: str | None = None,
    conditions: Conditions = Conditions(),
    eta: float = 0.0,
    sigma_hat: bool = False,
    seed: int = 0,
    batch_size: int = 64,
    strips: bool = False,
    progress: bool = False,
) -> tuple[Tensor, dict[str, Any]]:
    """`n` images of the seeds seed, seed + 1, and so on, and how they were made as plain JSON values.

    The images are uint8 [n, C, H, W], or with `strips` the estimates on the way, uint8 [n, columns, C, H, W]. Every
    process makes its share, and every process gets all of them. Raises InputError for a sampler, steps, a spacing or
    conditions that this model does not have.
    """
    conditions = conditions.resolved(checkpoint)
    denoiser, labels = conditions.apply(checkpoint)
    levels = visited(checkpoint, sampler, steps, spacing)
    seeds, y = [seed + i for i in ranks.mine(n)], in_turn(labels, ranks.mine(n))
    make = progressive if strips else partial(generate, batch_size=batch_size)
    solver = named(sampler, eta, sigma_hat)
    shape = checkpoint.preset.shape
    images = make(denoiser, shape, seeds, solver, levels, device=ranks.device, progress=progress, y=y)
    about = {
        "count": n,
        **checkpoint.about(),
        **sampled(denoiser, sampler, levels, spacing),
        **conditions.about(),
        "sigma_hat": sigma_hat,
        "eta": 1.0 if sigma_hat else eta,
        "seed": seed,
    }
    return ranks.interleave(images, n), about

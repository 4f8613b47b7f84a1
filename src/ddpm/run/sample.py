"""Sample images: from a denoiser in batches of seeds, the strips of Figure 6, and the program behind `ddpm sample`."""

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ddpm import conditions, kernels, pixels, spacing
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError, suggestion
from ddpm.files.models import Checkpoint, calibration_remedy, read_calibration
from ddpm.noise import ahead, mix, normal, per_image
from ddpm.presets import Preset
from ddpm.run.device import use_cuda_graphs
from ddpm.run.forecast import SamplingForecast
from ddpm.run.init import check_guide
from ddpm.run.processes import Processes
from ddpm.run.progress import Progress
from ddpm.samplers import SAMPLERS, Levels, Sampler, Step, named

SPACING_NAMES = (*spacing.SPACINGS, "bound")
"""How levels can be spaced, by name: `bound` is `spacing.optimised` for this model."""


def sampler_of(preset: Preset, default: str = "ancestral") -> str:
    """The sampler of a model of these settings by default: `default`, or `consistency` for a consistency model.

    >>> sampler_of(Preset()), sampler_of(Preset(loss="consistency", predict="v"))
    ('ancestral', 'consistency')
    """
    return "consistency" if preset.loss == "consistency" else default


def check_kind(checkpoint: Checkpoint, sampler: str) -> None:
    """Raise InputError for the sampler `consistency` on an ordinary model, and for others on a consistency model.

    The x0^ of a consistency model is an image. That of an ordinary model is the mean of all images that x_t may come
    from: `consistency` would make blurred pictures of it, and other samplers expect it.
    """
    if (sampler == "consistency") != (wants := checkpoint.preset.loss == "consistency"):
        kind = "a consistency model; want consistency" if wants else "no consistency model; want another sampler"
        raise InputError(f"sampler {sampler}: {checkpoint.path} is {kind}")


def sampler_levels(
    checkpoint: Checkpoint, sampler: str = "ancestral", steps: int | None = None, spaced: str | None = None,
    start: int | None = None,
) -> list[int]:  # fmt: skip
    """The noise levels that a sampler visits, in rising order; the last one is `start` (None: T).

    steps   the number of levels; None is the sampler's own
    spaced  a name in SPACING_NAMES; None is the sampler's own

    Raises InputError for a name that does not exist, as `check_kind` does, for steps or `start` out of range, and for
    `bound` if the model is not calibrated.

    >>> from ddpm.files.opening import open_checkpoint
    >>> digits = open_checkpoint("digits")
    >>> sampler_levels(digits, "unipc", 4), len(sampler_levels(digits, "ddim", 4, "bound"))
    ([1, 477, 995, 1000], 4)
    """
    chosen = named(sampler)
    check_kind(checkpoint, sampler)
    if spaced is not None and spaced not in SPACING_NAMES:
        raise InputError(f"spacing {spaced!r}: {suggestion(spaced, SPACING_NAMES)}want {', '.join(SPACING_NAMES)}")
    if spaced is not None and spaced != "bound":
        chosen = chosen._replace(spacing=spaced)
    levels = chosen.levels(checkpoint.denoiser, steps, start)
    if spaced != "bound":
        return levels
    calibration = read_calibration(checkpoint)
    if calibration is None:
        raise InputError(f"spacing bound: {checkpoint.path} is not calibrated; {calibration_remedy(checkpoint)}")
    top = levels[-1] + 1
    mse, _ = calibration
    cost = spacing.bound_cost(checkpoint.denoiser.schedule, mse, checkpoint.denoiser.values.bin)
    return spacing.optimised(cost[:top, :top], len(levels))


def describe_sampling(denoiser: Denoiser, sampler: str, levels: Sequence[int], spaced: str | None) -> dict[str, Any]:
    """How a sampler makes samples by visiting these levels, as plain JSON values; `spaced` as in `sampler_levels`."""
    row = SAMPLERS[sampler]
    calls = row.calls(denoiser, levels)
    return {"sampler": sampler, "spacing": spaced or row.spacing, "steps": len(levels), "network_calls": calls}


def cycled_labels(classes: Sequence[int], places: Sequence[int]) -> Tensor | None:
    """Labels for the images at these places of a series that cycles over `classes`: int64 [len(places)].

    Returns None if there are no classes.

    >>> cycled_labels([7, 3], range(5))
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
    """The steps from noise to the images of these seeds. The tensors of a Step are [len(seeds), *shape] on `device`.

    shape    of one image, [C, H, W]
    sampler  a name, or a result of `samplers.named`
    steps    a number of levels, the levels themselves, or None for the sampler's own number
    y        class labels, int64 [len(seeds)], or None

    >>> from ddpm import schedule
    >>> grey = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear(10, 1e-3, 0.8), predict="x0")
    >>> [step.t for step in trajectory(grey, (1, 4, 4), seeds=[0], sampler="ddim", steps=[2, 5, 10])]
    [5, 2, 0]
    """
    sampler = named(sampler) if isinstance(sampler, str) else sampler
    levels = sampler.levels(denoiser, steps)
    noise = per_image(seeds, shape, device)
    if torch.device(device).type == "cuda" and sampler.noisy:  # other samplers draw x_T only
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
    watch: Callable[[int], None] = lambda images: None,
    condition: Tensor | None = None,
) -> Tensor:
    """The images of these seeds, pixels [len(seeds), C, H, W] on the CPU; each depends only on its own seed.

    shape, sampler, steps and y are as in `trajectory`. If `stop` becomes true, the function returns early, and the
    images that are not finished are all zeros. `watch` is called after each step of a batch with its number of images.
    `condition` is what `Denoiser.given` takes, one for each seed, or None.

    >>> from ddpm import schedule
    >>> grey = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear(10, 1e-3, 0.8), predict="x0")
    >>> generate(grey, (1, 4, 4), seeds=range(3)).shape
    torch.Size([3, 1, 4, 4])
    """
    images = torch.zeros(len(seeds), *shape, dtype=denoiser.values.torch)
    denoiser = use_cuda_graphs(denoiser, device)
    sampler = named(sampler) if isinstance(sampler, str) else sampler
    total = len(seeds) * len(sampler.levels(denoiser, steps))
    with Progress[None](total=total, unit="step", desc="sampling", show=progress, leave=False) as bar:
        for start in range(0, len(seeds), batch_size):
            part = slice(start, start + batch_size)
            labels = None if y is None else y[part]
            told = denoiser.given(None if condition is None else condition[part].to(device))
            for step in trajectory(told, shape, seeds[part], sampler, steps, device, labels):
                bar.update(len(step.x))
                watch(len(step.x))
                if stop():
                    return images
                if step.t == 0:
                    images[part] = pixels.to_pixels(step.x, denoiser.values).cpu()
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
    noisy: bool = False,
    watch: Callable[[int], None] = lambda images: None,
    condition: Tensor | None = None,
) -> Tensor:
    """Figure 6: x0^ (Eq. 15) at `columns` evenly spaced steps of the sampling, of which the last is the image.

    noisy  show x_t instead, clipped to what pixels can show

    Returns pixels [len(seeds), columns, C, H, W] on the CPU, with fewer columns if there are fewer steps. The other
    arguments are as in `generate`.

    >>> from ddpm import schedule
    >>> grey = Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule.linear(20, 1e-3, 0.6), predict="x0")
    >>> progressive(grey, (1, 4, 4), seeds=range(3)).shape
    torch.Size([3, 11, 1, 4, 4])
    """
    sampler = named(sampler) if isinstance(sampler, str) else sampler
    n = len(sampler.levels(denoiser, steps))
    columns = min(columns, n)
    denoiser = use_cuda_graphs(denoiser, device).given(None if condition is None else condition.to(device))
    shown = [round((n - 1) * i / max(columns - 1, 1)) for i in range(columns)]
    strip = []
    path = trajectory(denoiser, shape, seeds, sampler, steps, device, y)
    bar = Progress(path, total=n, unit="step", desc="sampling", show=progress, leave=False)
    for i, step in enumerate(bar):
        watch(len(step.x))
        if i in shown:
            shown_now = step.x if noisy or step.t == 0 else step.x0
            strip.append(pixels.to_pixels(shown_now, denoiser.values).cpu())
    return torch.stack(strip, dim=1)


# -- the program -------------------------------------------------------------------------------------------------------

_COLUMNS = 16
"""Most tiles in a row of a grid, unless one input has more samples."""
_CONDITION = 0xC0DE
"""Key of the noise on a condition."""
GUIDANCE = 1.5
"""The guidance scale if a class is asked for and no scale is given."""


@dataclass(frozen=True)
class Conditions:
    """What samples are made under; each None is the model's own default.

    classes            names of classes, over which the images cycle; ("all",) for every class; () for no class
    guidance           scale of classifier-free guidance: 1 for none
    guidance_interval  the first and the last noise level t with guidance
    clip               True clips x0^ to [-1, 1], False does not, and a number in (0, 1) is a quantile
    guide              a weaker model, for autoguidance in the place of classifier-free guidance
    guide_scale        scale of autoguidance: 1 for none
    """

    classes: tuple[str, ...] = ()
    guidance: float | None = None
    guidance_interval: tuple[int, int] | None = None
    clip: bool | float | None = None
    guide: Checkpoint | None = None
    guide_scale: float = GUIDANCE

    def about(self) -> dict[str, Any]:
        """The conditions that were given, as plain JSON values."""
        values = {
            "classes": list(self.classes) or None,
            "guidance": self.guidance,
            "guidance_interval": self.guidance_interval,
            "clip": self.clip,
            "guide": self.guide and {**self.guide.about(), "scale": self.guide_scale},
        }
        return {name: value for name, value in values.items() if value is not None}

    def resolved(self, checkpoint: Checkpoint) -> "Conditions":
        """The same with the guidance that this model gets by default."""
        if not self.classes or self.guidance is not None:
            return self
        preset = checkpoint.preset
        guided = preset.label_dropout > 0 and preset.loss != "consistency" and self.guide is None
        return replace(self, guidance=GUIDANCE if guided else 1.0)

    def apply(self, checkpoint: Checkpoint, sampling: bool = True) -> tuple[Denoiser, list[int]]:
        """The model's denoiser under these conditions, and the labels of the classes.

        Without a class, guidance goes towards the condition on an image. Raises InputError for guidance without a class
        and without such a condition, for a model without classes, for a class that the model does not have, for
        guidance of a consistency model, and for a guide that does not fit. For a model that never saw an image without
        its label, it raises InputError for guidance, and for no class unless `sampling` is false.
        """
        denoiser, preset, names = checkpoint.denoiser, checkpoint.preset, checkpoint.preset.class_names
        if self.clip is not None:
            denoiser = replace(denoiser, clip=self.clip)
        if self.guide is not None:
            self._check_guide(self.guide, checkpoint)
            denoiser = denoiser.guided(self.guide_scale, self.guidance_interval, self.guide.denoiser)
        if not self.classes:
            asked = [name for name in ("guidance", "guidance_interval") if getattr(self, name) is not None]
            if asked and self.guide is None:
                denoiser = self._guided_to_condition(asked[0], denoiser, checkpoint)
            if preset.always_labelled and sampling:
                known = ", ".join(names[:10]) + ", ..." * (len(names) > 10)
                raise InputError(f"class: {checkpoint.path} never saw an image without its label; want {known}, or all")
            return denoiser, []
        if not names:
            raise InputError(f"class {self.classes[0]}: {checkpoint.path} was not trained with classes; want no class")
        wanted = names if self.classes == ("all",) and "all" not in names else self.classes
        for name in wanted:
            if name not in names:
                raise InputError(f"class {name!r}: {suggestion(name, names)}want {', '.join(names)}, or all")
        guidance = self.resolved(checkpoint).guidance
        assert guidance is not None
        if guidance != 1 and preset.label_dropout == 0:
            raise InputError(f"guidance {guidance}: {checkpoint.path} never saw an image without its label; want 1")
        self._check_distilled(checkpoint)
        if self.guide is None:
            if self.guidance_interval is not None and guidance == 1:
                raise InputError("guidance_interval: there is no guidance; want guidance other than 1, or no interval")
            denoiser = denoiser.guided(guidance, self.guidance_interval)
        return denoiser, [names.index(name) for name in wanted]

    def _check_distilled(self, checkpoint: Checkpoint) -> None:
        """Raise InputError for guidance of a consistency model."""
        if self.guidance not in (None, 1) and checkpoint.preset.loss == "consistency":
            raise InputError(
                f"guidance {self.guidance}: {checkpoint.path} has the guidance of its distillation; want 1"
            )

    def _guided_to_condition(self, asked: str, denoiser: Denoiser, checkpoint: Checkpoint) -> Denoiser:
        """The denoiser with guidance towards the condition on an image. `asked` is the setting that wants guidance."""
        if checkpoint.preset.condition == "none":
            raise InputError(f"{asked}: needs a class; want class NAME")
        if checkpoint.preset.condition_dropout == 0:
            raise InputError(f"{asked}: {checkpoint.path} never saw an image without its condition; want no {asked}")
        self._check_distilled(checkpoint)
        if self.guidance is None:
            raise InputError(f"{asked}: needs guidance; want guidance X, too")
        return denoiser.guided(self.guidance, self.guidance_interval)

    def _check_guide(self, guide: Checkpoint, checkpoint: Checkpoint) -> None:
        """Raise InputError for a guide that is no weaker version of the model."""
        if self.guidance not in (None, 1):
            raise InputError(f"guidance {self.guidance}: not with a guide, which takes its place; want one of the two")
        if checkpoint.preset.loss == "consistency":
            raise InputError(f"guide {guide.path}: {checkpoint.path} is a consistency model; want an ordinary model")
        check_guide(guide, checkpoint.preset, str(checkpoint.path))


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a model with a condition is told of a series of images: `each` images in a row have the same picture.

    The conditions, which are larger, are made for a batch at a time.

    pictures  pixels [M, c, h, w]
    known     bool [M, 1, H, W], where a picture is known
    values    what the numbers of the pictures are
    each      images per picture
    name      where the pictures come from, for records
    made      how another model made them, as plain JSON values; None for files
    labels    numbers of the classes over which they cycle, if the other model has classes and this one has none
    """

    pictures: Tensor
    known: Tensor
    values: pixels.Values
    each: int
    name: str
    made: Mapping[str, Any] | None = None
    labels: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.pictures)

    def of(self, places: Sequence[int]) -> Tensor:
        """The conditions of the images at these places of the series, [len(places), c + 1, H, W].

        >>> pictures = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
        >>> inputs = Inputs(pictures, torch.ones(2, 1, 1, 1), pixels.EIGHT_BIT, 3, "")
        >>> inputs.of(range(2, 5))[:, 0].flatten().tolist()
        [-1.0, 1.0, 1.0]
        """
        own = [place // self.each for place in places]
        return conditions.join(pixels.to_signal(self.pictures[own], self.values), self.known[own].float())

    def beside(self, samples: Tensor) -> tuple[Tensor, int]:
        """The pixels of a grid in which each condition stands to the left of its samples, and the grid's columns.

        >>> pictures = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
        >>> inputs = Inputs(pictures, torch.ones(2, 1, 4, 4), pixels.EIGHT_BIT, 3, "")
        >>> tiles, columns = inputs.beside(torch.zeros(6, 1, 4, 4, dtype=torch.uint8))
        >>> len(tiles), columns
        (8, 16)
        """
        told = self.of(range(0, self.each * len(self), self.each))
        told = pixels.to_pixels(conditions.shown(told, samples.shape[1]), self.values)
        tiles = torch.cat([told[:, None], samples.view(-1, self.each, *samples.shape[1:])], dim=1)
        return tiles.flatten(0, 1), (self.each + 1) * max(1, _COLUMNS // (self.each + 1))

    def about(self) -> dict[str, object]:
        """The inputs as plain JSON values."""
        if self.made is not None:
            return {"input": self.name, **{f"input_{name}": value for name, value in self.made.items()}}
        digest = hashlib.sha256(self.pictures.numpy().tobytes() + self.known.numpy().tobytes()).hexdigest()
        return {"input": self.name, "inputs": len(self), "per_input": self.each, "input_sha256": digest[:16]}


@dataclass(frozen=True)
class Sampling:
    """How samples of a checkpoint are made; each None is the model's or the sampler's own default.

    sampler     a name in SAMPLERS
    steps       the number of noise levels to visit
    spacing     a name in SPACING_NAMES
    conditions  classes, guidance and clipping
    eta         noise of ddim
    sigma_hat   ddim with the larger noise sigma^
    seed        seed of image 0; image i has seed + i
    shift       is added to the seeds of the noise, but not to those of names and records
    batch_size  images at a time; no result depends on it
    inputs      conditions on images, for a model that takes them
    condition_noise  standard deviation of the noise that is added to them; each image's is drawn from its seed
    """

    sampler: str = "ancestral"
    steps: int | None = None
    spacing: str | None = None
    conditions: Conditions = Conditions()
    eta: float = 0.0
    sigma_hat: bool = False
    seed: int = 0
    batch_size: int = 64
    inputs: Inputs | None = None
    condition_noise: float = 0.0
    shift: int = 0

    def maker(self, checkpoint: Checkpoint, device: torch.device) -> tuple[Callable[..., Tensor], dict[str, Any]]:
        """A function from places 0, 1, ... of the series to its images on the CPU, and how they are made.

        The function takes `strips`, `progress`, `columns` and `noisy`, as `sample` does, and `watch`, as `generate`
        does. How the images are made is plain JSON values. Raises InputError for a sampler, steps, a spacing or
        conditions that this model does not have.
        """
        if (wanted := checkpoint.preset.condition) != "none" and self.inputs is None:
            raise InputError(
                f"input: {checkpoint.path} was trained with condition {wanted}; want an image file, or a folder of them"
            )
        for model in filter(None, (checkpoint, self.conditions.guide)):
            if not 0 <= self.condition_noise <= (most := model.preset.condition_noise):
                told = f"condition_noise {self.condition_noise:g}"
                raise InputError(f"{told}: {model.path} was trained with 0 to {most:g}")
        conditions = self.conditions.resolved(checkpoint)
        denoiser, labels = conditions.apply(checkpoint)
        levels = sampler_levels(checkpoint, self.sampler, self.steps, self.spacing)
        solver = named(self.sampler, self.eta, self.sigma_hat)

        def make(
            places: Sequence[int], strips: bool = False, progress: bool = False, columns: int = 11, noisy: bool = False,
            watch: Callable[[int], None] = lambda images: None,
        ) -> Tensor:  # fmt: skip
            if strips and len(places) > self.batch_size:
                batches = [places[i : i + self.batch_size] for i in range(0, len(places), self.batch_size)]
                return torch.cat([make(batch, strips, progress, columns, noisy, watch) for batch in batches])
            seeds, y = [self.seed + self.shift + i for i in places], cycled_labels(labels, places)
            run: Callable[..., Tensor] = partial(generate, batch_size=self.batch_size)
            if strips:
                run = partial(progressive, columns=columns, noisy=noisy)
            return run(
                denoiser, checkpoint.preset.shape, seeds, solver, levels, device=device, progress=progress, y=y,
                watch=watch, condition=self._told(places),
            )  # fmt: skip

        about = {
            **checkpoint.about(),
            **describe_sampling(denoiser, self.sampler, levels, self.spacing),
            **conditions.about(),
            **({} if self.inputs is None else {**self.inputs.about(), "condition_noise": self.condition_noise}),
            "sigma_hat": self.sigma_hat,
            "eta": 1.0 if self.sigma_hat else self.eta,
            "seed": self.seed,
        }
        return make, about

    def _told(self, places: Sequence[int]) -> Tensor | None:
        """The conditions of the images at these places, with their noise."""
        if self.inputs is None:
            return None
        told = self.inputs.of(places)
        if not self.condition_noise:
            return told
        eps = normal(
            [mix(self.seed + self.shift + place, _CONDITION) for place in places], (told.shape[1] - 1, *told.shape[2:])
        )
        return conditions.noisy(told, torch.full((len(told),), self.condition_noise), eps)


def sample(
    checkpoint: Checkpoint,
    n: int,
    ranks: Processes,
    sampling: Sampling = Sampling(),
    strips: bool = False,
    progress: bool = False,
    columns: int = 11,
    noisy: bool = False,
) -> tuple[Tensor, dict[str, Any]]:
    """`n` images of the seeds seed, seed + 1, and so on, and how they were made as plain JSON values.

    The images are [n, C, H, W], or with `strips` the estimates on the way, [n, columns, C, H, W], or x_t if `noisy`.
    Every process makes its share, and every process gets all of them. Raises InputError as `Sampling.maker` does, and
    if the images do not fit in this machine's memory.
    """
    pixel = checkpoint.denoiser.values.torch.itemsize
    size = n * math.prod(checkpoint.preset.shape) * pixel * (columns if strips else 1)
    if (memory := _memory()) is not None and size > memory:
        raise InputError(
            f"n {n}: {size / 2**30:,.0f} GiB of images do not fit in this machine's memory; want fewer, or a folder, "
            "to which images are written as they are made"
        )
    make, about = sampling.maker(checkpoint, ranks.device)
    watch = forecast(len(ranks.mine(n)), about, progress, ranks)
    images = make(ranks.mine(n), strips, progress, columns, noisy, watch)
    ranks.exchange()  # wait for the other processes as long as they live
    return ranks.interleave(images, n), {"count": n, **about}


def forecast(n: int, about: dict[str, Any], progress: bool, ranks: Processes) -> Callable[[int], None]:
    """What says how long `n` images of these settings take, if `progress` is wanted. A GPU's steps are not timed."""
    if not progress or ranks.device.type == "cuda":
        return lambda images: None
    return SamplingForecast(n, about["steps"], about["network_calls"])


def _memory() -> int | None:
    """The bytes of memory of this machine, or None if the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None

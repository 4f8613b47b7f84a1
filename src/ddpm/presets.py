"""All settings of a run in one frozen dataclass, and a table of presets with their results.

This module does not import torch, so that `ddpm train --help` is quick.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from ddpm import catalog
from ddpm.catalog import Compile, Fit, PixelType, Precision, Prediction, TimestepSampling, Variance, Weighting, Workers
from ddpm.details import Details
from ddpm.errors import InputError, byte_count, check_size, finite_number, suggestion, whole_number

if TYPE_CHECKING:
    from ddpm.denoiser import Denoiser


GROUPS = {
    "data": "the images and their labels",
    "network": "the U-Net",
    "diffusion": "the forward process, and what the network learns of it",
    "optimisation": "the training steps",
    "run": "where the run works, and what it writes",
}
"""The groups of settings, in the order of `ddpm train --help`."""


DISTILLED = (
    "steps", "batch_size", "accumulate", "lr", "warmup", "cooldown", "ema_decay", "dropout", "gap_steps", "teacher",
    "guidance", "guide", "guide_scale", "last_sigma", "seed", "device", "workers", "save_every", "keep_steps",
    "sample_every", "eval_images", "image_column", "label_column", "pairs", "pair_column", "skip_bad", "allow_paths",
)  # fmt: skip
"""The settings that `ddpm distill` has as options. All others are those of the model, and of `init.distilled`."""


def _setting(
    group: str,
    default: Any,
    help: str,
    least: float | None = None,
    most: float | None = None,
    resume: bool = False,
    choices: Iterable[str] = (),
    value: str = "",
) -> Any:
    """A field of Preset: its group, its line of help, its range, and whether a resumed run may change it.

    value  what help calls the value, if its type does not tell
    """
    about = {"group": group, "help": help, "least": least, "most": most, "resume": resume, "value": value}
    return field(default=default, metadata=about | {"choices": tuple(choices)})


# Upper bounds, so that no number of a damaged or foreign file makes a loop that never ends.
_SIDE, _MANY, _COUNT, _LEVELS = 1 << 16, 10**6, 10**12, 16

_data, _network, _diffusion, _optimisation, _run = (partial(_setting, group) for group in GROUPS)


@dataclass(frozen=True)
class Preset:
    """All settings of a run. Raises InputError for a value that cannot be used.

    >>> PRESETS["cifar10"].lr, replace(PRESETS["cifar10"], lr=1e-4).lr
    (0.0002, 0.0001)
    """

    data: str = _data("", f"source of the images: {catalog.accepted_sources()}", value="SOURCE")
    size: tuple[int, int] = _data(
        (32, 32), "size of the images in training, height x width: 32 or 32x48", 1, _SIDE, value="HxW"
    )
    channels: int = _data(3, "number of channels of an image: 1 for grey, 3 for RGB, 4 for RGBA, or any other", 1, 1024)
    pixel_type: PixelType = _data("uint8", "type of the numbers in an image")
    value_range: tuple[float, ...] = _data(
        (),
        "numbers that are black and white (default: the range of the type; for float32, the range of the data)",
        value="LOW,HIGH",
    )
    clip_values: bool = _data(False, "clip numbers outside value_range, instead of refusing them")
    fit: Fit = _data(
        "crop",
        "how an image gets this size: crop scales it and cuts off two edges, pad scales it and adds black edges, "
        "stretch scales both sides apart, random-crop takes a part of each image at its own resolution",
    )
    pages: Literal["first", "channels", "images"] = _data(
        "first", "what to take from a TIFF file of several pages: the first one, all as channels, or each as an image"
    )
    show: tuple[int, ...] = _data(
        (),
        "show these channels in pictures, counted from 1: one, or three as 4,3,2 (default: the first)",
        1,
        1024,
        True,
    )
    show_range: tuple[float, ...] = _data(
        (), "show these numbers as black and as white in pictures (default: value_range)", resume=True, value="LOW,HIGH"
    )
    flip: bool = _data(True, "mirror each training image left to right with probability 1/2")
    mirror: bool = _data(False, "mirror each training image top to bottom with probability 1/2")
    turn: bool = _data(False, "turn each training image by 0, 90, 180 or 270 degrees, at random")
    augment: float = _data(
        0.0,
        "probability of each random warp of a training image: scaling, turning, stretching, moving and mirroring; the "
        "network is told the warp, also that of flip, so samples are not warped; EDM uses 0.12 for CIFAR-10",
        0,
        1,
    )
    image_column: str = _data("", "column of a dataset that holds the images (default: the only one)", value="NAME")
    label_column: str = _data(
        "", "column of a dataset that holds its labels (default: label, class, ...)", value="NAME"
    )
    classes: bool = _data(False, "learn the labels of the dataset, so that a class can be sampled by its name")
    class_names: tuple[str, ...] = _data((), "the names of the classes, from the dataset", resume=True)
    label_dropout: float = _data(0.1, "probability of hiding a label in training, which guidance needs", 0, 1)
    condition: str = _data(
        "none", f"what the network is told of an image: {catalog.accepted_conditions()}", value="KIND"
    )
    condition_dropout: float = _data(
        0.0, "probability of hiding the condition in training, which guidance towards it needs", 0, 1
    )
    condition_noise: float = _data(
        0.0,
        "largest standard deviation of noise on the condition, where 1 is half the range of the values; each image "
        "draws its own, evenly from 0 to this, and the network is told it",
        0,
        0.99,
    )
    pairs: str = _data(
        "",
        "source of the other images of condition pairs, with the names and the order of the data (default: the data, "
        "with pair_column)",
        value="SOURCE",
    )
    pair_column: str = _data(
        "", "column that holds the other images of condition pairs (default: the only one of pairs)", value="NAME"
    )
    skip_bad: bool = _data(False, "skip images that cannot be read, and count them", resume=True)
    allow_paths: bool = _data(False, "let a dataset name image files outside its own folder", resume=True)
    verify: bool = _data(
        False, "hash the contents of all images; the run then resumes only on exactly these images", resume=True
    )
    shuffle_window: int = _data(
        10_000, "number of images to shuffle together, if the shards of a dataset must be read in order", 1, _COUNT
    )
    cache_bytes: int = _data(
        4 * 2**30,
        "memory for decoded images, as 4G or 500M; images that do not fit are decoded for each use",
        0,
        2**62,
        resume=True,
        value="BYTES",
    )

    width: int = _network(128, "number of channels at the first level, a multiple of 32", 32, 8192)
    channel_multipliers: tuple[int, ...] = _network(
        (1, 2, 2, 2), "channels of each level as multiples of width; each next level halves the size", 1, 64
    )
    num_res_blocks: int = _network(2, "number of residual blocks per level", 1, 64)
    attention_resolutions: tuple[int, ...] = _network(
        (16,), "add attention at the first level whose shorter side is at most this; 0 for none", 0, _SIDE
    )
    dropout: float = _network(0.1, "dropout probability in the residual blocks", 0, 0.99)
    patch: Literal[1, 2] = _network(
        1, "2 runs all levels but a thin outer one at half the size, for a quarter of the cost; 1 does not"
    )
    details: Details = _network(Details(), "where an imported network differs from the paper's")

    schedule: str = _diffusion("linear", "noise schedule", choices=catalog.schedules())
    num_timesteps: int = _diffusion(1000, "number of noise levels, T", 1, _MANY)
    beta_1: float = _diffusion(1e-4, "first beta of the schedule", 1e-12, 1)
    beta_T: float = _diffusion(0.02, "last beta of the schedule", 1e-12, 1)
    last_sigma: float = _diffusion(
        0.0, "largest sqrt((1 - abar)/abar) of a noise level; 0 keeps all levels (default of distill: 80)", 0
    )
    predict: Prediction = _diffusion("eps", "what the network predicts: the noise eps, the image x0, the mean mu, or v")
    variance: Variance = _diffusion("fixed_large", "variance of the reverse process, sigma_t^2")
    clip: bool = _diffusion(True, "clip x0^, the estimate of the image, to [-1, 1] in sampling and evaluation")
    loss: Literal["simple", "vlb", "hybrid", "consistency"] = _diffusion(
        "simple",
        "loss to minimise: simple is L_simple (Eq. 14), vlb is the bound (Eq. 5), hybrid is both, and consistency is "
        "that of `ddpm distill`",
    )
    weighting: Weighting = _diffusion("none", "weighting of the noise levels in L_simple")
    timestep_sampling: TimestepSampling = _diffusion(
        "uniform",
        "how to draw the noise levels of a batch: uniform (independently), stratified (evenly), lognormal (evenly, by "
        "quantiles of a log-normal sigma), lognormal_wide (the same, with a wider sigma), or bound (evenly, by "
        "quantiles of the bound's weight)",
    )
    noise_assignment: Literal["independent", "nearest"] = _diffusion(
        "independent",
        "how the images of a batch get their noise: independently of the image, as in Eq. 4; or so that the sum of "
        "squared distances is least, which trains another target, so bits/dim get worse",
    )

    steps: int = _optimisation(800_000, "total number of training steps", 1, _COUNT, resume=True)
    batch_size: int = _optimisation(128, "number of images per step, over all processes", 1, _MANY)
    accumulate: int = _optimisation(
        1,
        "compute each step in this many parts, which takes less memory; only rounding and the draws of dropout differ",
        1,
        _MANY,
        resume=True,
    )
    optimizer: Literal["adam", "muon"] = _optimisation(
        "adam", "adam for all weights, or muon for those between hidden layers and adam for the others"
    )
    lr: float = _optimisation(2e-4, "learning rate", 0)
    warmup: int = _optimisation(5000, "number of steps over which the learning rate rises linearly from 0", 0, _COUNT)
    cooldown: float = _optimisation(
        0.0, "share of the steps, at the end, over which the learning rate falls linearly to 0", 0, 1
    )
    lr_ref_steps: int = _optimisation(
        0, "number of steps after which the learning rate falls as 1/sqrt(step), without an end; 0 for none", 0, _COUNT
    )
    grad_clip: float = _optimisation(1.0, "clip the global norm of the gradient to this; 0 for no clipping", 0)
    ema_decay: float = _optimisation(0.9999, "decay of the moving average of the weights (EMA)", 0, 0.999999)
    ema_warmup: bool = _optimisation(False, "let the EMA decay rise as (1 + n)/(10 + n) with step n, for short runs")
    precision: Precision = _optimisation("auto", "precision of the network; auto is bf16 if the device is fast at it")
    gradient_checkpointing: bool = _optimisation(
        False, "recompute activations in the backward pass: less memory, more time", resume=True
    )

    init: str = _optimisation(
        "", "model to fine-tune: begin with its network and weights, and half the learning rate", value="MODEL"
    )
    gap_steps: int = _optimisation(
        2500, "number of steps after which the gap of loss consistency halves, seven times at most", 1, _COUNT
    )
    teacher: bool = _optimisation(
        False, "let the model of init step to the lower level of loss consistency; otherwise the image gets less noise"
    )
    guidance: float = _optimisation(1.0, "guidance scale of the teacher; 1 is without guidance", 1, 100)
    guide: str = _optimisation(
        "", "weaker model that guides the teacher (autoguidance); each start needs it", resume=True, value="MODEL"
    )
    guide_scale: float = _optimisation(1.5, "guidance scale of the guide; 1 is without guidance", 1, 100)

    seed: int = _run(0, "seed of the weights, the order of the images, the noise and the dropout", 0, 2**63 - 1)
    device: str = _run("auto", "device to train on: auto, cpu, cuda, cuda:1 or mps", resume=True, value="DEVICE")
    compile: Compile = _run("auto", "compile the network with Inductor; auto is on for CUDA devices", resume=True)
    workers: Workers = _run(
        "auto",
        "number of processes that decode images, if these do not fit in cache_bytes; auto chooses it by the speed of "
        "the first steps",
        0,
        1024,
        resume=True,
        value="auto|N",
    )
    save_every: int = _run(5000, "number of steps between checkpoints", 1, _COUNT, resume=True)
    save_minutes: float = _run(
        10,
        "save a checkpoint, without a held-out loss, when the last one is this many minutes old; 0 for never",
        0,
        resume=True,
    )
    timeout: float = _run(
        10,
        "under torchrun, minutes without a sign of life after which a process counts as lost; the others save and end",
        0.05,
        10_000,
        resume=True,
    )
    keep: int = _run(2, "number of newest checkpoints to keep, besides the best one", 1, _COUNT, resume=True)
    keep_steps: tuple[int, ...] = _run(
        (0,), "save and keep the checkpoints of these steps, too; 0 for none", 0, _COUNT, resume=True
    )
    snapshot_every: int = _run(
        0,
        "number of steps between snapshots, from which `ddpm average` makes other averages of the weights; 0 for none",
        0,
        _COUNT,
    )
    log_every: int = _run(50, "number of steps between lines of metrics.jsonl", 1, _COUNT, resume=True)
    sample_every: int = _run(5000, "number of steps between grids of samples; 0 for no grids", 0, _COUNT, resume=True)
    sample_count: int = _run(64, "number of images in a grid of samples", 1, _MANY, resume=True)
    sample_steps: int = _run(50, "number of DDIM steps for a grid of samples", 1, _MANY, resume=True)
    eval_images: int = _run(
        512,
        "number of noisy held-out images for the held-out loss; a small held-out set is used at several levels",
        1,
        _COUNT,
        resume=True,
    )
    track: str = _run(
        "none",
        f"also send the curves to a tracker, which the extra of its name installs: none, {catalog.accepted_trackers()}",
        choices=("none", *catalog.trackers()),
        resume=True,
    )

    def __post_init__(self) -> None:
        types = types_of_settings()
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in choices:
                raise InputError(f"{f.name} {value!r}: {suggestion(value, choices)}want {', '.join(choices)}")
            value = byte_count(f.name, value) if f.name == "cache_bytes" else value
            left_open = isinstance(value, tuple) and value == f.default == ()
            if not left_open:
                value = check(f.name, value, types[f.name], f.metadata["least"], f.metadata["most"])
            object.__setattr__(self, f.name, value)
        if self.show and (len(self.show) not in (1, 3) or max(self.show) > self.channels):
            raise InputError(f"show {','.join(map(str, self.show))}: want 1 or 3 channels of 1..{self.channels}")
        if self.show_range and (len(self.show_range) != 2 or self.show_range[0] >= self.show_range[1]):
            raise InputError(f"show_range {','.join(f'{x:g}' for x in self.show_range)}: want LOW,HIGH, LOW below HIGH")
        if len(self.size) != 2:
            raise InputError(f"size {self.size}: want height and width, as 32 or 32x48")
        if len(self.channel_multipliers) > _LEVELS:
            raise InputError(f"channel_multipliers: {len(self.channel_multipliers)} levels; want at most {_LEVELS}")
        check_size(self.size, len(self.channel_multipliers) + self.patch - 1)
        if self.turn and self.size[0] != self.size[1]:
            raise InputError(f"turn: images of size {self.size[0]}x{self.size[1]} cannot be turned; want a square size")
        if self.width % 32:
            raise InputError(f"width {self.width}: want a multiple of 32")
        if self.loss in ("simple", "consistency") and self.variance.startswith("learned"):
            want = "a fixed one" if self.loss == "consistency" else "loss hybrid or vlb"
            raise InputError(f"variance {self.variance}: loss {self.loss} does not train it; want {want}")
        if self.loss == "consistency" and self.predict not in ("x0", "v"):
            raise InputError(f"predict {self.predict}: loss consistency needs x0^ even at high noise; want x0 or v")
        if self.pixel_type == "float32" and self.loss in ("vlb", "hybrid"):
            raise InputError(f"loss {self.loss}: the bound of float32 images has no L_0 (Eq. 13); want loss simple")
        if self.teacher and self.loss != "consistency":
            raise InputError(f"teacher: loss {self.loss} has none; want loss consistency, or teacher false")
        if self.guidance != 1 and not (self.teacher and self.classes and self.label_dropout):
            raise InputError(f"guidance {self.guidance}: needs a teacher, classes, and label_dropout above 0; want 1")
        if self.guide and not self.teacher:
            raise InputError(f"guide {self.guide}: there is no teacher to guide; want teacher true, or no guide")
        if self.guide and self.guidance != 1:
            raise InputError(f"guidance {self.guidance}: not with a guide, which takes its place; want one of the two")
        if self.guide_scale != Preset.guide_scale and not self.guide:
            raise InputError(f"guide_scale {self.guide_scale:g}: there is no guide; want guide MODEL, too")
        if self.weighting != "none" and (self.loss != "simple" or self.predict == "mu"):
            raise InputError(f"weighting {self.weighting}: needs loss simple, and predict eps, x0 or v")
        if self.timestep_sampling == "bound" and self.predict == "mu":
            raise InputError("timestep_sampling bound: needs predict eps, x0 or v; want uniform or stratified for mu")
        if self.noise_assignment == "nearest" and self.loss != "simple":
            raise InputError(f"noise_assignment nearest: loss {self.loss} needs the noise of Eq. 4; want loss simple")
        if self.classes and self.label_dropout == 1:
            raise InputError("label_dropout 1.0: would hide every label; want less, or classes false")
        self._check_condition()
        if self.predict == "eps" and self.schedule == "jsd":
            raise InputError("predict eps: cannot give x_0 at the last level of schedule jsd; want x0, mu or v")
        if self.batch_size % self.accumulate:
            raise InputError(f"accumulate {self.accumulate}: want a divisor of batch_size {self.batch_size}")
        if self.sample_steps > self.num_timesteps:
            raise InputError(f"sample_steps {self.sample_steps}: want at most num_timesteps, {self.num_timesteps}")

    def _check_condition(self) -> None:
        kind, _, argument = self.condition.partition(":")
        kinds, name, (height, width) = catalog.conditions(), f"condition {self.condition}", self.size
        if kind not in ("none", *kinds) or bool(argument) != (kind in kinds and "argument" in kinds[kind].settings):
            hint = "" if kind in kinds else suggestion(kind, kinds)
            raise InputError(f"{name}: {hint}want {catalog.accepted_conditions()}")
        if kind == "mask" and argument not in catalog.masks():
            raise InputError(f"{name}: {suggestion(argument, catalog.masks())}want {', '.join(catalog.masks())}")
        if kind == "lowres" and (
            not argument.isdecimal() or int(argument) < 2 or height % int(argument) or width % int(argument)
        ):
            raise InputError(f"{name}: want a whole number of at least 2 that divides both sides of {height}x{width}")
        if kind == "grey" and self.channels == 1:
            raise InputError(f"{name}: the images are grey already; want channels 3, or another condition")
        if kind == "grey" and self.channels == 4 and self.pixel_type == "uint8":
            raise InputError(f"{name}: grey pictures have no transparency; want channels 3, or another condition")
        if kind == "pairs" and not (self.pairs or self.pair_column):
            raise InputError(f"{name}: has no other images; want a SOURCE as pairs, or a column of data as pair_column")
        for what in ("pairs", "pair_column"):
            if kind != "pairs" and (given := getattr(self, what)):
                raise InputError(f"{what} {given}: the condition is {self.condition}; want condition pairs with it")
        if self.pair_column and not self.pairs and self.pair_column == self.image_column:
            raise InputError(f"pair_column {self.pair_column}: is image_column, too; want another column")
        if kind == "pairs" and self.skip_bad:
            raise InputError(f"{name}: not with skip_bad; want both images of a bad pair removed")
        if self.condition_dropout == 1 or (kind == "none" and self.condition_dropout):
            raise InputError(
                f"condition_dropout {self.condition_dropout:g}: want less than 1, and 0 without a condition"
            )
        if kind == "none" and self.condition_noise:
            raise InputError(f"condition_noise {self.condition_noise:g}: want 0 without a condition")
        if kind != "none" and self.noise_assignment == "nearest":
            raise InputError(
                "noise_assignment nearest: only images that the network is told the same of exchange noise, "
                "and conditions differ; want independent"
            )

    @property
    def condition_channels(self) -> int:
        """The channels of the condition: those of its picture, and one that says where it is known; 0 without one.

        >>> replace(PRESETS["cifar10"], condition="lowres:4").condition_channels
        4
        """
        kind = self.condition.partition(":")[0]
        return 0 if kind == "none" else catalog.conditions()[kind].settings.get("channels", self.channels) + 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """[C, H, W] of an image."""
        return self.channels, *self.size

    @property
    def kind(self) -> str:
        """What the images are, in words.

        >>> PRESETS["digits"].kind, PRESETS["grey16"].kind, replace(PRESETS["grey16"], channels=13).kind
        ('grey', '16-bit grey', '16-bit 13-channel')
        """
        depth = {"uint8": "", "uint16": "16-bit ", "float32": "floating point "}[self.pixel_type]
        return depth + {1: "grey", 3: "RGB", 4: "RGBA"}.get(self.channels, f"{self.channels}-channel")

    @property
    def always_labelled(self) -> bool:
        """Whether the network never sees an image without its label, and so cannot be called without one."""
        return bool(self.class_names) and self.label_dropout == 0

    @property
    def attention_levels(self) -> tuple[int, ...]:
        """The network's levels with attention: for each resolution, the first level whose shorter side is at most that.

        >>> PRESETS["cifar10"].attention_levels, PRESETS["celebahq256"].attention_levels
        ((1,), (4,))
        """
        sides = [min(self.size) // self.patch >> level for level in range(len(self.channel_multipliers))]
        first_levels = {
            next((level for level, side in enumerate(sides) if side <= a), -1) for a in self.attention_resolutions if a
        }
        return tuple(sorted(first_levels - {-1}))


@cache
def types_of_settings() -> Mapping[str, Any]:
    """The type of each field of `Preset`. It is evaluated once, because the class has the types as text.

    >>> types_of_settings()["size"]
    tuple[int, int]
    """
    return get_type_hints(Preset)


def check(name: str, value: Any, kind: Any, least: float | None = None, most: float | None = None) -> Any:
    """Return `value` as `kind` (int, float, bool, str, Literal, tuple); numbers of NumPy and torch become Python's.

    Raises InputError for another kind of value, and for one outside [least, most].
    """
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            hint = suggestion(value, get_args(kind)) if isinstance(value, str) else ""
            raise InputError(f"{name} {value!r}: {hint}want {', '.join(map(str, get_args(kind)))}")
        return value
    if kind == Workers:
        if value == "auto":
            return value
        if isinstance(value, str):
            raise InputError(f"{name} {value!r}: want auto or a whole number, {least} to {most}")
        kind = int
    if get_origin(kind) is tuple:
        element = get_args(kind)[0]
        if not isinstance(value, tuple) or not (value or element is str):
            raise InputError(f"{name} {value!r}: want {'whole ' * (element is int)}numbers with commas between")
        return tuple(check(name, one, element, least, most) for one in value)
    if kind is int:
        return whole_number(name, value, least, most)
    if kind is float:
        return finite_number(name, value, least, most)
    if not isinstance(value, kind):
        wanted = {bool: "true or false", str: "text"}.get(kind, kind.__name__)
        raise InputError(f"{name} {value!r}: want {wanted}")
    return value


_256 = Preset(
    size=(256, 256), channel_multipliers=(1, 1, 2, 2, 4, 4), dropout=0.0, variance="fixed_small",
    steps=500_000, batch_size=64, lr=2e-5, sample_count=16, eval_images=64,
)  # fmt: skip

PRESETS: dict[str, Preset] = {
    # The paper's presets, each with its result (Tables 1 and 3): FID against the training set, NLL on the test set.
    "cifar10": Preset(data="uoft-cs/cifar10"),  # IS 9.46, FID 3.17, NLL <= 3.75 bits/dim
    "celebahq256": _256,  # the paper has no figure
    "lsun_bedroom": replace(_256, flip=False, steps=2_400_000),  # FID 6.36
    "lsun_bedroom_large": replace(_256, flip=False, steps=1_150_000, width=192),  # FID 4.90
    "lsun_church": replace(_256, steps=1_200_000),  # FID 7.89
    "lsun_cat": replace(_256, flip=False, steps=1_800_000),  # FID 19.75
    # Our presets, for two CPU cores. Their results are in the models' cards and in benchmarks/results.
    "digits": Preset(  # all of 200 samples are of the class that was asked for
        data="digits", size=(8, 8), channels=1, flip=False, classes=True, label_dropout=0.2,
        width=32, channel_multipliers=(1, 1), num_res_blocks=1, attention_resolutions=(4,), dropout=0.0,
        schedule="cosine", predict="v", timestep_sampling="stratified",
        steps=2800, batch_size=64, lr=2e-3, warmup=100, cooldown=0.5, ema_decay=0.999, ema_warmup=True,
        save_every=700, sample_every=700,
    ),
    "mnist": Preset(
        data="ylecun/mnist", size=(28, 28), channels=1, flip=False,
        width=32, channel_multipliers=(1, 2, 2), attention_resolutions=(7,), dropout=0.0,
        steps=20_000, batch_size=64, lr=5e-4, warmup=500, ema_decay=0.999, ema_warmup=True,
        save_every=1000, sample_every=1000,
    ),
    "cifar10_small": Preset(
        data="uoft-cs/cifar10", width=64, channel_multipliers=(1, 2, 2), dropout=0.0,
        steps=100_000, batch_size=64, lr=5e-4, warmup=500, ema_decay=0.9995, ema_warmup=True,
        save_every=1000, sample_every=1000,
    ),
    "cifar10_fast": Preset(
        data="uoft-cs/cifar10",
        width=96, channel_multipliers=(1, 1, 1), num_res_blocks=1, attention_resolutions=(8,), dropout=0.0, patch=2,
        schedule="cosine", predict="v", timestep_sampling="lognormal", optimizer="muon",
        steps=40_000, batch_size=32, lr=4e-3, warmup=50, cooldown=0.5, ema_decay=0.9995, ema_warmup=True,
        save_every=2000, sample_every=2000,
    ),
    "cifar10_likelihood": Preset(
        data="uoft-cs/cifar10",
        width=32, channel_multipliers=(1, 2, 4), num_res_blocks=1, attention_resolutions=(8,), dropout=0.0,
        schedule="cosine", predict="v", timestep_sampling="bound",
        steps=20_000, batch_size=64, lr=2e-3, warmup=200, cooldown=0.5, ema_decay=0.999, ema_warmup=True,
        save_every=1000, sample_every=1000,
    ),
}  # fmt: skip


def photos(size: tuple[int, int]) -> Preset:
    """The preset for photographs of this size: the kind of network of cifar10_fast, with levels down to 4 pixels if
    possible. Muon, which cifar10_fast has, was not tried on it.

    >>> photos((64, 64)).channel_multipliers, photos((128, 96)).batch_size
    ((1, 1, 2, 2), 16)
    """
    patch: Literal[1, 2] = 2 if min(size) >= 32 and not any(side % 2 for side in size) else 1
    sides = [[side // patch for side in size]]
    while min(sides[-1]) > 4 and not any(side % 2 for side in sides[-1]):
        sides.append([side // 2 for side in sides[-1]])
    large = min(size) > 64
    return replace(
        PRESETS["cifar10_fast"], data="", size=size, patch=patch, dropout=0.1, timestep_sampling="stratified",
        channel_multipliers=tuple(1 if min(inner) >= 16 else 2 for inner in sides),
        optimizer="adam", lr=1e-3, warmup=200, batch_size=16 if large else 32 if min(size) > 32 else 64,
        steps=20_000, ema_decay=0.999, save_every=1000, sample_every=1000, sample_count=16,
        eval_images=64 if large else 128,
    )  # fmt: skip


def grey16(size: tuple[int, int]) -> Preset:
    """The preset for grey images of 16 bits and this size, such as X-rays.

    >>> grey16((64, 64)).pixel_type
    'uint16'
    """
    return replace(
        photos(size), channels=1, pixel_type="uint16",
        schedule="log_snr", beta_1=1e-9, timestep_sampling="lognormal",
    )  # fmt: skip


BY_SIZE = {"photos": photos, "grey16": grey16}
"""Presets whose network follows from the size of the images."""
PRESETS |= {name: make((64, 64)) for name, make in BY_SIZE.items()}


def find_preset(name: str) -> Preset:
    """The preset of that name. Raises InputError, which suggests the nearest one, if there is none."""
    if name not in PRESETS:
        raise InputError(f"preset {name!r}: {suggestion(name, PRESETS)}want {', '.join(PRESETS)}")
    return PRESETS[name]


def build(preset: Preset) -> Denoiser:
    """The denoiser of a preset; torch's global generator draws the initial weights of its network.

    >>> import torch
    >>> with torch.device("meta"):
    ...     network = build(PRESETS["celebahq256"]).network
    >>> sum(p.numel() for p in network.parameters())
    113673219
    """
    import torch  # not at the top, because the import takes seconds

    from ddpm.denoiser import Denoiser
    from ddpm.pixels import values
    from ddpm.schedule import SCHEDULES
    from ddpm.unet import UNet

    network = UNet(
        preset.channels,
        preset.channels * (2 if preset.variance.startswith("learned") else 1),
        preset.width,
        preset.channel_multipliers,
        preset.num_res_blocks,
        preset.attention_levels,
        preset.dropout,
        len(preset.class_names),
        patch=preset.patch,
        gradient_checkpointing=preset.gradient_checkpointing,
        bf16=preset.precision == "bf16",
        always_labelled=preset.always_labelled,
        details=preset.details,
        condition_channels=preset.condition_channels,
        warped=preset.augment > 0,
    )
    with torch.device("cpu"):
        schedule = SCHEDULES[preset.schedule](preset.num_timesteps, preset.beta_1, preset.beta_T)
        schedule = schedule.up_to(preset.last_sigma) if preset.last_sigma else schedule
    pixel_values = values(preset.pixel_type, preset.value_range)
    return Denoiser(network, schedule, preset.predict, preset.variance, preset.clip, pixel_values)


def to_json(preset: Preset) -> dict[str, Any]:
    """The preset as plain JSON values. `details` holds what differs from the paper's network, and is absent if nothing.

    >>> to_json(replace(PRESETS["cifar10"], details=Details(heads=4)))["details"]
    {'heads': 4}
    """
    values = asdict(preset)
    paper = asdict(Details())
    details = {name: value for name, value in values.pop("details").items() if value != paper[name]}
    return {**values, "details": details} if details else values


def from_json(config: Mapping[str, Any]) -> Preset:
    """The preset that `to_json` wrote. Raises InputError that names an unknown setting.

    >>> from_json(to_json(PRESETS["digits"])) == PRESETS["digits"]
    True
    """
    known = {f.name for f in fields(Preset)}
    if unknown := sorted(set(config) - known):
        raise InputError(f"config {', '.join(unknown)}: no such setting; another version of ddpm wrote it")
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in config.items()
    }
    if "details" in values:
        values["details"] = details_from(values["details"])
    return Preset(**values)


def details_from(values: Any) -> Details:
    """Details from plain values. Raises InputError for anything else.

    >>> details_from({"heads": 4}).heads
    4
    """
    known = {f.name for f in fields(Details)}
    if not isinstance(values, dict) or not values.keys() <= known:
        raise InputError(f"config details {values!r}: want some of {', '.join(sorted(known))}")
    return Details(**values)

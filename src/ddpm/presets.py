"""Every setting of a run in one frozen dataclass, and one table of presets with their results beside them.

Importing this does not import torch, so that `ddpm train --help` is quick.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from ddpm.errors import InputError, check_size

if TYPE_CHECKING:
    from ddpm.denoiser import Denoiser


Precision = Literal["auto", "float32", "bf16"]
Compile = Literal["auto", "on", "off"]


def _f(default: Any, help: str, least: float | None = None, most: float | None = None, resume: bool = False) -> Any:
    """A field: its line of meaning, its range, and whether a run that exists may go on with another value."""
    return field(default=default, metadata={"help": help, "least": least, "most": most, "resume": resume})


@dataclass(frozen=True)
class Preset:
    """All that a run is made from; raises InputError for a value that cannot be used.

    >>> PRESETS["cifar10"].lr, replace(PRESETS["cifar10"], lr=1e-4).lr
    (0.0002, 0.0001)
    """

    # data
    data: str = _f("", "SOURCE of images: digits; a folder, zip or parquet file; a local or hub data set")
    size: tuple[int, int] = _f((32, 32), "height x width that images are resized and cropped to: 32 or 32x48")
    channels: Literal[1, 3, 4] = _f(3, "1 grey, 3 RGB, 4 RGBA")
    flip: bool = _f(True, "mirror every other training image at random")
    image_column: str = _f("", "column of the images in a data set (empty: found)")
    label_column: str = _f("", "column of the labels in a data set (empty: found)")
    classes: bool = _f(False, "learn the classes of the data set's labels, to sample one by its name")
    class_names: tuple[str, ...] = _f((), "what they are called, as the data set says; one embedding each", resume=True)
    label_dropout: float = _f(0.1, "share of labels not shown, so that guidance has a model without", 0, 1)
    skip_bad: bool = _f(False, "count images that cannot be read, and go on without them", resume=True)

    # network
    width: int = _f(128, "channels of the first level, a multiple of 32", 32)
    channel_multipliers: tuple[int, ...] = _f(
        (1, 2, 2, 2), "channels of each level over width; each level halves the size", 1
    )
    num_res_blocks: int = _f(2, "residual blocks a level", 1)
    attention_resolutions: tuple[int, ...] = _f(
        (16,), "attention where the shorter side first is at most this; 0 for none", 0
    )
    dropout: float = _f(0.1, "dropout probability", 0, 0.99)
    patch: Literal[1, 2] = _f(
        1, "2: levels start at half the size, inside a thin one at full size: a quarter of the cost"
    )

    # diffusion
    schedule: Literal["linear", "quad", "const", "warmup10", "warmup50", "jsd", "cosine"] = _f(
        "linear", "noise schedule"
    )
    num_timesteps: int = _f(1000, "number of noise levels T", 1)
    beta_1: float = _f(1e-4, "first beta of the schedule", 1e-12, 1)
    beta_T: float = _f(0.02, "last beta of the schedule", 1e-12, 1)
    predict: Literal["eps", "x0", "mu", "v"] = _f("eps", "what the network predicts")
    variance: Literal["fixed_large", "fixed_small", "learned", "learned_range"] = _f("fixed_large", "sigma_t^2")
    clip: bool = _f(True, "clip the estimate of x_0 to [-1, 1] when sampling and evaluating")
    loss: Literal["simple", "vlb", "hybrid"] = _f("simple", "L_simple (Eq. 14), the true bound (Eq. 5), or both")
    weighting: Literal["none", "min_snr", "p2"] = _f("none", "what L_simple weighs at each noise level")
    timestep_sampling: Literal["uniform", "stratified", "lognormal", "bound"] = _f(
        "uniform",
        "levels of a batch: independent; spread evenly; evenly by quantiles of a log-normal sigma, or of the bound",
    )

    # optimisation
    steps: int = _f(800_000, "training steps in all", 1, resume=True)
    batch_size: int = _f(128, "images a step, over all processes", 1)
    accumulate: int = _f(1, "parts a batch is computed in, one by one: less memory, the same step", 1, resume=True)
    lr: float = _f(2e-4, "learning rate of Adam", 0)
    warmup: int = _f(5000, "steps over which the learning rate rises linearly from 0", 0)
    cooldown: float = _f(
        0.0, "share of the steps, at the end, over which it falls linearly to 0; more --steps take it up again", 0, 1
    )
    grad_clip: float = _f(1.0, "largest global norm of the gradient; 0 for no clipping", 0)
    ema_decay: float = _f(0.9999, "decay of the moving average of the weights", 0, 0.999999)
    ema_warmup: bool = _f(False, "let the decay rise as (1 + n)/(10 + n), for short runs")
    precision: Precision = _f("auto", "the network's; auto: bf16 where the hardware has it")
    gradient_checkpointing: bool = _f(
        False, "compute activations again on the way back: less memory, more time", resume=True
    )

    # the run
    seed: int = _f(0, "seed of weights, order, noise and dropout", 0, 2**63 - 1)
    device: str = _f("auto", "auto, cpu, cuda, cuda:1, mps", resume=True)
    compile: Compile = _f("auto", "let Inductor compile the network for training; auto: on CUDA devices", resume=True)
    workers: int = _f(2, "processes that decode images when they do not fit in memory", 0, resume=True)
    save_every: int = _f(5000, "steps between checkpoints", 1, resume=True)
    keep: int = _f(2, "newest checkpoints kept, besides the best", 1, resume=True)
    log_every: int = _f(50, "steps between lines of metrics.jsonl", 1, resume=True)
    sample_every: int = _f(5000, "steps between grids of samples; 0 for none", 0, resume=True)
    sample_count: int = _f(64, "images in such a grid", 1, resume=True)
    sample_steps: int = _f(50, "network calls of DDIM for such a grid", 1, resume=True)
    eval_images: int = _f(512, "held-out images that L_simple is measured on", 1, resume=True)
    tensorboard: bool = _f(False, "also write TensorBoard's files (the extra ddpm[tensorboard])", resume=True)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in fields(self):
            check(f.name, getattr(self, f.name), hints[f.name], f.metadata["least"], f.metadata["most"])
        if len(self.size) != 2:
            raise InputError(f"size {self.size}: want height and width, as 32 or 32x48")
        check_size(self.size, len(self.channel_multipliers) + self.patch - 1)
        if self.width % 32:
            raise InputError(f"width {self.width}: want a multiple of 32")
        if self.loss == "simple" and self.variance.startswith("learned"):
            raise InputError(f"variance {self.variance}: loss simple does not train it; want loss hybrid or vlb")
        if self.weighting != "none" and (self.loss != "simple" or self.predict == "mu"):
            raise InputError(f"weighting {self.weighting}: is of L_simple for eps, x0 or v; want loss simple, no mu")
        if self.timestep_sampling == "bound" and self.predict == "mu":
            raise InputError(
                "timestep_sampling bound: is of eps, x0 and v prediction; want uniform or stratified for mu"
            )
        if self.classes and self.label_dropout == 1:
            raise InputError("label_dropout 1.0: no label would be shown; want less, or --no-classes")
        if self.predict == "eps" and self.schedule == "jsd":
            raise InputError("predict eps: says nothing of x_0 at jsd's last level; want x0, mu or v")
        if self.batch_size % self.accumulate:
            raise InputError(f"accumulate {self.accumulate}: want a divisor of batch_size {self.batch_size}")
        if self.sample_steps > self.num_timesteps:
            raise InputError(f"sample_steps {self.sample_steps}: want at most num_timesteps, {self.num_timesteps}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """[C, H, W] of an image."""
        return self.channels, *self.size

    @property
    def attention_levels(self) -> tuple[int, ...]:
        """The network's levels with attention.

        For each of `attention_resolutions` it is the first level whose shorter side is at most that.

        >>> PRESETS["cifar10"].attention_levels, PRESETS["celebahq256"].attention_levels
        ((1,), (4,))
        """
        sides = [min(self.size) // self.patch >> level for level in range(len(self.channel_multipliers))]
        found = {
            next((level for level, side in enumerate(sides) if side <= a), -1) for a in self.attention_resolutions if a
        }
        return tuple(sorted(found - {-1}))


def check(name: str, value: Any, kind: Any, least: float | None = None, most: float | None = None) -> None:
    """InputError where `value` is not of `kind` (int, float, bool, str, Literal, tuple) or not within [least, most]."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise InputError(f"{name} {value!r}: want {', '.join(map(str, get_args(kind)))}")
        return
    if get_origin(kind) is tuple:
        element = get_args(kind)[0]
        if not isinstance(value, tuple) or not (value or element is str):
            raise InputError(f"{name} {value!r}: want whole numbers with commas between")
        for one in value:
            check(name, one, element, least, most)
        return
    accepted = (int, float) if kind is float else kind
    finite = not isinstance(value, float) or value - value == 0
    good_type = isinstance(value, accepted) and finite and (kind is bool or not isinstance(value, bool))
    if not good_type or (least is not None and value < least) or (most is not None and value > most):
        words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}[kind]
        limits = [f"of at least {least}"] if least is not None else []
        limits += [f"of at most {most}"] if most is not None else []
        raise InputError(f"{name} {value!r}: want {' '.join([words, ' and '.join(limits)]).strip()}")


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
        schedule="cosine", predict="v", timestep_sampling="lognormal",
        steps=20_000, batch_size=64, lr=2e-3, warmup=200, cooldown=0.5, ema_decay=0.999, ema_warmup=True,
        save_every=1000, sample_every=1000,
    ),
    "cifar10_likelihood": Preset(
        data="uoft-cs/cifar10",
        width=32, channel_multipliers=(1, 2, 4), num_res_blocks=1, attention_resolutions=(8,), dropout=0.0,
        schedule="cosine", predict="v", timestep_sampling="bound",
        steps=20_000, batch_size=64, lr=2e-3, warmup=200, cooldown=0.5, ema_decay=0.999, ema_warmup=True,
        save_every=1000, sample_every=1000,
    ),
}  # fmt: skip


def build(preset: Preset) -> Denoiser:
    """The preset's network, with fresh weights from torch's global generator, and how to read it.

    >>> import torch
    >>> with torch.device("meta"):
    ...     network = build(PRESETS["celebahq256"]).network
    >>> sum(p.numel() for p in network.parameters())
    113673219
    """
    import torch  # only when there is a network to build

    from ddpm.denoiser import Denoiser
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
    )
    with torch.device("cpu"):
        schedule = SCHEDULES[preset.schedule](preset.num_timesteps, preset.beta_1, preset.beta_T)
    return Denoiser(network, schedule, preset.predict, preset.variance, preset.clip)


def to_json(preset: Preset) -> dict[str, Any]:
    """The preset as plain JSON values."""
    return asdict(preset)


def from_json(config: Mapping[str, Any]) -> Preset:
    """The preset that `to_json` wrote; InputError names a field that there is not.

    >>> from_json(to_json(PRESETS["digits"])) == PRESETS["digits"]
    True
    """
    known = {f.name for f in fields(Preset)}
    if unknown := sorted(set(config) - known):
        raise InputError(f"config {', '.join(unknown)}: no such setting; it was written by another version of ddpm")
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in config.items()
    }
    return Preset(**values)

"""What commands share: the parser, converters of words, groups of options, and what they make of these options.

Nothing here imports torch until a command runs.
"""

import argparse
import difflib
import functools
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeAlias, get_args

from ddpm import catalog
from ddpm.catalog import Precision
from ddpm.errors import InputError, suggestion
from ddpm.presets import Preset, check

if TYPE_CHECKING:
    import torch

    from ddpm.files import data, features
    from ddpm.files.models import Checkpoint
    from ddpm.run.sample import Conditions

Commands: TypeAlias = "argparse._SubParsersAction[Any]"

MODEL = (
    "a model: a run folder, a checkpoint folder, a .safetensors file, a diffusers folder, hf:OWNER/NAME on the Hugging "
    "Face hub, or the name of an installed model, such as digits"
)
PICTURES = "FILE.png for a grid, FILE.npz, FILE.npy, FILE.tif, or a folder"
SOURCE = catalog.accepted_sources()
THREES = "ddpm sample digits -n 2 --class 3 --out threes/"
"""The first line of examples that need a picture."""
AS_TRAIN = "a SOURCE as `ddpm train --data` takes it"


# -- the parser --------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake raises InputError, and an unknown option or command suggests the nearest one."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._positionals.title = "arguments"
        self._negative_number_matcher = re.compile(r"-\.?\d")  # -50,50 is a value, too

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        names = list(action.choices or [value])
        if value not in names:
            hint = suggestion(value, names)
            raise argparse.ArgumentError(action, f"{value!r}: {hint}want {', '.join(names)}")

    def error(self, message: str) -> NoReturn:
        name = message.removeprefix("the following arguments are required: ")
        if name != message:
            name = name.split(", ")[0]
            wanted = next(a.help for a in self._actions if name in (a.metavar, "/".join(a.option_strings)))
            message = f"{name}: missing; want {wanted}"
        raise InputError(message.removeprefix("argument "))

    def unknown(self, given: Sequence[str]) -> InputError:
        """The error for words that no option takes."""
        options = {o.lstrip("-"): o for action in self._actions for o in action.option_strings}
        name = next((g for g in given if g.startswith("-")), None)
        if name is None:
            return InputError(f"{given[0]}: {self.prog} takes no such argument; see `{self.prog} --help`")
        near = difflib.get_close_matches(name.split("=")[0].lstrip("-"), options, n=1)
        hint = f"did you mean {options[near[0]]}?" if near else f"see `{self.prog} --help`"
        return InputError(f"{name}: {self.prog} has no such option; {hint}")


def command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], help: str, description: str, *example: str
) -> Parser:
    """Add a command: its line in `ddpm --help`, its description, and lines of an example at the end of its own help."""
    parser: Parser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog="\n  ".join(["example:", *example]),
        formatter_class=Help,
        allow_abbrev=False,
        add_help=False,  # `add_general` adds it, as the last option
    )
    parser.set_defaults(run_command=run)
    return parser


class Help(argparse.HelpFormatter):
    """argparse's layout, but indented lines, which are tables and examples, are not wrapped.

    The line of usage names only what must be given, since the options are listed below it.
    """

    def add_usage(self, usage: str | None, actions: Any, groups: Any, prefix: str | None = None) -> None:
        given = [action for action in actions if action.required or not action.option_strings]
        options = argparse.Action([], "options", metavar="[OPTIONS]")
        super().add_usage(usage, [*given, options] if len(given) < len(actions) else given, [], prefix)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        wrap = super()._fill_text
        return "\n".join(
            indent + line if line.startswith("  ") else wrap(line, width, indent) for line in text.splitlines()
        )

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            self._action_max_length += 2  # commands are indented by two more columns, which argparse forgets


# -- converters --------------------------------------------------------------------------------------------------------


def converter(kind: Any, wanted: str) -> Any:
    """A converter for argparse whose failure names the value and what would be accepted."""

    def convert(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: want {wanted}") from None

    return convert


def number(kind: type[int] | type[float], default: float | None, metavar: str = "") -> dict[str, Any]:
    """The arguments of add_argument for a number: N is a whole one, and X any."""
    wanted = "a whole number" if kind is int else "a number"
    return {"type": converter(kind, wanted), "default": default, "metavar": metavar or ("N" if kind is int else "X")}


def one_of(names: Iterable[object]) -> str:
    """The metavar of an option that takes one of these names.

    >>> one_of(["ema", "raw"]), one_of(["fixed_large", "fixed_small", "learned"])
    ('ema|raw', 'NAME')
    """
    words = "|".join(map(str, names))
    return words if len(words) <= 21 else "NAME"


def whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def auto_or_number(text: str) -> int | str:
    return text if text == "auto" else int(text)


def height_and_width(text: str) -> tuple[int, ...]:
    sides = tuple(int(part) for part in text.lower().split("x"))
    return sides * 2 if len(sides) == 1 else sides


def _interval(text: str) -> tuple[int, int]:
    first, last = text.split(",")
    return int(first), int(last)


def _clip(text: str) -> bool | float:
    if text in ("static", "none"):
        return text == "static"
    if not 0 < float(text) < 1:
        raise ValueError
    return float(text)


# -- groups of options -------------------------------------------------------------------------------------------------


def add_model(parser: Parser, variance: bool = True) -> None:
    """Which weights a command uses, where it runs, and the last group of its help."""
    group = parser.add_argument_group("model", "which weights are used")
    add_weights(group)
    if variance:
        variances = "variance of the reverse process: fixed_large, fixed_small or calibrated (default: the model's)"
        group.add_argument("--variance", metavar="NAME", help=variances)
    machine = parser.add_argument_group("machine", "where the network runs, and how")
    add_device(machine)
    batch_size = "number of images per network call; it changes no result by more than rounding (default: %(default)s)"
    machine.add_argument("--batch-size", **number(int, 64), help=batch_size)
    add_precision(machine, "precision of the network; auto is that of training, if the device is fast at it")
    add_general(parser)


def add_weights(group: Any) -> None:
    weights = "use the averaged weights, ema, or the latest ones, raw (default: ema)"
    group.add_argument("--weights", metavar="ema|raw", help=weights)
    checkpoint = "use this checkpoint of a run: last, best or the number of its step (default: last)"
    group.add_argument("--checkpoint", default="last", metavar="STEP", help=checkpoint)


def add_device(group: Any) -> None:
    device = "device to run on: auto, cpu, cuda, cuda:1 or mps (default: auto)"
    group.add_argument("--device", default="auto", metavar="DEVICE", help=device)


def add_precision(group: Any, help: str) -> None:
    words = one_of(get_args(Precision))
    group.add_argument("--precision", default="auto", metavar=words, help=f"{help} (default: auto)")


def add_general(parser: Parser, json: bool = True) -> None:
    """The last group of every command's help."""
    group = parser.add_argument_group("general")
    if json:
        group.add_argument("--json", action="store_true", help="print the result as one JSON object")
    group.add_argument("-h", "--help", action="help", help="show this text and exit")


def add_sampler(parser: Parser, default: str = "ancestral") -> Any:
    """How the reverse process is sampled. Returns the group, for further options."""
    samplers, spacings = catalog.samplers(), catalog.spacings()
    about = f"how the reverse process is sampled\n\n{catalog.describe(samplers)}"
    group = parser.add_argument_group("sampler", about)
    parser.set_defaults(default_sampler=default)
    sampler = f"sampler to use, one of this table (default: {default}; consistency for a model of ddpm distill)"
    group.add_argument("--sampler", metavar="NAME", help=sampler)
    steps: dict[int | str, list[str]] = {}
    for name, entry in samplers.items():
        steps.setdefault(entry.settings.get("steps", 20) or "all", []).append(name)
    defaults = ", ".join(f"{count} for {' and '.join(names)}" for count, names in steps.items() if count != 20)
    levels = f"number of noise levels to visit (default: {defaults}, 20 for the others)"
    group.add_argument("--steps", **number(int, None), help=levels)
    spacing = f"how to space these levels: {', '.join(spacings)}; bound takes {spacings['bound'].meaning}"
    group.add_argument("--spacing", metavar="NAME", help=f"{spacing} (default: the sampler's)")
    return group


def add_clip(sampler: Any) -> None:
    clip = (
        "clip x0^, the estimate of the image: static clips to [-1, 1], none does not clip, and a number between 0 and "
        "1 is the quantile of dynamic thresholding (default: the model's)"
    )
    wanted = "static, none or a number between 0 and 1"
    sampler.add_argument("--clip", type=converter(_clip, wanted), metavar="static|none|X", help=clip)


def add_classes(parser: Parser) -> None:
    """Which classes are sampled, and guidance."""
    group = parser.add_argument_group("classes", "for a model that knows classes")
    classes = "classes to sample, in turn over the images; all for every class"
    group.add_argument("--class", dest="classes", nargs="+", default=[], metavar="NAME", help=classes)
    guidance = (
        "guidance scale: how strongly to steer towards the class, or without --class towards the condition of the "
        "model; 1 is without guidance (default: 1.5 with --class)"
    )
    group.add_argument("--guidance", **number(float, None), help=guidance)
    interval = converter(_interval, "two levels as 100,900")
    levels = "guide only from this first to this last noise level, as 100,900 (default: all levels)"
    group.add_argument("--guidance-interval", type=interval, metavar="FIRST,LAST", help=levels)


def add_guide(group: Any) -> None:
    guide = "steer away from this weaker MODEL, such as an earlier checkpoint of the run (autoguidance)"
    group.add_argument("--guide", metavar="MODEL", help=guide)
    scale = "guidance scale of --guide; 1 is without guidance (default: 1.5)"
    group.add_argument("--guide-scale", **number(float, None), help=scale)


def add_source(group: Any) -> None:
    """The images that `loader` loads."""
    data = f"images to measure on: {AS_TRAIN} (default: the run's own data)"
    group.add_argument("--data", metavar="SOURCE", help=data)
    pairs = "other images of the pairs, for --data and a model of --condition pairs"
    group.add_argument("--pairs", metavar="SOURCE", help=pairs)


def add_data(parser: Parser) -> None:
    """What `evaluate` and `paper` measure."""
    group = parser.add_argument_group("data", "the images and samples that are measured")
    add_source(group)
    split = "split of the data to measure on; test is the images that were held out (default: %(default)s)"
    group.add_argument("--split", default="test", metavar="NAME", help=split)
    samples = "score these samples, an .npz file or a folder of images, instead of making new ones"
    group.add_argument("--samples", metavar="PATH", help=samples)
    group.add_argument("--seed", **number(int, 0), help="seed of the noise and the samples (default: %(default)s)")


def add_features(parser: Parser, files: bool = True) -> Any:
    """Which network scores samples; `files`: or which file holds features of real images. Returns the group."""
    group = parser.add_argument_group("features", "the network that scores samples")
    features = (
        "score by FILE.py:NAME, a function from images (NumPy [N, H, W, C], uint8 or the type of the model's images) "
        "to features [N, D], or to features and class probabilities [N, K]"
    )
    file = "; or by an .npz file with features, or with mu and sigma, of real images" if files else ""
    metavar = "FILE" if files else "FILE.py:NAME"
    group.add_argument("--features", metavar=metavar, help=f"{features}{file} (default: Inception)")
    inception = "file with the weights of the Inception network of 2015 (default: download it)"
    group.add_argument("--inception", metavar="FILE", help=inception)
    others = "accept other weights of Inception; the score is then not FID"
    group.add_argument("--any-weights", action="store_true", help=others)
    return group


def add_show(group: Any) -> None:
    """Which channels and numbers a picture shows."""
    several = converter(whole_numbers, "channels counted from 1, as 4,3,2")
    help = "show these channels in the grid, counted from 1: one, or three as 4,3,2 (default: the run's)"
    group.add_argument("--show", type=several, default=(), metavar="N,N,...", help=help)
    two = converter(numbers, "two numbers, as 0,3000")
    help = "show these numbers as black and as white in the grid (default: the run's)"
    group.add_argument("--show-range", type=two, default=(), metavar="LOW,HIGH", help=help)


# -- what the options mean ---------------------------------------------------------------------------------------------


@contextmanager
def importing() -> Iterator[None]:
    """While torch is imported, Ctrl-C ends the program at once: half-imported modules would lose the exception."""

    def quit(*_: object) -> None:
        os.write(2, b"ddpm: interrupted\n")
        os._exit(130)

    main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    if not main_thread or handler is not signal.default_int_handler:  # another program's handler, or ignored
        yield
        return
    signal.signal(signal.SIGINT, quit)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def check_numbers(args: argparse.Namespace, **least: int) -> None:
    """Raise InputError if an option is given and below its least value."""
    for name, value in least.items():
        if getattr(args, name) is not None:
            check("-n" if name == "n" else f"--{name.replace('_', '-')}", getattr(args, name), int, value)


def open_model(
    args: argparse.Namespace,
    device: "torch.device",
    run: "str | Path | None" = None,
    precision: Precision | None = None,
    conditional: bool = False,
    checkpoint: str | None = None,
) -> "Checkpoint":
    """The model of the command, or of `run`, with --checkpoint, --weights, --precision and --variance, on `device`.

    precision and checkpoint replace these options. Raises InputError for a model with a condition on an image, unless
    `conditional`.
    """
    from ddpm.files.models import with_variance, without_condition
    from ddpm.run.processes import open_for_device

    check_model(args)
    asked = precision or _precision(args)
    model = open_for_device(run or args.run, device, args.weights, checkpoint or args.checkpoint, asked)
    if not conditional:
        without_condition(model, f"`ddpm {args.command}`")
    if args.variance is not None:
        model = with_variance(model, args.variance)
    return replace(model, denoiser=model.denoiser.to(device))


def _precision(args: argparse.Namespace) -> Precision | None:
    """--precision; None for auto."""
    return None if args.precision == "auto" else args.precision


def check_model(args: argparse.Namespace) -> None:
    check("--weights", args.weights or "ema", Literal["ema", "raw"])
    check("--precision", args.precision, Precision)


def with_view(args: argparse.Namespace, preset: Preset) -> Preset:
    """The preset with --show and --show-range, if they are given. Raises InputError for what its images do not have."""
    return replace(preset, show=args.show or preset.show, show_range=args.show_range or preset.show_range)


def conditions(args: argparse.Namespace) -> "Conditions":
    """--class, --guidance, --guidance-interval and --clip."""
    from ddpm.run.sample import Conditions

    return Conditions(tuple(args.classes), args.guidance, args.guidance_interval, args.clip)


def guided(args: argparse.Namespace, device: "torch.device") -> "Conditions":
    """`conditions`, with --guide and --guide-scale."""
    asked = conditions(args)
    if args.guide is None:
        if args.guide_scale is not None:
            raise InputError(f"--guide-scale {args.guide_scale}: needs --guide MODEL")
        return asked
    from ddpm.run.processes import open_for_device

    scale = check("--guide-scale", asked.guide_scale if args.guide_scale is None else args.guide_scale, float)
    guide = open_for_device(args.guide, device, args.weights, "last", _precision(args))
    guide = replace(guide, denoiser=guide.denoiser.to(device))
    return replace(asked, guide=guide, guide_scale=scale)


def check_sampler(args: argparse.Namespace, preset: Preset, T: int) -> None:
    """Raise InputError for a --sampler, --spacing or --steps that a model of T noise levels does not have.

    If there is no --sampler, it becomes the model's own.
    """
    from ddpm.run.sample import sampler_of

    args.sampler = args.sampler or sampler_of(preset, args.default_sampler)
    check("--sampler", args.sampler, Literal[tuple(catalog.samplers())])
    if args.spacing is not None:
        check("--spacing", args.spacing, Literal[tuple(catalog.spacings())])
    if args.steps is not None:
        check("--steps", args.steps, int, 1, T)


def loader(args: argparse.Namespace, preset: Preset, progress: bool) -> "Callable[[str], data.Images]":
    """A function from a split to its images: those of --data or of the run, as training used or held them out."""
    from ddpm.files import data

    if not (args.data or preset.data):
        raise InputError("--data: this model names no dataset; want --data SOURCE")
    pairs = args.pairs
    if pairs is not None and preset.condition != "pairs":
        raise InputError(f"--pairs {pairs}: this model was not trained with condition pairs; want no --pairs")
    if pairs is None and args.data and preset.pairs:
        raise InputError(f"--data {args.data}: this model takes pairs; want --pairs SOURCE, too")

    @functools.cache
    def load(split: str) -> data.Images:
        how: dict[str, Any] = {"split": split, "progress": progress, "as_trained": True}
        source = args.data or preset.data
        images = data.load(source, preset.size, preset.channels, **how, **data.settings_of(preset))
        if preset.condition != "pairs":
            return images
        with data.settings_of_pairs(preset, images) as settings:
            others = data.load(pairs or preset.pairs or source, preset.size, preset.channels, **how, **settings)
        return data.paired(images, others, (preset.image_column, preset.pair_column))

    return load


def check_features(args: argparse.Namespace) -> None:
    """Raise InputError for options of Inception that have no effect."""
    if args.any_weights and args.inception is None:
        raise InputError("--any-weights: needs --inception FILE")
    if args.inception is not None and args.features is not None:
        raise InputError(f"--inception {args.inception}: not with --features {args.features}; want one of the two")


def feature_network(
    args: argparse.Namespace, device: "torch.device", preset: Preset | None = None
) -> "features.Network":
    """The network of --features or --inception. Raises InputError if it does not take the images of `preset`."""
    from ddpm.files import features

    check_features(args)
    if args.features is None:
        if preset is not None and (preset.channels not in (1, 3) or preset.pixel_type != "uint8"):
            raise InputError(f"{preset.kind} images: Inception takes 8-bit grey and RGB; want --features FILE.py:NAME")
        return features.inception(args.inception, any_weights=args.any_weights, device=device)
    return features.custom(args.features)


def out_folder(args: argparse.Namespace, default: Path) -> Path:
    """The folder of --out, or `default`. Raises InputError if it cannot be written."""
    from ddpm.files.images import check_folder

    return check_folder(default if args.out is None else args.out)


def print_results(args: argparse.Namespace, results: dict[str, Any], written: object) -> None:
    """The results as one JSON object, or a line each."""
    if args.json:
        print(json.dumps(results))
        return
    for name, value in results.items():
        print(f"{name}: {json.dumps(value) if isinstance(value, dict) else value}")
    if written is not None:
        print(f"written: {written}")

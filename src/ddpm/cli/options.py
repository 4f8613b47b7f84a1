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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeAlias

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


# -- the parser --------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake raises InputError, and an unknown option or command suggests the nearest one."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
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
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], help: str, description: str, example: str
) -> Parser:
    """Add a command: its line in `ddpm --help`, its description, and an example at the end of its own help."""
    parser: Parser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=Help,
        allow_abbrev=False,
    )
    parser.set_defaults(run_command=run)
    return parser


class Help(argparse.HelpFormatter):
    """argparse's layout, but indented lines, which are tables and examples, are not wrapped."""

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


def number(kind: type[int] | type[float], default: float | None) -> dict[str, Any]:
    """The arguments of add_argument for a number."""
    wanted = "a whole number" if kind is int else "a number"
    return {"type": converter(kind, wanted), "default": default, "metavar": "N" if kind is int else "X"}


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
    """Which weights a command uses, and where it runs."""
    group = parser.add_argument_group("model", "which weights are used, and where they run")
    group.add_argument("--weights", metavar="X", help="ema (the averaged weights) or raw (default: ema)")
    group.add_argument(
        "--checkpoint", default="last", metavar="X", help="checkpoint of a run: last, best or a step (default: last)"
    )
    if variance:
        variances = "variance of the reverse process: fixed_large, fixed_small or calibrated (default: the model's)"
        group.add_argument("--variance", metavar="X", help=variances)
    add_machine(group)


def add_machine(
    group: Any,
    precision: str = "auto, float32 or bf16; auto is the precision of training, if the device is fast at it (default: "
    "auto)",
) -> None:
    group.add_argument("--precision", default="auto", metavar="X", help=precision)
    group.add_argument("--device", default="auto", metavar="X", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    add_json(group)


def add_json(group: Any) -> None:
    group.add_argument("--json", action="store_true", help="print the result as one JSON object")


def add_sampler(parser: Parser, default: str = "ancestral") -> Any:
    """How the reverse process is sampled. Returns the group, for further options."""
    samplers, spacings = catalog.samplers(), catalog.spacings()
    about = f"how the reverse process is sampled\n\n{catalog.describe(samplers)}"
    group = parser.add_argument_group("sampler", about)
    group.add_argument("--sampler", default=default, metavar="X", help="a sampler of this table (default: %(default)s)")
    steps = {name: entry.settings["steps"] or "all" for name, entry in samplers.items() if "steps" in entry.settings}
    defaults = ", ".join(f"{count} for {name}" for name, count in steps.items())
    levels = f"number of noise levels to visit (default: {defaults}, else 20)"
    group.add_argument("--steps", **number(int, None), help=levels)
    spacing = f"spacing of the levels: {', '.join(spacings)}; bound is {spacings['bound'].meaning}"
    group.add_argument("--spacing", metavar="X", help=f"{spacing} (default: the sampler's)")
    return group


def add_conditions(parser: Parser) -> None:
    """What is sampled: classes, guidance and clipping."""
    group = parser.add_argument_group("conditions", "what is sampled")
    classes = "class names to sample, cycled over the images; 'all' for every class"
    group.add_argument("--class", dest="classes", nargs="+", default=[], metavar="NAME", help=classes)
    group.add_argument(
        "--guidance",
        **number(float, None),
        help="scale of guidance towards the class, or else towards --input; 1 for none (default: 1.5 with a class)",
    )
    interval = converter(_interval, "two levels as 100,900")
    group.add_argument(
        "--guidance-interval",
        type=interval,
        metavar="N,N",
        help="first and last noise level with guidance (default: all)",
    )
    clip = (
        "clipping of x0^, the estimate of the image: static (to [-1, 1]), none, or a number between 0 and 1, the "
        "quantile of dynamic thresholding (default: the model's)"
    )
    wanted = "static, none or a number between 0 and 1"
    group.add_argument("--clip", type=converter(_clip, wanted), metavar="X", help=clip)


def add_batch_size(parser: Parser) -> None:
    parser.add_argument(
        "--batch-size",
        **number(int, 64),
        help="images per network call; no result depends on it (default: %(default)s)",
    )


def add_measuring(parser: Parser) -> None:
    """What `evaluate` and `paper` measure, and by what."""
    group = parser.add_argument_group("data", "what is measured")
    data = f"images to measure on: {SOURCE} (default: the data of the run)"
    group.add_argument("--data", metavar="SOURCE", help=data)
    pairs = "the other images of the pairs, with --data and a model of --condition pairs"
    group.add_argument("--pairs", metavar="SOURCE", help=pairs)
    split = "split of the data; test is the images that were held out (default: %(default)s)"
    group.add_argument("--split", default="test", metavar="NAME", help=split)
    samples = "score these samples, an .npz file or a folder of images, instead of making some"
    group.add_argument("--samples", metavar="PATH", help=samples)
    group.add_argument("--seed", **number(int, 0), help="seed of noise and samples (default: %(default)s)")
    add_batch_size(parser)
    add_features(parser)
    add_sampler(parser)


def add_features(parser: Parser, files: bool = True) -> None:
    """Which network scores samples; `files`: or which file holds features of real images."""
    group = parser.add_argument_group("features", "the network that scores samples")
    features = (
        "FILE.py:NAME, a function of images (NumPy uint8 [N, H, W, C]) that returns features [N, D], or features and "
        "class probabilities [N, K]"
    )
    file = "; or an .npz file of features, or of mu and sigma, of real images" if files else ""
    group.add_argument("--features", metavar="X", help=f"{features}{file} (default: Inception)")
    group.add_argument(
        "--inception", metavar="FILE", help="weights of the Inception network of 2015 (default: download)"
    )
    group.add_argument(
        "--any-weights", action="store_true", help="accept other weights of Inception; the score is then not FID"
    )


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
) -> "Checkpoint":
    """The model of the command, or of `run`, with --checkpoint, --weights, --precision and --variance, on `device`.

    precision replaces --precision. Raises InputError for a model with a condition on an image, unless `conditional`.
    """
    from ddpm.files.models import with_variance, without_condition
    from ddpm.run.processes import open_for_device

    check_model(args)
    asked = precision or (None if args.precision == "auto" else args.precision)
    model = open_for_device(run or args.run, device, args.weights, args.checkpoint, asked)
    if not conditional:
        without_condition(model, f"`ddpm {args.command}`")
    if args.variance is not None:
        model = with_variance(model, args.variance)
    return replace(model, denoiser=model.denoiser.to(device))


def check_model(args: argparse.Namespace) -> None:
    check("--weights", args.weights or "ema", Literal["ema", "raw"])
    check("--precision", args.precision, Precision)


def add_show(parser: Parser) -> None:
    """Which channels and numbers a picture shows."""
    several = converter(whole_numbers, "channels counted from 1, as 4,3,2")
    help = "channels that the grid shows, counted from 1: one, or three as 4,3,2 (default: the run's)"
    parser.add_argument("--show", type=several, default=(), metavar="N,N", help=help)
    two = converter(numbers, "two numbers, as 0,3000")
    help = "numbers that are black and white in the grid (default: the run's)"
    parser.add_argument("--show-range", type=two, default=(), metavar="LOW,HIGH", help=help)


def with_view(args: argparse.Namespace, preset: Preset) -> Preset:
    """The preset with --show and --show-range, if they are given. Raises InputError for what its images do not have."""
    return replace(preset, show=args.show or preset.show, show_range=args.show_range or preset.show_range)


def conditions(args: argparse.Namespace) -> "Conditions":
    """--class, --guidance, --guidance-interval and --clip."""
    from ddpm.run.sample import Conditions

    return Conditions(tuple(args.classes), args.guidance, args.guidance_interval, args.clip)


def check_sampler(args: argparse.Namespace, T: int) -> None:
    """Raise InputError for a --sampler, --spacing or --steps that a model of T noise levels does not have."""
    check("--sampler", args.sampler, Literal[tuple(catalog.samplers())])
    if args.spacing is not None:
        check("--spacing", args.spacing, Literal[tuple(catalog.spacings())])
    if args.steps is not None:
        check("--steps", args.steps, int, 1, T)


def loader(args: argparse.Namespace, preset: Preset, progress: bool) -> "Callable[[str], data.Images]":
    """A function from a split to its images: those of --data or of the run, as training used or held them out."""
    from ddpm.files import data

    if not (args.data or preset.data):
        raise InputError("--data: this model names no data set; want --data SOURCE")

    @functools.cache
    def load(split: str) -> data.Images:
        settings = {"split": split, "progress": progress, "as_trained": True, **data.settings_of(preset)}
        images = data.load(args.data or preset.data, preset.size, preset.channels, **settings)
        if not preset.pairs:
            return images
        if (pairs := getattr(args, "pairs", None)) is None and args.data:
            raise InputError(f"--data {args.data}: this model takes pairs; want --pairs SOURCE, too")
        settings |= {"image_column": None, "label_column": None, "values": images.values}
        return data.paired(images, data.load(pairs or preset.pairs, preset.size, preset.channels, **settings))

    return load


def feature_network(
    args: argparse.Namespace, device: "torch.device", preset: Preset | None = None
) -> "features.Network":
    """The network of --features or --inception. Raises InputError if it does not take the images of `preset`."""
    from ddpm.files import features

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

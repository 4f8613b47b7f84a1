"""`ddpm train`: an option for every setting of Preset."""

import argparse
import json
import os
import time
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from ddpm.cli.options import (
    SOURCE,
    Commands,
    add_general,
    auto_or_number,
    command,
    converter,
    height_and_width,
    importing,
    number,
    numbers,
    one_of,
    whole_numbers,
)
from ddpm.errors import InputError
from ddpm.presets import GROUPS, PRESETS, Preset, check, types_of_settings
from ddpm.run.start import settle

if TYPE_CHECKING:
    from ddpm.run.train import Result


def add(commands: Commands) -> None:
    parser = command(
        commands, "train", run, "train a model, or resume a run",
        "Train the network of a preset, and write checkpoints, samples and a log into the run folder. The same command "
        "resumes a run that was stopped, and so does `ddpm train RUN`. The options replace settings of the preset.",
        "ddpm train cifar10_small --data ./photos --out runs/photos --steps 20000",
    )  # fmt: skip
    start = f"a preset, {', '.join(PRESETS)}; or a run's folder, to resume it with its own settings"
    parser.add_argument("preset", metavar="PRESET", nargs="?", help=f"{start} (default: photos, if there is --data)")
    group = parser.add_argument_group("start", "where the run lies, and where its settings come from")
    group.add_argument("--out", metavar="RUN", help="folder of the run (default: runs/PRESET, or the run itself)")
    config = "take settings from this file: a run's config.json, or some settings as .json, .yaml or .toml"
    group.add_argument("--config", metavar="FILE", help=config)
    groups = {name: parser.add_argument_group(name, about) for name, about in GROUPS.items()}
    source = f"images to train on: {SOURCE}"
    groups["data"].add_argument("--data", metavar="SOURCE", default=argparse.SUPPRESS, help=source)
    minutes = (
        "number of minutes that a new run may take, in place of --steps; the speed of its first steps sets the number "
        "of steps, of which at most a tenth are warmup"
    )
    groups["optimisation"].add_argument("--minutes", **number(float, None), help=minutes)
    for f in fields(Preset):
        if f.name not in ("data", "class_names", "details"):
            add_setting(groups[f.metadata["group"]], f)
    add_general(parser)


def add_setting(group: Any, f: Any) -> None:
    """The option of one field of Preset. If it is not given, the preset's value stays."""
    kind, value = types_of_settings()[f.name], f.metadata["value"]
    option, help = f"--{f.name.replace('_', '-')}", f.metadata["help"]
    about = {"dest": f.name, "default": argparse.SUPPRESS, "help": help}
    choices = f.metadata["choices"] or (get_args(kind) if get_origin(kind) is Literal else ())
    if kind is bool:
        group.add_argument(option, action=argparse.BooleanOptionalAction, **about)
    elif f.name == "size":
        group.add_argument(option, type=converter(height_and_width, "a size as 32 or 32x48"), metavar=value, **about)
    elif f.name == "workers":
        group.add_argument(option, type=converter(auto_or_number, "auto or a whole number"), metavar=value, **about)
    elif f.name == "cache_bytes":
        group.add_argument(option, metavar=value, **about)  # Preset reads 4G
    elif get_origin(kind) is tuple:
        several = converter(whole_numbers, "whole numbers with commas between, as 1,2,2")
        if get_args(kind)[0] is float:
            several = converter(numbers, "numbers with commas between, as 0,1.5")
        group.add_argument(option, type=several, metavar=value or "N,N,...", **about)
    elif choices:
        words = ", ".join(map(str, choices))
        if one_of(choices) == "NAME" and not all(str(choice) in help for choice in choices):
            about["help"] = f"{help}: {words}"
        group.add_argument(option, type=converter(type(choices[0]), words), metavar=one_of(choices), **about)
    else:
        wanted = {int: "a whole number", float: "a number", str: "text"}[kind]
        metavar = value or {int: "N", float: "X"}[kind]
        group.add_argument(option, type=converter(kind, wanted), metavar=metavar, **about)


def run(args: argparse.Namespace) -> int:
    overrides = {f.name: getattr(args, f.name) for f in fields(Preset) if getattr(args, f.name, None) is not None}
    started = time.monotonic()
    if args.minutes is not None:
        check("--minutes", args.minutes, float, 0.1)
        if "steps" in args:
            raise InputError("--minutes, --steps: want one of the two")
    if args.preset is None and args.config is None and not {"data", "init"} & overrides.keys():
        raise InputError(
            f"PRESET: missing; want a preset, {', '.join(PRESETS)}, a run's folder, or --data SOURCE, --init MODEL or "
            "--config FILE"
        )
    with importing():
        preset, out = settle(args.preset, args.out, overrides, args.config)
        from ddpm.run.train import train

    minutes = None if args.minutes is None else args.minutes - (time.monotonic() - started) / 60
    return finish(args, out, train(preset, out, minutes), preset)


def finish(args: argparse.Namespace, out: Path, result: "Result", preset: Preset) -> int:
    """Print the end of a run, and return the exit code."""
    if os.environ.get("RANK", "0") != "0":  # under torchrun the first process prints for all
        pass
    elif args.json:
        print(json.dumps({"out": str(out), **{f.name: getattr(result, f.name) for f in fields(result)}}))
    elif result.held_out is not None and not result.interrupted:
        if preset.loss != "consistency":  # whose x0^ leaves what L_simple measures
            before = "" if result.held_out_before is None else f"{result.held_out_before:.4f} before, "
            print(f"held-out L_simple: {before}{result.held_out:.4f} after {result.step:,} steps")
        if result.images_per_second:
            print(f"speed: {result.images_per_second:.0f} images/s")
        if preset.sample_every:
            print(f"pictures: {out / 'samples'}")
        what = "-n 64" if preset.condition == "none" else "--input FILE"
        print(f"next: ddpm sample {out} {what} --out samples.png")
    return 128 + result.interrupted if result.interrupted else 0

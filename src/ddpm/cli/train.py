"""`ddpm train`: an option for every setting of Preset."""

import argparse
import json
import os
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ddpm.cli.options import (
    SOURCE,
    Commands,
    add_json,
    auto_or_number,
    command,
    converter,
    find_preset,
    height_and_width,
    importing,
    number,
    numbers,
    whole_numbers,
)
from ddpm.errors import InputError
from ddpm.presets import BY_SIZE, GROUPS, PRESETS, Preset, check


def add(commands: Commands) -> None:
    parser = command(
        commands, "train", run, "train a model, or resume a run",
        "Train the network of a preset, and write checkpoints, samples and a log into the run folder. The same command "
        "resumes a run that was stopped, and so does `ddpm train RUN`. Each grouped option replaces one setting.",
        "ddpm train cifar10_small --data ./photos --out runs/photos --steps 20000",
    )  # fmt: skip
    start = f"a preset, {', '.join(PRESETS)}; or a run's folder, which goes on with its own settings"
    parser.add_argument("preset", metavar="PRESET", nargs="?", help=f"{start} (default: photos, if there is --data)")
    parser.add_argument("--out", metavar="RUN", help="the run's folder (default: runs/PRESET, or the run itself)")
    add_json(parser)
    groups = {name: parser.add_argument_group(name, about) for name, about in GROUPS.items()}
    groups["data"].add_argument("--data", metavar="SOURCE", default=argparse.SUPPRESS, help=f"the images: {SOURCE}")
    minutes = (
        "minutes that a new run takes, in place of --steps; its first steps tell how many there are, and at most a "
        "tenth of them are warmup"
    )
    groups["optimisation"].add_argument("--minutes", **number(float, None), help=minutes)
    hints = get_type_hints(Preset)
    for f in fields(Preset):
        if f.name not in ("data", "class_names", "details"):
            _add_setting(groups[f.metadata["group"]], f, hints[f.name])


def _add_setting(group: Any, f: Any, kind: Any) -> None:
    """The option of one field. If it is not given, the preset's value stays."""
    option, help = f"--{f.name.replace('_', '-')}", f.metadata["help"]
    about = {"dest": f.name, "default": argparse.SUPPRESS, "help": help}
    choices = f.metadata["choices"] or (get_args(kind) if get_origin(kind) is Literal else ())
    if kind is bool:
        group.add_argument(option, action=argparse.BooleanOptionalAction, **about)
    elif f.name == "size":
        group.add_argument(option, type=converter(height_and_width, "a size as 32 or 32x48"), metavar="HxW", **about)
    elif f.name == "workers":
        group.add_argument(option, type=converter(auto_or_number, "auto or a whole number"), metavar="N", **about)
    elif f.name == "cache_bytes":
        group.add_argument(option, metavar="BYTES", **about)  # Preset reads 4G
    elif get_origin(kind) is tuple:
        several = converter(whole_numbers, "whole numbers with commas between, as 1,2,2")
        if get_args(kind)[0] is float:
            several = converter(numbers, "numbers with commas between, as 0,1.5")
        group.add_argument(option, type=several, metavar="N,N", **about)
    elif choices:
        words = ", ".join(map(str, choices))
        if not all(str(choice) in help for choice in choices):
            about["help"] = f"{help}; one of {words}"
        group.add_argument(option, type=converter(type(choices[0]), words), metavar="X", **about)
    else:
        wanted = {int: "a whole number", float: "a number", str: "text"}[kind]
        metavar = {int: "N", float: "X", str: "S"}[kind]
        group.add_argument(option, type=converter(kind, wanted), metavar=metavar, **about)


def run(args: argparse.Namespace) -> int:
    overrides = {f.name: getattr(args, f.name) for f in fields(Preset) if getattr(args, f.name, None) is not None}
    started = time.monotonic()
    if args.minutes is not None:
        check("--minutes", args.minutes, float, 0.1)
        if "steps" in args:
            raise InputError("--minutes, --steps: want one of the two")
    if args.preset is None and "data" not in args:
        raise InputError(f"PRESET: missing; want a preset, {', '.join(PRESETS)}, a run's folder, or --data SOURCE")
    name = "photos" if args.preset is None else args.preset
    preset, out = _start(name, None if args.out is None else Path(args.out))
    if name in BY_SIZE:
        preset = BY_SIZE[name](overrides.get("size", preset.size))
    preset = replace(preset, **overrides)

    with importing():
        from ddpm.run.train import train

    minutes = None if args.minutes is None else args.minutes - (time.monotonic() - started) / 60
    result = train(preset, out, minutes)
    if os.environ.get("RANK", "0") != "0":  # under torchrun the first process prints for all
        pass
    elif args.json:
        print(json.dumps({"out": str(out), **{f.name: getattr(result, f.name) for f in fields(result)}}))
    elif result.held_out is not None and not result.interrupted:
        before = "" if result.held_out_before is None else f"{result.held_out_before:.4f} before, "
        print(f"held-out L_simple: {before}{result.held_out:.4f} after {result.step:,} steps")
        if result.images_per_second:
            print(f"speed: {result.images_per_second:.0f} images/s")
        if preset.sample_every:
            print(f"pictures: {out / 'samples'}")
        print(f"next: ddpm sample {out} -n 64 --out samples.png")
    return 128 + result.interrupted if result.interrupted else 0


def _start(name: str, out: Path | None) -> tuple[Preset, Path]:
    """The settings to start from, and the folder of the run. The name of a preset wins over a folder of that name."""
    if name in PRESETS or not Path(name).exists():
        return find_preset(name), out or Path("runs", name)
    if not (Path(name) / "config.json").is_file():
        raise InputError(f"{name}: not a run; want a run's folder or a preset, {', '.join(PRESETS)}")

    with importing():
        from ddpm.files.checkpoints import settings

    preset = settings(Path(name))
    assert preset is not None  # there is a config.json
    return (preset, Path(name)) if out is None else (replace(preset, class_names=()), out)  # the classes of its data

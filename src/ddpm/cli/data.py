"""`ddpm data`."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from ddpm.cli.options import SOURCE, Commands, add_general, command, importing, number
from ddpm.cli.train import add_setting
from ddpm.presets import PRESETS, Preset, check
from ddpm.run.start import settle

SETTINGS = (
    "size", "channels", "pixel_type", "value_range", "clip_values", "fit", "pages", "show", "show_range",
    "image_column", "label_column", "allow_paths",
)  # fmt: skip


def add(commands: Commands) -> None:
    parser = command(
        commands, "data", run, "show what training would see of your images",
        "Print the splits, classes, sizes and kinds of a source of images, what training would convert, and which "
        "images are bad. Sizes, kinds, conversions, faults and speed are those of some images, spread evenly.",
        "ddpm data ./photos --size 64 --out seen.png",
    )  # fmt: skip
    parser.add_argument("source", metavar="SOURCE", help=SOURCE)
    group = parser.add_argument_group("report", "how much is looked at, and what is written")
    out = (
        "write a contact sheet, FILE.png: a row of images as they are, below it the same images as training sees them, "
        "and so on"
    )
    group.add_argument("--out", metavar="FILE", help=out)
    group.add_argument("-n", **number(int, 400), help="number of images to look at (default: %(default)s)")
    group = parser.add_argument_group("settings", "the settings of training that matter for images")
    start = f"take the other settings from a preset, {', '.join(PRESETS)}, or from a run's folder (default: photos)"
    group.add_argument("--preset", metavar="PRESET", help=start)
    for f in fields(Preset):
        if f.name in SETTINGS:
            add_setting(group, f)
    add_general(parser)


def run(args: argparse.Namespace) -> int:
    check("-n", args.n, int, 1)
    settings = {name: getattr(args, name) for name in SETTINGS if getattr(args, name, None) is not None}
    with importing():
        from ddpm.files import images
        from ddpm.run.survey import check_sheet, survey

    preset, _ = settle(args.preset, None, settings)
    out = None if args.out is None else check_sheet(args.out)
    found = survey(args.source, preset, args.n)
    if out is not None and found.sheet is not None:
        images.save(out, found.sheet)
    if args.json:
        print(json.dumps(found.about))
        return 0
    print(found.line)
    print("\n".join(_lines(found.about)))
    if out is not None and found.sheet is not None:
        print(f"written: {out}")
    return 0


def _lines(about: dict[str, Any]) -> Iterator[str]:
    def row(name: str, value: str) -> str:
        return f"{name:<14}{value}"

    if about["classes"]:
        yield row("classes", ", ".join(f"{name} {count:,}" for name, count in about["classes"].items()))
    some = about["looked_at"] < about["train"]
    yield row("looked at", f"{about['looked_at']:,} of {about['train']:,} images" if some else "all images to train on")
    for name in ("height", "width"):
        if (spread := about[name]) is not None:
            same = spread["min"] == spread["max"]
            yield row(name, f"{spread['min']}" + f" to {spread['max']}, median {spread['median']:g}" * (not same))
    yield row("kinds", ", ".join(f"{kind} {count:,}" for kind, count in about["kinds"].items()) or "none")
    yield row("become", about["fitted"])
    for what, each in about["conversions"].items():
        number = f"{each['images']:,} image{'s' * (each['images'] != 1)}"
        yield row("conversion", f"{number}: {what}; the first: {each['first']}")
    for fault in about["faults"]:
        yield row("bad", fault)
    if more := about["bad"] - len(about["faults"]):
        yield row("bad", f"and {more:,} more")
    yield row("speed", f"{about['images_per_second']:,.0f} images/s decoded by one thread")

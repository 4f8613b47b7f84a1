"""`ddpm distill`: the training program with the settings of consistency tuning."""

import argparse
from dataclasses import fields
from pathlib import Path

from ddpm.cli.options import MODEL, SOURCE, Commands, add_general, command, importing
from ddpm.cli.train import add_setting, finish
from ddpm.presets import DISTILLED, GROUPS, Preset


def add(commands: Commands) -> None:
    parser = command(
        commands, "distill", run, "make a model that samples in one or two network calls",
        "Tune a model until its estimate x0^ is the same along each path from noise to image (consistency tuning, Geng "
        "et al. 2024). Then one or two network calls make an image. The model has to predict v or x0. The result is a "
        "run: the same command resumes it, and so does `ddpm train RUN`, which needs no model.",
        "ddpm distill digits --out runs/two-calls --steps 2000",
    )  # fmt: skip
    parser.add_argument("run", metavar="MODEL", help=MODEL)
    group = parser.add_argument_group("start", "where the new run lies")
    group.add_argument("--out", required=True, metavar="RUN", help="folder of the new run")
    source = f"images to train on: {SOURCE} (default: the data of the model)"
    for name, about in GROUPS.items():
        if used := [f for f in fields(Preset) if f.name in DISTILLED and f.metadata["group"] == name]:
            group = parser.add_argument_group(name, about)
            if name == "data":
                group.add_argument("--data", metavar="SOURCE", default=argparse.SUPPRESS, help=source)
            for f in used:
                add_setting(group, f)
    add_general(parser)


def run(args: argparse.Namespace) -> int:
    with importing():
        from ddpm.run.init import distilled
        from ddpm.run.train import train

    given = {name: getattr(args, name) for name in ("data", *DISTILLED) if hasattr(args, name)}
    out = Path(args.out)
    return finish(args, out, train(preset := distilled(args.run, given), out), preset)

"""`ddpm average`."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from ddpm.cli.options import Commands, add_general, check_numbers, command, importing, number


def add(commands: Commands) -> None:
    parser = command(
        commands, "average", run, "average the weights of a run over another length, after its training",
        "Write a model whose weights are averaged over a longer or shorter part of the training than the run's own EMA "
        "weights. It is made of the run's snapshots, which `ddpm train --snapshot-every N` keeps (Karras et al. 2024). "
        "Every command takes it as a model. A length that the snapshots give with an error of more than 5% is refused.",
        "ddpm average runs/digits --ema 0.07",
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", help="a run folder with snapshots")
    group = parser.add_argument_group("average", "what is made, and where it goes")
    length = "length of the average: the standard deviation of its weighting, as a part of the steps so far"
    group.add_argument("--ema", **number(float, None, "SIGMA_REL"), required=True, help=length)
    last = "step at which the average ends, that of a snapshot (default: the newest)"
    group.add_argument("--step", **number(int, None), help=last)
    out = "NAME.safetensors to write (default: RUN/averages/STEP-SIGMA_REL.safetensors)"
    group.add_argument("--out", metavar="FILE", help=out)
    add_general(parser)


def run(args: argparse.Namespace) -> int:
    check_numbers(args, step=1)
    with importing():
        from ddpm.run.average import average

    out, about = average(Path(args.run), args.ema, args.step, None if args.out is None else Path(args.out))
    if args.json:
        print(json.dumps({"out": str(out), **asdict(about)}))
    else:
        print(f"written: {out}, the average of {about}")
    return 0

"""`ddpm compare`."""

import argparse
import functools
from pathlib import Path
from typing import Literal

from ddpm import catalog
from ddpm.cli.options import (
    Commands,
    add_features,
    add_json,
    check_numbers,
    command,
    feature_network,
    importing,
    number,
    print_results,
)
from ddpm.errors import InputError
from ddpm.presets import check


def add(commands: Commands) -> None:
    metrics = catalog.quality_metrics()
    parser = command(
        commands, "compare", run, "compare two folders of images",
        f"Compare all images of A with all of B, of any sizes, without a model, by these metrics:\n\n"
        f"{catalog.describe(metrics)}\n\nA takes the place of the samples, and B that of the real images.",
        "ddpm compare samples/ photos.zip --metrics fid kid pr",
    )  # fmt: skip
    source = "a folder, a .zip or an .npz of images; or an .npz of features, or of mu and sigma, of other programs"
    parser.add_argument("a", metavar="A", help=source)
    parser.add_argument("b", metavar="B", help="the same")
    names = ", ".join(metrics)
    parser.add_argument(
        "--metrics", nargs="+", default=["fid"], metavar="X", help=f"one or more of {names} (default: fid)"
    )
    parser.add_argument("--seed", **number(int, 0), help="seed of the random subsets of kid (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE", help="also write the result to this file, NAME.json")
    add_features(parser, files=False)
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", metavar="X", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    add_json(group)


def run(args: argparse.Namespace) -> int:
    for metric in args.metrics:
        check("--metrics", metric, Literal[tuple(catalog.quality_metrics())])
    check_numbers(args, seed=0)
    if args.features is not None and args.features.endswith(".npz"):
        raise InputError(f"--features {args.features}: want FILE.py:NAME; features in a file are A or B")
    out = None if args.out is None else Path(args.out)
    if out is not None and out.suffix != ".json":
        raise InputError(f"--out {out}: want a name that ends in .json")

    with importing():
        from ddpm.files import atomic
        from ddpm.files.images import check_folder
        from ddpm.run.processes import pick_device
        from ddpm.run.quality import compare

    if out is not None:
        check_folder(out.absolute().parent)
    device = pick_device(args.device)
    network = functools.partial(feature_network, args, device)
    a, b = Path(args.a), Path(args.b)
    values = compare(args.metrics, a, b, network, args.seed, device, not args.json)
    results = {"a": args.a, "b": args.b, "seed": args.seed, **values}
    if out is not None:
        atomic.write_json(out, results)
    print_results(args, results, out)
    return 0

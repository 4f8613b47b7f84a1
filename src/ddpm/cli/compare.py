"""`ddpm compare`."""

import argparse
import functools
from pathlib import Path
from typing import Literal

from ddpm import catalog
from ddpm.cli.options import (
    Commands,
    add_device,
    add_features,
    add_general,
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
        commands, "compare", run, "compare two folders of images by FID and other metrics",
        f"Compare all images of A with all of B, of any sizes, without a model, by these metrics:\n\n"
        f"{catalog.describe(metrics)}\n\nA takes the place of the samples, and B that of the real images.",
        "ddpm compare samples/ photos.zip --metrics fid kid pr",
    )  # fmt: skip
    source = "a folder, a .zip or an .npz file of images; or an .npz file of features, or of mu and sigma"
    parser.add_argument("a", metavar="A", help=f"samples: {source}")
    parser.add_argument("b", metavar="B", help=f"real images: {source}")
    group = parser.add_argument_group("comparison", "what is measured")
    metric = "metrics of the table above, one or more (default: fid)"
    group.add_argument("--metrics", nargs="+", default=["fid"], metavar="NAME", help=metric)
    group.add_argument("--out", metavar="FILE", help="also write the result to this file, NAME.json")
    group.add_argument("--seed", **number(int, 0), help="seed of the random subsets of kid (default: %(default)s)")
    add_features(parser, files=False)
    add_device(parser.add_argument_group("machine", "where the network runs"))
    add_general(parser)


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

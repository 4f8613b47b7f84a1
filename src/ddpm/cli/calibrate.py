"""`ddpm calibrate`."""

import argparse

from ddpm.cli.options import (
    MODEL,
    Commands,
    add_model,
    add_source,
    check_numbers,
    command,
    importing,
    loader,
    number,
    open_model,
    print_results,
)
from ddpm.errors import InputError


def add(commands: Commands) -> None:
    parser = command(
        commands, "calibrate", run, "measure a model's best variances, and make the codec's tables",
        "Measure the error of x0^, the estimate of the image, at every noise level on training images, and keep the "
        "result beside the weights. Then `ddpm evaluate` also reports the bound with the best variances, `--variance "
        "calibrated` samples with them, and `ddpm compress` has the tables that it needs.",
        "ddpm train digits",
        "ddpm calibrate runs/digits",
    )  # fmt: skip
    parser.add_argument("run", metavar="MODEL", help=MODEL)
    group = parser.add_argument_group("calibration", "what is measured")
    group.add_argument("-n", **number(int, 500), help="number of training images (default: %(default)s)")
    add_source(group)
    tables = "number of training images for the codec's tables; 0 makes no tables (default: %(default)s)"
    group.add_argument("--codec", **number(int, 32), help=tables)
    replace = "replace the codec's tables; files that were compressed with the old tables can no longer be read"
    group.add_argument("--replace", action="store_true", help=replace)
    add_model(parser, variance=False)
    parser.set_defaults(variance=None)


def run(args: argparse.Namespace) -> int:
    check_numbers(args, n=1, batch_size=1, codec=0)

    with importing():
        from ddpm.files.models import calibration_file, codec_tables
        from ddpm.run.calibrate import calibrate
        from ddpm.run.processes import processes

    with processes(args.device, float64=True) as ranks:
        model = open_model(args, ranks.device, conditional=True)
        if model.packaged or model.name:
            copy = f"ddpm {'import' if model.foreign else 'export'} {args.run} --out FILE.safetensors"
            raise InputError(f"{args.run}: this model cannot be changed; calibrate a copy: `{copy}`")
        if args.codec and codec_tables(model) and not args.replace:
            file = calibration_file(model.path)
            raise InputError(
                f"{file}: holds the codec's tables, which compressed files need; want --codec 0 or --replace"
            )
        progress = ranks.first and not args.json
        images = loader(args, model.preset, progress)("train")
        cache = model.home / "cache"
        mse = calibrate(model, images, cache, ranks, args.n, args.batch_size, progress, args.codec)
        if ranks.first:
            about = {"run": str(model.path), "data": images.name, "count": min(args.n, len(images)), "levels": len(mse)}
            print_results(args, about, f"{calibration_file(model.path)}; use it with --variance calibrated")
    return 0

"""`ddpm restore`."""

import argparse
import json
from dataclasses import replace

from ddpm import catalog
from ddpm.cli.options import (
    MODEL,
    PICTURES,
    THREES,
    Commands,
    add_classes,
    add_clip,
    add_model,
    add_show,
    check_numbers,
    command,
    conditions,
    importing,
    number,
    open_model,
    with_view,
)
from ddpm.presets import check


def add(commands: Commands) -> None:
    parser = command(
        commands, "restore", run, "undo blur, low resolution, missing parts or missing colours, without training",
        "Sample what an image was before an operator degraded it. The model was not trained for that: its samples are "
        "made to agree with the image, by DDNM+ (Wang et al. 2023) for linear operators, or by DPS (Chung et al. 2023) "
        "for all functions that PyTorch can differentiate.",
        THREES,
        "ddpm restore digits threes/000000.png --degrade --operator superresolution:2 -n 4 --out restored.png",
    )  # fmt: skip
    parser.add_argument("run", metavar="MODEL", help=MODEL)
    given = "image files, as the operator left them, or clean ones with --degrade"
    parser.add_argument("image", metavar="IMAGE", nargs="+", help=given)
    group = parser.add_argument_group("images", "what is undone, what is made, and where it goes")
    operators = (
        "what the images went through: superresolution:N (an image N times smaller, by means of blocks), blur:SIGMA "
        "(Gaussian, in pixels), mask:FILE (white is hidden), grey (luma), or FILE.py:NAME, a function of images "
        "(tensor [B, C, H, W] in -1..1) that returns a tensor [B, ...]"
    )
    group.add_argument("--operator", required=True, metavar="OPERATOR", help=operators)
    noise = "standard deviation of the images' noise in grey levels; rounding to 8 bits has 0.29 (default: 0.29)"
    group.add_argument("--noise", **number(float, None), help=noise)
    degrade = "degrade clean images first, and show each of them clean, degraded and restored"
    group.add_argument("--degrade", action="store_true", help=degrade)
    group.add_argument("-n", **number(int, 1), help="number of results to make of an image (default: %(default)s)")
    group.add_argument("--out", default="restored.png", metavar="PATH", help=f"{PICTURES} (default: %(default)s)")
    seed = "seed of the first result; each next result has the next seed (default: %(default)s)"
    group.add_argument("--seed", **number(int, 0), help=seed)
    add_show(group)
    group = parser.add_argument_group("method", "how the images are restored")
    method = "method to use (default: ddnm; dps for FILE.py:NAME)"
    group.add_argument("--method", metavar="ddnm|dps", help=method)
    group.add_argument("--steps", **number(int, None), help="number of noise levels to visit (default: 100)")
    spacings = (
        f"how to space these levels: {', '.join(catalog.spacings())} (default: log_snr for ddnm, uniform for dps)"
    )
    group.add_argument("--spacing", metavar="NAME", help=spacings)
    resample = (
        "ddnm: number of times that each level is passed; more make results that fit together better (default: 1)"
    )
    group.add_argument("--resample", **number(int, None), help=resample)
    jump = "ddnm: number of levels to go back up before each new pass (default: 1/25 of --steps)"
    group.add_argument("--jump", **number(int, None), help=jump)
    group.add_argument("--zeta", **number(float, None), help="dps: size of the steps towards the image (default: 1)")
    add_clip(group)
    add_classes(parser)
    add_model(parser, variance=False)  # both methods have a variance of their own
    parser.set_defaults(variance=None)


def run(args: argparse.Namespace) -> int:
    check("-n", args.n, int, 1, 10_000)
    check_numbers(args, seed=0, batch_size=1, resample=1, jump=1)

    with importing():
        from ddpm.files import arrays, images
        from ddpm.run.edit import SamplingSettings
        from ddpm.run.processes import pick_device
        from ddpm.run.restore import Restoration, restore

    images.check_out(args.out)
    model = open_model(args, pick_device(args.device))
    shown = with_view(args, model.preset)
    resolved = conditions(args).resolved(model)
    denoiser, labels = resolved.apply(model)
    sampling = SamplingSettings("ancestral", args.steps, args.spacing, tuple(labels), args.batch_size)
    settings = Restoration(args.method, args.noise, args.zeta, args.jump, args.resample, sampling)
    made = restore(
        replace(model, denoiser=denoiser), args.image, args.operator, args.n, settings, args.seed, args.degrade,
        not args.json,
    )  # fmt: skip
    pictures, names = made.rows(len(args.image))
    sheet = arrays.sheet(pictures, arrays.view_of(shown, denoiser.values))
    columns = len(names) // len(args.image)
    columns = columns if columns > 1 else min(len(names), 16)
    images.save_many(args.out, images.channels_last(pictures), names, columns, sheet)
    about = {
        "out": args.out, "count": len(made.restored), **model.about(), "operator": args.operator, "noise": made.noise,
        "method": made.method, "steps": len(made.levels), "degrade": args.degrade, **resolved.about(),
        "seed": args.seed, "residual": made.residual, "psnr": made.psnr,
    }  # fmt: skip
    line = f"{len(made.restored)} image{'s' * (len(made.restored) != 1)} in {args.out}; degraded again, they are "
    line += f"{made.residual:.2f} grey levels from what was given"
    line += "" if made.psnr is None else f"; PSNR {made.psnr:.2f} dB"
    print(json.dumps(about) if args.json else line)
    return 0

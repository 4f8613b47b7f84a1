"""`ddpm edit`, `ddpm interpolate` and `ddpm inpaint`."""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ddpm.catalog import Precision
from ddpm.cli.options import (
    MODEL,
    PICTURES,
    THREES,
    Commands,
    Parser,
    add_classes,
    add_clip,
    add_model,
    add_sampler,
    add_show,
    check_numbers,
    check_sampler,
    command,
    conditions,
    importing,
    number,
    open_model,
    with_view,
)
from ddpm.errors import InputError
from ddpm.presets import check

if TYPE_CHECKING:
    import torch

    from ddpm.files.models import Checkpoint
    from ddpm.run.edit import SamplingSettings


def add(commands: Commands) -> None:
    parser = command(
        commands, "edit", edit, "make new versions of an image",
        "Add noise to the image up to level t, and let the reverse process make an image of it (SDEdit): the higher t, "
        "the more it may change. With --invert, DDIM inverts the image and no noise is added: without --class the "
        "image stays as it is, and with --class NAME it becomes an image of that class.",
        THREES,
        "ddpm edit digits threes/000000.png --t 400 -n 8 --out versions.png",
    )  # fmt: skip
    parser.add_argument("run", metavar="MODEL", help=MODEL)
    parser.add_argument("image", metavar="IMAGE", help="an image file")
    group = parser.add_argument_group("versions", "what is made, and where it goes")
    group.add_argument("-n", **number(int, 1), help="number of versions to make (default: %(default)s)")
    _add_out(group, "edited.png")
    group.add_argument("--t", **number(int, None), help="noise level to go back to, 0 to T (default: half of T)")
    inversions = "number of iterations of DDIM's inversion at each level; 0 adds noise instead (default: %(default)s)"
    group.add_argument("--invert", **number(int, 0), help=inversions)
    _add_common(parser, group, SEED_OF_VERSIONS, "ddim")

    parser = command(
        commands, "interpolate", interpolate, "make images between two images (Figure 8)",
        "Add noise to both images up to level t, mix them there, and let the reverse process make images of the "
        "mixtures.",
        THREES,
        "ddpm interpolate digits threes/000000.png threes/000001.png --out between.png",
    )  # fmt: skip
    parser.add_argument("run", metavar="MODEL", help=MODEL)
    parser.add_argument("a", metavar="A", help="an image file")
    parser.add_argument("b", metavar="B", help="another image file")
    group = parser.add_argument_group("images", "what is made, and where it goes")
    group.add_argument("-n", **number(int, 11), help="number of images to make, from A to B (default: %(default)s)")
    _add_out(group, "interpolation.png")
    levels = "noise level at which the images are mixed, 0 to T: the higher, the freer (default: half of T)"
    group.add_argument("--t", **number(int, None), help=levels)
    _add_common(parser, group, "seed of the noise")

    parser = command(
        commands, "inpaint", inpaint, "redraw the masked part of an image",
        "Redraw what is white in MASK and keep what is black, by RePaint (Lugmayr et al. 2022).",
        THREES,
        "ddpm inpaint digits threes/000000.png mask.png -n 4 --out mended.png",
    )  # fmt: skip
    parser.add_argument("run", metavar="MODEL", help=MODEL)
    parser.add_argument("image", metavar="IMAGE", help="an image file")
    parser.add_argument("mask", metavar="MASK", help="an image file of the same size: white is redrawn, black is kept")
    group = parser.add_argument_group("versions", "what is made, and where it goes")
    group.add_argument("-n", **number(int, 1), help="number of versions to make (default: %(default)s)")
    _add_out(group, "inpainted.png")
    passes = "number of times that each level is passed (default: %(default)s)"
    group.add_argument("--resample", **number(int, 10), help=passes)
    jump = "number of levels to go back up before each new pass (default: 1/25 of --steps)"
    group.add_argument("--jump", **number(int, None), help=jump)
    _add_common(parser, group, SEED_OF_VERSIONS)


SEED_OF_VERSIONS = "seed of the first version; each next version has the next seed"


def _add_out(group: Any, out: str) -> None:
    group.add_argument("--out", default=out, metavar="PATH", help=f"{PICTURES} (default: %(default)s)")


def _add_common(parser: Parser, group: Any, seed: str, sampler: str = "ancestral") -> None:
    group.add_argument("--seed", **number(int, 0), help=f"{seed} (default: %(default)s)")
    add_show(group)
    add_classes(parser)
    add_clip(add_sampler(parser, sampler))
    add_model(parser)


def edit(args: argparse.Namespace) -> int:
    check("-n", args.n, int, 1, 10_000)
    check_numbers(args, seed=0, invert=0)
    if args.invert and args.clip is not None:
        raise InputError("--clip: not with --invert, which never clips")

    with importing():
        from ddpm.run.edit import redraw

    return _make(
        args,
        lambda model, settings: redraw(
            model, args.image, args.n, args.t, settings, args.seed, args.invert, not args.json
        ),
    )


def interpolate(args: argparse.Namespace) -> int:
    check("-n", args.n, int, 2, 10_000)
    check_numbers(args, seed=0)

    with importing():
        from ddpm.run.edit import interpolate

    return _make(
        args,
        lambda model, settings: interpolate(model, args.a, args.b, args.n, args.t, settings, args.seed, not args.json),
    )


def inpaint(args: argparse.Namespace) -> int:
    check("-n", args.n, int, 1, 10_000)
    check_numbers(args, seed=0, resample=1, jump=1)

    with importing():
        from ddpm.run.edit import inpaint

    def make(model: "Checkpoint", settings: "SamplingSettings") -> "torch.Tensor":
        return inpaint(
            model, args.image, args.mask, args.n, settings, args.jump, args.resample, args.seed, not args.json
        )

    return _make(args, make)


def _make(args: argparse.Namespace, make: "Callable[[Checkpoint, SamplingSettings], torch.Tensor]") -> int:
    """Open the model, make the images, and save them."""
    from ddpm.files import arrays, images
    from ddpm.run.edit import SamplingSettings
    from ddpm.run.processes import pick_device

    check_numbers(args, batch_size=1)
    images.check_out(args.out)
    exact: Precision | None = "float32" if getattr(args, "invert", 0) else None  # rounding limits the fixed point
    model = open_model(args, pick_device(args.device), precision=exact)
    check_sampler(args, model.preset, model.denoiser.schedule.T)
    shown = with_view(args, model.preset)
    resolved = conditions(args).resolved(model)
    denoiser, labels = resolved.apply(model)
    settings = SamplingSettings(args.sampler, args.steps, args.spacing, tuple(labels), args.batch_size)
    made = make(replace(model, denoiser=denoiser), settings)
    sheet = arrays.sheet(made, arrays.view_of(shown, denoiser.values))
    pictures, names = images.channels_last(made), [f"{i:03d}" for i in range(len(made))]
    images.save_many(args.out, pictures, names, min(len(pictures), 16), sheet)
    options = ("sampler", "steps", "spacing", "t", "invert", "jump", "resample")
    given = {name: value for name in options if (value := getattr(args, name, None)) is not None}
    about = {"out": args.out, "count": len(pictures), **model.about(), **given, **resolved.about(), "seed": args.seed}
    print(json.dumps(about) if args.json else f"{len(pictures)} image{'s' * (len(pictures) != 1)} in {args.out}")
    return 0

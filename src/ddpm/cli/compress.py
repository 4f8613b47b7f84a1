"""`ddpm compress`, `ddpm decompress` and `ddpm inspect`."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ddpm.cli.options import (
    MODEL,
    THREES,
    Commands,
    Parser,
    add_device,
    add_general,
    add_precision,
    add_weights,
    check_model,
    check_numbers,
    command,
    importing,
    number,
)
from ddpm.errors import InputError
from ddpm.presets import check

if TYPE_CHECKING:
    import torch

    from ddpm.codec import Model


def add(commands: Commands) -> None:
    parser = command(
        commands, "compress", compress, "compress pictures with a model, lossless or lossy",
        "Write pictures as files that `ddpm decompress` reads with the same model (Algorithms 3 and 4). A whole file "
        "gives the exact picture, and its first bytes give an estimate of it. The model must be calibrated.",
        THREES,
        "ddpm compress digits threes/000000.png --out three.ddpm",
    )  # fmt: skip
    parser.add_argument("run", metavar="MODEL", help=MODEL)
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="an image file, 8-bit grey or RGB, of any size")
    group = parser.add_argument_group("file", "what is written, and how")
    out = "a file to write; for several images a folder, or a file with --archive"
    group.add_argument("--out", required=True, metavar="PATH", help=out)
    group.add_argument("--lossless", action="store_true", help="keep every pixel exactly (the default)")
    psnr = "lossy: stop when the picture has this quality, a PSNR in decibels"
    group.add_argument("--psnr", **number(float, None, "DB"), help=psnr)
    bits = "lossy: stop before the file exceeds this many bits per value of the picture"
    group.add_argument("--bits-per-dim", **number(float, None, "BITS"), help=bits)
    archive = "put all pictures into one file, whose size is close to the model's bound"
    group.add_argument("--archive", action="store_true", help=archive)
    profiles = (
        "portable: every machine can decode the file; local: faster, but only this kind of machine can decode it "
        "(default: portable)"
    )
    group.add_argument("--profile", default="portable", metavar="portable|local", help=profiles)
    chunk = "bits per chunk, K: a larger K gives smaller files and takes longer (default: the largest calibrated K)"
    group.add_argument("--chunk-bits", **number(int, None), help=chunk)
    group.add_argument("--whole", action="store_true", help="code a picture as one tile of its own size")
    group.add_argument("--seed", **number(int, 0), help="seed of the shared noise (default: %(default)s)")
    _add_model(parser)

    parser = command(
        commands, "decompress", decompress, "restore pictures from a compressed file",
        "Read a file of `ddpm compress` with the same model, and write its pictures. A file that was cut short gives "
        "an estimate of the picture.",
        THREES,
        "ddpm compress digits threes/000000.png --out three.ddpm",
        "ddpm decompress digits three.ddpm --out three.png",
    )  # fmt: skip
    parser.add_argument("run", metavar="MODEL", help=MODEL)
    parser.add_argument("file", metavar="FILE", help="a file of `ddpm compress`")
    group = parser.add_argument_group("picture", "what is read, and where it goes")
    out = "NAME.png; NAME.gif, .webp or .mp4 to show how the picture develops; a folder for an archive"
    group.add_argument("--out", required=True, metavar="PATH", help=out)
    group.add_argument("--at", **number(int, None), help="read only the first N bytes")
    _add_model(parser)

    parser = command(
        commands, "inspect", inspect, "show what a compressed file holds",
        "Print the header of a file of `ddpm compress`. With --run also print what each group of noise levels costs, "
        "and by how much it lowers the error.",
        THREES,
        "ddpm compress digits threes/000000.png --out three.ddpm",
        "ddpm inspect three.ddpm --run digits",
    )  # fmt: skip
    parser.add_argument("file", metavar="FILE", help="a file of `ddpm compress`")
    _add_model(parser, named=True)


def _add_model(parser: Parser, named: bool = False) -> None:
    """The options that choose the weights and the device; `named`: and the model."""
    group = parser.add_argument_group("model", "which weights are used; a file is read with those that wrote it")
    if named:
        group.add_argument("--run", metavar="MODEL", help="the model that compressed the file")
    add_weights(group)
    machine = parser.add_argument_group("machine", "where the network runs, and how")
    add_device(machine)
    add_precision(machine, "precision of the network in the local profile")
    add_general(parser)


def _model(args: argparse.Namespace, device: "torch.device | None" = None) -> "Model":
    from ddpm.run.compress import load_codec
    from ddpm.run.processes import pick_device

    check_model(args)
    precision = None if args.precision == "auto" else args.precision
    return load_codec(args.run, device or pick_device(args.device), precision, args.checkpoint, args.weights)


def compress(args: argparse.Namespace) -> int:
    check("--profile", args.profile, Literal["portable", "local"])
    check_numbers(args, seed=0)
    limits = {"--bits-per-dim": args.bits_per_dim, "--psnr": args.psnr}
    lossy = [name for name, value in limits.items() if value is not None]
    if args.lossless and lossy:
        raise InputError(f"--lossless, {lossy[0]}: want one of the two")
    if args.archive and (lossy or args.whole):
        raise InputError(f"--archive: not with {lossy[0] if lossy else '--whole'}; an archive is lossless, in tiles")
    out, many = Path(args.out), len(args.images) > 1 and not args.archive
    if out.is_dir() and args.archive:
        raise InputError(f"--out {out}: is a folder; want the name of a file")
    if many and out.suffix and not out.is_dir():
        raise InputError(f"--out {out}: {len(args.images)} images; want a folder, or --archive for one file")

    with importing():
        from ddpm.files import atomic, images
        from ddpm.run.compress import compress
        from ddpm.run.processes import processes

    images.check_folder(out if many else out.absolute().parent)
    settings = {"bits": args.chunk_bits, "local": args.profile == "local", "seed": args.seed}
    if not args.archive:
        settings |= {"bits_per_dim": args.bits_per_dim, "psnr": args.psnr, "whole": args.whole}
    with processes(args.device) as ranks:
        paths, progress = list(map(Path, args.images)), ranks.first and not args.json
        written = compress(_model(args, ranks.device), paths, out, args.archive, progress, ranks, **settings)
        if not ranks.first:
            return 0
    screen = sys.stderr if atomic.is_special(out) else sys.stdout  # a pipe may be standard output itself
    if args.json:
        print(json.dumps(written), file=screen)
    for about in [] if args.json else written:
        print(f"{about['file']}: {about['bytes']:,} bytes, {about['bits_per_dim']:.3f} bits/dim", file=screen)
    return 0


def decompress(args: argparse.Namespace) -> int:
    check_numbers(args, at=1)

    with importing():
        from ddpm.codec import container
        from ddpm.files import animation, images
        from ddpm.run.compress import decompress, read_file

    path, out = Path(args.file), Path(args.out)
    if container.is_archive(read_file(path)):
        if images.check_out(out) != "folder":
            raise InputError(f"--out {out}: {path} is an archive; want a folder")
    elif animation.is_animation(out):
        animation.check_out(out)
    elif out.suffix.lower() != ".png" or images.check_out(out) != "png":
        raise InputError(f"--out {out}: want the name of a PNG file, or NAME.gif, .webp or .mp4 for an animation")
    about = decompress(_model(args), path, out, args.at, progress=not args.json)
    if args.json:
        print(json.dumps(about))
    elif about["exact"]:
        count = "the picture" if about["images"] == 1 else f"{about['images']} pictures"
        print(f"{out}: {count}, exactly as before")
    else:
        early = "" if about["whole"] else "; the file was read in part, or ended early"
        pixels = f" and {about['pixels']:,} pixel values" if about["pixels"] else ""
        print(f"{out}: the estimate after {about['groups']} group{'s' * (about['groups'] != 1)}{pixels}{early}")
    return 0


def inspect(args: argparse.Namespace) -> int:
    with importing():
        from ddpm.run.compress import inspect

    about = inspect(Path(args.file), None if args.run is None else _model(args))
    if args.json:
        print(json.dumps(about))
        return 0
    groups = about.pop("by_group", [])
    for name, value in about.items():
        print(f"{name}: {value}")
    if groups:
        print("levels       chunks    bits  RMSE before, grey levels")
    for g in groups:
        print(f"{g['t']:>4} -> {g['s']:<4} {g['chunks']:>6}  {g['bits']:>6.1f}  {g['rmse']:.2f}")
    return 0

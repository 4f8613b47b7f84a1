"""`ddpm sample`."""

import argparse
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from ddpm.cli.options import (
    MODEL,
    PICTURES,
    Commands,
    add_classes,
    add_clip,
    add_guide,
    add_model,
    add_sampler,
    add_show,
    check_numbers,
    check_sampler,
    command,
    guided,
    importing,
    number,
    open_model,
    with_view,
)
from ddpm.errors import InputError
from ddpm.presets import check


def add(commands: Commands) -> None:
    parser = command(
        commands, "sample", run, "sample images from a model",
        "Sample images from a model. Image i of --seed S is the image of seed S + i, whatever the batch size or the "
        "number of processes. Another device changes its last bits.",
        "ddpm sample digits -n 16 --class 7 --sampler unipc --steps 10 --out sevens.png",
    )  # fmt: skip
    parser.add_argument("run", metavar="MODEL", help=MODEL)
    group = parser.add_argument_group("samples", "how many images, and where they go")
    count = "number of images to sample, or with --input for each input (default: 64, or 1 with --input)"
    group.add_argument("-n", **number(int, None), help=count)
    moves = "FILE.tar for WebDataset; FILE.gif, .webp or .mp4 for an animation of x_t, or with --progressive of x0^"
    out = f"{PICTURES}; {moves} (default: %(default)s)"
    group.add_argument("--out", default="samples.png", metavar="PATH", help=out)
    seed = "seed of the first image; each next image has the next seed (default: %(default)s)"
    group.add_argument("--seed", **number(int, 0), help=seed)
    progressive = "show how x0^, the estimate of the image, develops: a row for each image (Figure 6)"
    group.add_argument("--progressive", action="store_true", help=progressive)
    shard = "write tar files for WebDataset into the folder --out, with N images and their classes in each"
    group.add_argument("--shard", **number(int, None), help=shard)
    add_show(group)
    group = parser.add_argument_group("input", "for a model that was trained with --condition")
    given = "give the model this picture, or each picture in a folder; a grid shows it left of its samples"
    group.add_argument("--input", metavar="PATH", help=given)
    mask = "draw where this image is white, and keep the input where it is black (default: draw what is transparent)"
    group.add_argument("--mask", metavar="FILE", help=mask)
    noise = "add noise of this standard deviation to the input, at most that of training; 1 is half the range"
    group.add_argument("--condition-noise", **number(float, 0.0), help=f"{noise} (default: %(default)s)")
    then = "enlarge the samples with this MODEL, which was trained with --condition lowres:N (a cascade)"
    group.add_argument("--then", metavar="MODEL", help=then)
    add_classes(parser)
    sampler = add_sampler(parser)
    sampler.add_argument("--eta", **number(float, 0.0), help="noise of ddim, 0 to 1 (default: %(default)s)")
    sigma_hat = "use ddim with eta 1 and the larger noise sigma^ of the DDIM paper's Table 1"
    sampler.add_argument("--sigma-hat", action="store_true", help=sigma_hat)
    add_clip(sampler)
    add_guide(sampler)
    add_model(parser)


def _is_folder(out: str) -> bool:
    return out.endswith("/") or Path(out).is_dir()


def run(args: argparse.Namespace) -> int:
    check_numbers(args, n=1, seed=0, batch_size=1, shard=1)
    check("--eta", args.eta, float, 0, 1)
    if (args.eta or args.sigma_hat) and args.sampler != "ddim":
        raise InputError(f"{f'--eta {args.eta}' if args.eta else '--sigma-hat'}: only --sampler ddim has it")

    with importing():
        from ddpm.files import animation, arrays, images
        from ddpm.run.export import grid_columns
        from ddpm.run.inputs import cascade, check_cascade, own_sampler, read_inputs
        from ddpm.run.processes import processes
        from ddpm.run.sample import Sampling, sample
        from ddpm.run.stream import RECORD, STREAMED, write_samples

    moves = animation.is_animation(args.out)
    if moves:
        animation.check_out(args.out)
    kinds, ends = {**images.KINDS, ".tar": "tar"}, "a name that ends in .png, .npz, .npy, .tar or .tif"
    if not moves and Path(args.out).suffix.lower() not in ("", *kinds) and not _is_folder(args.out):
        raise InputError(f"--out {args.out}: want {ends}, FILE.gif, .webp or .mp4, or a folder")
    kind = "animation" if moves else images.check_out(args.out, RECORD, kinds, ends)
    if args.shard is not None and kind != "folder":
        raise InputError(f"--shard {args.shard}: --out {args.out} is one file; want a folder as --out")
    if kind not in ("png", "animation") and args.progressive:
        raise InputError(f"--out {args.out}: --progressive makes one picture; want NAME.png, .gif, .webp or .mp4")
    if args.then is not None and args.input is not None:
        raise InputError(f"--then {args.then}: not with --input {args.input}; the images of {args.run} are the input")
    if args.then is not None and args.guide is not None:
        raise InputError(f"--then {args.then}: not with --guide {args.guide}, which fits one of the two models")
    if args.mask is not None and args.input is None:
        raise InputError(f"--mask {args.mask}: needs --input FILE")
    each = args.n if args.n is not None else 1 if args.input is not None else 64
    with processes(args.device) as ranks:
        model, asked = open_model(args, ranks.device, conditional=True), guided(args, ranks.device)
        inputs = None if args.input is None else read_inputs(model, args.input, each, args.mask)
        n = each * (1 if inputs is None else len(inputs))
        shown = with_view(args, model.preset)
        second = None
        if args.then is not None:
            second = open_model(args, ranks.device, args.then, conditional=True, checkpoint="last")
        distilled = model.preset.loss == "consistency" and args.sampler != "consistency"
        theirs = second if second and distilled else model  # a distilled model keeps its own sampler
        check_sampler(args, theirs.preset, theirs.denoiser.schedule.T)
        progress = ranks.first and not args.json
        sampling = Sampling(
            args.sampler, args.steps, args.spacing, asked, args.eta, args.sigma_hat, args.seed, args.batch_size, inputs,
            args.condition_noise,
        )  # fmt: skip
        begun, made, out = time.perf_counter(), n, Path(args.out)
        if second is not None:
            check_cascade(model, second, sampling)
            first = own_sampler(model, replace(sampling, condition_noise=0.0))
            small, about = sample(model, n, ranks, first, progress=progress)
            model, sampling = second, cascade(model, second, small, sampling, about)
            shown = with_view(args, model.preset)
        if kind in STREAMED:
            about, made = write_samples(model, n, ranks, out, sampling, kind, args.shard, progress)
        else:
            if kind != "tif":
                tiles = 11 if args.progressive and not moves else 1
                images.check_grid(n, *model.preset.size, min(model.preset.channels, 3), tiles)
            columns = grid_columns(len(sampling.conditions.apply(model)[1]))
            if moves:
                animation.check_size(args.out, n, *model.preset.size, columns)
            pictures, about = sample(
                model, n, ranks, sampling, args.progressive or moves, progress,
                columns=animation.MOST_FRAMES if moves else 11, noisy=moves and not args.progressive,
            )  # fmt: skip
        if not ranks.first:
            return 0
        sheet = partial(arrays.sheet, view=arrays.view_of(shown, model.denoiser.values))
        if moves:
            animation.save(args.out, [sheet(frame) for frame in pictures.unbind(1)], columns)
        elif args.progressive:
            images.save(args.out, images.grid(sheet(pictures.flatten(0, 1)), columns=pictures.shape[1]))
        elif kind not in STREAMED:
            if sampling.inputs is not None and kind == "png":
                pictures, columns = sampling.inputs.beside(pictures)
            images.save_many(args.out, images.channels_last(pictures), columns=columns, shown=sheet(pictures))
        what = f"{n} image{'s' * (n != 1)}"
        summary = f"{what} of {model.path} (step {model.step:,}, {model.weights}) in {args.out}"
        rate = made / (time.perf_counter() - begun)
        summary += f", {rate:.3g} images/s" if made == n else f", {made:,} made now, {rate:.3g} images/s"
        print(json.dumps({"out": args.out, **about}) if args.json else summary)
    return 0

"""The command line: `ddpm COMMAND --help`. Nothing here imports torch until a command runs."""

import argparse
import difflib
import errno
import functools
import json
import os
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from ddpm.errors import InputError, Stopped
from ddpm.presets import PRESETS, Precision, Preset, check, to_json
from ddpm.version import __version__

if TYPE_CHECKING:
    import torch

    from ddpm.codec import Model
    from ddpm.denoiser import Denoiser
    from ddpm.files import data, features
    from ddpm.files.models import Checkpoint
    from ddpm.run.edit import Way


class _Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line and exit code 2, and an unknown option suggests the nearest."""

    def error(self, message: str) -> NoReturn:
        name = message.removeprefix("the following arguments are required: ")
        if name != message:
            name = name.split(", ")[0]
            wanted = next(a.help for a in self._actions if name in (a.metavar, "/".join(a.option_strings)))
            message = f"{name}: missing; want {wanted}"
        raise InputError(message.removeprefix("argument "))

    def unknown(self, given: Sequence[str]) -> InputError:
        options = {o.lstrip("-"): o for action in self._actions for o in action.option_strings}
        name = next((g for g in given if g.startswith("-")), None)
        if name is None:
            return InputError(f"{given[0]}: more than {self.prog} takes; see `{self.prog} --help`")
        near = difflib.get_close_matches(name.split("=")[0].lstrip("-"), options, n=1)
        hint = f"did you mean {options[near[0]]}?" if near else f"see `{self.prog} --help`"
        return InputError(f"{name}: no such option of {self.prog}; {hint}")


def _tuple_of_int(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _size(text: str) -> tuple[int, ...]:
    sides = tuple(int(part) for part in text.lower().split("x"))
    return sides * 2 if len(sides) == 1 else sides


def _interval(text: str) -> tuple[int, int]:
    first, last = text.split(",")
    return int(first), int(last)


def _clip(text: str) -> bool | float:
    if text in ("static", "none"):
        return text == "static"
    if not 0 < float(text) < 1:
        raise ValueError
    return float(text)


def _as(kind: Any, wanted: str) -> Any:
    """A converter for argparse whose failure names the value and what would do."""

    def convert(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: want {wanted}") from None

    return convert


def _number(kind: type[int] | type[float], default: float | None) -> dict[str, Any]:
    wanted = "a whole number" if kind is int else "a number"
    return {"type": _as(kind, wanted), "default": default, "metavar": "N" if kind is int else "X"}


def _add_fields(parser: argparse.ArgumentParser) -> None:
    """An option for every field of Preset; what is not given stays the preset's."""
    hints = get_type_hints(Preset)
    for f in fields(Preset):
        if f.name in ("data", "class_names"):
            continue
        name, kind, text = f"--{f.name.replace('_', '-')}", hints[f.name], f.metadata["help"]
        extra: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, **extra)
        elif f.name == "size":
            parser.add_argument(name, type=_as(_size, "a size as 32 or 32x48"), metavar="HxW", **extra)
        elif get_origin(kind) is tuple:
            whole = _as(_tuple_of_int, "whole numbers with commas between, as 1,2,2")
            parser.add_argument(name, type=whole, metavar="N,N", **extra)
        elif get_origin(kind) is Literal:
            accepted = get_args(kind)
            one = int if isinstance(accepted[0], int) else str
            words = ", ".join(map(str, accepted))
            extra["help"] += f" ({words})"
            parser.add_argument(name, type=_as(one, words), metavar="X", **extra)
        else:
            wanted = {int: "a whole number", float: "a number", str: "text"}[kind]
            metavar = {int: "N", float: "X", str: "S"}[kind]
            parser.add_argument(name, type=_as(kind, wanted), metavar=metavar, **extra)


def _train(args: argparse.Namespace) -> int:
    overrides = {f.name: getattr(args, f.name) for f in fields(Preset) if getattr(args, f.name, None) is not None}
    preset = replace(_preset(args.preset), **overrides)
    out = Path(f"runs/{args.preset}" if args.out is None else args.out)

    with _importing():
        from ddpm.run.train import train

    result = train(preset, out)
    if os.environ.get("RANK", "0") != "0":  # under torchrun the first process speaks for all
        pass
    elif args.json:
        print(json.dumps({"out": str(out), **{f.name: getattr(result, f.name) for f in fields(result)}}))
    elif result.held_out is not None and not result.interrupted:
        before = "" if result.held_out_before is None else f"{result.held_out_before:.4f} before, "
        print(f"held-out L_simple: {before}{result.held_out:.4f} after {result.step:,} steps")
        if result.images_per_second:
            print(f"speed: {result.images_per_second:.0f} images/s")
        if preset.sample_every:
            print(f"pictures: {out / 'samples'}")
        print(f"next: ddpm sample {out} -n 64 --out samples.png")
    return 128 + result.interrupted if result.interrupted else 0


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"preset {name!r}: {hint}want {', '.join(PRESETS)}")
    return PRESETS[name]


def _open(args: argparse.Namespace, device: "torch.device", run: Path | None = None) -> "Checkpoint":
    """The model of a run (None: of the command's) that --checkpoint, --weights, --precision and --variance mean."""
    from ddpm.files.models import with_variance
    from ddpm.run.processes import opened

    check("--weights", args.weights or "ema", Literal["ema", "raw"])
    check("--precision", args.precision, Precision)
    precision = None if args.precision == "auto" else args.precision
    found = opened(run or args.run, device, args.weights or "ema", args.checkpoint, precision)
    if args.weights and found.weights != args.weights:
        raise InputError(f"--weights {args.weights}: {found.path} holds the {found.weights} weights; want the run")
    if args.variance is not None:
        found = with_variance(found, args.variance)
    return replace(found, denoiser=found.denoiser.to(device))


def _sample(args: argparse.Namespace) -> int:
    check("-n", args.n, int, 1)
    check("--seed", args.seed, int, 0)
    check("--batch-size", args.batch_size, int, 1)
    check("--eta", args.eta, float, 0, 1)
    if (args.eta or args.sigma_hat) and args.sampler != "ddim":
        raise InputError(f"{f'--eta {args.eta}' if args.eta else '--sigma-hat'}: only --sampler ddim has it")

    with _importing():
        from ddpm.files import images
        from ddpm.run.export import columns_of
        from ddpm.run.processes import processes
        from ddpm.run.sample import generate, in_turn, progressive, sampled
        from ddpm.samplers import named

    if images.check_out(args.out) != "png" and args.progressive:
        raise InputError(f"--out {args.out}: --progressive makes one picture; want a .png")
    with processes(args.device) as ranks:
        found = _open(args, ranks.device)
        denoiser = found.denoiser
        steps = _levels(args, found)
        sampler = named(args.sampler, args.eta, args.sigma_hat)
        denoiser, labels = _conditioned(args, found)
        mine = [args.seed + i for i in ranks.mine(args.n)]
        y = in_turn(labels, ranks.mine(args.n))
        make = progressive if args.progressive else partial(generate, batch_size=args.batch_size)
        pictures = make(
            denoiser, found.preset.shape, mine, sampler, steps, device=ranks.device,
            progress=ranks.first and not args.json, y=y,
        )  # fmt: skip
        pictures = ranks.interleave(pictures, args.n)
        if args.progressive:
            tiles = pictures.flatten(0, 1).permute(0, 2, 3, 1).numpy()
            if ranks.first:
                images.save(args.out, images.grid(tiles, columns=pictures.shape[1]))
        else:
            if ranks.first:
                names = [f"{args.seed + i:06d}" for i in range(args.n)]
                images.save_many(args.out, pictures.permute(0, 2, 3, 1).numpy(), names, columns_of(len(labels)))
        if ranks.first:
            about = {
                "out": args.out,
                "count": args.n,
                **found.about(),
                **sampled(denoiser, args.sampler, steps, args.spacing),
                **_conditions(args),
                "eta": 1.0 if args.sigma_hat else args.eta,
                "seed": args.seed,
            }
            what = f"{args.n} image{'s' * (args.n != 1)}"
            summary = f"{what} of {found.path} (step {found.step:,}, {found.weights}) in {args.out}"
            print(json.dumps(about) if args.json else summary)
    return 0


def _conditioned(args: argparse.Namespace, found: "Checkpoint") -> tuple["Denoiser", list[int]]:
    """The model as --clip, --guidance and --guidance-interval want it, and the classes of --class."""
    denoiser, names = found.denoiser, found.preset.class_names
    if args.clip is not None:
        denoiser = replace(denoiser, clip=args.clip)
    if not args.classes:
        for name in ("guidance", "guidance_interval"):
            if getattr(args, name) is not None:
                raise InputError(f"--{name.replace('_', '-')}: of nothing without --class NAME")
        return denoiser, []
    if not names:
        raise InputError(f"--class {args.classes[0]}: {found.path} was not trained with --classes; want none")
    wanted = names if args.classes == ["all"] and "all" not in names else args.classes
    for name in wanted:
        if name not in names:
            raise InputError(f"--class {name!r}: want {', '.join(names)}, or all")
    free = found.preset.label_dropout > 0  # whether it knows what to do without a label
    if args.guidance is None:
        args.guidance = GUIDANCE if free else 1.0
    if args.guidance != 1 and not free:
        raise InputError(f"--guidance {args.guidance}: {found.path} never was without a label; want 1, none")
    return denoiser.guided(args.guidance, args.guidance_interval), [names.index(name) for name in wanted]


def _conditions(args: argparse.Namespace) -> dict[str, Any]:
    """Those that were given, as plain JSON values."""
    names = ("classes", "guidance", "guidance_interval", "clip", "sigma_hat")
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


GUIDANCE = 1.5
"""Where a class is asked for and no --guidance is given."""


def _levels(args: argparse.Namespace, found: "Checkpoint") -> list[int]:
    """The levels that --sampler, --steps and --spacing mean."""
    from ddpm.run.sample import visited

    _check_sampler(args, found.denoiser.schedule.T)
    return visited(found, args.sampler, args.steps, args.spacing)


def _check_sampler(args: argparse.Namespace, T: int) -> None:
    from ddpm.run.sample import SPACED
    from ddpm.samplers import SAMPLERS

    check("--sampler", args.sampler, Literal[tuple(SAMPLERS)])
    if args.spacing is not None:
        check("--spacing", args.spacing, Literal[SPACED])
    if args.steps is not None:
        check("--steps", args.steps, int, 1, T)


def _loader(args: argparse.Namespace, preset: Preset, shown: bool) -> "Callable[[str], data.Images]":
    """split -> its images as training took or held them out, each loaded once; the run's where no --data is given."""
    from ddpm.files import data

    if not (args.data or preset.data):
        raise InputError("--data: this model names no data set; want --data SOURCE")

    @functools.cache
    def load(split: str) -> data.Images:
        return data.load(
            args.data or preset.data, preset.size, preset.channels, split=split,
            image_column=preset.image_column or None, label_column=preset.label_column or None,
            skip_bad=preset.skip_bad, progress=shown, as_trained=True,
        )  # fmt: skip

    return load


def _network(args: argparse.Namespace, device: "torch.device") -> "features.Network":
    """The feature network that --features or --inception mean."""
    from ddpm.files import features

    if args.features is None:
        return features.inception(args.inception, any_weights=args.any_weights, device=device)
    return features.custom(args.features)


def _out(args: argparse.Namespace, default: Path) -> Path:
    """The folder of --out, or by default another; InputError now where it cannot be one."""
    from ddpm.files.images import check_folder

    return check_folder(default if args.out is None else args.out)


def _check_measuring(args: argparse.Namespace) -> None:
    check("--seed", args.seed, int, 0)
    check("--batch-size", args.batch_size, int, 1)
    if args.n is not None:
        check("-n", args.n, int, 1)


def _say(args: argparse.Namespace, about: dict[str, Any], written: object) -> None:
    if args.json:
        print(json.dumps(about))
        return
    for name, value in about.items():
        print(f"{name}: {json.dumps(value) if isinstance(value, dict) else value}")
    print(f"written: {written}")


def _evaluate(args: argparse.Namespace) -> int:
    for metric in args.metrics:
        check("--metrics", metric, Literal["nll", "ode", "fid", "is", "kid", "pr"])
    check("--draws", args.draws, int, 1)
    check("--ode-steps", args.ode_steps, int, 2)
    _check_measuring(args)
    quality = [metric for metric in args.metrics if metric not in ("nll", "ode")]
    if args.classes and (args.samples is not None or not quality):
        raise InputError(f"--class {args.classes[0]}: of samples that are made here, for fid, is, kid, pr; want none")
    for name in ("samples", "features", "inception"):
        if not quality and getattr(args, name) is not None:
            raise InputError(f"--{name} {getattr(args, name)}: of nothing without --metrics fid, is, kid or pr")
    of_files = args.features is not None and args.features.endswith(".npz")
    if of_files and quality and args.samples is None:
        raise InputError(
            f"--features {args.features}: features of images; want those of samples too, --samples FILE.npz"
        )

    with _importing():
        from ddpm.files import atomic
        from ddpm.run import evaluate
        from ddpm.run import quality as scoring
        from ddpm.run.processes import processes
        from ddpm.run.sample import sampled

    with processes(args.device) as ranks:
        found = _open(args, ranks.device)
        preset = found.preset
        shown = ranks.first and not args.json
        steps = _levels(args, found)
        denoiser, classes = _conditioned(args, found)
        found = replace(found, denoiser=denoiser)
        load = _loader(args, preset, shown)
        out = _out(args, found.home / "evaluate" / f"{found.step:08d}-{found.weights}")
        cache = _out(args, found.home / "cache")
        done: dict[str, Any] = {}

        def keep(name: str, values: dict[str, Any], of: str | None) -> None:
            """One file a measurement, with what it is of: another one never mixes with it."""
            if of is not None:
                data = load(of)
                values = {"data": data.name, "split": data.split, "fingerprint": data.fingerprint, **values}
            if ranks.first:
                atomic.write_json(out / f"{name}.json", {**about, **values})
            done[name] = values

        clipped = {} if args.clip is None else {"clip": args.clip}
        about = {**found.about(), **clipped, "seed": args.seed}
        if "nll" in args.metrics and args.levels_per_image is None:
            values = evaluate.nll(
                found, load(args.split), out, cache, ranks, args.n, args.draws, args.seed, args.batch_size, shown
            )
            keep("nll", values, args.split)
        elif "nll" in args.metrics:
            values = evaluate.nll_sampled(
                found, load(args.split), args.levels_per_image, ranks, args.n, args.seed, args.batch_size, shown
            )
            keep("nll_sampled", values, args.split)
        if "ode" in args.metrics:
            values = evaluate.ode(
                found, load(args.split), ranks, args.n, args.ode_steps, args.seed, args.batch_size, shown
            )
            keep("ode", values, args.split)
        if of_files and quality:
            values = scoring.scores_of_files(quality, Path(args.samples), Path(args.features), args.seed, ranks.device)
            keep("quality", {"samples_from": args.samples, **values}, None)
        elif quality:
            network, real = _network(args, ranks.device), load("train")  # a mistake shows before hours of sampling
            if "is" in quality:
                scoring.probe(network, real)
            if args.samples is not None:
                made, source = scoring.read_samples(Path(args.samples), preset.shape), {"samples_from": args.samples}
            else:
                made = scoring.samples(
                    found, cache, ranks, args.n or 50_000, args.seed, args.sampler, steps, args.batch_size, shown,
                    classes,
                )  # fmt: skip
                source = {**sampled(denoiser, args.sampler, steps, args.spacing), **_conditions(args)}
            if ranks.first:
                values = scoring.quality(quality, made, real, network, cache, args.seed, ranks.device, shown)
                keep("quality", {**source, **values}, "train")
        if ranks.first:
            bound = done.get("nll") or done.get("nll_sampled")
            bits = {"bits_per_dim": bound["bits_per_dim"]} if bound else {}
            scores = done.pop("quality", {})
            _say(args, {**about, **bits, **done, **scores}, out)
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    check("-n", args.n, int, 1)
    check("--batch-size", args.batch_size, int, 1)
    check("--codec", args.codec, int, 0)

    with _importing():
        from ddpm.files.models import calibration_file
        from ddpm.run import calibrate
        from ddpm.run.compress import kept
        from ddpm.run.processes import processes

    with processes(args.device) as ranks:
        found = _open(args, ranks.device)
        if found.packaged or found.name:
            copy = f"ddpm {'import' if found.foreign else 'export'} {args.run} --out FILE.safetensors"
            raise InputError(f"{args.run}: stays as it came; calibrate a copy: `{copy}`")
        if args.codec and kept(found) and not args.replace:
            file = calibration_file(found.path)
            raise InputError(f"{file}: has tables of the codec, which files need; want --codec 0 or --replace")
        shown = ranks.first and not args.json
        images = _loader(args, found.preset, shown)("train")
        cache = found.home / "cache"
        mse = calibrate.calibrate(found, images, cache, ranks, args.n, args.batch_size, shown, args.codec)
        if ranks.first:
            about = {"run": str(found.path), "data": images.name, "count": min(args.n, len(images)), "levels": len(mse)}
            _say(args, about, f"{calibration_file(found.path)}; --variance calibrated takes it")
    return 0


def _export(args: argparse.Namespace) -> int:
    check("--precision", args.stored or "bf16", Literal["bf16", "float32"])
    if (args.out is None) == (args.to is None):
        raise InputError("--out, --to: want one of --out FILE.safetensors, --to diffusers DIR, --to hub OWNER/NAME")
    kind, place = args.to or ("file", args.out)
    if args.to:
        check("--to", kind, Literal["diffusers", "hub"])
    for name in ("precision", "data", "license"):
        if kind == "diffusers" and (value := getattr(args, "stored" if name == "precision" else name)) is not None:
            raise InputError(f"--{name} {value}: not for --to diffusers, whose folders hold float32 and no card")
    args.stored = args.stored or "bf16"

    with _importing():
        from ddpm.files import hub, interop
        from ddpm.run import export
        from ddpm.run.processes import pick_device

    device = pick_device(args.device)
    if kind == "file":
        export.check_out(place)
    elif kind == "diffusers":
        interop.check_out(Path(place))
    found = _open(args, device)
    if kind == "hub":
        hub.create(place)
    with tempfile.TemporaryDirectory() as folder:
        if kind == "diffusers":
            interop.to_diffusers(found, Path(place))
        else:
            out = Path(folder) / f"{place.rpartition('/')[2]}.safetensors" if kind == "hub" else Path(place)
            exported = export.export(found, out, args.stored, args.data)
            export.illustrate(found, exported, device, args.license, not args.json)
            if kind == "hub":
                out.with_suffix(".md").rename(out.with_name("README.md"))
                place = hub.push(out.parent, place, f"ddpm {__version__}, step {found.step:,}")
    about = {"out": str(place), "kind": kind, **found.about()}
    card = f", its card {Path(place).with_suffix('.md')} and grid" if kind == "file" else ""
    print(json.dumps(about) if args.json else f"written: {place}{card}")
    return 0


def _import(args: argparse.Namespace) -> int:
    with _importing():
        from ddpm.files import hub, interop
        from ddpm.run.export import check_out

    out, source = check_out(args.out), hub.fetch(args.path) if hub.is_name(args.path) else Path(args.path)
    preset, state = interop.read(source, _preset(args.preset) if args.preset else None)
    preset = replace(preset, data=args.data or preset.data)
    interop.save(out, preset, state, source.name)
    parameters = sum(value.numel() for value in state.values())
    about = {"out": str(out), "parameters": parameters, "preset": to_json(preset)}
    words = f"{preset.predict}, {preset.schedule} schedule, {preset.variance}"
    size = "x".join(map(str, preset.size))
    print(json.dumps(about) if args.json else f"written: {out}, {parameters:,} parameters, {size}, {words}")
    return 0


def _paper(args: argparse.Namespace) -> int:
    names = ("table1", "table2", "table3", "table4", "fig5", "fig6", "fig7", "fig8", "fig9", "fig10", "neighbours")
    for name in args.names:
        check("NAME", name, Literal[names])
    is_preset = args.names == ["table2"] and args.run in PRESETS and not Path(args.run).exists()
    _check_measuring(args)
    if "table2" in args.names:
        for name in ("samples", "steps", "variance", "checkpoint"):
            if getattr(args, name) not in (None, "last"):
                raise InputError(f"--{name} {getattr(args, name)}: not for table2, whose six runs differ")
        if args.spacing == "bound":
            raise InputError("--spacing bound: not for table2, whose six runs are not calibrated")

    with _importing():
        from ddpm.run import paper
        from ddpm.run import quality as scoring
        from ddpm.run.processes import processes

    with processes(args.device) as ranks:
        if is_preset:
            check("--weights", args.weights or "ema", Literal["ema", "raw"])
            check("--precision", args.precision, Precision)
            preset, out = PRESETS[args.run], Path(f"runs/{args.run}-paper")
        else:
            found = _open(args, ranks.device)
            preset, out = found.preset, found.home / "paper"
        out = _out(args, out)
        shown = ranks.first and not args.json
        load, network = _loader(args, preset, shown), functools.cache(partial(_network, args, ranks.device))
        named = args.features is not None or args.inception is not None

        def setup(found: "Checkpoint", out: Path, cache: Path) -> paper.Setup:
            return paper.Setup(
                found, load, out, cache, ranks, network, named, split=args.split, n=args.n,
                samples=None if args.samples is None else Path(args.samples), sampler=args.sampler,
                steps=_levels(args, found), spacing=args.spacing, seed=args.seed, batch_size=args.batch_size,
                progress=shown,
            )  # fmt: skip

        for name in args.names:
            if name == "table2":
                base = replace(preset, data=args.data or preset.data, device=args.device)
                _check_sampler(args, base.num_timesteps)  # a mistake shows before six trainings, not after
                scoring.probe(network(), load("train"))
                load(args.split)
                stopped = paper.table2(
                    base, out, ranks, lambda run: setup(_open(args, ranks.device, run), run / "paper", run / "cache")
                )
                if stopped:
                    return 128 + stopped
            else:
                paper.EXPERIMENTS[name](setup(found, out, _out(args, found.home / "cache")))
            if shown:
                files = [p for p in sorted(out.glob(f"{name}*.*")) if p.suffix in (".csv", ".png")]
                print(f"{name}: {', '.join(map(str, files))}")
        if ranks.first and args.json:
            print(json.dumps({"out": str(out), "experiments": args.names}))
    return 0


def _edit(args: argparse.Namespace, edit: "Callable[[Checkpoint, Way], torch.Tensor]") -> int:
    """Open the model, edit, save: what edit, interpolate and inpaint share."""
    from ddpm.files import images
    from ddpm.run.edit import Way
    from ddpm.run.processes import pick_device

    check("--batch-size", args.batch_size, int, 1)
    images.check_out(args.out)
    found = _open(args, pick_device(args.device))
    _check_sampler(args, found.denoiser.schedule.T)
    denoiser, labels = _conditioned(args, found)
    way = Way(args.sampler, args.steps, args.spacing, tuple(labels), args.batch_size)
    made = edit(replace(found, denoiser=denoiser), way).permute(0, 2, 3, 1).numpy()
    images.save_many(args.out, made, [f"{i:03d}" for i in range(len(made))], columns=min(len(made), 16))
    names = ("sampler", "steps", "spacing", "t", "invert", "jump", "resample")
    how = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    about = {"out": args.out, "count": len(made), **found.about(), **how, **_conditions(args), "seed": args.seed}
    print(json.dumps(about) if args.json else f"{len(made)} image{'s' * (len(made) != 1)} in {args.out}")
    return 0


def _redraw(args: argparse.Namespace) -> int:
    check("-n", args.n, int, 1, 10_000)
    check("--seed", args.seed, int, 0)
    check("--invert", args.invert, int, 0)
    if args.invert and args.clip is not None:
        raise InputError("--clip: not with --invert, which comes back without clipping")

    with _importing():
        from ddpm.run.edit import redraw

    given = args.image, args.n, args.t
    shown = not args.json
    return _edit(args, lambda found, way: redraw(found, *given, way, args.seed, args.invert, shown))


def _interpolate(args: argparse.Namespace) -> int:
    check("-n", args.n, int, 2, 10_000)
    check("--seed", args.seed, int, 0)

    with _importing():
        from ddpm.run.edit import interpolate

    given = args.a, args.b, args.n, args.t
    return _edit(args, lambda found, way: interpolate(found, *given, way, args.seed, not args.json))


def _inpaint(args: argparse.Namespace) -> int:
    check("-n", args.n, int, 1, 10_000)
    check("--seed", args.seed, int, 0)
    check("--resample", args.resample, int, 1)
    if args.jump is not None:
        check("--jump", args.jump, int, 1)

    with _importing():
        from ddpm.run.edit import inpaint

    given, how = (args.image, args.mask, args.n), (args.jump, args.resample, args.seed, not args.json)
    return _edit(args, lambda found, way: inpaint(found, *given, way, *how))


def _codec(args: argparse.Namespace) -> "Model":
    """The codec of the command's model; --precision is of the local profile."""
    from ddpm.run.compress import load_codec
    from ddpm.run.processes import pick_device

    check("--precision", args.precision, Precision)
    precision = None if args.precision == "auto" else args.precision
    check("--weights", args.weights or "ema", Literal["ema", "raw"])
    return load_codec(args.run, pick_device(args.device), precision, args.checkpoint, args.weights)


def _compress(args: argparse.Namespace) -> int:
    check("--profile", args.profile, Literal["portable", "local"])
    check("--seed", args.seed, int, 0)
    given = [
        name for name, value in (("--bits-per-dim", args.bits_per_dim), ("--psnr", args.psnr)) if value is not None
    ]
    if args.lossless and given:
        raise InputError(f"--lossless, {given[0]}: want one of the two")
    if args.archive and (given or args.whole):
        raise InputError(f"--archive: not with {given[0] if given else '--whole'}; an archive is lossless, in tiles")
    out = Path(args.out)
    if out.is_dir() and args.archive:
        raise InputError(f"--out {out}: a folder; want the name of a file")
    if len(args.images) > 1 and not args.archive and out.suffix and not out.is_dir():
        raise InputError(f"--out {out}: {len(args.images)} images; want a folder, or --archive for one file")

    with _importing():
        from ddpm.files import images
        from ddpm.run.compress import compress

    images.check_folder(out if len(args.images) > 1 and not args.archive else out.absolute().parent)
    settings = {"bits": args.chunk_bits, "local": args.profile == "local", "seed": args.seed}
    if not args.archive:
        settings |= {"bits_per_dim": args.bits_per_dim, "psnr": args.psnr, "whole": args.whole}
    paths = [Path(path) for path in args.images]
    made = compress(_codec(args), paths, out, args.archive, not args.json, **settings)
    if args.json:
        print(json.dumps(made))
    for about in [] if args.json else made:
        print(f"{about['file']}: {about['bytes']:,} bytes, {about['bits_per_dim']:.3f} bits/dim")
    return 0


def _decompress(args: argparse.Namespace) -> int:
    if args.at is not None:
        check("--at", args.at, int, 1)

    with _importing():
        from ddpm.codec import archive
        from ddpm.files import images
        from ddpm.run.compress import decompress, read

    path, out = Path(args.file), Path(args.out)
    if read(path)[:3] == archive.MAGIC:
        if images.check_out(out) != "folder":
            raise InputError(f"--out {out}: {path} is an archive; want a folder")
    elif out.suffix.lower() != ".png" or images.check_out(out) != "png":
        raise InputError(f"--out {out}: want the name of a PNG")
    about = decompress(_codec(args), path, out, args.at)
    if args.json:
        print(json.dumps(about))
    elif about["exact"]:
        count = "the picture" if about["images"] == 1 else f"{about['images']} pictures"
        print(f"{out}: {count}, exactly as before")
    else:
        early = "" if about["whole"] else "; the file goes on, or ended early"
        some = f" and {about['pixels']:,} of the pixels' numbers" if about["pixels"] else ""
        print(f"{out}: what {about['groups']} groups{some} show{early}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    with _importing():
        from ddpm.run.compress import inspect

    about = inspect(Path(args.file), None if args.run is None else _codec(args))
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


def _report(args: argparse.Namespace) -> int:
    with _importing():
        from ddpm.run.report import report

    written = report(Path(args.run))
    print(json.dumps({"out": str(written)}) if args.json else f"written: {written}")
    return 0


def _parser() -> _Parser:
    top = _Parser(
        prog="ddpm",
        description="Denoising Diffusion Probabilistic Models: train on your images, sample, evaluate.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"ddpm {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")

    p = commands.add_parser("train", help="train a model, or go on with a run", allow_abbrev=False)
    p.description = (
        "Train PRESET into the run folder --out; the same command goes on with a run that was stopped. "
        "Each option below replaces one setting of the preset."
    )
    p.add_argument("preset", metavar="PRESET", help=", ".join(PRESETS))
    data = "digits; a folder, zip or parquet file of images; a local or hub data set"
    p.add_argument("--data", metavar="SOURCE", default=argparse.SUPPRESS, help=data)
    p.add_argument("--out", metavar="RUN", help="the run's folder (runs/PRESET)")
    p.add_argument("--json", action="store_true", help="print one JSON object at the end")
    _add_fields(p)
    p.set_defaults(run_command=_train)

    p = commands.add_parser("sample", help="make images from a run or a checkpoint", allow_abbrev=False)
    p.description = "Make images from a run folder, a checkpoint folder or one .safetensors file."
    p.add_argument("run", metavar="RUN", help=_RUN)
    p.add_argument("-n", **_number(int, 64), help="how many images (%(default)s)")
    p.add_argument("--out", default="samples.png", help=f"{_OUT} (%(default)s)")
    p.add_argument("--seed", **_number(int, 0), help="of the first image; each next one has one more (%(default)s)")
    _add_sampler(p)
    _add_conditions(p)
    p.add_argument("--eta", **_number(float, 0.0), help="ddim's noise, 0 to 1 (%(default)s)")
    p.add_argument(
        "--sigma-hat", action="store_true", help="ddim with eta 1 and the noise of the last rows of its Table 1"
    )
    p.add_argument("--batch-size", **_number(int, 64), help=_BATCH)
    p.add_argument("--progressive", action="store_true", help="a row an image: x0^ on the way (Figure 6)")
    _add_model(p)
    p.set_defaults(run_command=_sample)

    p = commands.add_parser("evaluate", help="bits per dimension and sample quality", allow_abbrev=False)
    p.description = (
        "Measure a run. nll: the variational bound in bits per dimension, every level, one draw, as in the paper. "
        "ode: by the probability-flow ODE, another model of the same network. "
        "fid, is, kid, pr: of samples as they are saved, uint8, against the training images."
    )
    p.add_argument("run", metavar="RUN", help=_RUN)
    p.add_argument(
        "--metrics", nargs="+", default=["nll"], metavar="X", help="some of nll, ode, fid, is, kid, pr (nll)"
    )
    p.add_argument("-n", **_number(int, None), help="images for nll and ode (all); samples for the others (50000)")
    p.add_argument("--draws", **_number(int, 1), help="noise draws a level (1)")
    levels = "estimate nll from so many levels an image, after all levels of four (all)"
    p.add_argument("--levels-per-image", **_number(int, None), help=levels)
    p.add_argument("--ode-steps", **_number(int, 100), help="levels that the ODE's solver visits (%(default)s)")
    _add_measuring(p)
    _add_conditions(p)
    tables = "folder for tables, and what a stopped measurement goes on from (RUN/evaluate/STEP-WEIGHTS, RUN/cache)"
    p.add_argument("--out", metavar="DIR", help=tables)
    _add_model(p)
    p.set_defaults(run_command=_evaluate)

    p = commands.add_parser(
        "calibrate", help="measure the best variances, and the codec's tables, on training images", allow_abbrev=False
    )
    p.description = (
        "Measure the error of x0^ at every level on training images, and keep it beside the weights: evaluate then "
        "also reports the bound with the variance that follows, --variance calibrated takes it, and `ddpm compress` "
        "has the tables that it needs."
    )
    p.add_argument("run", metavar="RUN", help="a run folder, a checkpoint folder or a .safetensors file")
    p.add_argument("--data", metavar="SOURCE", help="images (those of the run)")
    p.add_argument("-n", **_number(int, 500), help="training images, every level of each (%(default)s)")
    coded = "of them the codec's tables are counted on, 0 for no new ones (%(default)s)"
    p.add_argument("--codec", **_number(int, 32), help=coded)
    lost = "make the codec's tables anew: files compressed by those that are there cannot be read any more"
    p.add_argument("--replace", action="store_true", help=lost)
    p.add_argument("--batch-size", **_number(int, 64), help="images at a time (%(default)s)")
    _add_model(p, variance=False)
    p.set_defaults(run_command=_calibrate, variance=None)

    p = commands.add_parser(
        "compress", help="pictures to files by the model: lossless, progressive", allow_abbrev=False
    )
    p.description = (
        "Write pictures as files that `ddpm decompress` reads with the same model: exact ones, and of any first bytes "
        "of them the best picture these give (Algorithms 3 and 4). The model has to be calibrated."
    )
    p.add_argument("run", metavar="RUN", help=_RUN)
    p.add_argument("images", metavar="IMAGE", nargs="+", help="an image file, 8-bit grey or RGB, of any size")
    p.add_argument("--out", required=True, metavar="FILE", help="a file; a folder for several without --archive")
    p.add_argument("--lossless", action="store_true", help="every pixel exactly (that is so without the next two)")
    p.add_argument("--bits-per-dim", **_number(float, None), help="stop before a file takes more of each H W C numbers")
    p.add_argument("--psnr", **_number(float, None), help="stop at so many decibels")
    p.add_argument("--archive", action="store_true", help="all in one file, at about the model's bound")
    profiles = "portable, decodes everywhere, or local, faster, decodes on this kind of machine only (%(default)s)"
    p.add_argument("--profile", default="portable", metavar="X", help=profiles)
    p.add_argument("--chunk-bits", **_number(int, None), help="K: more is smaller and slower, as calibrated (the most)")
    p.add_argument("--whole", action="store_true", help="a picture as one tile of its own size, not of the model's")
    p.add_argument("--seed", **_number(int, 0), help="of the shared noise (%(default)s)")
    _add_codec(p)
    p.set_defaults(run_command=_compress)

    p = commands.add_parser("decompress", help="a file of `ddpm compress` to a PNG", allow_abbrev=False)
    p.description = "Read a file of `ddpm compress` with the same model; a file cut short gives what its bytes show."
    p.add_argument("run", metavar="RUN", help=_RUN)
    p.add_argument("file", metavar="FILE", help="of `ddpm compress`")
    p.add_argument("--out", required=True, metavar="PNG", help="NAME.png, for an archive a folder")
    p.add_argument("--at", **_number(int, None), help="read only the first N bytes")
    _add_codec(p)
    p.set_defaults(run_command=_decompress)

    p = commands.add_parser("inspect", help="what a file of `ddpm compress` holds", allow_abbrev=False)
    p.description = "Print a file's header; with --run also what each group takes, and the error that it takes away."
    p.add_argument("file", metavar="FILE", help="of `ddpm compress`")
    p.add_argument("--run", metavar="RUN", help="its model")
    _add_codec(p)
    p.set_defaults(run_command=_inspect)

    p = commands.add_parser("export", help="one file of weights for others, with a card", allow_abbrev=False)
    p.description = (
        "Write the weights, rounded to bf16, and what it takes to load them to FILE.safetensors, their calibration "
        "beside it, FILE.md, a card of what is known and was measured, and FILE.png, 64 samples. Or write a folder "
        "that the pipelines of diffusers load, or put the model on the Hugging Face hub."
    )
    p.add_argument("run", metavar="RUN", help=_RUN)
    p.add_argument("--out", metavar="FILE", help="NAME.safetensors")
    p.add_argument("--to", nargs=2, metavar=("KIND", "PLACE"), help="diffusers DIR, or hub OWNER/NAME, instead")
    stored = "of the weights in the file: bf16, half the size, or float32 (bf16)"
    p.add_argument("--precision", dest="stored", metavar="X", help=stored)
    p.add_argument("--data", metavar="NAME", help="what others know the data set as (the run's, where a preset has it)")
    p.add_argument("--license", metavar="ID", help="for the card, as apache-2.0 (none)")
    _add_model(p, variance=False, precision=False)
    p.set_defaults(run_command=_export, variance=None, precision="auto")

    p = commands.add_parser("import", help="a model of another package as one of ours", allow_abbrev=False)
    p.description = (
        "Write FILE.safetensors, which every command takes for a run, from a folder of diffusers (UNet2DModel and its "
        "DDPM or DDIM scheduler) or a file of ermongroup/ddim's or pesser/pytorch_diffusion's weights. Every key, "
        "shape and setting is accounted for; one that our network has not is refused by its name."
    )
    path = "a folder of diffusers, or hf:OWNER/NAME; a .ckpt, .pt or .safetensors file of ddim"
    p.add_argument("path", metavar="PATH", help=path)
    p.add_argument("--out", required=True, metavar="FILE", help="NAME.safetensors")
    p.add_argument("--preset", metavar="X", help="whose settings a file of ddim has (those that its shapes tell)")
    p.add_argument("--data", metavar="SOURCE", help="the images that it was trained on, for evaluate")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.set_defaults(run_command=_import)

    p = commands.add_parser("paper", help="the paper's tables and figures for a run", allow_abbrev=False)
    p.description = (
        "Each NAME leaves NAME.csv or NAME.png, beside the paper's own numbers, and NAME.json, what they are of. "
        "table1: IS, FID, bits/dim. table2: the ablation, six runs that it trains, or goes on with, from the settings "
        "of --run, which may be a preset here. table3: FID. table4, fig5: rate and distortion. fig6: x0^ on the way. "
        "fig7: samples that share x_t. fig8, fig9: interpolation. fig10: progressive lossy decompression. neighbours: "
        "the nearest training images of samples, and duplicates."
    )
    p.add_argument("names", nargs="+", metavar="NAME", help="table1 .. table4, fig5 .. fig10, neighbours")
    p.add_argument("--run", "--model", required=True, metavar="RUN", help=f"{_RUN}; torchrun wants --model here")
    p.add_argument("-n", **_number(int, None), help="images or samples (as many as the paper, or as fit on a picture)")
    _add_measuring(p)
    p.add_argument("--out", metavar="DIR", help="folder for what is made (RUN/paper)")
    _add_model(p)
    p.set_defaults(run_command=_paper)

    p = commands.add_parser("edit", help="versions of an image, drawn anew from a level on", allow_abbrev=False)
    p.description = (
        "Noise the image to level t and let the reverse process make an image of it (SDEdit): the higher t is, the "
        "freer. With --invert it is not noised but taken to the x_t that DDIM comes back from: without --class it "
        "stays as it is, with one it becomes that class's."
    )
    p.add_argument("run", metavar="RUN", help=_RUN)
    p.add_argument("image", metavar="IMAGE", help="an image file")
    p.add_argument("-n", **_number(int, 1), help="how many versions (%(default)s)")
    p.add_argument("--t", **_number(int, None), help="the level, 0 to T (half of T)")
    inversions = "iterations of DDIM's inversion a level, 1 or more; 0: noise instead (%(default)s)"
    p.add_argument("--invert", **_number(int, 0), help=inversions)
    p.add_argument("--seed", **_number(int, 0), help="of the first version; each next one has one more (%(default)s)")
    p.add_argument("--out", default="edited.png", help=f"{_OUT} (%(default)s)")
    _add_sampler(p, "ddim")
    _add_conditions(p)
    p.add_argument("--batch-size", **_number(int, 64), help=_BATCH)
    _add_model(p)
    p.set_defaults(run_command=_redraw)

    p = commands.add_parser("interpolate", help="images between two images (Figure 8)", allow_abbrev=False)
    p.description = "Noise both images to level t, mix them there, and let the reverse process make images of it."
    p.add_argument("run", metavar="RUN", help=_RUN)
    p.add_argument("a", metavar="A", help="an image file")
    p.add_argument("b", metavar="B", help="another image file")
    p.add_argument("-n", **_number(int, 11), help="images, from what is made of A to what is made of B (%(default)s)")
    p.add_argument("--t", **_number(int, None), help="the level, 0 to T: the higher, the freer (half of T)")
    p.add_argument("--seed", **_number(int, 0), help="of the noise (%(default)s)")
    p.add_argument("--out", default="interpolation.png", help=f"{_OUT} (%(default)s)")
    _add_sampler(p)
    _add_conditions(p)
    p.add_argument("--batch-size", **_number(int, 64), help=_BATCH)
    _add_model(p)
    p.set_defaults(run_command=_interpolate)

    p = commands.add_parser("inpaint", help="make the masked part of an image anew", allow_abbrev=False)
    p.description = "Make what is white in MASK and keep what is black, by RePaint (Lugmayr et al. 2022)."
    p.add_argument("run", metavar="RUN", help=_RUN)
    p.add_argument("image", metavar="IMAGE", help="an image file")
    p.add_argument("mask", metavar="MASK", help="an image file of the same shape: white is made, black is kept")
    p.add_argument("-n", **_number(int, 1), help="how many answers (%(default)s)")
    p.add_argument("--jump", **_number(int, None), help="levels to go up at a time when resampling (1/25 of --steps)")
    p.add_argument("--resample", **_number(int, 10), help="times each level is passed (%(default)s)")
    p.add_argument("--seed", **_number(int, 0), help="of the first answer; each next one has one more (%(default)s)")
    p.add_argument("--out", default="inpainted.png", help=f"{_OUT} (%(default)s)")
    _add_sampler(p)
    _add_conditions(p)
    p.add_argument("--batch-size", **_number(int, 64), help=_BATCH)
    _add_model(p)
    p.set_defaults(run_command=_inpaint)

    p = commands.add_parser("report", help="one HTML file of what a run has left", allow_abbrev=False)
    p.description = "Write RUN/report.html: curves, grids of samples, and what evaluate and paper left there."
    p.add_argument("run", metavar="RUN", help="a run folder")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.set_defaults(run_command=_report)
    return top


_RUN = (
    "a run folder, a checkpoint folder, a .safetensors file, digits, the package's model, a folder of diffusers, or "
    "hf:OWNER/NAME on the hub"
)
_OUT = "FILE.png, a grid; FILE.npz; or a folder"
_BATCH = "images at a time; changes no picture (%(default)s)"


def _add_conditions(p: argparse.ArgumentParser) -> None:
    one = "of a model trained with --classes: images of these in turn, or of all"
    p.add_argument("--class", dest="classes", nargs="+", metavar="NAME", help=one)
    p.add_argument("--guidance", **_number(float, None), help=f"towards the class; 1 for none ({GUIDANCE})")
    within = _as(_interval, "two levels as 100,900")
    p.add_argument("--guidance-interval", type=within, metavar="N,N", help="first and last level of it (all)")
    clip = "of x0^: static, to [-1, 1]; none; or the quantile of dynamic thresholding, as 0.995 (the run's)"
    p.add_argument("--clip", type=_as(_clip, "static, none or a number between 0 and 1"), metavar="X", help=clip)


def _add_sampler(p: argparse.ArgumentParser, default: str = "ancestral") -> None:
    names = "ancestral (Algorithm 2), ddim, dpmpp_2m, dpmpp_3m, dpmpp_2m_sde, unipc, unipc_3, heun, flow (%(default)s)"
    p.add_argument("--sampler", default=default, metavar="X", help=names)
    steps = "levels visited (ancestral: all; ddim: 50; heun, flow: 10, with two network calls each; others: 20)"
    p.add_argument("--steps", **_number(int, None), help=steps)
    spacing = (
        "which levels: uniform, quadratic, log_snr, karras, or bound, those of the least bits for this model, once "
        "calibrated (ancestral, ddim: uniform; heun: karras; others: log_snr)"
    )
    p.add_argument("--spacing", metavar="X", help=spacing)


def _add_model(p: argparse.ArgumentParser, variance: bool = True, precision: bool = True) -> None:
    """Which weights of a run, how they are read and where they run."""
    p.add_argument("--weights", metavar="X", help="ema, the averaged weights, or raw (ema)")
    p.add_argument("--checkpoint", default="last", metavar="X", help="of a run: last, best or a step (last)")
    if variance:
        p.add_argument("--variance", metavar="X", help="fixed_large, fixed_small or calibrated (the run's)")
    if precision:
        p.add_argument("--precision", default="auto", metavar="X", help="auto, float32 or bf16 (auto: the run's)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (auto)")
    p.add_argument("--json", action="store_true", help="print one JSON object")


def _add_codec(p: argparse.ArgumentParser) -> None:
    """Which weights the codec takes, and where they run."""
    p.add_argument("--weights", metavar="X", help="ema, the averaged weights, or raw, as calibrated (ema)")
    p.add_argument("--checkpoint", default="last", metavar="X", help="of a run: last, best or a step (last)")
    p.add_argument("--precision", default="auto", metavar="X", help="in the local profile: auto, float32, bf16 (auto)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (auto)")
    p.add_argument("--json", action="store_true", help="print one JSON object")


def _add_measuring(p: argparse.ArgumentParser) -> None:
    """Of what and by what evaluate and paper measure."""
    p.add_argument("--data", metavar="SOURCE", help="images (those of the run)")
    p.add_argument("--split", default="test", help="of the data, held out (test)")
    p.add_argument("--samples", metavar="PATH", help="score these, an .npz or a folder, instead of making some")
    _add_sampler(p)
    features = (
        "FILE.py:NAME, a function of yours of uint8 NumPy [N, H, W, C] to features [N, D], or to these and class "
        "probabilities [N, K]; or an .npz of features"
    )
    p.add_argument("--features", metavar="X", help=features)
    p.add_argument("--inception", metavar="FILE", help="Inception's weights of 2015 (fetched to a cache)")
    p.add_argument("--any-weights", action="store_true", help="take Inception weights of another hash; no FID then")
    p.add_argument("--seed", **_number(int, 0), help="of noise and samples (0)")
    p.add_argument("--batch-size", **_number(int, 64), help="images at a time (64)")


_ENVIRONMENT = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENAMETOOLONG,
    errno.EISDIR,
)
"""What the system refuses, though our code is right; a file that is missing may be our own fault."""


@contextmanager
def _importing() -> Iterator[None]:
    """While torch loads, Ctrl-C ends the program at once: an exception there is lost in half-made modules."""

    def quit(*_: object) -> None:
        os.write(2, b"ddpm: interrupted\n")
        os._exit(130)

    ours = threading.current_thread() is threading.main_thread()
    old = signal.getsignal(signal.SIGINT)
    if not ours or old is not signal.default_int_handler:  # another program's, or ignored
        yield
        return
    signal.signal(signal.SIGINT, quit)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 a run that cannot go on, 2 a user's mistake, 130 Ctrl-C.

    >>> main(["train", "cifra10"])
    2
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():  # read when torch loads, which is later
        # A thread spins but briefly for the others, then sleeps: beside other work on the cores it would spin for one
        # that is not running, at every layer, and small networks train 5 times slower.
        os.environ["GOMP_SPINCOUNT"] = "1000"
    parser = _parser()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    warnings.showwarning = _warn
    try:
        args, unknown = parser.parse_known_args(arguments)
        commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        if unknown:
            raise commands.choices.get(args.command, parser).unknown(unknown)
        if args.command is None:
            raise InputError(f"no command; want {' or '.join(commands.choices)}, see `ddpm --help`")
        code: int = args.run_command(args)
        return code
    except InputError as error:
        print(f"ddpm: {error}", file=sys.stderr)
        return 2
    except Stopped as error:
        print(f"ddpm: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        half_made = str(error.filename).endswith(".part")  # of `atomic`: nothing can be made in its folder
        if error.errno is None or (error.errno not in _ENVIRONMENT and not half_made):
            raise
        reason = "the disk is full" if error.errno == errno.ENOSPC else os.strerror(error.errno).lower()
        print(f"ddpm: {reason} ({error.filename or arguments[0]})", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        full = ("out of memory", "can't allocate memory", "not enough memory")
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in full):
            raise
        less = (
            "fewer images at once (--batch-size) take less, in training also --accumulate and --gradient-checkpointing"
        )
        print(f"ddpm: the memory is full; {less}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print("; ".join(["ddpm: interrupted", *map(str, error.args)]), file=sys.stderr)
        return 130


def _warn(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    from tqdm import tqdm  # writes above a bar, not into it

    if issubclass(category, UserWarning):
        tqdm.write(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `ddpm COMMAND --help`. Nothing here imports torch until a command runs."""

import argparse
import difflib
import errno
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import ddpm
from ddpm.errors import InputError, Stopped
from ddpm.presets import PRESETS, Precision, Preset, check

if TYPE_CHECKING:
    import torch

    from ddpm.files.checkpoints import Checkpoint


class _Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line and exit code 2, and an unknown option suggests the nearest."""

    def error(self, message: str) -> NoReturn:
        name = message.removeprefix("the following arguments are required: ")
        if name != message:
            wanted = next(action.help for action in self._actions if action.metavar == name)
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
        if f.name == "data":
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


def _open(args: argparse.Namespace, device: "torch.device") -> "Checkpoint":
    """The model that --checkpoint, --weights and --precision of a command mean, on its device."""
    from ddpm.files.checkpoints import open_checkpoint
    from ddpm.run.distributed import pick_precision

    check("--weights", args.weights or "ema", Literal["ema", "raw"])
    check("--precision", args.precision, Precision)
    precision = None if args.precision == "auto" else args.precision
    found = open_checkpoint(args.run, args.weights or "ema", args.checkpoint, precision)
    if args.weights and found.weights != args.weights:
        raise InputError(f"--weights {args.weights}: {found.path} holds the {found.weights} weights; want the run")
    if precision is None and found.preset.precision != pick_precision("auto", device):
        found = open_checkpoint(found.path, precision="float32")  # where bf16 would only be slow
    return replace(found, denoiser=found.denoiser.to(device))


def _sample(args: argparse.Namespace) -> int:
    check("-n", args.n, int, 1)
    check("--seed", args.seed, int, 0)
    check("--batch-size", args.batch_size, int, 1)
    check("--eta", args.eta, float, 0, 1)
    if args.eta and args.sampler != "ddim":
        raise InputError(f"--eta {args.eta}: only --sampler ddim has it")

    with _importing():
        from ddpm.files import images
        from ddpm.run.distributed import processes
        from ddpm.run.generate import SAMPLERS, calls, generate, progressive

    check("--sampler", args.sampler, Literal[SAMPLERS])
    if images.check_out(args.out) != "png" and args.progressive:
        raise InputError(f"--out {args.out}: --progressive makes one picture; want a .png")
    with processes(args.device) as ranks:
        found = _open(args, ranks.device)
        denoiser = found.denoiser
        check("--steps", denoiser.schedule.T if args.steps is None else args.steps, int, 1, denoiser.schedule.T)
        mine = [args.seed + i for i in ranks.mine(args.n)]
        make = progressive if args.progressive else partial(generate, batch_size=args.batch_size)
        pictures = make(
            denoiser, found.preset.shape, mine, args.sampler, args.steps, args.eta,
            device=ranks.device, progress=ranks.first and not args.json,
        )  # fmt: skip
        pictures = ranks.interleave(pictures, args.n)
        if args.progressive:
            tiles = pictures.flatten(0, 1).permute(0, 2, 3, 1).numpy()
            if ranks.first:
                images.save(args.out, images.grid(tiles, columns=pictures.shape[1]))
        else:
            if ranks.first:
                names = [f"{args.seed + i:06d}" for i in range(args.n)]
                images.save_many(args.out, pictures.permute(0, 2, 3, 1).numpy(), names)
        if ranks.first:
            about = {
                "out": args.out,
                "count": args.n,
                "run": str(found.path),
                "step": found.step,
                "weights": found.weights,
                "sampler": args.sampler,
                "steps": calls(denoiser, args.sampler, args.steps),
                "seed": args.seed,
            }
            what = f"{args.n} image{'s' * (args.n != 1)}"
            summary = f"{what} of {found.path} (step {found.step:,}, {found.weights}) in {args.out}"
            print(json.dumps(about) if args.json else summary)
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    accepted = ("nll", "fid", "is", "kid", "pr")
    for metric in args.metrics:
        check("--metrics", metric, Literal[accepted])
    check("--draws", args.draws, int, 1)
    check("--seed", args.seed, int, 0)
    check("--batch-size", args.batch_size, int, 1)
    check("--calibrate", args.calibrate, int, 0)
    if args.n is not None:
        check("-n", args.n, int, 1)
    quality = [metric for metric in args.metrics if metric != "nll"]

    with _importing():
        from ddpm.files import atomic, datasets, features
        from ddpm.run import evaluate
        from ddpm.run.distributed import processes
        from ddpm.run.generate import generate

    with processes(args.device) as ranks:
        found = _open(args, ranks.device)
        preset = found.preset
        source = args.data or preset.data
        shown = ranks.first and not args.json

        def load(split: str) -> datasets.Images:
            return datasets.load(
                source, preset.size, preset.channels, split=split, image_column=preset.image_column or None,
                label_column=preset.label_column or None, skip_bad=preset.skip_bad, progress=shown,
            )  # fmt: skip

        out = Path(args.out) if args.out else found.path.parent / "evaluate"
        about: dict[str, Any] = {
            "run": str(found.path), "step": found.step, "weights": found.weights, "precision": preset.precision,
            "data": source, "split": args.split, "seed": args.seed, "version": ddpm.__version__,
        }  # fmt: skip
        if "nll" in args.metrics:
            images = load(args.split)
            if args.levels is not None:
                values = evaluate.nll_sampled(
                    found, images, args.levels, ranks, args.n, args.seed, args.batch_size, shown
                )
            else:
                mse = None
                if args.calibrate:
                    mse = evaluate.calibrate(
                        found.denoiser, load("train"), args.calibrate, ranks, args.batch_size, shown
                    )
                values = evaluate.nll(
                    found, images, out, ranks, args.n, args.draws, args.seed, args.batch_size, mse, shown
                )
            about["nll"] = values
            about["bits_per_dim"] = values["bits_per_dim"]
        if quality:
            if args.features is None:
                network = features.inception(args.inception, any_weights=args.any_weights, device=ranks.device)
            else:
                network = features.custom(args.features)
            if args.samples is not None:
                samples = evaluate.read_samples(Path(args.samples), preset.shape)
            else:
                n = args.n or 50_000
                mine = [args.seed + i for i in ranks.mine(n)]
                samples = generate(
                    found.denoiser, preset.shape, mine, args.sampler, args.steps,
                    batch_size=args.batch_size, device=ranks.device, progress=shown,
                )  # fmt: skip
                samples = ranks.interleave(samples, n)
                about |= {"sampler": args.sampler, "steps": args.steps}
            if ranks.first:
                about |= evaluate.quality(quality, samples, load("train"), network, out, args.seed, ranks.device, shown)
        if ranks.first:
            out.mkdir(parents=True, exist_ok=True)
            atomic.write(out / "evaluate.json", json.dumps(about, indent=1) + "\n")
            if args.json:
                print(json.dumps(about))
            else:
                for name, value in about.items():
                    print(f"{name}: {json.dumps(value) if isinstance(value, dict) else value}")
                print(f"written: {out}")
    return 0


def _parser() -> _Parser:
    top = _Parser(
        prog="ddpm",
        description="Denoising Diffusion Probabilistic Models: train on your images, sample, evaluate.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"ddpm {ddpm.__version__}")
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
    p.add_argument("run", metavar="RUN", help="a run folder, a checkpoint folder or a .safetensors file")
    p.add_argument("-n", **_number(int, 64), help="how many images (%(default)s)")
    p.add_argument("--out", default="samples.png", help="FILE.png, a grid; FILE.npz; or a folder (samples.png)")
    p.add_argument("--seed", **_number(int, 0), help="of the first image; each next one has one more (%(default)s)")
    p.add_argument("--sampler", default="ancestral", metavar="X", help="ancestral (Algorithm 2) or ddim (ancestral)")
    p.add_argument("--steps", **_number(int, None), help="network calls (ancestral: all levels; ddim: 50)")
    p.add_argument("--eta", **_number(float, 0.0), help="DDIM's noise, 0 to 1 (%(default)s)")
    p.add_argument("--batch-size", **_number(int, 64), help="images at a time; changes no picture (%(default)s)")
    p.add_argument("--weights", metavar="X", help="ema, the averaged weights, or raw (ema)")
    p.add_argument("--checkpoint", default="last", metavar="X", help="of a run: last, best or a step (last)")
    p.add_argument("--progressive", action="store_true", help="a row an image: x0^ on the way (Figure 6)")
    p.add_argument("--precision", default="auto", metavar="X", help="auto, float32 or bf16 (auto: the run's)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (auto)")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.set_defaults(run_command=_sample)

    p = commands.add_parser("evaluate", help="bits per dimension and sample quality", allow_abbrev=False)
    p.description = (
        "Measure a run. nll: the variational bound in bits per dimension, every level, one draw, as in the paper. "
        "fid, is, kid, pr: of samples as they are saved, uint8, against the training images."
    )
    p.add_argument("run", metavar="RUN", help="a run folder, a checkpoint folder or a .safetensors file")
    p.add_argument("--metrics", nargs="+", default=["nll"], metavar="X", help="some of nll, fid, is, kid, pr (nll)")
    p.add_argument("--data", metavar="SOURCE", help="images (those of the run)")
    p.add_argument("--split", default="test", help="of the data, for nll (test)")
    p.add_argument("-n", **_number(int, None), help="images for nll (all); samples for the others (50000)")
    p.add_argument("--draws", **_number(int, 1), help="noise draws a level (1)")
    p.add_argument("--levels", **_number(int, None), help="estimate nll from so many levels an image (all levels)")
    p.add_argument("--calibrate", **_number(int, 0), help="also nll with the variance calibrated on N training images")
    p.add_argument("--samples", metavar="PATH", help="score these, an .npz or a folder, instead of making some")
    p.add_argument("--sampler", default="ancestral", metavar="X", help="of samples: ancestral or ddim (ancestral)")
    p.add_argument("--steps", **_number(int, None), help="of samples: network calls (ancestral: all levels; ddim: 50)")
    p.add_argument("--features", metavar="FILE.py:NAME", help="a feature function of yours instead of Inception")
    p.add_argument("--inception", metavar="FILE", help="Inception's weights of 2015 (fetched to a cache)")
    p.add_argument("--any-weights", action="store_true", help="take Inception weights of another hash; no FID then")
    p.add_argument("--seed", **_number(int, 0), help="of noise and samples (0)")
    p.add_argument("--batch-size", **_number(int, 64), help="images at a time (64)")
    p.add_argument("--weights", metavar="X", help="ema, the averaged weights, or raw (ema)")
    p.add_argument("--precision", default="auto", metavar="X", help="auto, float32 or bf16 (auto: the run's)")
    p.add_argument("--checkpoint", default="last", metavar="X", help="of a run: last, best or a step (last)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (auto)")
    p.add_argument("--out", metavar="DIR", help="folder for tables (evaluate, beside the weights)")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.set_defaults(run_command=_evaluate)
    return top


_ENVIRONMENT = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG)
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
        if error.errno not in _ENVIRONMENT:
            raise
        reason = "the disk is full" if error.errno == errno.ENOSPC else os.strerror(error.errno).lower()
        print(f"ddpm: {reason} ({error.filename or arguments[0]})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ddpm: interrupted", file=sys.stderr)
        return 130


def _warn(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    from tqdm import tqdm  # writes above a bar, not into it

    if issubclass(category, UserWarning):
        tqdm.write(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

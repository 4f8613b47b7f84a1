"""`ddpm export`, `ddpm import` and `ddpm report`."""

import argparse
import json
import shlex
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ddpm.cli.options import MODEL, SOURCE, Commands, add_json, command, importing, open_model
from ddpm.errors import InputError
from ddpm.presets import check, find_preset, to_json
from ddpm.version import __version__

KINDS = {"diffusers": "DIR", "hub": "OWNER/NAME", "onnx": "FILE.onnx", "web": "DIR"}
"""What --to takes: a kind -> its place."""


def add(commands: Commands) -> None:
    parser = command(
        commands, "export", export, "write a model as one file for others, with a card",
        "Write the weights, rounded to bf16, and their settings to FILE.safetensors. Beside it FILE.md is a card with "
        "what was measured, FILE.png is a grid of 64 samples, and a calibration is copied. With --to, write a folder "
        "for diffusers' pipelines instead, an ONNX file, or a folder with a web page in which the model runs, or put "
        "the model on the Hugging Face hub.",
        "ddpm export runs/digits --out mine.safetensors",
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", help=MODEL)
    parser.add_argument("--out", metavar="FILE", help="NAME.safetensors")
    kinds = (
        "instead: diffusers DIR; hub OWNER/NAME; onnx FILE.onnx, the network in float32; or web DIR, a page in which "
        "the model runs, for any static web server"
    )
    parser.add_argument("--to", nargs=2, metavar=("KIND", "PLACE"), help=kinds)
    runtime = "with --to web: an unpacked onnxruntime-web of the version that the page needs (default: npm fetches it)"
    parser.add_argument("--runtime", metavar="FOLDER", help=runtime)
    stored = "precision of the weights in the file: bf16, half the size, or float32 (bf16)"
    parser.add_argument("--precision", dest="stored", metavar="X", help=stored)
    parser.add_argument(
        "--data", metavar="NAME", help="public name of the data set (the run's, if it is that of a preset)"
    )
    parser.add_argument("--license", metavar="ID", help="license for the card, such as apache-2.0 (none)")
    of_class = (
        "write the network of one class for diffusers, whose pipelines pass no class; all: the network of all classes, "
        "which no pipeline can call (default: the network without a class)"
    )
    parser.add_argument("--class", dest="class_name", metavar="NAME", help=of_class)
    group = parser.add_argument_group("model")
    group.add_argument("--weights", metavar="X", help="ema (the averaged weights) or raw (ema)")
    group.add_argument(
        "--checkpoint", default="last", metavar="X", help="checkpoint of a run: last, best or a step (last)"
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (auto)")
    add_json(group)
    parser.set_defaults(variance=None, precision="auto")

    parser = command(
        commands, "import", import_, "read a model of another package",
        "Write FILE.safetensors, which every command takes as a model, from a diffusers folder (UNet2DModel) or from a "
        "weights file of ermongroup/ddim, pesser/pytorch_diffusion, openai/improved-diffusion or "
        "w86763777/pytorch-ddpm. Every key, shape and setting is accounted for. A setting that our network does not "
        "have is refused by its name.",
        "ddpm import hf:google/ddpm-cifar10-32 --out cifar10.safetensors",
    )  # fmt: skip
    path = "a diffusers folder, or hf:OWNER/NAME; a .ckpt, .pt, .pth or .safetensors file of another package's weights"
    parser.add_argument("path", metavar="PATH", help=path)
    parser.add_argument("--out", required=True, metavar="FILE", help="NAME.safetensors")
    parser.add_argument(
        "--preset", metavar="X", help="preset with the settings of a weights file (found by its shapes)"
    )
    parser.add_argument("--data", metavar="SOURCE", help=f"the images that the model was trained on: {SOURCE}")
    add_json(parser)

    parser = command(
        commands, "report", report, "write one HTML file about a run",
        "Write RUN/report.html: curves, grids of samples, and the results of `evaluate` and `paper`.",
        "ddpm report runs/digits",
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", help="a run folder")
    add_json(parser)


def export(args: argparse.Namespace) -> int:
    check("--precision", args.stored or "bf16", Literal["bf16", "float32"])
    if (args.out is None) == (args.to is None):
        kinds = ", ".join(f"--to {kind} {place}" for kind, place in KINDS.items())
        raise InputError(f"--out, --to: want one of --out FILE.safetensors, {kinds}")
    kind, place = args.to or ("file", args.out)
    if args.to:
        check("--to", kind, Literal[tuple(KINDS)])
    for name, value in (("precision", args.stored), ("data", args.data), ("license", args.license)):
        if kind in ("diffusers", "onnx", "web") and value is not None:
            raise InputError(f"--{name} {value}: not with --to {kind}, which writes float32 and no card")
    if kind != "diffusers" and args.class_name is not None:
        raise InputError(f"--class {args.class_name}: only with --to diffusers; other formats keep all classes")
    if kind != "web" and args.runtime is not None:
        raise InputError(f"--runtime {args.runtime}: only with --to web")
    if kind in ("onnx", "web"):
        return _export_for_onnxruntime(args, kind, Path(place))

    with importing():
        from ddpm.files import hub, interop
        from ddpm.run import export
        from ddpm.run.processes import pick_device

    device = pick_device(args.device)
    if kind == "file":
        export.check_out(place)
    elif kind == "diffusers":
        interop.check_out(Path(place))
    model = open_model(args, device, conditional=True)
    if kind == "hub":
        hub.create(place)
    with tempfile.TemporaryDirectory() as folder:
        if kind == "diffusers":
            interop.to_diffusers(model, Path(place), _label(args.class_name, model.preset.class_names))
        else:
            out = Path(folder) / f"{place.rpartition('/')[2]}.safetensors" if kind == "hub" else Path(place)
            exported = export.export(model, out, args.stored or "bf16", args.data)
            export.illustrate(model, exported, device, args.license, not args.json)
            if kind == "hub":
                out.with_suffix(".md").rename(out.with_name("README.md"))
                place = hub.push(out.parent, place, f"ddpm {__version__}, step {model.step:,}")
    about = {"out": str(place), "kind": kind, **model.about()}
    grid = " and its grid" * (model.preset.condition == "none")
    card = f", with its card {Path(place).with_suffix('.md')}{grid}" if kind == "file" else ""
    if kind == "diffusers" and model.preset.class_names:
        about["class"] = args.class_name
        card = f", the network {f'of class {args.class_name}' if args.class_name else 'without a class'}"
    print(json.dumps(about) if args.json else f"written: {place}{card}")
    return 0


def _export_for_onnxruntime(args: argparse.Namespace, kind: str, place: Path) -> int:
    """--to onnx and --to web."""
    with importing():
        import torch

        from ddpm.files import interop
        from ddpm.files.interop import onnx
        from ddpm.run import web

    (onnx if kind == "onnx" else interop).check_out(place)
    onnx.check_packages()
    model, about = (
        open_model(args, torch.device("cpu"), conditional=True),
        {"out": str(place), "kind": kind, "opset": onnx.OPSET},
    )
    if kind == "onnx":
        onnx.to_onnx(model, place)
        size, more = place.stat().st_size, ""
    else:
        size = web.to_web(model, place, None if args.runtime is None else Path(args.runtime))
        more = f"; `python3 -m http.server -d {shlex.quote(str(place))}` shows it at http://localhost:8000"
    summary = f"written: {place}, {size / 1e6:.1f} MB, ONNX opset {onnx.OPSET}{more}"
    print(json.dumps({**about, "bytes": size, **model.about()}) if args.json else summary)
    return 0


def _label(name: str | None, names: tuple[str, ...]) -> int | Literal["all"] | None:
    """The label of --class. Raises InputError for a class that the model does not have."""
    if name is None:
        return None
    if name in names:
        return names.index(name)
    if name == "all" and names:
        return "all"
    raise InputError(f"--class {name}: want {', '.join([*names, 'or all']) if names else 'none, as it has no classes'}")


def import_(args: argparse.Namespace) -> int:
    with importing():
        from ddpm.files import hub, interop
        from ddpm.run.export import check_out

    out, source = check_out(args.out), hub.fetch(args.path) if hub.is_name(args.path) else Path(args.path)
    preset, state = interop.read(source, find_preset(args.preset) if args.preset else None)
    preset = replace(preset, data=args.data or preset.data)
    interop.save(out, preset, state, source.name)
    parameters = sum(value.numel() for value in state.values())
    about = {"out": str(out), "parameters": parameters, "preset": to_json(preset)}
    words = f"{preset.predict}, {preset.schedule} schedule, {preset.variance}"
    size = "x".join(map(str, preset.size))
    print(json.dumps(about) if args.json else f"written: {out}, {parameters:,} parameters, {size}, {words}")
    return 0


def report(args: argparse.Namespace) -> int:
    with importing():
        from ddpm.run.report import report

    written = report(Path(args.run))
    print(json.dumps({"out": str(written)}) if args.json else f"written: {written}")
    return 0

"""`ddpm export`, `ddpm import` and `ddpm report`."""

import argparse
import json
import shlex
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ddpm.cli.options import (
    AS_TRAIN,
    MODEL,
    Commands,
    add_device,
    add_general,
    add_weights,
    command,
    importing,
    open_model,
)
from ddpm.errors import InputError
from ddpm.presets import check, find_preset, to_json
from ddpm.version import __version__

KINDS = {"diffusers": "DIR", "hub": "OWNER/NAME", "onnx": "FILE.onnx", "web": "DIR"}
"""What --to takes: a kind -> its place."""


def add(commands: Commands) -> None:
    parser = command(
        commands, "export", export, "write a model as a file, for diffusers, for the hub, or as a web page",
        "Write the weights, rounded to bf16, and their settings to FILE.safetensors. Beside it FILE.md is a card with "
        "what was measured, FILE.png is a grid of 64 samples, and a calibration is copied. With --to, write another "
        "format in place of these files, or put them on the Hugging Face hub.",
        "ddpm export digits --out mine.safetensors",
    )  # fmt: skip
    parser.add_argument("run", metavar="MODEL", help=MODEL)
    group = parser.add_argument_group("format", "what is written, and where")
    group.add_argument("--out", metavar="FILE", help="file to write, NAME.safetensors")
    kinds = (
        "write another format: diffusers FOLDER, for its pipelines; onnx FILE.onnx, the network in float32; web "
        "FOLDER, a page in which the model runs, for any static web server; or hub OWNER/NAME, a model on the Hugging "
        "Face hub"
    )
    group.add_argument("--to", nargs=2, metavar=("KIND", "PLACE"), help=kinds)
    stored = "precision of the weights in FILE.safetensors: bf16, half the size, or float32 (default: bf16)"
    group.add_argument("--precision", dest="stored", metavar="bf16|float32", help=stored)
    data = "public name of the dataset, for the card (default: the run's, if it is that of a preset)"
    group.add_argument("--data", metavar="NAME", help=data)
    group.add_argument("--license", metavar="ID", help="license for the card, such as apache-2.0 (default: none)")
    of_class = (
        "with --to diffusers, write the network of one class, because pipelines pass no class; all: the network of all "
        "classes, which no pipeline can call (default: the network without a class)"
    )
    group.add_argument("--class", dest="class_name", metavar="NAME", help=of_class)
    runtime = "with --to web, take this unpacked onnxruntime-web (default: npm fetches the version that the page needs)"
    group.add_argument("--runtime", metavar="FOLDER", help=runtime)
    add_weights(parser.add_argument_group("model", "which weights are used"))
    add_device(parser.add_argument_group("machine", "where the network runs"))
    add_general(parser)
    parser.set_defaults(variance=None, precision="auto")

    parser = command(
        commands, "import", import_, "convert a model of another package",
        "Write FILE.safetensors, which every command takes as a model, from a diffusers folder (UNet2DModel) or from a "
        "weights file of ermongroup/ddim, pesser/pytorch_diffusion, openai/improved-diffusion or "
        "w86763777/pytorch-ddpm. Every key, shape and setting is accounted for. A setting that our network does not "
        "have is refused by its name.",
        "ddpm import hf:google/ddpm-cifar10-32 --out cifar10.safetensors",
    )  # fmt: skip
    path = "a diffusers folder, or hf:OWNER/NAME; a .ckpt, .pt, .pth or .safetensors file of another package's weights"
    parser.add_argument("path", metavar="PATH", help=path)
    group = parser.add_argument_group("model", "what is written")
    group.add_argument("--out", required=True, metavar="FILE", help="file to write, NAME.safetensors")
    preset = "preset with the settings of a weights file (default: found by the shapes of the weights)"
    group.add_argument("--preset", metavar="PRESET", help=preset)
    group.add_argument("--data", metavar="SOURCE", help=f"images that the model was trained on: {AS_TRAIN}")
    add_general(parser)

    parser = command(
        commands, "report", report, "write one HTML file about a run",
        "Write RUN/report.html: curves, grids of samples, and the results of `ddpm evaluate` and `ddpm paper`.",
        "ddpm train digits",
        "ddpm report runs/digits",
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", help="a run folder")
    add_general(parser)


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
    model = open_model(args, torch.device("cpu"), conditional=True)
    if kind == "onnx":
        onnx.to_onnx(model, place)
        size, more = place.stat().st_size, ""
    else:
        size = web.to_web(model, place, None if args.runtime is None else Path(args.runtime))
        more = f"; `python3 -m http.server -d {shlex.quote(str(place))}` shows it at http://localhost:8000"
    summary = f"written: {place}, {size / 1e6:.1f} MB, ONNX opset {onnx.OPSET}{more}"
    about = {"out": str(place), "kind": kind, "opset": onnx.OPSET, "bytes": size, **model.about()}
    print(json.dumps(about) if args.json else summary)
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

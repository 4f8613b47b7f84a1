"""`ddpm info`."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm.cli.options import MODEL, Commands, add_general, command, importing
from ddpm.errors import InputError, parse_json
from ddpm.presets import GROUPS, PRESETS, Preset, to_json

if TYPE_CHECKING:
    from ddpm.files.models import Checkpoint

KNOWN = (
    "size", "channels", "classes", "class_names", "width", "channel_multipliers", "num_res_blocks",
    "attention_resolutions", "details", "schedule", "num_timesteps", "beta_1", "beta_T", "last_sigma", "predict",
    "variance", "clip",
)  # fmt: skip
"""The settings that the files of another package tell. The others, of its training, are unknown."""


def add(commands: Commands) -> None:
    parser = command(
        commands, "info", run, "describe a run or a model, and list the commands that it takes",
        "Print the settings of a run or a model, its checkpoints, its classes, and the commands that it takes. Each "
        "checkpoint is checked for damage.",
        "ddpm info digits",
    )  # fmt: skip
    parser.add_argument("run", metavar="MODEL", help=MODEL)
    add_general(parser)


def run(args: argparse.Namespace) -> int:
    with importing():
        from ddpm.files import checkpoints, opening
        from ddpm.files.interop.diffusers import is_diffusers

    path = opening.named(Path(args.run))
    is_run = (path / "config.json").is_file() and not is_diffusers(path)
    saved = _checkpoints(path) if is_run else []
    snapshots = [int(p.name) for p in reversed(checkpoints.saved(path, checkpoints.SNAPSHOTS))] if is_run else []
    whole = any(one["damage"] is None for one in saved)
    model = opening.open_checkpoint(args.run) if whole or not is_run else None
    preset = model.preset if model else checkpoints.settings(path)
    assert preset is not None  # a run has settings
    imported = model is not None and (model.foreign or (model.step == 0 and not preset.data))
    settings = {name: value for name, value in to_json(preset).items() if name in KNOWN or not imported}
    about: dict[str, Any] = {
        "model": args.run,
        "step": model.step if model else 0,
        "steps": preset.steps if is_run else None,
        "parameters": _parameters(preset),
        "image": f"{preset.size[0]}x{preset.size[1]} {preset.kind}",
        "data": preset.data or "unknown",
        "held_out": _held_out(path) if is_run else None,
        "classes": list(preset.class_names),
        "condition": preset.condition,
        "checkpoints": saved,
        "snapshots": snapshots,
        "average": asdict(model.average) if model and model.average else None,
        "ask": _ask(args.run, preset, model, is_run, bool(snapshots)),
        "settings": settings,
    }
    if args.json:
        print(json.dumps(about))
    else:
        print("\n".join(_lines(about, preset)))
    return 0


def _lines(about: dict[str, Any], preset: Preset) -> Iterator[str]:
    for name in ("model", "step", "steps", "parameters", "image", "data", "held_out", "classes", "condition"):
        if (value := about[name]) and value != "none":
            yield f"{name.replace('_', ' '):<12}{', '.join(value) if isinstance(value, list) else _words(value)}"
    for one in about["checkpoints"]:
        notes = [] if one["held_out"] is None else [f"held-out L_simple {one['held_out']:.4f}"]
        notes += [mark for mark in ("best", "calibrated") if one[mark]]
        notes += [f"damaged: {one['damage']}"] if one["damage"] else []
        yield f"{'checkpoint':<12}{', '.join([_words(one['step']), *notes])}"
    if steps := about["snapshots"]:
        yield f"{'snapshots':<12}{len(steps):,}, of steps {steps[0]:,} to {steps[-1]:,}"
    if about["average"]:
        from ddpm.files.models import Average

        yield f"{'average':<12}{Average(**about['average'])}"
    for group, meaning in GROUPS.items():
        names = [f.name for f in fields(Preset) if f.metadata["group"] == group and f.name != "class_names"]
        if known := [name for name in names if name in about["settings"]]:
            yield f"\n{meaning}"
            yield from (f"  {name:<24}{_words(getattr(preset, name))}" for name in known)
    yield "\nthe commands that it takes"
    for line, note in about["ask"].items():
        yield f"  {line:<59} {note}".rstrip()


def _checkpoints(path: Path) -> list[dict[str, Any]]:
    """The checkpoints of a run, the oldest first."""
    from ddpm.files import checkpoints

    best, rows = checkpoints.best(path), []
    for folder in reversed(checkpoints.saved(path)):
        damage = checkpoints.damage(folder)
        try:
            loss = None if damage else checkpoints.read_state(folder)["held_out"]
        except FileNotFoundError:
            loss = None
        if not folder.exists():  # the run is in training, and deleted it
            continue
        rows.append(
            {
                "step": int(folder.name),
                "held_out": loss,
                "best": folder == best,
                "calibrated": any(folder.glob("*.calibration.json")),
                "damage": damage,
            }
        )
    return rows


def _held_out(path: Path) -> str | None:
    """Which images the run holds out, in a few words."""
    try:
        values = parse_json((path / "held_out.json").read_bytes())
        return f"{values['count']:,} images, {values['split']} ({path / 'held_out.json'})"
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _parameters(preset: Preset) -> int:
    import torch

    from ddpm.presets import build

    with torch.device("meta"):
        network = build(preset).network
    assert isinstance(network, torch.nn.Module)
    return sum(p.numel() for p in network.parameters())


def _ask(name: str, preset: Preset, model: "Checkpoint | None", is_run: bool, has_snapshots: bool) -> dict[str, str]:
    """Command -> what it needs first or has to know; empty if nothing."""
    from ddpm.files.models import codec_tables, read_calibration, why_no_codec

    folder = f"./{name}" if name in PRESETS else name
    lines = {f"ddpm train {folder}": "goes on; more --steps train it further"} if is_run else {}
    if has_snapshots:
        lines[f"ddpm average {name} --ema X"] = "another length of the average, such as 0.07"
    if model is None:
        return lines
    data = "" if preset.data else " --data SOURCE"
    first = f"first: ddpm calibrate {name}{data}"
    if model.foreign:
        first = f"first: ddpm import {name} --out FILE.safetensors, and ddpm calibrate FILE.safetensors{data}"
    given = "" if preset.condition == "none" else " --input FILE"
    consistency = preset.loss == "consistency"
    label = " --class NAME" if preset.always_labelled else ""
    if not label:
        line = f"ddpm sample {name}{given}"
        lines[line] = "a consistency model: 2 network calls, or --steps 1" if consistency else ""
    if preset.class_names:
        scale = " --guidance X" if preset.label_dropout and not consistency else ""
        lines[f"ddpm sample {name}{given} --class NAME{scale}"] = "a class of those above, or all"
    lines[f"ddpm {'import' if model.foreign else 'export'} {name} --out FILE.safetensors"] = ""
    unit = " --metrics ode" if preset.pixel_type == "float32" else ""
    lines[f"ddpm evaluate {name}{data}{unit}"] = ""
    if not given:
        also = "also interpolate and inpaint" if consistency else "also interpolate, inpaint and restore"
        lines[f"ddpm edit {name} IMAGE{label}"] = also
    try:
        calibrated = read_calibration(model) is not None
    except InputError as error:
        calibrated, first = False, str(error)
    if model.denoiser.bound_follows_from_mse and not consistency and preset.pixel_type != "float32":
        lines[f"ddpm sample {name}{given}{label} --variance calibrated"] = "" if calibrated else first
    if why_no_codec(model) is None:
        lines[f"ddpm compress {name} IMAGE --out FILE"] = "" if calibrated and codec_tables(model) else first
    return lines


def _words(value: Any) -> str:
    """A value for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)

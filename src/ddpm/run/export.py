"""A model for others: one file of weights, a card that says what was measured of it, and a grid of its samples.

FILE.safetensors, FILE.md, FILE.png, and FILE.calibration.json where the model is calibrated.
"""

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ddpm.errors import InputError
from ddpm.files import atomic, images
from ddpm.files.images import check_folder
from ddpm.files.models import Checkpoint, calibration_file, read_calibration
from ddpm.files.opening import open_checkpoint
from ddpm.files.tensors import file_sha256, read_tensors, save_tensors
from ddpm.presets import PRESETS, Preset, to_json
from ddpm.run.sample import cycled_labels, generate
from ddpm.version import __version__

Stored = Literal["bf16", "float32"]
SAMPLES = 64
"""Images of the card's grid, of classes as many of each as fit; their seeds are 0, 1, and so on."""


def check_out(out: str | Path) -> Path:
    """The file that `export` is to write; to be called before the work. One that is there will be replaced.

    Raises InputError for another suffix, a place that cannot be written, and a file that belongs to a run.

    >>> check_out("model.pt")
    Traceback (most recent call last):
    ...
    ddpm.errors.InputError: out model.pt: want a name that ends in .safetensors
    """
    path = Path(out)
    if path.suffix != ".safetensors" or path.is_dir():
        raise InputError(f"out {out}: want a name that ends in .safetensors")
    if (path.parent / "state.json").exists():
        raise InputError(f"out {out}: within a checkpoint of a run; want another folder")
    check_folder(path.parent)
    return path


def export(found: Checkpoint, out: Path, stored: Stored = "bf16", data: str | None = None) -> Checkpoint:
    """Write the weights of `found` to `out`, rounded to bf16 or as they are, with what it takes to load them.

    Of the settings, the device goes, and a data set that others have not got under that name; `data` names it anew. A
    calibration goes along, unless the file has one of its own. It is of the weights before they were rounded, and says
    so: the bound holds with any variance, and what it costs is of second order in the variance's error (of the digits
    1e-5 bits/dim).
    Returns the model as it is read from `out`. Raises InputError where `out` is the file that is read.
    """
    if found.foreign:
        raise InputError(f"{found.path}: of diffusers; `ddpm import` makes one of our files of it")
    original = open_checkpoint(found.path)  # as it was trained; `found` may run otherwise
    if out.exists() and out.samefile(original.path):
        raise InputError(f"out {out}: the file that is read; want another name")
    calibrated = calibration_file(original.path) if read_calibration(original) else None
    kind = {"bf16": torch.bfloat16, "float32": torch.float32}[stored]
    tensors = {name: value.to(kind) for name, value in read_tensors(original.path).items()}
    metadata = {
        "config": json.dumps(to_json(public(original.preset, data))),
        "step": str(original.step),
        "weights": original.weights,
        "version": __version__,
    }
    save_tensors(out, tensors, metadata)
    exported = open_checkpoint(out, precision=found.preset.precision)
    if _calibrated_itself(exported):  # on an earlier export of the same weights
        pass
    elif calibrated is None:
        calibration_file(out).unlink(missing_ok=True)
    else:
        values = json.loads(calibrated.read_text())
        values["data"] = _name(values["data"], original, exported)
        if exported.identity != original.identity:
            values |= {"weights": exported.identity, "measured_on": values.get("measured_on", original.identity)}
        atomic.write_json(calibration_file(out), values)
    return exported


def illustrate(
    found: Checkpoint, exported: Checkpoint, device: torch.device, license: str | None = None, progress: bool = True
) -> None:
    """Write the card and a grid of samples beside the exported file; `found` is what it was exported from."""
    preset, classes = found.preset, len(found.preset.class_names)
    n, denoiser = _shown(preset), exported.denoiser.to(device)
    y = cycled_labels(range(classes), range(n))
    made = generate(denoiser, preset.shape, range(n), device=device, progress=progress, y=y)
    images.save_many(exported.path.with_suffix(".png"), images.channels_last(made), [], columns=grid_columns(classes))
    atomic.write(exported.path.with_suffix(".md"), card(found, exported, license))


def grid_columns(classes: int) -> int | None:
    """Of a grid of so many classes in turn: one each, where they are not too many."""
    return classes if 1 < classes <= 16 else None


def _shown(preset: Preset) -> int:
    """How many images the grid has."""
    classes = len(preset.class_names) or 1
    return max(SAMPLES // classes, 1) * classes


def _calibrated_itself(exported: Checkpoint) -> bool:
    """Whether `ddpm calibrate` measured these very weights, so that no calibration that is carried along is better."""
    try:
        values = json.loads(calibration_file(exported.path).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("weights") == exported.identity and "measured_on" not in values


def public(preset: Preset, data: str | None = None) -> Preset:
    """The preset without what is of one machine: its device, and a data set unless `data` or a preset names it so.

    >>> public(replace(PRESETS["cifar10"], data="/home/me/cifar", device="cuda:1")).data
    ''
    >>> public(PRESETS["digits"]).data
    'digits'
    """
    name = data or (preset.data if preset.data in _KNOWN and not Path(preset.data).exists() else "")
    return replace(preset, data=name, device="auto")


_KNOWN = {preset.data for preset in PRESETS.values()} - {""}


def _name(data: str, found: Checkpoint, exported: Checkpoint) -> str:
    """What others know the images of a measurement as, which may have been made by a path."""
    if data == found.preset.data:
        return exported.preset.data or "own images"
    return data if data in _KNOWN else "other images"


def card(found: Checkpoint, exported: Checkpoint, license: str | None = None) -> str:
    """The model card, Markdown with the front matter of the Hugging Face hub: what is known and was measured, no more.

    found is what was exported: of a run its metrics.jsonl and evaluate/ are read, and evaluate/ beside the exported
    file, where `ddpm evaluate FILE` leaves its figures.
    """
    file, preset, shown = exported.path, exported.preset, _shown(exported.preset)
    name = file.stem
    about = {
        "library_name": "ddpm",
        "license": license,
        "tags": ["ddpm", "diffusion", *(() if preset.classes else ("unconditional-image-generation",))],
        "datasets": [preset.data] if "/" in preset.data else None,
    }
    front = "".join(f"{key}: {json.dumps(value)}\n" for key, value in about.items() if value)
    image = {1: "grey", 3: "RGB", 4: "RGBA"}[preset.channels]
    size = "x".join(map(str, preset.size))
    rows = "".join(f"| {key} | {value} |\n" for key, value in _facts(found, exported))
    measured = "".join(f"| {key} | {value} |\n" for key, value in _measured(found, exported))
    measured = f"## Measured\n\n| | |\n|---|---|\n{measured}\n" if measured else ""
    limits = (
        f"It makes images like those it was trained on, {size}, and no others. Nothing stops it from making one that "
        "is close to a training image. The data's own terms and gaps carry over to what is made."
    )
    return (
        f"---\n{front}---\n\n# {name}\n\n"
        f"A denoising diffusion model (Ho, Jain, Abbeel 2020) of {size} {image} images, made and read by "
        f"ddpm {__version__}.\n\n"
        f"![{shown} samples]({name}.png)\n\n"
        f"Samples of seeds 0 to {shown - 1}, not chosen, by ancestral sampling with all {preset.num_timesteps:,} levels"
        f"{', the classes in turn, without guidance' if preset.classes else ''}.\n\n"
        f"| | |\n|---|---|\n{rows}\n{measured}"
        f"## Limits\n\n{limits}\n\n"
        f"## Made by\n\n```sh\n{_commands(found, exported)}```\n"
    )


def _facts(found: Checkpoint, exported: Checkpoint) -> Iterator[tuple[str, str]]:
    preset, network = exported.preset, exported.denoiser.network
    assert isinstance(network, torch.nn.Module)
    stored = "rounded to bf16" if _kind(exported) == {torch.bfloat16} else "float32"
    if preset.data:
        yield "data", preset.data
    yield "training", f"{found.step:,} steps of {preset.batch_size} images: {found.step * preset.batch_size:,} images"
    if logged := _logged(found, "seconds"):
        yield "hours", f"{logged[1] / 3600:.2f}"
    yield "seed", str(preset.seed)
    levels = ", ".join(str(preset.width * m) for m in preset.channel_multipliers)
    shape = f"channels {levels}, residual blocks a level {preset.num_res_blocks}"
    yield "network", f"{sum(p.numel() for p in network.parameters()):,} parameters; {shape}"
    if preset.classes:
        hidden = f"{preset.label_dropout:.0%} of them hidden in training"
        yield "classes", f"{', '.join(preset.class_names)}; {hidden}"
    yield "prediction", f"{preset.predict}, {preset.schedule} schedule, T = {preset.num_timesteps:,}, {preset.variance}"
    yield "weights", f"{exported.weights}, {stored}; {exported.path.stat().st_size:,} bytes"
    if read_calibration(exported):
        values = json.loads(calibration_file(exported.path).read_text())
        of = "the weights before rounding" if "measured_on" in values else "these weights"
        yield "calibration", f"of {of}, on {values['count']:,} images, {_name(values['data'], found, exported)}"
    yield "SHA-256 of the file", file_sha256(exported.path)


def _measured(found: Checkpoint, exported: Checkpoint) -> Iterator[tuple[str, str]]:
    """What lies in metrics.jsonl and in evaluate/ of the exported file and of what it was made from."""
    logged = _logged(found, "held_out")
    if found.weights == "ema" and logged and logged[0] == found.step:  # it is measured on the averaged weights
        yield "held-out L_simple, in training", f"{logged[1]:.4f}"
    for source in (exported, found):
        before = ", before rounding" if source is found and _kind(found) != _kind(exported) else ""
        for file in sorted((source.home / "evaluate" / f"{found.step:08d}-{found.weights}").glob("*.json")):
            values = json.loads(file.read_text())
            if values.get("identity") == source.identity:
                values["data"] = _name(values.get("data", ""), found, exported)
                yield from ((f"{key}{before}", value) for key, value in _figures(values))


def _kind(model: Checkpoint) -> set[torch.dtype]:
    return {value.dtype for value in read_tensors(model.path).values()}


def _figures(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The figures of one file of evaluate/, each with what it is of."""
    names = ("classes", "guidance", "guidance_interval", "clip")
    asked = "".join(f", {name.replace('_', ' ')} {values[name]}" for name in names if name in values)
    if "bits_per_dim" in values:
        how = "ODE" if "bits_per_dim_decoder" in values else "bound (Eq. 5)"
        levels = f", {values['levels_per_image']} levels an image" if "levels_per_image" in values else ""
        error = values["standard_error"]
        of = f"{values['count']:,} images, {values['data']}, {values['split']}{asked}"
        figure = f"{values['bits_per_dim']:.4f}" + (f" ± {error:.4f}" if error else "")
        yield f"bits/dim, {how}{levels}, {values['variance']}", f"{figure} ({of})"
        for variance, bits in values.get("by_variance", {}).items():
            if variance != values["variance"]:
                yield f"bits/dim, {how}, {variance}", f"{bits:.4f} ({of})"
    if "samples" in values:
        how = f"{values['sampler']}, {values['steps']} steps, " if "sampler" in values else ""
        of = f"{values['samples']:,} samples, {how}features {values['features']}{asked}"
        scores = ("fid", "frechet_distance", "inception_score", "kid", "precision", "recall")
        yield from ((name, f"{values[name]:.4g} ({of})") for name in scores if name in values)


def _logged(found: Checkpoint, key: str) -> tuple[int, float] | None:
    """The last (step, value) of `key` in metrics.jsonl, at the checkpoint's step or before."""
    file = found.home / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    values = [(line["step"], line[key]) for line in lines if line.get(key) is not None and line["step"] <= found.step]
    return values[-1] if values else None


def _commands(found: Checkpoint, exported: Checkpoint) -> str:
    """How to make the model anew, and how to use it."""
    preset, name = exported.preset, exported.path.stem
    fixed = {f.name for f in fields(Preset) if not f.metadata["resume"]} | {"steps", "sample_steps"}
    changes = {
        base: {key: getattr(preset, key) for key in sorted(fixed) if getattr(preset, key) != getattr(other, key)}
        for base, other in PRESETS.items()
    }
    base = min(changes, key=lambda key: len(changes[key]))
    words = ["ddpm", "train", base, "--out", "RUN"]
    for key, value in changes[base].items():
        option = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, tuple):
            words += [f"--{option}", ("x" if key == "size" else ",").join(map(str, value))]
        else:
            words += [f"--{option}", str(value) or "SOURCE"]  # only a data set may have no name
    of = [] if found.step == preset.steps else ["--checkpoint", str(found.step)]
    of += [] if exported.weights == "ema" else ["--weights", exported.weights]
    of_classes = " --class all --guidance 1" if preset.classes else ""
    return (
        f"{shlex.join(words)}\n"
        f"{shlex.join(['ddpm', 'export', 'RUN', *of, '--out', f'{name}.safetensors'])}\n"
        f"ddpm sample {name}.safetensors -n {_shown(preset)}{of_classes} --out {name}.png\n"
    )

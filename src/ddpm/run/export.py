"""Export a model for others: FILE.safetensors with the weights, FILE.md with a card, and FILE.png with samples.

A calibrated model also has FILE.calibration.json.
"""

import html
import json
import os
import re
import shlex
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import torch

from ddpm.errors import InputError, one_line, parse_json
from ddpm.files import arrays, atomic, hub, images
from ddpm.files.images import check_folder
from ddpm.files.models import Checkpoint, calibration_file, read_calibration
from ddpm.files.opening import open_checkpoint
from ddpm.files.tensors import file_sha256, read_tensors, save_tensors
from ddpm.presets import DISTILLED, PRESETS, Preset, to_json
from ddpm.run import log
from ddpm.run.fidelity import FIDELITY
from ddpm.run.init import OF_DATA, OF_TEACHER
from ddpm.run.sample import cycled_labels, generate, sampler_of
from ddpm.version import __version__

SAMPLES = 64
"""Images in the card's grid, rounded down so that each class has the same number, which is at least 1."""


def check_out(out: str | Path) -> Path:
    """Check the file that `export` is to write, before the work, and return its path. `export` replaces such a file.

    Raises InputError if the name does not end in .safetensors, if its folder cannot be written, or if the folder is a
    checkpoint of a run.

    >>> check_out("model.pt")
    Traceback (most recent call last):
    ...
    ddpm.errors.InputError: out model.pt: want a name that ends in .safetensors
    """
    path = Path(out)
    if path.suffix != ".safetensors" or path.is_dir():
        raise InputError(f"out {out}: want a name that ends in .safetensors")
    if (path.parent / "state.json").exists():
        raise InputError(f"out {out}: inside a checkpoint of a run; want another folder")
    check_folder(path.parent)
    if len(os.fsencode(beside := calibration_file(path).name)) > 255:
        raise InputError(
            f"out {path.name[:40]}...: too long a name, since {beside[-17:]} has to fit; want a shorter one"
        )
    return path


def export(
    checkpoint: Checkpoint, out: Path, precision: Literal["bf16", "float32"] = "bf16", data: str | None = None
) -> Checkpoint:
    """Write the weights of `checkpoint`, rounded to `precision`, with the settings that loading needs, to `out`.

    The settings are those of `public`, and `data` is the public name of the dataset. A calibration of the original
    weights is copied, unless `ddpm calibrate` has measured the exported ones. The copy says that it was measured before
    rounding. That is good enough: the bound holds with any variance, and its loss is of second order in the variance's
    error (1e-5 bits/dim for the model `digits`).

    Returns the model read from `out`. Raises InputError if `out` is the file that is exported, and for a model in
    diffusers' format.
    """
    if checkpoint.foreign:
        raise InputError(f"{checkpoint.path}: a diffusers model; want a file that `ddpm import` has written")
    original = open_checkpoint(checkpoint.path)  # with the settings of its training, which `checkpoint` may override
    if out.exists() and out.samefile(original.path):
        raise InputError(f"out {out}: this file is the one to export; want another name")
    calibrated = calibration_file(original.path) if read_calibration(original) else None
    dtype = {"bf16": torch.bfloat16, "float32": torch.float32}[precision]
    tensors = {name: value.to(dtype) for name, value in read_tensors(original.path).items()}
    metadata = {
        "config": json.dumps(to_json(public(original.preset, data))),
        "step": str(original.step),
        "weights": original.weights,
        "version": __version__,
        **({"average": json.dumps(asdict(original.average))} if original.average else {}),
    }
    save_tensors(out, tensors, metadata)
    exported = open_checkpoint(out, precision=checkpoint.preset.precision)
    if _has_own_calibration(exported):  # measured on an earlier export of the same weights
        return exported
    if calibrated is None:
        calibration_file(out).unlink(missing_ok=True)
    else:
        values = parse_json(calibrated.read_bytes())
        values["data"] = _public_data_name(values["data"], original, exported)
        if exported.identity != original.identity:
            values |= {"weights": exported.identity, "measured_on": values.get("measured_on", original.identity)}
        atomic.write_json(calibration_file(out), values)
    return exported


def illustrate(
    checkpoint: Checkpoint,
    exported: Checkpoint,
    device: torch.device,
    license: str | None = None,
    progress: bool = True,
) -> None:
    """Write the card and a grid of samples beside the exported file; `checkpoint` is the model before the export.

    A model with a condition on an image gets no grid, because it makes no image without an input.
    """
    preset, classes = checkpoint.preset, len(checkpoint.preset.class_names)
    if preset.condition == "none":
        n, denoiser = _grid_size(preset), exported.denoiser.to(device)
        y = cycled_labels(range(classes), range(n))
        samples = generate(denoiser, preset.shape, range(n), sampler_of(preset), device=device, progress=progress, y=y)
        grid = exported.path.with_suffix(".png")
        sheet = arrays.sheet(samples, arrays.view_of(preset, denoiser.values))
        images.save_many(grid, sheet, [], columns=grid_columns(classes))
    atomic.write(exported.path.with_suffix(".md"), card(checkpoint, exported, license))


def grid_columns(classes: int) -> int | None:
    """The number of columns of a grid that cycles over classes: one per class if there are 2 to 16, else None."""
    return classes if 1 < classes <= 16 else None


def _grid_size(preset: Preset) -> int:
    """The number of images in the card's grid."""
    classes = len(preset.class_names) or 1
    return max(SAMPLES // classes, 1) * classes


def _has_own_calibration(exported: Checkpoint) -> bool:
    """Whether `ddpm calibrate` measured these weights themselves, and not those before rounding."""
    try:
        values = parse_json(calibration_file(exported.path).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("weights") == exported.identity and "measured_on" not in values


def public(preset: Preset, data: str | None = None) -> Preset:
    """The preset without what means something on one machine only: its device, and the places of data and models.

    The dataset is `data` if given. Otherwise its name stays if a preset of the package has it, and else is ''.

    >>> public(replace(PRESETS["cifar10"], data="/home/me/cifar", device="cuda:1")).data
    ''
    >>> public(PRESETS["digits"]).data
    'digits'
    """
    name = data or (preset.data if preset.data in _PUBLIC_DATA and not Path(preset.data).exists() else "")
    init = preset.init if hub.is_name(preset.init) or preset.init in ("", *PRESETS) else "MODEL"
    pairs = "SOURCE" if preset.pairs else ""
    guide = "MODEL" if preset.guide else ""
    return replace(preset, data=name, init=init, pairs=pairs, guide=guide, device="auto")


_PUBLIC_DATA = {preset.data for preset in PRESETS.values()} - {""}


def _public_data_name(data: str, checkpoint: Checkpoint, exported: Checkpoint) -> str:
    """The public name of a measurement's dataset, since `data` may be a path on this machine."""
    if data == checkpoint.preset.data:
        return exported.preset.data or "own images"
    return data if data in _PUBLIC_DATA else "other images"


def card(checkpoint: Checkpoint, exported: Checkpoint, license: str | None = None) -> str:
    """The model card in Markdown, with the front matter of the Hugging Face hub. It holds only what is known.

    The measurements come from metrics.jsonl and evaluate/ of `checkpoint`'s run, and from evaluate/ of the exported
    file, which `ddpm evaluate FILE` writes.
    """
    name, preset, n = exported.path.stem, exported.preset, _grid_size(exported.preset)
    about = {
        "library_name": "ddpm",
        "license": license,
        "tags": ["ddpm", "diffusion", *(() if preset.classes else ("unconditional-image-generation",))],
        "datasets": [preset.data] if "/" in preset.data else None,
    }
    front = "".join(f"{key}: {json.dumps(value)}\n" for key, value in about.items() if value)
    size = "x".join(map(str, preset.size))
    rows, measured = (_table_rows(facts(checkpoint, exported)) for facts in (_facts, _measured))
    measured = f"## Measured\n\n| | |\n|---|---|\n{measured}\n" if measured else ""
    of_classes = " --class all --guidance 1" if preset.classes else ""
    file, grid = (shlex.quote(one_line(f"{name}.{suffix}")) for suffix in ("safetensors", "png"))
    sampling = f"ddpm sample {file} -n {n}{of_classes} --out {grid}"
    levels = f"ancestral sampling with all {checkpoint.denoiser.schedule.T:,} levels"
    how = "consistency sampling in 2 network calls" if preset.loss == "consistency" else levels
    samples = (
        f"![{n} samples]({quote(f'{name}.png')})\n\n"
        f"These samples have the seeds 0 to {n - 1}; none was chosen. They were made by {how}"
        f"{', with the classes in turn and without guidance' if preset.classes else ''}.\n\n"
    )
    if preset.condition != "none":
        sampling, samples = f"ddpm sample {file} --input FILE -n 4 --out {grid}", ""
    made = f"\n## How it was made\n\n```sh\n{_commands(checkpoint, exported)}```\n" if checkpoint.step else ""
    limits = (
        f"The model makes only images like those it was trained on, of {size} pixels. It may make an image that is "
        "close to a training image. The terms of the training data, and its gaps, carry over to the samples."
    )
    return (
        f"---\n{front}---\n\n# {_markdown(name)}\n\n"
        f"A denoising diffusion model (Ho, Jain, Abbeel 2020) of {size} {preset.kind} images, "
        f"exported by ddpm {__version__}. The Python package is called ddpm-kit.\n\n"
        f"{samples}## Use\n\n```sh\npip install ddpm-kit\n{sampling}\n```\n\n"
        f"## Facts\n\n| | |\n|---|---|\n{rows}\n{measured}"
        f"## Limits\n\n{limits}\n{made}"
    )


def _table_rows(facts: Iterable[tuple[str, str]]) -> str:
    return "".join(f"| {_markdown(key)} | {_markdown(value)} |\n" for key, value in facts)


def _markdown(text: str) -> str:
    r"""Text as Markdown of one line that shows it as it is: class names and names of data may come from other people.

    >>> print(_markdown("fixed_large"), _markdown("a\n<b>|_c_[d](e)"))
    fixed_large a\\n&lt;b&gt;\|\_c\_\[d\](e)
    """
    text = html.escape(one_line(text), quote=False)
    return re.sub(r"[\\`*\[\]|~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


def _facts(checkpoint: Checkpoint, exported: Checkpoint) -> Iterator[tuple[str, str]]:
    preset, network = exported.preset, exported.denoiser.network
    assert isinstance(network, torch.nn.Module)
    stored = "rounded to bf16" if _dtypes(exported) == {torch.bfloat16} else "float32"
    if preset.data:
        yield "data", preset.data
    images = f"{checkpoint.step:,} steps of {preset.batch_size} images: {checkpoint.step * preset.batch_size:,} images"
    yield "training", images if checkpoint.step else "by another package"
    if logged := _last_logged(checkpoint, "seconds"):
        yield "hours of training", f"{logged[1] / 3600:.2f}"
    yield "seed", str(preset.seed)
    levels = ", ".join(str(preset.width * m) for m in preset.channel_multipliers)
    shape = f"channels {levels}; residual blocks per level: {preset.num_res_blocks}"
    yield "network", f"{sum(p.numel() for p in network.parameters()):,} parameters; {shape}"
    if preset.classes:
        hidden = f"{preset.label_dropout:.0%} of the labels were hidden in training"
        yield "classes", f"{', '.join(preset.class_names)}; {hidden}"
    if preset.condition != "none":
        hidden = f"{preset.condition_dropout:.0%} of the conditions were hidden in training"
        yield "condition", f"{preset.condition}; {hidden}"
    T = exported.denoiser.schedule.T
    yield "prediction", f"{preset.predict}, {preset.schedule} schedule, T = {T:,}, {preset.variance}"
    yield "weights", f"{exported.weights}, {stored}; {exported.path.stat().st_size:,} bytes"
    if exported.average:
        yield "average of the weights", str(exported.average)
    if read_calibration(exported):
        values = parse_json(calibration_file(exported.path).read_bytes())
        weights = "the weights before rounding" if "measured_on" in values else "these weights"
        data, count = _public_data_name(str(values.get("data")), checkpoint, exported), values.get("count")
        yield "calibration", f"of {weights}, on {count} images ({data})"
    yield "SHA-256 of the file", file_sha256(exported.path)


def _measured(checkpoint: Checkpoint, exported: Checkpoint) -> Iterator[tuple[str, str]]:
    """The measurements in metrics.jsonl and evaluate/, of the exported file and of the model before the export."""
    logged = _last_logged(checkpoint, "held_out")
    if checkpoint.weights == "ema" and logged and logged[0] == checkpoint.step:  # measured with the averaged weights
        yield "held-out L_simple, in training", f"{logged[1]:.4f}"
    for source in (exported, checkpoint):
        before = ", before rounding" if source is checkpoint and _dtypes(checkpoint) != _dtypes(exported) else ""
        for file in sorted((source.home / "evaluate" / f"{checkpoint.step:08d}-{checkpoint.weights}").glob("*.json")):
            try:
                values = parse_json(file.read_bytes())
                if not isinstance(values, dict) or values.get("identity") != source.identity:
                    continue
                values["data"] = _public_data_name(values.get("data", ""), checkpoint, exported)
                found = list(figures(values))
            except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
                warnings.warn(f"{file} is left out of the card: {error}", stacklevel=2)
                continue
            yield from ((f"{name}{before}", f"{value} ({measured_on})") for name, value, measured_on in found)


def _dtypes(model: Checkpoint) -> set[torch.dtype]:
    return {value.dtype for value in read_tensors(model.path).values()}


def figures(values: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The figures of one file of evaluate/ for people, as (name with its unit, value, what it was measured on).

    >>> values = {"bits_per_dim": 3.7, "standard_error": 0.04, "variance": "fixed_large"}
    >>> list(figures(values | {"count": 1000, "data": "cifar10", "split": "test"}))
    [('bits/dim, bound (Eq. 5), fixed_large', '3.7000 ± 0.0400', '1,000 images, cifar10, test')]
    """
    names = ("classes", "guidance", "guidance_interval", "clip")
    conditions = "".join(f", {name.replace('_', ' ')} {values[name]}" for name in names if name in values)
    if "guide" in values:
        conditions += f", guided by {values['guide']['run']} at scale {values['guide']['scale']:g}"
    if "bits_per_dim" in values:
        how = "ODE" if "bits_per_dim_decoder" in values else "bound (Eq. 5)"
        levels = f", {values['levels_per_image']} levels per image" if "levels_per_image" in values else ""
        error = values["standard_error"]
        measured_on = f"{values['count']:,} images, {values['data']}, {values['split']}{conditions}"
        figure = f"{values['bits_per_dim']:.4f}" + (f" ± {error:.4f}" if error else "")
        yield f"bits/dim, {how}{levels}, {values['variance']}", figure, measured_on
        for variance, bits in values.get("by_variance", {}).items():
            if variance != values["variance"]:
                yield f"bits/dim, {how}, {variance}", f"{bits:.4f}", measured_on
    if "nats_per_dim" in values:
        error = values["standard_error"]
        figure = f"{values['nats_per_dim']:.4f}" + (f" ± {error:.4f}" if error else "")
        yield "nats/dim, ODE", figure, f"{values['count']:,} images, {values['data']}, {values['split']}{conditions}"
    if "draws" in values and "samples" not in values and "bits_per_dim" not in values:
        how = f"{values['count']:,} images, {values['data']}, {values['split']}, {values['sampler']}"
        how += f", {values['steps']} steps{conditions}"
        said = {"": "one sample", "_of_mean": f"mean of {values['draws']} samples", "_bicubic": "bicubic"}
        keys = [(name, end) for name in FIDELITY for end in said]
        yield from (
            (f"{name.upper()}, {said[end]}", f"{values[name + end]:.4g} {FIDELITY[name].unit}".strip(), how)
            for name, end in keys
            if values.get(name + end) is not None
        )
    if "samples" in values:
        how = f"{values['sampler']}, {values['steps']} steps, " if "sampler" in values else ""
        scored = f"{values['samples']:,} samples, {how}features {values['features']}{conditions}"
        scores = ("fid", "frechet_distance", "inception_score", "kid", "precision", "recall")
        yield from ((name, f"{values[name]:.4g}", scored) for name in scores if name in values)


def _last_logged(checkpoint: Checkpoint, key: str) -> tuple[int, float] | None:
    """The last (step, value) of `key` in metrics.jsonl up to the checkpoint's step; None without one."""
    file = checkpoint.home / "metrics.jsonl"
    values = [(line["step"], line[key]) for line in log.read(file) if isinstance(line.get(key), float)]
    return next((value for value in reversed(values) if value[0] <= checkpoint.step), None)


def _unlike(preset: Preset, other: Preset, names: Iterable[str]) -> dict[str, Any]:
    """The settings of these names that differ from those of the other."""
    return {key: getattr(preset, key) for key in sorted(names) if getattr(preset, key) != getattr(other, key)}


def _commands(checkpoint: Checkpoint, exported: Checkpoint) -> str:
    """The commands that make the same file: training from the nearest preset, or from a model, and the export."""
    preset, name = open_checkpoint(exported.path).preset, exported.path.stem  # with the precision of the training
    fixed = {f.name for f in fields(Preset) if not f.metadata["resume"]} | {"steps", "sample_steps"}
    fixed.discard("details")  # they are not those of a trained network
    if preset.loss == "consistency" and preset.init:
        words, own = ["ddpm", "distill", preset.init, "--out", "RUN"], (*OF_TEACHER, *OF_DATA)  # with --data
        changes = {key: getattr(preset, key) for key in ("data", *DISTILLED) if key in fixed - set(own)}
        changes |= _unlike(preset, Preset(), own)
    else:
        base, changes = min(
            ((base, _unlike(preset, other, fixed)) for base, other in PRESETS.items()), key=lambda pair: len(pair[1])
        )
        words = ["ddpm", "train", base, "--out", "RUN"]
    for key, value in changes.items():
        option = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, tuple):
            words += [f"--{option}", ("x" if key == "size" else ",").join(map(str, value))]
        else:
            words += [f"--{option}", str(value) or "SOURCE"]  # only a dataset may have no name
    commands = [words]
    if average := exported.average:
        length = ["--ema", f"{average.sigma_rel:g}", "--step", str(average.step)]
        commands.append(["ddpm", "average", "RUN", *length, "--out", "average.safetensors"])
        export = ["ddpm", "export", "average.safetensors"]
    else:
        export = ["ddpm", "export", "RUN"]
        export += [] if checkpoint.step == preset.steps else ["--checkpoint", str(checkpoint.step)]
        export += [] if exported.weights == "ema" else ["--weights", exported.weights]
    commands.append([*export, "--out", f"{name}.safetensors"])
    return "".join(f"{one_line(shlex.join(each))}\n" for each in commands)

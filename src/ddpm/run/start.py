"""Start a run: from a preset, a run or settings to one set of settings and a folder. `train` does it from Python.

This module loads torch only when it is used, so that the command line starts quickly.
"""

from __future__ import annotations

import functools
import os
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm.details import Details
from ddpm.errors import InputError, brief, parse_json, suggestion
from ddpm.presets import BY_SIZE, PRESETS, Preset, check, details_from, find_preset

if TYPE_CHECKING:
    from ddpm.denoiser import Denoiser
    from ddpm.run.train import Result


@dataclass(frozen=True, repr=False)
class Run:
    """A run after training.

    folder  where it is; `ddpm.load(run.folder)` and every command take it
    preset  its settings, with what training learned: the names of classes, and the steps of `minutes`
    result  how training ended
    """

    folder: Path
    preset: Preset
    result: Result

    @functools.cached_property
    def model(self) -> Denoiser:
        """What `ddpm.load` opens: the newest checkpoint's averaged weights, ready to sample."""
        from ddpm.files.opening import load

        return load(self.folder)

    @property
    def log(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        from ddpm.run.log import read

        return read(self.folder / "metrics.jsonl")

    def __repr__(self) -> str:
        result = self.result
        parts = [f"step {result.step:,} of {self.preset.steps:,}"]
        if result.held_out is not None:
            before = "" if result.held_out_before is None else f" ({result.held_out_before:.4f} before)"
            parts.append(f"held-out L_simple {result.held_out:.4f}{before}")
        if result.images_per_second:
            parts.append(f"{result.images_per_second:,.0f} images/s")
        if result.interrupted:
            parts.append("stopped and saved; the same call goes on")
        return f"<Run {self.folder}: {', '.join(parts)}>"


def train(
    preset: str | Path | Preset | None = None,
    data: Any = None,
    out: str | Path | None = None,
    *,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    minutes: float | None = None,
    **settings: Any,
) -> Run:
    """Train a model, or resume a run: the same call goes on where the run was stopped.

    preset    the name of a preset, a Preset, or the folder of a run, which goes on with its own settings (default:
              photos, the recipe for images of any size; with init, that model's settings)
    data      the images, if not those of the preset: a SOURCE as text or a path; an array [N, H, W] or
              [N, H, W, C]; a torch tensor [N, C, H, W] or [N, H, W]; a pair (one of these, N labels); a map-style
              Dataset of images or (image, label); or a dataset of `datasets` (`ddpm.files.data.given`). Numbers other
              than 8-bit ones need the setting pixel_type
    out       the run's folder (default: runs/PRESET)
    on_log    is called with each line of metrics.jsonl, a dict
    minutes   the time that a new run takes, in place of `steps`
    settings  fields of Preset, as steps=1000 or size=(32, 48). init=MODEL begins with a model: a Run, or as text the
              folder of a run, a file, a name, a diffusers folder or hf:OWNER/NAME

    It also works outside the main thread, where no signal ends a run. An interrupted notebook cell saves the run first.
    Raises InputError for what cannot be used, and Stopped if the run cannot go on.

    >>> import tempfile, ddpm
    >>> run = ddpm.train("digits", out=tempfile.mkdtemp(), steps=2, batch_size=4, eval_images=4, sample_every=0)
    >>> run.result.step, run.model.predict
    (2, 'v')
    """
    from ddpm.files import checkpoints
    from ddpm.files import data as sources
    from ddpm.run import log
    from ddpm.run.train import train as train_run

    if minutes is not None:
        check("minutes", minutes, float, 0.1)
        if "steps" in settings:
            raise InputError("minutes, steps: want one of the two")
    if data is not None:
        settings["data"] = str(data) if isinstance(data, (str, Path)) else ""  # objects get their name below
    if isinstance(settings.get("init"), Run):
        settings["init"] = settings["init"].folder
    chosen, folder = settle(preset, out, converted(settings))
    images = None
    if data is not None and not isinstance(data, (str, Path)):
        of_pairs = None if chosen.pairs else chosen.pair_column or None
        options = sources.Options(chosen.image_column or None, chosen.label_column or None, pair_column=of_pairs)
        images = sources.given(data, chosen.classes, options)
        chosen = replace(chosen, data=images.name)
        if os.environ.get("RANK", "0") == "0":  # under torchrun the first process prints for all
            log.note(images.meaning)
    result = train_run(chosen, folder, minutes, images, on_log)
    return Run(folder, checkpoints.settings(folder) or chosen, result)


def settle(
    start: str | Path | Preset | None,
    out: str | Path | None,
    settings: Mapping[str, Any],
    config: str | Path | None = None,
) -> tuple[Preset, Path]:
    """The settings of a run, and its folder.

    start     a preset or its name, a run's folder, or None for the preset photos. The name of a preset wins over a
              folder of that name
    out       the run's folder; None: that of the run, or runs/PRESET
    settings  fields of Preset that replace those of `start` and of `config`; with `init`, network and diffusion come
              from that model, and without a `start` all of them do
    config    a file of fields of Preset, which replace those of `start` (`read_config`)

    Raises InputError if there is no such preset, run, model or file, and for settings that cannot be.
    """
    place = None if out is None else Path(out)
    settings = {**(read_config(config) if config is not None else {}), **settings}
    name = settings.get("init")
    if start is None and config is not None and place is None:
        raise InputError("out: missing; want the run's folder")
    if name:
        from ddpm.run import init

        if start is None:
            place = place or init.out_folder(name)
            return init.inherit(name, None, settings), place
    preset, folder = _start(start, place)
    of_size = "photos" if start is None else start
    if isinstance(of_size, str) and of_size in BY_SIZE:  # its network follows from the size
        preset = BY_SIZE[of_size](settings.get("size", preset.size))
    return init.inherit(name, preset, settings) if name else replace(preset, **settings), folder


def read_config(file: str | Path) -> dict[str, Any]:
    """Fields of Preset from a run's config.json, or from a .json, .yaml, .yml or .toml file of some of them.

    The names of classes are left out, since the data tells them. Raises InputError if the file cannot be read, and for
    an unknown setting; it names the nearest one.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "mine.toml")
    >>> _ = file.write_text('size = "32x48"\\nlr = 2e-4')
    >>> read_config(file)
    {'size': (32, 48), 'lr': 0.0002}
    """
    path = Path(file)
    readers: dict[str, Callable[[str], Any]] = {
        ".json": parse_json,
        ".yaml": _yaml,
        ".yml": _yaml,
        ".toml": tomllib.loads,
    }
    if path.suffix.lower() not in readers:
        raise InputError(f"config {file}: want a name that ends in {', '.join(readers)}")
    if path.exists() and not path.is_file():  # reading a pipe would wait
        raise InputError(f"config {file}: not a plain file; want one")
    try:
        values = readers[path.suffix.lower()](path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"config {file}: cannot be read ({brief(error)})") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InputError(f"config {file}: want settings by their names, as lr: 0.001")
    values = converted(values, f"config {file}: ")
    for f in fields(Preset):  # YAML takes 2e-4 for text
        if f.type == "float" and isinstance(values.get(f.name), str):
            with suppress(ValueError):
                values[f.name] = float(values[f.name])
    values.pop("class_names", None)
    return values


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _start(start: str | Path | Preset | None, out: Path | None) -> tuple[Preset, Path]:
    if isinstance(start, Preset):
        if out is None:
            raise InputError("out: missing; want the run's folder")
        return start, out
    name = "photos" if start is None else str(start)
    if name in PRESETS or not Path(name).exists():
        return find_preset(name), out or Path("runs", name)
    if not (Path(name) / "config.json").is_file():
        raise InputError(f"{name}: not a run; want a run's folder or a preset, {', '.join(PRESETS)}")
    from ddpm.files.checkpoints import settings

    preset = settings(Path(name))
    assert preset is not None  # there is a config.json
    return (preset, Path(name)) if out is None else (replace(preset, class_names=()), out)  # the classes of its data


def converted(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Settings from Python or from a file, as Preset has them: a size may be 32 or "32x48", a tuple a list or a number.

    `where` begins the message. Raises InputError for an unknown setting; it names the nearest one.

    >>> converted({"size": 32, "channel_multipliers": [1, 2], "show": 4})
    {'size': (32, 32), 'channel_multipliers': (1, 2), 'show': (4,)}
    """
    known = [f.name for f in fields(Preset)]
    for name in values:
        if name not in known:
            hint = suggestion(name, known).rstrip() or f"want some of {', '.join(known)}"
            raise InputError(f"{where}{name}: no such setting; {hint}")
    values = dict(values)
    if "details" in values and not isinstance(values["details"], Details):
        values["details"] = details_from(values["details"])
    if type(size := values.get("size")) is int:
        values["size"] = (size, size)
    elif isinstance(size, str) and all(part.isdecimal() for part in size.lower().split("x")):
        sides = tuple(map(int, size.lower().split("x")))
        values["size"] = sides * 2 if len(sides) == 1 else sides
    values = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    lists = {f.name for f in fields(Preset) if str(f.type).startswith("tuple")}
    values |= {name: (value,) for name, value in values.items() if name in lists and type(value) in (int, float)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

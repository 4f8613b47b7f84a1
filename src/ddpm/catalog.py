"""What can be chosen by name, with defaults and one line of meaning. This module loads no torch.

Each table stands beside the code that it names: `SAMPLERS` in samplers.py, `SCHEDULES` in schedule.py, and so on. So a
new row touches one file. Importing those files would load torch, which takes seconds, and `ddpm --help` must not wait.
So this module reads the rows from the source text. Help, checks of arguments and documentation use this module, so no
list is typed twice.
"""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

# The choices of settings, as types that `Preset` and the functions share.
Prediction = Literal["eps", "x0", "mu", "v"]
Variance = Literal["fixed_large", "fixed_small", "learned", "learned_range"]
TimestepSampling = Literal["uniform", "stratified", "lognormal", "lognormal_wide", "bound"]
Weighting = Literal["none", "min_snr", "p2"]
PixelType = Literal["uint8", "uint16", "float32"]
Fit = Literal["crop", "pad", "stretch", "random-crop"]
Precision = Literal["auto", "float32", "bf16"]
Workers = Literal["auto"] | int
Compile = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class Entry:
    """One row of a table.

    meaning   one line, which starts in lower case
    settings  the row's other values, as far as they are plain literals
    """

    meaning: str
    settings: Mapping[str, Any]


def samplers() -> dict[str, Entry]:
    """The samplers by name; settings are the fields of `samplers.Sampler`.

    >>> samplers()["ddim"].settings["steps"]
    50
    """
    return _table("samplers.py", "SAMPLERS")


def spacings() -> dict[str, Entry]:
    """How a sampler's levels can be spaced. `bound` needs a calibrated model, so `run.sample` adds it.

    >>> list(spacings())
    ['uniform', 'quadratic', 'log_snr', 'karras', 'bound']
    """
    bound = Entry("the levels of fewest bits for this model, which must be calibrated", {})
    return {**_table("spacing.py", "SPACINGS"), "bound": bound}


def schedules() -> dict[str, Entry]:
    """The noise schedules.

    >>> schedules()["cosine"].meaning[:13]
    'abar_t = f(t)'
    """
    return _table("schedule.py", "SCHEDULES")


def metrics() -> dict[str, Entry]:
    """What `ddpm evaluate --metrics` measures."""
    return _table("run/evaluate.py", "LIKELIHOODS") | fidelity_metrics() | quality_metrics()


def fidelity_metrics() -> dict[str, Entry]:
    """How close samples of a model with a condition are to the images that the conditions were made of.

    >>> list(fidelity_metrics())
    ['psnr', 'ssim']
    """
    return _table("run/fidelity.py", "FIDELITY")


def quality_metrics() -> dict[str, Entry]:
    """What `ddpm compare --metrics` measures: sample quality.

    >>> list(quality_metrics())
    ['fid', 'is', 'kid', 'pr']
    """
    return _table("run/quality.py", "METRICS")


def conditions() -> dict[str, Entry]:
    """The kinds of condition on an image; settings are the fields of `conditions.Kind`.

    >>> list(conditions())
    ['lowres', 'grey', 'mask', 'pairs']
    """
    return _table("conditions.py", "CONDITIONS")


def masks() -> dict[str, Entry]:
    """The laws of masks.

    >>> list(masks())
    ['half', 'box', 'dots']
    """
    return _table("conditions.py", "LAWS")


def accepted_conditions() -> str:
    """The kinds of condition and their arguments as one phrase, for help and errors.

    >>> accepted_conditions()
    'none, lowres:N, grey, mask:LAW (half, box, dots) or pairs'
    """
    named = {"LAW": f"LAW ({', '.join(masks())})"}
    words = [
        f"{kind}:{named.get(a, a)}" if (a := row.settings.get("argument")) else kind
        for kind, row in conditions().items()
    ]
    return f"{', '.join(['none', *words[:-1]])} or {words[-1]}"


def experiments() -> dict[str, Entry]:
    """The paper's tables and figures that `ddpm paper` makes."""
    return _table("run/paper.py", "EXPERIMENTS")


def trackers() -> dict[str, Entry]:
    """Where `ddpm train --track` can send its curves.

    >>> list(trackers())
    ['wandb', 'mlflow', 'tensorboard']
    """
    return _table("run/track.py", "TRACKERS")


def accepted_trackers() -> str:
    """The trackers as one phrase, for help.

    >>> accepted_trackers()[:23]
    'wandb (Weights & Biases'
    """
    return ", ".join(f"{name} ({entry.meaning})" for name, entry in trackers().items())


def sources() -> dict[str, Entry]:
    """Where images can come from, in the order in which `files.data` tries to recognise a SOURCE."""
    return _table("files/data/sources.py", "SOURCES")


def accepted_sources() -> str:
    """The sources as one phrase, for help and errors.

    >>> accepted_sources().startswith("digits, ")
    True
    """
    *first, last = (entry.meaning for entry in sources().values())
    return f"{', '.join(first)} or {last}"


def describe(entries: Mapping[str, Entry]) -> str:
    """The entries as a table for help, one indented line each.

    >>> print(describe({"a": Entry("the first", {}), "bcd": Entry("the second", {})}))
      a    the first
      bcd  the second
    """
    width = max(map(len, entries))
    return "\n".join(f"  {name:<{width}}  {entry.meaning}" for name, entry in entries.items())


@cache
def _table(file: str, name: str) -> dict[str, Entry]:
    """The literal dict `name` of a source file: its keys, with each value's literal arguments.

    A value is `function` or `Row(function, ..., key=literal)`. Its meaning is the argument `meaning`, or else the first
    line of the function's docstring.
    """
    tree = ast.parse((Path(__file__).parent / file).read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        target = node.target if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [None])[0]
        if isinstance(target, ast.Name) and target.id == name:
            table = node.value  # type: ignore[attr-defined]
            assert isinstance(table, ast.Dict), f"{file}: {name} is not a literal dict"
            rows = zip(map(ast.literal_eval, table.keys), table.values, strict=True)  # type: ignore[arg-type]
            return {key: _entry(value, functions) for key, value in rows}
    raise AssertionError(f"{file}: no table {name}")


def _entry(value: ast.expr, functions: Mapping[str, ast.FunctionDef]) -> Entry:
    settings, first = {}, value
    if isinstance(value, ast.Call):
        first = value.args[0]
        for keyword in value.keywords:
            try:
                settings[keyword.arg or ""] = ast.literal_eval(keyword.value)
            except ValueError:
                continue  # not a literal
    meaning = settings.pop("meaning", None)
    if meaning is None:
        docstring = ast.get_docstring(functions[first.id]) if isinstance(first, ast.Name) else None
        assert docstring, f"{ast.unparse(value)}: no meaning"
        meaning = docstring.splitlines()[0].removesuffix(".")
        meaning = meaning if meaning[:2].isupper() else meaning[0].lower() + meaning[1:]
    return Entry(meaning, settings)

"""Write a run as one HTML file to look at, keep or send, from the files that the run left on disk.

The page loads nothing from elsewhere and has no scripts. A missing file is left out. A damaged file is left out, and a
line says so.
"""

import base64
import csv
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from html import escape
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import numpy as np

from ddpm.errors import InputError, brief, parse_json
from ddpm.files import atomic, images
from ddpm.files.plots import Panel, draw
from ddpm.run import log
from ddpm.version import __version__

LIMIT = 20_000_000
"""Bytes of a page. A page that would be larger has only the newest grid of samples."""

POINTS = 1000
"""Most values of a curve that are drawn, evenly spaced."""

_STYLE = """
:root { color-scheme: light dark; --ink: #222; --pale: #666; --rule: #ddd; --ground: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ddd; --pale: #999; --rule: #444; --ground: #1a1a1a }
  svg { filter: invert(0.9) hue-rotate(180deg) }
}
body { margin: 0 auto; padding: 1rem; max-width: 72rem; overflow-wrap: anywhere;
  color: var(--ink); background: var(--ground); font: 15px/1.5 system-ui, sans-serif }
h2 { margin-top: 2.5rem; padding-top: 0.5rem; border-top: 1px solid var(--rule) }
h1 small, figcaption, summary { color: var(--pale); font-weight: normal }
.facts, .curves, .grids { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)) }
.curves { grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)) }
.facts b { display: block; font-size: 1.4rem }
svg, img { max-width: 100%; height: auto } svg { width: 40rem } .large img { width: 40rem } .grids img { width: 100% }
figure { margin: 0 0 1rem } .pixels { image-rendering: pixelated }
.left-out { padding-left: 0.5rem; border-left: 3px solid #d55e00 } pre { white-space: pre-wrap }
.wide { overflow-x: auto } .settings { columns: 17rem } .settings .wide { overflow: visible }
.settings table { overflow-wrap: anywhere }
table { border-collapse: collapse; font-size: 13px; overflow-wrap: normal } tr { break-inside: avoid }
td, th { padding: 0.1rem 0.9rem 0.1rem 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top;
  font-variant-numeric: tabular-nums }
"""

Lines: TypeAlias = Sequence[Mapping[str, Any]]
Curve: TypeAlias = tuple[Sequence[float], Sequence[float]]


def report(run: Path) -> Path:
    """Write RUN/report.html from the files under RUN, and return its path. The same files give the same bytes.

    The page shows the settings (config.json), curves (metrics.jsonl), grids of samples, evaluations, and the results in
    RUN/paper. Of a path in the settings it shows only the last part, because a report gets shared. Raises InputError if
    `run` is not a run folder.

    >>> report(Path("runs/nothing"))
    Traceback (most recent call last):
    ...
    ddpm.errors.InputError: runs/nothing: no such file or folder; want a run folder
    """
    if not (run / "config.json").is_file():
        raise InputError(f"{run}: {'not a run' if run.exists() else 'no such file or folder'}; want a run folder")
    lines = log.read(run / "metrics.jsonl")
    body = [_overview(run, lines), _training(lines), _samples(run), _evaluations(run), _paper(run)]
    if sum(map(len, body)) > LIMIT:
        body[2] = _samples(run, earlier=0)
    name, number = escape(run.resolve().name), itertools.count()

    def own_ids(svg: re.Match[str]) -> str:
        return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>c{next(number)}-", svg[0])

    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{name} <small>a run of ddpm {__version__}</small></h1>\n"
        f"{re.sub(r'(?s)<svg .*?</svg>', own_ids, ''.join(body))}</body>\n</html>\n"
    )
    atomic.write(run / "report.html", page)
    return run / "report.html"


# -- the sections; a section is empty if its files are missing --------------------------------------------------------


def _overview(run: Path, lines: Lines) -> str:
    steps, losses, seconds = ([v for v in _series(lines, key)[1] if v == v] for key in ("step", "loss", "seconds"))
    held_out = [(v, step) for step, v in zip(*_series(lines, "held_out"), strict=True) if v == v]
    facts = [("steps", f"{max(steps):,.0f}")] if steps else []
    facts += [("last loss", f"{losses[-1]:.4g}")] if losses else []
    facts += [("best held-out loss, step {1:,.0f}".format(*best), f"{best[0]:.4g}") for best in sorted(held_out)[:1]]
    facts += [("training time, h:min", f"{int(s) // 3600}:{int(s) // 60 % 60:02}") for s in seconds[-1:]]
    cells = "".join(f"<div><b>{escape(value)}</b>{escape(name)}</div>\n" for name, value in facts)
    config = run / "config.json"
    table = _html_or_note(run, config, partial(_values, config))
    return f'<div class="facts">\n{cells}</div>\n<h2>Settings</h2>\n<div class="settings">{table}</div>\n'


def _training(lines: Lines) -> str:
    loss, simple = _series(lines, "loss"), "L_simple"
    smoothed = {"smoothed": (loss[0], _smooth(loss[1]))} if len(loss[0]) >= 20 else {}
    faint = ["logged"] if smoothed else []
    curves = _curves(
        Panel("Training loss", {"logged": loss, **smoothed}, "step", "loss", log_y=True, faint=faint),
        Panel("Held-out loss", {"held out": _series(lines, "held_out")}, "step", simple, log_y=True),
        Panel("Held-out loss by level", _by_level(lines), "step", simple, log_y=True),
        Panel("Gradient norm", {"norm": _series(lines, "grad_norm")}, "step", "L2 norm, before clipping", log_y=True),
        Panel("Learning rate", {"rate": _series(lines, "lr")}, "step", "learning rate"),
        Panel("Speed", {"speed": _series(lines, "images_per_second")}, "step", "images/s"),
    )
    return f"<h2>Training</h2>\n{curves}" if curves else ""


def _by_level(lines: Lines) -> dict[str, Curve]:
    """The curves of held_out_by_level, one per range of t; the ranges are equal, and the lowest comes first."""
    rows = [(line["step"], v) for line in lines if isinstance(v := line.get("held_out_by_level"), list)]
    n, steps = max((len(values) for _, values in rows), default=0), [step for step, _ in rows]
    names = [f"t/T {i / n:.2g}–{(i + 1) / n:.2g}" for i in range(n)]
    return {name: (steps, [_number(v[i]) if i < len(v) else math.nan for _, v in rows]) for i, name in enumerate(names)}


def _samples(run: Path, earlier: int = 6) -> str:
    """The newest grid of samples, large, and `earlier` grids, evenly chosen from the others."""
    paths = sorted((p for p in _files(run, "samples/*.png") if p.stem.isdecimal()), key=lambda p: int(p.stem))
    if not paths:
        return ""
    n = min(earlier, len(paths) - 1)
    chosen = [paths[round(i * (len(paths) - 2) / max(1, n - 1))] for i in range(n)]
    newest, *others = (
        _html_or_note(run, p, partial(_picture, p, f"step {int(p.stem):,}")) for p in [paths[-1], *chosen]
    )
    return f'<h2>Samples</h2>\n<div class="large">{newest}</div>\n<div class="grids">{"".join(others)}</div>\n'


def _evaluations(run: Path) -> str:
    parts = []
    for path in _files(run, "evaluate/*/*.json", "evaluate/*/*.csv"):
        parts.append(f"<h3>{escape(path.relative_to(run / 'evaluate').as_posix())}</h3>\n")
        parts.append(_html_or_note(run, path, partial(_values if path.suffix == ".json" else _bound, path)))
    return "".join(["<h2>Evaluation</h2>\n", *parts]) if parts else ""


def _bound(path: Path) -> str:
    """The bound's terms by level, and rate against distortion: the bits of x_t and the error of its x0^ (Figure 5)."""
    header, *rows = _csv(path)
    try:
        table = {name: np.array([float(row[i]) for row in rows]) for i, name in enumerate(header)}
        names = ("t", "term_bits_per_dim", "rate_bits_per_dim", "rmse_grey_levels")
        t, term, rate, error = (table[name].tolist() for name in names)
    except (KeyError, IndexError):
        raise ValueError("not what `ddpm evaluate` writes: a column is missing or a row is short") from None
    return _curves(
        Panel("The bound, level by level", {"term": (t, term)}, "noise level t", "bits/dim", log_y=True),
        Panel("Rate and distortion", {"x_t": (rate, error)}, "rate, bits/dim", "RMSE, grey levels"),
    )


def _paper(run: Path) -> str:
    kinds: dict[str, Callable[[Path], str]] = {".json": _values, ".png": _picture}
    kinds[".csv"] = lambda path: _table(_csv(path), header=True)
    kinds[".md"] = kinds[".txt"] = lambda path: f"<pre>{escape(path.read_text('utf-8'))}</pre>\n"
    parts = []
    for path in _files(run, "paper/*", "paper/*/*"):  # deeper folders are other runs
        if path.suffix in kinds:
            parts.append(f"<h3>{escape(path.relative_to(run / 'paper').as_posix())}</h3>\n")
            parts.append(_html_or_note(run, path, partial(kinds[path.suffix], path)))
    return "".join(["<h2>Tables and figures of the paper</h2>\n", *parts]) if parts else ""


# -- reading -----------------------------------------------------------------------------------------------------------


def _files(run: Path, *patterns: str) -> list[Path]:
    """The files that match, sorted, without hidden ones. Files that are half written are hidden, too."""
    paths = {p for pattern in patterns for p in run.glob(pattern) if p.is_file()}
    return sorted(p for p in paths if not any(part.startswith(".") for part in p.relative_to(run).parts))


def _html_or_note(run: Path, path: Path, make: Callable[[], str]) -> str:
    """The HTML that `make` returns for a file; nothing if the file is missing, and a note if it cannot be read."""
    try:
        return make() if path.exists() else ""
    except (ValueError, OSError, csv.Error, RecursionError) as fault:
        reason = fault.strerror or "cannot be read" if isinstance(fault, OSError) else brief(fault)
        return f'<p class="left-out">{escape(path.relative_to(run).as_posix())} is left out: {escape(reason)}</p>\n'


def _csv(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file, strict=True) if row]
    if not rows:
        raise ValueError("empty file, want rows")
    return rows


def _number(value: Any) -> float:
    """A JSON number as a float; nan for everything else."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else math.nan


def _series(lines: Lines, key: str) -> Curve:
    """(steps, values) of the lines that have the key."""
    points = [(line["step"], _number(line[key])) for line in lines if key in line]
    return [step for step, _ in points], [value for _, value in points]


# -- writing -----------------------------------------------------------------------------------------------------------


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean over 4% of the curve on each side; near the start, where curves are steep, over a smaller window."""
    y, i, n = np.array(values), np.arange(len(values)), len(values)
    reach = np.minimum(i, max(1, n // 25))
    low, high = i - reach, np.minimum(n, i + reach + 1)
    known = np.isfinite(y)
    total, count = (np.concatenate([[0.0], np.cumsum(v)]) for v in (np.where(known, y, 0), known))
    with np.errstate(invalid="ignore"):
        means: list[float] = ((total[high] - total[low]) / (count[high] - count[low])).tolist()
    return means


def _curves(*panels: Panel) -> str:
    """One picture per panel, so that they stack on a phone. Curves without values, and panels without curves, go."""
    figures = []
    for panel in panels:
        lines = {}
        for label, (x, y) in panel.lines.items():
            if np.isfinite(np.array(y)).any():
                stride = math.ceil(len(x) / POINTS)
                lines[label] = x[::-stride][::-1], y[::-stride][::-1]  # with the last value
        if lines:
            svg = draw([replace(panel, lines=lines)], format="svg").decode()
            svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg[svg.index("<svg") :])
            figures.append(svg.replace("<svg", f'<svg role="img" aria-label="{escape(panel.title)}"', 1))
    return f'<div class="curves">\n{"".join(figures)}</div>\n' if figures else ""


def _picture(path: Path, caption: str = "") -> str:
    data = path.read_bytes()
    image = images.read(data)  # raises if the file is damaged
    small = ' class="pixels"' if image.width <= 640 else ""
    return (
        f'<figure><img{small} width="{image.width}" height="{image.height}" alt="{escape(path.stem)}" '
        f'src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>\n"
    )


def _values(path: Path) -> str:
    """A JSON object as a table of two columns."""
    values = parse_json(path.read_bytes())
    if not isinstance(values, dict):
        raise ValueError("want a JSON object")
    return _table(_flat(values))


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """(name, value as text) of each value; the name of a nested value is its path with dots."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield above + name, _text(value)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value[:12])) + (f", ... ({len(value)} in all)" if len(value) > 12 else "")
    if isinstance(value, dict):
        return "; ".join(" ".join(pair) for pair in _flat(value))
    if isinstance(value, str):
        return PurePosixPath(value.replace("\\", "/")).name  # only the last part of a path
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value)


def _table(rows: Iterable[Sequence[str]], header: bool = False) -> str:
    """Rows of text as a table, which is folded up if it has more than 60 rows."""
    lines = [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows]
    if header:
        lines[0] = lines[0].replace("td>", "th>")
    table = f'<div class="wide"><table>\n{"".join(lines)}</table></div>\n'
    return f"<details><summary>{len(lines):,} rows</summary>{table}</details>\n" if len(lines) > 60 else table

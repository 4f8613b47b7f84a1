"""The tab Runs: what runs write while they train, read only."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from ddpm.errors import InputError, parse_json, suggestion
from ddpm.page.state import State
from ddpm.run import log

POINTS = 500
"""Values of a curve that are sent at most, evenly spaced."""

FILES = (
    "report.html", "config.json", "metrics.jsonl", "held_out.json", "samples/*.png", "evaluate/*/*.json",
    "evaluate/*/*.csv", "paper/*.png", "paper/*.json", "paper/*.csv", "paper/*.md", "paper/*.txt",
)  # fmt: skip
"""The files of a run that the page links to."""

KINDS = {".html": "text/html", ".png": "image/png"}
"""Media types; every other file is shown as text."""

REPORT = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What a report may do: it brings its styles and pictures, and has no scripts."""


def routes(state: State) -> list[Route]:
    def find(request: Request) -> Path:
        runs, name = {str(folder): folder for folder in state.run_folders()}, request.query_params.get("run", "")
        if name not in runs:
            raise InputError(f"run {name!r:.80}: {suggestion(name, runs)}want {', '.join(runs) or 'one that exists'}")
        return runs[name]

    def listed(request: Request) -> Response:
        folders = sorted(state.run_folders(), key=_changed, reverse=True)
        return JSONResponse({"runs": list(map(str, folders)), "folder": str(state.runs)})

    def one(request: Request) -> Response:
        run = find(request)
        files = files_of(run)
        stamp = f"{_changed(run)}-{len(files)}"
        about = {"stamp": stamp, "age": max(0.0, time.time() - _changed(run))}
        if stamp != request.query_params.get("seen"):
            about |= {"files": list(files), **summary(run)}
        return JSONResponse(about)

    def file(request: Request) -> Response:
        files, name = files_of(find(request)), request.query_params.get("file", "")
        if name not in files:
            raise InputError(f"file {name!r:.80}: the run has no such file for the page")
        kind = KINDS.get(files[name].suffix, "text/plain")
        return FileResponse(
            files[name], media_type=kind, headers={"Content-Security-Policy": REPORT} if kind == "text/html" else {}
        )

    return [Route("/api/runs", listed), Route("/api/runs/one", one), Route("/api/runs/file", file)]


def files_of(run: Path) -> dict[str, Path]:
    """The files of a run that may be seen, by their names under the run's folder. Half-written ones are hidden."""
    paths = [path for pattern in FILES for path in sorted(run.glob(pattern)) if path.is_file()]
    names = {path.relative_to(run).as_posix(): path for path in paths}
    return {name: path for name, path in names.items() if "/." not in f"/{name}"}


def summary(run: Path) -> dict[str, Any]:
    """The settings' number of steps, and the curves of a run: each is named lines of steps and values."""
    lines = log.read(run / "metrics.jsonl")
    try:
        steps = parse_json((run / "config.json").read_bytes())["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        steps = None
    keys = {"loss": "loss", "held_out": "held out", "images_per_second": "images/s"}
    curves = {key: {label: curve(lines, key)} for key, label in keys.items()}
    curves["held_out_by_level"] = {}
    rows = [(line["step"], v) for line in lines if isinstance(v := line.get("held_out_by_level"), list)]
    n = max((len(values) for _, values in rows), default=0)
    for i in range(n):
        level = [{"step": step, "value": values[i]} for step, values in rows if i < len(values)]
        curves["held_out_by_level"][f"t/T {i / n:.2g} to {(i + 1) / n:.2g}"] = curve(level, "value")
    last = lines[-1] if lines else {}
    return {"steps": steps, "step": last.get("step"), "seconds": _last(lines, "seconds"), "curves": curves}


def curve(lines: Sequence[Mapping[str, Any]], key: str) -> list[list[float]]:
    """[steps, values] of the lines that have a finite number under the key, POINTS at most, with the last."""
    points = [
        (line["step"], float(value))
        for line in lines
        if isinstance(value := line.get(key), int | float) and math.isfinite(value)
    ]
    points = points[:: -max(1, math.ceil(len(points) / POINTS))][::-1]
    return [[step for step, _ in points], [value for _, value in points]]


def _last(lines: Sequence[Mapping[str, Any]], key: str) -> Any:
    return next((line[key] for line in reversed(lines) if line.get(key) is not None), None)


def _changed(run: Path) -> float:
    """When the run last wrote a line of its log, or else its settings, seconds of the system's clock."""
    times = [file.stat().st_mtime for file in (run / "metrics.jsonl", run / "config.json") if file.is_file()]
    return times[0] if times else 0.0

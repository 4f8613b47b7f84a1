"""What a run writes while it trains: config.json, held_out.json and metrics.jsonl, which trackers get, too."""

import errno
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from ddpm.errors import Stopped, one_line, parse_json
from ddpm.files import atomic
from ddpm.files.data import Images
from ddpm.presets import Preset, to_json
from ddpm.run import track
from ddpm.run.processes import Processes

Log = Callable[[int, dict[str, Any]], None]
"""log(step, values) writes one line of metrics.jsonl."""

OnLog = Callable[[dict[str, Any]], None]
"""A caller's function, which gets each line of metrics.jsonl as a dict."""


@contextmanager
def metrics(out: Path, step: int, preset: Preset, ranks: Processes, on_log: OnLog | None = None) -> Iterator[Log]:
    """Write config.json, cut RUN/metrics.jsonl back to `step`, and give the function that adds lines to it.

    On other processes than a writer the function does nothing. `on_log` and the tracker get each line that the first
    process adds. Raises Stopped if a file cannot be written.
    """
    if not ranks.writes:
        yield lambda *_: None
        return
    path = out / "metrics.jsonl"
    before = [values for values in read(path) if values["step"] <= step] if step else []
    try:
        atomic.write_json(out / "config.json", to_json(preset))
        write(path, before)
    except OSError as error:
        raise Stopped(f"cannot write to {out}: {reason(error)}") from error
    name = preset.track if ranks.first else "none"
    on_log = on_log if ranks.first else None
    with path.open("ab", buffering=0) as file, track.tracker(name, out, step, to_json(preset)) as send:

        def log(step: int, values: dict[str, Any]) -> None:
            try:
                line = _write_line(file, {"step": step, **values})
            except OSError as error:
                raise Stopped(f"step {step}: cannot write {path}: {reason(error)}") from error
            for listener in filter(None, (send, on_log)):
                listener(line)

        yield log


def write(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write all lines of metrics.jsonl anew. Raises OSError if that fails."""
    atomic.write(path, "".join(json.dumps(values) + "\n" for values in lines))


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, of which each has a step; without those that are damaged.

    A killed process may leave half a line, and a reader may find one that is being written. Raises OSError if the file
    exists and cannot be read.
    """
    lines = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(ValueError):
            values = parse_json(line)
            if isinstance(values, dict) and type(values.get("step")) is int:
                lines.append(values)
    return lines


def write_held_out(out: Path, held_out: Images, ranks: Processes) -> None:
    """Write RUN/held_out.json: which images are not trained on. Those of a split of more than 1,000 are not named.

    Raises Stopped if the file cannot be written.
    """
    if not ranks.writes:
        return
    names = held_out.names() if len(held_out) <= 1000 else None  # `split_holdout` sets no more apart
    values = {"data": held_out.name, "split": held_out.split, "count": len(held_out), "images": names}
    try:
        atomic.write_json(out / "held_out.json", values)
    except OSError as error:
        raise Stopped(f"cannot write to {out}: {reason(error)}") from error


def say(ranks: Processes, line: str) -> None:
    """Print a line on stderr, above a progress bar, on the first process only."""
    if ranks.first:
        note(line)


def note(line: str) -> None:
    """Print a line on stderr, above a progress bar."""
    tqdm.write(one_line(line), file=sys.stderr)


def reason(error: OSError) -> str:
    """Why the system refused, in a few words."""
    if error.errno == errno.ENOSPC or "No space left" in str(error) or "os error 28" in str(error):
        return "the disk is full"
    return error.strerror or str(error)


def _write_line(file: BinaryIO, values: dict[str, Any]) -> dict[str, Any]:
    """Write one JSON object as a line, and return it. JSON has no NaN and no infinity, so these become null."""
    clean: dict[str, Any] = json.loads(json.dumps(values), parse_constant=lambda _: None)
    line = memoryview((json.dumps(clean) + "\n").encode())
    while line:  # if the disk has room for half a line, the first write writes only that half
        line = line[file.write(line) :]
    return clean

"""Measuring and recording, for all scripts here: repeats taken in turns, spread, and a JSON and a markdown file.

Every script takes --repeats, --seconds, --threads, --plain and --out, and leaves NAME_MACHINE_DATE.json and .md.
"""

import argparse
import functools
import inspect
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import torch
from figures import Spread, spread
from figures import table as table
from machine import hardware, versions

from ddpm import kernels
from ddpm.files import atomic

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


def plain() -> AbstractContextManager[None]:
    """Within it the network runs on PyTorch's own operations: what `--plain` measures."""
    return kernels.disabled()


def same_settings(work: Path, settings: Mapping[str, Any]) -> None:
    """Leaves the settings in a folder that keeps parts; ends the script where these are of others."""
    file = work / "settings.json"
    if file.exists() and json.loads(file.read_text()) != settings:
        raise SystemExit(
            f"--work {work}: holds parts of other settings, {file.read_text().strip()}; want another folder"
        )
    work.mkdir(parents=True, exist_ok=True)
    atomic.write_json(file, settings)


# -- measuring ---------------------------------------------------------------------------------------------------------


class Timed(float):
    """Seconds that a case has measured itself: what it returns then counts, not its duration."""


Case = Callable[[], object]


def interleave(
    cases: Mapping[str, Case], repeats: int, seconds: float = 1.0, sync: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds a call, `repeats` of them for each case, taken in turns (a, b, c, a, b, c, ...): noise hits all alike.

    A case is a function that makes one call. It runs once to warm up, and a repeat is as many calls as take `seconds`.
    `sync` waits for the device.
    """
    calls, found = {}, {name: list[float]() for name in cases}
    for name, case in cases.items():
        first = case()
        calls[name] = 1 if isinstance(first, Timed) else max(1, math.ceil(seconds / _seconds(case, 1, sync)))
    for _ in range(repeats):
        for name, case in cases.items():
            found[name].append(_seconds(case, calls[name], sync))
    return found


def _seconds(case: Case, calls: int, sync: Callable[[], object]) -> float:
    sync()
    start = time.perf_counter()
    for _ in range(calls):
        last = case()
    sync()
    return float(last) if isinstance(last, Timed) else (time.perf_counter() - start) / calls


def ratio(found: Mapping[str, Sequence[float]], ours: str, theirs: str) -> Spread:
    """How many times faster `ours` is: the spread of the ratios of times that were taken in the same turn."""
    return spread(b / a for a, b in zip(found[ours], found[theirs], strict=True))


def fastest(found: Mapping[str, Sequence[float]], names: Iterable[str]) -> str:
    """The one of `names` with the least median time."""
    return min(names, key=lambda name: statistics.median(found[name]))


class Parts:
    """Where time goes: each part's own seconds, without the parts that it calls.

    >>> parts = Parts()
    >>> with parts("whole"), parts("piece"):
    ...     pass
    >>> sorted(parts.seconds)
    ['piece', 'whole']
    """

    def __init__(self, sync: Callable[[], object] = lambda: None) -> None:
        self.seconds: dict[str, float] = {}
        self._inside: list[str] = []
        self._since, self._sync = 0.0, sync

    def charge(self) -> None:
        """Count the time until now for the part that is under way."""
        self._sync()
        now = time.perf_counter()
        if self._inside:
            name = self._inside[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.charge()
        self._inside.append(name)
        try:
            yield
        finally:
            self.charge()
            self._inside.pop()

    @contextmanager
    def timing(self, *places: tuple[Any, str, str]) -> Iterator[None]:
        """Within it, calls of owner.attribute count for a part; `places` are (owner, attribute, part)."""
        before = [(owner, attribute, getattr(owner, attribute)) for owner, attribute, _ in places]
        for (owner, attribute, function), (_, _, part) in zip(before, places, strict=True):
            setattr(owner, attribute, self._wrapped(function, part))
        try:
            yield
        finally:
            for owner, attribute, function in before:
                setattr(owner, attribute, function)

    def _wrapped(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        if inspect.isgeneratorfunction(function):  # its time is that of what it yields

            @functools.wraps(function)
            def each(*args: Any, **kwargs: Any) -> Iterator[Any]:
                items, end = function(*args, **kwargs), object()
                while True:
                    with self(part):
                        item = next(items, end)
                    if item is end:
                        return
                    yield item

            return each

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(part):
                return function(*args, **kwargs)

        return timed


# -- recording ---------------------------------------------------------------------------------------------------------


def commit() -> str:
    """The commit that is measured; "(dirty)" where the code differs from it, "unknown" without git."""
    try:
        git = functools.partial(subprocess.check_output, cwd=ROOT, text=True, stderr=subprocess.DEVNULL)
        changed = git(["git", "status", "--porcelain", "--", "src", "benchmarks/*.py"]).strip()
        return git(["git", "rev-parse", "--short", "HEAD"]).strip() + (" (dirty)" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine(device: str = "cpu") -> str:
    """A word for file names: the cores, or the GPU."""
    if device.startswith("cuda"):
        return re.sub(r"\W+", "-", torch.cuda.get_device_name(device).lower()).removeprefix("nvidia-").strip("-")
    return f"{os.cpu_count()}core" + ("-amx" if torch.cpu.get_capabilities().get("amx_bf16") else "")


def parser(description: str | None, repeats: int = 5, seconds: float = 1.0) -> argparse.ArgumentParser:
    """With the options that all scripts have."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeats", type=int, default=repeats, help="of every figure, taken in turns (%(default)s)")
    p.add_argument("--seconds", type=float, default=seconds, help="of work a repeat, at least (%(default)s)")
    p.add_argument("--threads", type=int, help="of PyTorch (its own choice)")
    p.add_argument("--plain", action="store_true", help="ours on PyTorch's own operations only")
    p.add_argument("--out", type=Path, default=RESULTS, help="folder of the record (%(default)s)")
    return p


@contextmanager
def measuring(args: argparse.Namespace) -> Iterator[None]:
    """What --threads and --plain mean."""
    if args.threads:
        torch.set_num_threads(args.threads)
    with plain() if args.plain else nullcontext():
        yield


def write(
    name: str, title: str, args: argparse.Namespace, values: Mapping[str, Any], text: str, device: str = "cpu",
    repeated: bool = True,
) -> Path:  # fmt: skip
    """Write NAME_MACHINE_DATE.json and .md into args.out, and say where; `values` is JSON, `text` markdown.

    repeated: whether the figures are medians over args.repeats.
    """
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "data", "quality", "peer")}  # not the paths
    about = {
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions(),
        "commit": commit(),
        "date": str(date.today()),
        "settings": settings,
    }
    packages = ", ".join(f"{k} {v}" for k, v in versions().items())
    path = args.out / f"{name}_{machine(device)}_{date.today()}"
    args.out.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps({"name": name, **about, **values}, indent=1) + "\n")
    repeats = f"{args.repeats} repeats taken in turns"
    repeats += f", each of at least {args.seconds:g} s" if args.seconds else ""
    repeats = f"{repeats}; figures are the median (least - most)" if repeated and args.repeats > 1 else "one run"
    given = " ".join(Path(word).name for word in sys.argv[1:])  # without the machine's folders
    mode = "; ours on PyTorch's own operations (--plain)" if args.plain else ""
    head = (
        f"# {title}\n\n- hardware: {about['hardware']}; threads {about['threads']}\n"
        f"- versions: {packages}, Python {about['python']}; commit {about['commit']}; {about['date']}\n"
        f"- {repeats}{mode}\n"
        f"- `python benchmarks/{Path(sys.argv[0]).name} {given}`\n\n"
    )
    path.with_suffix(".md").write_text(head + text.rstrip() + "\n")
    print(head + text, flush=True)
    print(f"written: {path}.json, .md", file=sys.stderr)
    return path.with_suffix(".md")

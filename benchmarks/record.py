"""Records: where and from which code figures come, the options that all scripts share, and the files.

Every script of this folder takes --repeats, --seconds, --threads, --plain and --out. It writes NAME_MACHINE_DATE.json
and NAME_MACHINE_DATE.md.
"""

import argparse
import functools
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import ddpm
from ddpm import kernels
from ddpm.files import atomic

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"


# -- provenance --------------------------------------------------------------------------------------------------------


def hardware() -> str:
    """Processor, cores, memory and the accelerator, in words."""
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    processor = match[1] if match else platform.processor() or platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    amx = ", AMX bf16" if torch.cpu.get_capabilities().get("amx_bf16") else ""
    gpu = f"; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor}, {os.cpu_count()} cores{amx}, {memory:.0f} GiB{gpu}"


def versions() -> dict[str, str]:
    """The versions of this package, torch, numpy and, if it is installed, diffusers."""
    result = {"ddpm": ddpm.__version__, "torch": torch.__version__}
    for name in ("numpy", "diffusers"):
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return result


def commit(checkout: Path = ROOT) -> str:
    """The commit of the checkout; "(dirty)" follows if the code differs from it. "unknown" without git."""
    try:
        git = functools.partial(subprocess.check_output, cwd=checkout, text=True, stderr=subprocess.DEVNULL)
        changed = git(["git", "status", "--porcelain", "--", "src", "benchmarks/*.py", "experiments/*.py"]).strip()
        return git(["git", "rev-parse", "--short", "HEAD"]).strip() + (" (dirty)" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def provenance() -> dict[str, Any]:
    """Hardware, threads, versions, commit and date of a measurement, as JSON values."""
    return {
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions(),
        "commit": commit(),
        "date": str(date.today()),
    }


def header(about: Mapping[str, Any], repeats: str = "") -> str:
    """The first two lines of a record in markdown: what `provenance` says, and a note about repeats."""
    packages = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"- hardware: {about['hardware']}; threads {about['threads']}\n"
        f"- versions: {packages}, Python {about['python']}; commit {about['commit']}; {about['date']}"
        + (f"; {repeats}" if repeats else "")
    )


def machine(device: str = "cpu") -> str:
    """A word for file names: the number of cores, or the GPU."""
    if device.startswith("cuda"):
        return re.sub(r"\W+", "-", torch.cuda.get_device_name(device).lower()).removeprefix("nvidia-").strip("-")
    return f"{os.cpu_count()}core" + ("-amx" if torch.cpu.get_capabilities().get("amx_bf16") else "")


# -- options and files -------------------------------------------------------------------------------------------------


def parser(description: str | None, repeats: int = 5, seconds: float = 1.0) -> argparse.ArgumentParser:
    """A parser with the options that all scripts have."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeats", type=int, default=repeats, help="repeats of each figure, in turns (%(default)s)")
    p.add_argument("--seconds", type=float, default=seconds, help="least duration of a repeat (%(default)s)")
    p.add_argument("--threads", type=int, help="threads of PyTorch (PyTorch's choice)")
    p.add_argument("--plain", action="store_true", help="run our network on PyTorch's own operations only")
    p.add_argument("--out", type=Path, default=RESULTS, help="folder for the record (%(default)s)")
    return p


@contextmanager
def measuring(args: argparse.Namespace) -> Iterator[None]:
    """Apply --threads and --plain while the context is open."""
    if args.threads:
        torch.set_num_threads(args.threads)
    with kernels.disabled() if args.plain else nullcontext():
        yield


def same_settings(work: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings into a folder of finished parts. SystemExit if the folder belongs to other settings."""
    file = work / "settings.json"
    if file.exists() and json.loads(file.read_text()) != settings:
        raise SystemExit(
            f"--work {work}: holds parts of other settings, {file.read_text().strip()}; want another folder"
        )
    work.mkdir(parents=True, exist_ok=True)
    atomic.write_json(file, settings)


def command() -> str:
    """The command of this process for a record: file names without the folders of this machine."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else script.name
    return " ".join(["python", name, *(Path(word).name for word in sys.argv[1:])])


def write(
    name: str, title: str, args: argparse.Namespace, values: Mapping[str, Any], text: str, device: str = "cpu",
    repeated: bool = True,
) -> Path:  # fmt: skip
    """Write NAME_MACHINE_DATE.json and .md into args.out and print the text. Returns the path of the .md file.

    values: JSON values. text: markdown. repeated: whether the figures are medians over args.repeats.
    """
    paths = ("out", "data", "quality", "peer")  # a record does not name folders of this machine
    settings = {key: value for key, value in vars(args).items() if key not in paths}
    about = provenance()
    path = args.out / f"{name}_{machine(device)}_{date.today()}"
    args.out.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(
        json.dumps({"name": name, **about, "settings": settings, **values}, indent=1) + "\n"
    )
    repeats = f"{args.repeats} repeats taken in turns"
    repeats += f", each of at least {args.seconds:g} s" if args.seconds else ""
    repeats = f"{repeats}; figures are the median (least - most)" if repeated and args.repeats > 1 else "one run"
    plain = "; ours on PyTorch's own operations (--plain)" if args.plain else ""
    head = f"# {title}\n\n{header(about)}\n- {repeats}{plain}\n- `{command()}`\n\n"
    path.with_suffix(".md").write_text(head + text.rstrip() + "\n")
    print(head + text, flush=True)
    print(f"written: {path}.json, .md", file=sys.stderr)
    return path.with_suffix(".md")

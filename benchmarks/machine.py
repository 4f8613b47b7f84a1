"""What a record says of where and when it was measured."""

import os
import platform
import re
from datetime import date
from importlib import metadata
from pathlib import Path

import torch

import ddpm


def hardware() -> str:
    """Processor or accelerator, cores and memory in words."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    model = found[1] if found else platform.processor() or platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    extra = ", AMX bf16" if torch.cpu.get_capabilities().get("amx_bf16") else ""
    gpu = f"; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{model}, {os.cpu_count()} cores{extra}, {memory:.0f} GiB{gpu}"


def versions() -> dict[str, str]:
    """Of this package and of those that figures depend on, where they are installed."""
    found = {"ddpm": ddpm.__version__, "torch": torch.__version__}
    for name in ("numpy", "diffusers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return found


def header(commit: str, repeats: str) -> str:
    """The first two lines of a record, in markdown."""
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    return (
        f"- hardware: {hardware()}; threads {torch.get_num_threads()}\n"
        f"- versions: {packages}, Python {platform.python_version()}; commit {commit}; {date.today()}; {repeats}"
    )

"""What a record says of where and when it was measured."""

import os
import platform
import re
from datetime import date
from pathlib import Path

import numpy
import torch

import ddpm


def hardware() -> str:
    """Processor or accelerator, cores and memory in words."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text())[1] if cpuinfo.exists() else platform.processor()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    extra = ", AMX bf16" if torch.cpu.get_capabilities().get("amx_bf16") else ""
    gpu = f"; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{model}, {os.cpu_count()} cores{extra}, {memory:.0f} GiB{gpu}"


def header(commit: str, repeats: str) -> str:
    """The first two lines of a record, in markdown."""
    return (
        f"- hardware: {hardware()}; threads {torch.get_num_threads()}\n"
        f"- versions: ddpm {ddpm.__version__}, torch {torch.__version__}, numpy {numpy.__version__}, "
        f"Python {platform.python_version()}; commit {commit}; {date.today()}; {repeats}"
    )

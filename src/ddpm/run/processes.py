"""One process or many under torchrun: the same few words for both."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ddpm.catalog import Precision
from ddpm.errors import InputError
from ddpm.files.models import Checkpoint, Weights
from ddpm.files.opening import open_checkpoint


@dataclass(frozen=True)
class Processes:
    """This process among `world` ones, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over processes, on every one; x is on the CPU."""
        if self.world > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return bool(self.total(torch.tensor(int(flag))) > 0)

    def interleave(self, x: Tensor, count: int) -> Tensor:
        """Rows rank::world of `count` rows, one part a process -> all rows [count, ...] in order; x is on the CPU."""
        if self.world == 1:
            return x
        most = -(-count // self.world)
        padded = torch.zeros(most, *x.shape[1:], dtype=x.dtype)
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return torch.stack(parts, dim=1).flatten(0, 1)[:count]

    def mine(self, count: int) -> range:
        """This process's share of 0..count-1."""
        return range(self.rank, count, self.world)


def pick_device(name: str, local_rank: int = 0, float64: bool = False) -> torch.device:
    """The device of that name; auto is the first of cuda, mps and cpu that this machine has.

    float64  the work needs this type, which mps does not have: auto does not pick mps then

    Raises InputError for a device that this machine does not have, or that cannot do the work.
    """
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name in ("auto", "cuda") and 0 < devices <= local_rank:
        raise InputError(f"process {local_rank} of torchrun: this machine has {devices} CUDA devices; want no more")
    if name == "auto":
        if devices:
            return torch.device("cuda", local_rank)
        return torch.device("mps" if torch.backends.mps.is_available() and not float64 else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name!r}: want auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda":
        if (device.index or 0) >= devices:
            raise InputError(f"device {name!r}: this machine has {devices} CUDA devices; want auto or cpu")
        return torch.device("cuda", local_rank if device.index is None else device.index)
    if device.type not in ("cpu", "mps") or (device.type == "mps" and not torch.backends.mps.is_available()):
        raise InputError(f"device {name!r}: this machine does not have it; want auto or cpu")
    if device.type == "mps" and float64:
        raise InputError(f"device {name!r}: has no float64, which likelihoods need; want auto or cpu")
    return device


def pick_precision(name: Precision, device: torch.device) -> Precision:
    """auto -> bf16 where the device multiplies bfloat16 matrices in hardware, else float32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type == "cpu":
        return "bf16" if torch.cpu.get_capabilities().get("amx_bf16") else "float32"
    return "float32"


def opened(
    path: str | Path, device: torch.device, weights: Weights = "ema", which: str = "last",
    precision: Precision | None = None,
) -> Checkpoint:  # fmt: skip
    """`open_checkpoint` for a device: in float32 where bf16 would only be slow, unless `precision` is given."""
    found = open_checkpoint(path, weights, which, precision)
    if precision is None and found.preset.precision == "bf16" and pick_precision("auto", device) != "bf16":
        return open_checkpoint(path, weights, which, "float32")
    return found


@contextmanager
def threads(work: int, device: torch.device) -> Iterator[None]:
    """On a CPU one thread inside where layers are small: `work`, values of a batch in the first level, below 2^18.

    There (the preset digits has 2^17) two threads take longer than one to finish a step beside any other work, and no
    less without; OMP_NUM_THREADS, where it is set, decides instead.
    """
    before = torch.get_num_threads()
    if device.type == "cpu" and work < 1 << 18 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def processes(device: str, float64: bool = False) -> Iterator[Processes]:
    """Join the others where torchrun started us, and leave them at the end; a group that is there already stays."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    picked = pick_device(device, int(os.environ.get("LOCAL_RANK", "0")), float64)
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
    joins = world > 1 and not dist.is_initialized()
    if joins:
        backend = "cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))  # the first may have much to measure alone
    try:
        yield Processes(rank, world, picked)
    finally:
        if joins:
            dist.destroy_process_group()

"""Devices, precision, threads, and the processes of torchrun: programs look the same with one process or many."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ddpm.catalog import Precision
from ddpm.errors import InputError, Stopped
from ddpm.files.models import Checkpoint, Weights
from ddpm.files.opening import open_checkpoint
from ddpm.run.group import Group, join, shared
from ddpm.unet import UNet, fast_bf16

PATIENCE = 600.0
"""Seconds after which a process is lost, where no setting says it."""


@dataclass(frozen=True)
class Processes:
    """This process, number `rank` of `world`, and its device.

    group   how it talks to the others, if there are others
    folder  the processes that see the same run folder, in order; empty: all
    """

    rank: int
    world: int
    device: torch.device
    group: Group | None = None
    folder: tuple[int, ...] = ()

    @property
    def first(self) -> bool:
        """Whether this is the process that prints, and writes what is written once."""
        return self.rank == 0

    @property
    def writes(self) -> bool:
        """Whether this process writes the run's folder. Nodes that share no disk have a writer each."""
        return self.rank == self.folder[0] if self.folder else self.first

    @property
    def inherits(self) -> bool:
        """Whether the process that writes the run's folder is lost, and this one is the next that lives."""
        gone = self.group.gone() if self.group else ()
        return not self.writes and self.rank == next(rank for rank in self.folder if rank not in gone)

    def exchange(self, value: Any = None) -> list[Any]:
        """Every process's value, plain JSON, in their order. It waits as long as all processes live."""
        return self.group.exchange(value) if self.group else [value]

    def together(self) -> AbstractContextManager[None]:
        """A context whose InputError on one process is raised on all."""
        return self.group.together() if self.group else nullcontext()

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over all processes, which every process gets. x is on the CPU."""
        if self.world > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return bool(self.total(torch.tensor(int(flag))) > 0)

    def interleave(self, x: Tensor, count: int) -> Tensor:
        """All `count` rows in order, [count, ...], from the rows that each process has: x holds rows `mine(count)`.

        x is on the CPU. Every process gets all rows.
        """
        if self.world == 1:
            return x
        if x.dtype == torch.uint16:  # which gloo does not know
            return self.interleave(x.contiguous().view(torch.uint8), count).view(torch.uint16)
        longest = -(-count // self.world)
        padded = torch.zeros(longest, *x.shape[1:], dtype=x.dtype)
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return torch.stack(parts, dim=1).flatten(0, 1)[:count]

    def mine(self, count: int) -> range:
        """This process's share of 0..count-1: every `world`-th number, from `rank` on."""
        return range(self.rank, count, self.world)


def pick_device(name: str, local_rank: int = 0, float64: bool = False) -> torch.device:
    """The device of that name; auto is the first of cuda, mps and cpu that this machine has.

    local_rank  the number of the CUDA device for auto and cuda: torchrun's number of this process on this machine
    float64     whether the work needs this type; mps does not have it, so auto does not pick mps then

    Raises InputError for a device that this machine does not have, or that has no float64 if that is needed.

    >>> pick_device("cpu")
    device(type='cpu')
    """
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name in ("auto", "cuda") and 0 < devices <= local_rank:
        raise InputError(
            f"process {local_rank} of torchrun: this machine has {devices} CUDA devices; want one process per device"
        )
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
    """Resolve auto: bf16 if the device multiplies bfloat16 matrices in hardware, else float32."""
    if name != "auto":
        return name
    return "bf16" if fast_bf16(device) else "float32"


def open_for_device(
    path: str | Path, device: torch.device, weights: Weights | None = None, which: str = "last",
    precision: Precision | None = None,
) -> Checkpoint:  # fmt: skip
    """Open a checkpoint for use on `device`; it stays on the CPU.

    weights    ema or raw; None is ema for a run, and for a file what it holds
    which      checkpoint of a run: last, best or a step
    precision  of the network; None is the run's own, but float32 if bf16 is slow on the device

    Raises InputError as `open_checkpoint` does, and for a file that does not hold the given `weights`.
    """
    checkpoint = open_checkpoint(path, weights or "ema", which, precision)
    if weights and checkpoint.weights != weights:
        raise InputError(f"weights {weights}: {checkpoint.path} holds the {checkpoint.weights} weights; want the run")
    if precision is None and checkpoint.preset.precision == "bf16" and pick_precision("auto", device) != "bf16":
        assert isinstance(checkpoint.denoiser.network, UNet)
        checkpoint.denoiser.network.bf16 = False
        return replace(checkpoint, preset=replace(checkpoint.preset, precision="float32"))
    return checkpoint


@contextmanager
def threads(work: int, device: torch.device) -> Iterator[None]:
    """A context that uses one CPU thread if layers are small; a set OMP_NUM_THREADS decides instead.

    work  the number of values that a batch has in the network's first level; below 2^18 layers are small

    For small layers (the preset digits has 2^17) a second thread never shortens a step, and it lengthens one if other
    programs use the CPU.
    """
    before = torch.get_num_threads()
    if device.type == "cpu" and work < 1 << 18 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def processes(device: str, float64: bool = False, timeout: float = PATIENCE) -> Iterator[Processes]:
    """A context in which this process has its device and, under torchrun, belongs to the group of all processes.

    A group that exists already is used and stays. `device` and `float64` are as in `pick_device`.

    timeout  seconds after which a process that gives no sign of life is lost, and a collective call fails. `exchange`
             waits as long as all live, so it comes before a collective call if processes may be late

    Raises Stopped if a process is lost, and on all processes the InputError of one.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if world == 1:
        picked = pick_device(device, local, float64)
        if picked.type == "cuda":
            torch.cuda.set_device(picked)
        yield Processes(rank, world, picked)
        return
    group, joins = join(rank, world, timeout), False
    try:
        with group.together():
            picked = pick_device(device, local, float64)
        if picked.type == "cuda":
            torch.cuda.set_device(picked)
        if joins := not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo"
            limit = timedelta(seconds=timeout)
            dist.init_process_group(backend, store=group.store, rank=rank, world_size=world, timeout=limit)
        yield Processes(rank, world, picked, group)
    except Exception as error:
        lost = group.explain(error)
        if lost is None and not hasattr(error, "shared"):
            code, line = 2 if isinstance(error, InputError) else 1, str(error)
            group.ended(code, line)
            if isinstance(error, (InputError, Stopped)):
                shared(error, not group.same(line))
        if joins and picked.type == "cuda":
            joins = False  # to end NCCL's group would wait for the lost process
        if lost is not None:
            raise lost from error
        raise
    finally:
        group.close()
        if joins:
            with suppress(RuntimeError):
                dist.destroy_process_group()


def tell(message: str) -> InputError:
    """The InputError of a command that failed before it joined the others, which know of it then.

    All processes that run the command may call it with the same message: the first one prints it.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    try:
        if world > 1:
            group = join(rank, world, PATIENCE)
            try:
                group.exchange(mistake=message)
            finally:
                group.close()
    except InputError as error:
        return error
    except Stopped:  # the others do not run
        pass
    return InputError(message)

"""Processes that train one run are compared before the first step, and at each checkpoint. A difference is one line."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ddpm.errors import InputError, Stopped
from ddpm.files import checkpoints
from ddpm.files.data import Images
from ddpm.presets import Preset, to_json
from ddpm.run.group import shared
from ddpm.run.processes import Processes
from ddpm.version import __version__

OWN = {"data", "pairs", "device", "compile", "workers", "cache_bytes"}
"""Settings that each process may have for itself; what it reads is compared by its fingerprint."""


class Differ(Stopped):
    """The weights of processes differ, so none of them is worth saving."""


def settings(preset: Preset, minutes: float | None, ranks: Processes) -> None:
    """Raise InputError on all processes if their settings or versions are not those of the first one."""
    mine = {name: value for name, value in to_json(preset).items() if name not in OWN}
    mine |= {"minutes": minutes is not None, "ddpm": __version__, "torch": torch.__version__.partition("+")[0]}
    everyone = ranks.exchange(mine)
    first = everyone[0]
    for rank, other in enumerate(everyone):
        if names := [name for name in first.keys() | other.keys() if first.get(name) != other.get(name)]:
            name, *more = sorted(names, key=list(mine).index)
            also = f"; {', '.join(more)} differ, too" if more else ""
            _refuse(f"{name} {_shown(other.get(name))}", rank, _shown(first.get(name)), also, ranks)


def data(preset: Preset, train_set: Images, held_out: Images, ranks: Processes) -> None:
    """Raise InputError on all processes if they read other images than the first one."""
    everyone = ranks.exchange([train_set.fingerprint, held_out.fingerprint, len(train_set) + len(held_out)])
    for rank, other in enumerate(everyone):
        if other[:2] != everyone[0][:2]:
            count, first = f"{other[2]:,} images", f"{everyone[0][2]:,}"
            what = f"data {preset.data}: {count}" if count != f"{first} images" else f"data {preset.data}: other images"
            _refuse(what, rank, f"{first} images", "", ranks)


def weights(kinds: Iterable[Iterable[Tensor]], step: int, out: Path, ranks: Processes) -> None:
    """Raise Differ on all processes if their weights, averages or moments are not those of the first one, to the bit.

    kinds  lists of tensors, such as the weights and their average
    out    the run's folder
    """
    if ranks.world == 1:
        return
    sums = torch.tensor([checksum(kind) for kind in kinds], dtype=torch.int64)
    everyone = ranks.interleave(sums[None], ranks.world)
    if others := (everyone != everyone[0]).any(1).nonzero().flatten().tolist():
        last = checkpoints.newest(out) or "none"
        line = (
            f"step {step}: the weights of {_name(others[0], ranks)} are not those of {_name(0, ranks)}; nothing is "
            f"saved, and the last good checkpoint is {last}; want machines of one kind, and their memory tested"
        )
        raise shared(Differ(line), ranks.first)


@torch.no_grad()
def checksum(values: Iterable[Tensor]) -> int:
    """A number of 63 bits that changes with any bit of float32 tensors, and with their order.

    >>> checksum([torch.zeros(2), torch.ones(3)]) == checksum([torch.ones(3), torch.zeros(2)])
    False
    """
    total = 0
    for i, x in enumerate(values, 1):
        total = (total * 31 + i * int(x.detach().view(torch.int32).sum(dtype=torch.int64))) & ((1 << 63) - 1)
    return total


def _refuse(what: str, rank: int, first: str, also: str, ranks: Processes) -> NoReturn:
    line = f"{what} on {_name(rank, ranks)}, but {first} on {_name(0, ranks)}; want the same on all{also}"
    raise shared(InputError(line), ranks.first)


def _name(rank: int, ranks: Processes) -> str:
    return ranks.group.name(rank) if ranks.group else f"rank {rank}"


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)

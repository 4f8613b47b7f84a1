"""State dicts inside the files that trainers write."""

import re
import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ddpm.errors import InputError

_AVERAGE = re.compile(r"(?<![a-z])(ema|swa)(?![a-z])|averag|shadow", re.IGNORECASE)
_LIST = ("model", "optimizer", "epoch", "step", "ema")  # what the places of a list are in ermongroup/ddim


def unwrap(content: Any, marker: str) -> dict[str, Tensor] | None:
    """The state dict that has the weights `marker`, inside what a trainer saved; None if there is none.

    It may lie in dicts and lists (`{"state_dict": ...}`, `{"model": ..., "ema": ...}`), and its names may have a
    prefix, such as that of a Lightning module. `module.` and `_orig_mod.`, which DataParallel and torch.compile put
    into names, are removed. A moving average of the weights is preferred. Raises InputError if there are several of
    equal rank.

    >>> import torch
    >>> saved = {"model": {"module.a.weight": torch.zeros(2)}, "ema": {"a.weight": torch.ones(2)}, "step": 5}
    >>> unwrap(saved, "a.weight")
    {'a.weight': tensor([1., 1.])}
    """
    found = dict(_candidates(content, marker, ""))
    averaged = {where: state for where, state in found.items() if _AVERAGE.search(where)}
    if len(averaged) > 1:  # such as ema.ema_model and ema.online_model
        averaged = {where: state for where, state in averaged.items() if "online" not in where} or averaged
    chosen = averaged or found
    if len(chosen) > 1:
        raise InputError(f"has several networks: {', '.join(sorted(chosen))}; want one, or one that is an average")
    if found and not averaged and isinstance(content, dict):
        for name, value in content.items():
            if _AVERAGE.search(str(name)) and isinstance(value, dict | list) and value:
                warnings.warn(f"{name}: this average has other names, so the last weights are read", stacklevel=2)
    return next(iter(chosen.values()), None)


def _candidates(content: Any, marker: str, where: str, depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The place and the state dict of every network with the weights `marker` in `content`."""
    if depth > 4:
        return
    if isinstance(content, list | tuple):
        content = dict(zip(_LIST, content, strict=False))
    if not isinstance(content, dict):
        return
    tensors: dict[str, Tensor] = {}
    for name, value in content.items():
        if isinstance(value, Tensor):
            words = [word for word in str(name).split(".") if word not in ("module", "_orig_mod")]
            if words != ["n_averaged"]:  # the counter of torch.optim.swa_utils
                tensors[".".join(words)] = value
        else:
            yield from _candidates(value, marker, f"{where}{name}.", depth + 1)
    prefixes = {name[: -len(marker)] for name in tensors if f".{name}".endswith(f".{marker}")}
    for prefix in prefixes:
        inner = tuple(other for other in prefixes if len(other) > len(prefix) and other.startswith(prefix))
        state = {
            name[len(prefix) :]: value
            for name, value in tensors.items()
            if name.startswith(prefix) and not (inner and name.startswith(inner))
        }
        yield f"{where}{prefix}".rstrip("."), state
        yield from _without_dots(tensors, prefix, state, where)


def _without_dots(
    tensors: dict[str, Tensor], prefix: str, state: dict[str, Tensor], where: str
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The average of the network at `prefix` under names without dots, as the LitEma of latent diffusion saves it."""
    parts = prefix.split(".")[:-1]
    for top in {name.partition(".")[0] for name in tensors}:
        for inner in {"".join(parts[k:]) for k in range(len(parts) + 1)} if _AVERAGE.search(top) else ():
            names = {name: f"{top}.{inner}{name.replace('.', '')}" for name in state}
            if all(name in tensors for name in names.values()):
                yield f"{where}{top}", {name: tensors[other] for name, other in names.items()}

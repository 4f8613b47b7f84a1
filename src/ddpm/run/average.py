"""Average the weights of a run over a length that is chosen after its training (Karras et al. 2024, Section 3.2)."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from torch import Tensor

from ddpm.errors import InputError, finite_number
from ddpm.files import checkpoints, tensors
from ddpm.files.models import Average
from ddpm.run import ema
from ddpm.run.export import check_out
from ddpm.version import __version__

MOST = 0.05
"""The largest relative residual of a fit that is accepted."""


def average(run: Path, sigma_rel: float, step: int | None = None, out: Path | None = None) -> tuple[Path, Average]:
    """Write a model with the power function average of this width, and return its file and what it is.

    run        a run folder with snapshots (`snapshot_every`)
    sigma_rel  the standard deviation of the average's profile, as a part of the steps so far: 0.001 to ema.WIDEST
    step       of the snapshot at which the average ends; None is the newest one. Later snapshots would add nothing
    out        a name that ends in .safetensors; None is RUN/averages/STEP-SIGMA_REL.safetensors

    Only the sum, in float64, and one file of a snapshot are in memory at a time. Damaged snapshots are left out, with a
    warning. Raises InputError if the snapshots give the average only with a residual above MOST, and for a run without
    snapshots.
    """
    finite_number("ema", sigma_rel, 0.001, ema.WIDEST)
    found = _snapshots(run)
    last = max(found) if step is None else step
    if last not in found:
        raise InputError(f"step {last}: {run} has no whole snapshot of it; want one of {_few(sorted(found))}")
    steps = [each for each in sorted(found) if each <= last]
    out = check_out(out or run / "averages" / f"{last:08d}-{sigma_rel:g}.safetensors")
    (coefficients,), (residual,) = ema.fit(steps, [sigma_rel])
    if residual > MOST:
        raise InputError(
            f"ema {sigma_rel:g}: has an error of {residual:.1%} from {len(steps)} snapshots up to step {last:,}, above "
            f"{MOST:.0%}; want {_widths(steps)}"
        )
    total: dict[str, Tensor] = {}
    for each, row in zip(steps, coefficients, strict=True):
        for stem, factor in zip(ema.TRACKED, row, strict=True):
            for name, value in tensors.each_tensor(file := found[each] / f"{stem}.safetensors"):
                total[name] = total.get(name, 0) + float(factor) * value.double()
    about = Average(sigma_rel, last, len(steps), float(residual))
    of_run = {"config": tensors.read_metadata(file)["config"], "step": str(last), "weights": "ema"}
    of_average = {"average": json.dumps(asdict(about)), "version": __version__}
    tensors.save_tensors(out, {name: value.float() for name, value in total.items()}, {**of_run, **of_average})
    return out, about


def _snapshots(run: Path) -> dict[int, Path]:
    """The whole snapshots of a run by their steps. Raises InputError if there are none."""
    if checkpoints.settings(run) is None:
        raise InputError(f"{run}: {'not a run' if run.exists() else 'no such folder'}; want a run folder")
    found, folders = {}, checkpoints.saved(run, checkpoints.SNAPSHOTS)
    for folder in folders:
        if reason := checkpoints.damage(folder):
            warnings.warn(f"snapshot {folder}: {reason}; it is left out", stacklevel=3)
        else:
            found[int(folder.name)] = folder
    if not found:
        none = "none of its snapshots is whole" if folders else "it has no snapshots"
        raise InputError(f"{run}: {none}; want a run that was trained with --snapshot-every N")
    return found


def _few(steps: Sequence[int]) -> str:
    """Steps for a message, at most a line."""
    return ", ".join(map(str, steps if len(steps) <= 16 else [*steps[:3], "...", steps[-1]]))


def _widths(steps: Sequence[int]) -> str:
    """The widths that these snapshots give, as in 0.05 to 0.2."""
    grid = np.arange(1, int(1000 * ema.WIDEST) + 1) / 1000
    fits = ema.fit(steps, grid.tolist())[1] <= MOST
    edges = np.flatnonzero(np.diff(fits, prepend=False, append=False)).reshape(-1, 2)
    return " or ".join(f"{grid[first]:g} to {grid[end - 1]:g}" for first, end in edges)

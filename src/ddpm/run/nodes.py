"""Nodes with a run folder each, or with one that they share: who has the newest checkpoint, and who writes where."""

import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ddpm.files import atomic, checkpoints
from ddpm.presets import Preset, from_json, to_json
from ddpm.run.processes import Processes

_MARK = ".rank-"


@dataclass(frozen=True)
class Found:
    """What the processes have of a run.

    own       the settings in this process's folder, if there are some
    settings  the settings of the run, those of `holder`; None for a new run
    folder    the newest whole checkpoint in this process's folder, if it looked for one
    saved     whether there are checkpoints somewhere, whole or not
    step      of the newest whole checkpoint; 0 if there is none
    holder    the process that has it
    at_once   the most images that a process of the run computed at once, if the run says so
    """

    own: Preset | None
    settings: Preset | None
    folder: Path | None
    saved: bool
    step: int
    holder: int
    at_once: int | None


def find(out: Path, ranks: Processes) -> Found:
    """Look for the run in the folder `out` of every node. The first process of each node checks its checkpoints.

    Raises InputError for a run whose settings cannot be read.
    """
    own, folder, saved, at_once = checkpoints.settings(out), None, bool(checkpoints.saved(out)), None
    if ranks.world == 1 or os.environ.get("LOCAL_RANK", "0") == "0":
        folder = checkpoints.newest(out)
        at_once = checkpoints.read_state(folder).get("at_once") if folder else None
    step = int(folder.name) if folder else 0
    everyone = ranks.exchange([step, to_json(own) if own else None, saved, at_once])
    holder = max(range(len(everyone)), key=lambda rank: (everyone[rank][0], everyone[rank][1] is not None, -rank))
    step, settings, _, at_once = everyone[holder]
    any_saved = any(each[2] for each in everyone)
    return Found(own, from_json(settings) if settings else None, folder, any_saved, step, holder, at_once)


def sharing(out: Path, ranks: Processes) -> tuple[int, ...]:
    """The processes that see the same run folder as this one, in order. Makes the folder.

    Each process leaves a file there, and sees which others did. Raises OSError if it cannot.
    """
    if ranks.world == 1:
        return (0,)
    name = ranks.exchange(secrets.token_hex(8))[0]
    atomic.make_folder(out)
    mine = out / f"{_MARK}{name}-{ranks.rank}"
    mine.touch()
    try:
        ranks.exchange()
        here = sorted(int(path.name.rpartition("-")[2]) for path in out.glob(f"{_MARK}{name}-*"))
        ranks.exchange()
    finally:
        mine.unlink(missing_ok=True)
    if here[0] == ranks.rank:
        for path in out.glob(f"{_MARK}*"):  # of processes that were killed
            if name not in path.name:
                with suppress(OSError):
                    path.unlink()
    return tuple(here)

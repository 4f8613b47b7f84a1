"""One run at a time writes into a run's folder."""

import errno
import os
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import filelock

from ddpm.errors import InputError, Stopped
from ddpm.files import atomic
from ddpm.run import log, nodes
from ddpm.run.processes import Processes

_LOCKS: set[tuple[int, int]] = set()
"""Device and inode of the locks that this process holds."""


def _file_key(about: os.stat_result) -> tuple[int, int]:
    return about.st_dev, about.st_ino


def _let_go_of_locks() -> None:
    """Close inherited locks in a forked child; a worker that outlives this process would hold them for seconds more."""
    for name in os.listdir("/dev/fd") if _LOCKS else ():
        with suppress(OSError):  # the descriptor of the listing itself is closed
            if _file_key(os.fstat(int(name))) in _LOCKS:
                os.close(int(name))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_of_locks)


def lock(out: Path, ranks: Processes, stack: ExitStack) -> Processes:
    """Make the run's folder, and settle who writes it; they lock it until the end.

    Raises InputError if other processes train the run.
    """
    try:
        ranks = replace(ranks, folder=nodes.sharing(out, ranks))
        if ranks.writes:
            atomic.make_folder(out)
            stack.enter_context(filelock.FileLock(out / ".lock").acquire(timeout=0))
            _LOCKS.add(key := _file_key((out / ".lock").stat()))
            stack.callback(_LOCKS.discard, key)
    except filelock.Timeout:
        raise InputError(f"out {out}: another process is training this run; want another out") from None
    except OSError as error:
        ill = error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT)  # of the disk, and no mistake of the user
        raise (Stopped if ill else InputError)(f"out {out}: cannot be written ({log.reason(error)})") from error
    return ranks

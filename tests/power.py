"""A file system that loses its power, and a process that saves to it until then.

The file system is ext4 in an image file. `cut` is what xfstests calls godown: nothing that is only in memory reaches
the disk any more, also amid an fsync. Mounting it again recovers the journal, as after a real loss of power. What the
file system gave to its disk counts as on it: a disk that forgets what it was told to keep is not tried.
"""

import errno
import fcntl
import os
import random
import shutil
import stat
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import ddpm
from ddpm.files import atomic, checkpoints
from ddpm.files.tensors import read_tensors

_SHUTDOWN, _DROP_ALL = 0x8004587D, struct.pack("I", 2)  # EXT4_IOC_SHUTDOWN, EXT4_GOING_FLAGS_NOLOGFLUSH
_FSYNC = os.fsync  # that of conftest.py does not wait
SYNCS = ("all", "files", "folders", "none")
"""What the saving process may sync. All but the first are controls, which must show losses."""


def missing() -> str | None:
    """Why power cannot be lost here, or None."""
    if not hasattr(os, "geteuid") or os.geteuid():
        return "needs root"
    tools = [tool for tool in ("mkfs.ext4", "losetup", "mount", "e2fsck") if shutil.which(tool) is None]
    return f"needs {tools[0]}" if tools else None if Path("/dev/loop-control").exists() else "needs loop devices"


def _call(*words: str | Path) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise OSError(errno.EIO, done.stderr.strip() or f"exit code {done.returncode}", str(words[0]))


class Disk:
    """An ext4 file system of 32 MiB in a file, mounted at `root`.

    It need not write a file to the disk when the file is renamed (noauto_da_alloc), which is the worst it may do.
    """

    def __init__(self, folder: Path) -> None:
        self.image, self.root = folder / "disk.img", folder / "disk"
        self.root.mkdir()
        with self.image.open("wb") as file:
            file.truncate(32 << 20)
        _call("mkfs.ext4", "-q", "-F", self.image)
        self.mount()

    def mount(self) -> None:
        _call("mount", "-o", "loop,noauto_da_alloc,commit=1", self.image, self.root)

    def cut(self) -> None:
        """Lose the power."""
        descriptor = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _SHUTDOWN, _DROP_ALL)
        finally:
            os.close(descriptor)

    def restart(self) -> None:
        """Recover the journal, and check that nothing but what the journal tells is wrong with the file system."""
        _call("umount", self.root)
        self.mount()
        _call("umount", self.root)
        _call("e2fsck", "-f", "-n", self.image)
        self.mount()

    def remove(self) -> None:
        subprocess.run(["umount", self.root], capture_output=True)


@contextmanager
def disk(folder: Path) -> Iterator[Disk]:
    """A new Disk; it is unmounted at the end."""
    new = Disk(folder)
    try:
        yield new
    finally:
        new.remove()


# -- what is saved -----------------------------------------------------------------------------------------------------


def _text(number: int) -> str:
    return f"{number}\n" * 3000


def _weights(number: int) -> dict[str, dict[str, torch.Tensor]]:
    return {stem: {"w": torch.full((2000,), float(number))} for stem in ("ema", "raw", "optimizer")}


def _folder(root: Path, number: int) -> None:
    with atomic.temporary_folder(root / "folders" / str(number)) as part:
        for name in ("a", "b"):
            atomic.write(part / name, _text(number))


def _checkpoint(root: Path, number: int) -> None:
    """The first one is the best, and stays."""
    folder = checkpoints.save(
        root, ddpm.PRESETS["digits"], {"step": number, "held_out": float(number)}, _weights(number)
    )
    checkpoints.prune(root, 1, protected={folder})


KINDS: dict[str, Callable[[Path, int], None]] = {
    "replaced file": lambda root, number: atomic.write(root / "a.txt", _text(number)),
    "new file": lambda root, number: atomic.write(root / "files" / str(number), _text(number)),
    "new folder": _folder,
    "checkpoint": _checkpoint,
}


def _save_for_ever(root: Path, first: int, syncs: str, pipe: int) -> None:
    def limited(descriptor: int) -> None:
        kind = "folders" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "files"
        if syncs in ("all", kind):
            _FSYNC(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", limited)
        number = first
        while True:
            for kind, save in KINDS.items():
                save(root, number)
                os.write(pipe, f"{kind},{number}\n".encode())
            number += 1


# -- what is left ------------------------------------------------------------------------------------------------------


@dataclass
class Losses:
    """What a loss of power did.

    saves    how many were reported complete
    lost     those of them that are not there or not whole
    torn     files and folders that have their final name and are not whole
    damaged  how many checkpoints are not whole and are recognised
    """

    saves: int = 0
    lost: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    damaged: int = 0


def _number(file: Path) -> int | None:
    """The number that a whole file tells; None for one that is not whole."""
    text = file.read_text() if file.is_file() else ""
    first = text.partition("\n")[0]
    return int(first) if first.isdecimal() and text == _text(int(first)) else None


def _left(root: Path, reported: dict[str, int], first: int) -> Losses:
    """What is left of the saves from number `first` on; `reported` is the last complete one of each kind."""
    found = Losses()
    replaced, number = root / "a.txt", _number(root / "a.txt")
    found.torn += ["replaced file"] * (replaced.exists() and number is None)
    found.lost += ["replaced file"] * ((number or 0) < reported.get("replaced file", 0))
    for kind, folder, names in (("new file", "files", [""]), ("new folder", "folders", ["a", "b"])):
        there = {int(path.name) for path in (root / folder).glob("[0-9]*")}
        whole = {n for n in there if all(_number(root / folder / str(n) / name) == n for name in names)}
        found.torn += [f"{kind} {n}" for n in sorted(there - whole) if n >= first]
        found.lost += [f"{kind} {n}" for n in range(first, reported.get(kind, 0) + 1) if n not in whole]
    steps = [int(folder.name) for folder in checkpoints.saved(root) if checkpoints.damage(folder) is None]
    for step in steps:
        values = read_tensors(root / "checkpoints" / f"{step:08d}" / "ema.safetensors")["w"]
        found.torn += [f"checkpoint {step}"] * bool((values != step).any())
    last = reported.get("checkpoint", 0)
    found.lost += [f"checkpoint {last}"] * (max(steps, default=0) < last)
    found.lost += ["best checkpoint"] * bool(last and 1 not in steps)
    found.damaged = len(checkpoints.saved(root)) - len(steps)
    return found


def lose(on: Disk, chance: random.Random, first: int, syncs: str = "all") -> tuple[Losses, int]:
    """Save to a disk, cut its power during one of 20 saves, and see what is left. Returns that, and the next `first`.

    first  the number of the first save; 1 for a new disk

    Raises RuntimeError if the saving process ended before the power was lost.
    """
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(receive)
            _save_for_ever(on.root, first, syncs, send)
        finally:
            os._exit(0)
    os.close(send)
    with open(receive, "rb") as pipe:
        ahead = [pipe.readline() for _ in range(chance.randint(len(KINDS), 20))]
        time.sleep(chance.uniform(0, 0.02))
        on.cut()
        lines = b"".join(ahead) + pipe.read()
    os.waitpid(child, 0)
    if not all(ahead):
        raise RuntimeError(f"the saving process ended after {len(b''.join(ahead))} bytes of reports")
    on.restart()
    reported = {kind: int(number) for kind, _, number in (line.partition(",") for line in lines.decode().splitlines())}
    found = _left(on.root, reported, first)
    found.saves = lines.count(b"\n")
    for name in ("files", "folders"):
        shutil.rmtree(on.root / name, ignore_errors=True)
    return found, max([first, *reported.values()]) + 2

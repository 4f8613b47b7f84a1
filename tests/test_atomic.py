"""Files and folders that appear complete or not at all, whatever fails, dies, or lies where they are written."""

import os
import random
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import power
import pytest
import torch
from conftest import assert_same, steps, tensors, train

import ddpm
from ddpm.files import atomic, checkpoints

PRESET = ddpm.PRESETS["digits"]


def hidden(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob(".*") if p.name != ".lock"]


# -- what lies there ---------------------------------------------------------------------------------------------------


def test_a_link_under_a_temporary_name_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if somebody guesses the name: the file that the link names stays as it is."""
    (tmp_path / "victim").write_text("mine")
    folder = tmp_path / "shared"
    folder.mkdir()
    planted = folder / ".ddpm-x.part"
    monkeypatch.setattr(atomic, "_temporary_name", lambda _: planted)
    for target in ("victim", "nothing"):
        planted.symlink_to(tmp_path / target)
        with pytest.raises(OSError, match="File exists"):
            atomic.write(folder / "a.txt", "theirs")
        with pytest.raises(FileExistsError), atomic.temporary_folder(folder / "a"):
            pass
        planted.unlink()
    assert (tmp_path / "victim").read_text() == "mine"
    assert not (tmp_path / "nothing").exists()


def test_temporary_names_cannot_be_guessed(tmp_path: Path) -> None:
    """64 bits of each are random: no two of 1000 agree in the first half of those."""
    assert len({atomic._temporary_name(tmp_path).name[:-13] for _ in range(1000)}) == 1000


def test_a_name_of_255_bytes_can_be_written(tmp_path: Path) -> None:
    """The longest that file systems take; a temporary name is no longer for a longer name."""
    path = tmp_path / ("ä" * 120 + "a" * 11 + ".txt")
    assert len(os.fsencode(path.name)) == 255
    atomic.write(path, "text")
    assert path.read_text() == "text"


def test_a_pipe_is_written_into_and_a_link_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE)
    atomic.write(tmp_path / "pipe", "text")
    assert reader.communicate(timeout=60)[0] == b"text"
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away.txt")
    atomic.write(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "far" / "away.txt").read_text() == "text"


def killed_while_it_writes(folder: Path) -> None:
    code = f"""if True:
        import os, signal
        from pathlib import Path
        from ddpm.files import atomic
        with atomic.temporary(Path({str(folder)!r}) / "a.txt") as part, atomic.temporary_folder(part.parent / "b") as b:
            part.write_text("half of it")
            (b / "c.txt").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert len(list(folder.glob(".ddpm-*.part"))) == 2


def test_what_a_killed_process_left_is_deleted(tmp_path: Path) -> None:
    """By the next process that writes to the folder; what a running process writes stays."""
    killed_while_it_writes(tmp_path)
    with atomic.temporary(tmp_path / "ours.txt") as ours:
        assert hidden(tmp_path) == [ours.name]
        write = f"from ddpm.files import atomic; atomic.write({str(tmp_path / 'theirs.txt')!r}, '')"
        subprocess.run([sys.executable, "-c", write], check=True)
        assert hidden(tmp_path) == [ours.name]
    assert {p.name for p in tmp_path.iterdir()} == {"ours.txt", "theirs.txt"}


def test_what_another_machine_writes_is_deleted_after_a_day(tmp_path: Path) -> None:
    """Its processes cannot be seen from here. A link is deleted, not what it names."""
    kept = tmp_path / "kept"
    kept.mkdir()
    for name, age in (("new", 3600), ("old", 90_000)):
        part = tmp_path / f".ddpm-0000000{len(name)}-1-{name}.part"
        part.touch()
        os.utime(part, (part.stat().st_mtime - age,) * 2)
    link = tmp_path / f".ddpm-{atomic._machine()}-{2**22 + 1}-link.part"  # Linux has no such process
    link.symlink_to(kept)
    atomic.write(tmp_path / "a.txt", "")
    assert [name.rpartition("-")[2] for name in hidden(tmp_path)] == ["new.part"]
    assert kept.is_dir()


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with atomic.temporary_folder(tmp_path / "a") as part:
            (part / text).touch()
    with pytest.raises(ZeroDivisionError), atomic.temporary_folder(tmp_path / "a") as part:
        raise ZeroDivisionError
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["second"]
    assert hidden(tmp_path) == []


# -- errors of the disk ------------------------------------------------------------------------------------------------


class Disk:
    """A disk on which one call fails: the writes, syncs and renames of `atomic` are counted, and number `fails` raises.

    dies  end the process there instead, as SIGKILL does
    """

    def __init__(self, patch: pytest.MonkeyPatch, fails: int, dies: bool = False) -> None:
        self.calls, self.fails, self.dies = 0, fails, dies
        for module, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (os, "open"), (Path, "write_bytes")):
            patch.setattr(module, name, self._counting(getattr(module, name)))
        patch.setattr("ddpm.files.tensors.save_file", self._counting(ddpm.files.tensors.save_file))

    def _counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            path = next((str(a) for a in args if isinstance(a, (str, Path))), "")
            if function is not os_open or (".part" in path and "dir_fd" not in kwargs):  # shutil.rmtree gives one
                self.calls += 1
                if self.calls == self.fails:
                    if self.dies:
                        os._exit(9)
                    raise OSError(5, "Input/output error", path)
            return function(*args, **kwargs)

        return call


os_open = os.open


def save(run: Path, step: int, held_out: float) -> None:
    weights = {stem: {"w": torch.full((9,), float(step))} for stem in ("ema", "raw", "optimizer")}
    folder = checkpoints.save(run, PRESET, {"step": step, "held_out": held_out}, weights)
    checkpoints.prune(run, 1, protected={folder})


def whole(run: Path) -> list[int]:
    return [int(p.name) for p in reversed(checkpoints.saved(run)) if checkpoints.damage(p) is None]


def test_no_checkpoint_is_lost_by_a_save_that_fails_or_is_killed_at_any_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each write, sync and rename in turn. The newest whole one is that before the save or after it, never none.

    So is the best one, and what is there afterwards can be saved over.
    """
    for dies in (False, True):
        fails, ended = 0, False
        while not ended:
            fails += 1
            run = tmp_path / f"{dies}{fails}"
            for step, loss in ((1, 0.1), (2, 0.5), (3, 0.4)):
                save(run, step, loss)
            assert whole(run) == [1, 3]
            (run / "checkpoints" / "00000004").mkdir()  # it is damaged, and replaced
            if dies:
                child = os.fork()
                if child == 0:
                    Disk(monkeypatch, fails, dies)
                    save(run, 4, 0.6)
                    os._exit(0)
                ended = os.waitpid(child, 0)[1] == 0
            else:
                with monkeypatch.context() as patch:
                    disk = Disk(patch, fails)
                    with suppress(OSError):
                        save(run, 4, 0.6)
                    ended = disk.calls < fails
                assert hidden(run) == [], fails
            assert whole(run) in ([1, 3], [1, 4], [1, 3, 4]), fails
            assert checkpoints.best(run) == run / "checkpoints" / "00000001"
            atomic._remove_leftovers.cache_clear()
            save(run, 5, 0.7)
            assert whole(run) == [1, 5]
            assert hidden(run) == []
        assert fails > 20


def power_is_lost(run: Path, fails: int, syncs: bool = True) -> tuple[bool, int]:
    """Save step 4 in another process, which dies at call `fails`. Files that it did not wait for are empty afterwards.

    What was renamed has its new name: the worst that a file system may do. syncs False: the process waits for no file.
    Returns whether the process came to its end, and how many files are empty.
    """
    before, receive, send = {p.stat().st_ino for p in run.rglob("*")}, *os.pipe()
    child = os.fork()
    if child == 0:
        fsync = os.fsync

        def logged(descriptor: int) -> None:
            fsync(descriptor)
            os.write(send, f"{os.fstat(descriptor).st_ino}\n".encode() * syncs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", logged)
            Disk(patch, fails, dies=True)
            save(run, 4, 0.6)
            os._exit(0)
    os.close(send)
    with open(receive, "rb") as pipe:
        durable = before | set(map(int, pipe.read().split()))
    lost = [p for p in run.rglob("*") if p.is_file() and p.stat().st_ino not in durable]
    for file in lost:
        file.write_bytes(b"")
    return os.waitpid(child, 0)[1] == 0, len(lost)


def test_no_checkpoint_is_lost_by_a_loss_of_power_at_any_call(tmp_path: Path) -> None:
    """At each write, sync and rename in turn."""
    fails, ended, lost = 0, False, 0
    while not ended:
        fails += 1
        run = tmp_path / str(fails)
        for step, loss in ((1, 0.1), (2, 0.5), (3, 0.4)):
            save(run, step, loss)
        ended, count = power_is_lost(run, fails)
        lost += count
        assert whole(run) in ([1, 3], [1, 4], [1, 3, 4]), fails
    assert (count, lost > 5) == (0, True)
    save(tmp_path / "control", 3, 0.1)
    power_is_lost(tmp_path / "control", 1000, syncs=False)
    assert whole(tmp_path / "control") == [3]  # as the best one; the new one is empty


def test_a_checkpoint_is_deleted_only_after_the_name_of_the_new_one_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a loss of power leaves one or both, whichever names the file system has written."""
    for step in (1, 2):
        save(tmp_path, step, 1.0 - step / 10)
    folder, calls, fsync, rename = tmp_path / "checkpoints", [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda d: (fsync(d), calls.append(os.fstat(d).st_ino)))
    monkeypatch.setattr(os, "rename", lambda a, b: (rename(a, b), calls.append((Path(a).name, Path(b).name))))
    save(tmp_path, 3, 0.1)
    (new,) = (i for i, call in enumerate(calls) if isinstance(call, tuple) and call[1] == "00000003")
    (old,) = (i for i, call in enumerate(calls) if isinstance(call, tuple) and call[0] == "00000002")
    assert folder.stat().st_ino in calls[new:old]
    assert steps(tmp_path) == [3]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[power.Disk]:
    if reason := power.missing():
        pytest.skip(f"a loss of power {reason}")
    try:
        new = power.Disk(tmp_path)
    except OSError as error:  # a container may forbid it
        pytest.skip(f"no file system can be mounted: {error}")
    yield new
    new.remove()


def test_what_was_reported_written_survives_a_loss_of_power(disk: power.Disk) -> None:
    """Files, folders and checkpoints, at random moments of many saves, on a real file system."""
    chance, first = random.Random(0), 1
    for _ in range(12):
        left, first = power.lose(disk, chance, first)
        assert (left.lost, left.torn, left.damaged) == ([], [], 0)


@pytest.mark.parametrize(("syncs", "torn"), [("files", False), ("folders", True), ("none", False)])
def test_without_syncs_a_loss_of_power_takes_files_back(syncs: str, torn: bool, disk: power.Disk) -> None:
    """The control of the test above. A checkpoint whose files are not on the disk is there, and recognised."""
    chance, first, lost, found = random.Random(0), 1, 0, power.Losses()
    for _ in range(60):  # of those that sync files only, one in four loses something
        found, first = power.lose(disk, chance, first, syncs)
        lost += len(found.lost)
        if lost and ((found.torn and found.damaged) or not torn):
            return
    pytest.fail(f"nothing was lost: {found}")


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    assert train(tmp_path / "reference", *SHORT) == 0
    return tmp_path / "reference"


SHORT = "--steps 1 --save-every 1 --sample-every 1 --eval-images 4 --sample-count 1 --sample-steps 1".split()


def test_a_training_whose_disk_fails_once_loses_nothing(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At each call in turn: one line and exit code 1. After every fifth, the same command comes to the same bits."""
    fails = 0
    while True:
        fails += 1
        run = tmp_path / str(fails)
        with monkeypatch.context() as patch:
            disk = Disk(patch, fails)
            code = train(run, *SHORT)
        lines = capsys.readouterr().err.splitlines()
        if disk.calls < fails:
            break
        saved = steps(run) if (run / "checkpoints").is_dir() else []
        assert all(checkpoints.damage(run / "checkpoints" / f"{step:08d}") is None for step in saved)
        if code:
            assert (code, lines[-1].startswith("ddpm: ")) == (1, True), (fails, lines)
        if fails % 5 == 0:
            atomic._remove_leftovers.cache_clear()
            assert train(run, *SHORT) == 0
            assert_same(tensors(run, 1), tensors(reference, 1))
            pictures = [folder / "samples" / "00000001.png" for folder in (run, reference)]
            assert pictures[0].read_bytes() == pictures[1].read_bytes()
            capsys.readouterr()
        assert hidden(run) == [], fails
    assert code == 0
    assert fails > 30

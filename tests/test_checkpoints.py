"""Checkpoints: whole or not there; a damaged one is named and passed over; nothing is pickled."""

import ast
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same, losses, steps, tensors, train
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import ddpm
from ddpm.cli import main
from ddpm.files import atomic, checkpoints, opening
from ddpm.files.tensors import save_tensors
from ddpm.presets import PRESETS


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run, to be damaged."""
    return shutil.copytree(trained, tmp_path / "run")


# -- damage ------------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other_step(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": 30', '"step": 29'))


DAMAGES: list[tuple[str, Callable[[Path], None], str]] = [
    ("raw.safetensors", truncate, "raw.safetensors is truncated or altered"),
    ("ema.safetensors", flip, "ema.safetensors is truncated or altered"),
    ("optimizer.safetensors", empty, "optimizer.safetensors is truncated or altered"),
    ("ema.safetensors", Path.unlink, "ema.safetensors is missing"),
    ("state.json", Path.unlink, "state.json is missing"),
    ("state.json", other_step, "state.json is altered"),
    ("state.json", truncate, "state.json cannot be read"),
    ("state.json", empty, "state.json cannot be read"),
    ("state.json", lambda path: path.write_text("[]") and None, "state.json cannot be read"),
]


@pytest.mark.parametrize(("file", "damage", "words"), DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(
    file: str, damage: Callable[[Path], None], words: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is wrong with it: one warning, and the one before it is taken.

    Asked for by number it is an error if the damaged file is one that is read.
    """
    folder = run / "checkpoints" / "00000030"
    damage(folder / file)
    with pytest.warns(UserWarning, match=f"checkpoint {re.escape(str(folder))}: {re.escape(words)}.*the one before it"):
        assert checkpoints.newest(run) == run / "checkpoints" / "00000020"
    assert checkpoints.best(run) == run / "checkpoints" / "00000020"
    for weights in ("ema", "raw"):
        read = file in ("state.json", f"{weights}.safetensors")
        options = ["--weights", weights, "--checkpoint", "30", "-n", "1", "--steps", "1", "--sampler", "ddim"]
        assert main(["sample", str(run), *options, "--out", str(run / "x.png")]) == (2 if read else 0)
        assert (f"checkpoint {folder}: {words}" in capsys.readouterr().err) == read


def test_training_goes_on_from_the_one_before(run: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And comes to the same bits, with each step logged once and the damaged checkpoint replaced."""
    flip(run / "checkpoints" / "00000030" / "raw.safetensors")
    assert train(run, "--steps", 30, "--save-every", 10) == 0
    err = capsys.readouterr().err
    assert "raw.safetensors is truncated or altered" in err
    assert "steps 20 to 30" in err
    assert_same(tensors(run, 30), tensors(trained, 30))
    assert losses(run) == losses(trained)
    assert checkpoints.damage(run / "checkpoints" / "00000030") is None


def test_without_a_whole_checkpoint_nothing_is_overwritten(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training warns of both and leaves them, of which parts may be whole; sampling says that there is none."""
    for step in (20, 30):
        flip(run / "checkpoints" / f"{step:08d}" / "ema.safetensors")
    assert main(["sample", str(run), "--out", str(run / "x.png")]) == 2
    assert "the run has no whole checkpoint yet; train it first" in capsys.readouterr().err
    assert train(run, "--steps", 3) == 2
    err = capsys.readouterr().err
    assert err.count("is truncated or altered") == 2
    assert err.endswith(f"none of its checkpoints is whole; delete {run / 'checkpoints'} to start again\n")
    assert len(list((run / "checkpoints").iterdir())) == 2
    shutil.rmtree(run / "checkpoints")
    assert train(run, "--steps", 3) == 0
    assert "steps 0 to 3" in capsys.readouterr().err


# -- saving ------------------------------------------------------------------------------------------------------------

PRESET = ddpm.PRESETS["digits"]


def save(run: Path, step: int, held_out: float | None = None) -> Path:
    return checkpoints.save(run, PRESET, {"step": step, "held_out": held_out}, {"raw": {"w": torch.full((9,), step)}})


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    """The best by held-out loss stays however old it is; one saved on Ctrl-C has no such loss."""
    for step, held_out in enumerate([0.5, 0.1, 0.3, 0.4, None, 0.6]):
        save(tmp_path, step, held_out)
        checkpoints.prune(tmp_path, keep=2)
        assert step in steps(tmp_path)
    assert steps(tmp_path) == [1, 4, 5]
    assert checkpoints.best(tmp_path) == tmp_path / "checkpoints" / "00000001"
    assert checkpoints.newest(tmp_path) == tmp_path / "checkpoints" / "00000005"


def test_a_calibrated_checkpoint_is_kept(tmp_path: Path) -> None:
    """However old it is: pictures may have been compressed by it."""
    for step in range(4):
        folder = save(tmp_path, step)
        if step == 1:
            (folder / "ema.calibration.json").write_text("{}")
    checkpoints.prune(tmp_path, keep=1)
    assert steps(tmp_path) == [1, 3]


def test_training_keeps_as_many_as_asked_for(tmp_path: Path) -> None:
    """--keep counts the newest; here the newest is the best, too."""
    assert train(tmp_path / "run", "--steps", 6, "--save-every", 1, "--keep", 3, "--batch-size", 32) == 0
    assert steps(tmp_path / "run") == [4, 5, 6]


def test_what_a_killed_save_left_is_passed_over_and_cleared(run: Path) -> None:
    """A folder under its temporary name is no checkpoint; the next save removes it."""
    code = f"""if True:
        import os, signal
        from pathlib import Path
        from ddpm.files import atomic
        with atomic.temporary_folder(Path({str(run)!r}) / "checkpoints" / "00000040") as part:
            (part / "state.json").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    (leftover,) = (run / "checkpoints").glob(".*")
    assert checkpoints.newest(run) == run / "checkpoints" / "00000030"
    assert train(run, "--steps", 31) == 0
    assert not leftover.exists()


def test_a_run_killed_while_it_began_starts_again(tmp_path: Path) -> None:
    """Before config.json has its name, the folder holds hidden files at most, and is as good as none."""
    (tmp_path / "run").mkdir()
    for name in (".lock", ".config.json.tmp"):
        (tmp_path / "run" / name).write_text("{")
    assert train(tmp_path / "run", "--steps", 1) == 0


# -- a full disk -------------------------------------------------------------------------------------------------------


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def safetensors_no_space(_: Any, path: Path, *__: Any) -> None:
    path.write_bytes(b"half of it")
    reason = (
        'Error while serializing: I/O error: Os { code: 28, kind: StorageFull, message: "No space left on device" }'
    )
    raise SafetensorError(reason)


@pytest.mark.parametrize(
    ("name", "failing"),
    [("tensors.save_file", safetensors_no_space), ("atomic.sync", no_space), ("atomic.write", no_space)],
)
def test_a_full_disk_stops_the_run_with_the_last_checkpoint_whole(
    name: str,
    failing: Callable[..., None],
    run: Path,
    trained: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wherever the writing fails: exit code 1, one line, nothing half written left; it goes on where there is room."""
    begin = checkpoints.save

    def full(*given: Any) -> Path:
        monkeypatch.setattr(f"ddpm.files.{name}", failing)
        return begin(*given)

    monkeypatch.setattr(checkpoints, "save", full)
    assert train(run, "--steps", 40, "--save-every", 1) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    whole = run / "checkpoints" / "00000030"
    assert last == (f"ddpm: step 31: cannot save to {run}: the disk is full; the last whole checkpoint is {whole}")
    assert [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")] == []
    assert_same(tensors(run, 30), tensors(trained, 30))
    monkeypatch.undo()
    assert train(run, "--steps", 31) == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB: room for one checkpoint of 2.6 MB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)], capture_output=True
        ).returncode
    ):
        pytest.skip("cannot mount a file system here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_disk_that_is_full_indeed(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checkpoints, then metrics.jsonl, then samples meet a real full disk: one line each, and what is whole stays."""
    run = small_disk / "run"
    assert train(run, "--steps", 4, "--save-every", 2) == 1
    assert "step 4: cannot save to" in (line := capsys.readouterr().err.splitlines()[-1])
    assert line.endswith(f"the disk is full; the last whole checkpoint is {run / 'checkpoints' / '00000002'}")
    assert steps(run) == [2]
    assert checkpoints.damage(run / "checkpoints" / "00000002") is None

    with pytest.raises(OSError, match="No space left"):
        (small_disk / "rest").write_bytes(b"0" * 2**22)
    assert train(run, "--steps", 4) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"ddpm: cannot write to {run}: the disk is full"
    assert main(["sample", str(run), "-n", "64", "--out", str(small_disk / "x.png")]) == 1
    assert capsys.readouterr().err.startswith("ddpm: the disk is full")
    assert {p.name for p in run.iterdir()} == {"config.json", "held_out.json", "metrics.jsonl", "checkpoints", ".lock"}
    assert {p.name for p in small_disk.iterdir()} == {"run", "rest"}

    (small_disk / "rest").unlink()
    shutil.move(run, small_disk.parent / "run")
    assert train(small_disk.parent / "run", "--steps", 4) == 0


def test_a_log_that_cannot_be_written_stops_the_run(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """metrics.jsonl is as good a reason as a checkpoint."""
    monkeypatch.setattr("ddpm.run.log._write_line", no_space)
    assert train(run, "--steps", 40) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"ddpm: step 31: cannot write {run / 'metrics.jsonl'}: the disk is full"


# -- what files hold ---------------------------------------------------------------------------------------------------


def test_one_file_alone_is_a_model(trained: Path, tmp_path: Path) -> None:
    """ema.safetensors carries its configuration: copied elsewhere it samples, with nothing of the run beside it."""
    file = shutil.copy(trained / "checkpoints" / "00000030" / "ema.safetensors", tmp_path / "model.safetensors")
    assert main(["sample", str(file), "-n", "2", "--out", str(tmp_path / "a.npz")]) == 0
    assert main(["sample", str(trained), "-n", "2", "--out", str(tmp_path / "b.npz")]) == 0
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata["config"])["width"] == 32
    assert (metadata["step"], metadata["weights"], metadata["version"]) == ("30", "ema", ddpm.__version__)


def test_a_file_at_the_root_has_its_results_beside_it(trained: Path) -> None:
    """There is no folder two above it."""
    assert replace(opening.open_checkpoint(trained), path=Path("/m.safetensors")).home == Path("/m")


def test_load(trained: Path) -> None:
    """The library's way in: a denoiser ready to sample, with the average or the raw weights."""
    ema, raw = ddpm.load(trained), ddpm.load(str(trained), weights="raw")
    assert isinstance(ema.network, torch.nn.Module)
    assert isinstance(raw.network, torch.nn.Module)
    assert not ema.network.training
    for denoiser, stem in ((ema, "ema"), (raw, "raw")):
        stored = {n: v for n, v in tensors(trained, 30).items() if n.startswith(stem)}
        assert isinstance(denoiser.network, torch.nn.Module)
        state = denoiser.network.state_dict()
        assert all(torch.equal(state[name.removeprefix(f"{stem}/")], value) for name, value in stored.items())
        assert len(state) == len(stored)


def test_files_that_are_not_ours(trained: Path, tmp_path: Path) -> None:
    """Another program's safetensors, moments, and weights of another network are told apart, by name."""
    checkpoint = trained / "checkpoints" / "00000030"
    save_file({"w": torch.zeros(1)}, tmp_path / "other.safetensors")
    save_file({"w": torch.zeros(1)}, tmp_path / "mixed.safetensors", metadata_of(checkpoint / "ema.safetensors"))
    for path, words in (
        (tmp_path / "other.safetensors", "not a checkpoint of ddpm; want ema.safetensors or raw.safetensors of a run"),
        (checkpoint / "optimizer.safetensors", "not a checkpoint of ddpm"),
        (tmp_path / "mixed.safetensors", "its tensors are not those of its configuration"),
    ):
        with pytest.raises(ddpm.InputError, match=f"{re.escape(str(path))}: {words}"):
            ddpm.load(path)


def test_nothing_is_pickled(trained: Path) -> None:
    """Checkpoints are safetensors and JSON; no code of ours writes a pickle, or reads one that could run code."""
    kinds = {p.suffix for p in (trained / "checkpoints").rglob("*") if p.is_file()}
    assert kinds == {".safetensors", ".json"}
    assert ddpm.__file__ is not None
    for file in Path(ddpm.__file__).parent.rglob("*.py"):
        source = file.read_text()
        tree = ast.parse(source if re.search("pickle|joblib|torch.(save|load)", source) else "")
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            text = ast.unparse(call)
            unsafe = re.match(r"(pickle|joblib)\.|torch\.save\(|torch\.load\((?!.*weights_only=True)", text)
            assert not unsafe, file
            assert "allow_pickle=True" not in text, file


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as opened:
        found: dict[str, str] = opened.metadata()
    return found


def test_windows_syncs_no_folder_and_only_files_that_are_open_for_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Emulated."""
    fcntl = pytest.importorskip("fcntl")
    real_open, synced = os.open, []

    def windows_open(path: Any, *args: Any, **kwargs: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real_open(path, *args, **kwargs)

    def windows_fsync(descriptor: int) -> None:
        if not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_RDWR:
            raise OSError(errno.EBADF, "Bad file descriptor")
        synced.append(descriptor)

    monkeypatch.setattr(os, "fsync", windows_fsync)
    with pytest.raises(OSError, match="Bad file descriptor"):  # negative control
        atomic.write(tmp_path / "a.txt", "text")
    monkeypatch.setattr(atomic, "_WINDOWS", True)
    with monkeypatch.context() as context:
        context.setattr(os, "open", windows_open)
        folder = checkpoints.save(tmp_path, PRESETS["digits"], {"step": 3}, {"ema": {"w": torch.zeros(2)}})
    assert checkpoints.damage(folder) is None
    assert len(synced) == 2  # ema.safetensors and state.json


def test_weights_may_be_read_by_whom_other_files_may(trained: Path, tmp_path: Path) -> None:
    """safetensors makes files for their owner only; those of ours are as any file that the user makes."""
    (tmp_path / "any").touch()
    save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode

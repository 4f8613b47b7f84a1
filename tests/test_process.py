"""The edge of the program: standard streams, signals, threads, and what a command leaves in its process."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, assert_same, losses, steps, tensors, train
from several import start_python
from test_train import at_step, folder_of_images, wait_for

from ddpm.cli import main
from ddpm.cli.main import _Output
from ddpm.errors import InputError, Stopped
from ddpm.files import data
from ddpm.presets import PRESETS
from ddpm.run import train as training

SAMPLE = ["sample", "digits", "-n", "1", "--steps", "2", "--sampler", "unipc"]
DDPM = [sys.executable, "-m", "ddpm"]

# -- standard streams --------------------------------------------------------------------------------------------------


@contextmanager
def ended() -> Iterator[int]:
    """A pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


def test_standard_error_may_be_closed_and_another_encoding_escapes_what_it_cannot_show(tmp_path: Path) -> None:
    out = tmp_path / "Bär.png"
    script = ["sh", "-c", 'exec "$@" 2>&-', "sh", *DDPM, *SAMPLE, "--out", str(out)]
    done = subprocess.run(script, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert rb"B\xe4r.png, " in done.stdout
    assert main([*SAMPLE, "--out", str(tmp_path / "b.png")]) == 0
    assert out.read_bytes() == (tmp_path / "b.png").read_bytes()


def test_all_standard_streams_may_be_closed(tmp_path: Path) -> None:
    """Nothing that the command writes may go to a file that got the number of a closed stream."""
    words = [*DDPM, *TINY, "--steps", "1", "--out", str(tmp_path / "run")]
    assert subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words]).returncode == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 1]


def test_standard_output_may_be_closed_and_standard_error_may_end_early(tmp_path: Path) -> None:
    """Training writes to standard error, and sampling may write nothing there."""
    with ended() as pipe:
        script = ["sh", "-c", 'exec "$@" >&-', "sh", *DDPM, *TINY, "--steps", "2", "--out", str(tmp_path / "run")]
        assert subprocess.run(script, stderr=pipe).returncode == 0
    assert steps(tmp_path / "run") == [2]


def test_standard_output_may_end_early(tmp_path: Path) -> None:
    """`| head` takes nothing more, and the work goes on. There is no message about it when Python ends either."""
    words = [*DDPM, *TINY, "--steps", "2", "--out", str(tmp_path / "run")]
    with ended() as pipe:
        done = subprocess.run(words, stdout=pipe, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0
    assert "Error" not in done.stderr
    assert steps(tmp_path / "run") == [2]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_results_that_cannot_be_written_are_an_error(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*DDPM, *SAMPLE, "--out", str(tmp_path / "a.png")], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ddpm: the disk is full")


def test_an_output_passes_on_all_that_it_does_not_change() -> None:
    assert _Output(sys.__stdout__, results=True).fileno() == 1
    assert _Output(None, results=True).write("nowhere") == 7


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "a\x1b[31mb", "a\udce4b", "a\u2028b"])
def test_a_message_is_one_line_whatever_it_names(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", text, "--out", "a.png"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert err[:-1].isprintable()


ODD = "odd\n\x1b[2J"
FAILING = {  # ODD is a name with a line break, RUN a run of that name, and PICTURE one that cannot be read
    "no preset": "train ODD",
    "no data": "train digits --data ODD/none --out out",
    "data that cannot be read": "train digits --data ODD/pictures --size 8 --channels 1 --out out",
    "no place": "train digits --steps 1 --out /proc/ODD",
    "no run": "sample ODD/none --out a.png",
    "no folder": "sample RUN -n 1 --steps 2 --out /proc/ODD/a.png",
    "a folder": "sample RUN -n 1 --steps 2 --out ODD/a.gif",
    "another suffix": "sample RUN -n 1 --out ODD.jpg",
    "an option": "sample RUN -n ODD --out a.png",
    "an unknown option": "sample RUN --ODD",
    "a name too long": f"sample RUN -n 1 --steps 2 --out ODD{'a' * 300}.png",
    "a damaged run": "sample DAMAGED -n 1 --out a.png",
    "a damaged run to resume": "train digits --steps 1 --out DAMAGED",
    "no metric": "evaluate RUN --metrics ODD",
    "damaged features": "evaluate RUN --metrics kid -n 4 --features ODD/net.py:f --out out",
    "samples that cannot be read": "evaluate RUN --metrics kid --samples ODD/pictures --features NET --out out",
    "no experiment": "paper ODD --run RUN",
    "edit": "edit RUN PICTURE --t 5 --out a.png",
    "interpolate": "interpolate RUN PICTURE PICTURE --t 5 --out a.png",
    "inpaint": "inpaint RUN PICTURE PICTURE --out a.png",
    "restore": "restore RUN PICTURE --operator blur:1 --out a.png",
    "an operator": "restore RUN PICTURE --operator ODD --out a.png",
    "compress": "compress digits PICTURE --out a.ddpm",
    "decompress": "decompress digits PICTURE --out a.png",
    "inspect": "inspect PICTURE",
    "calibrate": "calibrate ODD/none",
    "import": "import PICTURE --out a.safetensors",
    "export": "export RUN --out /proc/ODD/a.safetensors",
    "info": "info ODD/none",
    "no command": "ODD",
}


@pytest.fixture(scope="module")
def odd(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what FAILING names."""
    here = tmp_path_factory.mktemp("odd")
    shutil.copytree(trained, here / ODD / "run")
    shutil.copytree(trained, here / ODD / "damaged")
    for file in (here / ODD / "damaged").rglob("*.*"):
        if file.is_file():
            file.write_bytes(b"\n")
    (here / ODD / "a.gif").mkdir()
    (here / ODD / "pictures").mkdir()
    for name in ("a\nb.png", "c\nd.cr2", "e\nf.png"):
        (here / ODD / "pictures" / name).write_bytes(b"\n")
    (here / ODD / "net.py").write_text("def f(x):\n    raise ValueError('a' + chr(10) + 'b')\n")
    return here


def assert_one_error(err: str) -> None:
    """Standard error ends in the one line about the error; what is before it are whole lines of another kind."""
    lines = err.split("\n")
    assert lines.pop() == ""
    assert [line.startswith("ddpm: ") for line in lines] == [False] * (len(lines) - 1) + [True], err
    assert lines[-1].isprintable()
    warned = [line for line in lines if line.startswith("warning: ")]
    assert all(line.isprintable() for line in warned)


@pytest.mark.parametrize("name", FAILING)
def test_the_last_line_is_the_one_error(
    name: str, odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever a command warns of before it fails, and whatever line breaks its values have."""
    monkeypatch.chdir(odd)
    stands_for = {
        "RUN": f"{ODD}/run", "DAMAGED": f"{ODD}/damaged", "PICTURE": f"{ODD}/pictures/a\nb.png",
        "NET": f"{ODD}/net.py:f", "ODD": ODD,
    }  # fmt: skip
    words = [re.sub("|".join(stands_for), lambda found: stands_for[found[0]], word) for word in FAILING[name].split()]
    assert main(words) in (1, 2)
    assert_one_error(capsys.readouterr().err)


def test_a_warning_is_a_line_before_the_error(
    odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(odd)
    assert main(["train", "digits", "--data", f"{ODD}/pictures", "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert_one_error(err)
    assert err.startswith("warning: ")
    assert ".cr2" in err.splitlines()[0]


@pytest.mark.parametrize("code", [1, 2, 130])
def test_the_error_stands_below_a_progress_bar(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bar that the failing loop still shows ends before, and is not drawn again."""
    from tqdm import tqdm

    error = {1: Stopped("the loss\nis nan"), 2: InputError("--t 5\n: want 4"), 130: KeyboardInterrupt("in\nside")}[code]

    def fail(*_: Any, **__: Any) -> None:
        for i in tqdm(range(9), file=sys.stderr, mininterval=0):
            if i == 5:
                warnings.warn("a\nb", UserWarning, stacklevel=1)
                raise error

    monkeypatch.setattr("ddpm.run.sample.sample", fail)
    assert main([*SAMPLE, "--out", str(tmp_path / "a.png")]) == code
    err = capsys.readouterr().err.replace("\r", "\n")
    assert "5/9" in err
    assert_one_error(err)


# -- what a command leaves in its process ------------------------------------------------------------------------------


def test_main_puts_back_what_it_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    torch.set_num_threads(2)

    def state() -> list[Any]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("KMP_")}  # torch's own
        signals = [signal.getsignal(number) for number in signal.valid_signals()]
        return [
            warnings.showwarning, warnings.filters[:], sys.stdout, sys.stderr, environment, signals, os.getcwd(),
            torch.get_num_threads(), torch.get_rng_state().tolist(), torch.is_grad_enabled(),
            torch.get_default_dtype(), torch.backends.cudnn.benchmark, sys.excepthook,
        ]  # fmt: skip

    before = state()
    assert train(tmp_path / "run", "--steps", 2) == 0
    assert main([*SAMPLE, "--out", str(tmp_path / "a.png")]) == 0
    assert main(["train", "no-such-preset"]) == 2
    after = state()
    torch.set_num_threads(1)
    for old, new in zip(before, after, strict=True):
        assert new == old


def test_commands_and_training_run_in_any_thread(tmp_path: Path) -> None:
    """Python sets signal handlers in the main thread only, and a web page or a job queue runs work in another one."""
    preset = replace(PRESETS["digits"], steps=2, batch_size=4, sample_every=0, eval_images=4, device="cpu")
    results: dict[str, Any] = {}
    calls = {
        "train": lambda: training.train(preset, tmp_path / "a").step,
        "main": lambda: train(tmp_path / "b", "--steps", 2),
        "sample": lambda: main([*SAMPLE, "--out", str(tmp_path / "a.png")]),
    }
    for name, call in calls.items():
        thread = threading.Thread(target=lambda name=name, call=call: results.update({name: call()}))
        thread.start()
        thread.join()
    assert results == {"train": 2, "main": 0, "sample": 0}


# -- signals and failures in training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in data.STOP_SIGNALS if hasattr(signal, name)])
def test_every_stop_signal_saves(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(3, monkeypatch, lambda: os.kill(os.getpid(), getattr(signal, name)))
    assert train(tmp_path / "run", "--steps", 5) == 128 + getattr(signal, name)
    assert steps(tmp_path / "run") == [3]


def test_an_ignored_signal_stays_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`nohup ddpm train` goes on when the terminal closes."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_step(3, monkeypatch, lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert train(tmp_path / "run", "--steps", 5) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def fail_in(monkeypatch: pytest.MonkeyPatch, name: str, call: int, error: Exception) -> None:
    """Let a function of run/train.py raise `error` at its call of this number."""
    real, calls = getattr(training, name), []

    def failing(*args: Any, **settings: Any) -> Any:
        calls.append(0)
        if len(calls) == call:
            raise error
        return real(*args, **settings)

    monkeypatch.setattr(training, name, failing)


EIGHT = ("--dropout", 0.3, "--save-every", 4, "--sample-every", 4, "--steps", 8)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(out, *EIGHT) == 0
    return out


@pytest.mark.parametrize("name", ["update", "apply", "draw", "held_out_by_level"])
def test_any_exception_saves_the_last_whole_step(
    name: str, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is saved is bit for bit the run that was not disturbed, and the run can be resumed from it."""
    calls = {"update": 5, "apply": 5, "draw": 1, "held_out_by_level": 2}  # held_out_by_level runs at step 0, too
    fail_in(monkeypatch, name, calls[name], ZeroDivisionError("disturbed"))
    with pytest.raises(ZeroDivisionError, match="disturbed"):
        train(tmp_path / "run", *EIGHT)
    assert steps(tmp_path / "run") == [4]
    monkeypatch.undo()
    assert train(tmp_path / "run", *EIGHT) == 0
    assert_same(tensors(tmp_path / "run", 8), tensors(undisturbed, 8))
    assert losses(tmp_path / "run") == losses(undisturbed)


def test_nothing_is_saved_amid_an_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After Adam's step and before the average's, weights and average are those of different steps."""

    def fail() -> None:
        raise ZeroDivisionError("amid an update")

    at_step(7, monkeypatch, fail)
    with pytest.raises(ZeroDivisionError, match="amid an update") as caught:
        train(tmp_path / "run", "--save-every", 5, "--steps", 10)
    assert steps(tmp_path / "run") == [5]
    assert caught.value.__notes__ == [f"The last good checkpoint is {tmp_path / 'run' / 'checkpoints' / '00000005'}."]


def _tiny(**changes: Any) -> Any:
    return replace(
        PRESETS["digits"], classes=False, width=32, channel_multipliers=(1,), attention_resolutions=(0,), batch_size=8,
        eval_images=16, sample_every=0, precision="float32", **changes,
    )  # fmt: skip


def test_a_full_disk_is_not_tried_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def full(*_: Any) -> None:
        calls.append(0)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ddpm.files.checkpoints.save", full)
    with pytest.raises(Stopped, match=r"step 3: cannot save to .*: the disk is full"):
        training.train(_tiny(steps=3), tmp_path / "run")
    assert len(calls) <= 2


# -- processes that decode images --------------------------------------------------------------------------------------


def workers() -> list[int]:
    import multiprocessing

    return [child.pid for child in multiprocessing.active_children() if child.pid]


def test_dead_workers_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system kills them when memory is full. The run is the same to the bit; workers ignore SIGTERM."""
    folder_of_images(tmp_path / "data")
    options = ("--data", tmp_path / "data", "--workers", 2, "--steps", 12)
    assert train(tmp_path / "memory", *options) == 0
    for number in (signal.SIGKILL, signal.SIGTERM):
        killed: list[int] = []

        def kill(killed: list[int] = killed, number: int = number) -> None:
            killed.extend(workers())
            for pid in killed:
                os.kill(pid, number)

        with monkeypatch.context() as patch:
            at_step(3, patch, kill)
            assert train(tmp_path / str(number), *options, "--cache-bytes", 0) == 0
        assert len(killed) == 2
        assert losses(tmp_path / str(number)) == losses(tmp_path / "memory")
        assert not workers()


def test_workers_that_always_die_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of_images(tmp_path / "data")
    monkeypatch.setattr(sys.modules["ddpm.files.data.batches"], "_TRIES", 2)
    decode = data.Images.decode

    def die(*args: Any, **named: Any) -> Any:
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(*args, **named)

    monkeypatch.setattr(data.Images, "decode", die)
    monkeypatch.setattr(training, "held_out_by_level", lambda *_: [0.0])
    with pytest.raises(Stopped, match=r"died 2 times in a row .* want fewer workers"):
        training.train(_tiny(data=str(tmp_path / "data"), workers=2, cache_bytes=0, steps=3), tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_whole_group(number: int, tmp_path: Path) -> None:
    """Slurm, systemd and `timeout` signal every process. SIGTERM saves; after SIGKILL the lock is free at once."""
    folder_of_images(tmp_path / "data")
    run = tmp_path / "run"
    options = ["--data", tmp_path / "data", "--steps", 100000, "--workers", 2, "--cache-bytes", 0, "--out", run]
    process = start_python(["-m", "ddpm", *TINY, *options], tmp_path)
    assert process.pid is not None
    try:
        wait_for(lambda: (run / "metrics.jsonl").exists() and '"step": 5,' in (run / "metrics.jsonl").read_text())
        if number == signal.SIGTERM:
            os.killpg(process.pid, number)
            process.join(60)
            assert process.exitcode == 143
            assert len(steps(run)) == 1
        else:
            process.kill()  # the trainer alone; its workers find out seconds later
            process.join()
            import filelock

            with filelock.FileLock(run / ".lock").acquire(timeout=1):
                pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

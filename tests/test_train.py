"""`ddpm train`: a run that was stopped and resumed equals one that was not; the training step; what is logged."""

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import torch
from conftest import TINY, assert_close, assert_same, losses, metrics, steps, tensors, train
from PIL import Image
from several import start_python
from torch import Tensor, nn

import ddpm
from ddpm import kernels
from ddpm.errors import InputError
from ddpm.files import checkpoints, data, opening
from ddpm.files import images as pictures
from ddpm.presets import PRESETS
from ddpm.run import ema
from ddpm.run.device import GraphedGradient, compile_stages, pick_compile
from ddpm.run.held_out import BUCKETS, held_out_by_level
from ddpm.run.lock import lock
from ddpm.run.meter import Meter
from ddpm.run.processes import Processes
from ddpm.run.sample import generate
from ddpm.run.step import begin
from ddpm.run.train import _Watch

# -- stopping and resuming ---------------------------------------------------------------------------------------------

EVERYTHING = (
    "--dropout",
    0.3,
    "--flip",
    "--accumulate",
    2,
    "--grad-clip",
    0.5,
    "--channel-multipliers",
    "1",
    "--patch",
    2,
)
EVERYTHING += ("--timestep-sampling", "stratified", "--weighting", "min_snr")


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_n_steps_and_n_steps_are_2n_steps_to_the_bit(optimizer: str, tmp_path: Path) -> None:
    """Weights, average and moments are equal, with all random parts switched on."""
    options = (*EVERYTHING, "--optimizer", optimizer, "--lr-ref-steps", 2)
    assert train(tmp_path / "whole", *options, "--steps", 6) == 0
    assert train(tmp_path / "halves", *options, "--steps", 3) == 0
    assert train(tmp_path / "halves", *options, "--steps", 6) == 0
    assert_same(tensors(tmp_path / "whole", 6), tensors(tmp_path / "halves", 6))
    assert losses(tmp_path / "whole") == losses(tmp_path / "halves")


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_the_steps_that_are_measured_are_those_of_a_run(optimizer: str, tmp_path: Path) -> None:
    """To the bit: weights, average and moments, with all random parts switched on."""
    assert train(tmp_path / "run", *EVERYTHING, "--optimizer", optimizer, "--steps", 3) == 0
    preset = opening.open_checkpoint(tmp_path / "run").preset
    images, _ = data.load_pair("digits", preset.size, preset.channels)
    training = begin(preset, images, Processes(0, 1, torch.device("cpu")))
    for batch in data.batches(images, preset.seed, preset.batch_size, 0, 3):
        training.step(preset, batch)
    model, run = training.model, tensors(tmp_path / "run", 3)
    own = {"raw": model.network.state_dict(), "ema": model.average.state_dict(), "optimizer": model.moments()}
    assert_same({f"{kind}/{name}": value for kind, found in own.items() for name, value in found.items()}, run)


def test_the_loss_of_a_step_is_that_of_the_whole_batch() -> None:
    """However many parts compute it."""
    preset = dataclasses.replace(PRESETS["digits"], classes=False, batch_size=8, precision="float32")
    images, _ = data.load_pair("digits", preset.size, preset.channels)
    found = []
    for parts in (1, 2, 8):
        divided = dataclasses.replace(preset, accumulate=parts)
        training = begin(divided, images, Processes(0, 1, torch.device("cpu")))
        found.append(float(training.step(divided, images.batch(range(8)))))
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)


def test_a_killed_run_resumes_from_its_last_checkpoint(tmp_path: Path) -> None:
    """After SIGKILL only the steps since the last checkpoint are lost, and no step is logged twice or in part."""
    run, every = tmp_path / "run", 2
    command = ["-m", "ddpm", *TINY, "--dropout", 0.3, "--save-every", every, "--steps", 100000, "--out", run]
    process = start_python(command, tmp_path)
    try:
        wait_for(lambda: (run / "metrics.jsonl").exists() and '"step": 5,' in (run / "metrics.jsonl").read_text())
    finally:
        process.kill()
        process.join()
    seen = max(line["step"] for line in metrics_of_a_killed_run(run))
    checkpoint = checkpoints.newest(run)
    assert checkpoint is not None
    at = int(checkpoint.name)
    assert at >= (seen - 1) // every * every >= 4
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')  # half a line, the worst that a kill can leave

    end = at + 3
    assert train(run, "--dropout", 0.3, "--save-every", every, "--steps", end) == 0
    assert list(losses(run)) == list(range(1, end + 1))
    assert not list((run / "checkpoints").glob(".*"))
    assert train(tmp_path / "whole", "--dropout", 0.3, "--steps", end) == 0
    assert_same(tensors(run, end), tensors(tmp_path / "whole", end))
    assert losses(run) == losses(tmp_path / "whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_same_command_resumes(
    number: signal.Signals,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C and SIGTERM write a checkpoint of the current step and print one line. No step is lost."""
    at_step(7, monkeypatch, lambda: os.kill(os.getpid(), number))
    assert train(tmp_path / "run", "--steps", 10) == code
    assert "stopped at step 7 and saved; the same command resumes the run" in capsys.readouterr().err
    assert steps(tmp_path / "run") == [7]
    monkeypatch.undo()
    assert train(tmp_path / "run", "--steps", 10) == 0
    assert train(tmp_path / "whole", "--steps", 10) == 0
    assert_same(tensors(tmp_path / "run", 10), tensors(tmp_path / "whole", 10))
    assert list(losses(tmp_path / "run")) == list(range(1, 11))


def test_a_second_ctrl_c_does_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends the program at once, without a traceback. The last checkpoint stays."""
    at_step(7, monkeypatch, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    assert train(tmp_path / "run", "--steps", 10, "--save-every", 5) == 130
    assert capsys.readouterr().err.endswith("ddpm: interrupted\n")
    assert steps(tmp_path / "run") == [5]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_before_the_first_step_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to save yet. The same command starts again, and step 0 is logged once."""
    with monkeypatch.context() as patch:
        patch.setattr("ddpm.run.train.data.batches", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
        assert train(tmp_path / "run", "--steps", 2) == 130
    assert [line["step"] for line in metrics(tmp_path / "run")] == [0]
    assert train(tmp_path / "run", "--steps", 2) == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == [0, 1, 2, 2]


def test_a_signal_does_not_wait_for_the_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluation is cut off, the checkpoint has no held-out loss, and no grid of samples is made."""
    calls = []

    def evaluation(*given: Any) -> list[float]:
        calls.append(0)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return held_out_by_level(*given)

    monkeypatch.setattr("ddpm.run.train.held_out_by_level", evaluation)
    assert train(tmp_path / "run", "--steps", 10, "--save-every", 5, "--sample-every", 5) == 143
    assert steps(tmp_path / "run") == [5]
    assert checkpoints.read_state(tmp_path / "run" / "checkpoints" / "00000005")["held_out"] is None
    assert [line["step"] for line in metrics(tmp_path / "run") if "held_out" in line] == [0]
    assert not (tmp_path / "run" / "samples").exists()


def test_images_are_decoded_ahead_by_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With images that do not fit in memory, a stopped and resumed run is the same run, and no process stays."""
    folder_of_images(tmp_path / "data")
    options = ("--data", tmp_path / "data", "--steps", 6, "--workers", 2)
    assert train(tmp_path / "memory", *options) == 0
    with monkeypatch.context() as patch:
        at_step(3, patch, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert train(tmp_path / "ahead", *options, "--cache-bytes", 0) == 130
    assert not multiprocessing.active_children()
    shutil.copytree(tmp_path / "ahead", tmp_path / "then-in-memory")
    assert train(tmp_path / "ahead", *options, "--cache-bytes", "0K") == 0
    assert train(tmp_path / "then-in-memory", *options, "--cache-bytes", "1.5M") == 0
    for run in ("ahead", "then-in-memory"):
        assert losses(tmp_path / run) == losses(tmp_path / "memory")
    assert not multiprocessing.active_children()


def test_verify_notices_an_image_of_the_same_name_and_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of_images(tmp_path / "data")
    monkeypatch.setattr("ddpm.files.data.loading.PLAIN", 0)
    options = ("--data", tmp_path / "data", "--verify", "--steps")
    assert train(tmp_path / "run", *options, 2) == 0
    assert train(tmp_path / "run", *options, 3) == 0
    old = {}
    for path in sorted((tmp_path / "data").iterdir()):
        old[path], status = path.read_bytes(), path.stat()
        path.write_bytes(old[path][:-4] + b"\0\0\0\0")  # the checksum of the last chunk, which Pillow passes over
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert train(tmp_path / "run", *options[:2], "--steps", 4) == 0  # without --verify it is not noticed
    capsys.readouterr()
    assert train(tmp_path / "run", *options, 5) == 2
    assert "other contents; want those, or another out" in capsys.readouterr().err
    for path, content in old.items():
        path.write_bytes(content)
    assert train(tmp_path / "run", *options, 5) == 0
    assert train(tmp_path / "later", *options[:2], "--steps", 1) == 0
    capsys.readouterr()
    assert train(tmp_path / "later", *options, 2) == 0
    assert "has no hash of its images yet, so nothing is compared" in capsys.readouterr().err
    path.write_bytes(content + b"\0")  # the first thing that differs is said
    assert train(tmp_path / "later", *options, 3) == 2
    assert "not the images that the run in" in capsys.readouterr().err


def test_the_log_says_how_much_training_waits_for_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of_images(tmp_path / "data")
    options = ("--data", tmp_path / "data", "--steps", 4, "--workers", 0, "--cache-bytes")
    decode = data.Images.decode

    def slow(*args: Any, **named: Any) -> Any:
        time.sleep(0.3)
        return decode(*args, **named)

    monkeypatch.setattr(data.Images, "decode", slow)
    shares = []
    for cache_bytes in (0, "1M"):
        assert train(tmp_path / f"run{cache_bytes}", *options, cache_bytes) == 0
        lines = [line for line in metrics(tmp_path / f"run{cache_bytes}") if "data_wait" in line]
        assert all(0 <= line["data_wait"] <= 1 for line in lines)
        shares.append(sorted(line["data_wait"] for line in lines)[1])
    assert shares[0] > 2 * shares[1]
    meter = Meter(0.0, Processes(0, 1, torch.device("cpu")), 8)
    for waited, line in ((0.5, ""), (6.0, "training waits for data 60% of the time"), (6.0, "")):
        meter._all_waited, meter._all_seconds = waited, 10.0
        assert meter.waits().partition(";")[0] == line


def test_cache_bytes_that_are_no_number_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("4 apples", "-1", "1e9", "9999999T"):
        assert train(tmp_path / "run", "--cache-bytes", text) == 2
        wanted = f"ddpm: --cache-bytes '{text}': want a number of bytes, as 4G, 500M or 0\n"
        assert capsys.readouterr().err.endswith(wanted)


def test_some_settings_may_change_when_a_run_is_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More steps, other intervals or gradient checkpointing change no bit of the weights."""
    assert train(tmp_path / "run", "--steps", 3) == 0
    more = "--steps 6 --save-every 2 --log-every 3 --keep 5 --eval-images 32 --sample-every 6 --gradient-checkpointing"
    assert train(tmp_path / "run", *more.split(), "--device", "cpu", "--workers", 0) == 0
    assert steps(tmp_path / "run") == [3, 4, 6]
    assert train(tmp_path / "whole", "--steps", 6) == 0
    assert_same(tensors(tmp_path / "run", 6), tensors(tmp_path / "whole", 6))
    capsys.readouterr()
    assert train(tmp_path / "run", "--steps", 6) == 0
    assert "trained to step 6 already; steps above 6 continue it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [("--width", 64, "width 64: the run in"), ("--lr", 0.5, "lr 0.5: the run in"), ("--seed", 1, "seed 1: the run in")],
)
def test_other_settings_are_refused_when_a_run_is_resumed(
    option: str, value: float, words: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A setting that would change the results is refused by name, before any file changes."""
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*")}
    assert train(trained, "--steps", 40, option, value) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "want the same, or another out" in error
    assert {p: p.stat().st_mtime_ns for p in trained.rglob("*")} == before


def test_other_images_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder of the same name with other pictures is refused."""
    folder_of_images(tmp_path / "data")
    options = ("--data", tmp_path / "data", "--steps")
    assert train(tmp_path / "run", *options, 2) == 0
    pictures.save(tmp_path / "data" / "3.png", np.zeros((8, 8, 1), np.uint8))
    assert train(tmp_path / "run", *options, 4) == 2
    assert "not the images that the run in" in capsys.readouterr().err


def test_images_may_be_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run resumes with its images in another folder, but not with another source while the first exists."""
    folder_of_images(tmp_path / "data")
    assert train(tmp_path / "run", "--data", tmp_path / "data", "--steps", 2) == 0
    assert train(tmp_path / "run", "--steps", 4) == 2
    assert "data 'digits': the run in" in capsys.readouterr().err
    (tmp_path / "data").rename(tmp_path / "moved")
    assert train(tmp_path / "run", "--data", tmp_path / "moved", "--steps", 4) == 0
    assert steps(tmp_path / "run") == [2, 4]
    assert train(tmp_path / "run", "--data", tmp_path / "moved", "--steps", 6) == 0


@pytest.mark.parametrize("name", ["data", "pairs"])
def test_a_run_does_not_lie_in_its_data(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its grids of samples would be images, and it could not resume."""
    folder_of_images(tmp_path / "data")
    folder_of_images(tmp_path / "other")
    monkeypatch.chdir(tmp_path / ("data" if name == "data" else "other"))
    options = ["--data", str(tmp_path / "data"), *(["--condition", "pairs", "--pairs", "."] if name == "pairs" else [])]
    assert train(Path("runs/mine"), *options, "--steps", 2) == 2
    assert "want it elsewhere" in capsys.readouterr().err
    assert not Path("runs").exists()
    assert train(Path("../runs/mine"), *options, "--steps", 2) == 0


def test_two_processes_cannot_train_one_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second one gets an error."""
    with filelock.FileLock(trained / ".lock"):
        assert train(trained, "--steps", 40) == 2
    assert "another process is training this run; want another out" in capsys.readouterr().err


def test_a_run_that_went_on_before_it_was_locked_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when a second command starts while the first one saves and ends."""
    run = tmp_path / "run"
    assert train(run, "--steps", 2) == 0

    def late(*given: Any) -> Any:
        shutil.copytree(run / "checkpoints/00000002", run / "checkpoints/00000003")
        return lock(*given)

    with monkeypatch.context() as patch:
        patch.setattr("ddpm.run.train.lock", late)
        before = (run / "metrics.jsonl").read_bytes()
        assert train(run, "--steps", 4) == 2
    assert "another process trained this run until now; want the same command again" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before


# -- losses that are not finite ----------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line names the step, the last good checkpoint and what to try. The bad step is not saved."""
    simple, calls = ddpm.losses.LOSSES["simple"], []

    def loss(*given: Any) -> Tensor:
        calls.append(0)
        return simple(*given) * (math.nan if len(calls) == 8 else 1.0)

    monkeypatch.setitem(ddpm.losses.LOSSES, "simple", loss)
    assert train(tmp_path / "run", "--steps", 20, "--save-every", 5, "--accumulate", 1) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("ddpm: step 7: the gradient is not finite (loss nan)")
    assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoints' / '00000005'}" in last
    assert "lower lr" in last
    assert steps(tmp_path / "run") == [5]
    assert max(losses(tmp_path / "run")) == 7
    monkeypatch.undo()
    assert train(tmp_path / "run", "--steps", 10, "--save-every", 5) == 0


def test_a_held_out_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss of one image is enough."""
    simple = ddpm.losses.simple

    def loss(denoiser: ddpm.Denoiser, x0: Tensor, t: Tensor, *given: Any) -> Tensor:
        return simple(denoiser, x0, t, *given).masked_fill(t == t.max(), math.nan)

    monkeypatch.setattr(ddpm.losses, "simple", loss)
    assert train(tmp_path / "run", "--steps", 1) == 1
    assert "ddpm: step 0: the held-out loss is not finite" in capsys.readouterr().err


def test_a_huge_learning_rate_leaves_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Gradients are finite, but the weights are useless and are not saved as a good checkpoint."""
    assert train(tmp_path / "run", "--lr", 1e30, "--warmup", 0, "--steps", 9, "--save-every", 1) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "not finite; the last good checkpoint is none; try a lower lr" in last
    assert not (tmp_path / "run" / "checkpoints").exists()


# -- a step ------------------------------------------------------------------------------------------------------------


def test_accumulation_changes_no_step(tmp_path: Path) -> None:
    """A batch in 1, 2 or 4 parts gives the same losses and weights within float error."""
    options = ("--flip", "--timestep-sampling", "stratified", "--steps", 3)
    for parts in (1, 2, 4):
        assert train(tmp_path / str(parts), "--accumulate", parts, *options) == 0
    one = tensors(tmp_path / "1", 3)
    for parts in (2, 4):
        assert losses(tmp_path / str(parts)) == pytest.approx(losses(tmp_path / "1"), rel=1e-4)
        assert_close(tensors(tmp_path / str(parts), 3), one)


def test_gradient_checkpointing_changes_no_bit(tmp_path: Path) -> None:
    """Recomputed activations are the same, with dropout."""
    for name, option in (("kept", "--no-gradient-checkpointing"), ("again", "--gradient-checkpointing")):
        assert train(tmp_path / name, option, "--dropout", 0.3, "--steps", 4) == 0
    assert_same(tensors(tmp_path / "kept", 4), tensors(tmp_path / "again", 4))


@pytest.mark.parametrize("warmup", [False, True])
def test_the_moving_average_follows_its_recurrence(warmup: bool, tmp_path: Path) -> None:
    """average <- d average + (1 - d) weights. The first update copies, and with warm-up d rises as (1+n)/(10+n)."""
    option = "--ema-warmup" if warmup else "--no-ema-warmup"
    options = ("--steps", 6, "--save-every", 1, "--keep", 9, "--warmup", 0, "--ema-decay", 0.3, option)
    assert train(tmp_path / "run", *options) == 0
    average: dict[str, Tensor] = {}
    for n in range(6):
        checkpoint = tensors(tmp_path / "run", n + 1)
        decay = 0.0 if n == 0 else min(0.3, (1 + n) / (10 + n)) if warmup else 0.3
        for name in (name.removeprefix("raw/") for name in checkpoint if name.startswith("raw/")):
            weights = checkpoint[f"raw/{name}"].double()
            average[name] = weights if n == 0 else decay * average[name] + (1 - decay) * weights
            torch.testing.assert_close(checkpoint[f"ema/{name}"].double(), average[name], rtol=1e-5, atol=1e-7)


def test_the_learning_rate_rises_during_the_warmup(tmp_path: Path) -> None:
    """It rises linearly from 0, so the first step does not change the weights, and then stays."""
    assert train(tmp_path / "run", "--steps", 6, "--save-every", 1, "--keep", 9, "--warmup", 4, "--lr", 0.008) == 0
    rates = [line["lr"] for line in metrics(tmp_path / "run") if "lr" in line]
    assert rates == pytest.approx([0, 0.002, 0.004, 0.006, 0.008, 0.008])
    preset = opening.open_checkpoint(tmp_path / "run").preset
    torch.manual_seed(preset.seed)
    network = ddpm.build(preset).network
    assert isinstance(network, nn.Module)
    first = tensors(tmp_path / "run", 1)
    assert all(torch.equal(first[f"raw/{name}"], value) for name, value in network.state_dict().items())


def test_the_learning_rate_falls_during_the_cooldown(tmp_path: Path) -> None:
    """It falls linearly to 0, also after a stop. With more steps it rises again."""
    plan = ("--warmup", 2, "--lr", 0.008, "--cooldown", 0.5, "--save-every", 6, "--keep", 9)
    assert train(tmp_path / "whole", *plan, "--steps", 8) == 0
    rates = [line["lr"] for line in metrics(tmp_path / "whole") if "lr" in line]
    assert rates == pytest.approx([0, 0.004, 0.008, 0.008, 0.008, 0.006, 0.004, 0.002])
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "00000008")
    assert train(tmp_path / "stopped", *plan, "--steps", 8) == 0
    assert_same(tensors(tmp_path / "stopped", 8), tensors(tmp_path / "whole", 8))
    assert train(tmp_path / "whole", *plan, "--steps", 16) == 0
    rates = [line["lr"] for line in metrics(tmp_path / "whole") if "lr" in line]
    assert rates[8:] == pytest.approx([0.001 * i for i in range(8, 0, -1)])


def test_the_learning_rate_falls_without_an_end(tmp_path: Path) -> None:
    """As 1/sqrt(step) after lr_ref_steps, on top of warmup and cooldown. More steps change no rate before."""
    plan = ("--warmup", 2, "--lr", 0.008, "--lr-ref-steps", 4)
    for end in (6, 10):
        assert train(tmp_path / "run", *plan, "--steps", end) == 0
    rates = [line["lr"] for line in metrics(tmp_path / "run") if "lr" in line]
    assert rates == pytest.approx([0, 0.004, 0.008, 0.008, *(0.008 / math.sqrt(n / 4) for n in range(4, 10))])
    assert train(tmp_path / "ends", *plan, "--steps", 10, "--cooldown", 0.2) == 0
    ending = [line["lr"] for line in metrics(tmp_path / "ends") if "lr" in line]
    assert ending == pytest.approx([*rates[:9], rates[9] / 2])


@pytest.mark.parametrize("weighting", ["min_snr", "p2"])
def test_the_weighting_scales_the_training_loss(weighting: str, tmp_path: Path) -> None:
    """With one level, the loss is the unweighted loss times the weight of this level."""
    one = (
        "--num-timesteps",
        1,
        "--beta-1",
        0.5,
        "--sample-steps",
        1,
        "--steps",
        1,
    )  # SNR 1: eps weighs 1, or 1/2 by p2
    assert train(tmp_path / "none", *one) == 0
    assert train(tmp_path / weighting, *one, "--weighting", weighting) == 0
    factor = {"min_snr": 1.0, "p2": 0.5}[weighting]
    assert losses(tmp_path / weighting)[1] == pytest.approx(factor * losses(tmp_path / "none")[1])


def test_gradients_are_clipped_to_the_norm(tmp_path: Path) -> None:
    """Adam's first moment after one step is a tenth of the clipped gradient. The logged norm is not clipped."""
    assert train(tmp_path / "run", "--steps", 1, "--grad-clip", 0.25) == 0
    first = [value for name, value in tensors(tmp_path / "run", 1).items() if name.startswith("optimizer/exp_avg.")]
    norm = math.sqrt(sum(float(value.double().square().sum()) for value in first)) / 0.1
    (logged,) = [line["grad_norm"] for line in metrics(tmp_path / "run") if "grad_norm" in line]
    assert norm == pytest.approx(0.25, rel=1e-4)
    assert logged > 0.5


def test_only_the_network_computes_in_bf16(tmp_path: Path) -> None:
    """Losses are near those of float32. Weights, average and moments stay float32."""
    for precision in ("float32", "bf16"):
        assert train(tmp_path / precision, "--precision", precision, "--steps", 4) == 0
    bf16 = losses(tmp_path / "bf16")
    assert bf16 == pytest.approx(losses(tmp_path / "float32"), abs=0.02)
    assert bf16 != losses(tmp_path / "float32")
    assert {value.dtype for value in tensors(tmp_path / "bf16", 4).values()} == {torch.float32}


@pytest.mark.parametrize("what", ["--loss vlb --no-clip", "--loss hybrid --variance learned_range", "--predict v"])
def test_every_loss_trains(what: str, tmp_path: Path) -> None:
    """The held-out loss falls for the bound, for the hybrid with a learned variance, and for v prediction."""
    assert train(tmp_path / "run", *what.split(), "--steps", 20, "--batch-size", 16, "--warmup", 1) == 0
    held_out = [line["held_out"] for line in metrics(tmp_path / "run") if "held_out" in line]
    assert held_out[-1] < 0.9 * held_out[0]


# -- what is written ---------------------------------------------------------------------------------------------------


def test_files_of_a_run(trained: Path) -> None:
    """A run writes config.json, metrics.jsonl with these keys, checkpoints/STEP/*.safetensors and samples/*.png."""
    assert json.loads((trained / "config.json").read_text())["width"] == 32
    lines = metrics(trained)
    training = [line for line in lines if "loss" in line]
    keys = {"step", "loss", "lr", "grad_norm", "images_per_second", "data_wait", "seconds"}
    assert all(line.keys() == keys for line in training)
    assert [line["step"] for line in training] == list(range(1, 31))
    assert all(a["seconds"] < b["seconds"] for a, b in itertools.pairwise(training))
    held_out = [line for line in lines if "held_out" in line]
    assert [line["step"] for line in held_out] == [0, 10, 20, 30]
    assert all(len(line["held_out_by_level"]) == BUCKETS for line in held_out)
    assert held_out[-1]["held_out"] < held_out[0]["held_out"] - 0.05  # the network learns
    sheet = np.asarray(Image.open(trained / "samples" / "00000030.png"))
    assert sheet.shape == (2 * 34 + 2, 2 * 34 + 2)  # 2 x 2 tiles of 32 pixels, with gaps of 2
    assert sheet.std() > 10


def test_output_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There is no progress bar. stdout has the results and the place of the samples."""
    assert train(tmp_path / "run", "--steps", 2, "--sample-every", 1, "--beta-T", 0.7, "--warmup", 0) == 0
    out, err = capsys.readouterr()
    assert "\r" not in err
    assert "%|" not in err
    assert len(err.splitlines()) == 3
    assert err.startswith("digits: train 1,500 images, held out 297 of test; classes 0, 1, 2, ")
    assert "held-out L_simple: " in out
    assert "images/s" in out
    assert str(tmp_path / "run" / "samples") in out


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--json prints one object and nothing else on stdout."""
    assert train(tmp_path / "run", "--steps", 2, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["step"] == 2
    assert result["held_out"] == metrics(tmp_path / "run")[-1]["held_out"]
    assert result["held_out_before"] == metrics(tmp_path / "run")[0]["held_out"]


@pytest.mark.parametrize(("option", "warned"), [("--no-ema-warmup", True), ("--ema-warmup", False)])
def test_a_run_that_is_shorter_than_its_average_warns(
    option: str, warned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its averaged weights would be near the first weights."""
    assert train(tmp_path / "run", "--steps", 2, "--ema-decay", 0.9999, option) == 0
    assert ("warning: ema_decay 0.9999 averages over about 10,000 steps" in capsys.readouterr().err) == warned


def test_bad_images_are_skipped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """This needs --skip-bad. Without it the first bad image ends the run, and the error names it."""
    folder_of_images(tmp_path / "data")
    (tmp_path / "data" / "5.png").write_bytes(b"not a picture")
    options = ("--data", tmp_path / "data", "--steps", 2)
    assert train(tmp_path / "run", *options) == 2
    assert "5.png" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert train(tmp_path / "run", *options, "--skip-bad") == 0
    assert "bad images that were skipped: 1" in capsys.readouterr().err


# -- on a GPU ----------------------------------------------------------------------------------------------------------


def test_compiling_changes_neither_steps_nor_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled stages (here without a backend), with or without gradient checkpointing, give the same run."""
    eager = functools.partial(compile_stages, backend="eager")
    monkeypatch.setattr("ddpm.run.step.compile_stages", eager)
    with kernels.disabled():  # what is compiled does without them
        assert train(tmp_path / "plain", "--dropout", 0.3, "--steps", 4) == 0
        assert train(tmp_path / "run", "--dropout", 0.3, "--compile", "on", "--steps", 2) == 0
        assert (
            train(tmp_path / "run", "--dropout", 0.3, "--compile", "on", "--gradient-checkpointing", "--steps", 4) == 0
        )
    assert_same(tensors(tmp_path / "run", 4), tensors(tmp_path / "plain", 4))


@pytest.mark.parametrize("fault", ["", "the capture fails", "another gradient"])
def test_a_graph_of_the_gradient_or_a_line_of_why(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graph or not, each call gives the gradient of its own tensors, weights and draws. (Here a replay is a call.)"""
    weight = torch.nn.Parameter(torch.ones(3))
    captured, lines = [], list[str]()

    def gradient(x: Tensor, y: Tensor | None) -> Tensor:
        loss = (weight.square() * x * torch.rand(3)).sum()
        loss.backward()
        return loss.detach()

    def capture(function: Callable[[], Tensor], where: torch.device, warm_up: int) -> Any:
        if fault == "the capture fails":
            raise RuntimeError("no graph today\nand more")
        loss = function()
        grad = weight.grad
        captured.append(grad)

        def replay() -> None:
            loss.copy_(function())
            grad.copy_(weight.grad + (fault == "another gradient"))

        return replay, loss

    monkeypatch.setattr("ddpm.run.device._capture", capture)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.get_rng_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: torch.set_rng_state(state))
    graphed = GraphedGradient(gradient, [weight], lines.append)
    for step in range(9):
        x = torch.full((3,), float(step))
        results = []
        for run in (graphed, gradient):
            torch.manual_seed(step)
            weight.grad = None
            loss = run(x, None)
            results.append((loss, weight.grad.clone()))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        if step == 8:
            torch.manual_seed(step)
            graphed(x, None)
            assert (weight.grad is captured[0]) if not fault else weight.grad is not None
        with torch.no_grad():
            weight.mul_(0.9)
    assert graphed.captured == (not fault)
    why = {"the capture fails": "no graph today", "another gradient": "its gradient is another one"}
    assert lines == ([f"training goes on without a CUDA graph: {why[fault]}"] if fault else [])


@torch._dynamo.config.patch(recompile_limit=8)
def test_stages_of_one_kind_compile_once_without_graph_breaks() -> None:
    """22 stages are of 12 kinds, more than the 8 at which Dynamo stops by default. The gradient is the same."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    torch.manual_seed(0)
    plain = ddpm.UNet(3, width=32, channel_multipliers=(1, 2, 2, 2), dropout=0.1)
    compiled = copy.deepcopy(plain)
    compile_stages(compiled, backend="eager")
    assert list(compiled.state_dict()) == list(plain.state_dict())
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([1, 5])
    for network in (plain, compiled):
        torch.manual_seed(1)
        with kernels.disabled():  # what is compiled does without them
            network(x, t).square().mean().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), compiled.parameters(), strict=True))
    assert (counters["frames"]["total"], counters["frames"]["ok"], dict(counters["graph_break"])) == (12, 12, {})
    torch._dynamo.reset()


def test_nothing_is_compiled_by_default_on_a_cpu() -> None:
    """`on` and `off` hold on any device."""
    cpu = torch.device("cpu")
    assert [pick_compile(name, cpu) for name in ("auto", "on", "off")] == [False, True, False]
    assert not pick_compile("off", torch.device("cuda"))


@pytest.mark.parametrize("loss", ["simple", "vlb", "hybrid", "consistency"])
def test_no_step_waits_for_the_device(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training step and steps of a sampler run on the device meta, whose values cannot be read."""
    preset = dataclasses.replace(
        PRESETS["digits"],
        loss=loss,
        variance="learned_range" if loss in ("vlb", "hybrid") else "fixed_large",
        precision="float32",
    )
    denoiser = ddpm.build(preset)
    monkeypatch.setattr(ddpm.Schedule, "__post_init__", lambda self: None)  # these two read values once per run
    monkeypatch.setattr(ddpm.Schedule, "ends_in_noise", False)
    monkeypatch.setattr(
        torch, "autocast", lambda *_, **__: contextlib.nullcontext()
    )  # it does not know the device meta
    denoiser = denoiser.to("meta")
    network = denoiser.network
    assert isinstance(network, nn.Module)
    weights, average = list(network.parameters()), copy.deepcopy(list(network.parameters()))
    x, t = torch.empty(4, 1, 8, 8, device="meta"), torch.ones(4, dtype=torch.int64, device="meta")
    ddpm.losses.LOSSES[loss](denoiser, x, t, x).mean().backward()
    watch = _Watch(torch.device("meta"))
    watch.see(1, nn.utils.clip_grad_norm_(weights, 1.0))
    ema.update(average, weights, 0.9)
    for step in itertools.islice(ddpm.samplers.ancestral(denoiser, x, lambda t: x), 3):
        assert step.x.device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        watch.check(Path(), x.mean())


def test_channels_last_weights_train_and_are_saved_like_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, weights, averages, gradients and moments are channels-last in memory, but not in files."""
    move = ddpm.Denoiser.to

    def to(self: ddpm.Denoiser, device: Any) -> ddpm.Denoiser:
        moved = move(self, device)
        moved.network.to(memory_format=torch.channels_last)
        return moved

    def saved(run: Path, preset: Any, state: Any, given: dict[str, dict[str, Tensor]], place: str) -> Path:
        weights = [v for kind in given.values() for v in kind.values() if v.ndim == 4 and v.shape[1] > 1 < v.shape[2]]
        assert all(v.is_contiguous(memory_format=torch.channels_last) for v in weights)
        assert len(weights) >= 5 * (6 if place == "checkpoints" else 2)
        return save(run, preset, state, given, place)

    save, snapshots = checkpoints.save, ("--snapshot-every", 2)
    assert train(tmp_path / "plain", *snapshots, "--steps", 6) == 0
    monkeypatch.setattr(ddpm.Denoiser, "to", to)
    monkeypatch.setattr(checkpoints, "save", saved)
    assert train(tmp_path / "last", *snapshots, "--steps", 3) == 0
    assert train(tmp_path / "last", *snapshots, "--steps", 6) == 0
    assert_close(tensors(tmp_path / "last", 6), tensors(tmp_path / "plain", 6))


# -- held-out loss -----------------------------------------------------------------------------------------------------


def test_held_out_loss_does_not_depend_on_the_number_of_processes(trained: Path) -> None:
    """The sums of 3 processes add up to those of one. NaN marks a range of t without an image."""
    denoiser = ddpm.load(trained)
    _, held_out = data.load_pair("digits", (8, 8), 1)

    @dataclasses.dataclass(frozen=True)
    class Shard(Processes):
        sums: list[Tensor] = dataclasses.field(default_factory=list)

        def total(self, x: Tensor) -> Tensor:
            self.sums.append(x)
            return x

    cpu = torch.device("cpu")
    shards = [Shard(rank, 3, cpu) for rank in range(3)]
    for shard in shards:
        held_out_by_level(denoiser, held_out, 100, shard)
    total, count = sum((shard.sums[0] for shard in shards), torch.zeros(2, BUCKETS))
    assert count.tolist() == [10.0] * BUCKETS
    assert (total / count).tolist() == pytest.approx(held_out_by_level(denoiser, held_out, 100, Processes(0, 1, cpu)))
    few = held_out_by_level(denoiser, held_out, 4, Processes(0, 1, cpu))
    assert sum(map(math.isnan, few)) == BUCKETS - 4


def test_a_few_held_out_images_are_seen_at_many_levels() -> None:
    """One image is a sample of every range of t, and its loss is that of the same image held out 512 times."""
    held_out = copy.copy(data.load_pair("digits", (8, 8), 1)[1])
    everything, schedule, levels = held_out.rows, ddpm.schedule.cosine(100), []

    def remembers(x: Tensor, timestep: Tensor, y: Tensor | None) -> Tensor:
        levels.extend((timestep + 1).tolist())
        return torch.zeros_like(x)

    denoiser, one = ddpm.Denoiser(remembers, schedule), Processes(0, 1, torch.device("cpu"))
    held_out.rows = everything[:1]
    alone = held_out_by_level(denoiser, held_out, 512, one)
    assert np.histogram(levels, BUCKETS, (1, 101))[0].tolist() == pytest.approx([51.2] * BUCKETS, abs=1)
    held_out.rows = everything[[0] * 512]
    assert alone == held_out_by_level(denoiser, held_out, 512, one)
    levels.clear()
    held_out.rows = everything[:3]
    held_out_by_level(denoiser, held_out, 512, one)
    by_image = [levels[i::3] for i in range(3)]  # image 0, 1, 2, 0, 1 ..
    assert all(min(np.histogram(seen, BUCKETS, (1, 101))[0]) > 5 for seen in by_image)


@pytest.mark.parametrize("bad", [False, True])
def test_which_images_are_held_out_is_in_the_run(bad: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The files that are named are those that training never sees; bad files do not shift the names."""
    pixels = data.load("digits", (8, 8), 1).batch(range(40)).permute(0, 2, 3, 1).numpy()
    pictures.save_many(tmp_path / "data", pixels, [f"{i:02d}" for i in range(40)])
    if bad:
        (tmp_path / "data" / "00.png").write_text("not a picture")
    given = ("--data", tmp_path / "data", "--steps", 1, "--skip-bad")
    assert train(tmp_path / "run", *given) == 0
    record = json.loads((tmp_path / "run" / "held_out.json").read_text())
    assert (record["data"], record["count"]) == (str(tmp_path / "data"), len(record["images"]))
    rest, held_out = data.load_pair(str(tmp_path / "data"), (8, 8), 1, skip_bad=True)
    files = sorted((tmp_path / "data").iterdir())[bad:]
    by_content = {np.asarray(Image.open(file)).tobytes(): str(file) for file in files}
    assert record["images"] == [by_content[held_out.batch([i]).numpy().tobytes()] for i in range(len(held_out))]
    seen = {by_content[rest.batch([i]).numpy().tobytes()] for i in range(len(rest))}
    assert seen.isdisjoint(record["images"])
    assert len(seen) + len(record["images"]) == len(files)
    if bad:  # images that are not in memory are another list
        capsys.readouterr()
        assert train(tmp_path / "run", *given, "--cache-bytes", 0) == 2
        assert "want the files and the cache_bytes of before, or another out" in capsys.readouterr().err


def test_evaluation_and_samples_use_the_averaged_weights(trained: Path) -> None:
    """The saved average gives the held-out loss and the samples of the run."""
    ema, raw = ddpm.load(trained), ddpm.load(trained, weights="raw")
    one, (_, held_out) = Processes(0, 1, torch.device("cpu")), data.load_pair("digits", (8, 8), 1)
    logged = metrics(trained)[-1]["held_out_by_level"]
    assert held_out_by_level(ema, held_out, 16, one) == pytest.approx(logged, rel=1e-5)
    assert held_out_by_level(raw, held_out, 16, one) != pytest.approx(logged, rel=1e-3)
    sheet = np.asarray(Image.open(trained / "samples" / "00000030.png")).astype(int)
    tiles = generate(ema, (1, 8, 8), range(4), "ddim", 5).permute(0, 2, 3, 1).numpy()
    assert np.abs(pictures.grid(tiles)[..., 0] - sheet).max() <= 1


def test_a_perfect_network_has_no_held_out_loss() -> None:
    """A denoiser that knows the images has loss 0 at every level, and one whose output is 0 has loss 1."""
    _, held_out = data.load_pair("digits", (8, 8), 1)
    schedule = ddpm.schedule.linear(20)
    known = ddpm.pixels.to_signal(held_out.batch([7]))
    held_out = copy.copy(held_out)
    held_out.rows = held_out.rows[[7] * 50]

    def eps(x: Tensor, timestep: Tensor, y: Tensor | None) -> Tensor:
        abar = schedule.alpha_bar[timestep + 1].float()[:, None, None, None]
        return (x - abar.sqrt() * known) / (1 - abar).sqrt()

    one = Processes(0, 1, torch.device("cpu"))
    assert held_out_by_level(ddpm.Denoiser(eps, schedule), held_out, 50, one) == pytest.approx([0.0] * 10, abs=1e-6)
    silent = ddpm.Denoiser(lambda x, timestep, y: torch.zeros_like(x), schedule)
    assert held_out_by_level(silent, held_out, 50, one) == pytest.approx([1.0] * 10, abs=0.3)


def test_a_held_out_loss_that_is_not_a_number_is_infinite(trained: Path) -> None:
    """NaN would mean a range of t without an image."""
    _, held_out = data.load_pair("digits", (8, 8), 1)
    denoiser = ddpm.load(trained)

    def broken(x: Tensor, timestep: Tensor, y: Tensor | None) -> Tensor:
        return x.masked_fill((timestep + 1 > 18)[:, None, None, None], math.nan)

    above_18 = dataclasses.replace(denoiser, network=broken)
    one = Processes(0, 1, torch.device("cpu"))
    assert [math.isinf(loss) for loss in held_out_by_level(above_18, held_out, 50, one)] == [False] * 9 + [True]
    few = held_out_by_level(above_18, held_out, 2, one)
    assert (sum(map(math.isfinite, few)), sum(map(math.isnan, few))) == (2, 8)


# -- helpers -----------------------------------------------------------------------------------------------------------


def at_step(step: int, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Call `act` in the middle of this step; steps count from 1."""
    update, calls = ema.update, []

    def patched(*given: Any) -> None:
        calls.append(0)
        if len(calls) == step:
            act()
        update(*given)

    monkeypatch.setattr(ema, "update", patched)


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def metrics_of_a_killed_run(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]  # the text after the last newline may be half a line


def folder_of_images(folder: Path) -> None:
    """12 grey pictures of 8x8."""
    for i in range(12):
        pictures.save(folder / f"{i}.png", np.random.default_rng(i).integers(0, 256, (8, 8, 1), np.uint8))


def test_a_bad_image_during_training_loses_no_step(tmp_path, monkeypatch, capsys):
    """A bad image that is decoded during training ends the run with exit code 2. The steps before it are saved."""
    real = data.batches

    def batches(*args, **kwargs):
        for i, batch in enumerate(real(*args, **kwargs)):
            if i == 3:
                raise InputError("bad.png: damaged; want an image")
            yield batch

    monkeypatch.setattr(data, "batches", batches)
    assert train(tmp_path / "run", "--steps", 10) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "ddpm: bad.png: damaged; want an image"
    assert steps(tmp_path / "run") == [3]


def spoil(folder: Path, step: int) -> str:
    """Overwrite an image of this step's batch with zeros, and return its name."""
    images, _ = data.load_pair(str(folder), (8, 8), 1)
    file = (
        folder / f"{max(images.rows[data.order(len(images), 0, step, 8)].tolist())}.png"
    )  # not image 0, which is opened first
    file.write_bytes(bytes(file.stat().st_size))
    return file.name


@pytest.mark.parametrize("before", [0, 2])
def test_a_bad_image_in_the_first_batch_changes_no_file(
    before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new run has nothing to save. A resumed run keeps its checkpoint with its held-out loss."""
    folder_of_images(tmp_path / "data")
    options = ("--data", tmp_path / "data", "--workers", 0, "--cache-bytes", 0, "--steps")
    if before:
        assert train(tmp_path / "run", *options, before) == 0
    kept = {p: p.read_bytes() for p in (tmp_path / "run").rglob("checkpoints/*/*")}
    name = spoil(tmp_path / "data", before)
    assert train(tmp_path / "run", *options, 4) == 2
    assert f"/{name}: not an image" in capsys.readouterr().err.splitlines()[-1]
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("checkpoints/*/*")} == kept
    assert len(kept) == (4 if before else 0)

"""What the clock decides in training (checkpoints, pictures, the number of steps), and that no result depends on it."""

import itertools
import json
import os
import random
import shutil
import signal
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_same, losses, metrics, steps, tensors, train
from PIL import Image

import ddpm
from ddpm import optimizers
from ddpm.cli import main
from ddpm.files import checkpoints, images
from ddpm.files.opening import open_checkpoint
from ddpm.presets import PRESETS
from ddpm.run import forecast, pace, previews
from ddpm.run.forecast import Costs
from ddpm.run.held_out import held_out_by_level
from ddpm.run.processes import Processes


def clock(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let the clock of training advance by `seconds` whenever it is read."""
    times = itertools.count(0, seconds)
    monkeypatch.setattr(pace, "time", types.SimpleNamespace(monotonic=lambda: float(next(times))))


def at_step(step: int, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Do something while a step is trained."""
    update, count = optimizers.Adam.step, itertools.count(1)

    def stepping(self: optimizers.Adam, *given: Any) -> Any:
        if next(count) == step:
            act()
        return update(self, *given)

    monkeypatch.setattr(optimizers.Adam, "step", stepping)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_checkpoints_by_the_clock_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, moments and log are those of a run that saves at the end only, and of one that goes on from them."""
    given = ("--dropout", 0.3, "--keep", 99, "--steps", 12)
    assert train(tmp_path / "plain", *given, "--save-minutes", 0) == 0
    assert steps(tmp_path / "plain") == [12]
    clock(monkeypatch, 10)
    assert train(tmp_path / "timed", *given, "--save-minutes", 1) == 0
    between = steps(tmp_path / "timed")[:-1]
    assert len(between) >= 2
    assert_same(tensors(tmp_path / "timed", 12), tensors(tmp_path / "plain", 12))
    kept = ("step", "loss", "lr", "grad_norm", "held_out", "held_out_by_level")
    rows = [[{k: line.get(k) for k in kept} for line in metrics(tmp_path / name)] for name in ("plain", "timed")]
    assert rows[0] == rows[1]
    for step in between:
        folder = tmp_path / "timed" / "checkpoints" / f"{step:08d}"
        assert checkpoints.read_state(folder)["held_out"] is None
    assert checkpoints.best(tmp_path / "timed") == checkpoints.newest(tmp_path / "timed")
    for step in steps(tmp_path / "timed")[1:]:
        shutil.rmtree(tmp_path / "timed" / "checkpoints" / f"{step:08d}")
    assert train(tmp_path / "timed", *given, "--save-minutes", 0) == 0
    assert_same(tensors(tmp_path / "timed", 12), tensors(tmp_path / "plain", 12))


def test_steps_to_keep_are_saved_and_kept(tmp_path: Path) -> None:
    """Also where they are no multiples of --save-every. The best one is among the newest here or is kept, too."""
    assert train(tmp_path / "run", "--steps", 20, "--save-every", 4, "--keep", 1, "--keep-steps", "3,8") == 0
    best = checkpoints.best(tmp_path / "run")
    assert best is not None
    assert set(steps(tmp_path / "run")) == {3, 8, 20, int(best.name)}


# -- minutes -----------------------------------------------------------------------------------------------------------


def test_a_run_of_some_minutes_is_an_ordinary_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """config.json has the steps. The run is the run of --steps, to the bit, also when it was stopped and goes on."""

    def three_steps(step: Callable[[], object], *_: Any) -> float:
        for _ in range(3):
            step()
        return 0.1

    given = ("--dropout", 0.3, "--flip", "--cooldown", 1, "--warmup", 0, "--optimizer", "muon", "--snapshot-every", 4)
    monkeypatch.setattr("ddpm.run.train.time_steps", three_steps)
    monkeypatch.setattr(Costs, "steps_in", lambda *_: 9)
    with monkeypatch.context() as patch:
        at_step(3 + 5, patch, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(tmp_path / "run", *given, "--minutes", 1) == 143
    assert steps(tmp_path / "run") == [5]
    monkeypatch.setattr(Costs, "steps_in", lambda *_: 99)
    assert train(tmp_path / "run", *given, "--minutes", 1) == 0
    assert train(tmp_path / "plain", *given, "--steps", 9) == 0
    assert (tmp_path / "run/config.json").read_text() == (tmp_path / "plain/config.json").read_text()
    assert_same(tensors(tmp_path / "run", 9), tensors(tmp_path / "plain", 9))
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")


def test_a_short_run_has_a_short_warmup_and_a_run_that_exists_keeps_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ddpm.run.train.time_steps", lambda *_: 0.1)
    monkeypatch.setattr(Costs, "steps_in", lambda *_: 20)
    given = ("--warmup", 100, "--minutes", 1)
    assert train(tmp_path / "run", *given) == 0
    assert "steps 0 to 20, warmup 2 in place of 100\n" in capsys.readouterr().err
    settings = json.loads((tmp_path / "run/config.json").read_text())
    assert (settings["steps"], settings["warmup"]) == (20, 2)
    assert train(tmp_path / "run", *given) == 0
    said = capsys.readouterr().err
    assert "run exists and keeps its 20 steps: --minutes is for a new run\n" in said
    assert "is trained to step 20 already; steps above 20 continue it\n" in said
    assert train(tmp_path / "short", "--warmup", 1, "--minutes", 1) == 0
    assert "in place of" not in capsys.readouterr().err


def test_grids_are_small_where_minutes_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid takes a tenth of the time. What was chosen is in config.json, and the picture has that many tiles."""
    monkeypatch.setattr("ddpm.run.train.time_steps", lambda *_: 0.1)
    monkeypatch.setattr("ddpm.run.train.held_out_by_level", slow(0.4))
    monkeypatch.setattr(Costs, "steps_in", lambda *_: 3)
    given = ("--minutes", 0.1, "--sample-every", 50, "--sample-count", 50, "--sample-steps", 20)
    assert train(tmp_path / "run", *given) == 0
    settings = json.loads((tmp_path / "run/config.json").read_text())
    count, calls = settings["sample_count"], settings["sample_steps"]
    assert (calls, 1 <= count <= 3) == (10, True)  # 0.025 s a call, and at most 0.6 s
    sheet = images.grid(np.zeros((count, 8, 8, 1), np.uint8)) if count > 1 else np.zeros((36, 36, 1))
    assert Image.open(tmp_path / "run/samples/00000003.png").size == sheet.shape[1::-1]
    assert train(tmp_path / "run", *given) == 0  # the run keeps them, as it keeps its steps
    assert json.loads((tmp_path / "run/config.json").read_text()) == settings


def slow(seconds: float) -> Callable[..., list[float]]:
    def evaluation(*given: Any, **named: Any) -> list[float]:
        time.sleep(seconds)
        return held_out_by_level(*given, **named)

    return evaluation


def test_the_steps_that_fit_are_the_most_that_fit() -> None:
    """One more step, with what it brings, would take longer."""
    draw = random.Random(0)
    for _ in range(200):
        preset = replace(
            PRESETS["cifar10"], save_every=draw.randint(1, 50), sample_every=draw.randint(0, 50),
            eval_images=draw.randint(1, 9), sample_count=draw.randint(1, 9), sample_steps=draw.randint(1, 9),
        )  # fmt: skip
        costs, seconds = Costs(draw.uniform(0.1, 2), draw.uniform(0, 0.1), draw.uniform(0, 5)), draw.uniform(50, 900)
        fitting = costs.steps_in(preset, seconds)
        assert costs.seconds(preset, 0, fitting) <= seconds or fitting == 1
        assert costs.seconds(preset, 0, fitting + 1) > seconds


def test_the_cost_of_a_run_is_that_of_its_parts() -> None:
    """Step by step: an evaluation before the first, and evaluations, saves and grids where training has them."""
    preset = replace(
        PRESETS["cifar10"], save_every=7, snapshot_every=3, sample_every=5, eval_images=3, sample_count=2,
        sample_steps=4, steps=23,
    )  # fmt: skip
    costs = Costs(step=1, image_call=0.5, save=2, snapshot=0.25)
    for begun in (0, 1, 7, 10, 22):
        total = 0.0 if begun else 1.5
        for step in range(begun + 1, 24):
            total += 1 + 3.5 * (step % 7 == 0 or step == 23) + 4 * (step % 5 == 0 or step == 23)
            total += 0.25 * (step % 3 == 0 or step == 23)
        assert costs.seconds(preset, begun, 23) == total


# -- pictures and the forecast -----------------------------------------------------------------------------------------


def test_the_first_pictures_are_early_and_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a tenth of the time so far, ever more seldom, until the regular ones begin. No weight depends on them."""
    sizes: list[tuple[int, tuple[int, int]]] = []
    monkeypatch.setattr("ddpm.run.train.draw", lambda d, p, out, step, ranks, size, *_: sizes.append((step, size)))
    given = ("--dropout", 0.3, "--steps", 40, "--sample-every", 35, "--sample-count", 64, "--sample-steps", 20)
    assert train(tmp_path / "plain", *given) == 0
    assert sizes == [(35, (64, 20)), (40, (64, 20))]
    sizes.clear()
    clock(monkeypatch, 2)
    assert train(tmp_path / "timed", *given) == 0
    *early, (_, regular), (_, last) = sizes
    assert regular == last == (64, 20)
    assert len(early) >= 2
    gaps = np.diff([0] + [step for step, _ in early])
    assert all(later >= gap for gap, later in itertools.pairwise(gaps))
    areas = [count * calls for _, (count, calls) in early]
    assert areas == sorted(areas)
    assert all(calls >= previews.LEAST_CALLS and count >= 1 for _, (count, calls) in early)
    assert_same(tensors(tmp_path / "timed", 40), tensors(tmp_path / "plain", 40))


@pytest.mark.parametrize("skip", [False, True])
def test_ctrl_c_saves_and_then_draws(
    skip: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next Ctrl-C skips the picture, not the checkpoint."""
    clock(monkeypatch, 10)
    given = ("--steps", 20, "--sample-every", 50, "--sample-count", 9, "--sample-steps", 10)
    at_step(12, monkeypatch, lambda: os.kill(os.getpid(), signal.SIGINT))
    monkeypatch.setattr(pace, "_EARLY", 1e9)
    draw = previews.draw

    def drawing(*args: Any) -> None:
        assert steps(tmp_path / "run")[-1] == 12
        if skip:
            os.kill(os.getpid(), signal.SIGINT)
        draw(*args)

    monkeypatch.setattr("ddpm.run.train.draw", drawing)
    assert train(tmp_path / "run", *given) == 130
    err = capsys.readouterr().err
    assert "stopped at step 12 and saved" in err
    assert "Ctrl-C skips it" in err
    assert steps(tmp_path / "run")[-1] == 12
    picture = tmp_path / "run" / "samples" / "00000012.png"
    assert picture.exists() != skip
    if not skip:
        assert Image.open(picture).size in {
            images.grid(np.zeros((n, 8, 8, 1), np.uint8)).shape[1::-1] for n in range(1, 10)
        }


def test_the_speed_is_that_of_steps_without_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of half a second with ten seconds of other work after each."""
    now = [0.0]
    monkeypatch.setattr(pace, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    clock = pace.Pace(PRESETS["cifar10"], Processes(0, 1, torch.device("cpu")), torch.nn.Linear(1, 1))
    left_out, known = 0.0, []
    for _ in range(10):
        now[0] += 0.5
        known.append(clock.step(left_out))
        now[0] += 10
        left_out += 10
    assert clock.step_seconds == 0.5
    assert known.count(True) == 1
    assert known.index(True) == 5  # two steps are not timed, and two seconds are needed
    assert clock.costs.image_call == pytest.approx(0.5 / 128 / 3)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_the_forecast(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It comes once, after a few steps, with the first loss; its bytes are those of the files. It takes the time of a
    snapshot from its own bytes.
    """
    clock(monkeypatch, 1)
    options = ["--log-every", 16, "--optimizer", optimizer, "--snapshot-every", 8, "--width", 96]
    assert train(tmp_path / "run", "--steps", 16, *options) == 0
    lines = capsys.readouterr().err.splitlines()
    (line,) = (line for line in lines if line.startswith("forecast: "))
    (first,) = (line for line in lines if ": loss " in line)
    assert int(first.split()[1].strip(":")) < 10
    assert "to step 16" in line
    preset, network = open_checkpoint(tmp_path / "run").preset, ddpm.load(tmp_path / "run").network
    assert isinstance(network, torch.nn.Module)
    checkpoint, snapshot = (
        sum(file.stat().st_size for file in (tmp_path / "run" / kind / "00000016").glob("*.safetensors"))
        for kind in ("checkpoints", "snapshots")
    )
    assert forecast.checkpoint_bytes(preset, network) == pytest.approx(checkpoint, rel=0.02)
    assert forecast.snapshot_bytes(network) == pytest.approx(snapshot, rel=0.02)
    costs = forecast.costs(preset, network, 0, 0)
    assert costs.snapshot / costs.save == pytest.approx(snapshot / checkpoint, rel=0.02)
    assert costs.seconds(preset, 0, 16) == costs.save + 2 * costs.snapshot
    assert forecast.gib(forecast.checkpoint_bytes(preset, network)) in line


@pytest.mark.parametrize("room", [True, False])
def test_a_disk_without_room_for_the_checkpoints_is_warned_of(
    room: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two newest ones, the best one, one that is kept, and the one that is being written."""
    assert train(tmp_path / "small", "--steps", 1) == 0
    size = sum(file.stat().st_size for file in (tmp_path / "small/checkpoints/00000001").glob("*.safetensors"))
    capsys.readouterr()
    monkeypatch.setattr(forecast, "free_bytes", lambda out: 5 * size if room else int(4.9 * 0.9 * size))
    assert train(tmp_path / "run", "--steps", 1, "--keep-steps", 1) == 0
    assert ("warning: the checkpoints of this run take" in capsys.readouterr().err) != room


def test_a_picture_takes_no_longer_than_it_may() -> None:
    for seconds in np.geomspace(1e-3, 1e4, 50):
        count, calls = previews.affordable(PRESETS["cifar10"], float(seconds), 0.01)
        assert count * calls * 0.01 <= seconds or count == 0
        assert count <= 64
        assert 10 <= calls <= 50
        assert count > 0 or seconds < 0.1


def test_sampling_that_takes_minutes_is_forecast_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step of 8 images takes 1 s: 16 images of 1,000 steps take 2,000 s, and 20 steps of each 40 s."""
    clock = 0.0
    monkeypatch.setattr(forecast, "time", types.SimpleNamespace(monotonic=lambda: clock))
    wanted = {
        1000: "forecast: sampling takes about 33 minutes; --sampler unipc --steps 20 takes about 40 seconds\n",
        50: "",
    }
    for count, line in wanted.items():
        watch = forecast.SamplingForecast(16, count, count)
        for _ in range(2 * count):
            clock += 1
            watch(8)
        assert capsys.readouterr().err == line
    slow = forecast.SamplingForecast(1, 20, 20)
    for _ in range(20):
        clock += 60
        slow(1)
    assert capsys.readouterr().err == "forecast: sampling takes about 18 minutes\n"


def test_a_forecast_of_sampling_changes_no_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sample", "digits", "-n", "3", "--batch-size", "2", "--class", "3", "--steps", "10"]
    assert main([*words, "--out", str(tmp_path / "a.npz")]) == 0
    assert "forecast" not in capsys.readouterr().err
    monkeypatch.setattr(forecast.SamplingForecast, "LEAST", 0)
    monkeypatch.setattr(forecast, "time", types.SimpleNamespace(monotonic=itertools.count().__next__))
    assert main([*words, "--out", str(tmp_path / "b.npz")]) == 0
    assert capsys.readouterr().err.count("forecast: sampling takes about ") == 1
    assert main([*words, "--out", f"{tmp_path}/c/"]) == 0
    assert capsys.readouterr().err.count("forecast: sampling takes about ") == 1
    first, second = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in "ab")
    assert np.array_equal(first, second)
    assert np.array_equal(first[2, ..., 0], np.asarray(Image.open(tmp_path / "c" / "000002.png")))

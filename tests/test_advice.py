"""Warnings before a long run: of what will disappoint, with a remedy that works, and not of the presets."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import train

from ddpm.presets import PRESETS
from ddpm.run.advice import advice
from ddpm.schedule import SCHEDULES


def of(schedule: str, T: int, beta_T: float = 0.02) -> list[str]:
    preset = replace(PRESETS["cifar10"], schedule=schedule, predict="v", num_timesteps=T, beta_T=beta_T, sample_steps=1)
    return list(advice(preset, SCHEDULES[schedule](T, preset.beta_1, beta_T)))


@pytest.mark.parametrize("name", PRESETS)
def test_no_preset_is_warned_of(name: str) -> None:
    preset = PRESETS[name]
    table = SCHEDULES[preset.schedule](preset.num_timesteps, preset.beta_1, preset.beta_T)
    assert not list(advice(preset, table))


@pytest.mark.parametrize("T", [2, 20, 100, 300, 500, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_advised_beta_is_enough(schedule: str, T: int) -> None:
    """abar_T is the product of 1 - beta_t. Those far from 0 are warned of, and what is advised ends near 0."""
    far = float(np.prod(1 - SCHEDULES[schedule](T).beta[1:].numpy())) > 2e-3
    lines = of(schedule, T)
    assert len(lines) == far
    for beta_T in re.findall(r"use beta_T ([\d.]+)", "".join(lines)):
        assert not of(schedule, T, float(beta_T))
        assert 0 < SCHEDULES[schedule](T, 1e-4, float(beta_T)).alpha_bar[-1] < 1e-4


def test_a_last_sigma_that_is_too_small_is_warned_of() -> None:
    """No beta_T would help, and `ddpm distill` has no such option. At sigma 20, 5% of the image are left."""
    lines = {}
    for sigma in (20.0, 40.0):
        preset = replace(PRESETS["digits"], last_sigma=sigma)
        lines[sigma] = list(advice(preset, SCHEDULES[preset.schedule](preset.num_timesteps, 0, 0).up_to(sigma)))
    [line] = lines[20.0]
    assert "and last_sigma = 20, so the last level keeps 5% of the image" in line
    assert line.endswith("use a larger last_sigma")
    assert not lines[40.0]


def test_a_warmup_that_never_ends_is_warned_of() -> None:
    def lines(warmup: int, steps: int) -> list[str]:
        return list(advice(replace(PRESETS["cifar10_fast"], warmup=warmup, steps=steps), SCHEDULES["cosine"]()))

    assert lines(200, 200)[0].startswith(
        "warmup 200: the run has 200 steps, so the learning rate never reaches lr 0.004"
    )
    assert not lines(200, 20_000)


def test_a_beta_that_is_too_small_is_warned_of() -> None:
    assert "alpha_bar_T is 0.606" in of("linear", 1000, 0.0009)[0]
    assert not of("cosine", 100, 0.0009)


def test_training_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Python's own warnings are switched off, since this is what the program has to say."""
    monkeypatch.setattr("warnings.filters", [("ignore", None, Warning, None, 0)])
    assert train(tmp_path / "run", "--steps", 1) == 0
    err = capsys.readouterr().err
    assert "warning: schedule linear: alpha_bar_T is 0.817 with T = 20" in err
    assert "use beta_T 0.7" in err

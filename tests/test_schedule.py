"""Schedules against their definitions in NumPy, known values of the paper's schedule, and respacing."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm import gaussian, likelihood, schedule
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError
from ddpm.schedule import SCHEDULES, Schedule, from_beta

quick = settings(max_examples=40, derandomize=True)
float64 = torch.float64


def numpy_beta(name, T, beta_1, beta_T):
    """beta_1..beta_T as the official code (six) and Nichol & Dhariwal (cosine) define them."""
    if name == "linear":
        return np.linspace(beta_1, beta_T, T)
    if name == "quad":
        return np.linspace(beta_1**0.5, beta_T**0.5, T) ** 2
    if name == "const":
        return beta_T * np.ones(T)
    if name.startswith("warmup"):
        beta = beta_T * np.ones(T)
        rising = int(T * {"warmup10": 0.1, "warmup50": 0.5}[name])
        beta[:rising] = np.linspace(beta_1, beta_T, rising)
        return beta
    if name == "jsd":
        return 1 / np.linspace(T, 1, T)
    if name == "log_snr":  # the logit of the noise rises evenly from that of 2 beta_1, at t = 2, to 10, at t = T
        logits = math.log(2 * beta_1 / (1 - 2 * beta_1)) + np.linspace(0, 1, max(T - 1, 1)) * (
            10 - math.log(2 * beta_1 / (1 - 2 * beta_1))
        )
        abar = np.array([1, 1 - beta_1, *(1 - 1 / (1 + np.exp(-logits)))[: T - 1]])
        return 1 - abar[1:] / abar[:-1]
    f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
    return np.array([min(1 - f[t] / f[t - 1], 0.999) for t in range(1, T + 1)])


@pytest.mark.parametrize("T", [1, 7, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_equals_its_definition(name, T):
    """abar_t = prod (1 - beta_s) of the published betas, to float64 precision, for every t."""
    s = SCHEDULES[name](T, 1e-4, 0.02)
    beta = numpy_beta(name, T, 1e-4, 0.02)
    np.testing.assert_allclose(s.alpha_bar[1:].numpy(), np.cumprod(1 - beta), rtol=1e-10, atol=0)
    np.testing.assert_allclose(s.beta[1:].numpy(), beta, rtol=1e-9, atol=1e-15)
    assert s.alpha_bar[0] == 1
    assert s.beta[0] == 0
    assert s.timestep.tolist() == list(range(-1, T))
    assert s.T == T


def test_the_schedules_differ():
    """Negative control of the above: no two of them pass each other's definition."""
    tables = [SCHEDULES[name](1000).alpha_bar for name in SCHEDULES]
    assert len(tables) == 8
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(tables, 2))


def test_golden_values_of_the_paper():
    """Values of the linear schedule with T = 1000."""
    s = schedule.linear()
    assert f"{s.alpha_bar[-1]:.4e}" == "4.0358e-05"
    assert f"{s.beta[2]:.6e}" == "1.199199e-04"
    assert f"{s.beta[2].log():.6f}" == "-9.028686"
    tilde = gaussian.beta_tilde(s)
    assert f"{tilde[2]:.5e}" == "5.45319e-05"
    assert f"{tilde[2].log():.6f}" == "-9.816725"
    assert f"{tilde[2].sqrt() * 127.5:.5f}" == "0.94153"  # grey levels
    c_0, c_x = gaussian.posterior_coefficients(s, torch.tensor([2]))
    assert (f"{c_0.item():.7f}", f"{c_x.item():.7f}") == ("0.5452915", "0.4547085")
    half = torch.full((1, 3, 4, 4), 0.5, dtype=float64)  # E[x^2] = 0.25
    L_T = gaussian.bits_per_dim(likelihood.prior(Denoiser(None, s), half), 48)
    assert f"{L_T.item():.2e}" == "7.28e-06"


def test_jsd_ends_in_pure_noise():
    """For jsd abar_t = 1 - t/T, which is exactly 0 at T."""
    s = schedule.jsd(1000)
    assert s.alpha_bar[-1] == 0
    np.testing.assert_allclose(s.alpha_bar.numpy(), 1 - np.arange(1001) / 1000, atol=1e-12)


betas = st.lists(st.floats(1e-6, 0.99), min_size=1, max_size=20)


@quick
@given(betas)
def test_any_beta_gives_a_schedule(beta):
    """abar falls strictly from 1, and the schedule's beta is the given one."""
    s = from_beta(torch.tensor(beta, dtype=float64))
    assert s.alpha_bar[0] == 1
    assert (s.alpha_bar.diff() < 0).all()
    assert ((s.beta[1:] > 0) & (s.beta[1:] <= 1)).all()
    np.testing.assert_allclose(s.beta[1:].numpy(), beta, rtol=1e-9, atol=1e-15)


@quick
@given(st.sampled_from(list(SCHEDULES)), st.integers(1, 2000))
def test_named_schedules_of_any_length(name, T):
    """Every named schedule is valid for any T."""
    s = SCHEDULES[name](T)
    assert len(s.alpha_bar) == T + 1
    assert ((s.beta[1:] > 0) & (s.beta[1:] <= 1)).all()


@quick
@given(betas, st.data())
def test_respaced_schedule(beta, data):
    """Respacing keeps abar and timestep. Its 1 - beta_t is the product over the levels of a longer step (Eq. 4)."""
    s = from_beta(torch.tensor(beta, dtype=float64))
    levels = sorted(data.draw(st.sets(st.integers(1, s.T), min_size=1)))
    r = s.respace(levels)
    assert torch.equal(r.alpha_bar[1:], s.alpha_bar[levels])
    assert r.timestep[1:].tolist() == [t - 1 for t in levels]
    jumped = [math.prod(1 - b for b in beta[a:t]) for a, t in itertools.pairwise([0, *levels])]
    np.testing.assert_allclose((1 - r.beta[1:]).numpy(), jumped, rtol=1e-9)
    again = sorted(data.draw(st.sets(st.integers(1, r.T), min_size=1)))
    twice, once = r.respace(again), s.respace([levels[i - 1] for i in again])
    assert torch.equal(twice.alpha_bar, once.alpha_bar)
    assert torch.equal(twice.timestep, once.timestep)


@quick
@given(st.integers(1, 1500), st.data())
def test_levels_are_even(T, data):
    """`steps` different levels rise to T, each within half a level of T i / steps."""
    steps = data.draw(st.integers(1, T))
    levels = schedule.const(T).levels(steps)
    assert len(set(levels)) == len(levels) == steps
    assert levels == sorted(levels)
    assert levels[0] >= 1
    assert levels[-1] == T
    assert all(abs(level - T * (i + 1) / steps) <= 0.5 for i, level in enumerate(levels))


@pytest.mark.parametrize(
    "beta", [[0.0], [0.1, 0.0], [-0.1], [1.1], [1.0, 0.5], [float("nan")], [0.5, float("nan")], []], ids=str
)
def test_wrong_betas_are_refused(beta):
    """beta_t must be in (0, 1], and may be 1 only at T."""
    with pytest.raises(InputError, match="schedule"):
        from_beta(torch.tensor(beta, dtype=float64))


@pytest.mark.parametrize(
    ("alpha_bar", "timestep"),
    [
        (torch.tensor([1.0, 0.5]), torch.tensor([-1, 0])),  # float32
        (torch.tensor([0.9, 0.5], dtype=float64), torch.tensor([-1, 0])),  # does not start at data
        (torch.tensor([1.0, 0.5, 0.5], dtype=float64), torch.tensor([-1, 0, 1])),  # does not fall
        (torch.tensor([1.0, 0.5, -0.1], dtype=float64), torch.tensor([-1, 0, 1])),  # below 0
        (torch.tensor([1.0, 0.5], dtype=float64), torch.tensor([-1, 0, 1])),  # lengths differ
        (torch.tensor([1.0, 0.5], dtype=float64), torch.tensor([-1.0, 0.0])),  # timestep not an integer
        (torch.tensor([[1.0, 0.5]], dtype=float64), torch.tensor([[-1, 0]])),  # not one table
        (torch.tensor([1.0], dtype=float64), torch.tensor([-1])),  # no level
    ],
)
def test_wrong_tables_are_refused(alpha_bar, timestep):
    with pytest.raises(InputError, match="schedule"):
        Schedule(alpha_bar, timestep)


@pytest.mark.parametrize("levels", [[], [0], [3, 2], [2, 2], [-1, 3], [11], [1, 11]], ids=str)
def test_levels_that_do_not_rise_are_refused(levels):
    """The message names the wrong levels and the accepted range."""
    with pytest.raises(InputError) as error:
        schedule.const(10).respace(levels)
    assert str(levels) in str(error.value)
    assert "1..10" in str(error.value)


@pytest.mark.parametrize("steps", [0, -1, 11])
def test_wrong_numbers_of_steps_are_refused(steps):
    with pytest.raises(InputError, match=rf"steps {steps}: want 1 to 10"):
        schedule.const(10).levels(steps)

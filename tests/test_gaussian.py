"""The three Gaussians: composition (Eq. 2 -> 4), Bayes (Eq. 6-7), divergence."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from ddpm import gaussian, schedule
from ddpm.gaussian import Gaussian
from ddpm.schedule import SCHEDULES, from_beta

quick = settings(max_examples=40, derandomize=True)
float64 = torch.float64
betas = st.lists(st.floats(1e-4, 0.9), min_size=1, max_size=12)


def normal(g):
    return Normal(g.mean, (0.5 * g.log_variance).exp().expand_as(g.mean))


def one(value):
    return torch.full((1, 1), float(value), dtype=float64)


@pytest.mark.parametrize("name", SCHEDULES)
def test_eq_2_composed_t_times_is_eq_4(name):
    """t steps x_t = sqrt(1-beta_t) x_{t-1} + sqrt(beta_t) z give N(sqrt(abar_t) x_0, 1 - abar_t), for every t."""
    s = SCHEDULES[name](60, 1e-3, 0.2)
    mean, variance = one(0.7), 0.0
    for level in range(1, s.T + 1):
        t = torch.tensor([level])
        step = gaussian.q_step(s, mean, t)
        slope = gaussian.q_step(s, one(1), t).mean.item()  # linear in x_{t-1}
        mean, variance = step.mean, slope**2 * variance + step.log_variance.exp().item()
        direct = gaussian.q(s, one(0.7), t)
        assert direct.mean.item() == pytest.approx(mean.item(), rel=1e-10, abs=1e-14)
        assert direct.log_variance.exp().item() == pytest.approx(variance, rel=1e-10)


def bayes_gap(s, x0, xt, t, posterior):
    """The largest |log q(x_t|x_{t-1}) + log q(x_{t-1}|x_0) - log posterior - log q(x_t|x_0)|; 0 by Bayes' rule."""
    grid = torch.linspace(-2, 2, 41, dtype=float64)[:, None]
    level = torch.full((len(grid),), t)
    joint = normal(gaussian.q_step(s, grid, level)).log_prob(one(xt))
    joint = joint + normal(gaussian.q(s, one(x0), torch.tensor([t - 1]))).log_prob(grid)
    evidence = normal(gaussian.q(s, one(x0), torch.tensor([t]))).log_prob(one(xt))
    size = joint.abs().max() + normal(posterior).log_prob(grid).abs().max()
    return ((joint - normal(posterior).log_prob(grid) - evidence).abs().max() / size).item()


@quick
@given(betas.filter(lambda b: len(b) > 1), st.floats(-1, 1), st.floats(-3, 3), st.data())
def test_posterior_is_bayes(beta, x0, xt, data):
    """q(x_t | x_{t-1}) q(x_{t-1} | x_0) = q(x_{t-1} | x_t, x_0) q(x_t | x_0), at every x_{t-1} (Eq. 6, 7)."""
    s = from_beta(torch.tensor(beta, dtype=float64))
    t = data.draw(st.integers(2, s.T))
    posterior = gaussian.q_posterior(s, one(x0), one(xt), torch.tensor([t]))
    assert bayes_gap(s, x0, xt, t, posterior) < 1e-10
    for wrong in (
        Gaussian(posterior.mean + 1e-3 * posterior.log_variance.exp().sqrt(), posterior.log_variance),
        Gaussian(posterior.mean, posterior.log_variance + 1e-3),
    ):  # an error of a thousandth in mean or variance is detected
        assert bayes_gap(s, x0, xt, t, wrong) > 1e-7


def test_posterior_at_level_1_is_the_data():
    """The mean of q(x_0 | x_1, x_0) is x_0, whatever x_1 is."""
    s = schedule.linear()
    c_0, c_x = gaussian.posterior_coefficients(s, torch.tensor([1]))
    assert (c_0.item(), c_x.item()) == (1, 0)


def test_first_variance():
    """beta~_1 is beta~_2 as in the official code, or beta_1 if T = 1. All others are those of Eq. 7."""
    s = schedule.linear()
    tilde = gaussian.beta_tilde(s)
    assert tilde[1] == tilde[2]
    expected = [(1 - s.alpha_bar[t - 1]) / (1 - s.alpha_bar[t]) * s.beta[t] for t in range(2, 1001)]
    torch.testing.assert_close(tilde[2:], torch.stack(expected), rtol=1e-12, atol=0)
    only = schedule.const(1, beta_T=0.3)
    assert gaussian.beta_tilde(only)[1].item() == pytest.approx(0.3)
    p = gaussian.q_posterior(s, one(0), one(0), torch.tensor([1]))
    assert p.log_variance.item() == pytest.approx(-9.816725, abs=1e-6)


@quick
@given(betas)
def test_posterior_variance_is_smaller_than_the_step(beta):
    """0 < beta~_t < beta_t for t > 1, because knowing x_0 reduces the variance."""
    s = from_beta(torch.tensor(beta, dtype=float64))
    tilde = gaussian.beta_tilde(s)
    assert (tilde[1:] > 0).all()
    assert (tilde[2:] < s.beta[2:]).all()


numbers = st.lists(st.tuples(*[st.floats(-3, 3)] * 4), min_size=1, max_size=6)


@quick
@given(numbers)
def test_kl_equals_torch_distributions(rows):
    """It is summed over dimensions, for any two diagonal Gaussians."""
    m1, v1, m2, v2 = torch.tensor(rows, dtype=float64).T[:, None]
    q, p = Gaussian(m1, v1), Gaussian(m2, v2)
    expected = kl_divergence(normal(q), normal(p)).sum(1)
    torch.testing.assert_close(gaussian.kl(q, p), expected, rtol=1e-9, atol=1e-9)
    assert gaussian.kl(q, p).item() >= -1e-12
    assert gaussian.kl(q, q).item() == 0


def test_kl_is_directed_and_broadcasts():
    """KL(q||p) != KL(p||q). A variance per image [B, 1, 1, 1] broadcasts over dimensions."""
    q = Gaussian(torch.zeros(2, 3, 4, 4), torch.tensor([0.0, 1.0]).view(2, 1, 1, 1))
    p = Gaussian(torch.ones(2, 3, 4, 4), torch.tensor([-1.0, 0.5]).view(2, 1, 1, 1))
    full_q, full_p = (Gaussian(g.mean, g.log_variance.expand_as(g.mean)) for g in (q, p))
    torch.testing.assert_close(gaussian.kl(q, p), gaussian.kl(full_q, full_p))
    assert (gaussian.kl(q, p) - gaussian.kl(p, q)).abs().min() > 1


def test_q_sample():
    """It is the draw of q(x_t | x_0) for eps (Eq. 4), with a level for each image, and x_0 itself at t = 0."""
    s = schedule.linear()
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 1, 3, 3, generator=g, dtype=float64)
    t = torch.tensor([1, 2, 500, 999, 1000])
    xt = gaussian.q_sample(s, x0, t, eps)
    torch.testing.assert_close(xt, gaussian.q(s, x0, t).sample(eps), rtol=1e-12, atol=1e-12)
    for i, level in enumerate(t.tolist()):
        abar = math.prod(1 - b for b in s.beta[1 : level + 1].tolist())
        torch.testing.assert_close(xt[i], abar**0.5 * x0[i] + (1 - abar) ** 0.5 * eps[i], rtol=1e-10, atol=1e-12)
    assert torch.equal(gaussian.q_sample(s, x0, torch.zeros(5, dtype=torch.int64), eps), x0)


def test_float32_loses_nothing_but_its_own_rounding():
    """Coefficients are computed in float64, so sqrt(1 - abar_1) = 0.01 keeps seven digits in float32."""
    s = schedule.linear()
    t = torch.arange(1, 1001)
    noise = gaussian.q_sample(s, torch.zeros(1000, 1), t, torch.ones(1000, 1))
    assert noise.dtype == torch.float32
    torch.testing.assert_close(noise[:, 0].double(), (1 - s.alpha_bar[1:]).sqrt(), rtol=1e-7, atol=0)
    careless = (1 - s.alpha_bar.float()[1:]).sqrt().double()  # a float32 table loses digits
    assert ((careless / (1 - s.alpha_bar[1:]).sqrt() - 1).abs() > 1e-5).any()


def test_bits_per_dim():
    """One bit per dimension is log 2 nats per dimension."""
    assert gaussian.bits_per_dim(torch.tensor([3072 * math.log(2)]), 3072).item() == pytest.approx(1)

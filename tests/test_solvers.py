"""Fast samplers: orders of convergence, equality with diffusers step by step, and spacings."""

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import scheduling_dpmsolver_multistep
from exact import (
    PREDICTIONS,
    correlated,
    isotropic,
    last,
    network,
    normal,
    one_thread,  # noqa: F401
)
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from ddpm import ode, samplers, schedule, spacing
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError
from ddpm.samplers import _integral
from ddpm.schedule import Schedule

PAPER = schedule.linear()
SOLVERS = {  # and their orders
    "ddim": (samplers.ddim, 1),
    "dpm_solver_pp 1": (lambda *a, **k: samplers.dpm_solver_pp(*a, **k, order=1), 1),
    "dpm_solver_pp 2": (samplers.dpm_solver_pp, 2),
    "dpm_solver_pp 3": (lambda *a, **k: samplers.dpm_solver_pp(*a, **k, order=3), 3),
    "unipc 1": (lambda *a, **k: samplers.unipc(*a, **k, order=1), 2),
    "unipc 2": (samplers.unipc, 3),
    "unipc 3": (lambda *a, **k: samplers.unipc(*a, **k, order=3), 4),
    "heun": (samplers.heun, 2),
    "probability_flow": (samplers.probability_flow, 2),
}
NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


# Order of convergence, for Gaussian data whose exact path is known.


def even(steps):
    """A schedule whose lambda falls evenly from 1 to -1 at levels 1..T.

    At both ends two steps have the squared length of the others, because multistep solvers have a lower order there.
    """
    h = 2 / steps
    short = [2 * h**2, h**2, 0]
    inner = np.linspace(1 - h, -1 + h, steps - 1)
    lam = torch.tensor([*[1 - d for d in short[::-1]], *inner, *[-1 + d for d in short]], dtype=torch.float64)
    return Schedule(torch.cat([torch.ones(1).double(), torch.sigmoid(2 * lam)]), torch.arange(-1, len(lam)))


def exact_path(data, s, x):
    """The x at level 1 to which the ODE carries x from level T. Along each eigenvector the deviation is scaled."""
    mean = data.mean.flatten()
    values, vectors = torch.linalg.eigh(data.covariance)
    a, b = s.alpha_bar[-1], s.alpha_bar[1]
    ratio = ((b * values + 1 - b) / (a * values + 1 - a)).sqrt()
    z = (x.flatten(1) - a.sqrt() * mean) @ vectors
    return ((ratio * z) @ vectors.T + b.sqrt() * mean).view_as(x)


def slope(sizes, errors):
    """The order: how fast log error falls with log steps, over the larger half of `sizes`."""
    n = len(sizes) // 2
    return -np.polyfit(np.log(sizes[n:]), np.log(errors[n:]), 1)[0]


def errors_of(solve, sizes, predict="v"):
    """The root mean square error at level 1 for each number of steps."""
    data, errors = correlated(), []
    for steps in sizes:
        s = even(steps)
        x = normal(8, (1, 2, 2))(0)
        x1 = next(
            step.x for step in solve(Denoiser(network(data, s, predict), s, predict, clip=False), x, s.T) if step.t == 1
        )
        errors.append((x1 - exact_path(data, s, x)).square().mean().sqrt().item())
    return errors


SIZES = (8, 16, 32, 64, 128, 256)


@pytest.mark.parametrize("name", SOLVERS)
def test_each_solver_converges_with_its_order(name):
    """From 64 to 256 steps, twice the steps give 2^-order of the error."""
    solve, order = SOLVERS[name]
    errors = errors_of(solve, SIZES)
    assert slope(SIZES, errors) == pytest.approx(order, abs=0.25)
    assert errors[-1] < 0.02 * 32 ** (1 - order) < 1


def diffusers_multistep(denoiser, x, steps):
    """The steps of diffusers' DPM-Solver++ 3M on the levels of our schedule."""
    s = denoiser.schedule
    scheduler = on_levels(
        DPMSolverMultistepScheduler, s, list(range(1, s.T + 1)), solver_order=3, prediction_type="v_prediction"
    )
    for timestep, t in zip(scheduler.timesteps, range(s.T, 0, -1), strict=True):
        x = scheduler.step(denoiser.network(x, timestep.expand(len(x))), timestep, x, return_dict=False)[0]
        yield samplers.Step(t - 1, x, x)


@pytest.mark.usefixtures("_double")
def test_dpm_solver_pp_of_order_3_in_diffusers_has_order_2():
    """Its formula uses half of the parabola's second derivative; see `dpm_solver_pp`."""
    assert slope(SIZES, errors_of(diffusers_multistep, SIZES)) == pytest.approx(2, abs=0.25)


def test_the_variance_of_the_sde_solver_converges():
    """For Gaussian data x_1 is linear in x_T and the noise, and its exact variance converges to that of q(x_1)."""
    data, errors = isotropic(), []
    for steps in SIZES:
        s = even(steps)
        # The inputs are x_T and the noise at levels T-1 .. 1. In image t only input t is 1, so x_1 is its factor.
        noise = lambda t: (torch.arange(s.T + 1) == t).double().view(-1, 1, 1, 1).expand(-1, 2, 1, 1)  # noqa: B023, E731
        denoiser = Denoiser(network(data, s, "v"), s, "v", clip=False)
        x = next(step.x for step in samplers.sde_dpm_solver_pp(denoiser, noise(s.T), noise, s.T) if step.t == 1)
        variance = (x[1:] - x[:1])[:, 0].square().sum().item()  # all inputs of image 0 are 0, so it is the mean
        start = s.alpha_bar[-1] * 0.25 + 1 - s.alpha_bar[-1]
        scale = (x[-1, 0] - x[0, 0]).square().item()
        variance += scale * (start.item() - 1)  # the variance of x_T is that of q(x_T), not 1
        b = s.alpha_bar[1].item()
        errors.append(abs(variance - (b * 0.25 + 1 - b)))
    assert slope(SIZES, errors) == pytest.approx(2, abs=0.3)


@given(
    st.lists(st.floats(-2, 0.5), min_size=1, max_size=4, unique_by=lambda u: round(u, 1)),
    st.lists(st.floats(-2, 2), min_size=4, max_size=4),
    st.floats(0.05, 3),
)
def test_the_integral_is_exact_for_polynomials(where, coefficients, h):
    """It is exact for 1, 3 and 4 points. For 2 points it takes the line's value in the middle."""
    P = lambda u: sum(c * u**k for k, c in enumerate(coefficients[: len(where)]))  # noqa: E731
    points = [(0.7 + u, torch.full((1,), P(u), dtype=torch.float64)) for u in where]
    want = P(h / 2) * -math.expm1(-h) if len(where) == 2 else quad(lambda u: math.exp(u - h) * P(u), 0, h)[0]
    assert _integral(points, 0.7, 0.7 + h).item() == pytest.approx(want, rel=1e-6, abs=1e-6)


# Equality with diffusers and between solvers.


def smooth_network(x, timestep, y=None):
    """A smooth float64 function of x and timestep in place of a network. Some x0^ lie outside [-1, 1]."""
    k = (timestep.double() / 1000).view(-1, 1, 1, 1)
    return (2 * x + 3 * k).sin() + 0.3 * x.flip(-1)


class Double:
    """The module torch with float64 as its float32, because diffusers' DPM-Solver converts x to float32."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def _double(monkeypatch):
    monkeypatch.setattr(scheduling_dpmsolver_multistep, "torch", Double())


def on_levels(kind, s, levels, **settings):
    """A diffusers scheduler in float64 with the sigmas of our levels."""
    scheduler = kind(num_train_timesteps=s.T, trained_betas=s.beta[1:].tolist(), final_sigmas_type="zero", **settings)
    scheduler.set_timesteps(len(levels))
    abar = s.alpha_bar[[*levels[::-1], 0]]
    scheduler.sigmas = ((1 - abar) / abar).sqrt()
    scheduler.timesteps = s.timestep[levels[::-1]]
    return scheduler


@pytest.mark.parametrize("spaced", spacing.SPACINGS)
@pytest.mark.parametrize("predict", NAMES)
@pytest.mark.parametrize(
    ("sampler", "kind", "settings"),
    [
        ("dpm_solver_pp 1", DPMSolverMultistepScheduler, {"solver_order": 1}),
        ("dpm_solver_pp 2", DPMSolverMultistepScheduler, {"solver_order": 2}),
        ("unipc 1", UniPCMultistepScheduler, {"solver_order": 1}),
        ("unipc 2", UniPCMultistepScheduler, {"solver_order": 2}),
        ("unipc 3", UniPCMultistepScheduler, {"solver_order": 3}),
    ],
)
@pytest.mark.usefixtures("_double")
def test_multistep_solvers_equal_diffusers(sampler, kind, settings, predict, spaced):
    """x agrees to 1e-6 in each of 12 steps on the paper's schedule, for three predictions and every spacing."""
    levels = spacing.SPACINGS[spaced](PAPER, 12)
    scheduler = on_levels(kind, PAPER, levels, prediction_type=NAMES[predict], **settings)
    x = normal(3, (2, 4, 4))(1000)
    ours = SOLVERS[sampler][0](Denoiser(smooth_network, PAPER, predict, clip=False), x, levels)
    for step, timestep in zip(ours, scheduler.timesteps, strict=True):
        x = scheduler.step(smooth_network(x, timestep.expand(3)), timestep, x, return_dict=False)[0]
        torch.testing.assert_close(step.x, x, rtol=1e-6, atol=1e-6)
    assert step.t == 0


@pytest.mark.parametrize("predict", NAMES)
@pytest.mark.usefixtures("_double")
def test_sde_solver_equals_diffusers(predict):
    levels = spacing.log_snr(PAPER, 12)
    scheduler = on_levels(
        DPMSolverMultistepScheduler, PAPER, levels, prediction_type=NAMES[predict], algorithm_type="sde-dpmsolver++"
    )
    noise = normal(3, (2, 4, 4))
    x = noise(1000)
    ours = samplers.sde_dpm_solver_pp(Denoiser(smooth_network, PAPER, predict, clip=False), x, noise, levels)
    for step, timestep in zip(ours, scheduler.timesteps, strict=True):
        out = smooth_network(x, timestep.expand(3))
        x = scheduler.step(out, timestep, x, variance_noise=noise(step.t), return_dict=False)[0]
        torch.testing.assert_close(step.x, x, rtol=1e-6, atol=1e-6)


def test_heun_equals_diffusers():
    """Two steps of diffusers are one of ours, and its state is x / alpha."""
    levels = spacing.karras(PAPER, 12)
    scheduler = HeunDiscreteScheduler(num_train_timesteps=1000, trained_betas=PAPER.beta[1:].tolist())
    scheduler.set_timesteps(12)
    abar = PAPER.alpha_bar[[*levels[::-1], 0]]
    sigmas, t = ((1 - abar) / abar).sqrt(), PAPER.timestep[levels[::-1]]
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    scheduler.timesteps = torch.cat([t[:1], t[1:].repeat_interleave(2)])
    alpha, x = PAPER.alpha_bar.sqrt(), normal(3, (2, 4, 4))(1000)
    z = x / alpha[1000]
    states = [
        z := scheduler.step(
            smooth_network(scheduler.scale_model_input(z, now), now.expand(3)), now, z, return_dict=False
        )[0]
        for now in scheduler.timesteps
    ]
    ours = list(samplers.heun(Denoiser(smooth_network, PAPER, clip=False), x, levels))
    for step, z in zip(ours, [*states[1:-1:2], states[-1]], strict=True):
        torch.testing.assert_close(step.x, alpha[step.t] * z, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("clip", [True, False])
def test_first_order_solvers_are_ddim(clip):
    """Euler on the EDM form, DPM-Solver++ of order 1 and DDIM are equal. The SDE's first step is that of ancestral."""
    denoiser, noise = Denoiser(smooth_network, PAPER, clip=clip), normal(3, (2, 4, 4))
    levels = spacing.quadratic(PAPER, 9)
    ddim = list(samplers.ddim(denoiser, noise(1000), levels))
    alpha = PAPER.alpha_bar.sqrt()
    sigma = (1 - PAPER.alpha_bar).sqrt() / alpha
    x, t = noise(1000), 1000
    for a, b in zip(ddim, samplers.dpm_solver_pp(denoiser, noise(1000), levels, order=1), strict=True):
        torch.testing.assert_close(a.x, b.x, rtol=1e-9, atol=1e-9)
        eps = denoiser(x, torch.full((3,), t)).eps
        x, t = alpha[a.t] * (x / alpha[t] + (sigma[a.t] - sigma[t]) * eps), a.t
        torch.testing.assert_close(a.x, x, rtol=1e-9, atol=1e-9)
    small = Denoiser(smooth_network, PAPER, variance="fixed_small", clip=clip)
    one = next(samplers.ancestral(small, noise(1000), noise, levels))
    other = next(samplers.sde_dpm_solver_pp(denoiser, noise(1000), noise, levels))
    torch.testing.assert_close(one.x, other.x, rtol=1e-9, atol=1e-9)


def test_probability_flow_is_the_map_of_the_likelihood():
    """For x_1 from this sampler, `ode` gives the density that follows by the change of variables."""
    s, data = even(100), isotropic()
    denoiser = Denoiser(network(data, s, "v"), s, "v", clip=False)
    x = torch.cat([torch.zeros(1, 2, 1, 1), torch.eye(2).view(2, 2, 1, 1), normal(3, (2, 1, 1))(0)]).double()
    x1 = next(step.x for step in samplers.probability_flow(denoiser, x, s.T) if step.t == 1)
    root = s.alpha_bar[1].sqrt()
    stretched = torch.logdet((x1[1:3] - x1[0]).flatten(1) / root)  # of the linear map from x_T to x
    want = (x.square() / 2 + math.log(2 * math.pi) / 2).flatten(1).sum(1) + stretched
    nats = ode.probability_flow(denoiser, x1 / root, torch.ones_like(x1))
    torch.testing.assert_close(nats, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_reaches_the_data_with_every_prediction(name, predict):
    """From draws of q(x_T), 60 steps end within 2% of the exact ODE (5% for order 1)."""
    s, data = schedule.cosine(400), correlated()
    x = normal(16, (1, 2, 2))(0)
    levels = spacing.log_snr(s, 60)
    out = last(SOLVERS[name][0](Denoiser(network(data, s, predict), s, predict, clip=False), x, levels)).x
    want = exact_path(data, s, x)
    assert (out - want).square().mean().sqrt() < (0.05 if SOLVERS[name][1] == 1 else 0.02)


# Sigma-hat, spacings.


def test_sigma_hat_adds_the_larger_noise():
    """The mean is that of eta 1, and the noise has variance 1 - abar_t / abar_s (Song et al. 2021, Section 5)."""
    noise, denoiser = normal(3, (2, 4, 4)), Denoiser(smooth_network, PAPER)
    one = next(samplers.ddim(denoiser, noise(1000), 10, 1.0, noise))
    hat = next(samplers.ddim(denoiser, noise(1000), 10, 1.0, noise, sigma_hat=True))
    still = next(samplers.ddim(denoiser, noise(1000), 10, 1.0, lambda t: torch.zeros(3, 2, 4, 4)))
    beta = 1 - PAPER.alpha_bar[1000] / PAPER.alpha_bar[900]
    torch.testing.assert_close(hat.x - still.x, beta.sqrt() * noise(900))
    assert (one.x - still.x).std() < (hat.x - still.x).std()
    again = next(samplers.ddim(denoiser, noise(1000), 10, 0.0, noise, sigma_hat=True))
    assert torch.equal(again.x, hat.x)  # sigma_hat sets eta to 1


@given(st.sampled_from(sorted(spacing.SPACINGS)), st.integers(1, 1000), st.data())
def test_spacings_rise_and_end_at_the_start(name, steps, data):
    start = data.draw(st.integers(steps, 1000))
    for s in (PAPER, schedule.cosine()):
        levels = spacing.SPACINGS[name](s, steps, start)
        assert (len(levels), levels[-1]) == (steps, start)
        assert s.levels(levels, start) == levels  # it checks that the levels rise within 1..start


def test_spacings_agree_with_diffusers():
    """Karras and log-SNR levels are within one level of those of diffusers, which rounds them."""
    for name, flag in (("karras", "use_karras_sigmas"), ("log_snr", "use_lu_lambdas")):
        scheduler = DPMSolverMultistepScheduler(trained_betas=PAPER.beta[1:].tolist(), **{flag: True})
        scheduler.set_timesteps(12)
        theirs = np.array(sorted(scheduler.timesteps.tolist())) + 1
        assert np.abs(np.array(spacing.SPACINGS[name](PAPER, 12)) - theirs).max() <= 1


@given(st.integers(1, 7), st.integers(0, 10**6))
def test_optimised_spacing_is_the_cheapest(steps, seed):
    """No other subset of seven levels is cheaper."""
    cost = torch.rand(8, 8, generator=torch.Generator().manual_seed(seed))
    price = lambda levels: sum(cost[s, t].item() for s, t in pairwise([0, *levels]))  # noqa: E731
    levels = spacing.optimised(cost, steps)
    assert (len(levels), levels[-1]) == (steps, 7)
    assert price(levels) == pytest.approx(min(price([*rest, 7]) for rest in combinations(range(1, 7), steps - 1)))


def test_bound_cost_is_the_bound():
    """For data of one variance the best variance is exact, so the costs of the chain add up to the mean bound."""
    s, data = schedule.linear(50, 2e-3, 0.4), isotropic()
    mse = torch.stack([data.x0_covariance(a)[0, 0] for a in s.alpha_bar[1:]])
    cost = spacing.bound_cost(s, mse)
    chain = sum(cost[t - 1, t].item() for t in range(2, 51)) * data.D
    assert chain == pytest.approx(data.bound_kl(s, data.variances(s)).sum().item(), rel=1e-9)
    levels = [3, 10, 25, 50]
    few = s.respace(levels)
    part = sum(cost[a, b].item() for a, b in pairwise(levels)) * data.D
    assert part == pytest.approx(data.bound_kl(few, data.variances(few)).sum().item(), rel=1e-9)
    assert cost[0, 5].item() == pytest.approx(0.5 * math.log(2 * math.pi * math.e * (mse[4] * (255 / 2) ** 2 + 1 / 12)))


def test_path_cost_is_the_error_of_one_step():
    """It equals three errors that are computed by hand. A step of one level has no error."""
    s = schedule.linear(12, 2e-2, 0.5)
    denoiser, x = Denoiser(smooth_network, s), normal(4, (2, 4, 4))(12).float()
    cost = spacing.path_cost(s, x, samplers.ddim(denoiser, x, 12))
    path = {12: x, **{step.t: step.x for step in samplers.ddim(denoiser, x, 12)}}
    for t, to in ((12, 7), (8, 1), (5, 0)):
        estimate = denoiser(path[t], torch.full((4,), t))
        x_to = s.alpha_bar[to].sqrt() * estimate.x0 + (1 - s.alpha_bar[to]).sqrt() * estimate.eps
        assert cost[to, t].item() == pytest.approx((x_to - path[to]).square().mean().sqrt().item(), rel=1e-4)
        assert cost[t - 1, t] < 1e-6


# Mistakes.


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda d, x: samplers.dpm_solver_pp(d, x, 5, order=4), "order 4: want a whole number, 1 to 3"),
        (
            lambda d, x: samplers.ddim(d, x, [5, 3, 1000]),
            r"levels \[5, 3, 1000\]: want rising levels, the first at least 1",
        ),
        (lambda d, x: samplers.unipc(d, x, [3, 5]), "the first at least 1 and the last 1000"),
        (lambda d, x: samplers.heun(d, x, 1001), "steps 1001: want 1 to 1000"),
        (lambda d, x: samplers.ddim(d, x, 5, 0.5), "eta 0.5: want the argument noise"),
        (lambda d, x: samplers.ddim(d, x, 5, sigma_hat=True), "eta 1.0: want the argument noise"),
        (lambda d, x: iter([spacing.optimised(torch.ones(11, 11), 11)]), "steps 11: want a whole number, 1 to 10"),
    ],
)
def test_mistakes_are_named(call, words):
    with pytest.raises(InputError, match=words):
        last(call(Denoiser(smooth_network, PAPER), torch.zeros(1, 1, 4, 4)))


def test_schedules_that_end_in_noise():
    """If alpha_bar ends at 0, solvers in lambda refuse level T and work from T - 1. ddim works."""
    s = schedule.jsd(100)
    denoiser, x = Denoiser(network(correlated(), s, "v"), s, "v"), normal(2, (1, 2, 2))(0)
    for solve in (samplers.dpm_solver_pp, samplers.unipc, samplers.heun, samplers.probability_flow):
        with pytest.raises(InputError, match="ends at alpha_bar 0"):
            last(solve(denoiser, x, 5))
        assert last(solve(denoiser, x, 5, start=99)).x.isfinite().all()
    assert last(samplers.ddim(denoiser, x, 5)).x.isfinite().all()
    with pytest.raises(InputError, match="no log-SNR; want ancestral or ddim"):
        spacing.karras(s, 5)

"""Samplers: the distribution of samples, equality with diffusers step by step, and seeds."""

from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from exact import (
    PREDICTIONS,
    FiniteData,
    correlated,
    isotropic,
    last,
    network,
    normal,
    one_thread,  # noqa: F401
    randomised_unet,
    with_variance,
    z_score,
)
from scipy.stats import chisquare

from ddpm import gaussian, samplers, schedule
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError
from ddpm.gaussian import beta_tilde
from ddpm.noise import per_image

SHORT = schedule.linear(50, 2e-3, 0.4)
LARGE = torch.cat([beta_tilde(SHORT)[:2], SHORT.beta[2:]])  # fixed_large's sigma_t^2
TABLES = {"fixed_large": LARGE, "fixed_small": beta_tilde(SHORT)}
N = 10_000
ALL = {**samplers.SAMPLERS, "ddim eta 1": samplers.named("ddim", 1.0)}


# For Gaussian data with its exact denoiser, the distribution of the samples is known.


def ancestral_samples(data, predict, variance, change=lambda x: x):
    """N samples. `change` alters the network's output, as a wrong coefficient would."""
    exact = network(data, SHORT, predict)
    if variance == "learned":
        raw = lambda x, timestep: LARGE[timestep + 1].log().view(-1, 1, 1, 1).expand_as(x)  # noqa: E731
        exact = with_variance(exact, raw)
    noise = normal(N, data.mean.shape)
    denoiser = Denoiser(lambda *inputs: change(exact(*inputs)), SHORT, predict, variance, clip=False)
    return last(samplers.ancestral(denoiser, noise(50), noise)).x


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small", "learned"])
@pytest.mark.parametrize("predict", PREDICTIONS)
def test_ancestral_sampling_has_the_exact_distribution(predict, variance):
    """Algorithm 2 from N(0, I) is a linear-Gaussian chain. Mean and covariance of x_0 agree within sampling error."""
    data = correlated()
    x = ancestral_samples(data, predict, variance)
    assert z_score(x, *data.chain(SHORT, TABLES["fixed_small" if variance == "fixed_small" else "fixed_large"])) < 4.5
    if variance != "learned":  # negative control: the other variance gives another distribution
        other = TABLES["fixed_large" if variance == "fixed_small" else "fixed_small"]
        assert z_score(x, *data.chain(SHORT, other)) > 6


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_a_wrong_coefficient_fails_the_same_test(predict):
    """Negative control: with 10% more eps, x_0, mu or v, or with 10% less noise, the test fails."""
    data = correlated()
    law = data.chain(SHORT, LARGE)
    assert z_score(ancestral_samples(data, predict, "fixed_large", lambda out: 1.1 * out), *law) > 6
    assert z_score(ancestral_samples(data, predict, 0.81 * LARGE), *law) > 6


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_a_wrong_posterior_coefficient_fails_the_same_test(predict, monkeypatch):
    """Negative control inside the package: Eq. 7 with sqrt(abar_t) where sqrt(abar_{t-1}) belongs."""

    def wrong(s, t):
        c_0, c_x = right(s, t)
        return c_0 * (s.alpha_bar[t] / s.alpha_bar[t - 1]).sqrt(), c_x

    right = gaussian.posterior_coefficients
    monkeypatch.setattr(gaussian, "posterior_coefficients", wrong)
    data = correlated()
    assert z_score(ancestral_samples(data, predict, "fixed_large"), *data.chain(SHORT, LARGE)) > 6


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_true_variances_reproduce_the_data(predict):
    """With the variances of the true q(x_{t-1} | x_t), draws of x_0 ~ p(x_0 | x_1) are distributed as the data."""
    data = isotropic()
    table = data.variances(SHORT)
    x = ancestral_samples(data, predict, table)
    assert z_score(x, *data.chain(SHORT, table)) < 4.5
    drawn = x + table[1].sqrt() * normal(N, data.mean.shape)(0)
    law = data.mean.flatten(), data.covariance
    assert z_score(drawn, *law) < 4.5
    assert z_score(ancestral_samples(data, predict, "fixed_small"), *law) > 6  # beta~_t is too small for this data


def test_z_score_detects_small_errors():
    """A sample of N(mean, S) passes. A sample that is 6% too wide, or shifted by 6% of sigma, does not."""
    data = correlated()
    x = data.sample(N, torch.Generator().manual_seed(0))
    law = data.mean.flatten(), data.covariance
    assert z_score(x, *law) < 4.5
    assert z_score(1.06 * (x - data.mean) + data.mean, *law) > 4.5
    assert z_score(x + 0.06 * data.covariance.diagonal().sqrt().view(1, 2, 2), *law) > 4.5


def test_ddim_converges_to_the_data():
    """With eta 0 its map from N(0, I) is linear, and its distribution converges to that of the data."""
    s, data = schedule.linear(), correlated()
    denoiser = Denoiser(network(data, s, "eps"), s, clip=False)
    basis = torch.cat([torch.zeros(1, 4), torch.eye(4)]).double().view(5, 1, 2, 2)  # x -> A x + b
    errors = []
    for steps in (10, 40, 160):
        out = last(samplers.ddim(denoiser, basis, steps)).x.flatten(1)
        A = (out[1:] - out[0]).T
        errors.append(
            (A @ A.T - data.covariance).abs().max().item() + (out[0] - data.mean.flatten()).abs().max().item()
        )
    assert (
        errors[0] > 2.5 * errors[1] > 2.5**2 * errors[2]
    )  # first order: 4 times the steps give nearly a quarter of the error


# Equality with diffusers.


def theirs(kind, s, **settings):
    """A diffusers scheduler with our alpha_bar, in float64."""
    scheduler = kind(num_train_timesteps=s.T, trained_betas=s.beta[1:].tolist(), **settings)
    assert (scheduler.alphas_cumprod - s.alpha_bar[1:]).abs().max() < 1e-5  # its own table is float32
    scheduler.alphas_cumprod = s.alpha_bar[1:].clone()
    scheduler.one = scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    return scheduler


NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def smooth_network(x, timestep, y=None):
    """A smooth float64 function of x and timestep in place of a network. Some x0^ lie outside [-1, 1]."""
    k = (timestep.double() / 1000).view(-1, 1, 1, 1)
    return (2 * x + 3 * k).sin() + 0.3 * x.flip(-1)


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "free"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("predict", NAMES)
def test_ddim_equals_diffusers(predict, eta, clip):
    """x and x0^ agree to 1e-9 in each of 20 steps on the paper's schedule. eps^ belongs to the clipped x0^."""
    s, steps = schedule.linear(), 20
    scheduler = theirs(
        DDIMScheduler, s, clip_sample=clip, prediction_type=NAMES[predict], timestep_spacing="trailing"
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    noise = normal(3, (2, 4, 4))
    x = noise(1000)
    ours = samplers.ddim(Denoiser(smooth_network, s, predict, clip=clip), x, steps, eta, noise)
    for step, timestep in zip(ours, scheduler.timesteps, strict=True):
        out = smooth_network(x, timestep.expand(3))
        z = noise(step.t) if eta > 0 else None
        x, x0 = scheduler.step(
            out, int(timestep), x, eta, use_clipped_model_output=True, variance_noise=z, return_dict=False
        )
        torch.testing.assert_close(step.x0, x0, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(step.x, x, rtol=1e-9, atol=1e-9)
    assert step.t == 0


@pytest.mark.parametrize("steps", [None, 10])
@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small", "learned_range"])
@pytest.mark.parametrize("predict", NAMES)
def test_ancestral_equals_diffusers(predict, variance, steps):
    """Each step on all levels, or on 10 of them, agrees to 1e-9 with the same noise and clipping.

    With fewer levels the last step differs on purpose: diffusers adds noise to the image, but Algorithm 2 has z = 0.
    """
    s = schedule.linear(100, 1e-3, 0.2)
    net = with_variance(smooth_network, lambda x, timestep: x.tanh()) if variance == "learned_range" else smooth_network
    scheduler = theirs(
        DDPMScheduler, s, variance_type=variance, prediction_type=NAMES[predict], timestep_spacing="trailing"
    )  # fmt: skip
    scheduler.set_timesteps(steps or 100)
    g = lambda t: torch.Generator().manual_seed(t)  # noqa: E731
    noise = lambda t: torch.randn(3, 2, 4, 4, generator=g(t), dtype=torch.float64)  # noqa: E731
    x = noise(100)
    ours = samplers.ancestral(Denoiser(net, s, predict, variance), x, noise, steps)
    for step, timestep in zip(ours, scheduler.timesteps, strict=True):
        out = net(x, timestep.expand(3))
        x, x0 = scheduler.step(out, int(timestep), x, generator=g(step.t), return_dict=False)
        torch.testing.assert_close(step.x0, x0, rtol=1e-9, atol=1e-9)
        if step.t == 0 and steps:
            log_or_not = scheduler._get_variance(int(timestep), out[:, 2:])
            x = x - noise(0) * ((0.5 * log_or_not).exp() if variance == "learned_range" else log_or_not.sqrt())
        torch.testing.assert_close(step.x, x, rtol=1e-9, atol=1e-9)
    assert step.t == 0


def test_the_first_variance_is_not_that_of_diffusers():
    """At t = 1 both fixed variances are beta~_2, as in the official code. diffusers has beta_1 and 1e-20.

    It matters for the decoder's likelihood, but not for samplers, where z = 0. At other levels they agree.
    """
    s = schedule.linear()
    x = torch.zeros(999, 1, 1, 1, dtype=torch.float64)
    for variance, at_1 in (("fixed_large", 1e-4), ("fixed_small", 1e-20)):
        scheduler = theirs(DDPMScheduler, s, variance_type=variance)
        denoiser = Denoiser(smooth_network, s, variance=variance)
        ours = denoiser(x, torch.arange(2, 1001)).log_variance.exp().flatten()
        other = torch.stack([scheduler._get_variance(t) for t in range(1, 1000)])
        torch.testing.assert_close(ours, other, rtol=1e-9, atol=0)
        assert scheduler._get_variance(0).item() == pytest.approx(at_1, rel=1e-9)
        assert denoiser(x[:1], torch.tensor([1])).log_variance.exp().item() == pytest.approx(5.45319e-5, rel=1e-6)


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_ddim_with_eta_1_is_ancestral_sampling(predict):
    """With eta 1 and all levels it is Algorithm 2 with sigma_t^2 = beta~_t, step by step.

    At t = 1 the variances differ (0 and beta~_2), but no noise is added there.
    """
    noise = normal(3, (1, 2, 2))
    denoiser = Denoiser(network(correlated(), SHORT, predict), SHORT, predict, "fixed_small", clip=False)
    one = samplers.ancestral(denoiser, noise(50), noise)
    other = samplers.ddim(denoiser, noise(50), 50, 1.0, noise)
    for a, b in zip(one, other, strict=True):
        assert a.t == b.t
        torch.testing.assert_close(a.x, b.x, rtol=1e-9, atol=1e-9)
    large = Denoiser(denoiser.network, SHORT, predict, "fixed_large", clip=False)
    assert (last(samplers.ancestral(large, noise(50), noise)).x - b.x).abs().max() > 1e-2


# Finite data, seeds, and the interface of samplers.


@pytest.mark.parametrize("sampler", ALL)
def test_samples_of_finite_data_are_its_images(sampler):
    """With data of four images, every sample is one of them, and all are about equally frequent."""
    images = [[0.9, -0.8, 0.1, 0.3], [-0.7, 0.5, 0.6, -0.2], [0.1, 0.7, -0.9, 0.8], [-0.5, -0.6, -0.4, -0.9]]
    data = FiniteData(torch.tensor(images).double().view(4, 1, 2, 2))
    denoiser = Denoiser(network(data, SHORT, "eps"), SHORT, variance="fixed_small")
    noise = normal(4000, (1, 2, 2), seed=1)
    x = last(ALL[sampler].run(denoiser, noise(50), noise, 50, None, None)).x
    distance, member = (x[:, None] - data.images).flatten(2).abs().amax(2).min(1)
    assert distance.max() < 1e-6
    assert chisquare(np.bincount(member.numpy(), minlength=4)).pvalue > 1e-4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-3)])
@pytest.mark.parametrize("sampler", ALL)
def test_an_image_depends_only_on_its_own_seed(sampler, dtype, tolerance):
    """Four seeds in batches of 1, 3 and 4, or in another order, give the same images up to rounding.

    In float32 a convolution may round differently in another batch, and 1/sqrt(abar_T) = 200 magnifies that.
    """
    denoiser = Denoiser(randomised_unet().to(dtype), SHORT)

    def images(seeds):
        draws = per_image(seeds, (1, 8, 8))
        noise = lambda t: draws(t).to(dtype)  # noqa: E731
        return last(ALL[sampler].run(denoiser, noise(50), noise, 5, None, None)).x

    seeds = [11, 7, 1000, 0]
    whole = images(seeds)
    assert whole.dtype == dtype
    parts = torch.cat([images(seeds[:3]), images(seeds[3:])])
    torch.testing.assert_close(parts, whole, rtol=0, atol=tolerance)
    torch.testing.assert_close(images(seeds[::-1]).flip(0), whole, rtol=0, atol=tolerance)
    assert min((whole[i] - whole[j]).abs().max() for i in range(4) for j in range(i)) > 0.1


def test_steps_come_in_order_and_report_x0():
    """There is one Step per network call, with falling t. x0 is the estimate before the step. x is not changed."""
    noise = normal(2, (1, 2, 2))
    denoiser = Denoiser(network(correlated(), SHORT, "eps"), SHORT)
    x = noise(50)
    before = x.clone()
    for sampler in ALL.values():
        steps = list(sampler.run(denoiser, x, noise, 5, None, None))
        assert [step.t for step in steps] == [40, 30, 20, 10, 0]
        torch.testing.assert_close(steps[0].x0, denoiser(x, torch.tensor([50, 50])).x0)
        assert torch.equal(x, before)
        assert steps[-1].x.abs().max() <= 1  # the image is x0^, which is clipped
        torch.testing.assert_close(steps[-1].x, steps[-1].x0)


def test_labels_reach_the_network():
    labels = []

    def spy(x, timestep, y):
        labels.append(y)
        return torch.zeros_like(x)

    y, noise = torch.tensor([3, 4]), normal(2, (1, 2, 2))
    for sampler in ALL.values():
        last(sampler.run(Denoiser(spy, SHORT), noise(50), noise, 3, y, None))
    assert len(labels) == sum(sampler.calls(Denoiser(spy, SHORT), 3) for sampler in ALL.values())
    assert all(y is seen for seen in labels)


@pytest.mark.parametrize("steps", [0, -1, 51])
@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_wrong_steps_are_refused(sampler, steps):
    noise = normal(1, (1, 1, 1))
    with pytest.raises(InputError, match=f"steps {steps}: want 1 to 50"):
        last(getattr(samplers, sampler)(Denoiser(smooth_network, SHORT), noise(50), noise=noise, steps=steps))


def test_eta_needs_noise():
    with pytest.raises(ValueError, match="noise"):
        last(samplers.ddim(Denoiser(smooth_network, SHORT), torch.zeros(1, 1, 1, 1), 5, eta=0.5))


@pytest.mark.parametrize("predict", ["x0", "v", "mu"])
def test_jsd_samples_are_finite(predict):
    """They start at abar_T = 0, where x_T contains nothing of x_0."""
    s, data = schedule.jsd(20), correlated()
    noise = normal(2, (1, 2, 2))
    denoiser = Denoiser(network(data, s, predict), s, predict)
    paths = [samplers.ancestral(denoiser, noise(20), noise), samplers.ddim(denoiser, noise(20), 20)]
    for path in [*paths, samplers.ddim(denoiser, noise(20), 20, 1.0, noise)]:
        assert all(step.x.isfinite().all() for step in path)


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_sampling_from_x_t_continues_the_chain(sampler):
    """From x_t of a chain and with its noise, the rest of the chain is the same."""
    s = schedule.linear(12, 1e-3, 0.6)
    denoiser = Denoiser(network(correlated(), s, "eps"), s)
    noise = per_image(range(3), (1, 2, 2))
    walk = samplers.ancestral if sampler == "ancestral" else partial(samplers.ddim, steps=12, eta=0.5)
    whole = list(walk(denoiser, noise(12).double(), noise=noise))
    middle = next(step for step in whole if step.t == 7)
    if sampler == "ddim":
        walk = partial(samplers.ddim, steps=7, eta=0.5)
    rest = list(walk(denoiser, middle.x, noise=noise, start=7))
    assert [step.t for step in rest] == [6, 5, 4, 3, 2, 1, 0]
    assert torch.equal(rest[-1].x, whole[-1].x)


def test_wrong_starts_are_refused():
    s = schedule.linear(12, 1e-3, 0.6)
    denoiser = Denoiser(network(correlated(), s, "eps"), s)
    with pytest.raises(InputError, match="start 13: want a whole number, 1 to 12"):
        next(samplers.ddim(denoiser, torch.zeros(1, 1, 2, 2), steps=2, start=13))
    with pytest.raises(InputError, match="steps 5: want 1 to 4"):
        next(samplers.ddim(denoiser, torch.zeros(1, 1, 2, 2), steps=5, start=4))

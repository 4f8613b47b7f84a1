"""The probability flow's likelihood: closed forms for Gaussian and finite data, order, probes, the discrete bound.

The expected values use only alpha_bar and the linear flow, and no formula of the package.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from exact import PREDICTIONS, FiniteData, GaussianData, correlated, network
from scipy.stats import norm

from ddpm import ode, pixels, schedule
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError
from ddpm.noise import per_image
from ddpm.schedule import Schedule
from ddpm.unet import UNet

float64 = torch.float64
DATA = correlated()


def even(levels, first=0.01, last=100.0):
    """A schedule whose sigma = sqrt(1/abar - 1) rises from `first` to `last` in equal ratios."""
    sigma = torch.linspace(math.log(first), math.log(last), levels).double().exp()
    return Schedule(torch.cat([torch.ones(1).double(), 1 / (1 + sigma**2)]), torch.arange(-1, levels))


def flow_density(data, s, x):
    """The exact -log p(x), nats [B].

    Along each eigenvector of S, q(x_t) is N(m_t, c_t) and the flow is x_T = m_T + sqrt(c_T/c_1) (x_1 - m_1). x_1 is
    sqrt(abar_1) x, and x_T ~ N(0, 1).
    """
    values, vectors = torch.linalg.eigh(data.covariance)
    first, last = s.alpha_bar[1], s.alpha_bar[-1]
    scale = ((last * values + 1 - last) / (first * values + 1 - first)).sqrt()
    x1 = first.sqrt() * (x - data.mean).flatten(1)  # minus its mean
    xT = last.sqrt() * data.mean.flatten() @ vectors + scale * (x1 @ vectors)
    return 0.5 * (xT.square() + math.log(2 * math.pi)).sum(1) - scale.log().sum() - data.D / 2 * first.log()


def coordinates(x):
    """Each image D times, and probes sqrt(D) e_i. The average of probe^T J probe over them is the trace of J."""
    D = x[0].numel()
    probe = math.sqrt(D) * torch.eye(D).double().view(D, *x.shape[1:])
    return x.repeat_interleave(D, 0), probe.repeat(len(x), *[1] * (x.ndim - 1))


def exact_trace(denoiser, x, steps=None):
    """-log p(x) with the exact trace, nats [B]."""
    many, probe = coordinates(x)
    return ode.probability_flow(denoiser, many, probe, steps).view(len(x), -1).mean(1)


def images(n=8):
    return DATA.sample(n, torch.Generator().manual_seed(0))


def error(s, steps=None, predict="eps"):
    """The solver's error for the correlated Gaussian, nats [B]."""
    denoiser = Denoiser(network(DATA, s, predict), s, predict)
    return exact_trace(denoiser, images(), steps) - flow_density(DATA, s, images())


# (a) The density.


@pytest.mark.parametrize(
    ("s", "steps", "atol"),
    [(even(200), None, 2e-3), (schedule.linear(), 200, 2e-3), (schedule.cosine(), 200, 4e-3)],
    ids=["even", "linear", "cosine"],
)
def test_the_density_is_the_closed_form_for_gaussian_data(s, steps, atol):
    """The error is in nats of 4 dimensions. The tolerances are at most twice the measured errors."""
    assert error(s, steps).abs().max() < atol


def test_the_density_equals_that_of_q_at_level_1():
    """If q(x_T) is N(0, I), p is the density of q(x_1). x = x_1/sqrt(abar_1) multiplies it by abar_1^(D/2)."""
    s, x = even(200, last=1e4), images()
    mean, covariance = DATA.q_moments(s.alpha_bar[1])
    q = torch.distributions.MultivariateNormal(mean, covariance)
    closed = -q.log_prob(s.alpha_bar[1].sqrt() * x.flatten(1)) - DATA.D / 2 * s.alpha_bar[1].log()
    nats = exact_trace(Denoiser(network(DATA, s, "eps"), s), x)
    torch.testing.assert_close(nats, closed, rtol=0, atol=4e-3)


def test_the_density_of_finite_data():
    """The flow of five points is nonlinear, and p is a mixture of five Gaussians."""
    s, g = even(200, first=0.1, last=1e4), torch.Generator().manual_seed(1)
    data = FiniteData(torch.rand(5, 1, 2, 2, generator=g).double() * 2 - 1)
    x = data.images[torch.arange(10) % 5] + 0.1 * torch.randn(10, 1, 2, 2, generator=g).double()
    distance = (x[:, None] - data.images).square().flatten(2).sum(2)  # squared
    log_p = torch.logsumexp(-distance / (2 * 0.1**2), 1) - math.log(5) - 4 / 2 * math.log(2 * math.pi * 0.1**2)
    nats = exact_trace(Denoiser(network(data, s, "eps"), s), x)
    torch.testing.assert_close(nats, -log_p, rtol=0, atol=8e-3)


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_every_prediction_gives_the_same_density(predict):
    """eps, x0, mu and v give the same. The denoiser clips by default, but the flow does not."""
    s = even(40)
    torch.testing.assert_close(error(s, predict=predict), error(s), rtol=0, atol=1e-9)


# (b) The solver.


def test_the_order_is_2():
    """The error falls as the square of the number of levels."""
    levels = [16, 32, 64, 128]
    errors = [error(even(n)).abs().mean().item() for n in levels]
    slope = np.polyfit(np.log(levels), np.log(errors), 1)[0]
    assert -2.3 < slope < -1.7
    assert all(a > 3 * b for a, b in itertools.pairwise(errors))


def test_the_order_is_2_in_steps():
    """The error also falls as 1/steps^2 if few of many levels are visited."""
    steps = [10, 20, 40, 80]
    errors = [error(schedule.linear(4000, 2.5e-5, 5e-3), n).abs().mean().item() for n in steps]
    assert -2.3 < np.polyfit(np.log(steps), np.log(errors), 1)[0] < -1.7


def visited(s, steps):
    """The levels at which the network is called, in rising order."""
    seen = []

    def spy(x, timestep, y):
        seen.append(int(timestep[0]) + 1)
        return torch.zeros_like(x)

    ode.probability_flow(Denoiser(spy, s, "v"), torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2), steps)
    assert seen == [t for pair in itertools.pairwise(sorted(set(seen))) for t in pair]  # Heun: 2 (steps - 1) calls
    return sorted(set(seen))


def test_levels_are_even_in_log_snr():
    s = schedule.linear()
    assert visited(even(30), None) == list(range(1, 31))
    assert visited(s, 2) == [1, 1000]
    assert visited(even(41), 11) == list(range(1, 42, 4))
    levels = torch.tensor(visited(s, 20))
    gaps = (1 / s.alpha_bar[levels] - 1).log().diff()
    assert gaps.max() / gaps.min() < 2  # if they were even in t, the largest gap would be 38 times the least
    assert len(visited(s, 100)) == 94  # near data the levels of the schedule are further apart


def test_the_log_determinants_matter():
    """Negative controls: without the trace, with a wrong sign, or without the scale of x, the error is large."""
    s, x = even(64, first=0.5), images()
    denoiser = Denoiser(network(DATA, s, "eps"), s)
    closed = flow_density(DATA, s, x)
    many, probe = coordinates(x)
    right = (exact_trace(denoiser, x) - closed).abs().max()
    assert right < 0.01
    path = ode.probability_flow(denoiser, many, 0 * probe).view(len(x), -1).mean(1)  # without the trace
    wrong_sign = 2 * path - exact_trace(denoiser, x)
    no_scale = exact_trace(denoiser, x) + DATA.D / 2 * s.alpha_bar[1].log()
    for wrong in (path, wrong_sign, no_scale):
        assert (wrong - closed).abs().min() > 0.3


# (c) The probe.


def test_the_average_over_all_signs_is_the_trace():
    """The results of the 16 probes of +-1 differ, and their average is that of the exact trace."""
    s, x = even(30), images(3)
    denoiser = Denoiser(network(DATA, s, "eps"), s)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)), dtype=float64).view(16, 1, 2, 2)
    nats = ode.probability_flow(denoiser, x.repeat_interleave(16, 0), signs.repeat(3, 1, 1, 1)).view(3, 16)
    torch.testing.assert_close(nats.mean(1), exact_trace(denoiser, x), rtol=0, atol=1e-9)
    assert (nats.std(1) > 0.1).all()


def test_random_probes_are_unbiased():
    """With standard normal probes, the mean is within 4 standard errors. The trace contributes more than 40."""
    s, n, x = even(12), 2000, images(1)
    denoiser = Denoiser(network(DATA, s, "eps"), s)
    probe = torch.randn(n, 1, 2, 2, generator=torch.Generator().manual_seed(2)).double()
    nats = ode.probability_flow(denoiser, x.expand(n, 1, 2, 2), probe)
    off = nats.mean() - exact_trace(denoiser, x)[0]
    standard_error = nats.std() / math.sqrt(n)
    assert off.abs() < 4 * standard_error
    path = ode.probability_flow(denoiser, x, torch.zeros_like(x))
    assert (path - nats.mean()).abs() > 40 * standard_error


# (d) Eight-bit data.


@pytest.mark.parametrize("spread", [0.3, 0.05, 0.02])
def test_the_dequantised_bound(spread):
    """The bound exceeds -log P of every grey level only by Jensen's gap.

    The flow's x ~ N(mean, s^2) with s^2 = spread^2 + sigma_1^2, and P is the mass of a bin up to 4 s from the mean. On
    average the gap is BIN^2 / (24 s^2) nats: 0.00003, 0.001 and 0.005.
    """
    s, mu = even(300, last=300.0), 0.1
    data = GaussianData(torch.full((1, 1, 1), mu).double(), torch.full((1, 1), spread**2).double())
    centres = np.arange(256) / 127.5 - 1
    wide = math.sqrt(spread**2 + 0.01**2)
    centres = centres[np.abs(centres - mu) < 4 * wide][:: 1 if spread < 0.1 else 8]
    true = -np.log(norm.cdf(centres + pixels.BIN / 2, mu, wide) - norm.cdf(centres - pixels.BIN / 2, mu, wide))

    nodes, weights = np.polynomial.legendre.leggauss(3)  # for u in [0, 1); exact, because log p is a quadratic
    x0 = torch.from_numpy(centres).repeat_interleave(3).view(-1, 1, 1, 1)
    u = torch.from_numpy((nodes + 1) / 2).repeat(len(centres)).view(-1, 1, 1, 1)
    bound = ode.bound(Denoiser(network(data, s, "eps"), s), x0, u, torch.ones_like(x0))
    bound = (bound.view(-1, 3) * torch.from_numpy(weights / 2)).sum(1).numpy()

    jensen = (pixels.BIN**2 / 12) * ((centres - mu) / wide**2) ** 2 / 2  # BIN^2/12 (d log p/dx)^2/2, to leading order
    solver = 2e-4 * (1 + ((centres - mu) / wide) ** 2)
    assert (bound - true > -solver).all()
    assert (bound - true < 1.1 * jensen + solver).all()
    share = np.exp(-true) / np.exp(-true).sum()
    assert (share * (bound - true)).sum() == pytest.approx(pixels.BIN**2 / (24 * wide**2), rel=0.1, abs=1e-4)


def test_a_pixel_known_for_sure_costs_what_the_docstring_says():
    """If all data is one grey picture, the noise of level 1 is 1.3 grey levels and costs 1.7 bits (linear schedule)."""
    s = schedule.linear()
    data = FiniteData(torch.full((1, 1, 1, 1), 1 / 255, dtype=float64))
    x0, u = data.images.expand(64, 1, 1, 1), (torch.arange(64).view(-1, 1, 1, 1) + 0.5) / 64
    nats = ode.bound(Denoiser(network(data, s, "eps"), s), x0, u, torch.ones(64, 1, 1, 1), 50)
    sigma = (1 / s.alpha_bar[1] - 1).sqrt().item()
    assert sigma / pixels.BIN == pytest.approx(1.3, abs=0.05)
    assert nats.mean().item() / math.log(2) == pytest.approx(1.71, abs=0.01)


@pytest.mark.parametrize("spread", [0.3, 0.02, 0.002])
def test_the_flow_with_the_decoder(spread):
    """E_q[log q(x_1|x_0) - log p(x_1) - log p_theta(x_0|x_1)] is at least -log P and near it.

    The data is one-dimensional and Gaussian, and the mean is a quadrature over eps. At a spread of 0.002, a quarter of
    a grey level, uniform dequantisation loses a bit.
    """
    s, mu = even(300, last=300.0), 0.1
    data = GaussianData(torch.full((1, 1, 1), mu).double(), torch.full((1, 1), spread**2).double())
    abar = s.alpha_bar[1].item()
    table = torch.full((s.T + 1,), spread**2 * (1 - abar) / (abar * spread**2 + 1 - abar)).double()  # of x_0 given x_1
    denoiser = Denoiser(network(data, s, "eps"), s, variance=table, clip=False)
    centres = np.arange(256) / 127.5 - 1
    centres = centres[np.argsort(np.abs(centres - mu))[:2]]
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    x0 = torch.from_numpy(centres).repeat_interleave(8).view(-1, 1, 1, 1)
    eps = torch.from_numpy(nodes).repeat(2).view(-1, 1, 1, 1)
    bound = ode.decoder_bound(denoiser, x0, eps, torch.ones_like(x0)).view(2, 8).numpy()
    bound = bound @ (weights / weights.sum())

    x1 = np.linspace(mu - 12 * math.hypot(spread, 0.01), mu + 12 * math.hypot(spread, 0.01), 20001)
    density = norm.pdf(x1, math.sqrt(abar) * mu, math.sqrt(abar * spread**2 + 1 - abar))
    first = denoiser(torch.from_numpy(x1).view(-1, 1, 1, 1), torch.ones(len(x1), dtype=torch.int64))
    mean = first.mean.flatten().numpy()
    sigma = float((0.5 * first.log_variance.flatten()[0]).exp())
    for value, centre in zip(bound, centres, strict=True):
        mass = norm.cdf(centre + pixels.BIN / 2, mean, sigma) - norm.cdf(centre - pixels.BIN / 2, mean, sigma)
        true = -math.log(np.trapezoid(density * mass, x1))
        assert -2e-3 < value - true < 0.05
    u = torch.full_like(x0, 0.5)
    if spread == 0.002:
        assert ode.bound(denoiser, x0, u, torch.ones_like(x0))[0] > bound[0] + 0.5


# (e) Networks, and what is refused.


def test_a_float32_network_gives_the_same_in_any_batch():
    net = UNet(1, width=32, channel_multipliers=(1,), num_res_blocks=1).eval()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=g))
    denoiser = Denoiser(net, schedule.linear())
    x0, probe = (
        (torch.randint(0, 256, (3, 1, 8, 8), generator=g) / 127.5 - 1),
        per_image([0, 1, 2], (1, 8, 8))(1).sign(),
    )
    u = torch.rand(3, 1, 8, 8, generator=g)
    together = ode.bound(denoiser, x0, u, probe, steps=6)
    assert together.dtype == float64
    assert together.isfinite().all()
    assert all(p.grad is None for p in net.parameters())
    alone = [ode.bound(denoiser, x0[i : i + 1], u[i : i + 1], probe[i : i + 1], steps=6) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=0)
    again = ode.bound(denoiser, x0, u, -probe, steps=6)  # the result is even in the probe
    torch.testing.assert_close(together, again, rtol=1e-5, atol=0)


def test_labels_reach_the_network():
    def net(x, timestep, y):
        return 0.1 * y.view(-1, 1, 1, 1) * x

    x, probe = torch.ones(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    s = even(10)
    both = ode.probability_flow(Denoiser(net, s), x, probe, y=torch.tensor([0, 5]))
    one = ode.probability_flow(Denoiser(lambda x, timestep, y: 0.5 * x, s), x, probe)
    assert both[1] == one[1]
    assert both[0] != one[0]


def test_wrong_steps_and_schedules_are_refused():
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(InputError, match="alpha_bar 0"):
        ode.probability_flow(Denoiser(lambda x, timestep, y: x, schedule.jsd(10), "v"), x, x)
    for steps in (1, 11):
        with pytest.raises(InputError, match=f"steps {steps}: want a whole number, 2 to 10"):
            ode.probability_flow(Denoiser(lambda x, timestep, y: x, schedule.linear(10)), x, x, steps)

"""The bound against closed forms for Gaussian data and the official formulas in NumPy; and the discretised decoder."""

import math

import numpy as np
import pytest
import torch
from exact import PREDICTIONS, FiniteData, GaussianData, correlated, isotropic, network, with_variance
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from scipy.integrate import quad
from scipy.stats import norm

from ddpm import likelihood, losses, pixels, schedule
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError
from ddpm.gaussian import Gaussian, beta_tilde, q_sample
from ddpm.noise import per_image

quick = settings(max_examples=40, derandomize=True)
float64 = torch.float64
SHORT = schedule.linear(50, 2e-3, 0.4)
LARGE = torch.cat([beta_tilde(SHORT)[:2], SHORT.beta[2:]])  # fixed_large's sigma_t^2
TABLES = {"fixed_large": LARGE, "fixed_small": beta_tilde(SHORT)}


# (a) Gaussian data and its exact denoiser: every term in closed form.


def expected_bound(data, predict, variance, s=SHORT):
    """The exact average of the bound's terms over x_0 and eps. They are quadratics, which the cubature integrates."""
    x0, eps = data.cubature()
    denoiser = Denoiser(network(data, s, predict), s, predict, variance, clip=False)
    return continuous(denoiser, x0, eps)


def continuous(denoiser, x0, eps):
    """The bound without L_0, for x_0 that are not 8-bit. `vlb` refuses these, because they have no L_0."""
    s, terms, mse = denoiser.schedule, [], []
    for t in torch.arange(1, s.T + 1)[:, None].expand(-1, len(x0)):
        nats, estimate = likelihood.term(denoiser, x0, q_sample(s, x0, t, eps), t)
        terms.append(nats)
        mse.append((x0 - estimate.x0).square().flatten(1).mean(1))
    kl = torch.stack(terms[1:], dim=1)
    return likelihood.Bound(likelihood.prior(denoiser, x0), kl, 0 * kl[:, 0], torch.stack(mse, dim=1), x0[0].numel())


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
@pytest.mark.parametrize("predict", PREDICTIONS)
def test_the_bound_equals_the_closed_form_for_gaussian_data(predict, variance):
    """The means of L_T, of every L_{t-1} and of |x_0 - x0^|^2 for N(mu, S) are closed forms, without sampling error."""
    data = correlated()
    bound = expected_bound(data, predict, variance)
    closed = data.bound_kl(SHORT, TABLES[variance])
    torch.testing.assert_close(bound.kl.mean(0), closed, rtol=1e-8, atol=0)
    torch.testing.assert_close(bound.prior.mean(), data.bound_prior(SHORT), rtol=1e-8, atol=0)
    mse = torch.stack([data.x0_covariance(a).trace() / data.D for a in SHORT.alpha_bar[1:]])
    torch.testing.assert_close(bound.mse.mean(0), mse, rtol=1e-8, atol=0)
    other = TABLES["fixed_small" if variance == "fixed_large" else "fixed_large"]
    assert ((data.bound_kl(SHORT, other) / closed - 1).abs() > 1e-3).any()  # the other variance would fail


def test_a_wrong_coefficient_costs_more_at_every_level():
    """Negative control: an error of 0.1% in eps costs bits at every level, since the exact mean is the best one."""
    data = correlated()
    x0, eps = data.cubature()
    exact = network(data, SHORT, "eps")
    off = Denoiser(lambda x, timestep, y: 1.001 * exact(x, timestep), SHORT, variance="fixed_small", clip=False)
    excess = continuous(off, x0, eps).kl.mean(0) / data.bound_kl(SHORT, TABLES["fixed_small"]) - 1
    assert (excess > 1e-8).all()


def test_the_true_reverse_chain_costs_the_entropy():
    """If p(x_{t-1}|x_t) is q(x_{t-1}|x_t), then L = H(x_0) + KL(q(x_T) || p(x_T)) exactly (Eq. 5).

    L_0 here is the entropy of p(x_0|x_1), without bins.
    """
    data = isotropic()
    table = data.variances(SHORT)
    bound = expected_bound(data, "eps", table)
    decoder = data.D / 2 * (2 * math.pi * math.e * table[1]).log()
    mean, covariance = data.q_moments(SHORT.alpha_bar[-1])
    gap = 0.5 * (covariance.trace() + mean.square().sum() - data.D - torch.logdet(covariance))
    total = bound.prior.mean() + bound.kl.mean(0).sum() + decoder
    torch.testing.assert_close(total, data.entropy() + gap, rtol=1e-10, atol=0)
    for variance in ("fixed_large", "fixed_small"):  # any other variance costs more
        assert expected_bound(data, "eps", variance).kl.mean(0).sum() > bound.kl.mean(0).sum() + 1e-3


def test_the_decoder_term_of_gaussian_data():
    """The mean of L_0 over 8-bit Gaussian pixels and noise, with the exact denoiser, equals a sum in SciPy."""
    s, sd, mu = SHORT.respace([1, 2]), 0.3, 0.1
    centres, edges = np.arange(256) / 127.5 - 1, (np.arange(1, 256) - 0.5) / 127.5 - 1
    share = np.diff(norm.cdf(edges, mu, sd), prepend=0, append=1)[
        :, None
    ]  # the probability of each of the 256 pixel values
    nodes, weights = np.polynomial.hermite_e.hermegauss(12)
    weights = weights / weights.sum()
    abar, tilde = s.alpha_bar[1].item(), beta_tilde(s)[2].item()
    x1 = math.sqrt(abar) * centres[:, None] + math.sqrt(1 - abar) * nodes  # [256, 12]
    mean = mu + math.sqrt(abar) * sd**2 / (abar * sd**2 + 1 - abar) * (x1 - math.sqrt(abar) * mu)
    p = norm(mean, math.sqrt(tilde))
    low, high = np.append(-np.inf, edges)[:, None], np.append(edges, np.inf)[:, None]
    mass = np.where(low > mean, p.sf(low) - p.sf(high), p.cdf(high) - p.cdf(low))

    exact = network(GaussianData(torch.full((1, 1, 1), mu).double(), torch.full((1, 1), sd**2).double()), s, "eps")
    x0 = torch.from_numpy(centres).repeat_interleave(12).view(-1, 1, 1, 1)
    eps = torch.from_numpy(nodes).repeat(256).view(-1, 1, 1, 1)
    L_0 = likelihood.vlb(Denoiser(exact, s, clip=False), x0, lambda t: eps).decoder.view(256, 12).numpy()
    assert (share * weights * L_0).sum() == pytest.approx(-(share * weights * np.log(mass)).sum(), rel=1e-6)


# (b) The formulas of the official code in NumPy, without this package.


class Official:
    """Terms of the bound in nats per image, for T levels of the linear schedule; arrays [B, C, H, W]."""

    def __init__(self, T, beta_1, beta_T, predict, variance, clip):
        self.T, self.predict, self.variance, self.clip = T, predict, variance, clip
        self.beta = np.append(np.nan, np.linspace(beta_1, beta_T, T))
        self.abar = np.append(1.0, np.cumprod(1 - self.beta[1:]))
        self.tilde = np.full(T + 1, np.nan)
        self.tilde[1:] = self.beta[1:] * (1 - self.abar[:-1]) / (1 - self.abar[1:])
        self.log_tilde = np.log(np.append([np.nan, self.tilde[2]], self.tilde[2:]))  # clipped: beta~_2 at t = 1

    def mu_tilde(self, x0, xt, t):
        a, b, p = self.abar[t], self.beta[t], self.abar[t - 1]
        return np.sqrt(p) * b / (1 - a) * x0 + np.sqrt(1 - b) * (1 - p) / (1 - a) * xt

    def p_mean_variance(self, out, raw, xt, t):
        """x0^, mean and log-variance of p_theta(x_{t-1} | x_t), from the network's outputs."""
        a, b, p = self.abar[t], self.beta[t], self.abar[t - 1]
        clip = (lambda x: np.clip(x, -1, 1)) if self.clip else (lambda x: x)
        if self.predict == "mu":
            x0 = clip(out / (np.sqrt(p) * b / (1 - a)) - np.sqrt(1 - b) * (1 - p) / (np.sqrt(p) * b) * xt)
            mean = out
        else:
            x0 = clip(out if self.predict == "x0" else np.sqrt(1 / a) * xt - np.sqrt(1 / a - 1) * out)
            mean = self.mu_tilde(x0, xt, t)
        log_beta = np.log(b)
        log_variance = {
            "fixed_large": self.log_tilde[1] if t == 1 else log_beta,
            "fixed_small": self.log_tilde[t],
            "learned": raw,
            "learned_range": (raw + 1) / 2 * log_beta + (1 - raw) / 2 * self.log_tilde[t],
        }[self.variance]
        return x0, mean, log_variance

    @staticmethod
    def kl(m1, v1, m2, v2):
        return (0.5 * (-1 + v2 - v1 + np.exp(v1 - v2) + (m1 - m2) ** 2 * np.exp(-v2))).sum(axis=(1, 2, 3))

    @staticmethod
    def decoder(x0, mean, log_variance):
        """-log of the bins' masses. Each mass is a difference in the left tail, where it does not cancel."""
        sd = np.exp(0.5 * log_variance)
        low = np.where(x0 < -0.999, -np.inf, (x0 - 1 / 255 - mean) / sd)
        high = np.where(x0 > 0.999, np.inf, (x0 + 1 / 255 - mean) / sd)
        left, right = np.where(low > 0, -high, low), np.where(low > 0, -low, high)
        return -np.log(special.ndtr(right) - special.ndtr(left)).sum(axis=(1, 2, 3))

    def terms(self, network, x0, eps):
        """prior [B], L_{t-1} [B, T] (its first column is L_0) and mse [B, T]; network(xt, t) -> out, raw."""
        a = self.abar[self.T]
        prior = self.kl(np.sqrt(a) * x0, np.log(1 - a), 0.0, 0.0)
        L, mse = [], []
        for t in range(1, self.T + 1):
            xt = np.sqrt(self.abar[t]) * x0 + np.sqrt(1 - self.abar[t]) * eps[t]
            guess, mean, log_variance = self.p_mean_variance(*network(xt, t), xt, t)
            divergence = self.kl(self.mu_tilde(x0, xt, t), self.log_tilde[t], mean, log_variance)
            L.append(self.decoder(x0, mean, log_variance) if t == 1 else divergence)
            mse.append(((x0 - guess) ** 2).mean(axis=(1, 2, 3)))
        return prior, np.stack(L, 1), np.stack(mse, 1)


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "free"])
@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small", "learned", "learned_range"])
@pytest.mark.parametrize("predict", ["eps", "x0", "mu"])
def test_every_term_equals_the_official_formulas(predict, variance, clip):
    """Prior, every L_{t-1}, L_0 and mse of a random network agree to 1e-6, for T = 20."""
    T, shape, rng = 20, (3, 2, 2, 3), np.random.default_rng(0)
    slope, shift, raw = rng.normal(0, 0.5, T + 1), rng.normal(0, 0.5, (T + 1, *shape[1:])), rng.normal(0, 1, T + 1)
    x0 = rng.integers(0, 256, shape)
    x0[0, 0, 0] = 0, 255, 128  # both open ends
    eps = rng.normal(size=(T + 1, *shape))

    def outputs(x, t):  # functions of x_t and t in place of a network; raw log-variances about -3, or fractions about 0
        return slope[t] * x + shift[t], raw[t] * np.tanh(x) - (3 if variance == "learned" else 0)

    official = Official(T, 5e-3, 0.5, predict, variance, clip)
    prior, L, mse = official.terms(outputs, x0 / 127.5 - 1, eps)

    def net(x, timestep, y):
        pair = outputs(x.numpy(), int(timestep[0]) + 1)
        return torch.from_numpy(np.concatenate(pair[: 1 + variance.startswith("learned")], axis=1))

    denoiser = Denoiser(net, schedule.linear(T, 5e-3, 0.5), predict, variance, clip)
    signal = pixels.to_signal(torch.from_numpy(x0.astype(np.uint8)))
    bound = likelihood.vlb(denoiser, signal, lambda t: torch.from_numpy(eps[t]))
    # the signal is rounded to float32 before it is float64: 6e-8, over bins of width 8e-3
    np.testing.assert_allclose(bound.prior.numpy(), prior, rtol=1e-6)
    np.testing.assert_allclose(bound.kl.numpy(), L[:, 1:], rtol=1e-6)
    np.testing.assert_allclose(bound.decoder.numpy(), L[:, 0], rtol=1e-6)
    np.testing.assert_allclose(bound.mse.numpy(), mse, rtol=1e-6)
    total = (prior + L.sum(1)) / (math.log(2) * math.prod(shape[1:]))
    np.testing.assert_allclose(bound.bits_per_dim().numpy(), total, rtol=1e-6)


# (c) A chain with p = q.


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_a_denoiser_that_knows_x0_costs_nothing(predict):
    """With fixed_small p = q, so L_{t-1} = 0 for t > 1. fixed_large costs only the divergence of the variances."""
    s, g = schedule.linear(), torch.Generator().manual_seed(0)
    t = torch.arange(2, 1001)
    x0 = pixels.to_signal(torch.randint(0, 256, (999, 1, 2, 2), generator=g).byte()).double()
    eps = torch.randn(x0.shape, generator=g, dtype=float64)
    xt = q_sample(s, x0, t, eps)

    def knows(x, timestep, y):
        return Denoiser(None, s, predict).target(x0, x, timestep + 1, eps)

    for variance in ("fixed_small", "fixed_large"):
        L, _ = likelihood.term(Denoiser(knows, s, predict, variance), x0, xt, t)
        ratio = s.beta[2:] / beta_tilde(s)[2:] if variance == "fixed_large" else torch.ones(999).double()
        divergence = 4 * 0.5 * (ratio.log() + 1 / ratio - 1)  # 4 dimensions
        torch.testing.assert_close(L, divergence, rtol=1e-8, atol=1e-12)


def test_fixed_large_costs_half_a_bit():
    """With the paper's schedule sigma_t^2 = beta_t costs 0.49 bits/dim, whatever the mean is."""
    s = schedule.linear()
    ratio = s.beta[2:] / beta_tilde(s)[2:]
    bits = (0.5 * (ratio.log() + 1 / ratio - 1)).sum().item() / math.log(2)
    assert bits == pytest.approx(0.49, abs=0.005)


# The bound's bookkeeping.


@pytest.mark.parametrize("variance", ["fixed_large", "learned"])
def test_mean_of_the_training_term_is_the_bound_over_T(variance):
    """T times the mean of losses.vlb over t, plus L_T, is the bound with the same noise. Neither clips x0^."""
    data, T = correlated(), SHORT.T
    net = network(data, SHORT, "eps")
    if variance == "learned":
        net = with_variance(net, lambda x, timestep: x.sin() - 3)
    denoiser = Denoiser(net, SHORT, variance=variance)
    seeds = [3, 4]
    noise = per_image(seeds, (1, 2, 2))
    x0 = pixels.to_signal(torch.tensor([[[[0, 30], [128, 255]]], [[[1, 254], [77, 200]]]], dtype=torch.uint8)).double()
    t = torch.arange(1, T + 1).repeat_interleave(2)
    eps = torch.cat([noise(level).double() for level in range(1, T + 1)])
    terms = losses.vlb(denoiser, x0.repeat(T, 1, 1, 1), t, eps).view(T, 2)
    bound = likelihood.vlb(denoiser.unclipped(), x0, noise)
    prior = likelihood.prior(denoiser, x0) / (4 * math.log(2))
    torch.testing.assert_close(T * terms.mean(0) + prior, bound.bits_per_dim(), rtol=1e-10, atol=0)
    clipped = likelihood.vlb(denoiser, x0, noise)
    assert (clipped.bits_per_dim() - bound.bits_per_dim()).abs().max() > 1e-6  # the clipped bound differs


def test_the_bound_of_an_image_does_not_depend_on_the_batch():
    """The terms have their shapes, and an image alone has the same terms as in a batch."""
    data = correlated()
    denoiser = Denoiser(network(data, SHORT, "v"), SHORT, "v")
    x0 = pixels.to_signal(torch.randint(0, 256, (3, 1, 2, 2), generator=torch.Generator().manual_seed(0)).byte())
    whole = likelihood.vlb(denoiser, x0, per_image([5, 6, 7], (1, 2, 2)))
    assert (whole.prior.shape, whole.kl.shape, whole.decoder.shape, whole.mse.shape) == ((3,), (3, 49), (3,), (3, 50))
    alone = likelihood.vlb(denoiser, x0[1:2], per_image([6], (1, 2, 2)))
    for name in ("prior", "kl", "decoder", "mse"):
        torch.testing.assert_close(getattr(whole, name)[1:2], getattr(alone, name), rtol=1e-10, atol=1e-14)
    assert whole.dims == 4


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_a_chain_that_is_the_posterior_costs_nothing(predict):
    """A network that knows x_0, with the variance beta~_t, gives p_theta = q(x_{t-1} | x_t, x_0) and L_{t-1} = 0."""
    x0 = pixels.to_signal(torch.tensor([[[[0, 30], [128, 255]]]], dtype=torch.uint8)).double()
    knows = network(FiniteData(x0), SHORT, predict)
    noise = per_image([0], (1, 2, 2))
    bound = likelihood.vlb(Denoiser(knows, SHORT, predict, "fixed_small", clip=False), x0, noise)
    assert bound.kl.abs().max() < 1e-12
    assert bound.mse.max() < 1e-20
    received = list(likelihood.progressive_coding(Denoiser(knows, SHORT, predict, "fixed_small"), x0, noise))
    assert received[-2].nats.item() == pytest.approx(bound.prior.item(), abs=1e-12)  # down to x_1 only x_T costs bits
    large = likelihood.vlb(Denoiser(knows, SHORT, predict, "fixed_large", clip=False), x0, noise)
    assert (large.kl > 1e-11).all()  # the smallest is at T, where beta_t and beta~_t are nearly equal


def test_the_bound_of_one_level():
    """For T = 1 there is no L_{t-1}, so L = L_T + L_0, which is finite."""
    one = schedule.const(1, beta_T=0.5)
    bound = likelihood.vlb(
        Denoiser(lambda x, t, y: x, one, "x0"), torch.full((2, 1, 2, 2), 1 / 255), per_image([0, 1], (1, 2, 2))
    )
    assert bound.kl.shape == (2, 0)
    assert bound.bits_per_dim().isfinite().all()


@pytest.mark.parametrize("x0", [torch.rand(2, 1, 4, 4), torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), torch.nan)])
def test_signals_that_are_not_8_bit_are_refused(x0):
    """Images scaled to [0, 1], and other floats, would give a number without meaning."""
    denoiser, noise = Denoiser(lambda x, t, y: x, SHORT, "x0"), per_image(range(len(x0)), x0.shape[1:])
    for measure in (likelihood.vlb, lambda *given: next(likelihood.progressive_coding(*given))):
        with pytest.raises(InputError, match=r"grey levels off the 256 .*want the signal of uint8 0..255 pixels"):
            measure(denoiser, x0, noise)


# The discretised decoder (Eq. 13).

SIGMAS = [1e-3, 0.0074, 0.05, 1.0, 30.0]
MEANS = [-3.0, -1.0, -0.5, 0.0, 0.1234, 0.999, 1.0, 2.0]


def wide(dtype):
    """Every mean with every sigma, [8, 5]."""
    mean = torch.tensor(MEANS, dtype=dtype)[:, None].expand(-1, len(SIGMAS))
    return Gaussian(mean, torch.tensor(SIGMAS, dtype=dtype).log()[None] * 2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(float64, 1e-12), (torch.float32, 3e-5)])
def test_decoder_mass_sums_to_one(dtype, tolerance):
    """Eq. 13 is a distribution over the 256 pixel values for any mean and sigma, because the last bins are open."""
    mass = likelihood.decoder_mass(wide(dtype))
    assert mass.shape == (8, 5, 256)
    assert (mass >= 0).all()
    assert (mass.sum(-1) - 1).abs().max() < tolerance


@pytest.mark.parametrize("sigma", [0.004, 0.02, 0.3])
@pytest.mark.parametrize("mean", [-1.05, -0.99, 0.0, 0.3333, 1.0])
def test_decoder_mass_is_the_integral_of_the_density(mean, sigma):
    """Each bin's mass is the integral of the normal density over x - 1/255 .. x + 1/255, with open ends."""
    p = Gaussian(torch.full((1, 1), mean, dtype=float64), torch.full((1, 1), 2 * math.log(sigma), dtype=float64))
    mass = likelihood.decoder_mass(p)[0, 0].numpy()
    near = int(np.clip(round((mean + 1) * 127.5), 0, 255))
    for level in sorted({0, 255, *(i for i in range(near - 3, near + 4) if 0 <= i <= 255)}):
        low = -1 - 60 * sigma if level == 0 else (level - 0.5) / 127.5 - 1
        high = 1 + 60 * sigma if level == 255 else (level + 0.5) / 127.5 - 1
        cuts = [c for c in (mean - 5 * sigma, mean, mean + 5 * sigma) if low < c < high]
        area = quad(norm.pdf, low, high, args=(mean, sigma), points=cuts or None, limit=200, epsabs=1e-13)[0]
        assert mass[level] == pytest.approx(area, rel=1e-7, abs=1e-12)


@quick
@given(st.integers(0, 255), st.floats(-1.5, 1.5), st.floats(-14, 3), st.sampled_from([float64, torch.float32]))
def test_log_prob_is_the_log_of_the_mass(pixel, mean, log_variance, dtype):
    """Likelihood and codec share one distribution: decoder_log_prob is log decoder_mass at the pixel."""
    p = Gaussian(torch.tensor([[mean]], dtype=dtype), torch.tensor([[log_variance]], dtype=dtype))
    x0 = pixels.to_signal(torch.tensor([[pixel]], dtype=torch.uint8)).to(dtype)
    log_prob, mass = likelihood.decoder_log_prob(x0, p).item(), likelihood.decoder_mass(p)[0, 0, pixel].item()
    assert log_prob <= 1e-5
    if mass > 1e-30:
        # the bin's edges are float32 sums in one and quotients in the other; in sigmas they differ by 1e-7/sigma
        slack = 1e-6 if dtype == float64 else 1e-4 + 1e-5 * abs(log_prob)
        assert log_prob == pytest.approx(
            math.log(mass), abs=slack + 3e-7 * abs(mean - x0.item()) * math.exp(-log_variance)
        )


@pytest.mark.parametrize(("dtype", "rel"), [(float64, 1e-9), (torch.float32, 1e-4)])
def test_log_prob_is_exact_in_the_far_tails(dtype, rel):
    """Hundreds of sigmas from the mean, where the mass rounds to 0, -log mass equals that from SciPy's log CDF."""
    sigma = 0.0074
    for pixel, mean in [(128, -0.9), (128, 0.9), (0, 1.0), (255, -1.0), (3, 0.0), (250, -3.0)]:
        x0 = torch.tensor([[pixel]], dtype=dtype) / 127.5 - 1
        p = Gaussian(torch.tensor([[mean]], dtype=dtype), torch.tensor([[2 * math.log(sigma)]], dtype=dtype))
        low = -np.inf if pixel == 0 else ((pixel - 0.5) / 127.5 - 1 - mean) / sigma
        high = np.inf if pixel == 255 else ((pixel + 0.5) / 127.5 - 1 - mean) / sigma
        if low > 0:
            low, high = -high, -low
        a, b = special.log_ndtr(low), special.log_ndtr(high)
        expected = b + np.log1p(-np.exp(a - b))
        assert expected < -1000
        assert likelihood.decoder_log_prob(x0, p).item() == pytest.approx(expected, rel=rel)


@pytest.mark.parametrize("dtype", [float64, torch.float32])
def test_log_prob_and_its_gradients_are_finite_everywhere(dtype):
    """They are finite for all 256 pixel values and for extreme means and sigmas."""
    x0 = pixels.to_signal(torch.arange(256, dtype=torch.uint8)).to(dtype)
    for mean in (-10.0, -1.0, 0.0, 0.5, 1.0, 10.0):
        for log_variance in (-60.0, -30.0, -20.0, -9.8, -2.0, 0.0, 10.0, 40.0):
            m, v = (torch.full((1, 256), value, dtype=dtype, requires_grad=True) for value in (mean, log_variance))
            log_prob = likelihood.decoder_log_prob(x0[None], Gaussian(m, v))
            log_prob.sum().backward()
            assert log_prob.isfinite().all()
            assert m.grad.isfinite().all()
            assert v.grad.isfinite().all()


def test_float32_gradients_are_right_in_the_tails():
    """Up to 10,000 sigmas, d log mass / d mean is that of float64. torch's log_ndtr is 4% off at 1000 sigmas."""
    gradients = []
    for dtype in (torch.float32, float64):
        x0 = torch.tensor([[0, 64, 128, 255]], dtype=dtype) / 127.5 - 1
        mean = torch.tensor([[0.3, 0.3, 0.3, 0.3]], dtype=dtype, requires_grad=True)
        for log_variance in (-18.0, -13.8, -9.8, -4.0):
            p = Gaussian(mean, torch.full((1, 4), log_variance, dtype=dtype))
            gradients.append(torch.autograd.grad(likelihood.decoder_log_prob(x0, p).sum(), mean)[0].double())
    single, double = torch.cat(gradients[:4]), torch.cat(gradients[4:])
    torch.testing.assert_close(single, double, rtol=1e-3, atol=0)
    z = torch.tensor(-1000.0, requires_grad=True)
    torch.special.log_ndtr(z).backward()
    assert abs(z.grad.item() / 1000.001 - 1) > 1e-3  # if this fails, likelihood._log_cdf is no longer needed


def test_gradient_of_log_prob():
    """The derivatives by mean and log-variance equal central differences, also for the two open bins."""
    x0 = pixels.to_signal(torch.tensor([[0, 1, 128, 254, 255]], dtype=torch.uint8)).double()
    mean = torch.tensor([[-1.02, -0.9, 0.1, 1.0, 0.8]], dtype=float64, requires_grad=True)
    log_variance = torch.tensor([[-9.0, -5.0, -3.0, -7.0, -4.0]], dtype=float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda m, v: likelihood.decoder_log_prob(x0, Gaussian(m, v)), (mean, log_variance), eps=1e-6, rtol=1e-5
    )


def test_open_ends():
    """The mass beyond -1 and 1 belongs to pixels 0 and 255: a mean of -5 gives 0 for sure, a mean of 5 gives 255."""
    p = Gaussian(torch.tensor([[-5.0, 5.0]], dtype=float64), torch.full((1, 2), -4.0, dtype=float64))
    mass = likelihood.decoder_mass(p)[0]
    assert mass[0, 0] == pytest.approx(1)
    assert mass[1, 255] == pytest.approx(1)


# (d) The effect of the official code's approximation.


def test_effect_of_the_official_tanh_cdf():
    """The official code's tanh approximation of the normal CDF changes a bin's log mass a little.

    At its variance for t = 1, beta~_2, a bin is 1.06 sigma wide. The change is up to 0.005 nats within 2 sigma of the
    mean and up to 0.25 within 4. Over pixels drawn from p_theta it costs 3.1e-5 bits/dim, of 3.75.
    """
    sigma = math.sqrt(beta_tilde(schedule.linear())[2].item())

    def tanh_cdf(x):
        return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    centre = np.arange(-6, 7) * 2 / 255  # bins around the mean, without the end pixels
    largest, cost = {2: 0.0, 4: 0.0}, []
    for offset in np.linspace(-1 / 255, 1 / 255, 21):  # the place of the mean in its bin
        high, low = (centre + 1 / 255 - offset) / sigma, (centre - 1 / 255 - offset) / sigma
        official = np.log(np.maximum(tanh_cdf(high) - tanh_cdf(low), 1e-12))
        p = Gaussian(torch.full((13, 1), offset).double(), torch.full((13, 1), 2 * math.log(sigma)).double())
        ours = likelihood.decoder_log_prob(torch.from_numpy(centre)[:, None], p).numpy()
        for near in largest:
            largest[near] = max(largest[near], np.abs(ours - official)[np.abs(centre - offset) < near * sigma].max())
        cost.append((np.exp(ours) * (ours - official)).sum() / math.log(2))
    assert 0.003 < largest[2] < 0.005
    assert 0.2 < largest[4] < 0.26
    assert np.mean(cost) == pytest.approx(3.1e-5, rel=0.02)


def test_the_mass_has_no_floor():
    """A pixel 2 away at sigma = 0.0074 costs about 2^2 / (2 sigma^2) = 36,000 nats. The official floor gives 27.6."""
    p = Gaussian(torch.full((1, 1), -1.0, dtype=float64), torch.full((1, 1), 2 * math.log(0.0074), dtype=float64))
    nats = -likelihood.decoder_log_prob(torch.ones(1, 1, dtype=float64), p).item()
    assert nats == pytest.approx((2 - 1 / 255) ** 2 / (2 * 0.0074**2), rel=1e-3)


def test_noise_of_each_level_is_used_at_that_level():
    """At every t, from T down, the network sees x_t = q_sample(x_0, t, noise(t))."""
    seen = {}
    s = schedule.linear(10, 1e-3, 0.8)
    noise, x0 = per_image([9], (1, 2, 2)), torch.full((1, 1, 2, 2), 0.2)

    def spy(x, timestep, y):
        seen[int(timestep) + 1] = x
        return torch.zeros_like(x)

    likelihood.vlb(Denoiser(spy, s, "x0"), x0, noise)
    assert list(seen) == list(range(10, 0, -1))
    for t, x in seen.items():
        torch.testing.assert_close(x, q_sample(s, x0.double(), torch.tensor([t]), noise(t).double()))

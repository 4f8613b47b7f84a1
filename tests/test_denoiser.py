"""What the network's output means: predictions, variances, clipping, against exact denoisers and the official code."""

import pytest
import torch
from exact import PREDICTIONS, GaussianData, correlated, isotropic, network, with_variance
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm import gaussian, schedule
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError

quick = settings(max_examples=40, derandomize=True)
PAPER = schedule.linear()
SHORT = schedule.linear(50, 2e-3, 0.4)


def draws(data, s, n=2):
    """x_0, eps, t and x_t for n images at every level."""
    g = torch.Generator().manual_seed(0)
    t = torch.arange(1, s.T + 1).repeat(n)
    x0 = data.sample(len(t), g)
    eps = torch.randn(x0.shape, generator=g, dtype=x0.dtype)
    return x0, eps, t, gaussian.q_sample(s, x0, t, eps)


@pytest.mark.parametrize("s", [PAPER, SHORT, schedule.cosine(100), PAPER.respace([1, 7, 400, 1000])], ids=lambda s: s.T)
def test_four_predictions_of_one_exact_denoiser_agree(s):
    """From eps (Eq. 11), x0, mu (Eq. 7) and v, it gives E[x_0|x_t], its noise, and the mean of q(x_{t-1}|x_t)."""
    data = correlated()
    _, _, t, xt = draws(data, s)
    x0 = data.denoise(xt, s.alpha_bar[t].view(-1, 1, 1, 1))
    reverse = [data.reverse(s, level) for level in t.tolist()]
    mean = torch.stack([A @ x.flatten() + b for (A, b, _), x in zip(reverse, xt, strict=True)]).view_as(xt)
    for predict in PREDICTIONS:
        estimate = Denoiser(network(data, s, predict), s, predict, clip=False)(xt, t)
        torch.testing.assert_close(estimate.x0, x0, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(estimate.mean, mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(gaussian.q_sample(s, x0, t, estimate.eps), xt, rtol=1e-9, atol=1e-9)
    for predict in PREDICTIONS:  # negative control: the output is read as another prediction
        wrong = Denoiser(network(data, s, predict), s, "x0" if predict == "eps" else "eps", clip=False)(xt, t)
        assert (wrong.mean - mean).abs().max() > 1e-2


def test_v_prediction_is_the_preconditioning_of_edm():
    """D = c_skip x + c_out F(c_in x) with sigma_data 1 (Karras et al. 2022) is x0^ of v = -F at x_t = c_in x."""
    g = torch.Generator().manual_seed(0)
    x, F = torch.randn(2, 1000, 1, 2, 2, generator=g, dtype=torch.float64)
    t = torch.arange(1, 1001)
    sigma = ((1 - PAPER.alpha_bar[t]) / PAPER.alpha_bar[t]).sqrt().view(-1, 1, 1, 1)
    c_skip, c_out, c_in = 1 / (sigma**2 + 1), sigma / (sigma**2 + 1).sqrt(), 1 / (sigma**2 + 1).sqrt()
    estimate = Denoiser(lambda x, timestep, y: -F, PAPER, "v", clip=False)(c_in * x, t)
    torch.testing.assert_close(estimate.x0, c_skip * x + c_out * F, rtol=1e-9, atol=1e-9)


def test_eps_form_of_the_mean_is_eq_11():
    """mu_theta = (x_t - beta_t / sqrt(1 - abar_t) eps_theta) / sqrt(alpha_t), at every t of the paper's schedule."""
    g = torch.Generator().manual_seed(0)
    xt, eps = torch.randn(2, 1000, 1, 2, 2, generator=g, dtype=torch.float64)
    t = torch.arange(1, 1001)
    estimate = Denoiser(lambda x, timestep, y: eps, PAPER, clip=False)(xt, t)
    beta, abar = (table[t].view(-1, 1, 1, 1) for table in (PAPER.beta, PAPER.alpha_bar))
    expected = (xt - beta / (1 - abar).sqrt() * eps) / (1 - beta).sqrt()
    torch.testing.assert_close(estimate.mean, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_target_is_what_output_should_be(predict):
    """A network that outputs `target` recovers x_0 and eps, and its mean is that of q(x_{t-1} | x_t, x_0)."""
    x0, eps, t, xt = draws(correlated(), PAPER)
    target = Denoiser(None, PAPER, predict).target(x0, xt, t, eps)
    estimate = Denoiser(lambda x, timestep, y: target, PAPER, predict, clip=False)(xt, t)
    torch.testing.assert_close(estimate.x0, x0, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(estimate.eps, eps, rtol=1e-8, atol=1e-8)
    mean = gaussian.q_posterior(PAPER, x0, xt, t).mean
    torch.testing.assert_close(estimate.mean, mean, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_respaced_denoiser_is_exact_on_its_own_levels(predict):
    """On fewer levels the same network gives the true mean of q(x_s | x_t) over the longer step."""
    data, levels = correlated(), [3, 20, 50]
    short = SHORT.respace(levels)
    _, _, t, xt = draws(data, short)
    denoiser = Denoiser(network(data, SHORT, predict), SHORT, predict, clip=False).respace(levels)
    for i, level in enumerate(t.tolist()):
        A, b, _ = data.reverse(short, level)
        mean = denoiser(xt[i : i + 1], t[i : i + 1]).mean.flatten()
        torch.testing.assert_close(mean, A @ xt[i].flatten() + b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("levels", [[1, 3, 20, 50], [7, 50]])
def test_a_table_of_variances_is_respaced_to_the_exact_one(levels):
    """If all dimensions have one variance, the true variances are a table, and that of longer steps follows from it."""
    data, short = isotropic(), SHORT.respace(levels)
    table = data.variances(SHORT)
    respaced = Denoiser(network(data, SHORT, "eps"), SHORT, "eps", table, clip=False).respace(levels).variance
    torch.testing.assert_close(respaced[1:], data.variances(short)[1:], rtol=1e-9, atol=0)
    assert (respaced[1:] - table[torch.tensor(levels)]).abs().max() > 1e-3  # the variances of longer steps differ


@pytest.mark.parametrize(("predict", "variance"), [("mu", "fixed_large"), ("eps", "learned")], ids=["mu", "learned"])
def test_mu_and_learned_variance_cannot_be_respaced(predict, variance):
    """Both describe p(x_{t-1} | x_t), so they would be silently wrong over longer steps."""
    with pytest.raises(InputError, match="respace"):
        Denoiser(None, SHORT, predict, variance).respace([10, 50])


def zero(x, timestep, y=None):
    return torch.zeros_like(x)


def variance_of(variance, t, raw=None):
    """sigma_t^2, [1, 1, 1, 1] or [1, 1, 2, 2], at level t of the paper's schedule. `raw` is the network's output."""
    x = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    net = zero if raw is None else with_variance(zero, lambda x, timestep: torch.full_like(x, raw))
    return Denoiser(net, PAPER, variance=variance)(x, torch.tensor([t])).log_variance.exp()


def test_fixed_variances():
    """fixed_large is beta_t and fixed_small is beta~_t; at t = 1 both are beta~_2, as in the official code."""
    abar, beta = PAPER.alpha_bar, PAPER.beta
    for t in (2, 3, 500, 1000):
        tilde = (1 - abar[t - 1]) / (1 - abar[t]) * beta[t]
        assert variance_of("fixed_large", t).item() == pytest.approx(beta[t].item(), rel=1e-9)
        assert variance_of("fixed_small", t).item() == pytest.approx(tilde.item(), rel=1e-9)
    for variance in ("fixed_large", "fixed_small"):
        assert variance_of(variance, 1).item() == pytest.approx(5.45319e-05, rel=1e-6)
    assert variance_of("fixed_large", 2).item() == pytest.approx(1.199199e-04, rel=1e-6)
    assert variance_of("fixed_small", 2).item() == pytest.approx(5.45319e-05, rel=1e-6)


@pytest.mark.parametrize("t", [1, 2, 3, 500, 1000])
def test_learned_variances(t):
    """learned: the raw channels are log sigma^2. learned_range: linear from log beta~_t at -1 to log beta_t at 1."""
    assert variance_of("learned", t, raw=-3.0).shape == (1, 1, 2, 2)
    torch.testing.assert_close(
        variance_of("learned", t, raw=-3.0).log(), torch.full((1, 1, 2, 2), -3.0, dtype=torch.float64)
    )
    beta, tilde = PAPER.beta[t].item(), gaussian.beta_tilde(PAPER)[t].item()
    for raw, expected in [(-1.0, tilde), (1.0, beta), (0.0, (beta * tilde) ** 0.5), (3.0, beta**2 / tilde)]:
        assert variance_of("learned_range", t, raw)[0, 0, 0, 0].item() == pytest.approx(expected, rel=1e-9)


def test_variance_table():
    """sigma_t^2 is table[t]. With the exact table of isotropic data, p_theta is q(x_{t-1} | x_t)."""
    data = isotropic()
    table = data.variances(SHORT)
    denoiser = Denoiser(network(data, SHORT, "eps"), SHORT, variance=table, clip=False)
    _, _, t, xt = draws(data, SHORT, n=1)
    p = denoiser(xt, t).p
    for level in (1, 2, 25, 50):
        A, b, P = data.reverse(SHORT, level)
        i = level - 1
        torch.testing.assert_close(p.mean[i].flatten(), A @ xt[i].flatten() + b, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(p.log_variance[i].exp() * torch.eye(2), P.view(1, 2, 2), rtol=1e-9, atol=0)


def test_images_of_a_batch_may_have_different_levels():
    """A batch with one image at every level gives what each image gives alone."""
    data = correlated()
    _, _, t, xt = draws(data, SHORT, n=1)
    raw = with_variance(network(data, SHORT, "v"), lambda x, timestep: x.sin())
    denoiser = Denoiser(raw, SHORT, "v", "learned_range")
    batch = denoiser(xt, t)
    for i in range(len(t)):
        single = denoiser(xt[i : i + 1], t[i : i + 1])
        for name in ("x0", "eps", "mean", "log_variance"):
            torch.testing.assert_close(getattr(batch, name)[i : i + 1], getattr(single, name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_mean_goes_through_clipped_x0(predict):
    """For eps, x0 and v the mean is mu~(x_t, clip(x0^)), as in the official code."""
    data = GaussianData(correlated().mean, 9 * correlated().covariance)  # wide: most x0^ lie outside [-1, 1]
    _, _, t, xt = draws(data, PAPER)
    free = Denoiser(network(data, PAPER, predict), PAPER, predict, clip=False)
    clipped = Denoiser(free.network, PAPER, predict)
    assert clipped.unclipped()(xt, t).mean.equal(free(xt, t).mean)
    a, b = clipped(xt, t), free(xt, t)
    assert torch.equal(a.x0, b.x0.clamp(-1, 1))
    expected = gaussian.q_posterior(PAPER, b.x0.clamp(-1, 1), xt, t).mean
    torch.testing.assert_close(a.mean, expected, rtol=1e-12, atol=1e-12)
    outside = (b.x0.abs() > 1.01).flatten(1).any(1) & (t < 1000)
    assert outside.float().mean() > 0.2
    assert (a.mean - b.mean).abs().flatten(1).amax(1)[outside].min() > 0  # clipping did change the mean


def test_mu_prediction_clips_only_the_reported_x0():
    """For mu prediction the mean is the network's output, which is not clipped."""
    data = GaussianData(correlated().mean, 9 * correlated().covariance)
    _, _, t, xt = draws(data, PAPER)
    denoiser = Denoiser(network(data, PAPER, "mu"), PAPER, "mu")
    a, b = denoiser(xt, t), denoiser.unclipped()(xt, t)
    assert torch.equal(a.mean, b.mean)
    assert torch.equal(a.x0, b.x0.clamp(-1, 1))
    assert (b.x0.abs() > 1.01).float().mean() > 0.1


@quick
@given(st.sampled_from(PREDICTIONS), st.integers(1, 1000), st.floats(-50, 50), st.floats(-5, 5), st.booleans())
def test_eps_belongs_to_x0(predict, t, output, x, clip):
    """x_t = sqrt(abar_t) x0^ + sqrt(1 - abar_t) eps^, clipped or not. DDIM needs it."""
    xt = torch.full((1, 1, 1, 1), x, dtype=torch.float64)
    estimate = Denoiser(lambda x, timestep, y: torch.full_like(x, output), PAPER, predict, clip=clip)(
        xt, torch.tensor([t])
    )
    again = gaussian.q_sample(PAPER, estimate.x0, torch.tensor([t]), estimate.eps)
    assert again.item() == pytest.approx(x, abs=1e-7)
    assert not clip or estimate.x0.abs().item() <= 1


def test_the_network_gets_timesteps_and_labels():
    """The timesteps are 0..T-1 at levels 1..T, and after respacing those of the original levels. y is not changed."""
    calls = []

    def spy(x, timestep, y):
        calls.append((timestep.tolist(), y))
        return zero(x, timestep)

    x, y = torch.zeros(2, 1, 1, 1), torch.tensor([7, 8])
    Denoiser(spy, PAPER)(x, torch.tensor([1, 1000]), y)
    Denoiser(spy, PAPER).respace([10, 500, 1000])(x, torch.tensor([1, 3]))
    assert calls[0][0] == [0, 999]
    assert calls[0][1] is y
    assert calls[1] == ([9, 999], None)


def test_the_network_may_compute_in_any_precision():
    """Its output is converted to x_t's dtype before it is multiplied by coefficients."""
    x = torch.linspace(-1, 1, 4, dtype=torch.float64).view(1, 1, 2, 2)
    t = torch.tensor([500])
    low = Denoiser(lambda x, timestep, y: x.bfloat16(), PAPER)(x, t)
    same = Denoiser(lambda x, timestep, y: x.bfloat16().double(), PAPER)(x, t)
    assert low.mean.dtype == torch.float64
    assert torch.equal(low.mean, same.mean)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"predict": "noise"}, ["predict 'noise'", "eps", "x0", "mu", "v"]),
        ({"variance": "large"}, ["variance 'large'", "fixed_large", "fixed_small", "learned", "learned_range"]),
        ({"variance": torch.ones(5)}, ["[5]", "[1001]"]),
        ({"schedule": schedule.jsd(), "predict": "eps"}, ["predict eps", "x0", "mu", "v"]),
    ],
    ids=["predict", "variance", "table", "jsd"],
)
def test_errors_name_the_wrong_value_and_the_right_ones(settings, words):
    with pytest.raises(InputError) as error:
        Denoiser(None, **{"schedule": PAPER, **settings})
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("predict", ["x0", "mu", "v"])
def test_jsd_works_to_its_last_level(predict):
    """At abar_T = 0 the other predictions still give a finite x_0."""
    s, data = schedule.jsd(50), correlated()
    _, _, t, xt = draws(data, s)
    estimate = Denoiser(network(data, s, predict), s, predict, clip=False)(xt, t)
    expected = data.denoise(xt, s.alpha_bar[t].view(-1, 1, 1, 1))
    torch.testing.assert_close(estimate.x0, expected, rtol=1e-9, atol=1e-9)
    assert estimate.mean.isfinite().all()

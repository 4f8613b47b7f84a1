"""Editing: closed forms for Gaussian data with exact denoisers; what is known stays; one seed one image."""

import weakref
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMInverseScheduler
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
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm import editing, samplers, schedule
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError
from ddpm.gaussian import beta_tilde
from ddpm.noise import per_image
from ddpm.pixels import EIGHT_BIT
from ddpm.run import edit

SHORT = schedule.linear(50, 2e-3, 0.4)
TINY = schedule.linear(12, 1e-2, 0.6)
N = 10_000
DATA = correlated()
SIGMA = DATA.covariance.diagonal().sqrt().view(1, 2, 2)
A_END, B_END = DATA.mean - SIGMA, DATA.mean + 2 * SIGMA  # two images


def exact(data, s, predict="eps", variance="fixed_small", **settings):
    net = network(data, s, predict)
    if variance == "learned":  # the same variance, said by the network
        table = beta_tilde(s).log()
        net = with_variance(net, lambda x, timestep: table[timestep + 1].view(-1, 1, 1, 1).expand_as(x))
    return Denoiser(net, s, predict, variance, clip=False, **settings)


def decoded(data, s, x, t, variance):
    """Mean and covariance of x_0 where Algorithm 2 runs down from x_t = x with `variance` [T+1], z = 0 at t = 1."""
    mean, covariance = x.flatten(), torch.zeros(data.D, data.D).double()
    for i in range(t, 0, -1):
        A, b, _ = data.reverse(s, i)
        mean, covariance = A @ mean + b, A @ covariance @ A.T + (i > 1) * variance[i] * torch.eye(data.D).double()
    return mean, covariance


# Figures 8 and 9: interpolation.

EPS = normal(2, (1, 2, 2), seed=7)(0)


def between(denoiser, weights, t, noise, **settings):
    w = torch.tensor(weights, dtype=torch.float64)
    return last(editing.interpolate(denoiser, A_END, B_END, w, t, *EPS, noise, **settings)).x


def mixed(s, w, t):
    """xbar_t, from the formula."""
    abar = s.alpha_bar[t]
    xa, xb = (abar.sqrt() * x + (1 - abar).sqrt() * e for x, e in zip((A_END, B_END), EPS, strict=True))
    return (1 - w) * xa + w * xb


@pytest.mark.parametrize("variance", ["fixed_small", "learned", "table"])
@pytest.mark.parametrize("predict", PREDICTIONS)
def test_interpolation_has_the_exact_law(predict, variance):
    """From xbar_t the chain is linear-Gaussian: mean and covariance of x_0; another weight has another law."""
    table = beta_tilde(SHORT)
    denoiser = exact(DATA, SHORT, predict, table if variance == "table" else variance)
    x = between(denoiser, [0.3] * N, 20, normal(N, (1, 2, 2)))
    assert z_score(x, *decoded(DATA, SHORT, mixed(SHORT, 0.3, 20), 20, table)) < 4.5
    assert z_score(x, *decoded(DATA, SHORT, mixed(SHORT, 0.1, 20), 20, table)) > 6  # negative controls
    assert z_score(x, *decoded(DATA, SHORT, mixed(SHORT, 0.3, 30), 30, table)) > 6


@pytest.mark.parametrize("steps", [None, 5])
def test_ends_are_decoded_as_they_are(steps):
    """Weights 0 and 1 are p(x_0 | x_t) of either end."""
    noise = normal(2, (1, 2, 2))
    denoiser = exact(DATA, SHORT)
    ends = torch.stack([mixed(SHORT, w, 20) for w in (0.0, 1.0)])
    alone = last(samplers.ancestral(denoiser, ends, noise, steps, start=20)).x
    torch.testing.assert_close(between(denoiser, [0.0, 1.0], 20, noise, steps=steps), alone, rtol=0, atol=1e-12)


@given(w=st.floats(-0.5, 1.5), t=st.integers(0, 50))
@settings(max_examples=15)
def test_with_one_seed_the_way_between_linear_decodings_is_straight(w, t):
    """Gaussian data is decoded by an affine map of x_t and noise; with the same noise x(w) = (1-w) x(0) + w x(1)."""
    draw = normal(1, (1, 2, 2), seed=3)
    x = between(exact(DATA, SHORT), [0, 1, w], t, lambda s: draw(s).expand(3, -1, -1, -1))
    torch.testing.assert_close(x[2], (1 - w) * x[0] + w * x[1], rtol=1e-9, atol=1e-9)


def test_at_level_0_pixels_are_mixed():
    def silent(*_):
        raise AssertionError("no network and no noise at t = 0")

    steps = list(
        editing.interpolate(Denoiser(silent, SHORT), A_END, B_END, torch.tensor([0, 0.25, 1]).double(), 0, *EPS, silent)
    )
    assert [step.t for step in steps] == [0]
    assert torch.equal(steps[0].x[::2], torch.stack([A_END, B_END]))
    torch.testing.assert_close(steps[0].x[1], 0.75 * A_END + 0.25 * B_END)


# Figure 7: images that share x_t.


@pytest.mark.parametrize("t", [3, 20, 50])
def test_images_that_share_x_t_have_the_exact_posterior(t):
    """With the true variances p(x_0 | x_t) is Bayes': N(E[x_0|x_t], Cov[x_0|x_t]); another x_t has another."""
    data = isotropic()
    table = data.variances(SHORT)
    xt = torch.tensor([0.7, -0.2]).double().view(2, 1, 1)
    abar = SHORT.alpha_bar[t].view(1, 1, 1, 1)
    x = last(editing.share_latent(exact(data, SHORT, variance=table), xt, t, normal(N, (2, 1, 1)))).x
    x = x + table[1].sqrt() * normal(N, (2, 1, 1))(0)  # p(x_0 | x_1), where the sampler has z = 0
    covariance = data.x0_covariance(abar[0, 0, 0, 0])
    assert z_score(x, data.denoise(xt[None], abar).flatten(), covariance) < 4.5
    if t < 50:  # at T nothing is left of x_t
        assert z_score(x, data.denoise(xt[None] + 0.4, abar).flatten(), covariance) > 6
        assert z_score(x, *decoded(data, SHORT, xt, t, beta_tilde(SHORT))) > 6  # nor is it any variance's


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_images_that_share_x_t_have_the_chains_law(predict):
    xt = mixed(SHORT, 0.5, 20)
    x = last(editing.share_latent(exact(DATA, SHORT, predict), xt, 20, normal(N, (1, 2, 2)))).x
    assert z_score(x, *decoded(DATA, SHORT, xt, 20, beta_tilde(SHORT))) < 4.5


def test_images_that_share_x_t_share_nothing_else():
    """Given x_t, images of neighbouring seeds are independent: no correlation beyond 4.5 standard errors."""
    xt = mixed(TINY, 0.5, 8).float()
    x = last(editing.share_latent(exact(DATA, TINY), xt, 8, per_image(range(4000), (1, 2, 2)))).x.flatten(1).double()
    z = (x - x.mean(0)) / x.std(0)
    assert (z[0::2].T @ z[1::2]).abs().max() / 2000**0.5 < 4.5
    assert (z.T @ z - 4000 * torch.eye(4)).abs().max() / 4000**0.5 > 4.5  # the test's test: pixels are correlated


# Inpainting.

MASKS = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).view(4, 1, 2, 2)
KNOWN = DATA.mean + 2 * SIGMA * torch.tensor([[1.0, -1], [1, -1]])  # two sigma from the mean everywhere


def conditional(data, x0, mask):
    """Mean and covariance of p(x_masked | x_known)."""
    u, S, m = mask.flatten().bool(), data.covariance, data.mean.flatten()
    gain = S[u][:, ~u] @ torch.linalg.inv(S[~u][:, ~u])
    return m[u] + gain @ (x0.flatten() - m)[~u], S[u][:, u] - gain @ S[~u][:, u]


def painted(data, s, x0, mask, variance, jump, resample):
    """Mean and covariance of RePaint's result: Algorithm 1 with jumps, on moments."""
    u, eye = mask.flatten().bool(), torch.eye(data.D).double()
    mean, covariance = torch.zeros(data.D).double(), eye
    for i, t in pairwise(editing.repaint_path(s.T, jump, resample)):
        abar_i, abar = s.alpha_bar[i], s.alpha_bar[t]
        if t > i:
            alpha = abar / abar_i
            mean, covariance = alpha.sqrt() * mean, alpha * covariance + (1 - alpha) * eye
            continue
        A, b, _ = data.reverse(s, i)
        mean, covariance = A @ mean + b, A @ covariance @ A.T + (t > 0) * variance[i] * eye
        mean = torch.where(u, mean, abar.sqrt() * x0.flatten())
        covariance = torch.where(u[:, None] & u, covariance, (1 - abar) * eye)
    return mean, covariance


@pytest.mark.parametrize(("jump", "resample", "steps"), [(1, 1, None), (1, 3, None), (4, 3, None), (2, 3, 6)])
@pytest.mark.parametrize("predict", PREDICTIONS)
def test_inpainting_has_the_exact_law_of_repaint(predict, jump, resample, steps):
    """On all levels or fewer, mean and covariance of what is made are those of the algorithm; what is known is x_0."""
    if predict == "mu" and steps:
        pytest.skip("mu has its own levels only")
    s = TINY if steps is None else TINY.respace(TINY.levels(steps))
    mask, u = MASKS[0], MASKS[0].flatten().bool()
    x0 = KNOWN.expand(N, 1, 2, 2)
    path = editing.inpaint(exact(DATA, TINY, predict), x0, mask, normal(N, (1, 2, 2)), steps, jump, resample)
    x = last(path).x.flatten(1)
    assert torch.equal(x[:, ~u], x0.flatten(1)[:, ~u])

    def z(*settings):
        mean, covariance = painted(DATA, s, KNOWN, mask, beta_tilde(s), *settings)
        return z_score(x[:, u], mean[u], covariance[u][:, u])

    assert z(jump, resample) < 4.5
    assert z(*((1, 1) if resample > 1 else (1, 3))) > 6  # negative control: the law with and without resampling


@pytest.mark.parametrize("variance", ["learned", "table"])
def test_inpainting_takes_every_variance(variance):
    """Learned and table variances that say beta~_t give what fixed_small gives."""
    noise, x0 = normal(3, (1, 2, 2)), KNOWN.expand(3, 1, 2, 2)
    of = [exact(DATA, TINY, variance=v) for v in ("fixed_small", beta_tilde(TINY) if variance == "table" else variance)]
    one, other = (last(editing.inpaint(d, x0, MASKS[1], noise, jump=2, resample=2)).x for d in of)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def bias(levels, jump, resample):
    """For each of MASKS the distance of the mean result from the conditional mean, in conditional sigmas.

    Exact, not sampled: the denoiser is linear, so without noise the chain's path is its mean.
    """
    s = schedule.linear(levels, 0.1 / levels, 20 / levels)  # the same noise at the end of however many levels
    silence = torch.zeros(4, 1, 2, 2).double()
    x0 = KNOWN.expand(4, 1, 2, 2)
    x = last(editing.inpaint(exact(DATA, s), x0, MASKS, lambda k: silence, None, jump, resample)).x
    away = []
    for made, mask in zip(x, MASKS, strict=True):
        mean, covariance = conditional(DATA, KNOWN, mask)
        away.append(((made[mask.bool()] - mean) / covariance.diagonal().sqrt()).abs().max().item())
    return torch.tensor(away)


def test_resampling_brings_the_mean_to_the_conditional_mean():
    """For four masks, known pixels two sigma from the mean, at 50 levels.

    Measured in conditional sigmas: without resampling 0.92 to 2.9, 5 times 0.32 to 1.0, 20 times 0.14 to 0.43. The
    rest is what p_theta, told x_t but not x_0 of the known part, cannot know, and falls with the number of levels: 20
    times is 0.35 to 1.0 at 25 levels, 0.08 to 0.27 at 100.
    """
    once, five, twenty = (bias(50, 1, resample) for resample in (1, 5, 20))
    bound = torch.tensor([0.16, 0.26, 0.24, 0.48])
    assert (twenty < bound).all()
    assert (once > 3 * bound).all()  # negative control
    assert (once > 2 * five).all()
    assert (five > 1.8 * twenty).all()
    assert (bias(25, 1, 20) > 1.5 * twenty).all()


def test_the_known_half_picks_the_image():
    """Two images, the known half of one of them: its other half is made 99% of the time, 78% without resampling."""
    half = torch.tensor([0.2, 0.3]).double().expand(1, 2, 2)  # known left, made right
    data = FiniteData(torch.stack([half, -half]))
    x0, noise = half.expand(500, 1, 2, 2), normal(500, (1, 2, 2))

    def right(resample):
        x = last(editing.inpaint(exact(data, SHORT), x0, torch.tensor([0, 1]), noise, None, 1, resample)).x
        away = (x[:, None] - data.images)[..., 1].flatten(2).abs().amax(2)  # [500, 2], of the made half
        assert away.amin(1).max() < 1e-3  # one of the two, not a mixture
        return (away[:, 0] < 1e-3).double().mean()

    assert right(10) > 0.97
    assert right(1) < 0.85  # negative control


def test_masks_of_all_and_nothing():
    """All masked, once: Algorithm 2 with the same noise, bit for bit. Nothing masked: x_0 itself."""
    noise, x0 = normal(3, (1, 2, 2)), KNOWN.expand(3, 1, 2, 2)
    denoiser = exact(DATA, TINY)
    free = editing.inpaint(denoiser, x0, torch.ones(1), noise, steps=6, resample=1)
    for ours, theirs in zip(free, samplers.ancestral(denoiser, noise(12), noise, steps=6), strict=True):
        assert ours.t == theirs.t
        assert torch.equal(ours.x, theirs.x)
    assert torch.equal(last(editing.inpaint(denoiser, x0, torch.zeros(1), noise, jump=2)).x, x0)


def test_what_is_masked_is_not_looked_at():
    noise = normal(3, (1, 2, 2))
    x0 = KNOWN.expand(3, 1, 2, 2)
    hidden = torch.where(MASKS[0].bool(), torch.nan, x0)
    one, other = (last(editing.inpaint(exact(DATA, TINY), x, MASKS[0].bool(), noise, jump=2)).x for x in (x0, hidden))
    assert torch.equal(one, other)


# The path, the draws, seeds.


def test_the_path_is_that_of_the_paper():
    """Jump 1 is Algorithm 1, written out; 250 levels, 10 and 10, are the paper's setting: 2,410 network calls."""
    algorithm_1 = [5]
    for t in range(5, 0, -1):
        for u in range(1, 4):
            algorithm_1.append(t - 1)
            if u == 3 or t == 1:
                break
            algorithm_1.append(t)
    assert editing.repaint_path(5, jump=1, resample=3) == algorithm_1
    assert editing.repaint_path(4, resample=1) == [4, 3, 2, 1, 0]
    path = editing.repaint_path(250)
    assert sum(t < s for s, t in pairwise(path)) == 250 + 24 * 9 * 10


@given(n=st.integers(2, 40), jump=st.integers(1, 39), resample=st.integers(1, 5), data=st.data())
@settings(max_examples=40)
def test_the_path_and_its_draws(n, jump, resample, data):
    """Steps are down one or up `jump` within n..0, 0 only at the end; of all the draws no two coincide."""
    jump = min(jump, n - 1)
    path = editing.repaint_path(n, jump, resample)
    assert path[0] == n
    assert [i for i, t in enumerate(path) if t == 0] == [len(path) - 1]
    assert max(path) == n
    assert {t - s for s, t in pairwise(path)} <= {-1, jump}
    assert sum(t > s for s, t in pairwise(path)) == (resample - 1) * len(range(1, n - jump + 1, jump))
    T = data.draw(st.integers(n, 60))
    s, keys = schedule.linear(T, 1e-3, 0.1), []

    def noise(k):
        keys.append(k)
        return torch.zeros(1, 1, 1, 1)

    denoiser = Denoiser(lambda x, timestep, y: torch.zeros_like(x), s, "x0")
    steps = list(editing.inpaint(denoiser, torch.zeros(1, 1, 1, 1), torch.ones(1), noise, n, jump, resample))
    assert len(steps) == sum(t < s for s, t in pairwise(path))
    assert len(keys) == len(set(keys))
    assert min(keys) > 0
    levels = [0, *s.levels(n)]
    assert [step.t for step in steps] == [levels[t] for s, t in pairwise(path) if t < s]


@pytest.mark.parametrize("what", ["interpolate", "shared", "inpaint"])
def test_an_image_depends_only_on_its_own_seed(what):
    """Five seeds at once, in batches of 2, and in another order: the same five images."""
    denoiser = Denoiser(randomised_unet().double(), SHORT)
    seeds = torch.tensor([11, 7, 3, 1000, 0])
    pictures = normal(5, (1, 8, 8))(0).clamp(-1, 1)
    masks = (normal(5, (1, 8, 8))(1) > 0).double()
    weights = torch.linspace(0, 1, 5).double()

    def images(rows):
        draws = per_image(seeds[rows].tolist(), (1, 8, 8))
        noise = lambda k: draws(k).double()  # noqa: E731
        if what == "interpolate":
            steps = editing.interpolate(denoiser, *pictures[:2], weights[rows], 25, *pictures[2:4], noise, steps=5)
        elif what == "shared":
            steps = editing.share_latent(denoiser, pictures[0], 25, noise, steps=5)
        else:
            steps = editing.inpaint(denoiser, pictures[rows], masks[rows], noise, 6, jump=2, resample=2)
        return last(steps).x

    whole = images(torch.arange(5))
    parts = torch.cat([images(torch.arange(i, min(i + 2, 5))) for i in (0, 2, 4)])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-9)
    torch.testing.assert_close(images(torch.arange(4, -1, -1)).flip(0), whole, rtol=0, atol=1e-9)
    assert min((whole[i] - whole[j]).abs().max() for i in range(5) for j in range(i)) > 0.1


def test_inpainting_from_no_signal_is_finite():
    """abar_T = 0 exactly, passed again and again."""
    s = schedule.jsd(8)
    steps = editing.inpaint(exact(DATA, s, "x0"), KNOWN[None], MASKS[0], normal(1, (1, 2, 2)), None, 1, 3)
    assert all(step.x.isfinite().all() for step in steps)


def test_labels_reach_the_network():
    told = []

    def spy(x, timestep, y):
        told.append(y)
        return torch.zeros_like(x)

    denoiser, y, noise = Denoiser(spy, TINY, "x0"), torch.tensor([3, 4]), normal(2, (1, 2, 2))
    between(denoiser, [0.0, 1.0], 5, noise, y=y)
    last(editing.share_latent(denoiser, A_END, 5, noise, y=y))
    last(editing.inpaint(denoiser, KNOWN.expand(2, 1, 2, 2), MASKS[0], noise, resample=1, y=y))
    assert len(told) == 5 + 5 + 12
    assert all(y is seen for seen in told)


# What is refused.


@pytest.mark.parametrize("t", [-1, 51])
def test_a_level_that_is_none_is_refused(t):
    noise = normal(2, (1, 2, 2))
    with pytest.raises(InputError, match=f"t {t}: want a whole number, 0 to 50"):
        between(exact(DATA, SHORT), [0.0, 1.0], t, noise)
    with pytest.raises(InputError, match=f"t {t}: want a whole number, 0 to 50"):
        last(editing.share_latent(exact(DATA, SHORT), A_END, t, noise))


def test_wrong_shapes_are_refused():
    noise, denoiser = normal(2, (1, 2, 2)), exact(DATA, SHORT)
    with pytest.raises(InputError, match=r"\[1, 2, 2\], \[1, 2, 3\].* want \[C, H, W\] four times, and \[K\]"):
        last(editing.interpolate(denoiser, A_END, torch.zeros(1, 2, 3), torch.zeros(2), 5, *EPS, noise))
    with pytest.raises(InputError, match=r"xt of shape \[2, 1, 2, 2\]: want \[1, 2, 2\]"):
        last(editing.share_latent(denoiser, EPS, 5, noise))
    with pytest.raises(InputError, match=r"mask of shape \[3, 1, 2, 2\]: want one that broadcasts to \[2, 1, 2, 2\]"):
        last(editing.inpaint(denoiser, EPS, torch.ones(3, 1, 2, 2), noise))
    with pytest.raises(InputError, match="mask: want 1 where the image is to be sampled and 0"):
        last(editing.inpaint(denoiser, EPS, torch.full((2, 2), 0.5), noise))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"resample": 0}, "resample 0: want a whole number of at least 1"),
        ({"jump": 0}, "jump 0: want 1 to 49"),
        ({"jump": 50}, "jump 50: want 1 to 49, below the number of levels, or resample 1"),
        ({"steps": 10}, "jump 10: want 1 to 9"),
        ({"steps": 51}, "steps 51: want 1 to 50"),
    ],
)
def test_wrong_ways_to_inpaint_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        last(editing.inpaint(exact(DATA, SHORT), EPS, torch.ones(1), normal(2, (1, 2, 2)), **given))


# SDEdit, inversion, and the other samplers.


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_redrawing_has_the_exact_law(predict):
    """x_t ~ q(x_t | x_0), then the chain: its law from x_0; another level has another."""
    x = last(editing.redraw(exact(DATA, SHORT, predict), A_END.expand(N, -1, -1, -1), 20, normal(N, (1, 2, 2)))).x
    abar, table = SHORT.alpha_bar[20], beta_tilde(SHORT)
    mean, covariance = decoded(DATA, SHORT, abar.sqrt() * A_END, 20, table)
    slope = torch.stack([decoded(DATA, SHORT, e.view(1, 2, 2), 20, table)[0] for e in torch.eye(4).double()], 1)
    slope = slope - decoded(DATA, SHORT, torch.zeros(1, 2, 2).double(), 20, table)[0][:, None]
    law = mean, covariance + (1 - abar) * slope @ slope.T
    assert z_score(x, *law) < 4.5
    assert z_score(x, mean, covariance) > 6
    again = last(editing.redraw(exact(DATA, SHORT, predict), A_END[None], 0, None)).x
    assert torch.equal(again[0], A_END)


@pytest.mark.parametrize("predict", ["eps", "mu"])
def test_inversion_comes_back(predict):
    """More iterations, nearer, to rounding; one is not enough (which is what the others are for)."""
    s = schedule.cosine(200)
    denoiser, x0 = exact(DATA, s, predict), torch.stack([A_END, B_END])
    errors = []
    for iterations in (1, 4, 40):
        up = last(editing.invert(denoiser, x0, 20, 150, iterations))
        assert up.t == 150
        errors.append((last(samplers.ddim(denoiser, up.x, 20, start=150)).x - x0).abs().max().item())
    assert errors[0] > 1e-2
    assert errors[0] > 3 * errors[1]
    assert errors[2] < 1e-9
    levels = [1, 5, 20, 100]
    up = last(editing.invert(denoiser, x0, levels, 100, 150)).x
    torch.testing.assert_close(last(samplers.ddim(denoiser, up, levels, start=100)).x, x0, rtol=0, atol=1e-8)


def test_one_iteration_is_diffusers_inversion():
    s = schedule.linear(1000)
    said = lambda x, timestep, y=None: (2 * x + timestep.view(-1, 1, 1, 1) / 400).sin()  # noqa: E731
    theirs = DDIMInverseScheduler(trained_betas=s.beta[1:].tolist(), clip_sample=False, timestep_spacing="trailing")
    theirs.alphas_cumprod, theirs.initial_alpha_cumprod = s.alpha_bar[1:], torch.ones((), dtype=torch.float64)
    theirs.set_timesteps(20)
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for step, timestep in zip(editing.invert(Denoiser(said, s), x, 20), sorted(theirs.timesteps.tolist()), strict=True):
        x = theirs.step(said(x, torch.tensor([timestep] * 2)), timestep, x, return_dict=False)[0]
        torch.testing.assert_close(step.x, x, rtol=1e-6, atol=1e-6)
        assert step.t == timestep + 1


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_every_sampler_edits(name):
    """What is known stays; from one level the two that are deterministic agree with the exact path of the ODE."""
    denoiser, run = exact(DATA, SHORT), samplers.SAMPLERS[name].run
    noise = normal(3, (1, 2, 2))
    x0, mask = A_END.expand(3, -1, -1, -1), torch.tensor([0, 1])
    made = last(editing.inpaint(denoiser, x0, mask, noise, 10, 2, 2, run=run))
    assert torch.equal(made.x[..., 0], x0[..., 0])
    assert (made.x[0] - made.x[1]).abs().max() > 1e-3
    steps = list(editing.redraw(denoiser, x0, 30, noise, [5, 20, 30], run=run))
    assert [step.t for step in steps] == [20, 5, 0]
    w = torch.tensor([0.0, 0.5, 1.0]).double()
    between = last(editing.interpolate(denoiser, A_END, B_END, w, 20, *EPS, noise, 10, run=run)).x
    shared = last(editing.share_latent(denoiser, mixed(SHORT, 0.5, 20), 20, noise, 10, run=run)).x
    torch.testing.assert_close(shared[1], between[1])
    if not samplers.SAMPLERS[name].noisy:
        assert (shared - shared[:1]).abs().max() < 1e-12  # nothing but x_t decides


def test_inpainting_by_ddim_steps_is_ddim_where_all_is_made():
    denoiser, noise = exact(DATA, SHORT), normal(3, (1, 2, 2))
    run = samplers.SAMPLERS["ddim"].run
    free = editing.inpaint(denoiser, torch.zeros(3, 1, 2, 2).double(), torch.ones(1), noise, 10, resample=1, run=run)
    torch.testing.assert_close(last(free).x, last(samplers.ddim(denoiser, noise(50), 10)).x)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda d: editing.redraw(d, A_END[None], 51, normal(1, (1, 2, 2))), "t 51: want a whole number, 0 to 50"),
        (lambda d: editing.invert(d, A_END[None], 10, iterations=0), "iterations 0: want a whole number of at least 1"),
        (lambda d: editing.invert(d, A_END[None], 10, 60), "start 60: want a whole number, 1 to 50"),
    ],
)
def test_mistakes_in_redrawing(call, words):
    with pytest.raises(InputError, match=words):
        last(call(exact(DATA, SHORT)))


def test_an_edit_keeps_only_its_last_step_in_memory() -> None:
    """Without this the memory of `ddpm inpaint` would grow with each network call."""
    seen: list[weakref.ref[torch.Tensor]] = []

    def steps() -> Iterator[samplers.Step]:
        for level in range(9, -1, -1):
            assert sum(ref() is not None for ref in seen) <= 2
            x = torch.full((1, 1, 2, 2), level / 10)
            seen.append(weakref.ref(x))
            yield samplers.Step(level, x, x)

    assert edit._last(steps(), EIGHT_BIT, progress=False).unique().tolist() == [128]

"""Restoration: operators equal dense matrices; on correlated Gaussian data each method has the law of its equations.

Dense matrices and their SVDs are made with NumPy and SciPy. The recursions of moments use no code of the methods.
"""

from itertools import pairwise

import numpy as np
import pytest
import scipy.ndimage
import torch
from exact import (
    PREDICTIONS,
    GaussianData,
    correlated,
    last,
    network,
    normal,
    one_thread,  # noqa: F401
    randomised_unet,
    z_score,
)
from PIL import Image

from ddpm import editing, restoration, samplers, schedule
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError
from ddpm.noise import per_image
from ddpm.presets import PRESETS
from ddpm.restoration import Blur, Grey, Mask, SuperResolution
from ddpm.run.restore import blur

SHORT = schedule.linear(50, 2e-3, 0.4)
DATA = correlated()  # [1, 2, 2]
N = 10_000
HIDDEN = torch.tensor([[False, True], [True, False]])
_DISTANCE = (torch.arange(4)[:, None] - torch.arange(4)).abs()
NEAR = GaussianData(DATA.mean, 0.3 * 0.9 ** _DISTANCE.double())  # the correlation of neighbours is 0.9
COLOURS = GaussianData(torch.tensor([0.3, -0.2, 0.1]).double().view(3, 1, 1), DATA.covariance[:3, :3])

CASES = {  # operator, the data that it measures
    "superresolution": (SuperResolution(2), DATA),
    "mask": (Mask(HIDDEN), DATA),
    "grey": (Grey(), COLOURS),
    "blur": (Blur(0.8, (2, 2)), DATA),
}


def dense(operator, shape):
    """The matrix of a linear operator on images of this shape, [M, D]: its columns are the results for unit images."""
    D = int(np.prod(shape))
    return operator(torch.eye(D).double().view(D, *shape)).flatten(1).T


def exact(data, s, predict="v", **settings):
    return Denoiser(network(data, s, predict), s, predict, "fixed_small", clip=False, **settings)


# Operators.


def blocks(x, factor):
    """Means of blocks, in NumPy."""
    B, C, H, W = x.shape
    return x.reshape(B, C, H // factor, factor, W // factor, factor).mean((3, 5))


def masked(x):
    y = x.copy()
    y[:, :, :, :3] = 0
    return y


INDEPENDENT = {
    "superresolution": (SuperResolution(4), lambda x: blocks(x, 4)),
    "mask": (Mask(torch.arange(12) < 3), masked),
    "grey": (Grey(), lambda x: np.einsum("bchw,c->bhw", x, [0.299, 0.587, 0.114])[:, None]),
    "blur": (Blur(0.7, (8, 12)), lambda x: scipy.ndimage.gaussian_filter(x, (0, 0, 0.7, 0.7))),
    "a wide blur": (Blur(2.5, (8, 12), 1e-12), lambda x: scipy.ndimage.gaussian_filter(x, (0, 0, 2.5, 2.5))),
}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_operators_equal_independent_ones(name):
    operator, theirs = INDEPENDENT[name]
    x = normal(2, (3, 8, 12))(0)
    np.testing.assert_allclose(operator(x), theirs(x.numpy()), rtol=0, atol=1e-11)


def test_grey_is_pillows():
    """To rounding, so a picture that was converted to grey is a measurement."""
    colour = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    ours = Grey()(torch.from_numpy(colour).permute(2, 0, 1)[None].double())[0, 0]
    assert np.abs(ours.numpy() - np.asarray(Image.fromarray(colour).convert("L"))).max() < 0.51


@pytest.mark.parametrize("name", INDEPENDENT)
def test_the_inverse_is_moore_penroses(name):
    """Equal to NumPy's pseudo-inverse of the dense matrix; A A^+ A = A; and the singular values are NumPy's."""
    operator, _ = INDEPENDENT[name]
    operator = Blur(0.7, (8, 12), 1e-3) if name == "blur" else operator
    shape = (3, 4, 12) if name == "mask" else (3, 8, 12)
    A = dense(operator, shape)
    y = operator(normal(2, shape)(0))
    cut = 1e-9 if name == "a wide blur" else 1e-6
    if name == "a wide blur":
        operator = Blur(2.5, (8, 12), cut)
    theirs = torch.from_numpy(np.linalg.pinv(A.numpy(), rcond=cut))
    np.testing.assert_allclose(operator.inverse(y).flatten(1), y.flatten(1) @ theirs.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(operator(operator.inverse(y)), y, rtol=0, atol=1e-8)
    _, s, Vt = np.linalg.svd(A.numpy())  # f(s) = s^2 does not depend on the choice of V
    squared = operator.filtered(torch.eye(A.shape[1]).double().view(-1, *shape), torch.square).flatten(1)
    padded = np.zeros(A.shape[1])
    padded[: len(s)] = s**2
    np.testing.assert_allclose(squared, (Vt.T * padded) @ Vt, rtol=0, atol=1e-11)


def test_small_singular_values_of_a_blur_are_cut():
    """Rounding to 8 bits, 0.29 grey levels, stays small; without the cut it becomes hundreds of grey levels."""
    x = torch.linspace(-1, 1, 16).view(16, 1).expand(1, 1, 16, 16).double().contiguous() * 0.8

    def error(least):
        blur = Blur(1.5, (16, 16), least)
        rounded = (blur(x) * 127.5).round() / 127.5
        return (blur.inverse(rounded) - blur.inverse(blur(x))).abs().max() * 127.5

    assert error(0.1) < 20
    assert error(1e-6) > 500  # negative control


@pytest.mark.parametrize("noise", [0.0023, 0.04])
def test_the_cut_of_the_command_makes_the_error_smaller(noise):
    """The expected squared error of DDNM+ over images, noise and draws: smaller than with a cut at the noise itself."""
    distance = (torch.arange(16)[:, None] - torch.arange(16)).abs()
    data = GaussianData(torch.zeros(1, 1, 16).double(), 0.25 * 0.9 ** distance.double())

    def error(least):
        A, zero = dense(Blur(2.5, (1, 16), least), (1, 1, 16)), torch.zeros(16).double()
        mean, covariance = law_of_ddnm(data, SHORT, A, zero, noise, 50)  # the mean is mean + M y
        M = torch.stack([law_of_ddnm(data, SHORT, A, y, noise, 50)[0] - mean for y in torch.eye(16).double()], dim=1)
        away = M @ A - torch.eye(16).double()
        return (away @ data.covariance @ away.T + noise**2 * M @ M.T + covariance).trace().item()

    cut = blur("2.5", PRESETS["digits"], noise)
    assert isinstance(cut, Blur)
    assert error(cut.least) < 0.95 * error(noise)


# The laws of the methods on correlated Gaussian data.


def moment_steps(s, levels, jump=1, resample=1):
    """(t, s, c_0, c_x, sd) of each move down between levels, by precisions; (t, s, alpha) of each move up."""
    levels = [0, *s.levels(levels)]
    for i, j in pairwise(editing.repaint_path(len(levels) - 1, jump, resample)):
        abar, after = (s.alpha_bar[levels[k]].item() for k in (i, j))
        if j > i:
            yield levels[i], levels[j], after / abar
            continue
        alpha = abar / after
        if j == 0:
            yield levels[i], 0, 1.0, 0.0, 0.0
            continue
        variance = 1 / (1 / (1 - after) + alpha / (1 - alpha))
        c_0, c_x = variance * after**0.5 / (1 - after), variance * alpha**0.5 / (1 - alpha)
        yield levels[i], levels[j], c_0, c_x, variance**0.5


def gain(data, s, t):
    """E[x_0 | x_t] = G x_t + g."""
    abar, eye = s.alpha_bar[t], torch.eye(data.D).double()
    G = abar.sqrt() * data.covariance @ torch.linalg.inv(abar * data.covariance + (1 - abar) * eye)
    return G, (eye - abar.sqrt() * G) @ data.mean.flatten()


def law_of_ddnm(data, s, A, y, sigma, steps, jump=1, resample=1):
    """Mean [D] and covariance [D, D] of DDNM+'s x_0: Wang et al.'s Eq. 17, 18 and Appendix I with dense matrices."""
    U, values, Vt = torch.linalg.svd(A)
    values = torch.cat([values, torch.zeros(data.D - len(values)).double()])
    values[values < 1e-9] = 0
    inverse = Vt.T[:, : len(A)] @ torch.diag(torch.where(values > 0, 1 / values, 0)[: len(A)]) @ U.T
    eye = torch.eye(data.D).double()
    mean, covariance = torch.zeros(data.D).double(), eye
    for t, _, *move in moment_steps(s, steps, jump, resample):
        if len(move) == 1:
            mean, covariance = move[0] ** 0.5 * mean, move[0] * covariance + (1 - move[0]) * eye
            continue
        a, c_x, sd = move
        trust, variance = torch.ones(data.D).double(), torch.full((data.D,), sd**2).double()
        for i, value in enumerate(values.tolist()):
            if value > 0:
                trust[i] = 1 if sd >= a * sigma / value else value * sd / (a * sigma)
                variance[i] = sd**2 - a**2 * sigma**2 * trust[i] ** 2 / value**2
        correction = Vt.T @ torch.diag(trust) @ Vt @ inverse
        G, g = gain(data, s, t)
        keep = eye - correction @ A
        slope = a * keep @ G + c_x * eye
        mean = slope @ mean + a * (keep @ g + correction @ y)
        covariance = slope @ covariance @ slope.T + Vt.T @ torch.diag(variance.clamp(min=0)) @ Vt
    return mean, covariance


def score(x, mean, covariance):
    """`z_score` in the directions in which the law is not a point; infinite unless the others are that point."""
    values, vectors = torch.linalg.eigh(covariance)
    free = values > 1e-12
    x, mean = x.flatten(1) @ vectors, mean @ vectors
    if not torch.allclose(x[:, ~free], mean[~free], rtol=0, atol=1e-5):
        return torch.inf
    return z_score(x[:, free], mean[free], torch.diag(values[free]))


def measure(operator, data, sigma=0.0):
    """One measurement [1, ...] of an image that lies apart from the mean."""
    apart = torch.tensor([2.0, -1, 1, 0.5][: data.D]).double() * data.covariance.diagonal().sqrt()
    return operator((data.mean + apart.view_as(data.mean))[None]) + sigma


@pytest.mark.parametrize("sigma", [0.0, 0.15])
@pytest.mark.parametrize("name", CASES)
def test_ddnm_has_the_law_of_its_equations(name, sigma):
    operator, data = CASES[name]
    y, shape = measure(operator, data, sigma), data.mean.shape
    A = dense(operator, shape)
    path = restoration.ddnm(exact(data, SHORT), operator, y.expand(N, -1, -1, -1), normal(N, shape), sigma, steps=50)
    x, y = last(path).x, y.flatten()
    if sigma == 0:
        torch.testing.assert_close(operator(x).flatten(1), y.expand(N, -1))
    if sigma == 0 and name == "blur":
        return  # y tells everything
    assert score(x, *law_of_ddnm(data, SHORT, A, y, sigma, 50)) < 4.5
    assert score(x, *law_of_ddnm(data, SHORT, A, y + 0.05, sigma, 50)) > 6  # negative controls
    assert score(x, *law_of_ddnm(data, SHORT, A, y, sigma + 0.1, 50)) > 6


@pytest.mark.parametrize(("jump", "resample", "steps"), [(1, 3, 50), (2, 5, 25)])
def test_time_travel_has_the_law_of_its_equations(jump, resample, steps):
    operator = Mask(HIDDEN)
    A, y = dense(operator, (1, 2, 2)), measure(operator, NEAR)
    path = restoration.ddnm(
        exact(NEAR, SHORT), operator, y.expand(N, -1, -1, -1), normal(N, (1, 2, 2)), 0.02, steps, jump, resample
    )
    x = last(path).x
    assert score(x, *law_of_ddnm(NEAR, SHORT, A, y.flatten(), 0.02, steps, jump, resample)) < 4.5
    assert score(x, *law_of_ddnm(NEAR, SHORT, A, y.flatten(), 0.02, steps)) > 6  # negative control: without


@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("name", CASES)
def test_dps_takes_the_steps_of_its_equations(name, predict):
    """Each sample's path: x0^ = G x_t + g, so the gradient of |r| is -G^T A^T r / |r|, for every prediction."""
    operator, data = CASES[name]
    shape, y = data.mean.shape, measure(operator, data)
    A, noise = dense(operator, shape), normal(5, shape)
    x = noise(50).flatten(1)
    steps = restoration.dps(exact(data, SHORT, predict), operator, y.expand(5, -1, -1, -1), noise, 0.2)
    for (t, s, c_0, c_x, sd), step in zip(moment_steps(SHORT, 50), steps, strict=True):
        G, g = gain(data, SHORT, t)
        x0 = x @ G.T + g
        r = y.flatten() - x0 @ A.T
        x = c_0 * x0 + c_x * x + sd * noise(s).flatten(1) + 2 * 0.2 * r @ A @ G / r.norm(dim=1, keepdim=True)
        assert step.t == s
        torch.testing.assert_close(step.x.flatten(1), x, rtol=1e-7, atol=1e-8)


def test_dps_differentiates_what_is_not_linear():
    """A(x) = x^2, whose Jacobian is diag(2 x0^); with zeta 0 it is ancestral sampling on the same levels."""
    noise, y = normal(3, (1, 2, 2)), torch.full((3, 1, 2, 2), 0.3).double()
    denoiser = exact(DATA, SHORT)
    first = next(restoration.dps(denoiser, torch.square, y, noise, 0.5))
    free = next(samplers.ancestral(denoiser, noise(50), noise))
    G, g = gain(DATA, SHORT, 50)
    x0 = noise(50).flatten(1) @ G.T + g
    r = 0.3 - x0**2
    moved = 2 * 0.5 * (r * 2 * x0) @ G / r.norm(dim=1, keepdim=True)
    torch.testing.assert_close((first.x - free.x).flatten(1), moved, rtol=1e-7, atol=1e-8)
    for ours, theirs in zip(
        restoration.dps(denoiser, torch.square, y, noise, 0, 10), samplers.ancestral(denoiser, noise(50), noise, 10),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(ours.x, theirs.x)


# How far they are from the posterior.


def posterior(data, A, y, sigma):
    """Mean and covariance of x_0 given y."""
    K = data.covariance @ A.T @ torch.linalg.inv(A @ data.covariance @ A.T + sigma**2 * torch.eye(len(A)).double())
    return data.mean.flatten() + K @ (y - A @ data.mean.flatten()), data.covariance - K @ A @ data.covariance


def test_with_the_exact_conditional_denoiser_ddnm_meets_the_posterior():
    """E[x_0 | x_t, y] agrees with y already. E[x_0 | x_t] does not know y, and is biased."""
    operator, n, s = Mask(HIDDEN), 2000, schedule.linear(1000)
    A, y = dense(operator, (1, 2, 2)), measure(operator, NEAR)
    seen = A.any(1)
    truth = posterior(NEAR, A[seen], y.flatten()[seen], 0)
    told = GaussianData(truth[0].view(1, 2, 2), truth[1])

    def sampled(law):
        denoiser, noise = exact(law, s, "x0"), normal(n, (1, 2, 2))
        return last(restoration.ddnm(denoiser, operator, y.expand(n, -1, -1, -1), noise, steps=1000)).x

    assert score(sampled(told), *truth) < 4.5
    assert score(sampled(NEAR), *truth) > 6


@pytest.mark.parametrize("operator", [SuperResolution(2), Mask(HIDDEN)], ids=["superresolution", "mask"])
def test_more_time_travel_is_less_bias(operator):
    """Of the mean, in standard deviations of the posterior, computed without sampling."""
    A, y = dense(operator, (1, 2, 2)), measure(operator, NEAR).flatten()
    seen = A.any(1)
    truth, covariance = posterior(NEAR, A[seen], y[seen], 0)
    spread = covariance.diagonal().clamp(min=1e-6).sqrt()
    means = [law_of_ddnm(NEAR, SHORT, A, y, 0.0, 50, 1, resample)[0] for resample in (1, 5, 20)]
    away = [((mean - truth) / spread).abs().max().item() for mean in means]
    assert away[0] > 1.2 * away[1] > 1.2**2 * away[2] > 0


@pytest.mark.parametrize("resample", [1, 4])
def test_under_a_mask_the_mean_of_ddnm_is_that_of_repaint(resample):
    """Both put the known part at its noised value on average, RePaint from level T-1 on. Silence gives the mean."""
    silence, x0 = torch.zeros(1, 1, 2, 2).double(), measure(Mask(torch.tensor(False)), DATA)
    denoiser = exact(DATA, SHORT)
    ours = restoration.ddnm(denoiser, Mask(HIDDEN), x0, lambda k: silence, 0.0, 50, 1, resample)
    theirs = editing.inpaint(denoiser, x0, HIDDEN, lambda k: silence, None, 1, resample)
    torch.testing.assert_close(last(ours).x, last(theirs).x, rtol=0, atol=1e-5)


# Draws, labels, seeds.


@pytest.mark.parametrize("method", ["ddnm", "travel", "dps"])
def test_an_image_depends_only_on_its_own_seed(method):
    denoiser = Denoiser(randomised_unet().double(), SHORT)
    seeds, y = torch.tensor([11, 7, 3, 1000, 0]), normal(5, (1, 4, 4))(0).clamp(-1, 1)

    def images(rows):
        draws = per_image(seeds[rows].tolist(), (1, 8, 8))
        noise = lambda k: draws(k).double()  # noqa: E731
        if method == "dps":
            return last(restoration.dps(denoiser, SuperResolution(2), y[rows], noise, 0.3, 5)).x
        travel = (2, 2) if method == "travel" else (1, 1)
        return last(restoration.ddnm(denoiser, SuperResolution(2), y[rows], noise, 0.01, 6, *travel)).x

    whole = images(torch.arange(5))
    parts = torch.cat([images(torch.arange(i, min(i + 2, 5))) for i in (0, 2, 4)])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-8)
    assert min((whole[i] - whole[j]).abs().max() for i in range(5) for j in range(i)) > 0.1


def test_labels_reach_the_network():
    told = []

    def spy(x, timestep, y):
        told.append(y)
        return 0.5 * x

    denoiser, y, noise = Denoiser(spy, SHORT, "x0"), torch.tensor([3, 4]), normal(2, (1, 2, 2))
    small = torch.zeros(2, 1, 1, 1).double()
    last(restoration.ddnm(denoiser, SuperResolution(2), small, noise, steps=4, y=y))
    last(restoration.dps(denoiser, SuperResolution(2), small, noise, steps=5, y=y))
    assert len(told) == 9
    assert all(y is seen for seen in told)


def test_no_signal_at_the_end_is_finite():
    s, y = schedule.jsd(8), measure(SuperResolution(2), DATA)
    for steps in (
        restoration.ddnm(exact(DATA, s, "x0"), SuperResolution(2), y, normal(1, (1, 2, 2)), 0.1, 8, 1, 2),
        restoration.dps(exact(DATA, s, "x0"), SuperResolution(2), y, normal(1, (1, 2, 2))),
    ):
        assert all(step.x.isfinite().all() for step in steps)


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (lambda x: 3, r"operator: returned int; want a tensor of \[1, 1, 1, 1\]"),
        (lambda x: x, r"operator: returned \[1, 1, 2, 2\]; want a tensor of \[1, 1, 1, 1\]"),
        (lambda x: x.detach()[:, :, :1, :1], "operator: its result has no gradient"),
        (lambda x: x[:, :, :1, :1].round().long(), "operator: its result has no gradient"),
        (lambda x: torch.ones(1, 1, 1, 1, requires_grad=True), "operator: its gradient is not finite"),
        (lambda x: (x - x).sqrt()[:, :, :1, :1], "operator: its gradient is not finite"),
    ],
)
def test_a_function_that_dps_cannot_use_is_refused(operator, message):
    with pytest.raises(InputError, match=message):
        last(restoration.dps(exact(DATA, SHORT), operator, torch.zeros(1, 1, 1, 1).double(), normal(1, (1, 2, 2))))


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("ddnm", {"sigma": -1}, "sigma -1: want a finite number of at least 0"),
        ("ddnm", {"steps": 51}, "steps 51: want 1 to 50"),
        ("ddnm", {"steps": 5, "resample": 2}, "jump 10: want 1 to 4"),
        ("dps", {"zeta": -0.1}, "zeta -0.1: want a finite number of at least 0"),
        ("dps", {"steps": 0}, "steps 0: want 1 to 50"),
    ],
)
def test_wrong_settings_are_refused(method, settings, message):
    call, y = getattr(restoration, method), torch.zeros(1, 1, 1, 1).double()
    with pytest.raises(InputError, match=message):
        last(call(exact(DATA, SHORT), SuperResolution(2), y, normal(1, (1, 2, 2)), **settings))

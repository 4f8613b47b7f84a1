"""Training losses: by hand and against the bound, and their gradients."""

import math
from dataclasses import replace

import pytest
import torch
from exact import PREDICTIONS, correlated, network, one_thread, with_variance  # noqa: F401

from ddpm import likelihood, losses, pixels, schedule, timesteps
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError
from ddpm.gaussian import q_sample
from ddpm.noise import generator
from ddpm.unet import UNet

PAPER = schedule.linear()
VARIANCES = ("fixed_large", "fixed_small", "learned", "learned_range")


def batch(n, shape=(1, 2, 2), dtype=torch.float32):
    """n images of 8-bit pixels, each with the values 0 and 255, and their noise."""
    g = torch.Generator().manual_seed(0)
    pixel = torch.randint(0, 256, (n, *shape), generator=g).byte()
    pixel.view(n, -1)[:, :2] = torch.tensor([0, 255])
    return pixels.to_signal(pixel).to(dtype), torch.randn(n, *shape, generator=g).to(dtype)


def small_unet(out_channels=1):
    torch.manual_seed(0)
    return UNet(1, out_channels, width=32, channel_multipliers=(1, 2), num_res_blocks=1)


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_simple_by_hand(predict):
    """It is |target - output|^2 / D per image, with targets by Eq. 7 and 14, and for v by Salimans & Ho (2022)."""
    x0, eps = batch(5, dtype=torch.float64)
    t = torch.tensor([1, 2, 300, 999, 1000])
    output = torch.linspace(-1, 1, 20, dtype=torch.float64).view_as(x0)
    loss = losses.simple(Denoiser(lambda x, timestep, y: output, PAPER, predict), x0, t, eps)
    assert loss.shape == (5,)
    for i, level in enumerate(t.tolist()):
        abar, prev = PAPER.alpha_bar[level].item(), PAPER.alpha_bar[level - 1].item()
        alpha = abar / prev
        xt = abar**0.5 * x0[i] + (1 - abar) ** 0.5 * eps[i]
        target = {
            "eps": eps[i],
            "x0": x0[i],
            "mu": (prev**0.5 * (1 - alpha) * x0[i] + alpha**0.5 * (1 - prev) * xt) / (1 - abar),
            "v": abar**0.5 * eps[i] - (1 - abar) ** 0.5 * x0[i],
        }[predict]
        assert loss[i].item() == pytest.approx(((target - output[i]) ** 2).mean().item(), rel=1e-9)


def test_expected_simple_loss_of_the_exact_denoiser():
    """E |eps - eps_theta|^2 = abar_t/(1 - abar_t) tr Cov[x_0|x_t], the lowest possible value of Eq. 14."""
    data, s = correlated(), schedule.linear(50, 2e-3, 0.4)
    x0, eps = data.cubature()
    exact = network(data, s, "eps")
    for level in (1, 2, 25, 50):
        t, abar = torch.full((len(x0),), level), s.alpha_bar[level]
        least = (abar / (1 - abar) * data.x0_covariance(abar).trace() / data.D).item()
        assert losses.simple(Denoiser(exact, s), x0, t, eps).mean().item() == pytest.approx(least, rel=1e-9)
        worse = Denoiser(lambda x, timestep, y: 1.01 * exact(x, timestep), s)
        assert losses.simple(worse, x0, t, eps).mean().item() > least * (1 + 1e-6)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("predict", PREDICTIONS)
def test_vlb_is_the_term_of_the_bound(predict, variance):
    """losses.vlb is likelihood.term in bits per dimension, without clipping, with a t per image."""
    data = correlated()
    x0, eps = batch(4, dtype=torch.float64)
    t = torch.tensor([1, 2, 500, 1000])
    net = network(data, PAPER, predict)
    if variance.startswith("learned"):
        net = with_variance(net, lambda x, timestep: x.sin() - 3)
    denoiser = Denoiser(net, PAPER, predict, variance)
    nats, _ = likelihood.term(denoiser.unclipped(), x0, q_sample(PAPER, x0, t, eps), t)
    torch.testing.assert_close(losses.vlb(denoiser, x0, t, eps), nats / (4 * math.log(2)), rtol=1e-12, atol=0)


def test_vlb_of_eps_prediction_is_eq_12():
    """With a fixed variance, L_{t-1} is beta^2/(2 s^2 alpha (1-abar)) |eps - eps_theta|^2 plus a constant (Eq. 12)."""
    x0, eps = batch(999, dtype=torch.float64)
    t = torch.arange(2, 1001)
    zero, one = (losses.vlb(Denoiser(lambda x, *_, c=c: eps + c, PAPER), x0, t, eps) for c in (0.0, 0.3))
    beta, abar = PAPER.beta[t], PAPER.alpha_bar[t]
    weight = beta**2 / (2 * beta * (1 - beta) * (1 - abar))  # fixed_large: s^2 = beta
    torch.testing.assert_close(one - zero, weight * 4 * 0.3**2 / (4 * math.log(2)), rtol=1e-7, atol=0)


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
@pytest.mark.parametrize("predict", PREDICTIONS)
def test_hybrid(predict, variance):
    """It is L_simple + 0.001 T L_vlb. Only L_simple has a gradient for the prediction, only L_vlb for the variance."""
    x0, eps = batch(4, dtype=torch.float64)
    t = torch.tensor([1, 2, 500, 1000])
    out = torch.linspace(-1, 0, 32, dtype=torch.float64).view(4, 2, 2, 2).requires_grad_()
    denoiser = Denoiser(lambda x, timestep, y: out, PAPER, predict, variance)
    hybrid, simple, vlb = (loss(denoiser, x0, t, eps) for loss in (losses.hybrid, losses.simple, losses.vlb))
    torch.testing.assert_close(hybrid, simple + vlb, rtol=1e-12, atol=0)  # T = 1000: 0.001 T = 1
    of_hybrid, of_simple, of_vlb = (torch.autograd.grad(loss.sum(), out)[0] for loss in (hybrid, simple, vlb))
    torch.testing.assert_close(of_hybrid[:, :1], of_simple[:, :1], rtol=1e-12, atol=0)
    torch.testing.assert_close(of_hybrid[:, 1:], of_vlb[:, 1:], rtol=1e-12, atol=0)
    assert of_simple[:, 1:].abs().max() == 0
    assert of_vlb[:, :1].flatten(1).abs().amax(1).min() > 0  # hybrid stops this gradient
    assert of_vlb[:, 1:].flatten(1).abs().amax(1).min() > 0


def test_hybrid_weighs_the_bound_by_T():
    """At T = 50 the weight is 0.001 x 50, because T times the term at a uniform t estimates the bound."""
    s = schedule.linear(50, 2e-3, 0.4)
    x0, eps = batch(3, dtype=torch.float64)
    t = torch.tensor([1, 25, 50])
    denoiser = Denoiser(lambda x, timestep, y: torch.cat([x, x - 3], 1), s, "eps", "learned")
    expected = losses.simple(denoiser, x0, t, eps) + 0.05 * losses.vlb(denoiser, x0, t, eps)
    torch.testing.assert_close(losses.hybrid(denoiser, x0, t, eps), expected, rtol=1e-12, atol=0)


def test_hybrid_calls_the_network_once():
    """Two calls would double the cost of a step and draw two dropout masks."""
    calls = []

    def counted(x, timestep, y):
        calls.append(timestep)
        return torch.cat([x, x], dim=1)

    x0, eps = batch(1)
    losses.hybrid(Denoiser(counted, PAPER, variance="learned_range"), x0, torch.tensor([5]), eps)
    assert len(calls) == 1


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("predict", PREDICTIONS)
def test_losses_are_finite_in_float32_at_every_level(predict, variance):
    """With outputs near 0, as of an untrained network, losses and gradients are finite at all t, and no gradient is 0.

    The pixels include 0 and 255.
    """
    x0, eps = batch(1000)
    t = torch.arange(1, 1001)
    learned = variance.startswith("learned")
    out = (1e-3 * torch.randn(1000, 1 + learned, 2, 2, generator=torch.Generator().manual_seed(1))).requires_grad_()
    denoiser = Denoiser(lambda x, timestep, y: out, PAPER, predict, variance)
    for loss in (losses.simple, losses.vlb, losses.hybrid):
        value = loss(denoiser, x0, t, eps)
        assert value.dtype == torch.float32
        assert value.isfinite().all()
        (gradient,) = torch.autograd.grad(value.sum(), out)
        assert gradient.isfinite().all()
        assert gradient.flatten(1).abs().amax(1).min() > 0


@pytest.mark.parametrize("loss", [losses.simple, losses.vlb, losses.hybrid])
def test_untrained_unet(loss):
    """Its losses and the gradients of its weights are finite in float32, also at both ends of the schedule."""
    learned = loss is not losses.simple
    net = small_unet(2 if learned else 1)
    denoiser = Denoiser(net, PAPER, variance="learned_range" if learned else "fixed_large")
    x0, eps = batch(6, (1, 8, 8))
    value = loss(denoiser, x0, torch.tensor([1, 1, 2, 500, 999, 1000]), eps)
    value.mean().backward()
    assert value.isfinite().all()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    assert net.conv_out.weight.grad.abs().max() > 0
    if loss is losses.simple:  # the output is near 0, and E |eps|^2 = 1
        assert value.mean().item() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("loss", [losses.simple, losses.vlb, losses.hybrid])
def test_one_number_per_image(loss):
    """A batch in parts gives the same losses, and gradients with the same sum.

    So a batch may be accumulated from parts or split over devices.
    """
    net = small_unet(2)
    for p in net.parameters():  # away from the near-zero start
        p.data.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    if loss is losses.simple:
        denoiser = Denoiser(lambda *inputs: net(*inputs)[:, :1], PAPER)
    else:
        denoiser = Denoiser(net, PAPER, variance="learned_range")
    x0, eps = batch(4, (1, 8, 8))
    t = torch.tensor([1, 2, 400, 1000])
    whole = loss(denoiser, x0, t, eps)
    gradient = torch.autograd.grad(whole.mean(), net.parameters())
    parts, summed = [], [torch.zeros_like(p) for p in net.parameters()]
    for part in (slice(0, 1), slice(1, 4)):
        parts.append(loss(denoiser, x0[part], t[part], eps[part]))
        for total, g in zip(summed, torch.autograd.grad(parts[-1].sum() / 4, net.parameters()), strict=True):
            total += g
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-6)
    scale = max(g.abs().max() for g in gradient)
    for a, b in zip(summed, gradient, strict=True):
        assert (a - b).abs().max() < 1e-4 * scale


# The levels of a batch and their weights.


def draws(how, n, batches=4000, T=10):
    """The levels of `batches` batches, int64 [batches, n]."""
    s = schedule.cosine(T)
    return torch.stack([timesteps.sample(s, n, how, generator(i)) for i in range(batches)])


def test_uniform_levels_are_plain_random_integers():
    """Runs of the first versions, which had no other choice, drew the same levels."""
    drawn = timesteps.sample(PAPER, 128, "uniform", generator(7))
    assert torch.equal(drawn, torch.randint(1, 1001, (128,), generator=generator(7)))


@pytest.mark.parametrize("how", ["uniform", "stratified"])
@pytest.mark.parametrize("n", [1, 3, 16])
def test_every_image_may_get_every_level(how, n):
    """Each image has levels 1..T with equal probability, within 5 standard errors of 4000 batches."""
    share = torch.nn.functional.one_hot(draws(how, n) - 1, 10).double().mean(0)  # [n, T]
    assert share.shape == (n, 10)
    assert (share - 0.1).abs().max() < 5 * (0.1 * 0.9 / 4000) ** 0.5


def test_stratified_levels_are_even():
    """Each n-th of 1..T has one level, so the mean of n levels has a standard deviation of T/n/sqrt(12)."""
    levels = timesteps.sample(PAPER, 50, "stratified", generator(3))
    assert torch.equal(((levels - 1) // 20).sort().values, torch.arange(50))
    even = draws("stratified", 16, T=1000).double().mean(1)
    assert even.std() == pytest.approx(1000 / 16 / 12**0.5, rel=0.05)  # 4 times as much for independent draws
    assert even.mean() == pytest.approx(500.5, abs=5 * even.std().item() / 4000**0.5)


def test_stratified_levels_are_in_random_order():
    """Of two images, each has the lower level equally often."""
    first, second = draws("stratified", 2).unbind(1)
    assert (first < second).double().mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_levels_drawn_by_the_bound_have_the_weights_of_the_bound(predict):
    """If the network's error is 1 in every dimension, L_1 .. L_{T-1} are the weights (the exact KL of Eq. 6-7)."""
    s = schedule.cosine()
    x0, eps, t = torch.zeros(999, 1, 2, 2).double(), torch.zeros(999, 1, 2, 2).double(), torch.arange(2, 1001)
    xt = q_sample(s, x0, t, eps)
    truth = Denoiser(lambda x, timestep, y: torch.zeros_like(x), s, predict, "fixed_small", clip=False)
    off = replace(truth, network=lambda x, timestep, y: torch.full_like(x, 1e-3))
    exact = likelihood.term(off, x0, xt, t)[0] / 4 / 1e-6  # nats per dimension for a squared error of 1
    weight = timesteps.bound_weight(s, predict)
    assert torch.allclose(weight[1:], exact, rtol=1e-6)
    t = timesteps.sample(s, 200_000, "bound", generator(0), predict)
    share = torch.bincount(t, minlength=1001)[1:] / 200_000
    assert (share - weight / weight.sum()).abs().max() < 2 / 200_000 + 1e-9


def test_levels_by_the_bound_are_refused_for_mu():
    with pytest.raises(InputError, match="timestep_sampling bound"):
        timesteps.sample(PAPER, 4, "bound", generator(0), "mu")


@pytest.mark.parametrize("s", [PAPER, schedule.cosine(), schedule.jsd()], ids=["linear", "cosine", "jsd"])
def test_lognormal_levels(s):
    """ln sigma has the quantiles of N(-1.2, 1.2^2), limited to the range of the schedule."""
    t = timesteps.sample(s, 10_000, "lognormal", generator(0))
    assert t.min() >= 1
    assert t.max() <= s.T
    abar = s.alpha_bar[t]
    log_sigma = 0.5 * ((1 - abar) / abar).log()
    for z in (-1, 0, 1):
        quantile = log_sigma.quantile(0.5 * (1 + math.erf(z / 2**0.5)))
        assert quantile == pytest.approx(-1.2 + 1.2 * z, abs=0.05)


@pytest.mark.parametrize("weighting", ["min_snr", "p2"])
def test_a_weighted_loss_does_not_depend_on_what_is_predicted(weighting):
    """The same x0^ as eps, x0 or v has the papers' weights on the error of x_0: min(SNR, 5) and SNR/(1 + SNR)."""
    x0, eps = batch(5, dtype=torch.float64)
    t = torch.tensor([1, 100, 300, 700, 1000])
    xt, abar = q_sample(PAPER, x0, t, eps), PAPER.alpha_bar[t]
    guess = x0.roll(1, 0)
    signal, sigma = (a.sqrt().view(-1, 1, 1, 1) for a in (abar, 1 - abar))
    eps_of_guess = (xt - signal * guess) / sigma
    outputs = {"eps": eps_of_guess, "x0": guess, "v": signal * eps_of_guess - sigma * guess}
    snr = abar / (1 - abar)
    expected = torch.minimum(snr, torch.tensor(5.0)) if weighting == "min_snr" else snr / (1 + snr)
    expected = expected * (x0 - guess).square().flatten(1).mean(1)
    for predict, output in outputs.items():
        denoiser = Denoiser(lambda x, timestep, y, output=output: output, PAPER, predict)
        loss = losses.simple(denoiser, x0, t, eps) * losses.weight(denoiser, t, weighting)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        assert (losses.weight(denoiser, t, "none") == 1).all()


def test_no_weight_for_mu():
    with pytest.raises(InputError, match="weighting p2: needs eps, x0 or v prediction"):
        losses.weight(Denoiser(lambda x, *_: x, PAPER, "mu"), torch.tensor([1]), "p2")

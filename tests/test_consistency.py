"""Consistency models: the loss's fixed point and the sampler's law on Gaussian data, diffusers' LCM, the programs."""

import math

import pytest
import torch
from diffusers import LCMScheduler
from exact import (
    GaussianData,
    correlated,
    last,
    normal,
    one_thread,  # noqa: F401
    z_score,
)
from exact import network as exact_network

from ddpm import losses, samplers, schedule, timesteps
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError
from ddpm.gaussian import q_sample
from ddpm.unet import UNet

COSINE = schedule.cosine()
WIDTH = 0.5  # the standard deviation of the data in the tests of the fixed point

# The fixed point of the loss. In z = x / sqrt(abar) = x_0 + sigma eps, a linear f is f(x_t, t) = g_t z_t, with one
# number g_t per level and g_0 = 1. The pair (t, r) has the least E |g_t z_t - g_r z_r|^2 for
#     g_t = g_r E z_t z_r / E z_t^2 = g_r (s^2 + sigma_t sigma_r) / (s^2 + sigma_t^2).
# The norm of a Gaussian is least where its variance is, so every norm and every weight of levels has this fixed point.
# A sample f(x_t, t) has the standard deviation g_t sqrt(s^2 + sigma_t^2), which is s times the product of the cosines
# of the gaps in the angle atan(sigma / s).


def sigmas(s, levels):
    return (-s.half_log_snr[levels]).exp()


def fixed_point(s, levels):
    """g at [0, *levels], by the recursion."""
    sigma, g = sigmas(s, [0, *levels]), [1.0]
    for above, below in zip(sigma[1:], sigma[:-1], strict=True):
        g.append(g[-1] * float((WIDTH**2 + above * below) / (WIDTH**2 + above**2)))
    return torch.tensor(g, dtype=torch.float64)


def ratio(s, levels):
    """The standard deviation of one-call samples divided by that of the data."""
    return float(fixed_point(s, levels)[-1] * (WIDTH**2 + sigmas(s, levels)[-1] ** 2).sqrt()) / WIDTH


def linear(s, g, predict="v"):
    """The denoiser with f(x_t, t) = g_t x_t / sqrt(abar_t); g is [T+1]."""

    def network(x, timestep, y=None):
        t = (timestep + 1).long()
        alpha, sigma = (a[t].view(-1, 1, 1, 1) for a in (s.alpha_bar.sqrt(), (1 - s.alpha_bar).sqrt()))
        f = g[t].view(-1, 1, 1, 1) / alpha * x
        return f if predict == "x0" else (alpha * x - f) / sigma

    return Denoiser(network, s, predict, clip=False)


def moments(n):
    """(x0, eps) [n, 1, 1, 2]: images with mean squares WIDTH^2 and 1 and mean product 0, as the expectations are."""
    x0 = torch.tensor([math.sqrt(2) * WIDTH, 0.0], dtype=torch.float64)
    eps = torch.tensor([0.0, math.sqrt(2)], dtype=torch.float64)
    return x0.expand(n, 1, 1, 2), eps.expand(n, 1, 1, 2)


@pytest.mark.parametrize(("gaps", "want"), [(2, 0.40), (4, 0.66), (16, 0.91), (1000, 0.998)])
def test_the_fixed_point_narrows_the_data_by_the_cosines_of_the_gaps(gaps, want):
    """Even levels of the cosine schedule. More gaps come nearer to the ODE's map, which keeps the whole width."""
    levels = COSINE.levels(gaps)
    angles = (sigmas(COSINE, [0, *levels]) / WIDTH).atan()
    assert ratio(COSINE, levels) == pytest.approx(float(angles.diff().cos().prod()), rel=1e-9)
    assert ratio(COSINE, levels) == pytest.approx(want, abs=0.005)
    ode = WIDTH / (WIDTH**2 + sigmas(COSINE, [1000]) ** 2).sqrt()
    assert 1 - float(fixed_point(COSINE, levels)[-1] / ode) == pytest.approx(1 - ratio(COSINE, levels), rel=1e-6)


@pytest.mark.parametrize("predict", ["x0", "v"])
@pytest.mark.parametrize("gaps", [2, 4, 16, 1000])
def test_the_gradient_of_the_loss_is_zero_at_the_fixed_point_only(gaps, predict):
    """At every level of every grid. Where a coefficient is 1% too large for the one below, its gradient is not."""
    levels = COSINE.levels(gaps)
    t, r = torch.tensor(levels), torch.tensor([0, *levels[:-1]])
    x0, eps = moments(gaps)

    def gradient(g):
        whole = torch.ones(1001, dtype=torch.float64).index_copy(0, torch.tensor([0, *levels]), g).requires_grad_()
        (found,) = torch.autograd.grad(losses.consistency(linear(COSINE, whole, predict), x0, t, eps, r=r).sum(), whole)
        return found[levels] * g[1:]

    g = fixed_point(COSINE, levels)
    wrong = g * torch.tensor([1, *[1.01 ** (i + 1) for i in range(gaps)]])  # 1% more than fits the level below
    assert (gradient(g).abs() < 1e-6 * gradient(wrong).abs()).all()


@pytest.mark.parametrize("gaps", [2, 4, 16])
def test_gradient_descent_reaches_the_fixed_point(gaps):
    """From the exact posterior mean, as tuning begins, by Adam on the real loss."""
    levels = COSINE.levels(gaps)
    t, r = torch.tensor(levels), torch.tensor([0, *levels[:-1]])
    ode = WIDTH / (WIDTH**2 + sigmas(COSINE, levels) ** 2).sqrt()  # the ODE's map, and the posterior mean's square root
    ratios, (x0, eps) = ode.clone().requires_grad_(), moments(gaps)
    optimizer = torch.optim.Adam([ratios], betas=(0.5, 0.9))
    for step in range(250):
        optimizer.param_groups[0]["lr"] = 0.05 * 1e-3 ** (step / 250)
        g = torch.ones(1001, dtype=torch.float64).index_copy(0, t, ratios * ode)
        optimizer.zero_grad()
        losses.consistency(linear(COSINE, g), x0, t, eps, r=r).sum().backward()
        optimizer.step()
    torch.testing.assert_close(ratios.detach() * ode, fixed_point(COSINE, levels)[1:], rtol=1e-3, atol=0)


def test_the_gap_of_training_ends_at_the_odes_map():
    """Down the pairs of `timesteps.lower`, the width of one-call samples rises from stage to stage, to all of it."""
    s = COSINE.up_to(80)
    assert sigmas(s, [s.T]) == pytest.approx(80, rel=0.15)
    widths = []
    for stage in (1, 2, 4, 8, 30):
        path = [s.T]
        while path[-1]:
            path.append(int(timesteps.lower(s, torch.tensor([path[-1]]), stage)))
        widths.append(ratio(s, path[-2::-1]))
    assert widths == sorted(widths)
    assert (widths[0] < 0.4, widths[3] > 0.99, widths[4] > 0.998) == (True, True, True)


@pytest.mark.parametrize("s", [COSINE, schedule.linear(), schedule.jsd(), schedule.linear(7, 0.1, 0.6)])
def test_lower_levels(s):
    """r is below t, holds no more noise than wanted, and no level between r and t does."""
    t, sigma = torch.arange(1, s.T + 1), sigmas(s, slice(None))
    before = torch.full_like(t, -1)
    for stage in range(1, 15):
        r = timesteps.lower(s, t, stage)
        assert ((r >= before) & (r < t)).all()
        before = r
        wanted = sigma[t] * (1 - (1 + 8 / (1 + sigma[t].exp())) / 2**stage)
        inner = (r > 0) & (r < t - 1)
        assert (sigma[r] <= wanted)[inner].all()
        assert (sigma[r + 1] > wanted)[inner].all()
        assert (wanted < sigma[1])[(r == 0) & (t > 1)].all()
    assert (r == t - 1).all()
    assert (timesteps.lower(s, t, 5000) == t - 1).all()  # a run goes on for as long as it is asked to


# The sampler.


def ode_map(data, s):
    """A denoiser whose x0^ is where the ODE carries x_t: along each eigenvector the deviation is scaled."""
    values, vectors = torch.linalg.eigh(data.covariance)

    def network(x, timestep, y=None):
        abar = s.alpha_bar[(timestep + 1).long()].view(-1, 1)
        z = (x.flatten(1) - abar.sqrt() * data.mean.flatten()) @ vectors
        return (data.mean.flatten() + ((values / (abar * values + 1 - abar)).sqrt() * z) @ vectors.T).view_as(x)

    return Denoiser(network, s, "x0", clip=False)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_odes_map_gives_the_law_of_the_data_in_one_call_or_more(steps):
    """The exact posterior mean, which an ordinary model learns, does not."""
    data, s = correlated(), COSINE.up_to(80)
    noise = normal(10_000, (1, 2, 2))
    law = data.mean.flatten(), data.covariance
    assert z_score(last(samplers.consistency(ode_map(data, s), noise(s.T), noise, steps)).x, *law) < 4.5
    ordinary = Denoiser(exact_network(data, s, "v"), s, "v", clip=False)
    assert z_score(last(samplers.consistency(ordinary, noise(s.T), noise, steps)).x, *law) > 6


@pytest.mark.parametrize(("sigma", "kept"), [(2, 0.37), (10, 0.87), (80, 0.997)])
def test_a_lower_first_level_narrows_what_varies_most(sigma, kept):
    """x_T begins as N(0, I), though q(x_T) = N(sqrt(abar) m, abar S + (1 - abar) I).

    So the exact map scales a deviation s by sqrt((1 + sigma^2)/(s^2 + sigma^2)), which is below 1 if s is above 1.
    """
    data, s = GaussianData(correlated().mean, 64 * correlated().covariance), COSINE.up_to(sigma)
    noise, abar = normal(10_000, (1, 2, 2)), s.alpha_bar[s.T]
    variances, vectors = torch.linalg.eigh(data.covariance)
    scale = ((1 + sigmas(s, s.T) ** 2) / (variances + sigmas(s, s.T) ** 2)).sqrt()
    assert float(scale[-1]) == pytest.approx(kept, abs=0.01)
    through = (vectors * scale * variances.sqrt()) @ vectors.T  # from x_T - sqrt(abar) m to x_0 - m
    law = data.mean.flatten() - abar.sqrt() * through @ data.mean.flatten(), through @ through.T
    found = last(samplers.consistency(ode_map(data, s), noise(s.T), noise, 1)).x
    assert z_score(found, *law) < 4.5
    if sigma < 80:
        assert z_score(found, data.mean.flatten(), data.covariance) > 6


@pytest.mark.parametrize("predict", ["x0", "v"])
@pytest.mark.parametrize("clip", [True, False])
def test_the_sampler_equals_lcm_of_diffusers(predict, clip):
    """Each step, on our levels and noise in float64. Its timestep_scaling is so large that c_skip is 0 and c_out 1."""

    def network(x, timestep, y=None):
        return (2 * x + 3 * timestep.double().view(-1, 1, 1, 1) / 1000).sin() + 0.3 * x.flip(-1)

    names = {"x0": "sample", "v": "v_prediction"}
    scheduler = LCMScheduler(
        trained_betas=COSINE.beta[1:].tolist(), timestep_scaling=1e12, clip_sample=clip, prediction_type=names[predict],
        original_inference_steps=1000,
    )  # fmt: skip
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = COSINE.alpha_bar[1:].clone(), torch.ones(()).double()
    levels, noise = [100, 400, 1000], normal(3, (2, 4, 4))
    scheduler.set_timesteps(timesteps=[level - 1 for level in reversed(levels)])
    x, drawn = noise(1000), []
    steps = samplers.consistency(Denoiser(network, COSINE, predict, clip=clip), x, noise, levels)
    for step, timestep in zip(steps, scheduler.timesteps, strict=True):
        drawn = noise(step.t)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: drawn)  # noqa: B023
            x, x0 = scheduler.step(network(x, timestep.expand(3)), timestep, x, return_dict=False)
        torch.testing.assert_close(step.x, x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(step.x0, x0, rtol=1e-9, atol=1e-9)
    assert step.t == 0


# The loss.


def dropping():
    """A network with dropout whose output is not near zero."""
    torch.manual_seed(0)
    net = UNet(1, width=32, channel_multipliers=(1,), num_res_blocks=1, dropout=0.5)
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    return net.train()


def test_both_terms_share_dropout_and_only_the_upper_one_has_a_gradient():
    """By hand: f at both levels with the same generator state, and the lower value as a constant."""
    net = dropping()
    denoiser = Denoiser(net, COSINE, "v")
    x0, eps = torch.rand(3, 1, 8, 8) * 2 - 1, torch.randn(3, 1, 8, 8)
    t, r = torch.tensor([1, 600, 1000]), torch.tensor([0, 500, 990])

    def f(level):
        torch.manual_seed(5)
        xt = q_sample(COSINE, x0, level, eps)
        return denoiser.unclipped()(xt, level).x0

    upper, lower = f(t), f(r.clamp(min=1)).detach()
    lower[0] = x0[0]  # at level 0, f is x_0
    square = (upper - lower).square().flatten(1).mean(1)
    gap = sigmas(COSINE, t) - sigmas(COSINE, r)
    want = ((square + losses.HUBER**2).sqrt() - losses.HUBER) / gap.float()
    torch.manual_seed(5)
    loss = losses.consistency(denoiser, x0, t, eps, r=r)
    torch.testing.assert_close(loss, want)
    for a, b in zip(
        torch.autograd.grad(loss.sum(), net.parameters()),
        torch.autograd.grad(want.sum(), net.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    torch.manual_seed(6)
    assert not torch.allclose(losses.consistency(denoiser, x0, t, eps, r=r), loss)  # dropout is on


def test_a_teacher_makes_the_lower_point_by_one_step_of_ddim():
    """With guidance: x_r of `samplers.ddim`. At r = 0 the target is the teacher's x0^ itself."""

    def net(x, timestep, y=None):
        k, label = timestep.double().view(-1, 1, 1, 1) / 1000, (y.view(-1, 1, 1, 1) + 1) * 0.1
        return (x + k).sin() + label * x.cos()

    teacher = Denoiser(net, COSINE, "v").guided(3.0)
    student = Denoiser(lambda x, timestep, y=None: net(0.9 * x, timestep, y), COSINE, "v")
    x0, eps = torch.rand(2, 1, 4, 4).double(), torch.randn(2, 1, 4, 4).double()
    y = torch.tensor([1, 2])
    for level, below in ((700, 400), (700, 0)):
        t, r = torch.tensor([level] * 2), torch.tensor([below] * 2)
        xt = q_sample(COSINE, x0, t, eps)
        steps = [below, level] if below else [level]
        xr = next(samplers.ddim(teacher.unclipped(), xt, steps, y=y, start=level)).x
        target = student.unclipped()(xr, r, y).x0 if below else xr
        square = (student.unclipped()(xt, t, y).x0 - target).square().flatten(1).mean(1)
        gap = sigmas(COSINE, t) - sigmas(COSINE, r)
        want = ((square + losses.HUBER**2).sqrt() - losses.HUBER) / gap
        torch.testing.assert_close(losses.consistency(student, x0, t, eps, y, r, teacher), want, rtol=1e-9, atol=0)
        assert (losses.consistency(student, x0, t, eps, y, r) - want).abs().min() > 1e-3


@pytest.mark.parametrize("predict", ["eps", "mu"])
def test_other_predictions_are_refused(predict):
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(InputError, match=f"predict {predict}: loss consistency needs x0 or v prediction"):
        losses.consistency(Denoiser(lambda x, *_: x, COSINE, predict), x, torch.tensor([5]), x)


def test_the_schedule_ends_at_sigma():
    for s in (COSINE, schedule.linear(), schedule.jsd()):
        cut = s.up_to(80)
        assert sigmas(s, [cut.T]) <= 80 < sigmas(s, [cut.T + 1])
        assert torch.equal(cut.alpha_bar, s.alpha_bar[: cut.T + 1])
        assert torch.equal(cut.timestep, s.timestep[: cut.T + 1])
    assert schedule.linear(20).up_to(80).T == 20
    with pytest.raises(InputError, match=r"last_sigma 0\.001: every level has more noise; want at least 0\.006"):
        COSINE.up_to(0.001)

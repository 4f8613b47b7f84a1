"""Numbers of Python, NumPy and torch mean the same to every public function, and what means nothing is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ddpm import editing, gaussian, likelihood, losses, noise, ode, pixels, samplers, schedule, spacing
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError, finite_number, whole_number
from ddpm.presets import PRESETS

SCHEDULE = schedule.linear(50, 1e-3, 0.3)
INTEGERS = [int, np.int64, np.int32, np.uint8, torch.tensor, lambda n: torch.tensor(n, dtype=torch.uint8), np.array]
IDS = ["int", "int64", "int32", "uint8", "torch", "torch uint8", "array of no dimension"]


def model(**settings):
    """A smooth function of x, timestep and label as the network, so that each of them shows in the result."""

    def network(x, timestep, y):
        label = 0 if y is None else y.view(-1, 1, 1, 1)
        out = 0.3 * x + 0.01 * timestep.view(-1, 1, 1, 1) + 0.1 * label
        return torch.cat([out, 0.1 * out], 1) if settings.get("variance", "").startswith("learned") else out

    return Denoiser(network, SCHEDULE, **settings)


def last(steps):
    *_, step = steps
    return step.x


X = noise.normal(range(2), (1, 4, 4), 7)
DRAWS = noise.per_image(range(2), (1, 4, 4))
ENDS = noise.normal(range(4), (1, 4, 4), 9)
USES = {
    "noise.mix": lambda n: torch.tensor(noise.mix(n, 3)),
    "noise.normal, seed": lambda n: noise.normal([n, 1], (2,), 3),
    "noise.normal, level": lambda n: noise.normal([0], (2,), n),
    "noise.generator": lambda n: torch.rand(2, generator=noise.generator(n)),
    "per_image": lambda n: noise.per_image([n], (2,))(n),
    "levels, steps": lambda n: torch.tensor(SCHEDULE.levels(n)),
    "levels, start": lambda n: torch.tensor(SCHEDULE.levels(3, n)),
    "levels, list": lambda n: torch.tensor(SCHEDULE.levels([n, 50])),
    "schedule.respace": lambda n: SCHEDULE.respace([n, 50]).alpha_bar,
    "denoiser.respace": lambda n: model().respace([n, 50]).schedule.alpha_bar,
    "guided, interval": lambda n: model().guided(2, (n, 50)).output(X, torch.tensor([7]), torch.tensor([1, 2]))[0],
    "guided, scale": lambda n: model().guided(n).output(X, torch.tensor([7]), torch.tensor([1, 2]))[0],
    "ancestral": lambda n: last(samplers.ancestral(model(), X, DRAWS, n)),
    "ancestral, start": lambda n: last(samplers.ancestral(model(), X, DRAWS, start=n)),
    "ddim": lambda n: last(samplers.ddim(model(), X, n)),
    "unipc, order": lambda n: last(samplers.unipc(model(), X, 9, order=whole_number("", n) % 3 + 1)),
    "heun, start": lambda n: last(samplers.heun(model(), X, 3, start=n)),
    "redraw": lambda n: last(editing.redraw(model(), X, n, DRAWS, n)),
    "invert": lambda n: last(editing.invert(model(), X, 5, n, iterations=n)),
    "share_latent": lambda n: last(editing.share_latent(model(), X[0], n, DRAWS)),
    "interpolate": lambda n: last(
        editing.interpolate(model(), ENDS[0], ENDS[1], torch.tensor([0.0, 1.0]), n, ENDS[2], ENDS[3], DRAWS)
    ),
    "repaint_path": lambda n: torch.tensor(editing.repaint_path(20, n, n)),
    "probability flow": lambda n: ode.probability_flow(model(), X, torch.ones_like(X), n),
    "optimised": lambda n: torch.tensor(spacing.optimised(torch.rand(51, 51, generator=noise.generator(0)), n)),
} | {f"spacing {name}": (lambda n, f=f: torch.tensor(f(SCHEDULE, n))) for name, f in spacing.SPACINGS.items()}


@pytest.mark.parametrize("kind", INTEGERS, ids=IDS)
@pytest.mark.parametrize("name", USES)
def test_an_integer_is_the_same_whoever_made_it(name, kind):
    assert torch.equal(USES[name](kind(7)), USES[name](7))


@pytest.mark.parametrize("value", [0.5, 7.0, "7", None, True, torch.tensor([7]), np.array([7])], ids=repr)
@pytest.mark.parametrize("name", ["levels, start", "spacing log_snr", "repaint_path", "share_latent", "optimised"])
def test_what_is_no_whole_number_is_refused_by_name(name, value):
    if name == "levels, start" and value is None:
        return  # None is T
    with pytest.raises(InputError, match=r"^(t|start|steps|levels|n|resample|jump|)\b"):
        USES[name](value)


@pytest.mark.parametrize("seeds", [np.arange(4), torch.arange(4), torch.arange(4, dtype=torch.int32), [*range(4)]])
def test_seeds_of_arrays_and_tensors_are_images(seeds):
    assert torch.equal(noise.per_image(seeds, (1, 2, 2))(5), noise.per_image(range(4), (1, 2, 2))(5))
    assert torch.equal(noise.ahead(seeds, (1, 2, 2), "cpu", [5])(5), noise.per_image(range(4), (1, 2, 2))(5))


def test_a_seed_that_is_no_integer_is_refused():
    with pytest.raises(TypeError):
        noise.normal([0.5], (2,))


def test_finite_numbers():
    assert finite_number("eta", torch.tensor(0.5), 0, 1) == finite_number("eta", np.float32(0.5), 0, 1) == 0.5
    for value in (float("nan"), float("inf"), "1", None, True, -0.1, 1.1, [0.5], 1j):
        with pytest.raises(InputError, match=r"^eta .*: want a finite number, 0 to 1$"):
            finite_number("eta", value, 0, 1)


def test_a_preset_of_numpys_numbers_is_one_of_pythons():
    numpys = replace(PRESETS["digits"], steps=np.int64(5), lr=np.float32(0.5), channel_multipliers=(np.int64(1),))
    assert numpys == replace(PRESETS["digits"], steps=5, lr=0.5, channel_multipliers=(1,))
    assert {type(numpys.steps), type(numpys.lr), type(numpys.channel_multipliers[0])} == {int, float}


T_USES = {
    "denoiser": lambda t: model()(X, t),
    "simple": lambda t: losses.simple(model(), X, t, ENDS[:2]),
    "vlb": lambda t: losses.vlb(model(), X, t, ENDS[:2]),
    "hybrid": lambda t: losses.hybrid(model(variance="learned_range"), X, t, ENDS[:2]),
    "term": lambda t: likelihood.term(model(), X, X, t),
    "guided": lambda t: model().guided(2.0)(X, t, torch.tensor([1, 2])),
}


@pytest.mark.parametrize("t", [0, -1, -50, 51, 1000])
@pytest.mark.parametrize("name", T_USES)
def test_a_level_outside_is_refused(name, t):
    with pytest.raises(InputError, match=rf"^t {t}: want a noise level, [01] to 50$"):
        T_USES[name](torch.tensor([5, t]))


@pytest.mark.parametrize("t", [-1, 51])
def test_the_gaussians_refuse_levels_outside(t):
    levels = torch.tensor([t])
    for call in (gaussian.q_sample, gaussian.q_posterior):
        with pytest.raises(InputError, match=rf"t {t}: want a noise level"):
            call(SCHEDULE, X, levels, X) if call is gaussian.q_sample else call(SCHEDULE, X, X, levels)
    for call in (gaussian.q, gaussian.q_step):
        with pytest.raises(InputError, match=rf"t {t}: want a noise level"):
            call(SCHEDULE, X, levels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_levels_are_integers(dtype):
    with pytest.raises(InputError, match="want int64"):
        model()(X, torch.ones(2, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_levels_of_small_integers_are_those_of_int64(dtype):
    t = torch.tensor([1, 50])
    assert torch.equal(losses.vlb(model(), X, t.to(dtype), ENDS[:2]), losses.vlb(model(), X, t, ENDS[:2]))


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small", "learned", "learned_range"])
@pytest.mark.parametrize("predict", ["eps", "x0", "mu", "v"])
@pytest.mark.parametrize("scale", [None, 1.0, 2.0])
def test_one_level_stands_for_all_images(predict, variance, scale):
    denoiser = model(predict=predict, variance=variance)
    denoiser = denoiser if scale is None else denoiser.guided(scale)
    for y in (None, torch.tensor([1, 2])):
        one, each = (denoiser(X, torch.tensor(t), y) for t in ([9], [9, 9]))
        for field in ("x0", "eps", "mean"):
            assert torch.equal(getattr(one, field), getattr(each, field))
        assert torch.equal(one.log_variance.expand_as(each.log_variance), each.log_variance)


@pytest.mark.parametrize("x", [torch.ones(2, 1, 4, 4, dtype=torch.uint8), torch.ones(2, 1, 4, 4, dtype=torch.int64)])
def test_pixels_in_the_signals_place_are_refused(x):
    """Their coefficients would be rounded to 0 or 1, and the result would still look like a tensor."""
    for call in (gaussian.q_sample, lambda s, x, t, eps: losses.simple(model(), x, t, eps)):
        with pytest.raises(InputError, match="want the signal"):
            call(SCHEDULE, x, torch.tensor([5, 6]), X)
    with pytest.raises(InputError, match="grey levels off"):  # not compared after rounding to x's own dtype
        pixels.on_grid(0 * x)


FLOWS = {
    "probability_flow": lambda d, y: ode.probability_flow(d, X, torch.ones_like(X), 5, y),
    "bound": lambda d, y: ode.bound(d, pixels.to_signal(pixels.to_pixels(X)), X * 0 + 0.5, torch.ones_like(X), 5, y),
    "decoder_bound": lambda d, y: ode.decoder_bound(d, pixels.to_signal(pixels.to_pixels(X)), X, X * 0 + 1, 5, y),
}


@pytest.mark.parametrize("name", FLOWS)
def test_the_flow_works_in_inference_mode(name):
    want = FLOWS[name](model(), torch.tensor([1, 2]))
    with torch.inference_mode():
        assert torch.equal(FLOWS[name](model(), torch.tensor([1, 2])), want)


def test_tables_that_inference_mode_computed_serve_training():
    """They are cached, and autograd cannot save an inference tensor."""
    fresh = schedule.linear(20)
    with torch.inference_mode():
        within = schedule.linear(30)
        for s in (fresh, within):
            d = Denoiser(lambda x, timestep, y: 0.3 * x, s, predict="mu")
            last(samplers.ancestral(d, X, DRAWS))
            likelihood.vlb(d, pixels.to_signal(pixels.to_pixels(X)), DRAWS)
    for s in (fresh, within):
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        d = Denoiser(lambda x, timestep, y, scale=scale: scale * x, s, predict="mu")
        losses.vlb(d, X.double(), torch.tensor([1, 9]), X.double()).sum().backward()
        losses.simple(replace(d, predict="v"), X.double(), torch.tensor([1, 9]), X.double()).sum().backward()
        assert scale.grad.isfinite()

"""Images of other numbers than 8 bits: their signal, their bins (Eq. 13), the bound of one pixel, and the density."""

import math
from dataclasses import replace

import mpmath
import numpy as np
import pytest
import torch

from ddpm import gaussian, likelihood, ode, pixels, samplers, schedule
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError
from ddpm.gaussian import Gaussian
from ddpm.noise import per_image
from ddpm.pixels import Values
from ddpm.presets import PRESETS
from ddpm.run.advice import advice

DEEP, TWELVE = Values("uint16", 0, 65535), Values("uint16", 100, 4195)


@pytest.mark.parametrize("values", [DEEP, TWELVE, Values("uint8", 3, 7)])
def test_every_integer_comes_back(values):
    """Also the low bytes, through float32, and from anywhere within half a bin."""
    numbers = torch.arange(int(values.low), int(values.high) + 1, dtype=torch.int32).to(values.torch)
    signal = pixels.to_signal(numbers, values)
    assert (signal[0], signal[-1], signal.dtype) == (-1, 1, torch.float32)
    np.testing.assert_allclose(signal.numpy(), np.linspace(-1, 1, len(numbers)), atol=1.2e-7)
    for nudge in (0, -0.49, 0.49):
        exact = torch.linspace(-1, 1, len(numbers), dtype=torch.float64) + nudge * values.bin
        assert torch.equal(pixels.to_pixels(exact, values), numbers)
    assert torch.equal(pixels.to_pixels(signal, values), numbers)
    beyond = torch.tensor([-3.0, 3.0, torch.inf])
    assert pixels.to_pixels(beyond, values).tolist() == [values.low, values.high, values.high]


def test_an_exact_denoiser_gives_reflectances_of_the_right_brightness():
    """Dark and bright bands of little contrast in 0..10000, as of satellites: neither v nor clipping shifts a mean."""
    values, s = Values("uint16", 0, 10_000), schedule.log_snr(1000, 4e-8)
    mean, std = torch.tensor([300.0, 1300, 2500, 6000]), torch.tensor([60.0, 200, 450, 300])  # reflectances
    m, variance = (2 * each.double().view(1, 4, 1, 1) / 10_000 for each in (mean, std))
    m, variance = m - 1, variance.square()

    def network(x, timestep, y):
        abar = s.alpha_bar[timestep + 1].view(-1, 1, 1, 1)
        x = x.double()
        x0 = m + abar.sqrt() * variance / (abar * variance + 1 - abar) * (x - abar.sqrt() * m)
        eps = (x - abar.sqrt() * x0) / (1 - abar).sqrt()
        return abar.sqrt() * eps - (1 - abar).sqrt() * x0

    noise = per_image(range(16), (4, 16, 16))
    denoiser = Denoiser(network, s, "v", "fixed_large", values=values)
    *_, last = samplers.ancestral(denoiser, noise(1000), noise, steps=250)
    found = pixels.to_pixels(last.x, values).double()
    error = std / math.sqrt(16 * 256)
    assert (((found.mean((0, 2, 3)) - mean) / error).abs() < 5).all()
    assert ((found.std((0, 2, 3)) / std - 1).abs() < 0.1).all()


def test_floats_come_back_in_their_own_range():
    """A range far from 0 keeps the digits that float32 has there."""
    values = Values("float32", 1000, 1001)
    x = torch.linspace(1000, 1001, 1001)
    again = pixels.to_pixels(pixels.to_signal(x, values), values)
    assert (again - x).abs().max() <= 2**-14  # the spacing of float32 at 1000
    with pytest.raises(InputError, match=r"pixel_type float32: has no bins .*want uint8 or uint16, or `ddpm evaluate"):
        _ = values.bin


@pytest.mark.parametrize("loss", ["vlb", "hybrid"])
def test_floats_have_no_bound_to_train(loss):
    """It is refused at once, and not at the first batch with level 1."""
    settings = {"loss": loss, "variance": "learned_range", "pixel_type": "float32"}
    with pytest.raises(InputError, match=f"loss {loss}: the bound of float32 images has no L_0"):
        replace(PRESETS["cifar10"], **settings)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (("uint8", 0, 256), r"value_range 0,256: want whole numbers in 0..255 for uint8"),
        (("uint16", -1, 5), r"want whole numbers in 0..65535"),
        (("uint16", 0, 1.5), r"want whole numbers"),
        (("float32", 1, 1), r"want LOW,HIGH with LOW below HIGH"),
        (("float32", 0, math.inf), r"want a finite number"),
        (("float32", 1e9, 1e9 + 1), r"cannot tell these numbers apart"),
        (("int8", 0, 1), r"pixel_type 'int8': want uint8, uint16, float32"),
    ],
)
def test_ranges_that_cannot_be(given, match):
    with pytest.raises(InputError, match=match):
        Values(*given)


def reference(x, mean, sigma, values):
    """log mass of the bin of the number x by mpmath, with 60 digits."""
    with mpmath.workdps(60):
        half, centre = mpmath.mpf(1) / (values.bins - 1), 2 * (x - values.low) / (values.bins - 1) - mpmath.mpf(1)
        low, high = (centre - half - mean) / sigma, (centre + half - mean) / sigma
        low = -mpmath.inf if x == values.low else low
        high = mpmath.inf if x == values.high else high
        if low > 0:  # mirrored, so that the difference is of small numbers
            low, high = -high, -low
        return float(mpmath.log(mpmath.ncdf(high) - mpmath.ncdf(low)))


def test_log_mass_of_bins_against_mpmath():
    """1,000 triples of a mean, a sigma and a bin, with sigmas from 1/10 bin to 10,000 bins, and tails to 40 sigmas.

    float64 is right to 1e-6. float32 knows the place of a 16-bit pixel to 0.004 bins only, so its log mass is wrong by
    up to 4 sigmas' density at that place: within 0.5% + 1e-2 nats for sigmas of at least a bin.
    """
    rng = np.random.default_rng(0)
    for k in range(1000):
        values = (pixels.EIGHT_BIT, DEEP, TWELVE)[k % 3]
        sigma = values.bin * 10 ** rng.uniform(-1, 4)
        x = int(rng.integers(values.low, values.high + 1)) if k % 10 else int((values.low, values.high)[k // 10 % 2])
        centre = 2 * (x - values.low) / (values.bins - 1) - 1
        mean = centre + rng.uniform(-40, 40) * sigma
        expected = reference(x, mpmath.mpf(mean), mpmath.mpf(math.exp(0.5 * (2 * math.log(sigma)))), values)
        p = Gaussian(torch.tensor([[mean]], dtype=torch.float64), torch.tensor([[2 * math.log(sigma)]]).double())
        p = replace(p, log_variance=torch.tensor([[2 * math.log(sigma)]], dtype=torch.float64))
        x0 = torch.tensor([[centre]], dtype=torch.float64)
        assert likelihood.decoder_log_prob(x0, p, values).item() == pytest.approx(expected, rel=1e-6, abs=1e-12)
        if sigma >= values.bin:
            single = Gaussian(p.mean.float(), p.log_variance.float())
            result = likelihood.decoder_log_prob(x0.float(), single, values).item()
            assert result == pytest.approx(expected, rel=5e-3, abs=1e-2)


def one_pixel(values, sd, T=400):
    """One pixel whose value is `sd` values around the middle: its pmf over all values, and its exact denoiser."""
    middle = (values.low + values.high) / 2
    z = (np.arange(values.bins) + values.low - middle) / sd
    pmf = np.exp(-0.5 * z**2)
    pmf /= pmf.sum()
    s = schedule.log_snr(T, values.bin**2)
    likely = pmf > 1e-60  # the others change no digit
    grid = torch.linspace(-1, 1, values.bins, dtype=torch.float64)[torch.from_numpy(likely)]
    log_pmf = torch.from_numpy(pmf[likely]).log()

    def exact(x, timestep, y):  # E[x_0 | x_t], by the sum over all values
        abar = s.alpha_bar[timestep + 1].view(-1, 1)
        log_weight = log_pmf - (x.double().view(-1, 1) - abar.sqrt() * grid) ** 2 / (2 * (1 - abar))
        return (log_weight.softmax(1) @ grid).view_as(x)

    return pmf, Denoiser(exact, s, "x0", "fixed_large", False, values)


def bound_of(denoiser, pmf, values, n=64):
    rng = np.random.default_rng(1)
    numbers = torch.from_numpy(rng.choice(values.bins, n, p=pmf) + int(values.low)).to(values.torch)
    x0 = pixels.to_signal(numbers.view(n, 1, 1, 1), values).double()
    bound = likelihood.vlb(denoiser, x0, per_image(range(n), (1, 1, 1)))
    nats = bound.prior + bound.kl.sum(1) + bound.decoder
    minus_log_pmf = -np.log(pmf[(numbers.double().numpy() - values.low).astype(int)])
    return nats.numpy(), minus_log_pmf


@pytest.mark.parametrize("sd", [2.0, 300.0])
def test_the_bound_of_one_pixel_of_16_bits(sd):
    """With the exact denoiser, the bound lies above -log of the pmf, which is a sum over all 65,536 values.

    A negative control: bins of 8 bits give a number that no code could reach.
    """
    pmf, denoiser = one_pixel(DEEP, sd)
    nats, truth = bound_of(denoiser, pmf, DEEP)
    error = (nats - truth).std() / math.sqrt(len(nats))
    assert truth.mean() == pytest.approx(math.log(sd * math.sqrt(2 * math.pi * math.e)), rel=0.1)
    assert -3 * error < (nats - truth).mean() < 0.6  # for the steps are finite
    x0 = torch.zeros(64, 1, 1, 1, dtype=torch.float64)
    wide = replace(denoiser, values=pixels.EIGHT_BIT)
    with pytest.raises(InputError, match="grey levels off the 256"):
        likelihood.vlb(wide, x0 + DEEP.bin, per_image(range(64), (1, 1, 1)))
    p = denoiser(x0, torch.tensor([1])).p
    gain = likelihood.decoder_log_prob(x0, p) - likelihood.decoder_log_prob(x0, p, DEEP)
    assert (nats - gain.mean().item()).mean() < truth.mean() - 0.2


def bits_of_gaussian_pixels(sd, s):
    """The bound of independent 16-bit Gaussian pixels with the exact denoiser, bits/dim."""
    draws = sd * torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x0 = pixels.to_signal(pixels.to_pixels(draws, DEEP), DEEP)

    def exact(x, timestep, y):
        abar = s.alpha_bar[timestep + 1].view(-1, 1, 1, 1)
        return abar.sqrt() * sd**2 / (abar * sd**2 + 1 - abar) * x

    bound = likelihood.vlb(Denoiser(exact, s, "x0", "fixed_small", False, DEEP), x0, per_image(range(4), (1, 8, 8)))
    return float(bound.bits_per_dim().mean())


def test_small_first_steps_need_a_schedule_for_them():
    """A small beta_1 alone ruins the linear schedule: its second level is thousands of times noisier than the first.

    log_snr reaches 16-bit pixels by steps that are all alike.
    """
    few, wide = 3 * DEEP.bin, 0.3
    entropy = {sd: math.log2(sd / DEEP.bin * math.sqrt(2 * math.pi * math.e)) for sd in (few, wide)}
    for sd in (few, wide):
        assert entropy[sd] < bits_of_gaussian_pixels(sd, schedule.log_snr(1000, DEEP.bin**2)) < entropy[sd] + 0.8
    assert bits_of_gaussian_pixels(few, schedule.linear()) > 9 > entropy[few]
    assert bits_of_gaussian_pixels(wide, schedule.linear(1000, DEEP.bin**2)) > 1000 > entropy[wide]


def test_schedule_log_snr():
    """Even steps of log-SNR from twice beta_1 on; the first two levels are as far apart as the linear schedule's."""
    s = schedule.log_snr(100, 1e-6)
    steps = s.half_log_snr[2:].diff()
    torch.testing.assert_close(steps, steps[0].expand_as(steps), rtol=1e-6, atol=0)
    assert 1 - float(s.alpha_bar[1]) == pytest.approx(1e-6, rel=1e-9)
    assert float(gaussian.beta_tilde(s)[1]) == pytest.approx(0.5e-6, rel=1e-3)
    for T in (1, 2, 3):
        assert schedule.log_snr(T).T == T


def test_a_run_of_16_bits_is_told_of_a_schedule_that_is_too_coarse():
    """242 of 65,536 values, as the paper's schedule has; what is recommended is not warned of."""
    deep = replace(PRESETS["cifar10"], pixel_type="uint16")
    [line] = advice(deep, schedule.linear())
    assert "sigma_1, the standard deviation of p(x_0 | x_1), is 242 of 65,536 pixel values" in line
    assert "so L_0 costs at least 9.2 bits/dim" in line
    assert "leave out init, and use schedule" in next(advice(replace(deep, init="digits"), schedule.linear()))
    beta_1, also = line.rpartition("beta_1 ")[2].split(" ", 1)
    assert also == "and timestep_sampling lognormal"
    better = replace(deep, schedule="log_snr", beta_1=float(beta_1), timestep_sampling="lognormal")
    assert not list(advice(better, schedule.log_snr(1000, float(beta_1))))
    assert not list(advice(PRESETS["grey16"], schedule.log_snr(1000, PRESETS["grey16"].beta_1)))
    assert not list(advice(PRESETS["cifar10"], schedule.linear()))


def test_density_scales_with_the_units():
    """Data and range times 10 move -log p by exactly ln 10 a dimension. Data of a known law have its density."""
    mean, sd, s = torch.tensor([0.2, -0.1, 0.3]).view(1, 3, 1, 1).double(), 0.3, schedule.cosine()

    def exact(x, timestep, y):
        abar = s.alpha_bar[timestep + 1].view(-1, 1, 1, 1)
        return mean + abar.sqrt() * sd**2 / (abar * sd**2 + 1 - abar) * (x - abar.sqrt() * mean)

    x = mean + sd * torch.randn(8, 3, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nats = []
    for scale in (1.0, 10.0):
        values = Values("float32", 5 * scale, 9 * scale)
        denoiser = Denoiser(exact, s, "x0", clip=False, values=values)
        nats.append(ode.density(denoiser, x, torch.ones_like(x), steps=200))
    difference = (nats[1] - nats[0]) / 3
    torch.testing.assert_close(difference, torch.full_like(difference, math.log(10)), rtol=1e-12, atol=0)
    in_units = sd * 2  # a signal of 2 is a range of 4
    expected = (0.5 * ((x - mean) / sd) ** 2 + 0.5 * math.log(2 * math.pi * in_units**2)).flatten(1).sum(1)
    torch.testing.assert_close(nats[0], expected, rtol=0, atol=0.02)

"""Randomness as an argument: each image has a seed, and each level a draw that never changes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ddpm.noise import ahead, generator, mix, normal, per_image

quick = settings(max_examples=40, derandomize=True)
seeds = st.integers(-(2**63), 2**63 - 1)


def test_mix_is_splitmix64():
    """It gives the first outputs of SplitMix64 (Steele et al. 2014) without the lowest bit, on every platform."""
    assert mix(0) == 0xE220A8397B1DCDAF >> 1
    assert mix(1234567) == 6457827717110365317 >> 1


def test_mix_golden_values():
    """A change of these values would change every published image and sample."""
    assert mix(0, 1000) == 7829281757581613445
    assert mix(1, 2) == 6804074658870690613
    assert mix(2, 1) == 8085905411993364802
    assert mix(-1, 0) == mix(2**64 - 1, 0) == 3377987053190985883


@quick
@given(st.lists(seeds, min_size=1, max_size=4), st.lists(seeds, min_size=1, max_size=4))
def test_mix_depends_on_all_keys_and_their_order(a, b):
    """The results have 63 bits and differ for different keys."""
    assert 0 <= mix(*a) < 2**63
    assert (mix(*a) == mix(*b)) == (a == b)
    assert mix(*a) != mix(*a, 0)


@quick
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=6), st.integers(1, 1000), st.randoms())
def test_noise_of_an_image_depends_on_its_seed_only(batch, t, random):
    """Row i depends on seeds[i] and t, but not on the batch, on its order or on earlier draws."""
    whole = per_image(batch, (1, 4, 4))(t)
    order = list(range(len(batch)))
    random.shuffle(order)
    shuffled = per_image([batch[i] for i in order], (1, 4, 4))
    shuffled(t + 1)
    torch.rand(5)  # changes the global state
    assert torch.equal(shuffled(t), whole[order])
    for i, seed in enumerate(batch):
        assert torch.equal(per_image([seed], (1, 4, 4))(t)[0], whole[i])


def test_global_state_is_not_touched():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    per_image([1, 2], (3, 8, 8))(7)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_shape_and_dtype():
    draw = per_image([1, 2], (3, 8, 6))(7)
    assert draw.shape == (2, 3, 8, 6)
    assert draw.dtype == torch.float32
    assert torch.equal(normal([1, 2], (3, 8, 6), 7), draw)


def test_golden_draws():
    """Each draw is that of a new Philox with `mix` as its key. A faster implementation must give these numbers."""
    draws = normal([5, 6], (3, 5, 5), 1000)
    assert draws.flatten()[[0, 74, 75, 149]].tolist() == pytest.approx(
        [-0.0503861, -0.3045058, 0.77803, -1.0228629], abs=1e-6
    )
    for row, seed in zip(draws, [5, 6], strict=True):
        fresh = np.random.Generator(np.random.Philox(key=mix(seed, 1000)))
        assert np.array_equal(fresh.standard_normal((3, 5, 5), np.float32), row.numpy())


@pytest.mark.parametrize("levels", [[], [7], list(range(30, 0, -1)), [3, 3]])
def test_drawn_ahead(levels):
    """Drawing ahead in threads changes no bit. The caller may stop at any level, but may not skip one."""
    noise, plain = ahead([5, 6, 7], (3, 8, 8), "cpu", levels), per_image([5, 6, 7], (3, 8, 8))
    assert all(torch.equal(noise(t), plain(t)) for t in levels)
    early = ahead([5], (3, 8, 8), "cpu", [9, 8, 7, 6, 5, 4, 3])
    early(9)
    with pytest.raises(AssertionError):
        early(5)


def correlation(a, b):
    """sqrt(n) times the absolute correlation; without the sign it is standard normal for independent samples."""
    return (torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] * a.numel() ** 0.5).abs().item()


def test_levels_and_images_are_uncorrelated():
    """Neighbouring levels and seeds are uncorrelated. Negative control: a mixture of two is detected."""
    noise = per_image([0, 1], (3, 64, 64))
    draws = [noise(t) for t in (1, 2, 3, 1000)]
    flat = [row for draw in draws for row in draw]
    assert max(correlation(a, b) for i, a in enumerate(flat) for b in flat[:i]) < 4.5
    assert correlation(flat[0], flat[1] + 0.1 * flat[0]) > 9


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 1), (1, 3, 5)])
def test_noise_is_standard_normal(shape):
    """Mean, variance and the Kolmogorov-Smirnov test over seeds and levels. An error of 5% in scale or place fails."""
    n = 20_000
    per_call = 50 * torch.Size(shape).numel()
    x = torch.cat([per_image(range(50), shape)(t).flatten() for t in range(1, max(2, n // per_call + 1))]).double()
    n = len(x)
    assert abs(x.mean()) * n**0.5 < 4.5
    assert abs(x.var() - 1) * (n / 2) ** 0.5 < 4.5
    assert stats.kstest(x.numpy(), "norm").pvalue > 1e-3
    assert stats.kstest(1.05 * x.numpy(), "norm").pvalue < 1e-2
    assert stats.kstest(x.numpy() + 0.05, "norm").pvalue < 1e-2


def test_different_seeds_give_different_generators():
    """Nearby keys, and keys in another order, give different draws."""
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (2**40,), (-1,)]
    draws = {torch.rand(2, generator=generator(*k), dtype=torch.float64).sum().item() for k in keys}
    assert len(draws) == len(keys)


def test_no_two_of_fifty_thousand_images_share_their_noise():
    """The mixes of seeds 5405 and 28053 at T = 1000 agree in the lower 32 bits, but their x_T differ."""
    assert mix(5405, 1000) != mix(28053, 1000)
    a, b = per_image([5405, 28053], (3, 8, 8))(1000)
    assert not torch.equal(a, b)

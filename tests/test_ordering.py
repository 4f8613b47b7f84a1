"""Every order of an epoch is a permutation, a function of (seed, epoch), and as random as it says."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm.files.data import Shards, order, ordering
from ddpm.noise import generator

seeds = st.integers(0, 2**63)
epochs = st.integers(0, 2**40)
shards = st.builds(
    Shards, st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any), window=st.integers(1, 200)
)


def epoch_of(found, seed, epoch):
    return ordering.windowed(found, seed, epoch, 0, int(found.ends[-1]))


# -- the keyed bijection -----------------------------------------------------------------------------------------------


@given(st.integers(1, 5000), seeds, epochs)
@settings(max_examples=100)
def test_the_keyed_order_is_a_permutation(n, seed, epoch):
    found = ordering.keyed(n, np.arange(n), seed, epoch)
    assert found.dtype == np.int64
    assert np.array_equal(np.sort(found), np.arange(n))
    assert np.array_equal(ordering.keyed(n, np.arange(n)[3:40], seed, epoch), found[3:40])  # any part by itself


@given(st.integers(2**25 + 1, 2**40), seeds, epochs)
@settings(max_examples=30)
def test_the_keyed_order_of_many_has_no_image_twice(n, seed, epoch):
    places = np.unique(np.concatenate([np.arange(2000), np.random.default_rng(0).integers(0, n, 2000), [n - 1]]))
    found = ordering.keyed(n, places, seed, epoch)
    assert len(np.unique(found)) == len(places)
    assert found.min() >= 0
    assert found.max() < n


def chi_squared_fits(bins, k):
    """Whether numbers in 0..k-1 are uniform: the statistic is within five standard deviations of its mean."""
    counts = np.bincount(bins, minlength=k)
    want = len(bins) / k
    return ((counts - want) ** 2 / want).sum() < k - 1 + 5 * np.sqrt(2 * (k - 1))


def test_the_keyed_order_is_as_random_as_a_permutation():
    """Over epochs, one place is uniform, and so are pairs of neighbours; within an epoch, so are differences."""
    n, k = 3 * 2**24 + 5, 8
    found = np.stack([ordering.keyed(n, np.arange(1000, 1002), 5, epoch) for epoch in range(10_000)])
    bins = found * k // n
    assert chi_squared_fits(bins[:, 0], k)
    assert chi_squared_fits(bins[:, 0] * k + bins[:, 1], k * k)
    one = ordering.keyed(n, np.arange(100_000), 5, 0)
    assert chi_squared_fits(np.diff(one) % n * 100 // n, 100)
    assert chi_squared_fits(one % 97, 97)
    assert not chi_squared_fits(np.arange(100_000) * k // n, k)  # negative control
    assert not chi_squared_fits(np.diff(np.arange(100_000) * 7919 % n) % n * 100 // n, 100)


def test_the_keyed_order_takes_over_from_the_array(monkeypatch):
    """Up to ARRAY images the order is what it was; above, it is the bijection. Resuming costs nothing at any place."""
    assert torch.equal(order(50, 3, 0, 50), torch.randperm(50, generator=generator(3, 0, 0x0DE5)))
    monkeypatch.setattr(ordering, "ARRAY", 49)
    stream = torch.cat([order(50, 3, step, 20) for step in range(5)])
    for epoch in (0, 1):
        assert torch.equal(stream[50 * epoch :][:50], torch.from_numpy(ordering.keyed(50, np.arange(50), 3, epoch)))
    far = order(10**12, 3, 10**14, 256)
    assert len(far.unique()) == 256


# -- shards that are read in order -------------------------------------------------------------------------------------


@given(shards, seeds, epochs)
@settings(max_examples=150)
def test_the_windowed_order_is_a_permutation_with_bounded_distances(found, seed, epoch):
    line, n = epoch_of(found, seed, epoch), int(found.ends[-1])
    assert np.array_equal(np.sort(line), np.arange(n))
    place = np.empty(n, np.int64)
    place[line] = np.arange(n)
    shuffled, ends = ordering._shuffled_shards(found, seed, epoch)
    begins = dict(zip(shuffled.tolist(), (ends - np.asarray(found.sizes)[shuffled]).tolist(), strict=True))
    first = found.ends - np.asarray(found.sizes)
    for shard, size in enumerate(found.sizes):
        mine = place[first[shard] : first[shard] + size]
        assert (abs(mine - (begins[shard] + np.arange(size))) < found.window).all()
        assert (abs(np.diff(mine)) < 2 * found.window).all()


@given(shards, seeds, st.integers(0, 400), st.integers(1, 90))
@settings(max_examples=100)
def test_the_windowed_order_is_one_stream(found, seed, step, batch):
    """A step's images do not depend on what was asked before, and epochs follow each other."""
    n = int(found.ends[-1])
    epochs = range(step * batch // n, ((step + 1) * batch - 1) // n + 1)
    stream = np.concatenate([epoch_of(found, seed, epoch) for epoch in epochs])
    begin = step * batch - epochs[0] * n
    assert np.array_equal(order(n, seed, step, batch, found).numpy(), stream[begin : begin + batch])
    again = Shards(list(found.sizes), found.window)
    assert torch.equal(order(n, seed, step, batch, again), order(n, seed, step, batch, found))


def test_epochs_and_windows_differ():
    found = Shards([50] * 20, 100)
    lines = [epoch_of(found, seed, epoch) for seed in range(3) for epoch in range(3)]
    for i, one in enumerate(lines):
        for other in lines[:i]:
            assert (one == other).mean() < 0.1
    whole = epoch_of(Shards([50] * 20, 10**6), 0, 0)
    steps = np.abs(np.diff(whole))
    assert 200 < steps.mean() < 450  # of a full shuffle it is n / 3
    assert (np.diff(epoch_of(Shards([50] * 20, 1), 0, 0)) == 1).sum() >= 20 * 49  # without a window, in order


def test_wrong_shards_are_refused():
    with pytest.raises(ValueError, match="shards of 5 images"):
        order(5, 0, 0, 2, Shards([3, 3], 4))
    with pytest.raises(ValueError, match="window >= 1"):
        order(6, 0, 0, 2, Shards([3, 3], 0))

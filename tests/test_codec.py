"""The codec on the exact denoiser of a Gaussian random field, whose entropy is known in closed form."""

import json
import math
import tracemalloc
import zlib
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from exact import GaussianData
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from scipy import stats

from ddpm import codec, pixels, schedule
from ddpm.codec import archive, container, entropy, fit, picture, plan, progressive, reverse, shared
from ddpm.codec.entropy import Damaged, Decoder, Encoder, EndOfPrefix, PrefixDecoder, frequencies
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError

SHAPE = (3, 8, 8)
D = math.prod(SHAPE)
SCHEDULE = schedule.linear(1000)


def field():
    """A Gaussian field with correlated colours and neighbours, and noise of two grey levels."""
    c, y, x = np.meshgrid(*map(np.arange, SHAPE), indexing="ij")
    position = np.stack([c.ravel() * 1.5, y.ravel(), x.ravel()], 1)
    distance = np.sqrt(((position[:, None] - position[None]) ** 2).sum(2))
    return GaussianData(
        torch.zeros(SHAPE).double(), torch.from_numpy(0.12 * np.exp(-(distance**2) / 32) + 2.5e-4 * np.eye(D))
    )


DATA = field()
VALUES, VECTORS = torch.linalg.eigh(DATA.covariance)
DRIFT = {"size": 0.0}


def network(x, timestep, y=None):
    """E[x_0 | x_t], plus an error of size DRIFT. For images of other sizes it is only similar to E[x_0 | x_t]."""
    abar = SCHEDULE.alpha_bar[timestep + 1].view(-1, 1)
    if x.shape[1:] != SHAPE:
        return x.double() * (abar.sqrt() / (abar + 4 * (1 - abar))).view(-1, 1, 1, 1)
    gain = abar.sqrt() * VALUES / (abar * VALUES + 1 - abar)
    x0 = ((x.double().flatten(1) @ VECTORS * gain) @ VECTORS.T).view_as(x)
    return x0 + DRIFT["size"] * torch.sin(1e3 * x0)


def mse():
    """E|x_0 - x0^(x_t)|^2 / D at levels 1..T."""
    abar = SCHEDULE.alpha_bar[1:, None]
    return ((1 - abar) * VALUES / (abar * VALUES + 1 - abar)).mean(1)


def draws(n, seed=0):
    """Pictures drawn from the field, uint8 [n, C, H, W]."""
    return pixels.to_pixels(DATA.sample(n, torch.Generator().manual_seed(seed)))


def hwc(images):
    """The images as a list of arrays [H, W, C]."""
    return list(images.permute(0, 2, 3, 1).contiguous().numpy())


@pytest.fixture(scope="module")
def model():
    denoiser = Denoiser(network, SCHEDULE, predict="x0")
    error = mse().expand(2, -1)
    images = draws(16, seed=1)
    gain = fit.gains(denoiser, images)
    tables = {bits: fit.fit(denoiser, error, images, gain, bits) for bits in (6, 10)}
    chain = fit.fit_chain(denoiser, error, images, gain)
    return codec.Model(denoiser, denoiser, SHAPE, tables, b"test", chain, factor=4)


BANDS = {"_NEAR": 0.02, "_BANDED": 12}


@pytest.fixture(scope="module")
def in_bands():
    """The same with tables of a few large groups. The groups of `model` are too small to be coded in bands."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in BANDS.items():
            patch.setattr(plan, name, value)
        patch.setattr(plan, "levels", lambda *_: [1000, 500, 250, 150, 100, 70, 45, 30, 18, 10, 5])
        denoiser = Denoiser(network, SCHEDULE, predict="x0")
        images = draws(16, seed=1)
        error, gain = mse().expand(2, -1), fit.gains(denoiser, images)
        tables = {bits: fit.fit(denoiser, error, images, gain, bits) for bits in (6, 10)}
        assert sum(group.banded(D) for group in tables[10].groups) == 5
    return codec.Model(denoiser, denoiser, SHAPE, tables, b"band", factor=4)


@pytest.fixture
def banded(in_bands, monkeypatch):
    for name, value in BANDS.items():
        monkeypatch.setattr(plan, name, value)
    return in_bands


@pytest.fixture(params=["model", "banded"])
def either(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def drift():
    """DRIFT, which is set back to 0 after the test."""
    yield DRIFT
    DRIFT["size"] = 0.0


# -- entropy coding ----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 1 << 30), min_size=2, max_size=40).filter(sum))
def test_frequencies_are_positive_and_sum_to_one(weights):
    found = frequencies(weights)
    assert found.min() >= 1
    assert found.sum() == 1 << entropy.BITS
    share = np.array(weights) / sum(weights)
    assert (np.abs(found / 2**entropy.BITS - share) < (len(weights) + 1) / 2**entropy.BITS).all()


@st.composite
def messages(draw):
    """The calls of an encoder, in order."""
    calls = []
    for _ in range(draw(st.integers(0, 30))):
        if draw(st.booleans()):
            table = frequencies(draw(st.lists(st.integers(0, 1000), min_size=2, max_size=9).filter(sum)))
            calls.append(("one", draw(st.integers(0, len(table) - 1)), table))
        elif draw(st.booleans()):
            bits = draw(st.integers(0, 23))
            calls.append(("bits", draw(st.integers(0, (1 << bits) - 1)), bits))
        else:
            table = frequencies([[1, 5, 1000], [7, 7, 0]])
            calls.append(("each", np.array(draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))), table))
    return calls


def encoded(message):
    """The bytes of a message, and its cost in bits."""
    encoder = Encoder()
    for kind, value, table in message:
        {"one": encoder.put, "bits": encoder.put_bits, "each": encoder.put_each}[kind](value, table)
    return encoder.finish(), encoder.bits


def same(decoder, message):
    """The number of symbols that are decoded before the first wrong one, or before the bytes are refused."""
    for count, (kind, value, table) in enumerate(message):
        try:
            found = {"one": decoder.get, "bits": decoder.get_bits, "each": decoder.get_each}[kind](table)
        except Damaged:
            return count
        if not np.array_equal(found, value):
            return count
    return len(message)


ONE, OTHER = np.array([1, 2**24 - 1]), np.array([2**24 - 1, 1])
PAIR = np.array([[16678, 83386, 16677152], [8388607, 8388608, 1]])
REFUSED = [  # without its last byte this is no message at all: no encoder writes such bytes
    ("one", 0, ONE), ("one", 0, ONE), ("each", np.array([0, 0]), PAIR), ("one", 0, ONE),
    ("each", np.array([0, 0]), PAIR), ("one", 0, OTHER), ("each", np.array([0, 0]), PAIR),
    ("each", np.array([0, 0]), PAIR), ("each", np.array([0, 2]), PAIR), ("each", np.array([1, 0]), PAIR),
    ("each", np.array([0, 0]), PAIR),
]  # fmt: skip


@example(REFUSED)
@given(messages())
def test_messages_are_decoded_and_take_hardly_more_bits_than_their_cost(message):
    data, bits = encoded(message)
    assert same(Decoder(data), message) == len(message)
    assert 8 * len(data) < bits + 8 + 0.1
    if 8 * len(data) > bits - 48:  # shorter files are not written, so that a decoder can limit its work
        assert data == b"" or same(Decoder(data[:-1]), message) < len(message)  # the last byte is needed


@given(messages(), st.data())
def test_symbols_from_a_prefix_are_right(message, data):
    text, bits = encoded(message)
    cut = text[: data.draw(st.integers(0, len(text)))]
    decoder, taken = PrefixDecoder(cut), 0.0
    for kind, value, table in message:
        try:
            found = {"one": decoder.get, "bits": decoder.get_bits, "each": decoder.get_each}[kind](table)
        except EndOfPrefix:
            break
        expected = np.atleast_1d(value)[: np.size(found)]
        assert np.array_equal(np.atleast_1d(found), expected)
        if kind == "each":
            taken += encoded([(kind, expected, table[: len(expected)])])[1]
            if len(expected) < len(value):
                break
        else:
            taken += encoded([(kind, value, table)])[1]
    else:
        taken = bits
    assert taken >= min(bits, 8 * len(cut) - 8) - 24 * 2  # nearly all symbols that the bytes determine


def test_a_prefix_of_many_symbols():
    values, flat = np.random.default_rng(0).integers(0, 4, 4000), np.stack([frequencies([1, 1, 1, 1])] * 4000)
    text, _ = encoded([("each", values, flat)])
    found = PrefixDecoder(text[:900]).get_each(flat)
    assert 3596 <= len(found) <= 3600
    assert np.array_equal(found, values[: len(found)])


def test_few_bytes_cannot_hold_many_symbols():
    decoder, table = Decoder(b"\x00"), frequencies([3, 1])
    with pytest.raises(Damaged, match="more symbols than its bytes allow"):
        [decoder.get(table) for _ in range(1000)]


def test_cdf_is_the_normal_distribution_function():
    z = np.linspace(-9, 9, 10001)
    found = entropy.cdf(z) / 2**32
    assert np.abs(found - stats.norm.cdf(z)).max() < 1e-6
    assert (np.diff(entropy.cdf(z)) >= 0).all()


# -- shared randomness and reverse-channel coding ----------------------------------------------------------------------


def test_normals_are_normal_and_can_be_drawn_from_any_position():
    z = shared.normals(1 << 16, 5)
    assert stats.kstest(z, "norm").pvalue > 1e-3
    assert np.array_equal(shared.normals(160, 5)[64:], shared.normals(96, 5, first=4))
    assert not np.array_equal(shared.normals(16, 5), shared.normals(16, 6))


def ordered(race, bits, *keys):
    return reverse.winner(race, bits, *keys)


def picked(race, bits, *keys):
    return reverse.Picker(b"", *keys).pick(race)


def drawn(take, pad, bits=4, dims=6, count=1500):
    """Coded draws from a target with a divergence of `bits` from N(0, 1), standardised by the target.

    There are 2^(bits + pad) candidates, and `take` chooses one of them.
    """
    variance = 0.5
    base = dims / 2 * (variance - 1 - math.log(variance)) / math.log(2)
    mean = np.full(dims, math.sqrt(2 * math.log(2) * (bits - base) / dims))
    z = []
    for keys in ((seed, 0, 1) for seed in range(count)):
        [race] = reverse.races([reverse.Draw(mean, variance, 1, bits + pad, keys)])
        z.append(reverse.draw(np.array([take(race, bits + pad, *keys)]), dims, bits + pad, *keys))
    return (np.stack(z) - mean) / math.sqrt(variance)


@pytest.mark.parametrize("take", [ordered, picked])
def test_coded_draws_follow_the_target_only_with_enough_candidates(take):
    good, bad = drawn(take, pad=7), drawn(take, pad=0)
    n = good.size
    assert abs(good.mean()) < 4.5 / math.sqrt(n)
    assert abs(good.var() - 1) < 4.5 * math.sqrt(2 / n)
    assert stats.kstest(good.ravel(), "norm").pvalue > 1e-3
    assert abs(bad.mean()) > 10 / math.sqrt(n)
    assert stats.kstest(bad.ravel(), "norm").pvalue < 1e-6


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 1 << 20))
@settings(max_examples=30)
def test_each_index_sets_the_dimensions_of_its_own_chunk(dims, chunks, seed):
    chunks = min(dims, chunks)
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, 64, chunks)
    z = reverse.draw(indices, dims, 6, seed)
    assert (z != 0).mean() > 0.9  # one in 65,536 normals is 0
    other = reverse.draw(np.where(np.arange(chunks) == 0, (indices + 1) % 64, indices), dims, 6, seed)
    assert 1 <= (z != other).sum() <= -(-dims // chunks)


def test_races_do_not_depend_on_what_is_weighed_together(monkeypatch):
    mean = np.random.default_rng(0).normal(size=500)
    draws = [reverse.Draw(mean, 0.7, 3, bits, (1, i)) for i, bits in enumerate([10, 10, 9, 10])]
    whole = list(reverse.races(draws))
    monkeypatch.setattr(reverse, "_HELD", 1 << 10)  # one block of 64 at a time
    for a, b in zip(whole, (race for one in draws for race in reverse.races([one])), strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_weighing_a_wide_chunk_takes_little_memory():
    list(reverse.races([reverse.Draw(np.zeros(64), 0.9, 1, 12, (1,))]))  # the table
    tracemalloc.start()
    try:
        list(reverse.races([reverse.Draw(np.full(200_000, 1e-3), 0.999, 1, 12, (1,))]))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 48 << 20  # all products at once would be 98 MiB


def test_frequencies_of_candidates_are_their_weights():
    """They equal q / p in float64, and candidates below 2^-20 of the largest weight are left out."""
    mean, variance, bits, keys = np.random.default_rng(0).normal(size=20), 0.6, 8, (3, 4)
    [race] = reverse.races([reverse.Draw(mean, variance, 1, bits, keys)])
    z = np.stack([reverse.draw(np.array([i]), 20, bits, *keys) for i in range(1 << bits)])
    log_w = (z**2 / 2 - (z - mean) ** 2 / (2 * variance)).sum(1)
    w = np.exp(log_w - log_w.max())
    found = np.zeros(1 << bits)
    found[race.candidates] = race.frequency / 2**24
    assert np.abs(found - w / w.sum()).max() < 0.01 * found.max()
    assert set(np.flatnonzero(w > 2**-19)) <= set(race.candidates) <= set(np.flatnonzero(w > 2**-21))


# -- candidates picked by a message ------------------------------------------------------------------------------------

RACES = st.lists(st.lists(st.integers(0, 1 << 20), min_size=1, max_size=9).filter(sum), max_size=60)


@given(RACES, st.binary(max_size=200), st.integers(0, 1 << 40))
def test_a_message_is_recovered_from_the_picks(weights, message, key):
    """`message_of` gives the used part of the message for any frequencies; the rest was not read."""
    picker = reverse.Picker(message, key)
    slots = []
    for chances in weights:
        possible = np.flatnonzero(chances)
        race = reverse.Race(possible, frequencies(np.array(chances)[possible]))
        slots.append(race.slot(picker.pick(race)))
    back = reverse.message_of(picker.state, slots, key)
    used = picker.used
    assert back[: len(used)] == used
    assert not back[len(used) :].strip(b"\0")
    bits = sum(24 - math.log2(chance) for chance, _ in slots)
    assert abs(8 * len(back) - bits - 32) < 9


@given(RACES.filter(len), st.binary(min_size=50, max_size=50), st.integers(0, (1 << 40) - 1))
def test_another_state_or_pick_is_refused_or_gives_another_message(weights, message, wrong):
    picker = reverse.Picker(message, 1)
    slots = []
    for chances in weights:
        possible = np.flatnonzero(chances)
        race = reverse.Race(possible, frequencies(np.array(chances)[possible]))
        slots.append(race.slot(picker.pick(race)))
    if wrong != picker.state:
        try:
            assert reverse.message_of(wrong, slots, 1) != reverse.message_of(picker.state, slots, 1)
        except Damaged:
            pass
    with pytest.raises(Damaged, match="a candidate that no encoder takes"):
        race.slot(99)


@given(st.binary(min_size=1, max_size=40), st.integers(0, 60))
def test_known_bits_equal_those_of_the_pixels_and_leave_the_others_open(values, count):
    pixel = np.frombuffer(values, np.uint8)
    text = progressive.low_bits(pixel)[:count]
    low, mask = progressive.known_bits(text, len(pixel))
    assert np.array_equal(pixel & mask, low)
    assert sum(int(w).bit_count() for w in mask) == min(8 * len(text), 8 * len(pixel))
    even = np.full((len(pixel), 256), 1 << 16, np.int64)
    found = progressive.frequencies_given_bits(even, low, mask)
    assert (found.sum(1) == 1 << 24).all()
    assert (found[np.arange(len(pixel)), pixel] >= (1 << 16) * 0.99).all()
    possible = (np.arange(256) & mask[:, None]) == low[:, None]
    assert (found[~possible] <= 1).all() or not mask.any()


def test_bits_back_makes_files_smaller(banded, monkeypatch):
    """A file is smaller if low bits of pixels choose the candidates, and it is still exact."""
    images = hwc(draws(6, seed=9))
    with_bits_back = [codec.compress(banded, image) for image in images]
    assert all(np.array_equal(codec.decompress(banded, a), b) for a, b in zip(with_bits_back, images, strict=True))
    monkeypatch.setattr(picture, "_picks_by_pixels", lambda tiles, tables: False)
    plain = [codec.compress(banded, image) for image in images]
    assert all(np.array_equal(codec.decompress(banded, a), b) for a, b in zip(plain, images, strict=True))
    saved = [len(a) - len(b) for a, b in zip(plain, with_bits_back, strict=True)]
    assert 4 < np.mean(saved) < 30


# -- the plan ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [0.2, 8e-3])
def test_plan_is_the_cheapest_of_all_groupings(most):
    s = schedule.linear(9, 1e-3, 0.6)
    error = torch.linspace(1e-4, most, 9).double().expand(3, -1) * torch.tensor([[0.5], [1.0], [2.0]]).double()
    snr = s.alpha_bar / (1 - s.alpha_bar)

    def cost(path):
        total = 0.0
        for t, lower in pairwise(path):
            kl = 500 * 0.5 * torch.log2(1 + (snr[lower] - snr[t]) * error[:, t - 1])
            chunks = (kl / 12).clamp(min=1)
            above = chunks * torch.log2(kl / chunks + 1)
            if error[:, t - 1].mean() < 4e-3:  # in bands, if the group has enough bits
                above = torch.where(kl < 40, above, 3 * chunks.clamp(min=3))
            total += float((kl + above).mean()) + 4
        last = error[:, path[-1] - 1] * 127.5**2 + 1 / 12
        return total + 500 * max(0.05, float((0.5 * torch.log2(2 * math.pi * math.e * last)).mean()))

    paths = [[9, *(t for t in range(8, 0, -1) if chosen >> t & 1)] for chosen in range(0, 512, 2)]
    assert plan.levels(s, error, 500, 12, np.zeros(9), 4.0) == min(paths, key=cost)


def test_tables_are_read_from_json_and_damaged_ones_are_refused(model):
    values = model.tables[6].to_json()
    assert plan.Tables.from_json(values) == model.tables[6]
    for key, wrong in (("levels", [3, 5]), ("mse", [-1.0]), ("bits", 60), ("spread", [64]), ("scales", [1])):
        with pytest.raises(InputError, match="calibrate again"):
            plan.Tables.from_json({**values, key: wrong})


def test_group_is_the_posterior_of_the_schedule_between_two_levels():
    from ddpm.gaussian import beta_tilde, posterior_coefficients

    t, s = 300, 250
    group = plan.Group(t, s, float(SCHEDULE.alpha_bar[t]), float(SCHEDULE.alpha_bar[s]), 0.01)
    two = SCHEDULE.respace([s, t])
    c_0, c_x = posterior_coefficients(two, torch.tensor([2]))
    expected = (float(c_0), float(c_x), float(beta_tilde(two)[2]))
    assert group.coefficients == pytest.approx(expected, rel=1e-10)
    snr = SCHEDULE.alpha_bar / (1 - SCHEDULE.alpha_bar)
    assert group.divergence(0) == pytest.approx(0.5 * math.log2(1 + float(snr[s] - snr[t]) * 0.01), rel=1e-9)
    assert group.error(3) == pytest.approx(0.01 * 2**1.5)
    assert group.error(-3) == pytest.approx(0.01 * 2**-1.5)


# -- one picture -------------------------------------------------------------------------------------------------------

ADVERSARIAL = {
    "black": np.zeros((8, 8, 3), np.uint8),
    "white": np.full((8, 8, 3), 255, np.uint8),
    "checkerboard": (np.indices((8, 8, 3)).sum(0) % 2 * 255).astype(np.uint8),
    "noise": np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8),
    "greys": np.arange(192, dtype=np.uint8).reshape(8, 8, 3) + 64,
    "saturated": np.where(np.random.default_rng(1).random((8, 8, 3)) < 0.5, 0, 255).astype(np.uint8),
    "one pixel": np.full((1, 1, 3), 77, np.uint8),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("local", [False, True])
def test_adversarial_images_are_decoded_exactly(either, name, local):
    image = ADVERSARIAL[name]
    assert np.array_equal(codec.decompress(either, codec.compress(either, image, bits=6, local=local)), image)


@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 3]), st.booleans(), st.integers(0, 1 << 30))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_grey_and_colour_pictures_of_any_size_are_decoded_exactly(either, height, width, channels, whole, seed):
    image = np.random.default_rng(seed).integers(100, 140, (height, width, channels), np.uint8)
    data = codec.compress(either, image, bits=6, whole=whole, seed=seed)
    assert np.array_equal(codec.decompress(either, data), image)
    assert codec.read_header(data)[0].width == width


def test_grey_network_codes_colours_as_three_tiles():
    data = GaussianData(torch.zeros(1, 4, 4).double(), 0.05 * torch.eye(16).double())
    grey = Denoiser(
        lambda x, t, y: data.denoise(x.double(), SCHEDULE.alpha_bar[t + 1].view(-1, 1, 1, 1)), SCHEDULE, "x0"
    )
    error = torch.stack([data.x0_covariance(a).trace() / 16 for a in SCHEDULE.alpha_bar[1:]]).expand(2, -1)
    images = pixels.to_pixels(data.sample(8, torch.Generator().manual_seed(0)))
    model = codec.Model(grey, grey, (1, 4, 4), {6: fit.fit(grey, error, images, fit.gains(grey, images), 6)}, b"grey")
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    assert np.array_equal(codec.decompress(model, codec.compress(model, image)), image)


def limit():
    """The entropy of the field on 256 grey levels, bits/dim: no lossless codec needs fewer bits on average."""
    return float(DATA.entropy()) / math.log(2) / D - math.log2(pixels.BIN)


def test_rate_is_near_the_entropy_of_the_data(model):
    images = hwc(draws(12, seed=2))
    size = {bits: [len(codec.compress(model, image, bits=bits)) for image in images] for bits in (6, 10)}
    container = 17 + 11
    rate = {bits: 8 * (np.mean(found) - container) / D for bits, found in size.items()}
    assert limit() < rate[10] < 1.2 * limit()
    assert rate[10] < rate[6]


def test_noise_is_not_compressed(model):
    image = ADVERSARIAL["noise"]
    assert 8 * len(codec.compress(model, image, bits=6)) >= 8 * image.size


def test_every_prefix_decodes_and_more_bytes_show_more(either):
    lengths = (16, 18, 20, 22, 24, 40, 90, 1000)
    error = np.zeros(len(lengths))
    for image in hwc(draws(8, seed=3)):
        data = codec.compress(either, image, bits=10)
        for i, length in enumerate(lengths):
            found = codec.decompress(either, data[:length])
            error[i] += np.mean((found.astype(float) - image) ** 2)
    assert (np.diff(error) <= 0).all()
    assert (np.diff(error[:4]) < 0).all()
    assert error[-1] == 0


def test_every_prefix_of_a_file_gives_a_picture_or_an_error(either):
    image = hwc(draws(1, seed=4))[0]
    data = codec.compress(either, image, bits=6)
    _, begin = codec.read_header(data)
    groups, known, error = [], [], []
    for length in range(begin):
        with pytest.raises(Damaged):
            codec.decompress(either, data[:length])
    for length in range(begin, len(data), 2):  # every second one, to save time
        *_, last = codec.pictures(either, data[:length])
        groups.append(last.groups)
        known.append(last.pixels)
        error.append(np.mean((last.image.astype(float) - image) ** 2))
        assert (last.image == image).sum() >= last.pixels
        assert not last.exact
        assert not last.whole
    assert groups == sorted(groups)
    assert groups[0] == 0
    assert groups[-1] == len(either.tables[6].groups)
    assert known == sorted(known)
    assert known[0] == 0
    assert known[-1] == image.size
    in_pixels = [e for e, group in zip(error, groups, strict=True) if group == groups[-1]]
    assert (np.diff(in_pixels) <= 0).mean() > 0.8  # true pixels take the place of x0^
    assert in_pixels[-1] == 0
    *_, last = codec.pictures(either, data, at=begin + 40)
    assert last.groups == groups[20]
    header, _ = codec.read_header(data)
    for at in range(begin + header.length - 2, len(data) + 2):  # the checksums after the payload add no pixels
        *_, last = codec.pictures(either, data, at=at)
        assert last.exact == np.array_equal(last.image, image) == (at >= begin + header.length)


def test_what_is_known_of_a_file_shows_its_prefixes_without_the_network(either):
    """Prefixes of lossless and lossy files: the same last picture, and no call."""
    image, calls = hwc(draws(1, seed=4))[0], []
    counting = replace(either, tick=calls.append)
    for lossy in ({}, {"psnr": 20.0}):
        data, known = codec.compress(either, image, bits=6, **lossy), []
        *_, whole = codec.pictures(counting, data, known=known)
        header, begin = codec.read_header(data)
        assert len(known) == len(calls) == header.groups + 1
        assert {x0.dtype for x0 in known} == {np.dtype(np.int16)}  # of a large picture they fill the memory
        for at in (*range(begin, len(data), 7), len(data)):
            *_, shown = codec.pictures(counting, data, at, known)
            *_, fresh = codec.pictures(either, data, at)
            assert np.array_equal(shown.image, fresh.image)
            assert shown._replace(image=None) == fresh._replace(image=None)
        assert np.array_equal(shown.image, whole.image)
        assert len(calls) == header.groups + 1
        calls.clear()


def test_pictures_get_better_and_the_last_is_exact(either):
    image = hwc(draws(1, seed=5))[0]
    seen = list(codec.pictures(either, codec.compress(either, image, bits=10)))
    error = [np.mean((p.image.astype(float) - image) ** 2) for p in seen]
    assert error[-1] == 0
    assert error[-2] < error[len(error) // 2] < error[0]
    assert [p.exact for p in seen] == [False] * (len(seen) - 1) + [True]


@pytest.mark.parametrize("rate", [1.2, 1.6, 2.0])
def test_lossy_files_keep_to_their_rate(model, rate):
    image = hwc(draws(1, seed=6))[0]
    data = codec.compress(model, image, bits=6, bits_per_dim=rate)
    assert 0.75 * rate - 0.3 < 8 * len(data) / D <= rate
    *_, last = codec.pictures(model, data)
    assert last.whole
    assert not last.exact


def test_lossy_files_reach_their_psnr(model):
    image = hwc(draws(1, seed=7))[0]
    sizes = []
    for psnr in (20.0, 26.0, 60.0):
        data = codec.compress(model, image, bits=6, psnr=psnr)
        error = np.mean((codec.decompress(model, data).astype(float) - image) ** 2)
        assert error == 0 if psnr == 60 else 10 * math.log10(255**2 / error) >= psnr
        sizes.append(len(data))
    assert sizes == sorted(set(sizes))
    assert codec.decompress(model, codec.compress(model, image, bits=6, bits_per_dim=20.0)).tolist() == image.tolist()


def reheaded(data, payload, **changes):
    """A file with another payload and right checksums."""
    header, _ = codec.read_header(data)
    text = replace(header, length=len(payload), lossless=False, **changes).to_bytes() + payload
    return text + zlib.crc32(text).to_bytes(4, "big")


def test_random_payload_decodes_to_a_sample(either):
    """A codec that hides the picture elsewhere, or that does not use the model, fails here."""
    image = hwc(draws(1, seed=8))[0]
    data = codec.compress(either, image, bits=6)
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(96):
        try:
            samples.append(codec.decompress(either, reheaded(data, rng.bytes(400))))
        except Damaged:  # a scale out of range
            continue
        if len(samples) == 40:
            break
    assert len(samples) > 30
    x = torch.stack([pixels.to_signal(torch.from_numpy(s)).permute(2, 0, 1).double() for s in samples]).flatten(1)
    along = ((x @ VECTORS[:, -4:]) ** 2).mean(0)
    assert (along > 0.1 * VALUES[-4:]).all()
    assert (along < 5 * VALUES[-4:]).all()
    across = ((x @ VECTORS[:, :100]) ** 2).mean()
    assert across < 0.5 * along.min()  # the samples are smooth, as the field is


def test_walks_that_share_calls_give_what_they_give_alone(model):
    """Some end early and some have another size. Walks of one size share one call at each level."""
    images = [*hwc(draws(2, seed=8)), ADVERSARIAL["noise"], np.full((9, 20, 3), 90, np.uint8)]
    each = replace(model, batches=True)
    for options in ({}, {"psnr": 20.0}, {"bits_per_dim": 4.0}):
        alone = [codec.compress(model, image, bits=6, local=True, **options) for image in images]
        assert list(codec.compress_each(each, images, bits=6, local=True, **options)) == alone
        assert list(codec.compress_each(model, images, bits=6, local=True, **options)) == alone
    assert list(codec.compress_each(each, images[:1], bits=6)) == [codec.compress(model, images[0], bits=6)]

    calls = []
    tables = model.tables[6]
    walks = [progressive.walk(tables, progressive.start((n, 1, 2, 2), 0), lambda *_: True) for n in (1, 3)]

    def predict(x, level):
        calls.append((len(x), level))
        return x

    first, second = progressive.run_together(predict, walks)
    assert (first.shape, second.shape) == ((1, 1, 2, 2), (3, 1, 2, 2))
    assert calls == [(4, level) for level in tables.levels]


def test_a_prefix_of_a_local_file_from_another_machine_shows_no_wrong_pixels(model, drift):
    """A whole file has checksums of x. From a prefix of a local file of another machine only x0^ is shown."""
    image = hwc(draws(1, seed=9))[0]
    data = codec.compress(model, image, bits=6, local=True)
    *_, last = codec.pictures(model, data[:-20])
    assert last.pixels > 50
    drift["size"] = 1e-2
    *_, last = codec.pictures(replace(model, where=b"??"), data[:-20])
    assert (last.groups, last.pixels) == (len(model.tables[6].groups), 0)
    with pytest.raises(Damaged, match="another x than the writer's"):
        codec.decompress(model, data, at=len(data) - 20)


def test_swapped_payloads_swap_pictures(model):
    a, b = hwc(draws(2, seed=9))
    files = [codec.compress(model, image, bits=6, bits_per_dim=2.5) for image in (a, b)]
    payloads = [data[codec.read_header(data)[1] : -4] for data in files]
    for data, payload, expected, other in ((files[0], payloads[1], b, a), (files[1], payloads[0], a, b)):
        found = codec.decompress(model, reheaded(data, payload)).astype(float)
        assert np.mean((found - expected) ** 2) < 0.2 * np.mean((found - other) ** 2)


def test_a_cut_file_with_a_wrong_byte_shows_what_there_is(banded):
    """If the picks are impossible, it shows x0^ and the pixels before them, and raises no error."""
    data = codec.compress(banded, hwc(draws(1, seed=21))[0])
    _, begin = codec.read_header(data)
    seen, pixels_of = 0, []
    for at in range(begin + 10, len(data) - 12, 3):
        wrong = bytearray(data[:-12])
        wrong[at] ^= 0x55
        with suppress(Damaged):  # the wrong byte gives a wrong index or scale
            *_, last = codec.pictures(banded, bytes(wrong))
            assert not last.exact
            pixels_of.append(last.pixels)
            seen += 1
    assert seen > 10
    assert len(set(pixels_of)) > 1


def test_every_flipped_bit_is_refused(either):
    data = codec.compress(either, hwc(draws(1, seed=10))[0], bits=6)
    rng = np.random.default_rng(0)
    for bit in rng.choice(8 * len(data), min(200, 8 * len(data)), replace=False):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(InputError):
            codec.decompress(either, bytes(flipped))


HEADERS = st.builds(
    codec.Header, st.integers(0, 40), st.integers(0, 40), st.integers(0, 3), st.sampled_from([5, 6, 10]), st.booleans(),
    st.booleans(), st.booleans(), st.sampled_from([b"test", b"band", b"else"]), st.integers(0, 1 << 30),
    st.integers(0, 99), st.integers(0, 300), st.just(b""),
)  # fmt: skip


@given(st.none() | HEADERS, st.binary(max_size=300), st.booleans())
@example(codec.Header(3, 4, 3, 6, False, False, True, b"test", 0, 1, 9), b"", False)  # one tile of its own size
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_crash_the_decoder(either, header, data, whole):
    """Any payload after any header, or none, with right checksums if `whole`, gives a picture or an InputError."""
    if header is not None:
        if header.local:
            header = replace(header, where=either.where)
        if whole:
            header = replace(header, length=len(data))
            data = data + bytes(header.trailer - 4)
        data = header.to_bytes() + data
        if whole:
            data += zlib.crc32(data).to_bytes(4, "big")
    try:
        found = codec.decompress(either, data)
    except InputError:
        return
    assert header is not None
    assert found.shape == (header.height, header.width, header.channels)


def test_pictures_with_too_many_tiles_are_refused_before_memory_is_used(model):
    """The number of pixels is accepted, but nearly all values of the tiles lie outside the picture."""
    header = codec.Header(1, 1 << 24, 3, 6, False, False, False, b"test", 0, 3, 9)
    with pytest.raises(InputError, match=r"1x16777216: 2,097,152 tiles of 402,653,184 values"):
        codec.decompress(model, header.to_bytes())
    with pytest.raises(InputError, match="want 1 to 16,777,216 pixels"):
        codec.decompress(model, replace(header, width=2).to_bytes())


def test_other_files_are_refused(model):
    image = ADVERSARIAL["black"]
    data = codec.compress(model, image, bits=6)
    cases = {
        "of model": data[:5] + b"elsewhere"[:4] + data[9:],
        "version 2": data[:3] + bytes([0x21]) + data[4:],
        "not a file of": b"PNG" + data[3:],
        "0 bytes": b"",
        "more than the file has": data + b"x",
        "ends within its header": data[:7],
    }
    for message, wrong in cases.items():
        if message == "of model":
            header, begin = codec.read_header(data)
            wrong = replace(header, identity=b"else").to_bytes() + data[begin:]
        with pytest.raises(Damaged, match=message):
            codec.decompress(model, wrong)


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (np.zeros((8, 8, 4), np.uint8), {}, "want uint8"),
        (np.zeros((8, 8, 3), np.float32), {}, "want uint8"),
        (np.zeros((0, 8, 3), np.uint8), {}, "0"),
        (ADVERSARIAL["black"], {"bits": 7}, "bits 7: the model is calibrated for 6, 10"),
        (ADVERSARIAL["black"], {"bits_per_dim": -1.0}, "bits_per_dim -1.0"),
        (ADVERSARIAL["black"], {"bits_per_dim": 1e-3}, "an empty file of this picture takes"),
        (ADVERSARIAL["black"], {"bits_per_dim": 1.0, "psnr": 30.0}, "one of the two"),
        (ADVERSARIAL["black"], {"seed": -1}, "seed -1"),
    ],
)
def test_wrong_settings_are_refused(model, image, options, message):
    with pytest.raises(InputError, match=message):
        codec.compress(model, image, **options)


def test_a_little_drift_is_decoded_exactly_and_more_is_refused(either, drift):
    images = hwc(draws(4, seed=11))
    files = [codec.compress(either, image, bits=6) for image in images]
    drift["size"] = 1e-11
    for data, image in zip(files, images, strict=True):
        assert np.array_equal(codec.decompress(either, data), image)
    drift["size"] = 1e-3
    for data in files:
        with pytest.raises(Damaged, match=r"another x|not those that were written"):
            codec.decompress(either, data)


def test_an_undecided_rounding_takes_another_seed(either, monkeypatch):
    image = hwc(draws(1, seed=12))[0]
    assert codec.read_header(codec.compress(either, image, bits=6))[0].seed == 0
    real, calls = progressive.Predictor.__call__, []

    def undecided(self, x, level):
        calls.append(level)
        if len(calls) < 4:
            raise progressive.Undecided
        return real(self, x, level)

    monkeypatch.setattr(progressive.Predictor, "__call__", undecided)
    data = codec.compress(either, image, bits=6)
    assert codec.read_header(data)[0].seed == 3
    assert np.array_equal(codec.decompress(either, data), image)


def test_undecided_depends_on_the_distance_to_a_rounding_boundary():
    grid = torch.full((1, 1, 1, 2), 100.5 / 1024).double()
    near = Denoiser(lambda x, t, y: grid + 1e-12, SCHEDULE, "x0")
    far = Denoiser(lambda x, t, y: grid + 1e-6, SCHEDULE, "x0")
    with pytest.raises(progressive.Undecided):
        progressive.Predictor(near, careful=True, check=True)(np.zeros((1, 1, 1, 2)), 5)
    assert (progressive.Predictor(far, careful=True, check=True)(np.zeros((1, 1, 1, 2)), 5) == 101 / 1024).all()


def test_group_costs_add_up_to_the_file(either):
    data = codec.compress(either, hwc(draws(1, seed=13))[0], bits=6)
    header, _ = codec.read_header(data)
    rows = list(picture.group_costs(either, data))
    assert sum(row.bits for row in rows) == pytest.approx(8 * header.length)
    assert [row.t for row in rows] == list(either.tables[6].levels)
    assert rows[0].rmse > rows[-1].rmse
    with pytest.raises(Damaged, match=r"\b5\b"):
        list(picture.group_costs(either, reheaded(data, b"", bits=5)))
    for cut in (data[:-1], data[:40]):
        with pytest.raises(Damaged, match="cut short"):
            list(picture.group_costs(either, cut))


# -- archives ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 1 << 30), st.floats(0.05, 3), st.floats(0.1, 8))
@settings(max_examples=30)
def test_push_restores_the_stack(seed, sigma, fine):
    rng = np.random.default_rng(seed)
    bottom = rng.bytes(4000)
    stack, normal = archive.Stack(), archive.GridNormal(sigma, sigma / fine)
    stack.push_bytes(bottom)
    mean = rng.normal(size=100) * 3
    k = stack.pop(mean, normal)
    far = np.where(np.arange(100) % 17 == 0, k + 3000, k)  # beyond the table
    stack.push(far, mean, normal)
    assert np.array_equal(stack.pop(mean, normal), far)
    stack.push(k, mean, normal)
    assert stack.pop_bytes() == bottom
    assert stack.empty()


def test_popped_numbers_are_normal():
    normal, rng = archive.GridNormal(0.7, 0.1), np.random.default_rng(0)
    mean = rng.normal(size=5000)
    stack = archive.Stack()
    stack.push_bytes(rng.bytes(40_000))
    z = (stack.pop(mean, normal) * 0.1 + rng.uniform(-0.05, 0.05, 5000) - mean) / 0.7
    assert stats.kstest(z, "norm").pvalue > 1e-3


@pytest.fixture(scope="module")
def archived(model):
    images = hwc(draws(40, seed=14))
    names = [f"picture {i}" for i in range(len(images))]
    return images, names, archive.compress(model, images, names, bits=10)


def test_archive_is_decoded_exactly(model, archived):
    images, names, data = archived
    found = list(archive.decompress(model, data))
    assert [name for name, _ in found] == names
    assert all(np.array_equal(a, b) for a, (_, b) in zip(images, found, strict=True))


def test_archive_is_near_the_entropy_after_its_first_pictures(model, archived):
    images, _, data = archived
    contents, _ = container.read_contents(data)
    rest = 8 * (contents.stack - contents.file_bytes) / D / (contents.pictures - contents.files)
    assert rest < 1.04 * limit()
    single = np.mean([len(codec.compress(model, image, bits=10)) for image in images[:6]])
    assert contents.file_bytes == sum(len(codec.compress(model, i, bits=10)) for i in images[: contents.files])
    assert 8 * (contents.stack - contents.file_bytes) / 8 / (contents.pictures - contents.files) < single


def test_archive_of_one_picture_and_of_many_sizes(model):
    images = [ADVERSARIAL["noise"], *hwc(draws(8, seed=15)), ADVERSARIAL["one pixel"], np.zeros((9, 17, 1), np.uint8)]
    for some in (images[:1], images):
        found = list(archive.decompress(model, archive.compress(model, some, bits=6)))
        assert all(np.array_equal(a, b) for a, (_, b) in zip(some, found, strict=True))


def test_archive_with_wrong_bytes_is_refused(model, archived):
    *_, data = archived
    rng = np.random.default_rng(0)
    for bit in rng.choice(8 * len(data), 100, replace=False):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(InputError):
            list(archive.decompress(model, bytes(flipped)))
    for wrong in (data[:-1], data + b"x", data[:20], b""):
        with pytest.raises(InputError):
            list(archive.decompress(model, wrong))


@pytest.mark.parametrize(
    "about",
    [
        "", "{}", "[]", "[[], []]", "[[[]], []]", "[[{}], []]", "[[[1, 8]], []]", "[[[2, 8, 8, 3]], 5]",
        "[[[2, 0, 8, 3]], []]", "[[[2, -8, -8, 3]], []]", "[[[2, 8, 8, 2]], []]", "[[[2, 8, 8, 3, 1]], []]",
        "[[[1000000000000, 8, 8, 3]], []]", "[[[1, 8, 8, 3]], []]", "[[[true, 8, 8, 3], [1, 8, 8, 3]], []]",
        "[[[2, 100000, 100000, 3]], []]", '[[[2, 8, 8, 3]], ["a"]]', '[[[2, 8, 8, 3]], ["a", 7]]',
        "[[[2, 8.0, 8, 3]], []]", '[["2883"], []]', "[" * 100_000,
    ],
)  # fmt: skip
@pytest.mark.parametrize("stack", [bytes(4), bytes(range(64)), b""])
def test_forged_archive_with_wrong_sizes_or_names_is_refused(model, about, stack):
    """All lengths and checksums are right, but sizes, names or stack are not."""
    text = zlib.compress(about.encode())
    contents = container.Contents(False, 6, b"test", 2, 1, len(text), 100, len(stack), b"")
    data = contents.to_bytes() + text + stack + bytes(4)
    with pytest.raises(Damaged):
        list(archive.decompress(model, data + zlib.crc32(data).to_bytes(4, "big")))


def handmade(model, shape, stack, file_bytes=0):
    """An archive of one picture, in which only the stack may be wrong."""
    about, words = zlib.compress(json.dumps([[[1, *shape]], []]).encode()), stack.words()
    contents = container.Contents(False, 6, model.identity, 1, 1, len(about), file_bytes, len(words), b"")
    data = contents.to_bytes() + about + words + bytes(4)
    return data + zlib.crc32(data).to_bytes(4, "big")


def test_forged_archive_with_a_wrong_stack_is_refused(model):
    """All lengths and checksums of the archive itself are right."""
    (image,) = hwc(draws(1, seed=18))
    file = codec.compress(model, image, bits=6)

    def flagged(stack):
        stack.push_each(np.array([archive._FILE]), archive._ATTEMPTS[None])
        return stack

    def stacked(data):
        stack = archive.Stack()
        stack.push_bytes(data)
        return flagged(stack)

    long, more = archive.Stack(), archive.Stack()
    long.push_bytes(bytes(range(99)))
    long.push_bits(7, 16)
    long.push_bits(65535, 16)
    more.push_bytes(b"left over")
    more.push_bytes(file)
    middle = stacked(np.random.default_rng(0).bytes(4000))
    tile = picture.cut(image, archive._header(model, image.shape, False), model).pixels[0]
    archive._push(middle, archive._coder(model, False, check=True), tile)
    cases = [
        (image.shape, flagged(long), "longer than the stack"),
        (image.shape, flagged(more), "not empty at the end"),
        ((9, 8, 3), stacked(file), "of another size"),
        (image.shape, stacked(codec.compress(model, image, bits=6, psnr=20)), "not whole and lossless"),
        (image.shape, stacked(file[:-20]), "not whole and lossless"),
        (image.shape, stacked(b"no file at all, but of some length"), "not a file of"),
        ((8, 16, 3), middle, "in the middle of a picture"),
        (image.shape, stacked(file), "of other files than"),
    ]
    for shape, stack, message in cases:
        with pytest.raises(Damaged, match=message):
            list(archive.decompress(model, handmade(model, shape, stack)))
    with pytest.raises(
        Damaged, match="pixels: not those that were written"
    ):  # only the checksum of the pixels is wrong
        list(archive.decompress(model, handmade(model, image.shape, stacked(file), len(file))))


@pytest.mark.parametrize("zeros", range(6))
def test_stack_of_bytes_that_end_in_zeros(zeros):
    for length in range(24, 32):
        data, stack = bytes([1] * length + [0] * zeros), archive.Stack()
        stack.push_bytes(data)
        again = archive.Stack(stack.words())
        assert again.pop_bytes() == data
        assert again.empty()


def test_archive_stores_a_picture_as_a_file_if_the_stack_cannot_take_it(model, monkeypatch):
    images, push, calls = hwc(draws(12, seed=19)), archive.Coder.push, []

    def never(self, stack, tile):
        calls.append(tile)
        if np.array_equal(tile, images[9].transpose(2, 0, 1)):
            raise progressive.Undecided
        push(self, stack, tile)

    monkeypatch.setattr(archive.Coder, "push", never)
    data = archive.compress(model, images, bits=6)
    contents, _ = container.read_contents(data)
    assert contents.files < 10 < len(calls)
    monkeypatch.undo()
    found = list(archive.decompress(model, data))
    assert all(np.array_equal(a, b) for a, (_, b) in zip(images, found, strict=True))


def test_archive_checks_every_picture_first(model):
    images, done = hwc(draws(3, seed=17)), []
    with pytest.raises(InputError, match=r"float64 \[8, 8, 3\]: want uint8"):
        archive.compress(model, [*images, images[0] / 255], bits=6, tick=done.append)
    with pytest.raises(InputError, match=r"9000000x1: 1,125,000 tiles"):
        archive.compress(model, [*images, np.zeros((1, 9_000_000, 3), np.uint8)], bits=6, tick=done.append)
    assert not done


def test_archive_of_the_local_profile(model):
    images = hwc(draws(8, seed=20))
    data = archive.compress(model, images, bits=6, local=True)
    contents, _ = container.read_contents(data)
    assert contents.local
    assert contents.files < len(images)
    found = list(archive.decompress(model, data))
    assert all(np.array_equal(a, b) for a, (_, b) in zip(images, found, strict=True))


def test_archive_refuses_drift(model, archived, drift):
    *_, data = archived
    drift["size"] = 1e-3
    with pytest.raises(Damaged, match="network differs from the writer's"):
        list(archive.decompress(model, data))


def test_archive_tries_again_after_an_undecided_rounding(model, monkeypatch):
    images = hwc(draws(14, seed=16))
    real, calls = progressive.Predictor.__call__, []

    def undecided(self, x, level):
        calls.append(level)
        if self.check and len(calls) % 97 == 0:
            raise progressive.Undecided
        return real(self, x, level)

    monkeypatch.setattr(progressive.Predictor, "__call__", undecided)
    data = archive.compress(model, images, bits=6)
    assert len(calls) > 97
    found = list(archive.decompress(model, data))
    assert all(np.array_equal(a, b) for a, (_, b) in zip(images, found, strict=True))

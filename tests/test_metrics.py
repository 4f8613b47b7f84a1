"""Metrics against closed forms, SciPy and brute force; standard errors against the spread of estimates."""

import itertools

import mpmath
import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm import metrics
from ddpm.metrics import Moments, frechet_distance, inception_score, kid, moments, nearest, precision_recall


def rng(seed=0):
    return np.random.default_rng(seed)


def gaussian(n, d, seed=0, shift=0.0):
    return rng(seed).normal(size=(n, d)) + shift


def covariance(d, seed, rank=None):
    factor = gaussian(d, rank or d, seed)
    return factor @ factor.T


def known(covariance, mean=None):
    return Moments(None, np.zeros(len(covariance)) if mean is None else mean, covariance)


# -- moments -----------------------------------------------------------------------------------------------------------


@given(
    cuts=st.lists(st.integers(0, 20), max_size=4).map(sorted),
    d=st.integers(1, 4),
    seed=st.integers(0, 99),
    shift=st.sampled_from([0.0, 1e4]),
    brackets=st.randoms(use_true_random=False),
)
@settings(max_examples=100)
def test_moments_of_parts_add_up_to_those_of_the_whole(cuts, d, seed, shift, brackets):
    """Neighbouring parts are added in a random order. Parts may be empty or have one row."""
    x = gaussian(20, d, seed, shift)
    parts = [moments(x[a:b]) for a, b in itertools.pairwise([0, *cuts, 20])]
    while len(parts) > 1:
        i = brackets.randrange(len(parts) - 1)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    assert parts[0].count == 20
    np.testing.assert_allclose(parts[0].mean, x.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(parts[0].covariance, np.cov(x, rowvar=False).reshape(d, d), rtol=0, atol=1e-9)


def test_moments_do_not_lose_a_small_variance_beside_a_large_mean():
    """The last line is a negative control: sums of squares lose all digits of this variance."""
    x = gaussian(1000, 1, shift=1e9)
    whole = sum((moments(part) for part in np.split(x[10:], 99)), moments(x[:10]))
    assert whole.covariance[0, 0] == pytest.approx(x.var(ddof=1), rel=1e-6)
    assert abs((x**2).mean() - x.mean() ** 2 - x.var()) > 1


def test_moments_refuse_wrong_input():
    with pytest.raises(ValueError, match="finite"):
        moments([[1.0], [np.nan]])
    with pytest.raises(ValueError, match=r"\[N, D\]"):
        moments(np.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match="unknown count"):
        known(np.eye(2)) + moments(np.eye(2))


# -- Frechet distance --------------------------------------------------------------------------------------------------


def sqrtm_distance(a, b):
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    delta = a.mean - b.mean
    return delta @ delta + np.trace(a.covariance + b.covariance - 2 * np.real(root))


@pytest.mark.parametrize("seed", range(5))
def test_frechet_distance_equals_scipys(seed):
    a, b = (known(covariance(10, seed + k), gaussian(10, 1, seed + k)[:, 0]) for k in (0, 50))
    assert frechet_distance(a, b) == pytest.approx(sqrtm_distance(a, b), rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-11)


def test_frechet_distance_of_commuting_covariances():
    """With shared eigenvectors it is |m_a - m_b|^2 + sum (sqrt l_a - sqrt l_b)^2."""
    basis = np.linalg.qr(gaussian(8, 8))[0]
    l, m = rng(1).uniform(0, 4, (2, 8))
    l[:2] = 0  # singular
    a, b = known(basis * l @ basis.T), known(basis * m @ basis.T, np.full(8, 0.5))
    assert frechet_distance(a, b) == pytest.approx(8 / 4 + ((np.sqrt(l) - np.sqrt(m)) ** 2).sum(), rel=1e-12)


def test_frechet_distance_is_that_of_coupled_gaussians():
    """The map x -> A x, A positive definite, is optimal: the distance is E|x - A x|^2 = tr((I - A) S (I - A))."""
    s, a = covariance(6, 0), covariance(6, 1)
    gap = np.eye(6) - a
    assert frechet_distance(known(s), known(a @ s @ a)) == pytest.approx(np.trace(gap @ s @ gap), rel=1e-9)


def test_frechet_distance_with_fewer_images_than_features():
    """Orthogonal supports have no cross term. A set is at distance 0 from itself, to 1e-12 and not to its root."""
    x = gaussian(20, 50)
    a = moments(np.hstack([x, 0 * x]))
    b = moments(np.hstack([0 * x, 3 * x]))
    assert frechet_distance(a, b) == pytest.approx(
        np.trace(a.covariance + b.covariance) + a.mean @ a.mean * 10, rel=1e-12
    )
    assert frechet_distance(a, a) < 1e-12 * np.trace(a.covariance)
    c = moments(np.hstack([x, 0 * x]) * 2)
    assert frechet_distance(a, c) == pytest.approx(np.trace(a.covariance) + a.mean @ a.mean, rel=1e-12)


def test_frechet_distance_accepts_a_covariance_that_rounding_made_indefinite():
    s = np.diag([1.0, -1e-17, 1e-18])
    assert frechet_distance(known(s), known(np.eye(3))) == pytest.approx(2)


def test_frechet_distance_of_samples_tends_to_that_of_their_distributions():
    a, b = moments(gaussian(20000, 4)), moments(2 * gaussian(20000, 4, 1, 0.5))
    assert frechet_distance(a, b) == pytest.approx(4 * 1 + 4 * 1, rel=0.03)
    with pytest.raises(ValueError, match="4 and of 3"):
        frechet_distance(a, known(np.eye(3)))


# -- KID ---------------------------------------------------------------------------------------------------------------


def brute_mmd(x, y):
    """The unbiased estimate of MMD^2 by plain loops over pairs."""

    def mean(a, b, same):
        pairs = [(p, q) for i, p in enumerate(a) for j, q in enumerate(b) if not (same and i == j)]
        return np.mean([(p @ q / len(p) + 1) ** 3 for p, q in pairs])

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


def test_kid_of_whole_sets_equals_brute_force():
    x, y = gaussian(12, 3), gaussian(12, 3, 1, 0.3)
    mean, error = kid(x, y)
    assert mean == pytest.approx(brute_mmd(x, y), rel=1e-12)
    rows = range(12)
    without = [brute_mmd(np.delete(x, i, 0), y) for i in rows] + [brute_mmd(x, np.delete(y, i, 0)) for i in rows]
    assert error == pytest.approx(np.sqrt(((mean - np.array(without)) ** 2).sum()), rel=1e-9)


def test_kid_of_subsets_is_their_mean():
    """Each subset uses all 5 rows of x, and the two subsets use 5 + 5 of the 10 rows of y."""
    x, y = gaussian(5, 3), gaussian(10, 3, 1)
    mean, _ = kid(x, y, subsets=2, seed=3)
    halves = [
        (brute_mmd(x, y[list(half)]) + brute_mmd(x, y[[i for i in range(10) if i not in half]])) / 2
        for half in itertools.combinations(range(10), 5)
    ]
    assert min(abs(mean - h) for h in halves) < 1e-12
    assert kid(x, y, subsets=2, seed=3) == kid(x, y, subsets=2, seed=3)
    assert len({kid(x, y, subsets=2, seed=s)[0] for s in range(5)}) > 1


@pytest.mark.parametrize("subsets", [2, 20], ids=["few subsets", "overlapping subsets"])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_kid_is_unbiased_with_a_correct_standard_error(shift, subsets):
    """The kernel's expectation has a closed form, and z = (estimate - truth)/error has standard deviation 1.

    E (x.y/D + 1)^3 is that of a polynomial in u = x.y: for x ~ N(a, I), y ~ N(b, I), independent,
    E u = a.b, E u^2 = D + |a|^2 + |b|^2 + (a.b)^2, E u^3 = (a.b)^3 + 3 (a.b)(D + 2 + |a|^2 + |b|^2).
    """
    d, runs = 4, 150
    a, b = np.zeros(d), np.full(d, shift)

    def expected(a, b):
        u, squares = a @ b, a @ a + b @ b
        return (u**3 + 3 * u * (d + 2 + squares)) / d**3 + 3 * (d + squares + u**2) / d**2 + 3 * u / d + 1

    truth = expected(a, a) + expected(b, b) - 2 * expected(a, b)
    draws = rng(7)
    estimates = np.array(
        [
            kid(
                draws.normal(size=(120, d)) + a,
                draws.normal(size=(100, d)) + b,
                subset_size=40,
                subsets=subsets,
                seed=s,
            )
            for s in range(runs)
        ]
    )
    assert abs(estimates[:, 0].mean() - truth) < 4 * estimates[:, 0].std() / np.sqrt(runs)
    spread, error = estimates[:, 0].std(), np.sqrt((estimates[:, 1] ** 2).mean())
    if shift:  # exact to first order
        assert 0.85 < spread / error < 1.1
        assert 0.85 < ((estimates[:, 0] - truth) / estimates[:, 1]).std() < 1.2
    else:  # same distribution: at most sqrt 2 times too large
        assert 0.85 / np.sqrt(2) < spread / error < 1.1


def test_the_spread_of_overlapping_subsets_is_too_small():
    """Negative control: the error that many programs report is smaller than the spread of the estimates."""
    draws = rng(8)
    means, naive = [], []
    for seed in range(40):
        x, y = draws.normal(size=(60, 4)), draws.normal(size=(60, 4)) + 0.5
        pick = rng(seed)
        one = [kid(pick.permutation(x)[:40], pick.permutation(y)[:40])[0] for _ in range(20)]
        means.append(np.mean(one))
        naive.append(np.std(one) / np.sqrt(20))
    assert np.std(means) > 3 * np.mean(naive)


def test_kid_refuses_wrong_input():
    with pytest.raises(ValueError, match="at least 3 rows per subset"):
        kid(gaussian(2, 3), gaussian(9, 3))
    with pytest.raises(ValueError, match="3 and 4 features"):
        kid(gaussian(9, 3), gaussian(9, 4))


# -- Inception score ---------------------------------------------------------------------------------------------------


def test_inception_score_at_its_ends():
    k = 5
    assert inception_score(np.full((40, k), 1 / k)) == pytest.approx((1, 0), abs=1e-12)
    assert inception_score(np.tile(np.eye(k), (20, 1)), seed=None) == pytest.approx((k, 0), abs=1e-12)
    assert inception_score(np.eye(k)[np.zeros(20, int)]) == pytest.approx((1, 0), abs=1e-12)  # always the same class


def test_inception_score_by_hand():
    """For (3/4, 1/4), (1/4, 3/4) the marginal is 1/2 and KL = 3/4 ln 3/2 + 1/4 ln 1/2. The second half scores 1."""
    p = np.array([[0.75, 0.25], [0.25, 0.75], [0.9, 0.1], [0.9, 0.1]])
    first = 1.5**0.75 * 0.5**0.25
    assert inception_score(p, splits=2, seed=None) == pytest.approx(((first + 1) / 2, (first - 1) / 2))
    assert inception_score(metrics.softmax(np.log(p[:2])), splits=1)[0] == pytest.approx(first)


def test_parts_of_unequal_size_cover_every_row():
    p = metrics.softmax(gaussian(23, 4))
    scores = [inception_score(p[i * 23 // 10 : (i + 1) * 23 // 10], 1)[0] for i in range(10)]
    assert inception_score(p, seed=None) == pytest.approx((np.mean(scores), np.std(scores)))


def test_the_order_of_the_rows_does_not_change_the_score():
    """Rows sorted by class would make ten parts of one class each, which score 1 where mixed rows score 9.3."""
    mixed = np.eye(10)[rng().permutation(np.arange(600) % 10)]
    by_class = mixed[np.argsort(mixed.argmax(1), kind="stable")]
    assert inception_score(by_class, seed=None)[0] == pytest.approx(1)
    scores = [inception_score(p, seed=seed)[0] for p in (mixed, by_class) for seed in range(5)]
    assert 9.1 < min(scores) < max(scores) < 9.5


def test_inception_score_refuses_logits():
    logits = gaussian(20, 4)
    with pytest.raises(ValueError, match="not probabilities"):
        inception_score(logits)
    with pytest.raises(ValueError, match="10 splits of 9 rows: want at least one row per split"):
        inception_score(np.full((9, 2), 0.5))
    np.testing.assert_allclose(metrics.softmax(logits), scipy.special.softmax(logits, 1), rtol=1e-12)


# -- precision and recall ----------------------------------------------------------------------------------------------


def brute_precision_recall(real, fake, k):
    def share(points, centres):
        radius = np.sort(np.linalg.norm(centres[:, None] - centres, axis=2), 1)[:, k]  # the first is the point itself
        return (np.linalg.norm(points[:, None] - centres, axis=2) <= radius).any(1).mean()

    return share(fake, real), share(real, fake)


@pytest.mark.parametrize("block", [7, 1024])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_recall_equals_brute_force(k, block):
    real, fake = gaussian(60, 3), gaussian(50, 3, 1, 1.0) * 1.5
    expected = brute_precision_recall(real, fake, k)
    assert 0.1 < min(expected)
    assert max(expected) < 0.95
    assert precision_recall(real, fake, k, block=block) == expected


def test_precision_recall_at_its_ends():
    x = gaussian(50, 4)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)
    one_mode = np.vstack([x, x + 100])
    assert precision_recall(one_mode, x) == (1, 0.5)  # all fakes real, half of the reals missed
    assert precision_recall(x, one_mode) == (0.5, 1)


def test_a_collapsed_generator_has_no_recall():
    """If all fakes are one real image, their balls have radius 0 and contain only that image."""
    real = gaussian(50, 64, shift=30.0)
    assert precision_recall(real, np.repeat(real[:1], 50, 0)) == (1, 1 / 50)


def far_row(n, d, seed):
    x = gaussian(n, d, seed)
    x[0] += 1e8
    return x


def two_clusters(n, d, seed):
    return gaussian(n, d, seed) + np.where(np.arange(n) % 2, 1e7, -1e7)[:, None]


def repeated(n, d, seed):
    return np.repeat(gaussian(n // 5, d, seed, 30.0), 5, 0)


def near_copies(n, d, seed):
    return 1e4 + 1e-4 * gaussian(n, d, seed)


SETS = [far_row, two_clusters, repeated, near_copies]


@pytest.mark.parametrize("block", [7, 1024])
@pytest.mark.parametrize("fake", SETS)
@pytest.mark.parametrize("real", SETS)
def test_precision_recall_of_hard_sets_equals_brute_force(real, fake, block):
    """The expanded square is off by more than the distances here; comparisons that it leaves open are made exactly."""
    a, b = real(60, 5, 0), fake(50, 5, 1)
    assert precision_recall(a, b, block=block) == brute_precision_recall(a, b, 3)
    assert precision_recall(a, 0.5 * (a + a.mean(0)), 5, block=block) == brute_precision_recall(
        a, 0.5 * (a + a.mean(0)), 5
    )


@pytest.mark.parametrize("make", SETS)
def test_the_other_metrics_of_hard_sets_equal_exact_arithmetic(make):
    """The Frechet distance against sums of 60 digits, as far as the covariances have them; KID against brute force."""
    a, b = make(40, 3, 0), make(40, 3, 1)
    size = max(np.trace(moments(x).covariance) for x in (a, b))
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(
        exact_frechet(a, b), rel=1e-6, abs=1e-14 * max(size, 1)
    )
    assert frechet_distance(moments(a), moments(a)) <= 1e-14 * size
    if make is not near_copies:  # the cubes of 1e4 that KID is made of do not differ in float64, whoever sums them
        assert kid(a, b)[0] == pytest.approx(brute_mmd(a, b), rel=1e-6)


def exact_frechet(a, b):
    with mpmath.workdps(60):

        def gaussian_of(x):
            n, d = x.shape
            x = mpmath.matrix(x.tolist())
            mean = [mpmath.fsum(x[i, j] for i in range(n)) / n for j in range(d)]
            for i in range(n):
                for j in range(d):
                    x[i, j] -= mean[j]
            return mpmath.matrix(mean), x.T * x / (n - 1)

        (mean_a, cov_a), (mean_b, cov_b) = gaussian_of(a), gaussian_of(b)
        values, vectors = mpmath.eigsy(cov_a)
        root = vectors * mpmath.diag([mpmath.sqrt(max(v, 0)) for v in values]) * vectors.T
        cross = mpmath.eigsy(root * cov_b * root, eigvals_only=True)
        traces = sum(cov_a[i, i] + cov_b[i, i] for i in range(a.shape[1]))
        return float(
            mpmath.norm(mean_a - mean_b) ** 2 + traces - 2 * mpmath.fsum(mpmath.sqrt(max(v, 0)) for v in cross)
        )


def test_precision_recall_uses_bounded_memory(monkeypatch):
    """It computes at most block x max(N, M) distances at once."""
    seen, compute = [], metrics._squared_distances

    def watched(*args):
        for start, squares, error in compute(*args):
            seen.append(squares.numel())
            yield start, squares, error

    monkeypatch.setattr(metrics, "_squared_distances", watched)
    precision_recall(gaussian(300, 2), gaussian(200, 2, 1), block=16)
    assert max(seen) == 16 * 300
    assert sum(seen) == 300 * 300 + 200 * 200 + 2 * 300 * 200


def test_precision_recall_refuses_too_few_rows():
    with pytest.raises(ValueError, match="3 neighbours of 3 and 9 rows"):
        precision_recall(gaussian(3, 2), gaussian(9, 2))


# -- nearest neighbours ------------------------------------------------------------------------------------------------


def brute_nearest(queries, data, k):
    d = scipy.spatial.distance.cdist(queries, data)
    order = np.argsort(d, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(d, order, 1), order


@given(
    n=st.integers(0, 9),
    m=st.integers(1, 30),
    d=st.integers(1, 5),
    k=st.integers(1, 30),
    seed=st.integers(0, 99),
    block=st.integers(1, 10),
)
@settings(max_examples=200)
def test_nearest_equals_brute_force_on_a_lattice_full_of_ties(n, m, d, k, seed, block):
    """Differences are small integers with exact squares, but far from 0, where the expanded square is inexact."""
    k = min(k, m)
    queries, data = (rng(seed + i).integers(0, 3, size=(count, d)) + 1e6 for i, count in enumerate((n, m)))
    distances, indices = nearest(queries, data, k, block=block)
    expected = brute_nearest(queries, data, k)
    assert distances.shape == indices.shape == (n, k)
    np.testing.assert_array_equal(indices, expected[1])
    np.testing.assert_allclose(distances, expected[0], rtol=1e-15)


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_nearest_equals_brute_force_and_blocks_change_nothing(block):
    queries, data = gaussian(40, 30, 0, 5.0), gaussian(300, 30, 1, 5.0)
    distances, indices = nearest(queries, data, 5, block=block)
    expected = brute_nearest(queries, data, 5)
    np.testing.assert_array_equal(indices, expected[1])
    np.testing.assert_allclose(distances, expected[0], rtol=1e-14)
    assert all(torch.equal(x, y) for x, y in zip(nearest(queries, data, 5), (distances, indices), strict=True))


def test_nearest_finds_planted_copies_and_near_copies():
    """A copy is at distance 0, and a copy that is moved by 1e-9 is at 1e-9. The expanded square would give 0."""
    data = gaussian(500, 3072, 3, 100.0)
    queries = data[[7, 400, 499]].copy()
    data[450] = data[7]  # a second copy
    queries[1, 5] += 1e-9
    distances, indices = nearest(queries, data, 2, block=2)
    assert indices[:, 0].tolist() == [7, 400, 499]
    assert indices[0].tolist() == [7, 450]
    assert distances[0].tolist() == [0, 0]
    assert distances[2, 0] == 0
    assert float(distances[1, 0]) == pytest.approx(queries[1, 5] - data[400, 5], rel=1e-12)
    ((_, squares, error),) = metrics._squared_distances(queries, data, 3, "cpu")
    assert float(error[1, 400]) > 1e-18 * 1e6  # negative control: the expanded square alone cannot tell
    assert abs(float(squares[1, 400])) <= float(error[1, 400])


def test_nearest_orders_near_ties_by_their_true_distance():
    """200 rows are at distances 1 + i 1e-11 from a query at 1e4. The expanded square cannot resolve them."""
    query = np.full((1, 50), 1e4)
    distance = 1 + rng(4).permutation(200) * 1e-11
    data = query + np.eye(1, 50) * distance[:, None]
    true = (data - query)[:, 0]
    distances, indices = nearest(query, data, 200)
    np.testing.assert_array_equal(distances[0], np.sort(true))
    np.testing.assert_array_equal(indices[0], np.argsort(true, kind="stable"))


def test_nearest_accepts_arrays_and_tensors_and_refuses_wrong_input():
    pixels = rng().integers(0, 256, size=(9, 12), dtype=np.uint8)
    for data in (pixels, torch.from_numpy(pixels), torch.from_numpy(pixels).float()):
        distances, indices = nearest(data, data)
        assert (distances.dtype, indices.dtype) == (torch.float64, torch.int64)
        assert indices[:, 0].tolist() == list(range(9))
        assert (distances == 0).all()
    with pytest.raises(ValueError, match="10 neighbours of 9"):
        nearest(pixels, pixels, 10)
    with pytest.raises(ValueError, match="12 and 3 features"):
        nearest(pixels, pixels[:, :3])

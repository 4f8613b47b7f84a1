"""Sample quality from arrays of features: Frechet distance, KID, Inception score, precision and recall.

Features are [N, D], one row per image, of any real dtype. Everything is computed in float64. The caller chooses the
network that computes the features (`ddpm.files.features`); with the Inception network of 2015 the Frechet distance is
the FID.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ddpm import float64
from ddpm.errors import whole_number
from ddpm.noise import generator

Floats = NDArray[np.float64]

_SUBSETS, _SPLITS = 0x51D, 0x15
"""Keys that separate the draws of `kid` and `inception_score` from other draws with the same seed."""


# -- moments and the Frechet distance ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Moments:
    """The moments of features.

    count       the number of rows, or None if it is unknown, as for some published statistics; these cannot be added
    mean        [D]
    covariance  [D, D], the sample covariance: divided by count - 1, and zero for fewer than two rows

    `a + b` gives the moments of both sets together. The order and the sizes of the parts change the result by rounding
    only.

    >>> parts = moments([[0.0], [2.0]]) + moments([[4.0]])
    >>> parts.count, float(parts.mean[0]), float(parts.covariance[0, 0])
    (3, 2.0, 4.0)
    """

    count: int | None
    mean: Floats
    covariance: Floats

    def __add__(self, other: "Moments") -> "Moments":
        """Merge two sets by the formula of Chan, Golub, LeVeque (1979). Raises ValueError if a count is unknown."""
        if self.count is None or other.count is None:
            raise ValueError("moments with an unknown count cannot be added")
        if not self.count or not other.count:
            return self if self.count else other
        n = self.count + other.count
        delta = other.mean - self.mean
        scatter = (self.count - 1) * self.covariance + (other.count - 1) * other.covariance
        scatter += np.outer(delta, delta * (self.count * other.count / n))
        return Moments(n, self.mean + delta * (other.count / n), scatter / (n - 1))


def moments(features: ArrayLike) -> Moments:
    """The moments of features [N, D]. Raises ValueError for another shape and for values that are not finite.

    >>> moments([[1.0, 0.0], [3.0, 0.0]]).mean
    array([2., 0.])
    """
    x = _features(features)
    n, d = x.shape
    if n == 0:
        return Moments(0, np.zeros(d), np.zeros((d, d)))
    mean = x.mean(0)
    x = x - mean
    return Moments(n, mean, x.T @ x / max(n - 1, 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^{1/2} S_b S_a^{1/2})^{1/2}), the squared distance of two Gaussians (>= 0).

    The last two terms are the least |F_a - F_b Q|^2 over rotations Q, where F F^T is a covariance. A sum of squares
    cancels nothing, so no value is complex or negative, the two sets can be swapped, and the arithmetic is right for
    fewer images than features and for rows far from the others. The estimate still has a bias of about +1/N, so compare
    only values with the same N.

    Raises ValueError if the numbers of features differ. Source: Dowson and Landau (1982); Heusel et al. (2017).

    >>> a = Moments(None, np.zeros(2), np.diag([1.0, 0.0]))
    >>> b = Moments(None, np.ones(2), np.diag([4.0, 1.0]))
    >>> frechet_distance(a, b)  # 1 + 1 for the means, (1 - 2)^2 + (0 - 1)^2 for the deviations
    4.0
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"moments of {len(a.mean)} and of {len(b.mean)} features cannot be compared")
    delta, left, right = a.mean - b.mean, _factor(a.covariance), _factor(b.covariance)
    u, _, v = np.linalg.svd(left.T @ right)  # Q = v.T @ u.T; both factors are rotated, which is the same distance
    return float(delta @ delta + ((left @ u - right @ v.T) ** 2).sum())


def _factor(covariance: Floats) -> Floats:
    """A factor F [D, D] of the covariance, F F^T = covariance. Eigenvalues as small as rounding errors count as 0."""
    values, vectors = np.linalg.eigh(covariance)  # ascending
    real = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    factor: Floats = vectors * np.sqrt(np.where(real, values, 0))
    return factor


# -- kernel distance ---------------------------------------------------------------------------------------------------


def kid(
    x: ArrayLike,
    y: ArrayLike,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """Kernel distance of features x [N, D] and y [M, D], MMD^2 with the kernel (x.y/D + 1)^3: (mean, standard error).

    The mean is over `subsets` pairs of subsets with subset_size rows each. If both sets have no more rows than that,
    all rows are used once. Each estimate is unbiased, so the mean can be negative. Rows are drawn without replacement,
    and a row is not drawn again until nearly all others have been drawn. The draws depend only on `seed`.

    The standard error is that of the mean over new sets x and y. It is not the spread of the subsets divided by the
    square root of their number: subsets share rows, so that value is too small. It is computed by leaving out one row
    at a time: its square is sum_i (K - K_{-i})^2. The expectation of this sum is at least the variance (Efron and Stein
    1981). It equals the variance if x and y differ by much more than noise. If they do not, it is at most twice the
    variance, so the standard error is at most 1.4 times too large.

    device  where matrix products are computed; the CPU takes the place of a device without float64 (mps)

    Raises ValueError for fewer than 3 rows. Source: Binkowski et al. (2018).

    >>> rng = np.random.default_rng(0)
    >>> mean, error = kid(rng.normal(size=(300, 8)), rng.normal(size=(300, 8)) + 0.5, subset_size=100, subsets=9)
    >>> mean > 5 * error > 0
    True
    """
    a, b = _pair(x, y)
    size = min(subset_size, len(a), len(b))
    if size < 3 or subsets < 1:
        raise ValueError(f"want at least 3 rows per subset and 1 subset, got {size} and {subsets}")
    if size == len(a) == len(b):
        subsets = 1
    device = float64.device_with(device)
    features = [torch.from_numpy(f).to(device) for f in (a, b)]
    rows = [_subsets(len(f), size, seed, k) for k, f in enumerate((a, b))]
    effect = [torch.zeros(len(f), dtype=torch.float64, device=device) for f in (a, b)]  # K - K_{-i}
    total = 0.0
    for _ in range(subsets):
        i, j = (next(r).to(device) for r in rows)
        mean, left_out = _mmd(features[0][i], features[1][j])
        total += mean / subsets
        for which, index, without in zip((0, 1), (i, j), left_out, strict=True):
            effect[which][index] += (mean - without) / subsets
    return total, float(sum((e**2).sum() for e in effect) ** 0.5)


def _subsets(n: int, size: int, seed: int, key: int) -> Iterator[Tensor]:
    """Yield random subsets of 0..n-1, int64 [size], forever; they are disjoint until fewer than `size` are left."""
    draws = generator(seed, _SUBSETS, key)
    while True:
        yield from torch.randperm(n, generator=draws)[: n // size * size].view(-1, size)


def _mmd(x: Tensor, y: Tensor) -> tuple[float, tuple[Tensor, Tensor]]:
    """The unbiased estimate from x, y [s, D], and the estimates without each row of x and of y, each [s]."""
    s, d = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / d + 1) ** 3

    xx, yy = (k.sum(1) - k.diagonal() for k in (kernel(x, x), kernel(y, y)))  # [s], over the same set's other rows
    xy = kernel(x, y)
    within_x, within_y, across = (float(k.sum()) for k in (xx, yy, xy))
    pairs, fewer = s * (s - 1), (s - 1) * (s - 2)
    mean = (within_x + within_y) / pairs - 2 * across / s**2
    without_x = (within_x - 2 * xx) / fewer + within_y / pairs - 2 * (across - xy.sum(1)) / pairs
    without_y = (within_y - 2 * yy) / fewer + within_x / pairs - 2 * (across - xy.sum(0)) / pairs
    return mean, (without_x, without_y)


# -- Inception score ---------------------------------------------------------------------------------------------------


def softmax(logits: ArrayLike) -> Floats:
    """Probabilities [N, K] from logits [N, K], in float64.

    >>> softmax([[1000.0, 1000.0]])
    array([[0.5, 0.5]])
    """
    z = _features(logits)
    p = np.exp(z - z.max(1, keepdims=True))
    probabilities: Floats = p / p.sum(1, keepdims=True)
    return probabilities


def inception_score(probabilities: ArrayLike, splits: int = 10, seed: int | None = 0) -> tuple[float, float]:
    """exp E[KL(p(y|x) || p(y))] of class probabilities [N, K]: (mean, standard deviation) over `splits` parts.

    The score is between 1 and K. The parts are consecutive rows after a shuffle, which depends only on `seed`: rows
    that are sorted by class would score 1. seed None keeps the order of the rows. The deviation is divided by `splits`
    and not by splits - 1, as in the original program. Raises ValueError if rows do not sum to 1 (convert logits with
    `softmax`) and if there are fewer rows than parts. Source: Salimans et al. (2016).

    >>> inception_score(np.eye(4)[[0, 1, 2, 3, 0, 1, 2, 3]], splits=2, seed=None)  # certain, equally frequent
    (4.0, 0.0)
    """
    p = _features(probabilities)
    if not 1 <= splits <= len(p):
        raise ValueError(f"{splits} splits of {len(p)} rows: want at least one row per split")
    if p.min() < 0 or abs(p.sum(1) - 1).max() > 1e-3:
        raise ValueError("rows are not probabilities: want values of at least 0 and rows with sum 1")
    if seed is not None:
        p = p[torch.randperm(len(p), generator=generator(seed, _SPLITS)).numpy()]
    scores = []
    for i in range(splits):
        part = p[i * len(p) // splits : (i + 1) * len(p) // splits]
        ratio = part / np.maximum(part.mean(0), np.finfo(np.float64).tiny)
        kl = (part * np.log(np.where(part > 0, ratio, 1.0))).sum(1)  # 0 log 0 = 0
        scores.append(np.exp(kl.mean()))
    return float(np.mean(scores)), float(np.std(scores))


# -- precision and recall ----------------------------------------------------------------------------------------------


def precision_recall(
    real: ArrayLike, fake: ArrayLike, k: int = 3, *, block: int = 256, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """(precision, recall): the share of fakes [M, D] within the reals [N, D], and the share of reals within the fakes.

    A point is within a set if it lies in the ball around one of the set's points. The ball's radius is the distance to
    the k-th nearest other point of the set. The values depend on N and M, so compare only values with the same numbers.

    Both sets are held twice in float64, together with block (N + M) distances at a time.

    device  where matrix products are computed; the CPU takes the place of a device without float64 (mps)

    Raises ValueError for fewer than k + 1 rows. Source: Kynkaanniemi et al. (2019), Eq. 1 and 2.

    >>> x = np.arange(6.0)[:, None]
    >>> precision_recall(x, x), precision_recall(x, x + 100), precision_recall(x, x[:4] * 0.1)
    ((1.0, 1.0), (0.0, 0.0), (1.0, 0.16666666666666666))
    """
    a, b = _pair(real, fake)
    k = whole_number("k", k)
    if not 1 <= k < min(len(a), len(b)):
        raise ValueError(f"k = {k} neighbours of {len(a)} and {len(b)} rows: want k of at least 1 and more rows than k")
    return _share_inside(b, a, k, block, device), _share_inside(a, b, k, block, device)


def _share_inside(points: Floats, centres: Floats, k: int, block: int, device: torch.device | str) -> float:
    """The share of points that lie in the ball around at least one centre, to its k-th nearest other centre."""
    radii = nearest(centres, centres, k + 1, block=block, device=device)[0][:, -1].numpy()  # itself is the nearest
    squared_radii = torch.from_numpy(radii**2).to(float64.device_with(device))
    inside = np.zeros(len(points), bool)
    for start, squares, error in _squared_distances(points, centres, block, device):
        within = (squares + error < squared_radii).any(1)
        i, j = _where((squares - error <= squared_radii * (1 + 1e-12)) & ~within[:, None])
        inside[start : start + len(within)] = within.cpu().numpy()
        inside[start + i[_distances(points[start:], centres, i, j, block) <= radii[j]]] = True
    return float(inside.mean())


# -- nearest neighbours ------------------------------------------------------------------------------------------------


def nearest(
    queries: ArrayLike, data: ArrayLike, k: int = 1, *, block: int = 256, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """The k rows of data [M, D] nearest to each of queries [N, D]: (distances float64 [N, k], indices int64 [N, k]).

    Distances are Euclidean and rise within a row; ties are in order of the index. A copy has distance exactly 0. The
    expanded square is fast but inexact near 0, so it only selects candidates, whose distances are then computed from
    differences.

    Both sets are held twice in float64, together with block M distances at a time. The result is on the CPU.

    device  where matrix products are computed; the CPU takes the place of a device without float64 (mps)

    Raises ValueError for fewer than k rows of data.

    >>> nearest([[1.0, 0.0]], [[1.0, 3.0], [1.0, 0.0], [1.0, 3.0]], k=2)
    (tensor([[0., 3.]], dtype=torch.float64), tensor([[1, 0]]))
    """
    a, b = _pair(queries, data)
    k = whole_number("k", k)
    if not 1 <= k <= len(b):
        raise ValueError(f"k = {k} neighbours of {len(b)} rows: want k of at least 1 and at most the number of rows")
    distances, indices = np.empty((len(a), k)), np.empty((len(a), k), np.int64)
    for start, squares, error in _squared_distances(a, b, block, device):
        limit = (squares + error).kthvalue(k, 1, keepdim=True).values
        i, j = _where(squares - error <= limit)  # j rises in each row
        exact = _distances(a[start:], b, i, j, block)
        order = np.lexsort((j, exact, i))
        first = np.searchsorted(i, np.arange(len(squares)))[:, None] + np.arange(k)  # the k nearest of each row
        rows = slice(start, start + block)
        distances[rows], indices[rows] = exact[order[first]], j[order[first]]
    return torch.from_numpy(distances), torch.from_numpy(indices)


def _squared_distances(
    a: Floats, b: Floats, block: int, device: torch.device | str
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield |a_i - b_j|^2 for a block of rows of a: (first row, squares, bounds of their rounding errors), each [n, M].

    The square is expanded, which is fast. The caller computes distances that the errors leave open from differences.
    """
    centre = b.mean(0)  # centring keeps the squares, and so their rounding errors, small
    x, y = (torch.from_numpy(points - centre).to(float64.device_with(device)) for points in (a, b))
    x_squared, y_squared = ((points**2).sum(1) for points in (x, y))
    rounding = 8 * (a.shape[1] + 4) * float(np.finfo(np.float64).eps)
    for start in range(0, len(a), block):
        rows = slice(start, start + block)
        scale = x_squared[rows, None] + y_squared
        yield start, scale - 2 * x[rows] @ y.T, rounding * scale


def _where(chosen: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The row and the column of each true entry, in order of the rows."""
    i, j = chosen.cpu().numpy().nonzero()
    return i, j


def _distances(a: Floats, b: Floats, i: NDArray[np.int64], j: NDArray[np.int64], block: int) -> Floats:
    """|a_i - b_j| for pairs of rows, from differences, `block` pairs at a time."""
    parts = [slice(start, start + block) for start in range(0, len(i), block)]
    return np.concatenate([np.empty(0), *(np.linalg.norm(a[i[part]] - b[j[part]], axis=1) for part in parts)])


def _features(features: ArrayLike) -> Floats:
    """Features as float64 [N, D]. Raises ValueError for another shape and for values that are not finite."""
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2:
        raise ValueError(f"want an array [N, D], got shape {list(x.shape)}")
    if not np.isfinite(x).all():
        raise ValueError("want finite numbers, got nan or inf")
    return x


def _pair(x: ArrayLike, y: ArrayLike) -> tuple[Floats, Floats]:
    """Two arrays of features. Raises ValueError if they differ in D."""
    a, b = _features(x), _features(y)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{a.shape[1]} and {b.shape[1]} features cannot be compared")
    return a, b

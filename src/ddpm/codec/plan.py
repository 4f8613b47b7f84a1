"""The tables of a model's codec, which are fitted once to training images: groups of levels, variances, histograms.

The tables belong to the model and lie beside its weights. So neither the encoder nor the decoder takes a probability
from a network that might compute otherwise on another machine.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm import pixels
from ddpm.codec import entropy, residual
from ddpm.errors import InputError
from ddpm.schedule import Schedule

PAD = 2
"""A chunk has 2^(K + PAD) candidates; in bands 2^(k + PAD) for a divergence of k bits, k at most K."""
MOST_BITS = 16
"""The largest K. Both sides then hold 2^18 rows of 64 normals."""
_BANDED = 40  # a group is coded in bands if a whole tile costs at least this many bits,
_NEAR = 4e-3  # and if the mean squared error is below this, about eight grey levels
_LOST = 3.0  # bits per chunk that are not recovered in bands, with the loss from inexact samples
_LOADS = 4
"""The number of classes of a chunk's load, its divergence over K."""
SCALES = range(-12, 20)
"""The error of an image over the mean error, in half octaves (factors of sqrt 2)."""
SPREADS = range(-5, 2)
"""The standard deviations of the pixel mixture's components over that of the image's errors, in octaves."""
_MIXTURE = 64  # the weights of the mixture sum to this


@cache
def _inner_edges() -> NDArray[np.float64]:
    """The edges between the bins of neighbouring grey levels, [255]."""
    _, lower, _ = pixels.bins(torch.zeros((), dtype=torch.float64))
    edges: NDArray[np.float64] = lower[1:].numpy()
    return edges


class Chunks(NamedTuple):
    """How a part is cut into chunks of at most K bits of divergence.

    number  how many chunks
    bits    bits of an index that fit the divergence of a chunk
    load    class of the divergence over K
    """

    number: int
    bits: int
    load: int


@dataclass(frozen=True)
class Group:
    """The step from x_t to x_s, s < t: q(x_s | x_t, x_0) of Eq. 6 and 7 without the levels between them.

    mse is E|x_0 - x0^(x_t)|^2 / D over training images.
    """

    t: int
    s: int
    abar_t: float
    abar_s: float
    mse: float

    @cached_property
    def coefficients(self) -> tuple[float, float, float]:
        """c_0, c_x and beta~ of mu~ = c_0 x_0 + c_x x_t  (Eq. 7)."""
        a2 = self.abar_t / self.abar_s
        b, left = 1 - a2, 1 - self.abar_t
        return math.sqrt(self.abar_s) * b / left, math.sqrt(a2) * (1 - self.abar_s) / left, b * (1 - self.abar_s) / left

    def error(self, scale: int) -> float:
        """The mean squared error of an image of this scale: mse 2^(scale / 2)."""
        return self.mse * math.ldexp(math.sqrt(2) if scale % 2 else 1.0, scale // 2)

    def variance(self, scale: int) -> float:
        """The variance of p of least divergence: beta~ + c_0^2 error (Bao et al. 2022)."""
        c_0, _, variance_q = self.coefficients
        return variance_q + c_0 * c_0 * self.error(scale)  # not c_0**2, whose last bit depends on a library

    def divergence(self, scale: int) -> float:
        """KL(q || p) per dimension in bits, for an image of this scale."""
        _, _, variance_q = self.coefficients
        return 0.5 * math.log2(self.variance(scale) / variance_q)

    def banded(self, size: int) -> bool:
        """Whether a tile of `size` values is coded in bands, where low bits of pixels choose the candidates."""
        return self.mse < _NEAR and round(self.divergence(0) * 2**20) * size >= _BANDED << 20

    def chunks(self, scale: int, dims: int, bits: int) -> Chunks:
        """How `dims` dimensions are cut into chunks for `bits` = K."""
        # Rounded, so that the last bit of a logarithm does not matter.
        whole = round(self.divergence(scale) * 2**20) * dims
        number = max(1, min(dims, -(-whole // (bits << 20))))
        each = min(bits, -(-whole // (number << 20))) + PAD
        return Chunks(number, each, min(_LOADS - 1, whole * _LOADS // (number * bits << 20)))


@dataclass(frozen=True)
class Tables:
    """The tables of a model's codec for one K.

    bits       K, the largest divergence of a chunk; the encoder weighs up to 2^(K + PAD) candidates per chunk
    levels     T = levels[0] > .. > levels[-1]: x is coded at each level in turn, and the pixels from the last
    alpha_bar  alpha_bar of these levels
    mse        E|x_0 - x0^|^2 / D over training images at these levels; the last is after the prediction by `weights`
    scales     counts of each change of the scale between groups, -31 .. 31
    buckets    counts of floor(log2(index + 1)) in groups without bands, for each class of load
    spread     weights of the pixels' mixture, which sum to 64
    weights    weights of the prediction of each channel's error (`residual`)
    """

    bits: int
    levels: tuple[int, ...]
    alpha_bar: tuple[float, ...]
    mse: tuple[float, ...]
    scales: tuple[int, ...]
    buckets: tuple[tuple[int, ...], ...]
    spread: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        """Raise InputError for values that no calibration writes."""
        levels, abar, width = self.levels, self.alpha_bar, self.bits + PAD + 1
        good = (
            2 <= self.bits <= MOST_BITS and len(levels) == len(abar) == len(self.mse) >= 1
            and all(s < t for t, s in pairwise(levels)) and levels[-1] >= 1
            and all(0 < a < b for a, b in zip(abar, [*abar[1:], 1.0], strict=True))
            and all(0 < e < math.inf for e in self.mse)
            and len(self.scales) == 2 * len(SCALES) - 1 and [len(b) for b in self.buckets] == [width] * _LOADS
            and min(min(self.scales), *map(min, self.buckets), *self.spread) >= 0
            and len(self.spread) == len(SPREADS) and sum(self.spread) == _MIXTURE
            and [len(w) for w in self.weights] == residual.counts(len(self.weights))
            and all(abs(x) < 1e3 for w in self.weights for x in w)
        )  # fmt: skip
        if not good:
            raise InputError("codec tables: not what `ddpm calibrate` writes; calibrate again")

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        steps = zip(self.levels, self.levels[1:], self.alpha_bar, self.alpha_bar[1:], self.mse, strict=False)
        return tuple(Group(*step) for step in steps)

    @cached_property
    def last(self) -> Group:
        """The step from the last level to the image; only its error is used."""
        return Group(self.levels[-1], 0, self.alpha_bar[-1], 1.0, self.mse[-1])

    @cached_property
    def scale_frequency(self) -> NDArray[np.int64]:
        return entropy.frequencies([16 * n + 1 for n in self.scales])

    @staticmethod
    def scale_symbol(scale: int, before: int = 0) -> int:
        """The symbol for a scale after the scale `before`."""
        return scale - before + len(SCALES) - 1

    @staticmethod
    def scale_of_symbol(symbol: int, before: int = 0) -> int:
        """The inverse of `scale_symbol`. Raises Damaged if there is no such scale."""
        scale = symbol + before - len(SCALES) + 1
        if scale not in SCALES:
            raise entropy.Damaged("payload: no encoder writes such bytes; want the file as it was written")
        return scale

    @cached_property
    def bucket_frequency(self) -> NDArray[np.int64]:
        return entropy.frequencies([[16 * n + 1 for n in counts] for counts in self.buckets])

    @cached_property
    def _mixture(self) -> NDArray[np.int64]:
        """Octaves and weights of the components whose weight is not 0, [2, components]."""
        return np.array([pair for pair in zip(SPREADS, self.spread, strict=True) if pair[1]]).T

    def pixel_frequencies(self, mean: NDArray[np.float64], sigma: NDArray[np.float64]) -> NDArray[np.int64]:
        """Frequencies of the 256 grey levels by Eq. 13 with a mixture of Gaussians: mean, sigma [m] -> [m, 256]."""
        spreads, weights = self._mixture
        sigmas = np.ldexp(sigma, spreads[:, None])[..., None]  # [parts, m, 1]
        edges = np.zeros((len(mean), 257), np.int64)
        edges[:, 1:256] = (weights[:, None, None] * entropy.cdf((_inner_edges() - mean[:, None]) / sigmas)).sum(0)
        edges[:, 256] = _MIXTURE << 32
        return entropy.frequencies(np.diff(edges))

    def to_json(self) -> dict[str, Any]:
        return {
            "bits": self.bits, "levels": self.levels, "alpha_bar": self.alpha_bar, "mse": self.mse,
            "scales": self.scales, "buckets": self.buckets, "spread": self.spread, "weights": self.weights,
        }  # fmt: skip

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "Tables":
        """The tables that `to_json` wrote. Raises InputError, KeyError or TypeError for other values."""
        lists = {key: tuple(values[key]) for key in ("levels", "alpha_bar", "mse", "scales", "spread")}
        buckets, weights = (tuple(map(tuple, values[key])) for key in ("buckets", "weights"))
        return Tables(int(values["bits"]), buckets=buckets, weights=weights, **lists)


def levels(
    schedule: Schedule, mse: Tensor, dims: int, bits: int | None, gain: NDArray[np.float64], group_bits: float
) -> list[int]:
    """The levels of least cost, falling from T, by dynamic programming over all groupings.

    mse is float64 [n, T] for n images, and dims is D. A group from t to s costs its KL, the excess of the chunks'
    indices over it, and `group_bits` for its scale and the network call. The pixels from level t cost the entropy of
    errors of mse_t, minus gain[t - 1] bits per dimension that prediction and mixture save. bits None means a chain for
    bits-back coding, which has no indices.

    >>> from ddpm import schedule
    >>> error = torch.linspace(1e-4, 0.3, 1000).double()
    >>> chosen = levels(schedule.linear(), error.expand(2, -1), 3072, 12, np.zeros(1000), 4.0)
    >>> chosen[0], chosen == sorted(chosen, reverse=True)
    (1000, True)
    """
    T = schedule.T
    snr = (2 * schedule.half_log_snr).exp()
    cost = torch.full((T + 1,), math.inf, dtype=torch.float64)  # the least cost from level t to the image
    after = torch.zeros(T + 1, dtype=torch.int64)  # the level after t on that path, or 0
    for t in range(1, T + 1):
        error = mse[:, t - 1, None]
        pixel = 0.5 * (2 * math.pi * math.e * (error / pixels.BIN**2 + 1 / 12)).log2().mean() - gain[t - 1]
        cost[t] = dims * max(float(pixel), 0.05)
        if t > 1:
            kl = dims * 0.5 * ((snr[1:t] - snr[t]) * error).log1p() / math.log(2)  # [n, t - 1]
            if bits is not None:
                kl = kl + _excess(kl, bits, float(error.mean()) < _NEAR)
            steps = kl.mean(0) + group_bits + cost[1:t]
            least = int(steps.argmin())
            if steps[least] < cost[t]:
                cost[t], after[t] = steps[least], least + 1
    path = [T]
    while after[path[-1]] > 0:
        path.append(int(after[path[-1]]))
    return path


def _excess(kl: Tensor, bits: int, near: bool) -> Tensor:
    """The excess of indices over a divergence, bits: about log2(KL + 1) per chunk.

    In bands (`near`) most of it is recovered. There are several bands, and each has at least one chunk.
    """
    chunks = (kl / bits).clamp(min=1)
    ordered = chunks * (kl / chunks + 1).log2()
    return torch.where(kl < _BANDED, ordered, _LOST * chunks.clamp(min=3)) if near else ordered


def empty(schedule: Schedule, mse: Tensor, chosen: Sequence[int], bits: int, channels: int) -> Tables:
    """Tables to start from: flat histograms and one Gaussian. mse is [n, T], `chosen` the levels from `levels`."""
    no_weights = tuple((0.0,) * count for count in residual.counts(channels))
    levels = torch.tensor(chosen)
    flat = (tuple([1] * (bits + PAD + 1)),) * _LOADS
    scales = tuple(1000 >> min(10, 3 * abs(change)) for change in range(1 - len(SCALES), len(SCALES)))
    one_gaussian = tuple(_MIXTURE * (spread == 0) for spread in SPREADS)
    abar, error = schedule.alpha_bar[levels].tolist(), mse.mean(0)[levels - 1].tolist()
    return Tables(bits, tuple(chosen), tuple(abar), tuple(error), scales, flat, one_gaussian, no_weights)


def masses(residuals: NDArray[np.float64], sigmas: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mass of each component of SPREADS on a grey level `residuals` [m] from the mean, [len(SPREADS), m]."""
    half = pixels.BIN / 2
    mass = np.empty((len(SPREADS), len(residuals)))
    for row, spread in zip(mass, SPREADS, strict=True):
        sigma = sigmas * 2.0**spread
        row[:] = (entropy.cdf((residuals + half) / sigma) - entropy.cdf((residuals - half) / sigma)) / 2.0**32
    return mass + 1e-9


def mixture(residuals: NDArray[np.float64], sigmas: NDArray[np.float64]) -> tuple[int, ...]:
    """The weights of SPREADS for residuals [m] with standard deviations sigmas [m], by expectation-maximisation.

    The weights are integers that sum to 64. A component's mass is its mass on a grey level's bin, as in coding.

    >>> mixture(np.linspace(-1, 1, 101) * 0.01, np.full(101, 0.01))[0]
    0
    """
    mass = masses(residuals, sigmas)
    weights = np.full(len(SPREADS), 1 / len(SPREADS))
    for _ in range(100):
        share = weights[:, None] * mass
        weights = (share / share.sum(0)).mean(1)
    whole = np.floor(weights * _MIXTURE).astype(int)
    for i in np.argsort(whole - weights * _MIXTURE)[: _MIXTURE - whole.sum()]:  # the largest remainders
        whole[i] += 1
    return tuple(whole.tolist())

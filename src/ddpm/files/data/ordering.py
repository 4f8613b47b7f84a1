"""The order in which images are visited: a function of (seed, epoch), whatever the number of processes.

Each epoch visits each image once. There are three permutations of an epoch. Images are shuffled as a whole, of more
than 2^25 images by a keyed bijection that needs no array. Shards that are read in order are shuffled as shards, and
then inside a window.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm.noise import generator, mix

_ORDER = 0x0DE5
"""Key of the permutations. It keeps them apart from other draws of the same seed."""
ARRAY = 1 << 25
"""The most images whose permutation is an array; 256 MiB for as many."""
_ROUNDS = 6
"""Rounds of the Feistel network. Four make a random permutation from random functions (Luby and Rackoff 1988)."""


@dataclass(frozen=True, eq=False)
class Shards:
    """Images in shards that must be read in order: image 0 is the first one of shard 0.

    sizes   the number of images of each shard, in order
    window  images that are shuffled together, at least 1
    """

    sizes: Sequence[int]
    window: int

    @functools.cached_property
    def ends(self) -> NDArray[np.int64]:
        return np.cumsum(np.asarray(self.sizes, np.int64))


def order(n: int, seed: int, step: int, batch_size: int, shards: Shards | None = None) -> Tensor:
    """The indices, in 0..n-1, of the images of a step (0, 1, ...): int64 [batch_size].

    The batches are one stream of images. Its place p = step * batch_size + i holds place p mod n of the permutation of
    (seed, p // n). So every epoch visits each image once, and a run can resume at any step.

    With `shards`, an epoch's permutation puts the shards in random order, cuts that line of images into windows, the
    first one of random length, and shuffles each; a window of n or more shuffles all. So an image moves by less than a
    window, and neighbours in a shard come to lie less than two windows apart. Raises ValueError for numbers out of
    range.

    >>> torch.cat([order(4, 0, step, 2) for step in (0, 1)]).sort().values
    tensor([0, 1, 2, 3])
    >>> (order(6, 0, 0, 6, Shards([3, 3], 1)) // 3).tolist() in ([0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0])
    True
    """
    if n < 1 or step < 0 or batch_size < 1:
        raise ValueError(f"want n >= 1, step >= 0, batch_size >= 1, got {n}, {step}, {batch_size}")
    if shards is not None and (shards.ends[-1] != n or shards.window < 1):
        raise ValueError(f"want shards of {n} images and window >= 1, got {shards.ends[-1]}, {shards.window}")
    start, stop = step * batch_size, (step + 1) * batch_size
    parts = [
        _part(n, seed, epoch, max(start - epoch * n, 0), min(stop - epoch * n, n), shards)
        for epoch in range(start // n, (stop - 1) // n + 1)
    ]
    return torch.cat(parts)


def _part(n: int, seed: int, epoch: int, start: int, stop: int, shards: Shards | None) -> Tensor:
    """Places start..stop-1 of an epoch's permutation."""
    if shards is not None:
        return torch.from_numpy(windowed(shards, seed, epoch, start, stop))
    if n <= ARRAY:
        return _permutation(n, seed, epoch)[start:stop]
    return torch.from_numpy(keyed(n, np.arange(start, stop), seed, epoch))


@functools.lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, epoch, _ORDER))


def keyed(n: int, places: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
    """These places of the permutation of 0..n-1 that (seed, epoch) names, int64 as `places`, without an array of n.

    A Feistel network permutes the numbers of an even number of bits. A number that is not below n is permuted again
    until it is ("cycle walking", Black and Rogaway 2002), which takes at most four rounds on average.

    >>> sorted(keyed(10, np.arange(10), seed=0, epoch=3).tolist())
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = [np.uint64(mix(seed, epoch, _ORDER, r)) for r in range(_ROUNDS)]

    def permute(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x >> half, x & mask
        for key in keys:
            left, right = right, left ^ (_hash(right ^ key) & mask)
        return (left << half) | right

    x = permute(places.astype(np.uint64))
    while (outside := x >= n).any():
        x[outside] = permute(x[outside])
    return x.astype(np.int64)


def _hash(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def windowed(shards: Shards, seed: int, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
    """Places start..stop-1 of the epoch's permutation of images in shards, int64 [stop - start]; see `order`.

    >>> sorted(windowed(Shards([2, 5, 3], 4), seed=0, epoch=0, start=0, stop=10).tolist())
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    n, window = int(shards.ends[-1]), shards.window
    shift = mix(seed, epoch, _ORDER, 1) % window if window < n else 0
    blocks = range((start + shift) // window, (stop - 1 + shift) // window + 1)
    line = np.concatenate([_block(n, window, shift, seed, epoch, block) for block in blocks])
    first = max(blocks[0] * window - shift, 0)
    line = line[start - first : stop - first]
    shuffled, ends = _shuffled_shards(shards, seed, epoch)
    at = np.searchsorted(ends, line, side="right")
    shard = shuffled[at]
    found: NDArray[np.int64] = shards.ends[shard] - (ends[at] - line)
    return found


@functools.lru_cache(maxsize=4)
def _block(n: int, window: int, shift: int, seed: int, epoch: int, block: int) -> NDArray[np.int64]:
    """A window of the line of images, shuffled."""
    first, last = max(block * window - shift, 0), min((block + 1) * window - shift, n)
    g = generator(seed, epoch, _ORDER, 2, block)
    shuffled: NDArray[np.int64] = (first + torch.randperm(last - first, generator=g)).numpy()
    return shuffled


@functools.lru_cache(maxsize=2)
def _shuffled_shards(shards: Shards, seed: int, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The shards in the order of the epoch, and where each ends in the line of images."""
    shuffled: NDArray[np.int64] = torch.randperm(len(shards.sizes), generator=generator(seed, epoch, _ORDER, 3)).numpy()
    return shuffled, np.cumsum(np.asarray(shards.sizes, np.int64)[shuffled])

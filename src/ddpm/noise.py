"""Randomness as an argument: every draw is a function of integers, never of global state.

Each image has a seed of its own. What it draws at level t depends on that seed and on t only, so the
batch size, the number of devices and the order of the images cannot change a picture.
"""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Noise: TypeAlias = Callable[[int], Tensor]
"""noise(t): the standard normal draw that makes x_t, shaped like x."""

_MASK = (1 << 64) - 1


def mix(*keys: int) -> int:
    """Hash integers to one seed of 63 bits (SplitMix64's finaliser, chained); the same on every platform.

    >>> mix(1, 2) == mix(1, 2), mix(1, 2) == mix(2, 1)
    (True, False)
    """
    h = 0
    for key in keys:
        h = (h + (key & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & _MASK
        h ^= h >> 31
    return h >> 1


def generator(*keys: int) -> torch.Generator:
    """A CPU generator that is a function of `keys` only, of 32 bits of their hash.

    >>> float(torch.rand((), generator=generator(0, 7))) == float(torch.rand((), generator=generator(0, 7)))
    True
    """
    return torch.Generator().manual_seed(mix(*keys))


def normal(seeds: Sequence[int], shape: Sequence[int], *keys: int) -> Tensor:
    """Standard normal draws float32 [len(seeds), *shape]; row i depends on seeds[i] and `keys` only.

    Drawn on the CPU, so that a seed gives one image on every device; by NumPy's Philox, whose key takes all of `mix`
    (torch's CPU generator keeps 32 bits of a seed, and of 50,000 images two would be the same).

    >>> torch.equal(normal([5, 6], (1, 4, 4), 10)[1], normal([6], (1, 4, 4), 10)[0])
    True
    """
    return _fill(np.empty((len(seeds), *shape), np.float32), seeds, keys)


def _fill(draws: NDArray[np.float32], seeds: Sequence[int], keys: Sequence[int]) -> Tensor:
    """`normal` into [len(seeds), *shape]."""
    philox = np.random.Philox(key=0)
    generator, fresh = np.random.Generator(philox), philox.state
    for row, seed in zip(draws, seeds, strict=True):
        fresh["state"]["key"][0] = mix(seed, *keys)  # as of Philox(key=...), which takes longer than to draw 8x8 pixels
        philox.state = fresh
        generator.standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(draws)


def ahead(seeds: Sequence[int], shape: Sequence[int], device: torch.device | str, levels: Iterable[int]) -> Noise:
    """`per_image`, for calls at `levels` in this order: threads draw the next ones while the device computes.

    For a CUDA device, which would wait for draws of the CPU longer than for the network. NumPy draws outside the
    interpreter's lock; pinned memory is copied without a stop.

    >>> noise = ahead([0, 1], (3, 8, 8), "cpu", [1000, 500, 1])
    >>> [torch.equal(noise(t), normal([0, 1], (3, 8, 8), t)) for t in (1000, 500, 1)]
    [True, True, True]
    """
    pinned = torch.device(device).type == "cuda"
    threads = min(4, os.cpu_count() or 1)
    pool, order = ThreadPoolExecutor(threads), iter(levels)
    drawn = deque[tuple[int, Future[Tensor]]]()

    def draw(t: int) -> Tensor:
        out = torch.empty(len(seeds), *shape, pin_memory=pinned)
        return _fill(out.numpy(), seeds, [t])

    def start(count: int) -> None:
        drawn.extend((t, pool.submit(draw, t)) for t in itertools.islice(order, count))

    def noise(t: int) -> Tensor:
        expected, draws = drawn.popleft()
        assert t == expected, (t, expected)
        start(1)
        return draws.result().to(device, non_blocking=True)

    start(threads)
    return noise


def per_image(seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> Noise:
    """The noise of images with these seeds: `noise(t)` is float32 [len(seeds), *shape] on `device`.

    >>> noise = per_image([0, 1], (3, 8, 8))
    >>> noise(1000).shape, torch.equal(noise(3), noise(3)), torch.equal(noise(3), noise(4))
    (torch.Size([2, 3, 8, 8]), True, False)
    """
    return lambda t: normal(seeds, shape, t).to(device, non_blocking=True)

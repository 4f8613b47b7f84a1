"""Randomness as an argument: every draw is a function of integers and never of global state.

Each image has its own seed. The noise of an image at level t depends only on that seed and on t. So the batch size, the
number of devices and the order of the images cannot change an image.
"""

import itertools
import operator
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import SupportsIndex, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Noise: TypeAlias = Callable[[int], Tensor]
"""noise(t) is the standard normal draw that makes x_t; it has the shape of x."""

_MASK = (1 << 64) - 1


def mix(*keys: SupportsIndex) -> int:
    """Hash integers to one seed of 63 bits. The result is the same on every platform.

    The hash is SplitMix64's finaliser, applied to one key after another. The keys are integers of Python, NumPy or
    torch; equal numbers give equal seeds. Raises TypeError for any other key.

    >>> mix(1, 2) == mix(1, 2), mix(1, 2) == mix(2, 1)
    (True, False)
    """
    state = 0
    for key in keys:
        state = (state + (operator.index(key) & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def generator(*keys: int) -> torch.Generator:
    """A CPU generator that depends only on `keys`. PyTorch uses 32 bits of their hash.

    >>> float(torch.rand((), generator=generator(0, 7))) == float(torch.rand((), generator=generator(0, 7)))
    True
    """
    return torch.Generator().manual_seed(mix(*keys))


def forked(device: torch.device) -> AbstractContextManager[None]:
    """A context after which the global generators of the CPU and of this device are as they were before it.

    >>> with forked(torch.device("cpu")):
    ...     first = torch.rand(())
    >>> bool(first == torch.rand(()))
    True
    """
    return torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)


def normal(seeds: Sequence[int], shape: Sequence[int], *keys: int) -> Tensor:
    """Standard normal draws, float32 [len(seeds), *shape]. Row i depends only on seeds[i] and `keys`.

    The CPU draws the numbers, so a seed gives the same image on every device. The draws come from NumPy's Philox, whose
    key takes all bits of `mix`. PyTorch's CPU generator keeps only 32 bits of a seed, and two of 50,000 images would
    then be expected to be equal.

    >>> torch.equal(normal([5, 6], (1, 4, 4), 10)[1], normal([6], (1, 4, 4), 10)[0])
    True
    """
    return _fill(np.empty((len(seeds), *shape), np.float32), seeds, keys)


def _fill(draws: NDArray[np.float32], seeds: Sequence[int], keys: Sequence[int]) -> Tensor:
    """Fill `draws` [len(seeds), *shape] with the numbers of `normal` and return them as a tensor."""
    philox = np.random.Philox(key=0)
    generator, state = np.random.Generator(philox), philox.state
    for row, seed in zip(draws, seeds, strict=True):
        # This equals Philox(key=...), but that constructor takes longer than drawing 8x8 pixels.
        state["state"]["key"][0] = mix(seed, *keys)
        philox.state = state
        generator.standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(draws)


def ahead(seeds: Sequence[int], shape: Sequence[int], device: torch.device | str, levels: Iterable[int]) -> Noise:
    """Like `per_image`, but threads draw the next levels while the device computes; `levels` is the order of the calls.

    Use it with a CUDA device, which would wait longer for the CPU's draws than for the network. NumPy draws without
    holding the interpreter's lock, and pinned memory is copied without blocking.

    >>> noise = ahead([0, 1], (3, 8, 8), "cpu", [1000, 500, 1])
    >>> [torch.equal(noise(t), normal([0, 1], (3, 8, 8), t)) for t in (1000, 500, 1)]
    [True, True, True]
    """
    pinned = torch.device(device).type == "cuda"
    threads = min(4, os.cpu_count() or 1)
    pool, order = ThreadPoolExecutor(threads), iter(levels)
    pending = deque[tuple[int, Future[Tensor]]]()

    def draw(t: int) -> Tensor:
        out = torch.empty(len(seeds), *shape, pin_memory=pinned)
        return _fill(out.numpy(), seeds, [t])

    def start(count: int) -> None:
        pending.extend((t, pool.submit(draw, t)) for t in itertools.islice(order, count))

    def noise(t: int) -> Tensor:
        expected, draws = pending.popleft()
        assert t == expected, (t, expected)
        start(1)
        return draws.result().to(device, non_blocking=True)

    start(threads)
    return noise


def per_image(seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> Noise:
    """The noise of the images with these seeds: `noise(t)` is float32 [len(seeds), *shape] on `device`.

    >>> noise = per_image([0, 1], (3, 8, 8))
    >>> noise(1000).shape, torch.equal(noise(3), noise(3)), torch.equal(noise(3), noise(4))
    (torch.Size([2, 3, 8, 8]), True, False)
    """
    # It waits for the copy: mps would read the draws after they are freed.
    return lambda t: normal(seeds, shape, t).to(device)


def assign(product: Tensor, told: Tensor) -> Tensor:
    """Which noise of a batch each image gets, so that the sum of squared distances is least (Li et al. 2024).

    The sum of |x_i - eps_j|^2 over all pairs is a constant minus twice the sum of <x_i, eps_j>, so the products decide.

    product  <x_i, eps_j>, [B, B], on the CPU
    told     [B, K], numbers that the network is told of each image. Only images with equal numbers exchange noise, so
             that given what the network is told, the noise is still standard normal. K = 0: all images may exchange

    Returns int64 [B]: image i gets the noise of place i of the result.

    >>> product = torch.tensor([[2.0, 3.0, 0.0], [0.0, 2.5, 0.0], [5.0, 0.0, 1.0]])
    >>> assign(product, torch.zeros(3, 0)).tolist()  # 3 + 0 + 5 is the largest sum
    [1, 2, 0]
    >>> assign(product, torch.tensor([[4], [4], [-1]])).tolist()  # the last image keeps its noise
    [0, 1, 2]
    """
    from scipy.optimize import linear_sum_assignment  # not at the top, because few runs use it

    groups = defaultdict[tuple[float, ...], list[int]](list)
    for place, numbers in enumerate(told.tolist()):
        groups[tuple(numbers)].append(place)
    order = torch.empty(len(product), dtype=torch.int64)
    for group in map(torch.tensor, groups.values()):
        _, places = linear_sum_assignment(product[group][:, group].numpy(), maximize=True)
        order[group] = group[places]
    return order

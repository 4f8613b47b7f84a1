"""Which images of a batch a process computes, and in which parts. The batch itself does not depend on it."""

from itertools import pairwise

from ddpm.errors import InputError


def parts(batch_size: int, world: int, rank: int, accumulate: int = 1, most: int | None = None) -> list[slice]:
    """The parts of a batch that process `rank` of `world` computes one after another: slices of 0..batch_size-1.

    The parts of all processes cover the batch once and in order. Their sizes differ by at most 1 within a process, and
    so do the processes' shares.

    accumulate  the parts of a process
    most        the images that a process may compute at once; then there are more parts

    Raises InputError if there are fewer images than processes.

    >>> [parts(128, 3, rank) for rank in range(3)]
    [[slice(0, 42, None)], [slice(42, 85, None)], [slice(85, 128, None)]]
    >>> parts(128, 2, 1, accumulate=2)
    [slice(64, 96, None), slice(96, 128, None)]
    >>> len(parts(128, 2, 1, most=20))
    4
    """
    if batch_size < world:
        raise InputError(f"batch_size {batch_size}: {world} processes; want an image for each, or fewer processes")
    first, last = rank * batch_size // world, (rank + 1) * batch_size // world
    share = last - first
    count = min(share, max(accumulate, -(-share // most) if most else 1))
    bounds = [first + i * share // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(bounds)]


def largest(batch_size: int, world: int, accumulate: int = 1, most: int | None = None) -> int:
    """The most images that a process computes at once.

    >>> largest(128, 3), largest(128, 3, accumulate=2)
    (43, 22)
    """
    last = parts(batch_size, world, world - 1, accumulate, most)  # no process has a larger share
    sizes: list[int] = [part.stop - part.start for part in last]
    return max(sizes)


def divisor(size: int, batch_size: int, world: int) -> float:
    """What the mean loss of `size` images is divided by, so that the mean over processes is the mean over the batch.

    DDP averages the gradients of all processes alike, whatever their shares. With equal parts this is `accumulate`.

    >>> divisor(32, 128, 2), divisor(42, 128, 3)
    (2.0, 1.0158730158730158)
    """
    return batch_size / (size * world)

"""Features of images, over processes: moments are merged block by block, and rows lie on the disk.

The blocks and the order in which they are merged do not depend on the number of processes. So the result does not
either, as far as the network gives the same features.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ddpm.errors import InputError
from ddpm.files import atomic, features
from ddpm.metrics import Moments, moments
from ddpm.run.processes import Processes
from ddpm.run.progress import Progress
from ddpm.run.saved import Samples

_BLOCK = 1024
"""The least images of a block. A block's moments are computed at once, since merging is slow."""


def measure(
    network: features.Network, images: Samples, ranks: Processes, scratch: Path, keep_features: bool = False,
    keep_probabilities: bool = False, progress: bool = True,
) -> features.Measured:  # fmt: skip
    """Run a feature network over images as `features.measure` does, with blocks of images divided over processes.

    All processes get the moments. The first one gets the rows that are to be kept, in files without a name in the
    folder `scratch`: 8 N D bytes, which are mapped into memory. Beside these a process holds a batch of images, a block
    of features and three covariances. Raises InputError as `features.measure` does.

    >>> from ddpm.files import data
    >>> rows = features.Network("rows", "", "", 64, lambda x: (x.flatten(1).numpy(), None))
    >>> digits, alone = data.load("digits", (8, 8), 1), Processes(0, 1, torch.device("cpu"))
    >>> found = measure(rows, digits, alone, Path(tempfile.mkdtemp()), keep_features=True, progress=False)
    >>> found.moments.count, found.features.shape
    (1500, (1500, 64))
    """
    n, step = len(images), network.batch_size
    block = -(-_BLOCK // step) * step
    blocks = [range(start, min(start + block, n)) for start in range(0, n, block)]
    kept = {"features": keep_features, "probabilities": keep_probabilities}
    files = {name: _Rows(scratch, n) for name, keep in kept.items() if keep and ranks.first}
    total: Moments | None = None
    mine = sum(len(blocks[i]) for i in ranks.mine(len(blocks)))
    with Progress[None](total=mine, desc="features", unit="image", show=progress) as bar:
        for first in range(0, len(blocks), ranks.world):
            turn = range(first, min(first + ranks.world, len(blocks)))
            values: dict[str, Tensor] = {}
            if first + ranks.rank in turn:
                values = _block(network, images, blocks[first + ranks.rank], step, keep_probabilities, bar)
            ranks.exchange()  # wait for the blocks of the others as long as they live
            for source, i in enumerate(turn):
                mean = _from(ranks, source, values.get("mean"))
                covariance = _from(ranks, source, values.get("covariance"))
                part = Moments(len(blocks[i]), mean.numpy(), covariance.numpy())
                if total is not None and total.mean.shape != part.mean.shape:
                    raise InputError(f"{network.name}: gives features of different lengths for different batches")
                total = part if total is None else total + part
                for name, keep in kept.items():
                    if keep and (rows := _from(ranks, source, values.get(name))) is not None and ranks.first:
                        files[name].add(rows)
    if total is None:
        raise InputError("0 images: want at least 1")
    found: dict[str, Any] = {name: file.mapped() for name, file in files.items()}
    return features.Measured(total, found.get("features"), found.get("probabilities"))


def _block(
    network: features.Network, images: Samples, places: range, step: int, classifies: bool, bar: Progress[None]
) -> dict[str, Tensor]:
    """The features of a block of images, their moments, and class probabilities if they are wanted; float64."""
    rows: list[features.Floats] = []
    probabilities: list[features.Floats] = []
    for start in range(places.start, places.stop, step):
        batch = range(start, min(start + step, places.stop))
        some, classes = network(images.batch(batch))
        if rows and some.shape[1] != rows[0].shape[1]:
            raise InputError(f"{network.name}: gives features of different lengths for different batches")
        rows.append(some)
        if classifies:
            if classes is None:
                raise InputError(f"{network.name}: gives no probabilities, which the Inception score needs")
            probabilities.append(classes)
        bar.update(len(batch))
    part = moments(np.concatenate(rows))
    arrays = {"features": np.concatenate(rows), "mean": part.mean, "covariance": part.covariance}
    if classifies:
        arrays["probabilities"] = np.concatenate(probabilities)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _from(ranks: Processes, source: int, x: Tensor | None) -> Tensor:
    """The float64 tensor of at most two dimensions that the process `source` has, for all processes."""
    if ranks.world == 1:
        assert x is not None
        return x
    is_mine = ranks.rank == source
    assert x is not None or not is_mine
    shape = torch.tensor([x.ndim, *x.shape, 0][:3]) if is_mine and x is not None else torch.zeros(3, dtype=torch.int64)
    dist.broadcast(shape, source)
    size = shape[1 : 1 + int(shape[0])].tolist()
    value = x.contiguous() if is_mine and x is not None else torch.empty(size, dtype=torch.float64)
    dist.broadcast(value, source)
    return value


class _Rows:
    """Rows of float64 on the disk, written in order. The file has no name, so nothing of it is left."""

    def __init__(self, folder: Path, n: int) -> None:
        self._file = tempfile.TemporaryFile(dir=atomic.make_folder(folder))
        self._n, self._width = n, 0

    def add(self, rows: Tensor) -> None:
        self._width = rows.shape[1]
        self._file.write(rows.contiguous().numpy().data)

    def mapped(self) -> features.Floats:
        """All rows [n, D]; what is written into them stays in memory."""
        self._file.flush()
        return np.memmap(self._file, np.float64, "c", shape=(self._n, self._width))

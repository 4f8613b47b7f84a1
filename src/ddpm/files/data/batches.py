"""Batches of images in an order that is a function of (seed, step)."""

import math
import multiprocessing
import os
import signal
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ddpm.catalog import Workers
from ddpm.errors import InputError, Stopped
from ddpm.files import images as pictures
from ddpm.files.data.loading import Images, take
from ddpm.noise import generator

STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
"""What a person or a cluster sends to stop a run. Windows does not have all of them."""
_CROP = 0xC809
"""Key of the places of random crops. It keeps them apart from other draws of the same seed."""
_TRIAL = 4
"""Steps that are timed for workers "auto"; the fastest ones count, since the first one also compiles."""
_LITTLE, _SPARE = 0.02, 1.25
"""The share of a step below which decoding needs no process of its own; and how much faster decoding is to be."""
_AHEAD, _LARGE = 4, 1 << 25
"""Batches that each worker decodes ahead, if one takes less than so many bytes; otherwise 2."""
_TRIES = 5
"""How often workers may die without a batch in between."""


def crop_places(images: Images, seed: int, step: int, batch_size: int) -> Tensor | None:
    """The places of a step's random crops, float64 [batch_size, 2] in 0 <= u < 1; None if `images` has another fit.

    They are a function of (seed, step, place in the batch of all processes), so workers, processes and resuming change
    nothing.

    >>> from ddpm.files.data import load
    >>> crop_places(load("digits", (4, 4), 1, fit="random-crop"), 0, 7, 16).shape
    torch.Size([16, 2])
    """
    if images.decoder.form.fit != "random-crop":
        return None
    return torch.rand(batch_size, 2, generator=generator(seed, step, _CROP), dtype=torch.float64)


def _what(images: Images, seed: int, step: int, batch_size: int, part: slice) -> tuple[Tensor, Tensor | None]:
    """What a process decodes in a step: indices and places."""
    places = crop_places(images, seed, step, batch_size)
    return images.order(seed, step, batch_size)[part], None if places is None else places[part]


_Reports: TypeAlias = list[tuple[dict[int, str], pictures.Notes]]
"""The arguments of `Images.report`, for the images, and for their pairs."""
_Step: TypeAlias = tuple[int | NDArray[Any], _Reports] | str


def _sources(images: Images) -> list[Images]:
    """The images, and their pairs if they have any, in the order of the channels of a batch."""
    return [images] if images.pair is None else [images, images.pair]


def _room(images: Images, batch_size: int, part: slice) -> NDArray[Any]:
    """Zeros for a batch of this process, [b, C, H, W], or [b, 2 C, H, W] with pairs."""
    zeros = images.decoder.form.zeros(len(range(batch_size)[part]))
    return np.concatenate([zeros] * len(_sources(images)), axis=1)


def _decode(
    images: Images, seed: int, step: int, batch_size: int, part: slice, out: NDArray[Any] | None = None
) -> tuple[NDArray[Any], _Reports]:
    """The images of a step, in `out` if it is given, and what is to be reported of them."""
    out = _room(images, batch_size, part) if out is None else out
    sources, reports = _sources(images), _Reports()
    for each, planes in zip(sources, np.split(out, len(sources), axis=1), strict=True):
        _, faults, notes = each.decode(*_what(each, seed, step, batch_size, part), out=planes)
        reports.append((faults, notes))
    return out, reports


def _report(images: Images, reports: _Reports) -> None:
    for each, report in zip(_sources(images), reports, strict=True):
        each.report(*report)


def _decoded(images: Images, seed: int, step: int, batch_size: int, part: slice) -> Tensor:
    """The images of a step, decoded by this process."""
    pixels, reports = _decode(images, seed, step, batch_size, part)
    _report(images, reports)
    return torch.from_numpy(pixels)


@dataclass
class _Steps(Dataset[_Step]):
    """(step, slot) -> the slot of its images, or an error as a string: torch makes many lines of an error in a worker.

    slots  shared memory, [S, B, C, H, W]. To send images in another way would cost as much as to decode them, most of
           it for new pages of memory. So only a step without a slot sends its images, as an array of NumPy: a tensor
           would need shared memory, too
    """

    images: Images
    seed: int
    batch_size: int
    part: slice
    slots: Tensor

    def __getitem__(self, where: tuple[int, int | None]) -> _Step:
        step, slot = where
        try:
            out = None if slot is None else self.slots[slot].numpy()
            pixels, reports = _decode(self.images, self.seed, step, self.batch_size, self.part, out)
            return pixels if slot is None else slot, reports
        except InputError as fault:
            return str(fault)


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """x on `device`. The copy to a CUDA device goes through pinned memory, so that the CPU does not wait for it.

    >>> send(torch.ones(2), "cpu")
    tensor([1., 1.])
    """
    if torch.device(device).type == "cuda" and not x.is_cuda:
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def _fits(pixels: Tensor, device: torch.device) -> bool:
    """Whether the images take less than a quarter of a CUDA device's free memory; the network needs the rest."""
    return device.type == "cuda" and pixels.nbytes < torch.cuda.mem_get_info(device)[0] // 4


def _in_worker(_: int) -> None:
    """Ignore what a terminal or a cluster sends to all processes of a group; the parent process ends its workers."""
    for name in STOP_SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


@contextmanager
def _no_handler_of_torch() -> Iterator[None]:
    """Keep the SIGCHLD handler that torch sets with its workers from staying.

    That handler raises an error wherever the main thread is when a worker dies, as in the middle of an update. Without
    it, the loader finds out within five seconds when it waits for a batch.
    """
    before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    yield
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)


def batches(
    images: Images,
    seed: int,
    batch_size: int,
    start: int,
    stop: int,
    *,
    part: slice | None = None,
    workers: Workers = 2,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = lambda line: None,
) -> Generator[Tensor, None, None]:
    """Yield the images of each step in start..stop-1, as `order` lists them: [b, C, H, W] on `device`.

    part     the slice of each batch that this process takes; None: all of it
    workers  processes that decode ahead, if the images are not in memory (0: none); closing the iterator ends them.
             auto: this process decodes the first batches, and their times tell how many there are (`enough_workers`)
    say      is told that number

    Images with a `pair` are [b, 2 C, H, W], and the other image of each pair is in the last C channels.

    Images that are in memory are copied to a CUDA device once, if they fit. Workers that die are started again, with
    the same batches, since the order is a function of the step. Raises what `Images.batch` raises, and Stopped if
    workers die again and again.

    >>> from ddpm.files.data import load
    >>> next(batches(load("digits", (8, 8), 1), seed=0, batch_size=16, start=5, stop=9)).shape
    torch.Size([16, 1, 8, 8])
    """
    part, device = part or slice(None), torch.device(device)
    sources = _sources(images)
    held = [each.pixels for each in sources if each.pixels is not None]
    if len(held) == len(sources):
        held = [pixels.to(device) if _fits(pixels, device) else pixels for pixels in held]
        for step in range(start, stop):
            taken = []
            for each, pixels in zip(sources, held, strict=True):
                rows = each.rows[each.order(seed, step, batch_size)[part]]
                taken.append(send(take(pixels, send(rows, pixels.device)), device))
            yield torch.cat(taken, dim=1) if len(taken) > 1 else taken[0]
        return
    if workers == "auto":
        first = range(start, min(start + _TRIAL, stop))
        workers = yield from _trial(images, seed, batch_size, first, part, device, say)
        start = first.stop
    if workers == 0:
        for step in range(start, stop):
            yield send(_decoded(images, seed, step, batch_size, part), device)
        return
    faults_in_a_row = 0
    while start < stop:
        try:
            for batch in _by_workers(images, seed, batch_size, part, range(start, stop), workers):
                yield send(batch, device)
                start, faults_in_a_row = start + 1, 0
        except _WorkerDied as error:
            faults_in_a_row += 1
            if faults_in_a_row == _TRIES:
                raise Stopped(
                    f"step {start}: the processes that decode images died {_TRIES} times in a row ({error}); "
                    "the memory may be full: want fewer workers, or workers 0"
                ) from None


def enough_workers(decoding: float, training: float, cores: int) -> int:
    """How many processes decode so that training does not wait: 0 if decoding takes next to no time.

    decoding  seconds in which one process decodes the images of a step
    training  seconds of a step without that
    cores     the most

    >>> enough_workers(0.3, 0.1, 8), enough_workers(0.3, 0.1, 2), enough_workers(0.001, 1.0, 8)
    (4, 2, 0)
    """
    if decoding < _LITTLE * training:
        return 0
    return max(1, min(cores, math.ceil(_SPARE * decoding / max(training, 1e-9))))


def _trial(
    images: Images, seed: int, batch_size: int, steps: range, part: slice, device: torch.device,
    say: Callable[[str], None],
) -> Generator[Tensor, None, int]:  # fmt: skip
    """Yield the batches of these steps, decoded by this process, and return how many workers are enough."""
    decoding, training = [], []
    for step in steps:
        begun = time.monotonic()
        batch = _decoded(images, seed, step, batch_size, part)
        decoded = time.monotonic()
        yield send(batch, device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        decoding.append(decoded - begun)
        training.append(time.monotonic() - decoded)
    if len(steps) < _TRIAL:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    workers = enough_workers(min(decoding), min(training), cores)
    say(f"workers {workers}: decoding a batch takes {min(decoding):.2g} s, and training with it {min(training):.2g} s")
    return workers


class _WorkerDied(Exception):
    """A process that decodes was killed, as the system does when memory is full, or a signal to the whole group."""


def _lent(slots: Tensor, slot: int, free: deque[int]) -> Tensor:
    """The batch in this slot, without a copy. The slot is free again when nobody has the batch any more."""
    pixels = slots[slot].numpy()
    weakref.finalize(pixels, free.append, slot).atexit = False
    return torch.from_numpy(pixels)


def _unchanged(result: Any) -> Any:
    return result


def _shared(count: int, batch: Tensor) -> Tensor:
    """Shared memory for `count` batches like this one, or for none if there is not so much, as in some containers."""
    try:
        slots: Tensor = batch.new_empty(count, *batch.shape).share_memory_()  # type: ignore[no-untyped-call]
        return slots
    except RuntimeError:
        size = count * batch.nbytes / 2**20
        warnings.warn(
            f"there are no {size:,.0f} MiB of shared memory, so decoded images come through pipes", stacklevel=2
        )
        return batch.new_empty(0, *batch.shape)


def _by_workers(
    images: Images, seed: int, batch_size: int, part: slice, steps: range, workers: int
) -> Iterator[Tensor]:
    """The batches of these steps, decoded ahead by other processes, which end with the iterator."""
    batch = _room(images, batch_size, part)
    ahead = _AHEAD if batch.nbytes < _LARGE else 2
    # a step begins before the batch of an earlier one is given out, while the caller still has the batch before that
    slots = _shared(min(workers * ahead + 2, len(steps)), torch.from_numpy(batch))
    free = deque(range(len(slots)))
    loader = DataLoader(
        _Steps(images, seed, batch_size, part, slots),
        batch_size=None,
        collate_fn=_unchanged,  # the default makes tensors of arrays
        sampler=((step, free.popleft() if free else None) for step in steps),
        num_workers=workers,
        prefetch_factor=ahead,
        worker_init_fn=_in_worker,
        generator=torch.Generator(),  # the default is the global generator, whose state would change
    )
    before = multiprocessing.active_children()
    with _no_handler_of_torch():
        results = iter(loader)
    started = set(multiprocessing.active_children()).difference(before)
    try:
        while True:
            try:
                result = next(results)
            except StopIteration:
                return
            except (RuntimeError, EOFError, OSError) as error:  # the last two: it died while it sent a batch
                if not connection.wait([worker.sentinel for worker in started], timeout=5):  # all are alive
                    raise
                raise _WorkerDied(str(error).partition("\n")[0] or type(error).__name__) from None
            if isinstance(result, str):
                raise InputError(result)
            slot, reports = result
            _report(images, reports)
            yield _lent(slots, slot, free) if isinstance(slot, int) else torch.from_numpy(slot)
    finally:
        del results  # it is the last reference, so this ends the workers

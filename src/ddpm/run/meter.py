"""The loss, the speed and the waiting that a run logs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ddpm.run.processes import Processes

_WAITS = 0.1
"""The share of waiting for data that is worth a line."""


class Meter:
    """The mean loss and the speed since the last line of the log.

    total, steps  the sum of losses, and of how many steps
    rate          images a second up to the last line; None before it
    left_out      seconds so far that were not training time
    """

    def __init__(self, seconds: float, ranks: Processes, batch_size: int) -> None:
        self._before, self._ranks, self._batch_size = seconds, ranks, batch_size
        self._started = self._since = time.perf_counter()
        self.total, self.steps = torch.zeros((), device=ranks.device), 0
        self.rate: float | None = None
        self.left_out = 0.0
        self._waited = self._all_waited = self._all_seconds = 0.0
        self._warned = False

    def see(self, loss: Tensor) -> None:
        """Count a step of this loss."""
        self.total += loss
        self.steps += 1

    def seconds(self) -> float:
        """Seconds of training, with those of earlier processes."""
        return self._before + time.perf_counter() - self._started

    def line(self, lr: float, norm: Tensor) -> dict[str, float]:
        """A line of the log; the next one begins here."""
        now = time.perf_counter()
        self.rate = self.steps * self._batch_size / (now - self._since)
        loss = float(self._ranks.total((self.total / self.steps).cpu())) / self._ranks.world
        self.total.zero_()
        passed, waited = now - self._since, self._waited
        self.steps, self._since, self._waited = 0, now, 0.0
        self._all_waited, self._all_seconds = self._all_waited + waited, self._all_seconds + passed
        return {
            "loss": loss,
            "lr": lr,
            "grad_norm": float(norm),
            "images_per_second": self.rate,
            "data_wait": waited / passed,
            "seconds": self._before + now - self._started,
        }

    def waiting(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        """The batches; the time until each one comes is waiting for data."""
        while True:
            begun = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - begun
            if batch is None:
                return
            yield batch

    def waits(self) -> str:
        """One line if training waits for data, once in a run."""
        share = self._all_waited / self._all_seconds
        if self._warned or self._all_seconds < 5 or share < _WAITS:
            return ""
        self._warned = True
        return (
            f"training waits for data {share:.0%} of the time; more workers, a larger cache_bytes or images stored at "
            "their size in training would help"
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of a block out of the speed, since evaluation and pictures are not training time."""
        before = time.perf_counter()
        yield
        self.left_out += (passed := time.perf_counter() - before)
        self._since += passed

"""What asks a run to stop: signals, and the death of the agent that started its process."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ddpm.files import data
from ddpm.run.processes import Processes


class Stop:
    """Whether this process is asked to stop, by a signal or by the death of the agent that started it."""

    def __init__(self, several: bool) -> None:
        self.signal: int | None = None
        self.since = 0.0
        self._parent = os.getppid() if several else None

    def asked(self) -> bool:
        if self.signal is None and self._parent not in (None, os.getppid()):
            self.signal = signal.SIGTERM  # nobody is left to end this process, or to start it again
        return self.signal is not None


_ECHO = 3.0
"""Seconds in which torchrun passes on the Ctrl-C that the terminal has sent to all processes already."""


@contextmanager
def asking_to_stop(several: bool = False) -> Iterator[Stop]:
    """Signals that ask the run to stop set a flag, which the loop reads after each step. A second Ctrl-C interrupts.

    A signal that is ignored, as SIGHUP under nohup, stays ignored. Outside the main thread Python sets no handlers.
    `several` processes also stop if their parent dies.
    """
    stop = Stop(several)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, _: object) -> None:
        if stop.signal is not None and number == signal.SIGINT and time.monotonic() - stop.since > several * _ECHO:
            raise KeyboardInterrupt
        if stop.signal is None:
            stop.since = time.monotonic()
        if stop.signal != signal.SIGINT:  # torchrun follows up with SIGTERM
            stop.signal = number

    numbers = [getattr(signal, name) for name in data.STOP_SIGNALS if hasattr(signal, name)]
    old = {n: signal.signal(n, handle) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


PREEMPTED = "preempted"
"""The file in a run's folder that says which signal stopped the run, and at which step; Ctrl-C writes none."""


def signal_of_all(stop: Stop, ranks: Processes) -> int:
    """The signal that stopped the run: SIGINT if any process got it, else the largest number."""
    got = ranks.interleave(torch.tensor([stop.signal or 0]), ranks.world).tolist()
    return signal.SIGINT if signal.SIGINT in got else max(got)

"""How far a program is: a bar on a terminal, and elsewhere lines of a log, one at least every 30 seconds.

Only one process shows its progress, the first, so counts are those of its share of the work.
"""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, Generic, TypeVar

import torch
from tqdm import tqdm

from ddpm.errors import one_line
from ddpm.run.forecast import duration, gib, peak_memory

EVERY = 30.0
"""Seconds from line to line."""
_LINES = 10
"""Speed is measured since so many lines ago, so that what an earlier process had done does not count for long."""

_open: list["Progress[Any]"] = []
"""Those that print lines, the outermost first. Only the first one prints, and its line tells of all."""
_lock = threading.RLock()

T = TypeVar("T")


class Progress(Generic[T]):
    """Counts what is done, and shows it on stderr: by tqdm on a terminal, and else by lines.

    items    what is gone through, one `update` each; None if the caller calls `update`
    total    how much there is to do; None: as many as there are items, or unknown
    desc     what is done, for the line
    unit     what is counted, in the singular
    initial  how much was done before
    show     whether anything is shown; false for all processes but the first
    leave    whether the full bar stays on the terminal
    form     tqdm's bar_format
    clock    seconds, for lines

    Lines come from a thread, too, so that they also come during a long step. When this is closed, no more lines come.

    >>> with Progress(total=3, desc="counting", show=False) as bar:
    ...     bar.update(2)
    >>> bar.n
    2
    """

    def __init__(
        self, items: Iterable[T] = (), *, total: int | None = None, desc: str = "", unit: str = "step",
        initial: int = 0, show: bool = True, leave: bool = True, form: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._items, self.desc, self.unit, self.n = items, desc, unit, initial
        self.total = len(items) if total is None and isinstance(items, Sized) and len(items) else total
        self._postfix, self._clock, self._said, self._printed = "", clock, clock(), -1
        self._seen = deque([(self._said, initial)], _LINES)
        self._ended = threading.Event()
        self._bar: tqdm[Any] | None = None
        if not show:
            return
        if sys.stderr is not None and sys.stderr.isatty():
            self._bar = tqdm(total=self.total, initial=initial, desc=desc, unit=unit, leave=leave, bar_format=form)
            return
        with _lock:
            _open.append(self)
            if _open[0] is self:
                threading.Thread(target=self._watch, name="ddpm progress", daemon=True).start()

    def update(self, count: float = 1) -> None:
        """`count` more are done."""
        self.n += int(count)
        if self._bar is not None:
            self._bar.update(count)
        if self in _open:
            _open[0]._look()

    def set_postfix_str(self, text: str) -> None:
        """What else the bar and the lines say."""
        self._postfix = text
        if self._bar is not None:
            self._bar.set_postfix_str(text)

    def close(self) -> None:
        """Show nothing more. If lines were printed and all is done, a last line says so."""
        if self._bar is not None:
            self._bar.close()
        with _lock:
            self._ended.set()
            if self in _open:
                if 0 <= self._printed < self.n == self.total:
                    self._print()
                _open.remove(self)

    def __enter__(self) -> "Progress[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[T]:
        with self:
            for item in self._items:
                yield item
                self.update()

    # -- lines ---------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Print when it is time, until this is closed."""
        while not self._ended.wait(max(0.05, self._said + EVERY - self._clock())):
            self._look()

    def _look(self) -> None:
        """Print a line if it is time."""
        with _lock:
            if _open and _open[0] is self and self._clock() - self._said >= EVERY:
                self._print()

    def _print(self) -> None:
        self._said, self._printed = self._clock(), self.n
        on_gpu: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        memory = peak_memory(torch.device("cuda" if on_gpu else "cpu"))
        parts = [bar.line(self._said) for bar in _open if bar is self or _open[0] is self]
        parts[-1] += f", {gib(memory)} of memory" if memory else ""
        tqdm.write(one_line("; ".join(parts)), file=sys.stderr)

    def line(self, now: float) -> str:
        """What is done by the time `now`, how fast, and what is left."""
        (since, before), unit = self._seen[0], self.unit + ("es" if self.unit.endswith("ch") else "s")
        self._seen.append((now, self.n))
        rate = (self.n - before) / (now - since) if now > since else 0.0
        of = f" of {self.total:,}" if self.total else ""
        text = f"{self.desc}: " * bool(self.desc) + f"{self.n:,}{of} {unit}"
        text += f" ({self.n / self.total:.0%})" if self.total else ""
        text += f", {rate:.3g} {unit}/s" if rate else ""
        if rate and self.total and self.n < self.total:
            text += f", {duration((self.total - self.n) / rate)} left"
        return text + (f", {self._postfix}" if self._postfix else "")


def close_all() -> None:
    """Close what an error left open, so that no line comes after it."""
    for bar in list(_open):
        bar.close()

"""Measuring time: repeats of several cases in turns, ratios of two cases, and the parts of one program."""

import functools
import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from figures import Spread, spread

Case = Callable[[], object]
"""A function that makes one call of what is measured."""


class Timed(float):
    """Seconds that a case has measured itself. `interleave` then takes this value and not the duration of the case."""


def interleave(
    cases: Mapping[str, Case], repeats: int, seconds: float = 1.0, sync: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds per call, `repeats` values for each case.

    The cases take turns (a, b, c, a, b, c, ...), so other load on the machine affects all of them alike. Each case
    first runs once to warm up. A repeat makes as many calls as take `seconds`. `sync` waits for the device.
    """
    calls, times = {}, {name: list[float]() for name in cases}
    for name, case in cases.items():
        first = case()
        calls[name] = 1 if isinstance(first, Timed) else max(1, math.ceil(seconds / _seconds(case, 1, sync)))
    for _ in range(repeats):
        for name, case in cases.items():
            times[name].append(_seconds(case, calls[name], sync))
    return times


def _seconds(case: Case, calls: int, sync: Callable[[], object]) -> float:
    sync()
    start = time.perf_counter()
    for _ in range(calls):
        last = case()
    sync()
    return float(last) if isinstance(last, Timed) else (time.perf_counter() - start) / calls


def ratio(times: Mapping[str, Sequence[float]], ours: str, theirs: str) -> Spread:
    """How many times as fast `ours` is as `theirs`: the spread of the ratios of times from the same turn."""
    return spread(b / a for a, b in zip(times[ours], times[theirs], strict=True))


def fastest(times: Mapping[str, Sequence[float]], names: Iterable[str]) -> str:
    """The one of `names` with the least median time."""
    return min(names, key=lambda name: statistics.median(times[name]))


class Parts:
    """The time of each part of a program, without the time of the parts that it calls.

    >>> parts = Parts()
    >>> with parts("whole"), parts("piece"):
    ...     pass
    >>> sorted(parts.seconds)
    ['piece', 'whole']
    """

    def __init__(self, sync: Callable[[], object] = lambda: None) -> None:
        self.seconds: dict[str, float] = {}
        self._stack: list[str] = []
        self._since, self._sync = 0.0, sync

    def charge(self) -> None:
        """Add the time since the last call to the part that is running."""
        self._sync()
        now = time.perf_counter()
        if self._stack:
            name = self._stack[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.charge()
        self._stack.append(name)
        try:
            yield
        finally:
            self.charge()
            self._stack.pop()

    @contextmanager
    def timing(self, *places: tuple[Any, str, str]) -> Iterator[None]:
        """While the context is open, calls of owner.attribute count for a part. Places are (owner, attribute, part)."""
        originals = [(owner, attribute, getattr(owner, attribute)) for owner, attribute, _ in places]
        for (owner, attribute, function), (_, _, part) in zip(originals, places, strict=True):
            setattr(owner, attribute, self._wrapped(function, part))
        try:
            yield
        finally:
            for owner, attribute, function in originals:
                setattr(owner, attribute, function)

    def _wrapped(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        if inspect.isgeneratorfunction(function):  # each item counts, not the call that makes the generator

            @functools.wraps(function)
            def timed_items(*args: Any, **kwargs: Any) -> Iterator[Any]:
                items, end = function(*args, **kwargs), object()
                while True:
                    with self(part):
                        item = next(items, end)
                    if item is end:
                        return
                    yield item

            return timed_items

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(part):
                return function(*args, **kwargs)

        return timed

"""A function that reports to a callback, as a generator."""

import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Left(Exception):
    """Nobody listens any more."""


def watched(function: Callable[[Callable[[T], None]], R]) -> Generator[T, None, R]:
    """Yield what `function` tells the callback that it is given, and return what it returns.

    The function runs in a thread of its own. Once the generator is closed, the next call of the callback raises Left,
    which ends the function; the generator waits for that.

    >>> list(watched(lambda tell: [tell(2), tell(3)]))
    [2, 3]
    """
    told: SimpleQueue[tuple[T] | None] = SimpleQueue()
    left = threading.Event()

    def tell(value: T) -> None:
        if left.is_set():
            raise Left
        told.put((value,))

    with ThreadPoolExecutor(1, "watched") as thread:
        result = thread.submit(function, tell)
        result.add_done_callback(lambda _: told.put(None))
        try:
            while (item := told.get()) is not None:
                yield item[0]
        finally:
            left.set()
        return result.result()

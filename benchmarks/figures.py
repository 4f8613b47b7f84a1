"""Spreads and markdown tables. This file imports no torch, so a script that only starts other scripts is quick."""

import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """The median, the least and the most of a figure's repeats."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        median, low, high = (f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}" for x in self)
        return f"{median} ({low} - {high})"


def spread(values: Iterable[float]) -> Spread:
    """The spread of some values.

    >>> spread([4.0, 1.0, 2.0])
    Spread(median=2.0, low=1.0, high=4.0)
    """
    values = list(values)
    return Spread(statistics.median(values), min(values), max(values))


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in markdown.

    >>> print(table(["a", "b"], [[1, 2]]), end="")
    | a | b |
    | --- | --- |
    | 1 | 2 |
    """
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)

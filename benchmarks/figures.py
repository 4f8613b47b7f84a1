"""Figures and tables in words. This file imports no torch, so a script that only starts others is quick."""

import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """Repeats of one figure: the middle one, the least and the most."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        middle, low, high = (f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}" for x in self)
        return f"{middle} ({low} - {high})"


def spread(values: Iterable[float]) -> Spread:
    values = list(values)
    return Spread(statistics.median(values), min(values), max(values))


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)

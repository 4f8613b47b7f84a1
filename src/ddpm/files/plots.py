"""Curves as PNG or SVG. Only this module uses matplotlib, and imports it when something is drawn."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ddpm.errors import not_installed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, which the colour-blind can tell apart; those that show best on white come first."""

_INK, _GREY, _GRID = "#333333", "#888888", "#DDDDDD"
_STYLE: dict[str, Any] = {
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"], "font.size": 9,
    "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.edgecolor": _GREY, "axes.labelcolor": _INK, "text.color": _INK, "xtick.color": _INK, "ytick.color": _INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": _GRID, "grid.linewidth": 0.6,
    "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0, "ytick.minor.size": 0,
    "legend.frameon": False, "legend.fontsize": 8,
    "text.parse_math": False, "svg.hashsalt": "ddpm", "svg.fonttype": "none",
}  # fmt: skip


@dataclass(frozen=True)
class Panel:
    """One set of axes.

    title   what the panel shows
    lines   label -> (x, y) of equal length. nan, infinity, None and values that a log axis cannot show are gaps. A line
            whose label starts with "paper" is dashed and grey. More lines than COLOURS get colours in their order
    x, y    labels of the axes, with units; log_x and log_y make an axis logarithmic
    style   line, with a dot at each value if there are few, or points
    faint   labels of lines in the background
    """

    title: str
    lines: Mapping[str, tuple[Sequence[float | None], Sequence[float | None]]]
    x: str
    y: str
    log_x: bool = False
    log_y: bool = False
    style: Literal["line", "points"] = "line"
    faint: Sequence[str] = ()


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def check() -> None:
    """Raise InputError unless matplotlib is installed."""
    if not available():
        raise not_installed("matplotlib", "plots")


def draw(panels: Sequence[Panel], columns: int | None = None, format: Literal["png", "svg"] = "png") -> bytes:
    """The panels as one picture, row by row: the bytes of a file. The same panels give the same bytes.

    columns  panels in a row; None: all of up to three panels, or a square of more

    Raises ValueError for no panel, for a line whose x and y differ in length, and for another format. Raises InputError
    if matplotlib is not installed.

    >>> loss = Panel("loss", {"training": ([50, 100, 150], [0.7, None, 0.1])}, "step", "L_simple", log_y=True)
    >>> draw([loss])[1:4]
    b'PNG'
    """
    if not panels or format not in ("png", "svg"):
        raise ValueError(f"{len(panels)} panels as {format!r}: want at least one, as png or svg")
    check()
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    n = len(panels)
    columns = min(n, columns or (3 if n <= 3 else math.ceil(math.sqrt(n))))
    rows = math.ceil(n / columns)
    # The default style and no date, so that the bytes depend on the panels only.
    with style.context(["default", _STYLE]), io.BytesIO() as file:
        figure = Figure(figsize=(5 * columns, 3.2 * rows), layout="constrained")  # inches
        for i, panel in enumerate(panels):
            _draw(figure.add_subplot(rows, columns, i + 1), panel)
        if format == "png":
            FigureCanvasAgg(figure)
            figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
        else:
            FigureCanvasSVG(figure)
            figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        return file.getvalue()


def _draw(axes: Axes, panel: Panel) -> None:
    from matplotlib import colormaps

    axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    lines = {label: (_values(x, panel.log_x), _values(y, panel.log_y)) for label, (x, y) in panel.lines.items()}
    if panel.log_x:
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis, [x for x, _ in lines.values()])
    if panel.log_y:
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis, [y for _, y in lines.values()])
    ours = [label for label in lines if not label.startswith("paper")]
    colours: Sequence[Any] = COLOURS
    if len(ours) > len(colours):
        # without yellow, which is hard to see on white
        colours = colormaps["viridis"](np.linspace(0, 0.9, len(ours))).tolist()
    for label, (x, y) in lines.items():
        if len(x) != len(y):
            raise ValueError(f"{panel.title}, {label}: {len(x)} x and {len(y)} y, want as many")
        paper, faint = label not in ours, label in panel.faint
        points = panel.style == "points"
        axes.plot(
            x, y, label=label,
            color=_GREY if paper else colours[ours.index(label)],
            linestyle="none" if points else "--" if paper else "-",
            linewidth=0.8 if faint else 1.5,
            alpha=0.35 if faint else 1.0,
            marker="o" if points or len(x) <= 25 else "none",
            markersize=3,
        )  # fmt: skip
    if len(lines) > 5:  # a long legend would hide lines, so it goes beside the axes
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0)
    elif len(lines) > 1:
        axes.legend()


def _values(values: Sequence[float | None], log: bool) -> NDArray[np.float64]:
    """The values with nan in place of those that are not drawn."""
    array = np.array([math.nan if v is None else v for v in values], np.float64)
    array[~np.isfinite(array) | (log & (array <= 0))] = math.nan
    return array


def _plain_ticks(axis: Axis, values: Sequence[NDArray[np.float64]]) -> None:
    """Label a log axis with plain numbers: 1 of each decade, or 1, 2 and 5 of each of up to two decades.

    Less than 0.7 decades get evenly spaced numbers.
    """
    from matplotlib import ticker

    drawn = np.concatenate([np.zeros(0), *values])
    drawn = drawn[~np.isnan(drawn)]
    decades = np.ptp(np.log10(drawn)) if len(drawn) else 1.0
    if decades < 0.7:
        axis.set_major_locator(ticker.AutoLocator())
    else:
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if decades < 2 else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(ticker.NullLocator())

"""Curves: what is in the picture, that it is the same each time, and that nobody's own matplotlib is disturbed."""

import io
import math
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from PIL import Image

from ddpm.files.plots import COLOURS, Panel, draw

STEPS = list(range(0, 3000, 100))
FALLING = [math.exp(-step / 500) + 0.05 for step in STEPS]


def texts(svg):
    """All text of a picture, in order."""
    return [node.text for node in ElementTree.fromstring(svg).iter() if node.tag.endswith("}text")]


def curves(svg):
    """The paths of the lines that were drawn: (number of points, number of pieces, style)."""
    found = []
    for node in ElementTree.fromstring(svg).iter():
        if node.tag.endswith("}path") and "clip-path" in node.attrib and "#dddddd" not in node.attrib["style"]:
            d = node.attrib["d"]
            found.append((d.count("M") + d.count("L"), d.count("M"), node.attrib["style"]))
    return found


def one(lines, **options):
    return Panel("title", lines, "step", "bits/dim", **options)


@pytest.mark.parametrize(("panels", "shape"), [(1, (480, 750)), (3, (480, 2250)), (4, (960, 1500)), (5, (960, 2250))])
def test_a_png_has_room_for_every_panel(panels, shape):
    image = Image.open(io.BytesIO(draw([one({"a": (STEPS, FALLING)})] * panels)))
    assert np.asarray(image).shape[:2] == shape
    assert "Software" not in image.info


def test_columns_are_as_asked():
    image = Image.open(io.BytesIO(draw([one({"a": ([1], [1])})] * 2, columns=1)))
    assert image.size == (750, 960)


def test_what_is_said_is_seen():
    """Also what would be mathematics to matplotlib or markup to SVG."""
    lines = {"<a & b>": (STEPS, FALLING), "cost $5_0$, $6": (STEPS, STEPS), "_hidden": (STEPS, STEPS)}
    seen = texts(draw([Panel("x0^ & <b>", lines, "step", "bits/dim")], format="svg"))
    assert {"x0^ & <b>", "step", "bits/dim", "<a & b>", "cost $5_0$, $6"} <= set(seen)


def test_a_legend_only_where_there_is_more_than_one_line():
    assert "a" not in texts(draw([one({"a": (STEPS, FALLING)})], format="svg"))
    assert "a" in texts(draw([one({"a": (STEPS, FALLING), "b": (STEPS, STEPS)})], format="svg"))


@pytest.mark.parametrize("format", ["png", "svg"])
def test_the_same_panels_are_the_same_bytes_whatever_the_user_has_set(format, monkeypatch):
    panels = [one({"a": (STEPS, FALLING), "b": (STEPS, STEPS)}, log_y=True)]
    first = draw(panels, format=format)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    with matplotlib.rc_context({"lines.linewidth": 9, "svg.hashsalt": "mine", "axes.facecolor": "red"}):
        before = dict(matplotlib.rcParams)
        assert draw(panels, format=format) == first
        assert dict(matplotlib.rcParams) == before
    assert draw(panels, format=format) == first


def test_nothing_global_is_touched_and_nothing_is_loaded_before():
    code = (
        "import sys; from ddpm.files.plots import Panel, draw; assert 'matplotlib' not in sys.modules; "
        "draw([Panel('a', {'b': ([1], [1])}, '', '')]); print({'matplotlib.pyplot', 'torch'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


@pytest.mark.parametrize("gap", [None, math.nan, math.inf, -math.inf, 0.0, -1.0])
def test_what_cannot_be_drawn_is_a_gap(gap):
    values = [*FALLING[:10], gap, *FALLING[11:]]
    ((points, pieces, _),) = curves(draw([one({"a": (STEPS, values)}, log_y=True)], format="svg"))
    assert pieces == 2
    assert points <= len(STEPS) - 1


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.filterwarnings("error")
def test_degenerate_lines_are_drawn_in_peace(log):
    """None at all, nothing but gaps, all alike, all there is."""
    drawn = [[], [None, None], [0.0, -1.0], [1e-300, 1e300], [1.0, 1.0], [0.3, 0.31]]
    lines = [{"a": (list(range(len(values))), values), "b": ([], [])} for values in drawn]
    assert draw([*(one(each, log_x=log, log_y=log) for each in lines), one({})])[1:4] == b"PNG"


def test_the_paper_is_dashed_and_grey_and_takes_no_colour():
    lines = {"paper, CIFAR-10": (STEPS, STEPS), "this run": (STEPS, FALLING)}
    paper, ours = (style for _, _, style in curves(draw([one(lines)], format="svg")))
    assert "stroke-dasharray" in paper
    assert "#888888" in paper
    assert "stroke-dasharray" not in ours
    assert COLOURS[0].lower() in ours


def test_more_lines_than_colours_each_have_their_own():
    lines = {f"line {i}": (STEPS, [v + i for v in FALLING]) for i in range(10)}
    styles = [style for _, _, style in curves(draw([one(lines)], format="svg"))]
    assert len(set(styles)) == 10
    faint, full = curves(draw([one({"a": (STEPS, STEPS), "b": (STEPS, STEPS)}, faint=["a"])], format="svg"))
    assert "stroke-opacity: 0.35" in faint[2]
    assert "stroke-opacity" not in full[2]


def test_points_are_not_joined():
    assert curves(draw([one({"a": (STEPS, FALLING)}, style="points")], format="svg")) == []


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.001, 1.0], ["0.001", "0.01", "0.1", "1"]),
        ([0.03, 0.9], ["0.05", "0.1", "0.2", "0.5"]),
        ([1.1, 1.3], ["1.2"]),
    ],
)
def test_ticks_of_a_log_axis_are_plain_numbers(values, ticks):
    assert set(ticks) <= set(texts(draw([one({"a": ([1, 2], values)}, log_y=True)], format="svg")))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="0 panels"):
        draw([])
    with pytest.raises(ValueError, match="'pdf'"):
        draw([one({})], format="pdf")
    with pytest.raises(ValueError, match="title, a: 2 x and 1 y"):
        draw([one({"a": ([1, 2], [1])})])

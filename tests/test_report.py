"""A report holds what a run left, no more and no less, and is one file that can be sent to anybody."""

import base64
import csv
import io
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from ddpm.errors import InputError
from ddpm.files import images
from ddpm.run.report import _smooth, report

EVIL = '<script>alert("1 & 2")</script>'
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Tags that balance, and what is in them."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], Counter(), [], []
        self.source = file.read_text("utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data.strip())

    def pictures(self):
        return [base64.b64decode(v.split(",")[1]) for k, v in self.attributes if k == "src"]

    def left_out(self):
        return [text for text in self.texts if " is left out: " in text]


def png(value, size=8):
    return images.to_png(np.full((size, size, 1), value, np.uint8))


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def files(run):
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in run.rglob("*") if p.is_file()}


def nll(T=20):
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["t", "term_bits_per_dim", "rate_bits_per_dim", "rmse_grey_levels"])
    writer.writerows([t, 1 / t, 0.01 + sum(1 / s for s in range(t, T + 1)), 3 * t] for t in range(T, 0, -1))
    return text.getvalue()


def furnish(trained, folder):
    """The trained run, with all that others would leave beside it, some of it hostile."""
    run = folder / "my <run> & co"
    shutil.copytree(trained, run)
    config = json.loads((run / "config.json").read_text()) | {"data": "/home/alice/secret place/my <photos>/"}
    put(run / "config.json", json.dumps(config))
    about = {
        "run": "/home/alice/runs/1/ema.safetensors",
        "data": "C:\\Users\\alice\\x.zip",
        "bits_per_dim": 3.7512345678,
    }
    about |= {"nll": {"by_variance": {"fixed_small": None}, EVIL: [1, 2.5, {"data": "/home/alice/a.npz"}]}}
    put(run / "evaluate/00000020-ema/nll.json", json.dumps(about))
    put(run / "evaluate/00000030-ema/nll.json", json.dumps(about))
    put(run / "evaluate/00000030-ema/nll.csv", nll())
    put(run / "paper/table1.csv", f'model,FID\n"{EVIL.replace(chr(34), chr(34) * 2)}",3.17\n')
    put(run / "paper/fig5.csv", "a,b\n" + "1,2\n" * 100)
    put(run / "paper/fig 6 <&>.png", png(99))
    put(run / "paper/30/notes.md", f"# One & two\n{EVIL}\n")
    put(run / "paper/30/notes.txt", "plain")
    put(run / "paper/table2/eps/samples/00000001.png", png(1))  # of a run of its own
    put(run / "paper/.fig7.png.12.part", b"half")
    return run


@pytest.fixture
def run(trained, tmp_path):
    return furnish(trained, tmp_path)


@pytest.fixture(scope="module")
def page(trained, tmp_path_factory):
    run = furnish(trained, tmp_path_factory.mktemp("report"))
    assert report(run) == run / "report.html"
    return Page(run / "report.html")


def test_a_report_stands_alone(page):
    """No script, nothing to fetch, no link out; light, dark and narrow."""
    assert not {"script", "link", "iframe", "object", "base", "a"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("data:image/png;base64,", "#"))
    assert "http" not in page.source
    assert "url(" not in page.source.replace("url(#", "")
    assert "prefers-color-scheme: dark" in page.source
    assert ("name", "viewport") in page.attributes


def test_ids_are_there_once_and_what_is_referred_to_is_there(page):
    ids = Counter(value for name, value in page.attributes if name == "id")
    assert ids.most_common(1)[0][1] == 1
    references = [v[1:] for k, v in page.attributes if k == "xlink:href"]
    references += re.findall(r"url\(#([^)]*)\)", page.source)
    assert references
    assert set(references) <= set(ids)


def test_all_that_the_run_left_is_shown(page, trained):
    shown = set(page.texts)
    assert {"my <run> & co", "30", "steps", "Settings", "Training", "Samples", "Evaluation", "learning rate"} <= shown
    assert {"Training loss", "Held-out loss", "Held-out loss by level", "Gradient norm", "Speed", "t/T 0.9–1"} <= shown
    assert {"batch_size", "8", "linear", "width"} <= shown
    assert {"00000020-ema/nll.json", "00000030-ema/nll.csv", "3.75123", "nll.by_variance.fixed_small"} <= shown
    assert {"table1.csv", "fig 6 <&>.png", "30/notes.md", "plain", "101 rows"} <= shown
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    held_out = [line["held_out"] for line in lines if "held_out" in line]
    assert {f"{losses[-1]:.4g}", f"{min(held_out):.4g}"} <= shown
    assert page.tags["svg"] == 6 + 2
    assert page.pictures() == [(trained / "samples/00000030.png").read_bytes(), png(99)]
    assert page.left_out() == []


def test_text_is_text(page):
    """What is in names and values cannot become markup, and is seen as it is."""
    assert "<script" not in page.source
    assert EVIL in page.texts
    assert any(EVIL in text and "# One & two" in text for text in page.texts)
    assert f"nll.{EVIL}" in page.texts


def test_where_data_lie_is_not_told(page):
    assert "alice" not in page.source
    assert "secret" not in page.source
    assert {"my <photos>", "ema.safetensors", "x.zip", "1, 2.5, data a.npz"} <= set(page.texts)


def test_the_same_folder_gives_the_same_bytes_and_nothing_else_is_written(run, monkeypatch):
    before = files(run)
    first = report(run).read_bytes()
    assert files(run) == before | {"report.html": first}
    monkeypatch.chdir(run)
    assert report(Path(".")).read_bytes() == first
    assert files(run) == before | {"report.html": first}


def test_what_is_missing_is_left_out(tmp_path):
    """A run that has only begun."""
    put(tmp_path / "config.json", '{"data": "digits"}')
    page = Page(report(tmp_path))
    assert "digits" in page.texts
    assert page.left_out() == []
    assert not {"Training", "Samples", "Evaluation", "Tables and figures of the paper"} & set(page.texts)
    assert page.tags["svg"] == page.tags["img"] == 0
    assert "None" not in page.source
    assert "nan" not in page.texts


def test_what_is_damaged_is_named_and_the_rest_is_shown(run):
    newest = run / "samples/00000030.png"
    put(run / "samples/00000010.png", png(10))
    put(run / "samples/00000020.png", png(20))
    put(newest, newest.read_bytes()[:200])
    put(run / "config.json", '{"data": ')
    put(run / "evaluate/00000020-ema/nll.json", "[1, 2]")
    put(run / "evaluate/00000020-ema/nll.csv", "t,term_bits_per_dim\n1\n")
    put(run / "evaluate/00000030-ema/nll.csv", nll().replace("0.05", "x"))
    put(run / "paper/table1.csv", b"a,b\n\xff\xfe,1\n")
    put(run / "paper/table3.csv", 'a,"b\n')
    put(run / "paper/empty.csv", "")
    put(run / "paper/fig 6 <&>.png", b"<svg onload='alert(1)'/>")
    page = Page(report(run))
    assert [text.split(" is left out: ")[0] for text in page.left_out()] == [
        "config.json", "samples/00000030.png",
        "evaluate/00000020-ema/nll.csv", "evaluate/00000020-ema/nll.json", "evaluate/00000030-ema/nll.csv",
        "paper/empty.csv", "paper/fig 6 <&>.png", "paper/table1.csv", "paper/table3.csv",
    ]  # fmt: skip
    assert page.pictures() == [png(10), png(20)]
    assert "3.75123" in page.texts
    assert page.tags["svg"] == 6
    assert str(run.parent) not in page.source


def test_lines_that_are_no_measurements_change_nothing(trained, tmp_path):
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(trained / name, tmp_path)
    first = report(tmp_path).read_bytes()
    lines = ["[]", "5", '{"loss": 1}', '{"step": "31"}', '{"step": null}', "\udcff", "", "[" * 9999]
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write("\n".join([*lines, '{"step": 31, "loss": 0.']).encode(errors="surrogateescape"))
    assert report(tmp_path).read_bytes() == first


def test_values_of_the_wrong_kind_are_gaps(tmp_path):
    put(tmp_path / "config.json", "{}")
    keys = ("loss", "held_out", "held_out_by_level", "lr", "grad_norm", "images_per_second", "seconds")
    kinds = ["null", '"x"', "[]", "1e999", "NaN", "{}", "9" * 400]
    lines = [f'{{"step": {i}, "{key}": {kind}}}\n' for key in keys for i, kind in enumerate(kinds)]
    put(tmp_path / "metrics.jsonl", "".join([*lines, '{"step": 99, "loss": 0.25, "held_out_by_level": [1, 2]}\n']))
    page = Page(report(tmp_path))
    assert {"99", "0.25", "Training loss", "t/T 0–0.5", "t/T 0.5–1"} <= set(page.texts)
    assert page.tags["svg"] == 2


def test_earlier_grids_are_evenly_chosen_and_go_first_where_there_is_too_much(tmp_path, monkeypatch):
    put(tmp_path / "config.json", "{}")
    for step in range(1, 30):
        put(tmp_path / f"samples/{step:08d}.png", png(step))
    put(tmp_path / "samples/mine.png", png(200))
    put(tmp_path / "paper/fig6.png", png(99))
    page = Page(report(tmp_path))
    assert page.pictures() == [png(29), *map(png, [1, 6, 12, 17, 23, 28]), png(99)]
    monkeypatch.setattr("ddpm.run.report.LIMIT", 1000)
    assert Page(report(tmp_path)).pictures() == [png(29), png(99)]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_few_grids_are_all_shown(tmp_path, count):
    put(tmp_path / "config.json", "{}")
    for step in range(count):
        put(tmp_path / f"samples/{step:08d}.png", png(step))
    assert Page(report(tmp_path)).pictures() == [png(count - 1), *map(png, range(count - 1))]


def test_a_long_run_stays_small(tmp_path):
    put(tmp_path / "config.json", "{}")
    rng = np.random.default_rng(0)
    put(
        tmp_path / "metrics.jsonl",
        "".join(f'{{"step": {i}, "loss": {v}, "lr": {v}}}\n' for i, v in enumerate(rng.uniform(0.1, 1, 50_000))),
    )
    assert report(tmp_path).stat().st_size < 300_000


def test_smoothing_keeps_a_line_and_quietens_noise():
    line = np.linspace(3, 1, 200)
    smooth = np.array(_smooth(line))
    np.testing.assert_allclose(smooth[:192], line[:192])
    assert abs(smooth - line).max() < 0.1
    noise = np.random.default_rng(0).normal(size=10_000)
    assert np.std(_smooth(noise)[400:-400]) < 3 / np.sqrt(801)
    noise[::2] = np.nan
    assert np.isfinite(_smooth(noise)[1:]).all()


def test_no_run_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nothing: no such file or folder; want a run folder$"):
        report(tmp_path / "nothing")
    with pytest.raises(InputError, match=r": not a run; want a run folder$"):
        report(tmp_path)
    assert list(tmp_path.iterdir()) == []

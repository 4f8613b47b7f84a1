"""The commands and examples of the README and the pages run as they stand, but cut short: fewer steps and levels."""

import pkgutil
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ddpm.files.data
from ddpm import cli, likelihood, presets, schedule
from ddpm.cli.main import parser
from ddpm.files import images
from ddpm.run import export

ROOT = Path(__file__).parents[1]
SHORT = {
    "train": "--steps 2 --num-timesteps 50 --width 32 --channel-multipliers 1,1 --num-res-blocks 1 "
    "--batch-size 4 --size 8 --sample-count 2 --sample-steps 2 --eval-images 4",
    "train --init": "--steps 2 --batch-size 4 --sample-count 2 --sample-steps 2 --eval-images 4",
    "distill": "--steps 2 --batch-size 4 --eval-images 4 --sample-every 0",
    "sample": "--steps 4",
    "evaluate": "-n 2",
    "calibrate": "-n 2 --codec 2",
    "compress": "--chunk-bits 8",
    "paper": "-n 1",
    "interpolate": "-n 3 --t 40",
    "inpaint": "--resample 1",
    "restore": "--steps 5",
    "edit": "--t 40",
}
ONLY_PARSED = ("torchrun", "uoft-cs", "cifar10_fast --minutes", "--to hub", "--to web", "--to onnx", "fid", "ddpm page")
ONLY_PARSED += ("ddpm average", "small.png", "hazy.png", "runs/smaller", "--then", "--pair-column", "table1")
"""A line with one of these does not end, or needs several processes, a download, an extra, a picture or long runs."""
FIRST = ("README.md", *(f"docs/howto/{page}.md" for page in ("resume", "publish", "reproduce", "measure")))
"""These pages make what the others use: runs/mine, runs/digits, mine.safetensors, figures and a report."""
SHORT_IN_PYTHON = {"batch_size": 4, "sample_count": 2, "sample_steps": 2, "eval_images": 4}
PAGES = sorted(str(p.relative_to(ROOT)) for kind in ("*.md", "howto/*.md") for p in (ROOT / "docs").glob(kind))


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.S | re.M)


def commands(page: str) -> list[list[str]]:
    """The words of each line that has the word ddpm. RUN is the run of the digits."""
    text = "".join(blocks(page, "(?:ba)?sh")).replace("\\\n", "")
    lines = [shlex.split(re.sub(r"\bRUN\b", "runs/digits", line), comments=True) for line in text.splitlines()]
    return [line for line in lines if "ddpm" in line]


def short(page: str) -> list[list[str]]:
    """The commands of a page that a test can run, as arguments of `cli.main`, cut short."""
    lines = [words for words in commands(page) if not any(part in " ".join(words) for part in ONLY_PARSED)]
    kinds = ["train --init" if "--init" in words else words[1] for words in lines]
    return [[*words[1:], *SHORT.get(kind, "").split()] for words, kind in zip(lines, kinds, strict=True)]


def run(page: str) -> None:
    """Run the commands of a page in order. Each one leaves what its --out names."""
    for words in short(page):
        assert cli.main(words) == 0, f"{page}: {words}"
        assert "--out" not in words or Path(words[words.index("--out") + 1]).exists(), f"{page}: {words}"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with images and files of one's own, in which the first pages were run."""
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(export, "SAMPLES", 4)
        pixels = ddpm.files.data.load("digits", (8, 8), 3).batch(range(40)).permute(0, 2, 3, 1).numpy()
        images.save_many("my-photos/", pixels, ["cat", *map(str, range(1, 40))])
        images.save_many("sketches/", 255 - pixels, ["cat", *map(str, range(1, 40))])
        images.save_many("photos/cat/", pixels[:20], list(map(str, range(20))))
        images.save_many("photos/dog/", pixels[20:], list(map(str, range(20))))
        images.save_many("xrays/", pixels[..., :1].astype(np.uint16) * 257, list(map(str, range(40))))
        images.save("mask.png", (pixels[0] > 100) * np.uint8(255))
        Path("mine.yaml").write_text("lr: 0.001")
        for page in FIRST:
            run(page)
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if short(page) and page not in (*FIRST, "docs/data.md")])
def test_commands_run(project, monkeypatch, page):
    """But those of docs/data.md, which need data of other kinds."""
    monkeypatch.chdir(project)
    run(page)


def test_commands_are_accepted():
    """By the parser: every `ddpm` line of every page, also under torchrun."""
    top = parser()
    lines = [words for page in ("README.md", *PAGES) for words in commands(page)]
    assert len(lines) > 40
    for words in lines:
        top.parse_args(words[words.index("ddpm") + 1 :])


def test_commands_make_figures_and_a_report(project, monkeypatch):
    """The report, which is made last, shows the figures."""
    monkeypatch.chdir(project)
    figures = {"table4.csv", "fig5.png", "fig8.png", "fig10.png"}
    assert figures < {p.name for p in Path("runs/digits/paper").iterdir()}
    assert "fig10.png" in Path("runs/digits/report.html").read_text()


def test_presets_are_all_there():
    """With their parameters in millions, and their steps."""
    table = re.search(r"\| preset .*?\n\n", (ROOT / "docs/howto/presets.md").read_text(), re.S)
    assert table
    rows = [row.split("|")[1:] for row in table[0].strip().splitlines()[2:]]
    told = {name: row for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert told.keys() == presets.PRESETS.keys()
    for name, preset in presets.PRESETS.items():
        _, data, image, parameters, steps, *_ = told[name]
        with torch.device("meta"):
            network = presets.build(preset).network
        assert parameters.strip() == f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f} million"
        assert image.split()[0] == f"{preset.size[0]}x{preset.size[1]}"
        assert (data.strip() == preset.data) or name == "digits" or not preset.data
        least, most = (int(n.replace(",", "")) for n in (re.findall(r"[\d,]+", steps.split("of")[0]) * 2)[:2])
        assert least <= preset.steps <= most
        assert int(steps.split("of")[1]) == preset.batch_size


@pytest.mark.parametrize("page", ["README.md", "docs/howto/python.md", "docs/howto/without.md"])
def test_python_examples_run(project, monkeypatch, page):
    """But ddpm.train trains on small batches, and the bound has 20 levels."""
    train, vlb = ddpm.train, likelihood.vlb
    few = schedule.linear(20, beta_T=0.5)
    monkeypatch.chdir(project)
    monkeypatch.setattr(ddpm, "train", lambda *given, **named: train(*given, **SHORT_IN_PYTHON | named))
    monkeypatch.setattr(
        likelihood, "vlb", lambda model, *given, **named: vlb(replace(model, schedule=few), *given, **named)
    )
    assert blocks(page, "python")
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), {})


def test_equations_name_what_exists():
    """Each function and test file that docs/equations.md names is there."""
    text = (ROOT / "docs/equations.md").read_text()
    rows = [line.split("|")[1:4] for line in text.splitlines() if line.startswith("| ") and "`" in line]
    assert len(rows) > 15
    for _, functions, tests in rows:
        for path in re.findall(r"`((?:\w+\.)+\w+)`", functions):
            pkgutil.resolve_name(f"ddpm.{path}")
        for file in re.findall(r"`(test_\w+\.py)`", tests):
            assert (ROOT / "tests" / file).is_file(), file

"""The README's commands and examples run as they stand; only training and sampling are cut short."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

import ddpm.files.data
from ddpm import cli, presets
from ddpm.files import images

ROOT = Path(__file__).parents[1]
SHORT = {
    "data": "",
    "train": "--steps 2 --num-timesteps 50 --width 32 --channel-multipliers 1,1 --num-res-blocks 1 "
    "--batch-size 4 --size 8 --sample-count 2 --sample-steps 2 --eval-images 4",
    "sample": "--steps 12",
    "evaluate": "-n 1",
    "calibrate": "-n 2 --codec 2",
    "compress": "--chunk-bits 8",
    "decompress": "",
    "paper": "-n 1",
    "interpolate": "-n 3",
    "inpaint": "--resample 2",
    "restore": "--steps 5",
    "edit": "--t 40",
    "report": "",
    "export": "",
    "info": "",
    "import": "",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with images of one's own, in which every `ddpm` line of the README was run in order."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pixels = ddpm.files.data.load("digits", (8, 8), 3).batch(range(20)).permute(0, 2, 3, 1).numpy()
        images.save_many("my-photos/", pixels, [str(i) for i in range(20)])
        images.save("mask.png", (pixels[0] > 100) * np.uint8(255))
        for line in "".join(blocks("sh")).splitlines():
            if line.startswith("ddpm ") and "uoft-cs" not in line:  # that one needs a network
                words = shlex.split(line, comments=True)[1:]
                assert cli.main([*words, *SHORT[words[0]].split()]) == 0, line
    return folder


def test_commands_leave_what_they_say(project):
    assert (project / "digits.png").is_file()
    assert (project / "progressive.png").is_file()
    assert (project / "runs/mine/config.json").is_file()
    assert (project / "between.png").is_file()
    assert (project / "mended.png").is_file()
    assert (project / "same.png").is_file()
    assert (project / "versions.png").is_file()
    assert (project / "restored.png").is_file()
    assert (project / "ours.safetensors").is_file()
    assert {p.name for p in (project / "runs/digits/paper").iterdir()} > {
        "table4.csv",
        "fig5.png",
        "fig8.png",
        "fig10.png",
    }
    assert "fig10.png" in (project / "runs/digits/report.html").read_text()


def test_presets_are_all_there():
    """With their parameters in millions, and their steps."""
    table = re.search(r"\| preset .*?\n\n", (ROOT / "README.md").read_text(), re.S)
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


def test_python_examples(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    assert len(blocks("python")) == 3
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})


def test_equations_name_what_exists():
    """Each function and test file that docs/equations.md names is there."""
    text = (ROOT / "docs/equations.md").read_text()
    rows = [line.split("|")[1:4] for line in text.splitlines() if line.startswith("| ") and "`" in line]
    assert len(rows) > 15
    for _, functions, tests in rows:
        for path in re.findall(r"`((?:\w+\.)+\w+)`", functions):
            names = path.split(".")
            depth = 2 if names[0] == "run" else 1
            found = __import__("ddpm." + ".".join(names[:depth]), fromlist=["_"])
            for name in names[depth:]:
                found = getattr(found, name)
        for file in re.findall(r"`(test_\w+\.py)`", tests):
            assert (ROOT / "tests" / file).is_file(), file

"""Every cell of the tables of docs/kinds.md: the command works, with the warning, or refuses in these words."""

import re
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from PIL import Image

from ddpm.cli import main

TEXT = (Path(__file__).parents[1] / "docs" / "kinds.md").read_text()
FEATURES = "def features(x):\n    return x.reshape(len(x), -1)[:, :8].astype('float64')\n"
TRAINING = [*TINY, *"--steps 2 --eval-images 4 --channel-multipliers 1,1 --beta-T 0.7 --predict v --warmup 0".split()]

RESTORED = "--operator blur:1".split()

ARRAYS = {"16 bits": (1, "uint16"), "float": (1, "float32"), "13 channels": (13, "uint8")}
"""Models of .npy files: their channels and their numbers."""


def cells(title: str) -> list[tuple[str, str, str]]:
    """(row, column, cell) of the tables of that section."""
    found, section = [], TEXT.split(f"## {title}")[1].split("## ")[0]
    for table in re.findall(r"(?:^\|.*\|\n)+", section, re.M):
        head, _, *body = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
        found += [(row[0], column, cell) for row in body for column, cell in zip(head[1:], row[1:], strict=True)]
    return found


def picture(kind: str, rng: np.random.Generator) -> Image.Image:
    grey, colour = rng.integers(0, 256, (8, 8), np.uint8), rng.integers(0, 256, (8, 8, 3), np.uint8)
    return {
        "grey": lambda: Image.fromarray(grey),
        "RGB": lambda: Image.fromarray(colour),
        "transparent": lambda: Image.fromarray(np.dstack([colour, grey])),
        "palette": lambda: Image.fromarray(colour).quantize(16),
        "CMYK": lambda: Image.fromarray(colour).convert("CMYK"),
        "more than 8 bits": lambda: Image.fromarray(grey.astype(np.uint16) * 257 + 3),
    }[kind]()


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six pictures of each kind, and a calibrated model of each kind."""
    folder = tmp_path_factory.mktemp("kinds")
    rng = np.random.default_rng(0)
    for kind in {row for row, *_ in cells("Pictures")}:
        (folder / kind).mkdir()
        for i in range(6):
            picture(kind, rng).save(folder / kind / f"{i}.png", "TIFF" if kind == "CMYK" else "PNG")
    (folder / "net.py").write_text(FEATURES)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, data, channels in (("grey", "grey", 1), ("RGB", "RGB", 3), ("RGBA", "transparent", 4)):
            assert main([*TRAINING, "--data", data, "--channels", str(channels), "--out", f"model {name}"]) == 0
        assert main([*TRAINING, "--classes", "--out", "model classes"]) == 0
        assert main([*TRAINING, "--classes", "--condition", "lowres:2", "--out", "model condition"]) == 0
        assert main([*TRAINING, "--classes", "--loss", "consistency", "--out", "model consistency"]) == 0
        picture("grey", rng).resize((4, 4)).save("small.png")
        Image.fromarray(np.tri(8, dtype=np.uint8) * 255).save("mask.png")
        for name, (channels, dtype) in ARRAYS.items():
            (folder / name).mkdir()
            for i in range(6):
                numbers = rng.integers(0, 256, (8, 8, channels)).astype(dtype)
                numbers = numbers if dtype == "uint8" else numbers * 257
                np.save(folder / name / f"{i}.npy", numbers)
            schedule = "--schedule log_snr --beta-1 1e-9" if dtype == "uint16" else ""
            options = f"--channels {channels} --pixel-type {dtype} {schedule}".split()
            assert main([*TRAINING, "--data", name, *options, "--out", f"model {name}"]) == 0
        for name in ("grey", "RGB", "RGBA", "classes", "consistency", "16 bits", "13 channels"):
            assert main(["calibrate", f"model {name}", "-n", "2", "--codec", "1"]) == 0
        assert main(["export", "model RGB", "--to", "diffusers", "model diffusers folder"]) == 0
    return folder


def follow(words: list[str], cell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command, and compare with the cell."""
    capsys.readouterr()
    verdict, _, said = cell.partition(": ")
    code, err = main(words), capsys.readouterr().err.replace("`", "")
    assert verdict in ("yes", "no")
    assert code == (0 if verdict == "yes" else 2), err
    assert said in err
    assert bool(said) == ("warning" in err or verdict == "no"), err


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("kind", "command", "cell"), cells("Pictures"))
def test_pictures(
    kind: str, command: str, cell: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(here)
    one, out = f"{kind}/0.png", str(tmp_path / "out")
    words = {
        "train": [*TRAINING, "--data", kind, "--channels", "3", "--out", out],
        "evaluate": ["evaluate", "model RGB", "--data", kind, "-n", "1", "--out", out],
        "edit": ["edit", "model RGB", one, "--out", f"{out}.png"],
        "restore": ["restore", "model RGB", one, *RESTORED, "--out", f"{out}.png"],
        "compress": ["compress", "model RGB", one, "--out", out, "--chunk-bits", "8"],
    }[command]
    follow(words, cell, capsys)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("kind", "command", "cell"), cells("Models"))
def test_models(
    kind: str, command: str, cell: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(here)
    monkeypatch.setattr("ddpm.run.export.SAMPLES", 1)
    model, out = f"model {kind}", str(tmp_path / "out")
    arrays = dict.fromkeys(ARRAYS, kind)
    grey = dict.fromkeys(("grey", "classes", "condition", "consistency"), "grey")
    data = {"RGBA": "transparent", **grey, **arrays}.get(kind, "RGB")
    image, other = (f"{data}/{i}.{'npy' if kind in ARRAYS else 'png'}" for i in range(2))
    sample = ["sample", model, "-n", "2", "--out", f"{out}.png", *["--input", "small.png"] * (kind == "condition")]
    words = {
        "sample": [*sample, *["--class", "3"] * (kind == "classes")],
        "sample --guidance": [*sample, "--class", "3", "--guidance", "2"],
        "sample --guide": [*sample, "--guide", model],
        "evaluate": ["evaluate", model, "--data", data, "-n", "2", "--out", out],
        "evaluate --metrics fid": [
            *["evaluate", model, "--data", data, "--out", out],
            *"-n 4 --metrics fid --features net.py:features".split(),
        ],
        "evaluate --metrics ode": [
            *["evaluate", model, "--data", data, "--out", out],
            *"-n 2 --metrics ode --ode-steps 4".split(),
        ],
        "distill": [
            *["distill", model, "--out", out, *["--data", data] * (kind == "diffusers folder")],
            *"--steps 1 --batch-size 4 --eval-images 4 --sample-every 0 --ema-decay 0".split(),
        ],
        "edit": ["edit", model, image, "--out", f"{out}.png"],
        "interpolate": ["interpolate", model, image, other, "-n", "2", "--out", f"{out}.png"],
        "inpaint": ["inpaint", model, image, "mask.png", "--resample", "2", "--out", f"{out}.png"],
        "restore": ["restore", model, image, *RESTORED, "--out", f"{out}.png"],
        "compress": [
            *["compress", model, "grey/0.png" if data == "grey" else "RGB/0.png"],
            *["--out", out, "--chunk-bits", "8"],
        ],
        "export --out": ["export", model, "--out", f"{out}.safetensors"],
        "export --to diffusers": ["export", model, "--to", "diffusers", out],
    }[command]
    follow(words, cell, capsys)

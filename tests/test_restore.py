"""`ddpm restore`: results agree with what was given, clean pictures are degraded as the operator says, and mistakes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from ddpm.cli import main
from ddpm.errors import InputError
from ddpm.files import data, images
from ddpm.files.opening import open_checkpoint
from ddpm.pixels import Values
from ddpm.run.edit import SamplingSettings
from ddpm.run.restore import ROUNDING, Restoration, restore

OPERATORS = """import torch
def halved(x):
    return torch.nn.functional.avg_pool2d(x, 2)
def bright(x):
    return x.flatten(1).mean(1, keepdim=True).tanh()
def words(x):
    return "no tensor"
def detached(x):
    return x.detach()
def whole(x):
    return x.flatten()
def broken(x):
    raise ValueError("it is broken")
def turned(x):
    return torch.from_numpy(x.detach().numpy()[:, :, ::-1].copy())
def complex(x):
    return torch.fft.fft2(x)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: three held-out digits, a mask of the right half, wrong pictures, and functions."""
    monkeypatch.chdir(tmp_path)
    digits = data.load("digits", (8, 8), 1, split="test").batch([0, 1, 2]).permute(0, 2, 3, 1).numpy()
    for name, picture in zip("abc", digits, strict=True):
        images.save(tmp_path / f"{name}.png", picture)
    mask = np.zeros((8, 8, 1), np.uint8)
    mask[:, 4:] = 255
    images.save(tmp_path / "mask.png", mask)
    images.save(tmp_path / "wide.png", np.zeros((8, 16, 1), np.uint8))
    images.save(tmp_path / "black.png", np.zeros((8, 8, 1), np.uint8))
    (tmp_path / "own.py").write_text(OPERATORS)
    return tmp_path


def pixels(name: str) -> Any:
    return np.asarray(Image.open(name)).astype(float)


def made(words: str, *options: Any) -> Any:
    assert main(["restore", *words.split(), *map(str, options), "--out", "out.npz"]) == 0
    return np.load("out.npz")["arr_0"].astype(float)[..., 0]


def test_results_agree_with_a_smaller_picture(here: Path) -> None:
    """The means of blocks are the given picture's pixels, to rounding; another seed is another picture."""
    small = pixels("a.png").reshape(4, 2, 4, 2).mean((1, 3)).round()
    images.save("small.png", small.astype(np.uint8)[..., None])
    found = made("digits small.png --operator superresolution:2 -n 3 --steps 25")
    assert found.shape == (3, 8, 8)
    assert np.abs(found.reshape(3, 4, 2, 4, 2).mean((2, 4)) - small).max() < 15  # clipping at black and white included
    assert (found[0] != found[1]).any()
    again = made("digits small.png --operator superresolution:2 --steps 25 --seed 2")
    assert np.abs(again[0] - found[2]).max() <= 1


def test_what_a_mask_hides_is_not_looked_at(here: Path) -> None:
    other = pixels("a.png")
    other[:, 4:] = 99
    images.save("other.png", other.astype(np.uint8)[..., None])
    one, two = (made(f"digits {name}.png --operator mask:mask.png --steps 20") for name in ("a", "other"))
    assert (one == two).all()
    assert np.abs(one[0, :, :4] - other[:, :4]).max() < 8
    assert (one[0, :, 4:] != 99).any()


def test_degraded_pictures_are_the_operators(here: Path) -> None:
    """Clean, degraded and restored, image by image; the blur is SciPy's, with the noise that was asked for."""
    words = "digits a.png b.png --degrade --operator blur:0.8 -n 2 --steps 5"
    quiet, noisy = made(words), made(words, "--noise", 10)
    assert quiet.shape == (8, 8, 8)
    for i, name in enumerate(("a.png", "b.png")):
        clean = pixels(name)
        assert (quiet[4 * i] == clean).all()
        wanted = gaussian_filter(clean, 0.8)
        assert np.abs(quiet[4 * i + 1] - wanted).max() < 2.5
        inside = (wanted > 40) & (wanted < 215)  # where the noise is not clipped
        assert 6 < (noisy[4 * i + 1] - wanted)[inside].std() < 14
    assert main(["restore", *words.split(), "--out", "folder"]) == 0
    names = ["clean", "degraded", "0", "1"]
    assert sorted(p.name for p in Path("folder").iterdir()) == sorted(f"00{i}_{n}.png" for i in (0, 1) for n in names)
    assert main(["restore", *words.split(), "--out", "sheet.png"]) == 0
    assert Image.open("sheet.png").size == (4 * 34 + 2, 2 * 34 + 2)


def test_each_result_has_its_own_seed(here: Path) -> None:
    """Over images: result k of seed s is result 0 of seed s + k. The batch size does not matter."""
    words = "digits a.png b.png --degrade --operator superresolution:2 --steps 5"
    found = made(words, "-n", 2, "--seed", 5)
    assert np.abs(made(words, "-n", 2, "--seed", 5, "--batch-size", 1) - found).max() <= 1
    alone = made("digits b.png --degrade --operator superresolution:2 --steps 5 --seed 7")
    assert np.abs(alone - found[[4, 5, 6]]).max() <= 1


def test_dps_comes_near_for_a_function_of_the_users(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A function that is superresolution, and one whose result is no picture."""
    words = "restore digits a.png --degrade --steps 40 --seed 1 --json --operator"
    residuals = {}
    for name, more in (("halved", ""), ("halved", "--zeta 0"), ("bright", "")):
        assert main([*words.split(), f"own.py:{name}", *more.split(), "--out", "out.png"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["method"] == "dps"
        residuals[name + more] = told["residual"]
    assert residuals["halved"] < 10 < 40 < residuals["halved--zeta 0"]
    assert residuals["bright"] < 5
    assert Image.open("out.png").size == (2 * 34 + 2, 36)  # no picture of a degraded image


def test_the_result_says_how_good_it_is(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PSNR by NumPy's mean squared error, and the distance from what was given."""
    words = "restore digits a.png b.png --degrade --operator superresolution:2 --steps 25 -n 2 --json --out out.npz"
    assert main(words.split()) == 0
    told = json.loads(capsys.readouterr().out)
    found = np.load("out.npz")["arr_0"].astype(float).reshape(2, 4, 8, 8)
    error = ((found[:, 2:] - found[:, :1]) ** 2).mean()
    assert told["psnr"] == pytest.approx(10 * np.log10(255**2 / error))
    assert (told["method"], told["steps"], told["count"]) == ("ddnm", 25, 4)
    assert 0.1 < told["residual"] < 10
    assert main([*words.split()[:-3], "--out", "out.png"]) == 0
    assert f"PSNR {told['psnr']:.2f} dB" in capsys.readouterr().out


def test_classes_and_guidance_are_taken(here: Path) -> None:
    words = "digits a.png --operator mask:mask.png --steps 10"
    three, seven = (made(words, "--class", name, "--guidance", 3) for name in ("3", "7"))
    assert np.abs(three - seven).max() > 30


def test_time_travel_and_levels(here: Path) -> None:
    """More resampling is another result; so is another spacing."""
    words = "digits a.png --operator mask:mask.png --steps 10"
    once, twice, spaced = made(words), made(words, "--resample", 2), made(words, "--spacing", "uniform")
    assert (once != twice).any()
    assert (once != spaced).any()


def test_python_takes_bytes(here: Path) -> None:
    checkpoint = open_checkpoint("digits")
    source = Path("a.png").read_bytes()
    given = restore(checkpoint, [source], "mask:mask.png", settings=Restoration(noise=1.0), progress=False)
    assert given.clean is None
    assert given.psnr is None
    assert given.restored.dtype == torch.uint8
    assert len(given.levels) == 100
    with pytest.raises(InputError, match=f"noise 0.1: want a finite number, {ROUNDING} to 255"):
        restore(checkpoint, [source], "mask:mask.png", settings=Restoration(noise=0.1), progress=False)


def test_the_least_noise_is_that_of_rounding_to_the_models_numbers(here: Path) -> None:
    """A model of the numbers 0 to 100 rounds to steps of 2.55 grey levels."""
    checkpoint = open_checkpoint("digits")
    preset = replace(checkpoint.preset, pixel_type="uint8", value_range=(0.0, 100.0))
    checkpoint = replace(
        checkpoint, preset=preset, denoiser=replace(checkpoint.denoiser, values=Values("uint8", 0, 100))
    )
    np.save("a.npy", np.full((8, 8), 50, np.uint8))
    settings = Restoration(sampling=SamplingSettings(steps=2))
    given = restore(checkpoint, ["a.npy"], "blur:1", settings=settings, progress=False)
    assert given.noise == pytest.approx(2.55 * ROUNDING)


MISTAKES = {
    "--operator superres:2": "--operator 'superres:2': did you mean superresolution? want superresolution:N, blur",
    "--operator own.py": "--operator 'own.py': want superresolution:N, blur:SIGMA, mask:FILE, grey or FILE.py:NAME",
    "--operator superresolution": "--operator superresolution: want superresolution:N with N of at least 2",
    "--operator superresolution:3": "--operator superresolution:3: want superresolution:N with N of at least 2 that "
    "divides the model's 8x8",
    f"--operator superresolution:{'9' * 5000}": "want superresolution:N with N of at least 2",
    "--operator blur:0": "--operator blur:0: want blur:SIGMA with SIGMA in pixels, 0.1 to 8",
    "--operator blur:nan": "--operator blur:nan: want blur:SIGMA",
    "--operator mask": "--operator mask: want mask:FILE",
    "--operator mask:wide.png": "wide.png: 8x16 (height x width); want a mask of the model's size, 8x8",
    "--operator mask:black.png": "black.png: grey levels 0; want 255 (white)",
    "--operator grey": "--operator grey: want grey, and a model of images of 3 channels; this one has 1",
    "--operator superresolution:2": "a.png: 8x8 (height x width); want 4x4, which superresolution:2 makes of",
    "--operator blur:1 --noise 0.1": "--noise 0.1: want a finite number, 0.29 to 255",
    "--operator blur:1 --noise nan": "--noise nan: want a finite number",
    "--operator blur:1 --method repaint": "--method 'repaint': want ddnm or dps",
    "--operator own.py:halved --degrade --method ddnm": "--method ddnm: wants one of superresolution, blur, mask, "
    "grey; want dps for own.py:halved",
    "--operator blur:1 --zeta 2": "--zeta 2.0: the method ddnm has no such setting",
    "--operator superresolution:2 --method dps --noise 2": "--noise 2: the method dps does not use it",
    "--operator blur:1 --method dps --resample 2": "--resample 2: the method dps has no such setting",
    "--operator blur:1 --method dps --zeta -1": "--zeta -1.0: want a finite number of at least 0",
    "--operator blur:1 --jump 2": "--jump 2: each level is passed once; want resample of 2 or more with it",
    "--operator own.py:complex --degrade": "--operator own.py:complex: returned complex numbers; want real ones",
    "--operator blur:1 --variance fixed_small": "--variance: ddpm restore has no such option",
    "--operator blur:1 --steps 5 --resample 2 --jump 5": "--jump 5: want 1 to 4",
    "--operator blur:1 --steps 2000": "--steps 2000: want 1 to 1000",
    "--operator blur:1 --spacing odd": "--spacing 'odd': want uniform",
    "--operator own.py:none": "own.py:none: no function none, own.py has bright, broken",
    "--operator none.py:f": "none.py:f: no such file none.py",
    "--operator own.py:words": "--operator own.py:words: returned str; want a tensor [1, ...]",
    "--operator own.py:whole": "--operator own.py:whole: returned [64]; want a tensor [1, ...]",
    "--operator own.py:broken": "own.py:broken: ValueError: it is broken",
    "--operator own.py:bright": "--operator own.py:bright: its result [1] is no image; want to degrade images with it",
    "--operator own.py:detached": "--operator: its result has no gradient; want a function that PyTorch can differ",
    "--operator own.py:turned --degrade": "--operator: its result has no gradient",
    "--operator own.py:halved": "a.png: 8x8 (height x width); want 4x4, which own.py:halved makes of the model's 8x8",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line(words: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It names the value and what would be accepted; nothing is written."""
    assert main(["restore", "digits", "a.png", *words.split(), "--out", "x.png"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert MISTAKES[words] in err
    assert not Path("x.png").exists()


def test_a_picture_larger_than_the_model_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["restore", "digits", "wide.png", "--operator", "blur:1", "--out", "x.png"]) == 2
    size = "wide.png: 8x16 (height x width); want 8x8, which blur:1 makes of the model's 8x8"
    assert f"{size}; cut a larger picture into parts of this size" in capsys.readouterr().err
    assert not (here / "x.png").exists()

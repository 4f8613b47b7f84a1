"""`ddpm data`: what it says of a source is what lies there, and what training then does with it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY
from PIL import Image

from ddpm.cli import main
from ddpm.files import images


def look(capsys: pytest.CaptureFixture[str], *words: Any) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["data", *map(str, words), "--json"]) == 0
    about: dict[str, Any] = json.loads(capsys.readouterr().out)
    return about


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes and a test split, in which everything is known: 5 cats, 3 dogs, and a video."""
    draw = np.random.default_rng(0)
    folder = tmp_path / "photos"
    for split, label, count in (("train", "cat", 5), ("train", "dog", 3), ("test", "cat", 2), ("test", "dog", 1)):
        for i in range(count):
            size = (8 + i, 12 + 2 * i, 3)
            images.save(folder / split / label / f"{i}.png", draw.integers(0, 256, size, np.uint8))
    (folder / "train/cat/film.mp4").write_bytes(b"0")
    return folder


def test_counts_sizes_and_kinds(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = look(capsys, photos, "--size", "8")
    assert (about["train"], about["held_out"], about["held_out_of"]) == (8, 3, "test")
    assert about["classes"] == {"cat": 5, "dog": 3}
    assert about["left_out"] == {".mp4": 1}
    assert about["height"] == {"min": 8, "median": 9.5, "max": 12}  # 8 9 10 11 12 and 8 9 10
    assert about["width"] == {"min": 12, "median": 15, "max": 20}
    assert about["kinds"] == {"RGB": 8}
    assert (about["conversions"], about["bad"], about["looked_at"]) == ({}, 0, 8)
    assert about["images_per_second"] > 0
    assert main(["data", str(photos), "--size", "8", "-n", "4"]) == 0
    assert "4 of 8 images" in capsys.readouterr().out


def test_conversions_and_faults(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is bad is what training refuses, in the same words; what it converts is counted."""
    Image.fromarray(np.full((8, 8), 3, np.uint8)).save(photos / "train/cat/grey.png")
    Image.fromarray(np.full((9, 9), 700, np.uint16)).save(photos / "train/cat/deep.png")
    Image.fromarray(np.full((2, 2, 3), 7, np.uint8)).save(photos / "train/dog/small.png")
    (photos / "train/dog/bad.png").write_bytes(b"words")
    about = look(capsys, photos, "--size", "8")
    assert (about["train"], about["looked_at"], about["bad"]) == (12, 12, 1)
    assert about["kinds"] == {"RGB": 9, "L": 1, "I;16 of more than 8 bits": 1}
    counts = {what.partition(" (")[0]: each["images"] for what, each in about["conversions"].items()}
    assert counts == {
        "mode L is converted to RGB": 1,
        "more than 8 bits a channel, rounded to 8": 1,
        "smaller than 8x8, enlarged": 1,
    }
    assert about["conversions"]["smaller than 8x8, enlarged"]["first"].endswith("dog/small.png")
    command = [*TINY, "--data", str(photos), "--channels", "3", "--steps", "1", "--out", str(photos.parent / "run")]
    assert main(command) == 2
    assert about["faults"][0] in capsys.readouterr().err
    assert main([*command, "--skip-bad"]) == 0


def test_the_sheet_shows_images_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Below each image stands what training sees of it: the same, or the middle of a wide one."""
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (3, 64, 64, 3), np.uint8)
    wide = np.concatenate([np.zeros((64, 32, 3), np.uint8), pixels[2], np.zeros((64, 32, 3), np.uint8)], axis=1)
    for i, one in enumerate((pixels[0], pixels[1], wide)):
        images.save(tmp_path / f"a/train/{i}.png", one)
    images.save(tmp_path / "a/test/0.png", pixels[0])
    assert main(["data", str(tmp_path / "a"), "--out", str(tmp_path / "sheet.png")]) == 0
    assert f"written: {tmp_path / 'sheet.png'}" in capsys.readouterr().out
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    before, after = ([sheet[y : y + 64, x : x + 64] for x in (2, 68, 134)] for y in (2, 68))
    for k in range(3):
        assert np.array_equal(after[k], pixels[k])
    for k in range(2):
        assert np.array_equal(before[k], pixels[k])
    assert (before[2][:14] == 255).all()  # the whole of it, on white
    assert (before[2][20:44, :14] == 0).all()


def test_other_numbers_and_channels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """8 channels of 16 bits, of which the sheet shows three; black is the least and white the largest number."""
    array = np.full((6, 8, 8, 8), 65535, np.uint16)
    array[..., 0] = 0
    array[0] = 0
    np.save(tmp_path / "a.npy", array)
    options = ["--size", 8, "--channels", 8, "--pixel-type", "uint16", "--show", "1,2,3", "--out", tmp_path / "a.png"]
    about = look(capsys, tmp_path / "a.npy", *options)
    assert about["kinds"] == {"uint16 of 8 channels": 5}  # one is held out
    assert about["height"] == {"min": 8, "median": 8, "max": 8}
    assert "uint16 0..65535" in about["fitted"]
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    colours = {tuple(colour) for colour in sheet.reshape(-1, 3).tolist()}
    assert (0, 255, 255) in colours
    assert colours <= {(0, 255, 255), (0, 0, 0), (255, 255, 255)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("./nothing", "./nothing: no such file or folder; want digits"),
        ("digits --preset digist", "preset 'digist': did you mean digits?"),
        ("digits -n 0", "-n 0: want a whole number of at least 1"),
        ("digits --out sheet.jpg", "--out sheet.jpg: want a name that ends in .png"),
        ("digits --label-column y", "--label-column y: digits holds images only"),
    ],
)
def test_a_mistake_is_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", *words.split()]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1

"""Animations of sampling and of decoding, as Pillow reads them back."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from ddpm.cli import main
from ddpm.files import animation, images


def frames(path: Path) -> list[np.ndarray]:
    """The frames as RGB, uint8 [H, W, 3]."""
    with Image.open(path) as file:
        return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(file)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_frames_are_contact_sheets(kind: str, channels: int, tmp_path: Path) -> None:
    """Exact for grey, and for colour in .webp; a .gif has few colours here, so it is near. The last frame stays."""
    pictures = np.random.default_rng(0).integers(0, 256, (3, 4, 8, 8, channels), dtype=np.uint8)
    path = tmp_path / f"a.{kind}"
    animation.save(path, list(pictures), columns=2)
    wanted = [np.broadcast_to(images.grid(one, 2), (*images.grid(one, 2).shape[:2], 3)) for one in pictures]
    for frame, sheet in zip(frames(path), wanted, strict=True):
        if kind == "webp" or channels == 1:
            assert np.array_equal(frame, sheet)
        else:
            assert np.abs(frame.astype(int) - sheet).mean() < 20
    with Image.open(path) as file:
        assert file.info["loop"] == 0
        times = []
        for i in range(file.n_frames):
            file.seek(i)
            file.load()
            times.append(file.info["duration"])
    assert times[-1] > 10 * times[0]


@pytest.mark.parametrize("suffix", ["gif", "webp"])
@pytest.mark.parametrize("progressive", [False, True])
def test_sampling(suffix: str, progressive: bool, tmp_path: Path) -> None:
    """The last frame is the sheet of the PNG. The first is noise, or with --progressive the estimate of it."""
    words = "sample digits -n 4 --class 3 --sampler ddim --steps 8 --seed 5 --out".split()
    assert main([*words, str(tmp_path / "a.png")]) == 0
    assert main([*words, str(tmp_path / f"a.{suffix}"), *["--progressive"] * progressive]) == 0
    shown = frames(tmp_path / f"a.{suffix}")
    assert len(shown) == 8
    assert np.array_equal(shown[-1], np.asarray(Image.open(tmp_path / "a.png").convert("RGB")))
    flat = [frame.astype(float) for frame in shown]
    distances = [float(np.abs(frame - flat[-1]).mean()) for frame in flat]
    assert distances[0] > distances[4] > distances[-1] == 0
    noise = np.abs(np.diff(flat[0][::4, ::4], axis=0)).mean() / np.abs(np.diff(flat[-1][::4, ::4], axis=0)).mean()
    assert (noise > 1) != progressive


def test_decoding(tmp_path: Path) -> None:
    """From what the header alone gives to the exact picture."""
    picture, file = tmp_path / "a.png", tmp_path / "a.ddpm"
    assert main(["sample", "digits", "-n", "1", "--class", "3", "--sampler", "unipc", "--out", str(picture)]) == 0
    assert main(["compress", "digits", str(picture), "--out", str(file), "--chunk-bits", "8"]) == 0
    assert main(["decompress", "digits", str(file), "--out", str(tmp_path / "a.gif")]) == 0
    shown = frames(tmp_path / "a.gif")
    true = np.asarray(Image.open(picture).convert("RGB")).repeat(4, 0).repeat(4, 1)
    assert len(shown) > 3
    assert np.array_equal(shown[-1], true)
    assert np.abs(shown[0].astype(int) - true).mean() > np.abs(shown[-2].astype(int) - true).mean()


def test_places_that_cannot_take_an_animation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.gif").mkdir()
    (tmp_path / "file").write_text("words")
    for out, words in ((tmp_path / "a.gif", "is a folder"), (tmp_path / "file" / "b.webp", "cannot write")):
        assert main(["sample", "digits", "-n", "1", "--out", str(out)]) == 2
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1

"""Animations of sampling and of decoding, as Pillow reads them back."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from ddpm import codec
from ddpm.cli import main
from ddpm.errors import InputError
from ddpm.files import animation, images
from ddpm.run import sample


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A digit as .png, and its compressed file."""
    folder = tmp_path_factory.mktemp("compressed")
    picture, file = folder / "a.png", folder / "a.ddpm"
    assert main(["sample", "digits", "-n", "1", "--class", "3", "--sampler", "unipc", "--out", str(picture)]) == 0
    assert main(["compress", "digits", str(picture), "--out", str(file), "--chunk-bits", "8"]) == 0
    return picture, file


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


@pytest.mark.parametrize("suffix", animation.LONGEST)
def test_the_longest_side_of_a_format_is_written_and_a_longer_one_refused(suffix: str, tmp_path: Path) -> None:
    if suffix == ".mp4":
        pytest.importorskip("imageio_ffmpeg")
    out, most = tmp_path / f"a{suffix}", animation.LONGEST[suffix]
    animation.check_size(out, 1, 32, most)
    animation.save(out, [np.zeros((1, 32, most, 1), np.uint8)])
    assert out.stat().st_size
    with pytest.raises(InputError, match=f": 32x{most + 1} pixels; want at most {most:,} a side"):
        animation.check_size(out, 1, most + 1, 32)


def test_a_sheet_that_is_too_large_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sample, "sample", None)
    out = str(tmp_path / "a.webp")
    assert main(["sample", "digits", "-n", "5000", "--class", "3", "7", "--out", out]) == 2
    assert f"--out {out}: 70x85002 pixels; want at most 16,383 a side" in capsys.readouterr().err


def test_a_compressed_picture_that_is_too_large_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, file, out = tmp_path / "a.png", tmp_path / "a.ddpm", str(tmp_path / "a.webp")
    images.save(picture, np.zeros((8, 40, 1), np.uint8))
    assert main(["compress", "digits", str(picture), "--out", str(file), "--chunk-bits", "8"]) == 0
    capsys.readouterr()
    monkeypatch.setitem(animation.LONGEST, ".webp", 150)
    monkeypatch.setattr(codec.picture, "pictures", None)
    assert main(["decompress", "digits", str(file), "--out", out]) == 2
    assert f"--out {out}: 160x32 pixels; want at most 150 a side" in capsys.readouterr().err


def test_decoding(compressed: tuple[Path, Path], tmp_path: Path) -> None:
    """From what the header alone gives to the exact picture."""
    picture, file = compressed
    assert main(["decompress", "digits", str(file), "--out", str(tmp_path / "a.gif")]) == 0
    shown = frames(tmp_path / "a.gif")
    true = np.asarray(Image.open(picture).convert("RGB")).repeat(4, 0).repeat(4, 1)
    assert len(shown) > 3
    assert np.array_equal(shown[-1], true)
    assert np.abs(shown[0].astype(int) - true).mean() > np.abs(shown[-2].astype(int) - true).mean()


# -- video -------------------------------------------------------------------------------------------------------------


def video(path: Path) -> np.ndarray:
    """The frames as ffmpeg decodes them: RGB, uint8 [N, H, W, 3]."""
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    about, *shown = ffmpeg.read_frames(str(path), output_params=["-sws_flags", "accurate_rnd+full_chroma_int+bilinear"])
    width, height = about["size"]
    assert (about["codec"], about["pix_fmt"][:7], about["fps"]) == ("h264", "yuv420p", 12.5)
    return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in shown])


@pytest.mark.parametrize(("height", "width"), [(32, 48), (33, 48), (32, 49), (35, 51)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_video_has_the_frames(channels: int, height: int, width: int, tmp_path: Path) -> None:
    """Within 1.5 grey levels on average, and odd sides with their edge twice. The last frame stays for two seconds.

    The pictures are smooth, since colour has half the resolution. They reach black, white and strong colours.
    """
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = [
        np.stack([y, x, 1 - y][:channels], -1),
        np.stack([x, 1 - x, y][:channels], -1),
        np.zeros((height, width, channels)),
    ]
    pictures = [np.round(255 * wave).astype(np.uint8)[None] for wave in waves]
    animation.save(tmp_path / "a.mp4", pictures)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
    shown = video(tmp_path / "a.mp4")
    assert shown.shape == (2 + 25, height + height % 2, width + width % 2, 3)
    for frame, picture in zip(shown, [*pictures, *[pictures[-1]] * 24], strict=True):
        wanted = np.broadcast_to(picture[0], (height, width, 3)).astype(int)
        error = np.abs(frame[:height, :width] - wanted)
        assert error.mean() < 1.5
        assert error.max() < 12
        assert np.abs(frame[height:, :width] - wanted[-1:][: height % 2]).max(initial=0) < 12
        assert np.abs(frame[:height, width:] - wanted[:, -1:][:, : width % 2]).max(initial=0) < 12


def test_sampling_and_decoding_to_a_video(compressed: tuple[Path, Path], tmp_path: Path) -> None:
    """The same frames as in the .webp, which is exact."""
    sample = "sample digits -n 4 --class 3 --sampler ddim --steps 8 --seed 5 --out".split()
    for words in (sample, ["decompress", "digits", str(compressed[1]), "--out"]):
        assert main([*words, str(tmp_path / "a.webp")]) == 0
        assert main([*words, str(tmp_path / "a.MP4")]) == 0
        exact, shown = frames(tmp_path / "a.webp"), video(tmp_path / "a.MP4")
        for frame, wanted in zip(shown, exact, strict=False):
            assert np.abs(frame.astype(int) - wanted).mean() < 3
        assert len(shown) == len(exact) + 24


@pytest.mark.parametrize("program", ["false", "missing"])
def test_a_video_that_fails_leaves_nothing(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An ffmpeg that does not work ends in one line, and the file that was there stays."""
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    out = tmp_path / "a.mp4"
    out.write_text("before")

    def exe() -> str:
        if program == "missing":
            raise RuntimeError("No ffmpeg exe could be found.")
        return program

    monkeypatch.setattr(ffmpeg, "get_ffmpeg_exe", exe)
    words = ["sample", "digits", "-n", "1", "--steps", "2", "--sampler", "unipc", "--out", str(out)]
    assert main(words) == (1 if program == "false" else 2)
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("ddpm: ")
    assert "ffmpeg" in err
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
    assert out.read_text() == "before"


def test_places_that_cannot_take_an_animation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.gif").mkdir()
    (tmp_path / "file").write_text("words")
    for out, words in ((tmp_path / "a.gif", "is a folder"), (tmp_path / "file" / "b.webp", "cannot write")):
        assert main(["sample", "digits", "-n", "1", "--out", str(out)]) == 2
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1

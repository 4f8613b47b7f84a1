"""What a user meets in a day: the demo, `python -m ddpm` and its exit codes, a model without its calibration."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm.cli import main
from ddpm.files import images, models, opening
from ddpm.run import compress

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_the_demo_shows_a_picture_before_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first command after the installation makes one, from the model of the package; training comes later."""
    monkeypatch.chdir(ROOT)
    words = ["make", "--dry-run", "demo", f"OUT={tmp_path}", "BIN=BIN"]
    lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    ours = [shlex.split(line)[1:] for line in lines if line.startswith("BIN/ddpm ")]
    assert [words[0] for words in ours[:2]] == ["sample", "train"]
    assert "digits" in ours[0]
    assert main(ours[0]) == 0
    picture = ours[0][ours[0].index("--out") + 1]
    with Image.open(picture) as sheet:
        assert sheet.size == images.grid(np.zeros((60, 8, 8, 1), np.uint8), 10).shape[1::-1]


@pytest.mark.parametrize(
    ("words", "code"), [("--version", 0), ("train cifra10", 2), ("", 2), ("sample digits -n 0", 2)]
)
def test_python_m_ddpm_is_the_command(words: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    """With its exit codes and its text, here and in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "ddpm", *words.split()], capture_output=True, text=True)
    assert done.returncode == code
    try:
        here = main(words.split())
    except SystemExit as end:
        here = int(end.code or 0)
    assert (here, *capsys.readouterr()) == (code, done.stdout, done.stderr)


def test_a_file_without_its_calibration_says_which_file_to_fetch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Since files that were compressed with it need it, and no other one. With it beside, everything works."""
    digits = opening.open_checkpoint("digits")
    alone = tmp_path / "mine.safetensors"
    shutil.copy(digits.path, alone)
    picture = tmp_path / "a.png"
    images.save(picture, np.full((8, 8, 1), 99, np.uint8))
    squeeze = ["compress", str(alone), str(picture), "--out", str(tmp_path / "a.ddpm"), "--chunk-bits", "8"]
    sample = ["sample", str(alone), "-n", "1", "--sampler", "ddim", "--steps", "2", "--out", str(tmp_path / "b.png")]
    for words in (squeeze, [*sample, "--variance", "calibrated"], [*sample, "--spacing", "bound"]):
        capsys.readouterr()
        assert main(words) == 2
        err = capsys.readouterr().err
        assert "fetch mine.calibration.json from where mine.safetensors came from" in err
        assert err.count("\n") == 1
    shutil.copy(models.calibration_file(digits.path), tmp_path / "mine.calibration.json")
    for words in (squeeze, [*sample, "--variance", "calibrated"], [*sample, "--spacing", "bound"]):
        assert main(words) == 0


@pytest.mark.parametrize("profile", ["portable", "local"])
@pytest.mark.parametrize("size", [(8, 8, 1), (9, 8, 3)])
def test_the_bar_of_the_codec_ends_at_its_end(
    size: tuple[int, int, int], profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tile of 8x8 is seen once a group and once more; a grey model takes the colours one by one."""
    bars: list[tuple[str, int, int]] = []

    class Bar:
        def __init__(self, total: int, desc: str, **_: object) -> None:
            self.desc, self.total, self.n = desc, total, 0

        def __class_getitem__(cls, _: object) -> type:
            return cls

        def update(self, count: int = 1) -> None:
            self.n += count

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_: object) -> None:
            bars.append((self.desc, self.total, self.n))

    monkeypatch.setattr(compress, "Progress", Bar)
    picture, file = tmp_path / "a.png", tmp_path / "a.ddpm"
    images.save(picture, np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8))
    assert (
        main(["compress", "digits", str(picture), "--out", str(file), "--chunk-bits", "8", "--profile", profile]) == 0
    )
    assert main(["decompress", "digits", str(file), "--out", str(tmp_path / "b.png")]) == 0
    tiles = -(-size[0] // 8) * -(-size[1] // 8) * size[2]
    groups = len(compress.load_codec("digits").tables[8].groups)
    total, words = tiles * (groups + 1), f"{tiles} tile{'s' * (tiles > 1)}"
    assert bars == [(f"{what}, {words}", total, total) for what in ("compressing", "decompressing")]

"""Commands without the extras: those that work, and the errors of those that need an extra."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {hidden!r} else find(name, package)
from ddpm.cli import main
sys.exit(main(sys.argv[1:]))
"""


def ddpm(folder: Path, *words: str, hidden: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Run the command in a process that cannot import the hidden packages."""
    code = HIDE.format(hidden=set(hidden))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *words], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "words",
    [
        "sample digits -n 2 --steps 2 --out a.png",
        "train digits --steps 1 --num-timesteps 10 --sample-steps 5 --eval-images 4 --out run",
        "evaluate digits -n 2 --levels-per-image 2 --out e",
        "inspect --help",
    ],
)
def test_without_extras(words: str, tmp_path: Path) -> None:
    done = ddpm(tmp_path, *words.split(), hidden=("constriction", "matplotlib", "tensorboard", "wandb", "mlflow"))
    assert done.returncode == 0, done.stderr


def test_the_bound_without_matplotlib(trained: Path, tmp_path: Path) -> None:
    """The table is written, and one line says that the plot is not."""
    words = ["evaluate", str(trained), "-n", "2", "--out", str(tmp_path / "e")]
    done = ddpm(tmp_path, *words, hidden=("constriction", "matplotlib"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "e" / "nll.csv").is_file()
    assert not (tmp_path / "e" / "nll.png").exists()
    assert "nll.png is not drawn: matplotlib is not installed" in done.stderr


def test_calibrate_without_the_codec(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes((trained / "checkpoints" / "00000030" / "ema.safetensors").read_bytes())
    words = ["calibrate", str(file), "-n", "2", "--codec", "0"]
    done = ddpm(tmp_path, *words, hidden=("constriction", "matplotlib"))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "package", "extra"),
    [
        ("compress digits a.png --out a.ddpm", "constriction", "codec"),
        ("decompress digits a.ddpm --out a.png", "constriction", "codec"),
        ("sample RUN -n 2 --out a.mp4", "imageio_ffmpeg", "video"),
        ("calibrate RUN -n 2", "constriction", "codec"),
        ("report RUN", "matplotlib", "plots"),
        ("paper fig5 --run RUN -n 2 --out o", "matplotlib", "plots"),
    ],
)
def test_a_missing_extra_is_one_line(words: str, package: str, extra: str, trained: Path, tmp_path: Path) -> None:
    done = ddpm(tmp_path, *words.replace("RUN", str(trained)).split(), hidden=(package,))
    assert done.returncode == 2, done.stderr
    assert not list(trained.glob("cache/calibration*"))  # the error comes before the work
    line = f"ddpm: {package} is not installed; want `pip install 'ddpm-kit[{extra}]'`"
    assert done.stderr.splitlines()[-1] == line

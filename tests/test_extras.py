"""Commands without the extras: those that work, and the errors of those that need an extra."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HIDDEN = {"constriction", "imageio_ffmpeg", "matplotlib", "mlflow", "tensorboard", "wandb"}
PROGRAM = f"""
import contextlib, importlib.util, io, json, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HIDDEN!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {HIDDEN!r} else find(name, package)
from ddpm.cli import main
results = {{}}
for line in sys.argv[1:]:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            code = main(line.split())
        except SystemExit as end:
            code = end.code
    results[line] = [code or 0, said.getvalue()]
print("\\n" + json.dumps(results))
"""
"""Runs each argument as a command line. The packages of the extras cannot be imported."""

WORKS = [
    "sample digits -n 2 --steps 2 --out a.png",
    "train digits --steps 1 --num-timesteps 10 --sample-steps 5 --eval-images 4 --out run",
    "evaluate RUN -n 2 --levels-per-image 2 --out e",
    "evaluate RUN -n 2 --out bound",
    "calibrate model.safetensors -n 2 --codec 0",
    "inspect --help",
]
FAILS = [
    ("compress digits a.png --out a.ddpm", "constriction", "codec"),
    ("decompress digits a.ddpm --out a.png", "constriction", "codec"),
    ("sample RUN -n 2 --out a.mp4", "imageio_ffmpeg", "video"),
    ("calibrate RUN -n 2", "constriction", "codec"),
    ("report RUN", "matplotlib", "plots"),
    ("paper fig5 --run RUN -n 2 --out o", "matplotlib", "plots"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the commands run."""
    return tmp_path_factory.mktemp("extras")


@pytest.fixture(scope="module")
def results(trained: Path, folder: Path) -> dict[str, tuple[int, str]]:
    """The exit code and the standard error of each line of WORKS and FAILS. One process runs them all."""
    weights = trained / "checkpoints" / "00000030" / "ema.safetensors"
    (folder / "model.safetensors").write_bytes(weights.read_bytes())
    lines = [*WORKS, *(line for line, *_ in FAILS)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *(line.replace("RUN", str(trained)) for line in lines)],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1]).values()
    return {line: (code, said) for line, (code, said) in zip(lines, found, strict=True)}


@pytest.mark.parametrize("line", WORKS)
def test_without_extras(line: str, results: dict[str, tuple[int, str]]) -> None:
    code, said = results[line]
    assert code == 0, said


def test_the_bound_without_matplotlib(results: dict[str, tuple[int, str]], folder: Path) -> None:
    """The table is written, and one line says that the plot is not."""
    assert (folder / "bound" / "nll.csv").is_file()
    assert not (folder / "bound" / "nll.png").exists()
    assert "nll.png is not drawn: matplotlib is not installed" in results["evaluate RUN -n 2 --out bound"][1]


@pytest.mark.parametrize(("line", "package", "extra"), FAILS)
def test_a_missing_extra_is_one_line(
    line: str, package: str, extra: str, results: dict[str, tuple[int, str]], trained: Path
) -> None:
    code, said = results[line]
    assert code == 2, said
    assert not list(trained.glob("cache/calibration*"))  # the error comes before the work
    assert said.splitlines()[-1] == f"ddpm: {package} is not installed; want `pip install 'ddpm-kit[{extra}]'`"

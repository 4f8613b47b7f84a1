"""A tiny run for the tests of the programs, and helpers that they share."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ddpm.cli import main

with suppress(ImportError):  # a machine that runs test_cuda.py only may lack it
    from hypothesis import settings

    settings.register_profile("ddpm", deadline=None)  # a slow machine is no failure
    settings.load_profile("ddpm")

TINY = (
    "train digits --no-classes --width 32 --channel-multipliers 1 --num-res-blocks 1 --attention-resolutions 0 "
    "--num-timesteps 20 --schedule linear --predict eps --batch-size 8 --lr 1e-3 --warmup 5 "
    "--ema-decay 0.999 --ema-warmup --precision float32 --eval-images 16 "
    "--timestep-sampling uniform --cooldown 0 --log-every 1 --sample-every 0 --sample-count 4 --sample-steps 5"
).split()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Use one thread, also in processes that tests start. Threads slow down networks that are this small."""
    threads, torch_threads = os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(torch_threads)
    os.environ.pop("OMP_NUM_THREADS") if threads is None else os.environ.update(OMP_NUM_THREADS=threads)


@pytest.fixture(autouse=True, scope="session")
def _no_wait_for_the_disk() -> Iterator[None]:
    """Let os.fsync return at once, but check its argument. The tests with power.py lose power, so they wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of each result that a CUDA graph captures. A replay is a plain call, so no GPU is needed."""
    shapes: list[tuple[int, ...]] = []

    def capture(
        function: Callable[[], Tensor], where: torch.device, warm_up: int
    ) -> tuple[Callable[[], Tensor], Tensor]:
        out = function()
        shapes.append(tuple(out.shape))
        return lambda: out.copy_(function()), out

    monkeypatch.setattr("ddpm.run.device._capture", capture)
    return shapes


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make curves empty files, since matplotlib takes longer than the tiny network whose numbers are tested."""
    monkeypatch.setattr("ddpm.files.plots.draw", lambda *_, **__: b"")


@pytest.fixture(autouse=True, scope="session")
def _data_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep indexes of datasets out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDPM_DATA_CACHE", str(tmp_path_factory.mktemp("data_cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c() -> None:
    """Handle SIGINT. In a background job of a shell script it is ignored, and Python does not change that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 steps with checkpoints of steps 20 and 30 and a grid of samples. Tests must not change it."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert train(out, "--steps", 30, "--save-every", 10, "--sample-every", 30) == 0
    return out


@pytest.fixture(scope="session")
def digits_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ONNX file of digits. All workers of pytest share it, since its export takes long."""
    import filelock

    folder = tmp_path_factory.getbasetemp()
    file = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "digits.onnx"
    with filelock.FileLock(file.with_suffix(".lock")):
        if not file.exists():
            assert main(["export", "digits", "--to", "onnx", str(file), "--json"]) == 0
    return file


def train(out: Path, *options: Any) -> int:
    """Run `ddpm train` with the tiny network in this process, and return its exit code."""
    return main([*TINY, "--out", str(out), *map(str, options)])


def tensors(run: Path, step: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint: ema/NAME, raw/NAME, optimizer/MOMENT.NAME, and with snapshots power-0.05/NAME."""
    files = sorted((run / "checkpoints" / f"{step:08d}").glob("*.safetensors"))
    return {f"{file.stem}/{name}": value for file in files for name, value in load_file(file).items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Assert that two checkpoints are equal bit for bit."""
    assert a.keys() == b.keys()
    assert {name.split("/")[0] for name in a} >= {"ema", "raw", "optimizer"}
    differ = [name for name in a if not torch.equal(a[name], b[name])]
    assert not differ


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Assert that two checkpoints are equal within float error, relative to the norm of all tensors of a kind.

    The kinds are weights, each average, and moments of one name. Single tensors may differ more: the gradient of a bias
    before a norm cancels to rounding errors, and Adam turns these into steps.
    """
    assert a.keys() == b.keys()
    moments = {name.partition(".")[0] + "." for name in a if name.startswith("optimizer/")}
    of_snapshots = {name.partition("/")[0] + "/" for name in a if name.startswith("power-")}
    for part in ("ema/", "raw/", *sorted(moments | of_snapshots)):
        names = [name for name in a if name.startswith(part)]
        x, y = (torch.cat([run[name].flatten().double() for name in names]) for run in (a, b))
        assert float((x - y).norm() / x.norm()) < 1e-3, part


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl. Fails if a line is incomplete."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    """Training loss by step. Fails if a step is logged twice."""
    lines = [line for line in metrics(run) if "loss" in line]
    by_step = {line["step"]: line["loss"] for line in lines}
    assert len(by_step) == len(lines)
    return by_step


def snapshots(run: Path) -> dict[str, Tensor]:
    """All tensors of the snapshots of a run: STEP/FILE/NAME."""
    files = sorted((run / "snapshots").glob("*/*.safetensors"))
    return {f"{file.parent.name}/{file.stem}/{name}": x for file in files for name, x in load_file(file).items()}


def steps(run: Path) -> list[int]:
    """The steps of a run's checkpoints."""
    return sorted(int(p.name) for p in (run / "checkpoints").iterdir() if not p.name.startswith("."))

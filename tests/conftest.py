"""A tiny run for the tests of the programs, and what they share."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ddpm.cli import main

TINY = (
    "train digits --no-classes --width 32 --channel-multipliers 1 --num-res-blocks 1 --attention-resolutions 0 "
    "--num-timesteps 20 --schedule linear --predict eps --batch-size 8 --lr 1e-3 --warmup 5 "
    "--ema-decay 0.999 --ema-warmup --precision float32 --eval-images 16 "
    "--timestep-sampling uniform --cooldown 0 --log-every 1 --sample-every 0 --sample-count 4 --sample-steps 5"
).split()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Threads only get in each other's way where the networks are this small; processes that we start have one too."""
    threads, torch_threads = os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(torch_threads)
    os.environ.pop("OMP_NUM_THREADS") if threads is None else os.environ.update(OMP_NUM_THREADS=threads)


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c() -> None:
    """A script's background job starts with SIGINT ignored, and then Python leaves it so."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 steps with checkpoints of steps 20 and 30 and a grid of samples; read only."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert train(out, "--steps", 30, "--save-every", 10, "--sample-every", 30) == 0
    return out


def train(out: Path, *options: Any) -> int:
    """`ddpm train` of the tiny network in this process; its exit code."""
    return main([*TINY, "--out", str(out), *map(str, options)])


def tensors(run: Path, step: int) -> dict[str, Tensor]:
    """All that a checkpoint holds: ema/NAME, raw/NAME and optimizer/MOMENT.NAME."""
    files = sorted((run / "checkpoints" / f"{step:08d}").glob("*.safetensors"))
    return {f"{file.stem}/{name}": value for file in files for name, value in load_file(file).items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    assert len({name.split("/")[0] for name in a}) == 3  # ema, raw, optimizer
    differ = [name for name in a if not torch.equal(a[name], b[name])]
    assert not differ


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Within float error, relative to the norm of all weights, all averages, all first and all second moments.

    Not name by name: a bias ahead of a norm has gradients that cancel, and Adam makes steps of what is left of them.
    """
    assert a.keys() == b.keys()
    for part in ("ema/", "raw/", "optimizer/exp_avg.", "optimizer/exp_avg_sq."):
        names = [name for name in a if name.startswith(part)]
        x, y = (torch.cat([run[name].flatten().double() for name in names]) for run in (a, b))
        assert float((x - y).norm() / x.norm()) < 1e-3, part


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; every one must be whole."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    """Step -> training loss; each step must be there once."""
    lines = [line for line in metrics(run) if "loss" in line]
    found = {line["step"]: line["loss"] for line in lines}
    assert len(found) == len(lines)
    return found


def steps(run: Path) -> list[int]:
    """The steps of a run's checkpoints."""
    return sorted(int(p.name) for p in (run / "checkpoints").iterdir() if not p.name.startswith("."))

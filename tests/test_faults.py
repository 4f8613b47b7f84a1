"""benchmarks/faults.py: its comparison of weights, its table, and the run that it breaks. The faults need root."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import faults

from ddpm.cli.main import parser
from ddpm.run.start import settle


def checkpoint(run: Path, change: float) -> None:
    folder = run / "checkpoints" / "00000010"
    folder.mkdir(parents=True)
    for name in ("raw", "ema", "optimizer"):
        save_file({"a": torch.ones(4) + change, "b": torch.ones(2)}, folder / f"{name}.safetensors")


@pytest.mark.parametrize(("change", "words"), [(0.0, "to the bit"), (1e-5, "within"), (0.1, "NO")])
def test_weights_are_compared(tmp_path, change, words):
    checkpoint(tmp_path / "a", 0.0)
    checkpoint(tmp_path / "b", change)
    reference = faults.Reference(tmp_path / "a", 2)
    assert reference.compare(tmp_path / "b", 10).startswith(words)


def test_the_table_counts_what_went_on_and_what_is_equal():
    good = faults.Outcome("fault", 5, 1.0, 2.0, 3, 10, "to the bit")
    near = faults.Outcome("fault", 5, 1.0, 4.0, 3, 10, "within 1e-05")
    text = faults.report([good, near, faults.Outcome("fault", 5, note="did not go on")])
    assert "| fault | 3 | 2 | 1 (1 - 1) | 3 (2 - 4) | 3 (3 - 3) | 1 | 1 |" in text


def test_the_run_is_one_that_train_takes():
    args = parser().parse_args([*faults.SETTINGS, "--steps", "1"])
    preset, _ = settle(args.preset, None, {"batch_size": args.batch_size, "save_every": args.save_every}, None)
    assert preset.save_every == faults.SAVE_EVERY
    assert all(preset.batch_size % world == 0 for world in (1, 2, 3, 4))


def test_the_log_says_which_process_writes(tmp_path):
    """A process that resumes replaces the file, and has not gone on before it adds a step."""
    cluster = faults.Cluster(tmp_path, SimpleNamespace(), 2)
    cluster.out.mkdir()
    log = cluster.out / "metrics.jsonl"
    line = json.dumps({"step": 4, "loss": 1.0}) + "\n"
    assert cluster.place() == (0, 0)
    log.write_text(line)
    inode, step = cluster.place()
    assert step == 4
    (tmp_path / "new").write_text(line)
    (tmp_path / "new").replace(log)
    assert not cluster.resumed(inode)
    with log.open("a") as file:
        file.write(line.replace("4", "5") + '{"step": 6, "lo')
    assert cluster.resumed(inode)

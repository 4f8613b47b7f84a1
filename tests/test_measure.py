"""Features over processes: the moments and rows of one process, and samples that are read batch by batch."""

import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm.errors import InputError
from ddpm.files import data, features, images
from ddpm.presets import PRESETS
from ddpm.run import saved
from ddpm.run.measure import measure
from ddpm.run.processes import Processes
from ddpm.run.saved import read_samples

ALONE = Processes(0, 1, torch.device("cpu"))
PROGRAM = """
import sys, json, torch
from pathlib import Path
import torch.distributed as dist
from ddpm.files import data, features
from ddpm.run.measure import measure
from ddpm.run.processes import Processes
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
seen = []
def function(x):
    seen.append(len(x))
    rows = x.flatten(1).double().numpy() ** 1.5
    return rows, rows[:, :3] / rows[:, :3].sum(1, keepdims=True).clip(1)
network = features.Network("rows", "", "", 100, function)
digits, ranks = data.load("digits", (8, 8), 1), Processes(rank, 2, torch.device("cpu"))
found = measure(network, digits, ranks, folder, True, True, False)
arrays = {"mean": found.moments.mean, "covariance": found.moments.covariance}
if rank == 0:
    arrays |= {"features": found.features, "probabilities": found.probabilities}
assert (found.features is None) == (rank == 1)
import numpy as np
np.savez(folder / f"{rank}.npz", seen=seen, **arrays)
dist.destroy_process_group()
"""


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    """Moments of all, and rows of the first, equal to the bit; each image is seen by one process only."""

    def function(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        rows = x.flatten(1).double().numpy() ** 1.5
        return rows, rows[:, :3] / rows[:, :3].sum(1, keepdims=True).clip(1)

    commands = [[sys.executable, "-c", PROGRAM, str(rank), str(tmp_path)] for rank in (0, 1)]
    started = [subprocess.Popen(command) for command in commands]
    network, digits = features.Network("rows", "", "", 100, function), data.load("digits", (8, 8), 1)
    before = features.measure(network, digits, keep_features=True, keep_probabilities=True, progress=False)
    alone = measure(network, digits, ALONE, tmp_path, True, True, False)
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    first, second = (np.load(tmp_path / f"{rank}.npz") for rank in (0, 1))
    for name, value in (("mean", alone.moments.mean), ("covariance", alone.moments.covariance)):
        assert np.array_equal(first[name], value)
        assert np.array_equal(second[name], value)
        assert np.array_equal(getattr(before.moments, name), value)
    for name in ("features", "probabilities"):
        assert np.array_equal(first[name], getattr(alone, name))
        assert np.array_equal(first[name], getattr(before, name))
    assert (first["seen"].sum(), second["seen"].sum()) == (1100, 400)
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".npz" and p.name != "meet"]


def test_moments_by_blocks_are_those_of_all_rows() -> None:
    """Against the formula in memory, for rows far from zero, where a sum of squares would lose all digits."""
    from ddpm.metrics import moments

    rng = np.random.default_rng(0)
    rows = 1e6 + rng.normal(size=(5000, 8)) @ rng.normal(size=(8, 8))
    total = moments(rows[:1024])
    for start in range(1024, 5000, 1024):
        total = total + moments(rows[start : start + 1024])
    exact = np.cov((rows - 1e6).T)
    assert np.abs(total.covariance - exact).max() < 1e-9 * np.abs(exact).max()
    assert total.mean == pytest.approx(rows.mean(0), rel=1e-14)


def test_mistakes_of_networks(tmp_path: Path) -> None:
    digits = data.load("digits", (8, 8), 1)
    silent = features.Network("silent", "", "", 64, lambda x: (x.flatten(1).numpy(), None))
    with pytest.raises(InputError, match=r"^silent: gives no probabilities, which the Inception score needs$"):
        measure(silent, digits, ALONE, tmp_path, keep_probabilities=True, progress=False)
    sizes = iter(range(1, 100))
    odd = features.Network("odd", "", "", 64, lambda x: (x.flatten(1).numpy()[:, : next(sizes)], None))
    with pytest.raises(InputError, match=r"^odd: gives features of different lengths"):
        measure(odd, digits, ALONE, tmp_path, progress=False)


# -- samples -----------------------------------------------------------------------------------------------------------

SHAPED = replace(PRESETS["digits"], channels=3, size=(4, 8), channel_multipliers=(1,))
PIXELS = np.random.default_rng(1).integers(0, 256, (23, 4, 8, 3), np.uint8)


def save(path: Path, kind: str) -> Path:
    if kind == "compressed":
        np.savez_compressed(path / "a.npz", PIXELS)
    elif kind == "columns":
        np.savez(path / "a.npz", np.asfortranarray(PIXELS))
    else:
        images.save_many(path / kind, PIXELS, [str(i) for i in range(len(PIXELS))])
    return path / (kind if kind not in ("compressed", "columns") else "a.npz")


@pytest.mark.parametrize("kind", ["a.npz", "a.npy", "a", "compressed", "columns"])
def test_samples_are_read_in_any_order(kind: str, tmp_path: Path) -> None:
    samples, want = read_samples(save(tmp_path, kind), SHAPED), torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
    assert len(samples) == 23
    for indices in (range(3), range(9, 20), range(3, 9), [22, 0, 21], [5, 5]):
        assert torch.equal(samples.batch(indices), want[list(indices)])
    assert torch.equal(samples.batch(range(len(samples))), want)


@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_damaged_samples_are_refused_before_the_work(how: str, tmp_path: Path) -> None:
    path = save(tmp_path, "a.npz")
    content = bytearray(path.read_bytes())
    if how == "cut":
        del content[-40:]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.npz: not a whole \.npz of plain arrays"):
        read_samples(path, SHAPED)


def test_an_npz_is_not_unpacked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of 2 of 23 images reads 2 images and the header."""
    samples, sizes = read_samples(save(tmp_path, "a.npz"), SHAPED), []
    read = zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda self, n=-1: (sizes.append(n), read(self, n))[1])
    samples.batch([0, 1])
    assert sizes == [96, 96]


def test_parts_hold_one_file_at_a_time(tmp_path: Path) -> None:
    from ddpm.files.tensors import save_tensors

    want = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).contiguous()
    files = [tmp_path / f"{i}" for i in range(4)]
    for i, file in enumerate(files):
        save_tensors(file, {"images": want[6 * i : 6 * i + 6].to(torch.uint16)})
    samples = saved.Parts(files, 6, 23)
    assert torch.equal(samples.batch(range(4, 14)).to(torch.uint8), want[4:14])
    assert torch.equal(samples.batch(range(len(samples))).to(torch.uint8), want)
    assert samples.batch([0]).dtype == torch.uint16

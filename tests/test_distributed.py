"""Two processes under torchrun give the same run and the same images as one process."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, assert_close, losses, metrics, snapshots, steps, tensors, train
from several import Agents, reached, start_python, wait_until

from ddpm.cli import main
from ddpm.errors import InputError
from ddpm.run.processes import Processes, open_for_device, pick_device, pick_precision, threads
from ddpm.unet import fast_bf16

PROGRAM = """
import json, os, pathlib, sys, torch
from ddpm.cli import main
first, *others = json.loads(sys.argv[1])
codes = [main(first)]  # it opens and closes the process group; the next group needs another store
store, rank = pathlib.Path("store").absolute().as_uri(), int(os.environ["RANK"])
torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
print([*codes, *map(main, others)])
"""


@dataclass(frozen=True)
class Both:
    """Results of one process, and of two processes in one call of torchrun, because they take seconds to meet."""

    one: Path  # a run of 20 steps by one process
    two: Path  # a run of 20 steps by two
    mixed: Path  # a run of 10 steps by one process, then 10 by two
    samples: Path  # samples of `trained` by two
    measured: Path  # the results of evaluate and paper for `trained` by two
    short: Path  # a run of 3 steps by two, with warps and the nearest noise
    deep: Path  # a run by two on images of 16 bits, with samples beside it
    stopped: Path  # a run by two, with dropout, ended by SIGTERM
    out: str
    err: str


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Both:
    """Run all commands in two processes. SIGTERM ends the last one, which trains."""
    root = tmp_path_factory.mktemp("both")
    one, two, mixed, short, stopped = (root / name for name in ("one", "two", "mixed", "short", "stopped"))
    assert train(one, *TWENTY) == 0
    shutil.copytree(one, mixed)
    shutil.rmtree(mixed / "checkpoints" / "00000020")
    shutil.rmtree(mixed / "snapshots" / "00000020")
    np.save(root / "deep.npy", np.random.default_rng(0).integers(0, 65536, (20, 8, 8), dtype=np.uint16))
    deep = ["--data", str(root / "deep.npy"), "--pixel-type", "uint16", "--steps", "2", "--out", str(root / "deep")]
    commands = [
        [*TINY, *TWENTY, "--sample-every", "20", "--sample-count", "3", "--out", str(two)],
        [*TINY, *TWENTY, "--out", str(mixed)],
        ["sample", str(trained), "-n", "5", "--json", "--out", str(root / "samples.npz")],
        *measuring(trained, root / "measured"),
        [*TINY, *SHORT, "--out", str(short)],
        [*TINY, *deep],
        ["sample", str(root / "deep"), "-n", "5", "--out", str(root / "deep.samples.npy")],
        [*TINY, *DROPOUT, "--steps", "100000", "--out", str(stopped)],
    ]
    (root / "program.py").write_text(PROGRAM)
    with Agents([["program.py", json.dumps(commands)]], [root], 2) as agents:
        (agent,) = agents.agents
        wait_until(lambda: agent.exitcode is not None or reached(stopped, 5), 240)
        assert agent.exitcode is None, agents.err()
        agent.terminate()
        agents.wait()
    out, err = (root / "out0.txt").read_text(), agents.err()
    return Both(one, two, mixed, root / "samples.npz", root / "measured", short, root / "deep", stopped, out, err)


def measuring(run: Path, out: Path) -> list[list[str]]:
    """Commands that measure a run and split the work over processes."""
    out.mkdir()
    (out / "mine.py").write_text("def f(x):\n    return x.reshape(len(x), -1)[:, ::4] / 255\n")
    few, features = ["--out", str(out), "-n", "5", "--batch-size", "2"], ["--features", f"{out}/mine.py:f"]
    return [
        ["evaluate", str(run), "--metrics", "nll", "ode", "fid", "--ode-steps", "5", "--json", *few, *features],
        ["evaluate", str(run), "--levels-per-image", "3", "--json", *few],
        ["paper", "table4", "fig6", "neighbours", "--model", str(run), *few, *features],
    ]


TWENTY = ("--steps", "20", "--save-every", "10", "--snapshot-every", "5", "--timestep-sampling", "stratified")
SHORT = ("--steps", "3", "--noise-assignment", "nearest", "--classes", "--label-dropout", "0.5", "--augment", "0.1")
DROPOUT = ("--dropout", "0.3", "--flip", "--save-every", "5", "--keep", "100000")


def test_two_processes_train_like_one(both: Both) -> None:
    """After 20 steps losses, weights, averages and moments agree within float error, and there is a grid of samples."""
    assert list(losses(both.two)) == list(range(1, 21))
    assert losses(both.two) == pytest.approx(losses(both.one), rel=1e-4)
    for a, b in zip(held_out(both.two), held_out(both.one), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert_close(tensors(both.two, 20), tensors(both.one, 20))
    assert (both.two / "samples" / "00000020.png").is_file()


def test_two_processes_write_the_snapshots_of_one(both: Both) -> None:
    """Also where they resume its run."""
    one = snapshots(both.one)
    assert {name.split("/")[0] for name in one} == {"00000005", "00000010", "00000015", "00000020"}
    for run in (both.two, both.mixed):
        found = snapshots(run)
        assert found.keys() == one.keys()
        for file in {name.rpartition("/")[0] for name in one}:
            x, y = (torch.cat([all_[name].flatten() for name in one if name.startswith(file)]) for all_ in (found, one))
            assert float((x - y).norm() / y.norm()) < 1e-3, file


def test_only_one_process_prints(both: Both) -> None:
    """No line is printed twice."""
    assert both.err.count(f"{both.two}: ") == 1
    assert both.err.count("2 processes") == 5
    assert both.out.count("held-out L_simple") == 4
    assert len([line for line in both.out.splitlines() if line.startswith("{")]) == 3


def test_two_processes_resume_a_run_of_one(both: Both) -> None:
    """They resume it from step 10 and reach the same step 20."""
    assert f"{both.mixed}: " in both.err
    assert "steps 10 to 20" in both.err
    assert losses(both.mixed) == pytest.approx(losses(both.one), rel=1e-4)
    assert_close(tensors(both.mixed, 20), tensors(both.one, 20))


def test_one_process_resumes_a_run_of_two(both: Both, tmp_path: Path) -> None:
    """It reaches the same step 20."""
    run = shutil.copytree(both.two, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "00000020")
    assert train(run, *TWENTY) == 0
    assert losses(run) == pytest.approx(losses(both.one), rel=1e-4)
    assert_close(tensors(run, 20), tensors(both.one, 20))


def test_dropout_is_that_of_one_process_in_two_parts(both: Both, tmp_path: Path) -> None:
    """Dropout masks depend on the part of the batch and flips on the image, not on the process."""
    assert train(tmp_path / "one", *DROPOUT, "--accumulate", 2, "--steps", 5) == 0
    one = losses(tmp_path / "one")
    assert {n: losses(both.stopped)[n] for n in one} == pytest.approx(one, rel=1e-4)
    assert_close(tensors(both.stopped, 5), tensors(tmp_path / "one", 5))


def test_draws_for_the_whole_batch_are_those_of_one_process(both: Both, tmp_path: Path) -> None:
    """Warps are drawn for all images, and an image may get the noise of another process's image."""
    assert train(tmp_path / "one", *SHORT) == 0
    assert losses(both.short) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert_close(tensors(both.short, 3), tensors(tmp_path / "one", 3))


def test_two_processes_exchange_16_bits(both: Both, tmp_path: Path) -> None:
    """gloo has no uint16. The samples are those of one process, low bytes included."""
    assert main(["sample", str(both.deep), "-n", "5", "--out", str(tmp_path / "one.npy")]) == 0
    one, two = np.load(tmp_path / "one.npy"), np.load(both.deep.with_suffix(".samples.npy"))
    assert (one.dtype, len(one)) == (np.uint16, 5)
    assert (one == two).all()


def test_sigterm_to_torchrun_saves(both: Both) -> None:
    """Both processes end after the same step, whose checkpoint is written, and neither hangs."""
    last = max(steps(both.stopped))
    assert f"stopped at step {last} and saved; the same command resumes the run" in both.err
    assert max(losses(both.stopped)) == last
    assert len(re.findall(r"^\[(0, )+143\]$", both.out, re.M)) == 2  # each process: all commands before went well


def test_two_processes_sample_what_one_does(both: Both, trained: Path, tmp_path: Path) -> None:
    """5 images, which two processes cannot share evenly, in order."""
    assert main(["sample", str(trained), "-n", "5", "--out", str(tmp_path / "one.npz")]) == 0
    two, one = (np.load(path)["arr_0"].astype(int) for path in (both.samples, tmp_path / "one.npz"))
    assert np.abs(two - one).max() <= 1
    assert (two == one).mean() >= 0.999


def test_two_processes_measure_what_one_does(both: Both, trained: Path, tmp_path: Path) -> None:
    """Bounds, distances, tables and pictures of the same commands."""
    for words in measuring(trained, tmp_path / "one"):
        assert main(words) == 0
    for name in ("nll", "nll_sampled", "ode", "quality"):
        two, one = (json.loads((folder / f"{name}.json").read_text()) for folder in (both.measured, tmp_path / "one"))
        assert two.keys() == one.keys()
        for key, value in one.items():
            assert (
                two[key] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)
                or key == "by_variance"
            )
    for name in ("table4.csv", "fig6.png", "neighbours.json"):
        assert (both.measured / name).is_file()
    rates = [(folder / "table4.csv").read_text() for folder in (both.measured, tmp_path / "one")]
    values = [[float(v) for line in text.splitlines()[1:] for v in line.split(",")] for text in rates]
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def held_out(run: Path) -> list[list[float]]:
    return [line["held_out_by_level"] for line in metrics(run) if "held_out" in line]


BUSY = """
import sys, time, torch
import torch.distributed.nn  # its default arguments keep a group that is there when it is imported
from dataclasses import replace
from ddpm.presets import PRESETS
from ddpm.run.processes import Processes
from ddpm.run.step import begin
dist = torch.distributed
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
training = begin(replace(PRESETS["digits"], batch_size=8), None, Processes(0, 2, torch.device("cpu")))
group = dist.group.WORLD
dist.destroy_process_group()
sys.setswitchinterval(1000)  # from here on, this thread keeps Python's lock, and gloo's thread waits for it
group.allreduce([torch.zeros(8)])
end = time.perf_counter() + 0.5
while time.perf_counter() < end:
    pass
del group, training
print("ended")
"""


def test_a_training_ends_while_a_thread_of_gloo_waits_for_python(tmp_path: Path) -> None:
    """The thread still holds a tensor of the last sum, as happens on a busy machine."""
    (tmp_path / "code.py").write_text(BUSY)
    process = start_python(["code.py"], tmp_path, tmp_path / "out.txt")
    process.join(60)
    process.kill()
    assert (tmp_path / "out.txt").read_text() == "ended\n"


def test_processes_without_torchrun() -> None:
    """One process is the first and does all the work."""
    one = Processes(0, 1, torch.device("cpu"))
    assert one.first
    assert list(one.mine(3)) == [0, 1, 2]
    assert one.any(True)
    assert not one.any(False)
    assert torch.equal(one.interleave(torch.arange(3), 3), torch.arange(3))
    assert torch.equal(one.total(torch.ones(2)), torch.ones(2))
    shares = [list(Processes(rank, 3, torch.device("cpu")).mine(8)) for rank in range(3)]
    assert sorted(i for share in shares for i in share) == list(range(8))


def test_device_and_precision_are_picked() -> None:
    """`auto` picks an existing device, and bf16 only if the hardware has it."""
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    assert pick_precision("auto", torch.device("mps")) == "float32"
    assert pick_precision("bf16", torch.device("cpu")) == "bf16"


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error names the process, because NCCL would only hang. The first process gets its device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("auto", "cuda"):
        assert pick_device(name, 0) == torch.device("cuda", 0)
        with pytest.raises(InputError, match=r"process 1 of torchrun: .* 1 CUDA devices; want one process per device"):
            pick_device(name, 1)


def test_a_bf16_model_runs_in_float32_where_bf16_is_slow(monkeypatch):
    """The digits model is bf16. Without fast bf16 it runs in float32, and so does its codec, unless asked for bf16."""
    import ddpm

    for fast, expected in ((True, "bf16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda fast=fast: {"amx_bf16": fast})
        fast_bf16.cache_clear()
        checkpoint = open_for_device("digits", torch.device("cpu"))
        assert checkpoint.preset.precision == expected
        assert ddpm.load_codec("digits").denoiser.network.bf16 == (expected == "bf16")
        assert open_for_device("digits", torch.device("cpu"), precision="bf16").preset.precision == "bf16"
        loaded = ddpm.load("digits").network  # it stays right when it is moved
        assert loaded.computes == (torch.bfloat16 if fast else torch.float32)
    fast_bf16.cache_clear()


def test_small_networks_use_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU and inside the context, unless the user sets OMP_NUM_THREADS."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    torch.set_num_threads(2)
    for work, device, wanted in ((1 << 17, "cpu", 1), (1 << 18, "cpu", 2), (1 << 17, "cuda", 2)):
        with threads(work, torch.device(device)):
            assert torch.get_num_threads() == wanted
        assert torch.get_num_threads() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with threads(1, torch.device("cpu")):
        assert torch.get_num_threads() == 2
    torch.set_num_threads(1)

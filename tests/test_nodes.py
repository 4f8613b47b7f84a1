"""Processes of several nodes: they agree or say so, they need no shared disk, and the loss of one is noticed."""

import json
import math
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import TINY, assert_close, assert_same, losses, metrics, snapshots, steps, tensors, train
from several import Agents, reached, wait_until

from ddpm.cli import main
from ddpm.errors import InputError
from ddpm.run import agree, forecast, partition
from ddpm.run.group import Group

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
LONG = ("--steps", "100000")


def nodes(tmp_path: Path, count: int = 2) -> list[Path]:
    """Folders, one for each node."""
    folders = [tmp_path / f"n{i}" for i in range(count)]
    for folder in folders:
        folder.mkdir()
    return folders


# -- the partition of a batch ------------------------------------------------------------------------------------------

WORLDS = [*range(1, 9), 64, 100, 256]


@pytest.mark.parametrize("world", WORLDS)
def test_every_image_of_a_batch_is_computed_once_and_in_order(world: int) -> None:
    """For odd batches, any accumulation and any memory; no part is larger than asked for, and the weights are fair."""
    for batch in {world, world + 1, 2 * world - 1, 7 * world + 3, 257, 509}:
        if batch < world:
            continue
        for accumulate, most in ((1, None), (2, None), (3, None), (1, 3), (4, 2)):
            mine = [partition.parts(batch, world, rank, accumulate, most) for rank in range(world)]
            images = [i for parts in mine for part in parts for i in range(batch)[part]]
            assert images == list(range(batch))
            sizes = [[part.stop - part.start for part in parts] for parts in mine]
            assert max(map(sum, sizes)) - min(map(sum, sizes)) <= 1
            assert max(max(each) for each in sizes) == partition.largest(batch, world, accumulate, most)
            assert max(max(each) for each in sizes) <= min(most or batch, math.ceil(-(-batch // world) / accumulate))
            # the mean over processes of the sum of (mean of a part / divisor) is the mean over the batch
            each = torch.rand(batch, dtype=torch.float64)
            share = [
                sum(float(each[p].mean()) / partition.divisor(p.stop - p.start, batch, world) for p in parts)
                for parts in mine
            ]
            assert sum(share) / world == pytest.approx(float(each.mean()), rel=1e-12)


def test_equal_parts_are_divided_as_before() -> None:
    """The divisor is the number of parts exactly, so that results of equal parts stay the same to the bit."""
    for world, accumulate in ((1, 1), (1, 3), (2, 3), (8, 5), (64, 2)):
        batch = world * accumulate * 7
        for rank in range(world):
            parts = partition.parts(batch, world, rank, accumulate)
            assert [part.stop - part.start for part in parts] == [7] * accumulate
            assert {partition.divisor(part.stop - part.start, batch, world) for part in parts} == {float(accumulate)}


def test_fewer_images_than_processes_are_refused() -> None:
    with pytest.raises(InputError, match="batch_size 8: 9 processes; want an image for each, or fewer processes"):
        partition.parts(8, 9, 0)


def test_a_checksum_sees_every_bit() -> None:
    """Negative control: the same numbers give the same sum."""
    one = [torch.randn(5, 3), torch.randn(7)]
    same = [x.clone() for x in one]
    assert agree.checksum(one) == agree.checksum(same)
    for x in same:
        bits = x.view(torch.int32)
        for place in range(x.numel()):
            bits.view(-1)[place] ^= 1
            assert agree.checksum(one) != agree.checksum(same)
            bits.view(-1)[place] ^= 1


def test_three_processes_train_like_one(tmp_path: Path) -> None:
    """Batches of 8 in parts of 2, 3 and 3; then one process, and then two, go on, with no image lost or seen twice.

    What they share is in the losses: each is the mean over one batch, whose images, levels and noise are the same.
    """
    here = tmp_path
    options = ("--save-every", "5", "--keep", "100", "--optimizer", "muon")
    assert train(here / "one", "--steps", 15, *options) == 0
    with Agents([[*TINY, *options, "--steps", 5, "--out", "run"]], [here], 3) as agents:
        assert agents.wait() == [0], agents.err()
    assert train(here / "run", "--steps", 10, *options) == 0
    with Agents([[*TINY, *options, "--steps", 15, "--out", "run"]], [here], 2) as agents:
        assert agents.wait() == [0], agents.err()
    assert losses(here / "run") == pytest.approx(losses(here / "one"), rel=1e-4)
    assert_close(tensors(here / "run", 15), tensors(here / "one", 15))
    state = json.loads((here / "run" / "checkpoints" / "00000015" / "state.json").read_text())
    assert state["at_once"] == 3  # as many as the three processes had; one process accumulated


# -- processes agree ---------------------------------------------------------------------------------------------------


def make_images(folder: Path, count: int) -> Path:
    from PIL import Image

    folder.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


DIFFERENCES = {
    "lr": (["--lr", 0.5], ["--lr 0.5 on rank 1 on ", "but 0.001 on rank 0 on "]),
    "seed": (["--seed", 7, "--keep", 3], ["--seed 7 on rank 1 on ", "; keep differ, too"]),
    "data": (["--data", "OTHER"], ["39 images on rank 1 on ", "but 40 images on rank 0"]),
    "one mistake": (["--data", "NONE"], ["none", "(rank 1 on "]),
    "an option": (["--steps", "x"], ["--steps", "'x'", "(rank 1 on "]),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_node_that_differs_is_named_once(name: str, tmp_path: Path) -> None:
    """One line in all, code 2 on every node, and no run."""
    data = make_images(tmp_path / "data", 40)
    make_images(tmp_path / "other", 39)
    more, wanted = DIFFERENCES[name]
    folders = nodes(tmp_path)
    base = [*TINY, "--data", data, "--steps", 5, "--out", "run"]
    other = [{"OTHER": tmp_path / "other", "NONE": tmp_path / "none"}.get(str(word), word) for word in more]
    with Agents([base, [*base, *other]], folders) as agents:
        assert agents.wait() == [1, 1]
        assert len(agents.said()) == 1, agents.err()
        for words in wanted:
            assert words in agents.said()[0]
        assert agents.codes() == {2}
    assert not [path for folder in folders for path in folder.glob("run/checkpoints")]


def test_a_mistake_of_all_is_said_once(tmp_path: Path) -> None:
    """By the first process, and without its name: here of the settings, and of another command."""
    cases = (
        ([*TINY, "--batch-size", "2", "--out", "run"], "--batch-size 2: 3 processes"),
        (["compress", "digits", "no/such.png", "--out", "x.ddpm"], "no/such.png"),
    )
    for i, (command, words) in enumerate(cases):
        folder = tmp_path / str(i)
        folder.mkdir()
        with Agents([command], [folder], 3) as agents:
            assert agents.wait() == [1]
            assert len(agents.said()) == 1, agents.err()
            assert words in agents.said()[0]
            assert "rank" not in agents.said()[0]
            assert agents.codes() == {2}


def test_a_slow_process_ends_by_itself(tmp_path: Path) -> None:
    """torchrun sends SIGTERM when the first process has ended, which the others take note of 2 seconds later."""
    slow = """import os, sys, time
from ddpm.cli.main import main
from ddpm.run.group import Group

known = Group._mistake

def late(self, mistakes):
    time.sleep(2 * (os.environ["RANK"] != "0"))
    return known(self, mistakes)

Group._mistake = late
sys.exit(main(sys.argv[1:]))
"""
    (tmp_path / "slow.py").write_text(slow)
    with Agents([["slow.py", *TINY, "--batch-size", "2", "--out", "run"]], [tmp_path], 3) as agents:
        assert agents.wait() == [1]
        assert agents.codes() == {2}, agents.err()


# -- nodes without a shared disk ---------------------------------------------------------------------------------------


def test_a_node_without_the_run_gets_it(tmp_path: Path) -> None:
    """The newest checkpoint is on the second node: the first one gets all of it, to the bit, and its log."""
    folders = nodes(tmp_path)
    words = [*TINY, "--optimizer", "muon", "--save-every", "5", "--snapshot-every", "5", "--keep", "100"]
    words += ["--out", "run", "--steps"]
    with Agents([[*words, 10]] * 2, folders) as agents:
        assert agents.wait() == [0, 0], agents.err()
    for folder in folders:  # each node has the run
        assert steps(folder / "run") == [5, 10]
        assert len(losses(folder / "run")) == 10
    assert_same(tensors(folders[0] / "run", 10), tensors(folders[1] / "run", 10))
    shutil.rmtree(folders[0] / "run")
    with Agents([[*words, 15]] * 2, folders) as agents:
        assert agents.wait() == [0, 0], agents.err()
        assert "steps 10 to 15" in agents.err()
    assert_same(tensors(folders[0] / "run", 10), tensors(folders[1] / "run", 10))
    assert_same(tensors(folders[0] / "run", 15), tensors(folders[1] / "run", 15))
    assert list(losses(folders[0] / "run")) == list(range(1, 16))
    first, second = (snapshots(folder / "run") for folder in folders)
    assert {name.split("/")[0] for name in first} == {"00000010", "00000015"}  # those since the newest checkpoint
    assert {name.split("/")[0] for name in second} == {"00000005", "00000010", "00000015"}
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_nodes_that_share_a_disk_have_one_writer(tmp_path: Path) -> None:
    """The log has every step once, and nothing is left of how they found out."""
    folders = nodes(tmp_path)
    out = tmp_path / "shared"
    with Agents([[*TINY, "--steps", 6, "--save-every", "3", "--out", out]] * 2, folders) as agents:
        assert agents.wait() == [0, 0], agents.err()
    assert list(losses(out)) == list(range(1, 7))
    assert not list(out.glob(".rank-*"))
    assert len([line for line in metrics(out) if "held_out" in line]) == 3


# -- who is lost -------------------------------------------------------------------------------------------------------


def test_restarts_come_up(tmp_path: Path) -> None:
    """SIGKILL of each rank in turn; torchrun starts the group again, which goes on where the survivor saved."""
    words = [*TINY, *LONG, "--save-every", "1000", "--timeout", "0.1", "--out", "run"]
    with Agents([words], [tmp_path], 2, "--max-restarts", "2") as agents:
        for kill in range(2):
            wait_until(lambda kill=kill: agents.err().count("steps ") == kill + 1 and agents.ranks(kill))
            at = metrics(tmp_path / "run")[-1]["step"] if kill else 0
            wait_until(lambda at=at: reached(tmp_path / "run", at + 5))
            for pid in agents.ranks(kill):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: agents.err().count("100,000") >= 3)
        assert "Connection refused" not in agents.err()
    begun = [line for line in agents.err().splitlines() if "to 100,000" in line]
    assert len(begun) == 3
    assert "steps 0 to" not in begun[1]  # the survivor saved


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_process_is_noticed(rank: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGSTOP of a rank: the other one names it after the timeout, saves, and ends with 1; the same command goes on."""
    words = [*TINY, "--save-every", "1000", "--timeout", "0.1", "--out", "run", "--steps"]
    with Agents([[*words, 100000]], [tmp_path], 2) as agents:
        wait_until(lambda: reached(tmp_path / "run", 5))
        (pid,) = agents.ranks(rank)
        os.kill(pid, signal.SIGSTOP)
        begun = time.monotonic()
        wait_until(lambda: agents.said())
        assert time.monotonic() - begun < 25
        last = max(steps(tmp_path / "run"))
        assert len(agents.said()) == 1
        assert f"no sign of life from rank {rank} on " in agents.said()[0]
        assert f"step {last} is saved, and the same command goes on" in agents.said()[0]
        os.kill(pid, signal.SIGKILL)
        assert agents.wait() == [1]
    assert train(tmp_path / "run", "--save-every", 1000, "--timeout", 0.1, "--steps", last + 3) == 0
    assert f"steps {last} to {last + 3}" in capsys.readouterr().err


SLOW = """
import sys, time
from ddpm.files import checkpoints
from ddpm.cli import main
real = checkpoints.save
def save(*a, **k):
    time.sleep(9)
    return real(*a, **k)
checkpoints.save = save
sys.exit(main(sys.argv[1:]))
"""


def test_what_one_process_does_alone_trips_no_timeout(tmp_path: Path) -> None:
    """A checkpoint that takes 9 s, with a timeout of 6 s."""
    (tmp_path / "slow.py").write_text(SLOW)
    words = ["slow.py", *TINY, "--steps", "3", "--save-every", "3", "--timeout", "0.1", "--out", "run"]
    with Agents([words], [tmp_path], 2) as agents:
        assert agents.wait() == [0], agents.err()
    assert steps(tmp_path / "run") == [3]


LATE = """
import os, signal, sys, time
from ddpm.cli import main
from ddpm.run import processes, sample
processes.processes.__wrapped__.__defaults__ = (False, 4.0)  # the timeout, in seconds
real = sample.generate
def generate(*a, **k):
    if os.environ["RANK"] == "1" and "stops" in sys.argv[-1]:
        os.kill(os.getpid(), signal.SIGSTOP)
    if os.environ["RANK"] == "1":
        time.sleep(7)
    return real(*a, **k)
sample.generate = generate
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("kind", ["TCPStore", "FileStore", "HashStore"])
def test_a_process_that_is_late_is_waited_for_in_every_store(kind: str, tmp_path: Path) -> None:
    """A group of the user's own may have any of them, and each ends its waits with an error of its own."""
    if kind == "TCPStore":
        first = dist.TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
        stores = [first, dist.TCPStore("127.0.0.1", first.port, 2, False)]
    elif kind == "FileStore":
        stores = [dist.FileStore(str(tmp_path / "store"), 2) for _ in range(2)]
    else:
        stores = [dist.HashStore()] * 2

    def take_part(rank: int) -> list[str]:
        group = Group(dist.PrefixStore("x", stores[rank]), rank, 2, timeout=2.0, hosting=False)
        try:
            time.sleep(1.5 * rank)
            return group.exchange(f"from {rank}")
        finally:
            group.close()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(take_part, range(2))) == [["from 0", "from 1"]] * 2


@pytest.mark.parametrize("rank_1", ["late", "stops"])
def test_sampling_waits_for_a_process_that_lives(rank_1: str, tmp_path: Path) -> None:
    """One that makes its images in more than the timeout is waited for, and one that is stopped is named."""
    (tmp_path / "late.py").write_text(LATE)
    words = ["sample", "digits", "-n", "4", "--sampler", "ddim", "--steps", "2", "--out", f"{rank_1}.png"]
    with Agents([["late.py", *words]], [tmp_path], 2) as agents:
        if rank_1 == "late":
            assert agents.wait() == [0], agents.err()
            assert main([*words[:-1], str(tmp_path / "alone.png")]) == 0
            assert (tmp_path / "late.png").read_bytes() == (tmp_path / "alone.png").read_bytes()
        else:
            wait_until(lambda: agents.said())
            assert "no sign of life from rank 1 on " in agents.said()[0]
            assert not (tmp_path / "stops.png").exists()


DIFFERENT = """
import os, sys, torch
from ddpm.cli import main
from ddpm.run import train
real = train.apply
def apply(model, preset):
    real(model, preset)
    if os.environ["RANK"] == "1" and model.step == 7:
        with torch.no_grad():
            model.weights[3].view(-1)[0] *= 1 + 1e-6
train.apply = apply
sys.exit(main(sys.argv[1:]))
"""


def test_weights_that_differ_are_not_saved(tmp_path: Path) -> None:
    """As after a fault of the memory in step 7. The checkpoint before it is named, and is the last."""
    (tmp_path / "different.py").write_text(DIFFERENT)
    words = ["different.py", *TINY, "--steps", "20", "--save-every", "5", "--out", "run"]
    with Agents([words], [tmp_path], 2) as agents:
        assert agents.wait() == [1]
        said = agents.said()
        assert len(said) == 1, agents.err()
    assert "step 10: the weights of rank 1 on " in said[0]
    assert "00000005" in said[0]
    assert steps(tmp_path / "run") == [5]


# -- preemption --------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_takes_too_long_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only under torchrun, and only if it would not be whole in time."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert forecast.late_save(100) is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert forecast.late_save(20) is None
    assert "--shutdown-timeout 60" in str(forecast.late_save(30))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGTERM to a rank", "SIGUSR1 to the agent"])
def test_a_signal_saves_on_all(name: str, tmp_path: Path) -> None:
    """At once, and the same command goes on. A file says so to who starts runs again; Ctrl-C leaves none.

    SIGUSR1 kills the agent, and its processes find out that they are orphans.
    """
    words = [*TINY, "--save-every", "100000", "--out", "run", "--steps"]
    run, mark = tmp_path / "run", tmp_path / "run" / "preempted"
    with Agents([[*words, 100000]], [tmp_path], 2) as agents:
        wait_until(lambda: reached(run, 5))
        ranks = [*agents.ranks(0), *agents.ranks(1)]
        number = getattr(signal, name.split()[0])
        if name == "SIGINT":  # as a terminal does: to all, and torchrun passes it on again
            for pid in ranks:
                os.kill(pid, number)
        os.kill(ranks[1] if name.endswith("rank") else agents.agents[0].pid, number)
        wait_until(lambda: (run / "checkpoints").exists() and not [*agents.ranks(0), *agents.ranks(1)])
        agents.wait()
        last = max(steps(run))
        assert f"stopped at step {last} and saved" in agents.err()
        assert len(agents.said()) == 0
        if name == "SIGINT":
            assert not mark.exists()
        else:
            assert json.loads(mark.read_text()) == {"signal": "SIGTERM", "step": last}
    assert train(run, "--save-every", "100000", "--steps", last + 1) == 0
    assert not mark.exists()
    assert max(steps(run)) == last + 1

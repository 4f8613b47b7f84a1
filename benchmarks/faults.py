"""Break a training run on several nodes in many ways, and measure whether it goes on, and when.

    sudo python benchmarks/faults.py [--faults rank node link] [--times 5] [--minutes 20]

A node is a network namespace of this machine with one torchrun agent, and all of them hang on one bridge. Ranks talk
by gloo over TCP, and the agents meet by c10d at the first node, as on a cluster. A supervisor starts an agent again
when it ends, as Kubernetes and Slurm do. All nodes see the same run folder. Linux and root are needed.

Each fault comes at a random moment of a run that is in full progress. Then the script waits for the next step and the
next checkpoint, and compares it with that of a run without faults. Everything that a run starts is ended
after it: processes, namespaces, links and the small disk. The times are those of this machine: a restart loads Python
and PyTorch again on every node, which takes most of the time to go on.
"""

import argparse
import fcntl
import json
import os
import queue
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import figures
import record
import torch
from safetensors.torch import load_file

SETTINGS = (
    "train digits --no-classes --width 32 --channel-multipliers 1 --num-res-blocks 1 --attention-resolutions 0 "
    "--num-timesteps 20 --schedule linear --predict eps --batch-size 48 --lr 1e-3 --warmup 5 --ema-decay 0.999 "
    "--ema-warmup --precision float32 --eval-images 16 --timestep-sampling uniform --cooldown 0 --log-every 1 "
    "--sample-every 0 --sample-steps 5 --save-every 10 --save-minutes 0 --keep 10000 --device cpu --dropout 0 "
    "--workers 0"
).split()
SWITCH, PORT = "ddpm-switch", 29400
SAVE_EVERY = 10


# -- the network -------------------------------------------------------------------------------------------------------


def ip(*words: str) -> None:
    """Run `ip WORDS`."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Delay(threading.Thread):
    """A wire between two tap devices that holds each frame back for `seconds`.

    The kernel of a container often has no netem, so this is done here.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seconds, self.open = 0.0, True
        self.ends = [self._tap(f"ddpm-tap{i}") for i in range(2)]

    @staticmethod
    def _tap(name: str) -> int:
        end = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(end, 0x400454CA, struct.pack("16sH", name.encode(), 0x0002 | 0x1000))  # TUNSETIFF, TAP | NO_PI
        return end

    def run(self) -> None:
        """Carry frames both ways until the ends are closed."""
        for a, b in (self.ends, self.ends[::-1]):
            frames: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
            threading.Thread(target=self._read, args=(a, frames), daemon=True).start()
            threading.Thread(target=self._write, args=(b, frames), daemon=True).start()

    def _read(self, end: int, frames: "queue.SimpleQueue[tuple[float, bytes]]") -> None:
        with suppress(OSError):
            while self.open:
                frames.put((time.monotonic() + self.seconds, os.read(end, 65536)))

    def _write(self, end: int, frames: "queue.SimpleQueue[tuple[float, bytes]]") -> None:
        while self.open:
            due, frame = frames.get()
            time.sleep(max(0.0, due - time.monotonic()))
            with suppress(OSError):
                os.write(end, frame)

    def close(self) -> None:
        """End the wire; its devices go with it."""
        self.open = False
        for end in self.ends:
            os.close(end)


@contextmanager
def network(count: int) -> Iterator[Delay]:
    """Namespaces ddpm-1, ddpm-2, ... with addresses 10.77.0.1, ... on one bridge. The last one is behind a `Delay`."""
    names = [SWITCH, *(f"ddpm-{i}" for i in range(1, count + 1))]
    remove(names)
    delay = Delay()
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", SWITCH, "link", "add", "bridge", "type", "bridge")
        ip("-n", SWITCH, "link", "set", "bridge", "up")
        for i in range(1, count + 1):
            if i < count:
                ip("-n", SWITCH, "link", "add", f"port{i}", "type", "veth", "peer", "name", "eth0", "netns", names[i])
            else:
                for tap, place, name in (("ddpm-tap0", SWITCH, f"port{i}"), ("ddpm-tap1", names[i], "eth0")):
                    ip("link", "set", tap, "netns", place)
                    ip("-n", place, "link", "set", tap, "name", name)
            ip("-n", names[i], "addr", "add", f"10.77.0.{i}/24", "dev", "eth0")
            ip("-n", names[i], "link", "set", "eth0", "up")
            ip("-n", SWITCH, "link", "set", f"port{i}", "master", "bridge")
            ip("-n", SWITCH, "link", "set", f"port{i}", "up")
        delay.start()
        yield delay
    finally:
        delay.close()
        remove(names)


def remove(names: list[str]) -> None:
    """End all processes in the namespaces, and delete these."""
    for name in names:
        for pid in pids(name):
            kill(pid, signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def pids(name: str) -> list[int]:
    """The processes in a namespace."""
    done = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
    return [int(word) for word in done.stdout.split()]


def kill(pid: int, number: int) -> None:
    """Send a signal to a process that may be gone."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


# -- nodes and runs ----------------------------------------------------------------------------------------------------


@dataclass
class Node:
    """A node and the supervisor of its agent. A node that is `off` stays off until `start` is called."""

    number: int
    command: list[str]
    log: Path
    agent: subprocess.Popen[bytes] | None = None
    off: bool = True
    exits: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"ddpm-{self.number}"

    def start(self) -> None:
        """Switch the node on."""
        self.off = False
        threading.Thread(target=self._supervise, daemon=True).start()

    def _supervise(self) -> None:
        environment = {**os.environ, **MEETING, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        while not self.off:
            with self.log.open("ab") as log:
                self.agent = subprocess.Popen(
                    ["ip", "netns", "exec", self.name, *self.command], stdout=log, stderr=log, env=environment
                )
                self.exits.append(code := self.agent.wait())
            if code == 0:
                self.off = True
            time.sleep(0.5)

    def ranks(self) -> list[int]:
        """The processes that train here."""
        found = []
        for pid in pids(self.name):
            with suppress(OSError):
                variables = Path(f"/proc/{pid}/environ").read_bytes()
                state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
                if b"\0LOCAL_RANK=" in b"\0" + variables and state != "Z":
                    found.append(pid)
        return found

    def end(self) -> None:
        """Switch the node off at once, with all its processes."""
        self.off = True
        for pid in pids(self.name):
            kill(pid, signal.SIGKILL)


class Cluster:
    """Nodes that train one run."""

    def __init__(self, work: Path, delay: Delay, nodes: int, least: int | None = None, each: int = 1) -> None:
        self.out, self.delay, self.work = work / "run", delay, work
        self.first: dict[int, int] = {}
        size = f"{least}:{nodes}" if least else str(nodes)
        self.nodes = []
        for i in range(1, nodes + 1):
            conf = f"is_host={int(i == 1)},join_timeout=120,last_call_timeout=2,read_timeout=10"
            words = ["-m", "torch.distributed.run", "--nnodes", size, "--nproc-per-node", str(each)]
            words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"10.77.0.1:{PORT}", "--rdzv-id", "faults"]
            words += ["--rdzv-conf", conf, "--local-addr", f"10.77.0.{i}", "--max-restarts", "1000"]
            words += ["-m", "ddpm", *SETTINGS, *more(), "--steps", "1000000", "--out", str(self.out)]
            self.nodes.append(Node(i, [sys.executable, *words], work / f"node{i}.log"))

    def start(self) -> None:
        for node in self.nodes:
            node.start()

    def end(self) -> None:
        for node in self.nodes:
            node.end()
        wait(lambda: not any(pids(node.name) for node in self.nodes), 10)

    def ranks(self) -> list[int]:
        return [pid for node in self.nodes for pid in node.ranks()]

    def place(self) -> tuple[int, int]:
        """(which process writes the log, the last step in it). A process that resumes writes a new file."""
        path = self.out / "metrics.jsonl"
        try:
            with path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                file.seek(max(0, os.fstat(file.fileno()).st_size - 4000))
                for line in reversed(file.read().split(b"\n")[:-1]):
                    with suppress(ValueError):
                        values = json.loads(line)
                        if "loss" in values:
                            return inode, values["step"]
                return inode, 0
        except OSError:
            return 0, 0

    def trains(self) -> bool:
        """Whether the first steps are done."""
        return self.place()[1] > 3

    def resumed(self, inode: int) -> bool:
        """Whether another process than the one of `inode` writes the log, and has done a step."""
        new, last = self.place()
        return new not in (0, inode) and last > self.first.setdefault(new, last)

    def saved(self) -> list[int]:
        """The steps of whole checkpoints at multiples of SAVE_EVERY, by which runs are compared."""
        names = [p.name for p in (self.out / "checkpoints").glob("[0-9]*") if (p / "raw.safetensors").exists()]
        return sorted(int(name) for name in names if int(name) % SAVE_EVERY == 0)


def more() -> list[str]:
    """--timeout, if this version of the package has it."""
    global _MORE
    if _MORE is None:
        done = subprocess.run([sys.executable, "-m", "ddpm", "train", "--help"], capture_output=True, text=True)
        _MORE = ["--timeout", str(TIMEOUT / 60)] if "--timeout" in done.stdout else []
    return _MORE


_MORE: list[str] | None = None
MEETING = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Without it a new agent of PyTorch 2.13 cannot join older ones: it waits for an address that is never written."""
TIMEOUT = 20.0
"""Seconds of --timeout."""


def wait(what: Callable[[], bool], seconds: float) -> float | None:
    """Seconds until `what` is true; None if it does not come true in time."""
    begun = time.monotonic()
    while time.monotonic() < begun + seconds:
        if what():
            return time.monotonic() - begun
        time.sleep(0.03)
    return None


# -- faults ------------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What one fault did. Times are seconds from the fault; None means never.

    noticed  until the last process that trained before is gone; if none had to go, 0
    on       until the next step is in the log
    lost     steps that were done again
    weights  whether the next checkpoint, that of step `checkpoint`, is that of a run without faults
    """

    fault: str
    step: int
    noticed: float | None = None
    on: float | None = None
    lost: int | None = None
    checkpoint: int | None = None
    weights: str = "-"
    note: str = ""


def kill_rank(c: Cluster) -> None:
    """SIGKILL of one rank"""
    kill(random.choice(c.ranks()), signal.SIGKILL)


def kill_agent(c: Cluster) -> None:
    """SIGKILL of an agent that does not hold the store"""
    kill(agent(c, -1), signal.SIGKILL)


def kill_head(c: Cluster) -> None:
    """SIGKILL of the agent that holds the store"""
    kill(agent(c, 0), signal.SIGKILL)


def lose_node(c: Cluster) -> None:
    """SIGKILL of all of a node without the store"""
    for pid in pids(c.nodes[-1].name):
        kill(pid, signal.SIGKILL)


def lose_head(c: Cluster) -> None:
    """SIGKILL of all of the node with the store"""
    for pid in pids(c.nodes[0].name):
        kill(pid, signal.SIGKILL)


def cut(c: Cluster, seconds: float) -> None:
    port = f"port{c.nodes[-1].number}"
    ip("-n", SWITCH, "link", "set", port, "down")
    later(seconds, lambda: ip("-n", SWITCH, "link", "set", port, "up"))


def cut_short(c: Cluster) -> None:
    """link of a node down for 5 s"""
    cut(c, 5)


def cut_long(c: Cluster) -> None:
    """link of a node down for 40 s"""
    cut(c, 40)


def slow(c: Cluster) -> None:
    """200 ms more on a link for 10 s"""
    c.delay.seconds = 0.2
    later(10, lambda: setattr(c.delay, "seconds", 0.0))


def stop_short(c: Cluster) -> None:
    """SIGSTOP of a rank for 10 s"""
    pid = random.choice(c.ranks())
    kill(pid, signal.SIGSTOP)
    later(10, lambda: kill(pid, signal.SIGCONT))


def stop_long(c: Cluster) -> None:
    """SIGSTOP of a rank for 30 s"""
    pid = random.choice(c.ranks())
    kill(pid, signal.SIGSTOP)
    later(30, lambda: kill(pid, signal.SIGCONT))


def stop_for_ever(c: Cluster) -> None:
    """SIGSTOP of a rank for ever"""
    kill(random.choice(c.ranks()), signal.SIGSTOP)


def preempt_node(c: Cluster) -> None:
    """SIGTERM to the agent of one node"""
    kill(agent(c, random.randrange(len(c.nodes))), signal.SIGTERM)


def preempt_all(c: Cluster) -> None:
    """SIGTERM to all agents"""
    for i in range(len(c.nodes)):
        kill(agent(c, i), signal.SIGTERM)


def preempt_rank(c: Cluster) -> None:
    """SIGTERM to one rank"""
    kill(random.choice(c.ranks()), signal.SIGTERM)


def fill(c: Cluster) -> None:
    """full disk of the run folder for 10 s"""
    ballast = c.work / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    later(10, lambda: ballast.unlink(missing_ok=True))


def later(seconds: float, what: Callable[[], object]) -> None:
    """Do something after some seconds."""
    timer = threading.Timer(seconds, what)
    timer.daemon = True
    timer.start()


def agent(c: Cluster, place: int) -> int:
    """The process number of a node's agent."""
    process = c.nodes[place].agent
    assert process is not None
    return process.pid


FAULTS: dict[str, Callable[[Cluster], None]] = {
    "rank": kill_rank, "agent": kill_agent, "head": kill_head, "node": lose_node, "head-node": lose_head,
    "cut-short": cut_short, "cut-long": cut_long, "slow": slow, "stop-short": stop_short, "stop-long": stop_long,
    "stop-for-ever": stop_for_ever, "preempt-node": preempt_node, "preempt-all": preempt_all,
    "preempt-rank": preempt_rank, "disk": fill,
}  # fmt: skip
LASTS = {"cut-short": 5, "cut-long": 40, "slow": 10, "stop-short": 10, "stop-long": 30, "disk": 10}
"""Seconds that a fault lasts. Then the run must go on."""


CALM = ("slow", "cut-short", "stop-short", "stop-long")
"""Faults after which the same processes may go on."""


def strike(name: str, c: Cluster, limit: float) -> Outcome:
    """One fault at a random moment of the next second, and what comes after it."""
    time.sleep(random.uniform(0.2, 1.2))
    before, (inode, step) = set(c.ranks()), c.place()
    errors = [node.log.stat().st_size if node.log.exists() else 0 for node in c.nodes]
    result, begun = Outcome(str(FAULTS[name].__doc__), step), time.monotonic()
    FAULTS[name](c)
    lasts, gone, first = LASTS.get(name, 0), None, False
    while time.monotonic() < begun + lasts + limit:
        now = time.monotonic() - begun
        if gone is None and not before & set(c.ranks()):
            gone = now
        if c.resumed(inode):
            first = True
            break
        last = c.place()[1]
        patience = 1 if name in CALM else 30
        if gone is None and now > lasts + patience and last > step + 3:  # the same processes go on
            result.note = "" if name in CALM else "the same processes went on"
            break
        time.sleep(0.05)
    else:
        result.note = "did not go on: " + why(c, errors)
    if not result.note.startswith("did not"):
        result.on, result.noticed = time.monotonic() - begun, gone if first else 0.0
        resumed = resumed_from(c, errors) if first else None
        result.lost = max(0, step - resumed) if resumed is not None else 0
        target = c.place()[1] // SAVE_EVERY * SAVE_EVERY + SAVE_EVERY
        if wait(lambda: target in c.saved(), limit) is None:
            result.note = "went on, but saved no checkpoint: " + why(c, errors)
        else:
            result.checkpoint = target
    return result


def resumed_from(c: Cluster, sizes: list[int]) -> int | None:
    """The step from which the run went on last, by the line `steps A to B` in the agents' logs."""
    found = None
    for node, size in zip(c.nodes, sizes, strict=True):
        for line in node.log.read_bytes()[size:].decode(errors="replace").splitlines():
            if ", steps " in line and " to 1,000,000" in line:
                found = int(line.split(", steps ")[1].split(" to ")[0].replace(",", ""))
    return found


def why(c: Cluster, sizes: list[int]) -> str:
    """The last line of ddpm itself in the logs since the fault."""
    lines = []
    for node, size in zip(c.nodes, sizes, strict=True):
        text = node.log.read_bytes()[size:].decode(errors="replace")
        lines += [line for line in text.splitlines() if line.startswith(("ddpm: ", "ddpm train: "))]
    return lines[-1].replace(str(c.work), "RUN")[:200] if lines else "no line of ddpm in the logs"


class Reference:
    """A run without faults in one node, of as many processes. It grows as far as it is needed."""

    def __init__(self, out: Path, world: int) -> None:
        self.out, self.world = out, world

    def grow(self, steps: int) -> None:
        """Train up to that step."""
        meet = ["--standalone", "--nproc-per-node", str(self.world)]
        words = [sys.executable, "-m", "torch.distributed.run", *meet, "-m", "ddpm", *SETTINGS, *more()]
        words += ["--steps", str(steps), "--out", str(self.out)]
        done = subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])

    def compare(self, run: Path, step: int) -> str:
        """Whether the checkpoint of that step equals this run's: to the bit, or by the relative distance."""
        a, b = (folder / "checkpoints" / f"{step:08d}" for folder in (run, self.out))
        far = 0.0
        for name in ("raw", "ema", "optimizer"):
            x, y = (load_file(folder / f"{name}.safetensors") for folder in (a, b))
            if any(not torch.equal(x[key], y[key]) for key in y):
                one, two = (torch.cat([t[key].flatten().double() for key in sorted(y)]) for t in (x, y))
                far = max(far, float((one - two).norm() / two.norm()))
        return "to the bit" if far == 0 else f"within {far:.0e}" if far < 1e-3 else f"NO, {far:.0e}"


# -- the series --------------------------------------------------------------------------------------------------------


@contextmanager
def disk(where: Path, megabytes: int) -> Iterator[Path]:
    """A small disk in memory, which a fault can fill."""
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "ddpm-faults", str(where)], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


def series(names: list[str], args: argparse.Namespace, end: float, outcomes: list[Outcome]) -> None:
    """All those faults, in one run as long as it goes on; else in the next one."""
    nodes, each = args.nodes, args.each
    world = nodes * each
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ddpm-faults-")))
        reference = Reference(work / "reference", world)
        delay = stack.enter_context(network(nodes))
        todo, turn = list(names), 0
        while todo and time.monotonic() < end:
            turn += 1
            with disk(work / f"turn{turn}", args.megabytes) as folder:
                c, first = Cluster(folder, delay, nodes, each=each), len(outcomes)
                try:
                    c.start()
                    if wait(c.trains, 120) is None:
                        outcomes.append(Outcome("start", 0, note="did not start: " + why(c, [0] * nodes)))
                        say(outcomes[-1])
                        continue
                    while todo and time.monotonic() < end and c.place()[1] < args.steps:
                        outcomes.append(strike(todo.pop(0), c, args.limit))
                        say(outcomes[-1])
                        if outcomes[-1].checkpoint is None:
                            break
                finally:
                    c.end()
                    compare(reference, c.out, outcomes[first:])
                    if args.logs:
                        for log in folder.glob("*.log"):
                            args.logs.mkdir(parents=True, exist_ok=True)
                            shutil.copy(log, args.logs / f"{turn}-{log.name}")


def elastic(args: argparse.Namespace, end: float, outcomes: list[Outcome]) -> None:
    """`--nnodes 1:3`: the last node is lost, comes back, and so on. Another number of nodes rounds in another way."""
    before_these = len(outcomes)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ddpm-faults-")))
        delay = stack.enter_context(network(3))
        c = Cluster(work, delay, 3, least=1)
        try:
            for node in c.nodes:
                node.start()
            wait(lambda: c.place()[1] > 3, 120)
            for i in range(2 * args.times):
                if time.monotonic() > end:
                    break
                node, leaves = c.nodes[-1 - i // 2 % 2], i % 2 == 0
                time.sleep(random.uniform(1, 2))
                (inode, step), before, begun = c.place(), set(c.ranks()), time.monotonic()
                outcome = Outcome(f"--nnodes 1:3, a node {'is lost' if leaves else 'joins'}", step)
                sizes = [n.log.stat().st_size for n in c.nodes]
                node.end() if leaves else node.start()
                gone = wait(partial(gone_of, c, before), args.limit)
                if wait(partial(c.resumed, inode), args.limit) is None:
                    outcome.note = "did not go on: " + why(c, sizes)
                else:
                    outcome.noticed, outcome.on = gone, time.monotonic() - begun
                    outcome.lost = max(0, step - (resumed_from(c, sizes) or 0))
                    outcome.checkpoint = c.place()[1] // SAVE_EVERY * SAVE_EVERY + SAVE_EVERY
                    wait(partial(has, c, outcome.checkpoint), args.limit)
                outcomes.append(outcome)
                say(outcome)
                if outcome.note:
                    break
        finally:
            c.end()
            compare(Reference(work / "reference", 1), c.out, outcomes[before_these:])


def resized(args: argparse.Namespace, end: float, outcomes: list[Outcome]) -> None:
    """SIGTERM to a run of 4 processes, which goes on with 2, then 3, then 4."""
    before_these = len(outcomes)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ddpm-faults-")))
        delay = stack.enter_context(network(1))
        sizes, last = [4, 2, 3] * args.times, None
        c = Cluster(work, delay, 1, each=4)
        try:
            for each in sizes:
                if time.monotonic() > end:
                    break
                inode, step = c.place()
                outcome, begun = Outcome(f"a run of {last} processes goes on with {each}", step), time.monotonic()
                c = Cluster(work, delay, 1, each=each)
                seen = [c.nodes[0].log.stat().st_size if c.nodes[0].log.exists() else 0]
                c.start()
                if wait(partial(c.resumed, inode), args.limit) is None:
                    outcome.note = "did not go on: " + why(c, seen)
                else:
                    outcome.noticed, outcome.on = 0.0, time.monotonic() - begun
                    outcome.lost = max(0, step - (resumed_from(c, seen) or 0))
                    outcome.checkpoint = c.place()[1] // SAVE_EVERY * SAVE_EVERY + SAVE_EVERY
                    wait(partial(has, c, outcome.checkpoint), args.limit)
                if last:
                    outcomes.append(outcome)
                    say(outcome)
                c.nodes[0].off, last = True, each
                kill(agent(c, 0), signal.SIGTERM)
                wait(lambda: not pids("ddpm-1"), 60)
        finally:
            c.end()
            compare(Reference(work / "reference", 1), c.out, outcomes[before_these:])


def gone_of(c: Cluster, before: set[int]) -> bool:
    """Whether the processes that trained before are gone."""
    return not before & set(c.ranks())


def has(c: Cluster, step: int) -> bool:
    """Whether the checkpoint of that step is there."""
    return step in c.saved()


def compare(reference: Reference, run: Path, outcomes: list[Outcome]) -> None:
    """Fill in the column `weights`."""
    those = [o for o in outcomes if o.checkpoint is not None]
    if those:
        reference.grow(max(o.checkpoint or 0 for o in those))
    for o in those:
        o.weights = reference.compare(run, o.checkpoint or 0)
        say(o)


def say(outcome: Outcome) -> None:
    print(json.dumps(asdict(outcome)), file=sys.stderr, flush=True)


def report(outcomes: list[Outcome]) -> str:
    """A table of one row per kind of fault."""
    rows = []
    for fault in dict.fromkeys(o.fault for o in outcomes):
        those = [o for o in outcomes if o.fault == fault]
        good = [o for o in those if o.on is not None]
        spreads = [
            str(figures.spread(values)) if values else "-"
            for values in (
                [o.noticed for o in good if o.noticed is not None],
                [o.on for o in good if o.on is not None],
                [float(o.lost) for o in good if o.lost is not None],
            )
        ]
        same = sum(o.weights == "to the bit" for o in those)
        near = sum(o.weights.startswith("within") for o in those)
        rows.append([fault, len(those), len(good), *spreads, same, near])
    header = ["fault", "times", "went on", "s to notice", "s to go on", "steps lost", "equal to the bit", "within 1e-3"]
    return figures.table(header, rows)


def main() -> None:
    parser = record.parser(__doc__, repeats=1, seconds=0)
    parser.add_argument("--faults", nargs="+", choices=[*FAULTS, "elastic", "resized"], default=list(FAULTS))
    parser.add_argument("--times", type=int, default=4, help="how often each fault comes (%(default)s)")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--each", type=int, default=1, help="processes of a node (%(default)s)")
    parser.add_argument("--minutes", type=float, default=30, help="no new fault after this time (%(default)s)")
    parser.add_argument("--limit", type=float, default=90, help="seconds in which a run must go on (%(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="a new run begins after this step (%(default)s)")
    parser.add_argument("--megabytes", type=int, default=600, help="size of the disk (%(default)s)")
    parser.add_argument("--note", default="", help="a line for the record")
    parser.add_argument("--logs", type=Path, help="folder for the agents' logs")
    parser.add_argument("--random", type=int, default=0, help="seed of the moments and places (%(default)s)")
    args = parser.parse_args()
    random.seed(args.random)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    single = [name for name in args.faults if name in FAULTS]
    names = [name for _ in range(args.times) for name in random.sample(single, len(single))]
    end = time.monotonic() + 60 * args.minutes
    outcomes: list[Outcome] = []
    with suppress(KeyboardInterrupt):  # the record holds what was measured until then
        if names:
            series(names, args, end, outcomes)
        if "elastic" in args.faults:
            elastic(args, end, outcomes)
        if "resized" in args.faults:
            resized(args, end, outcomes)
    text = f"{args.nodes} nodes of {args.each} processes, {len(outcomes)} faults. {args.note}\n\n{report(outcomes)}"
    args.logs = None  # a record does not name folders of this machine
    values = {"outcomes": [asdict(o) for o in outcomes]}
    record.write("faults", "Faults of nodes, links, processes and disks", args, values, text, repeated=False)


if __name__ == "__main__":
    main()

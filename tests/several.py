"""Start torchrun on this machine, with one agent for each node, and look for its processes."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SMALL = "--eval-images 8 --timestep-sampling stratified".split()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Agents:
    """One torchrun a node. `words` of a node are the words of ddpm, and `folders` where each node runs."""

    def __init__(self, words: Sequence[Sequence[Any]], folders: Sequence[Path], each: int = 1, *more: str) -> None:
        self.folders, self.errors = folders, [folder / f"err{i}.txt" for i, folder in enumerate(folders)]
        self.outs = [folder / f"out{i}.txt" for i, folder in enumerate(folders)]
        port = free_port()
        self.agents = []
        for i, (given, folder) in enumerate(zip(words, folders, strict=True)):
            start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(words)), *more]
            start += ["--nproc-per-node", str(each), "--rdzv-backend", "c10d", "--rdzv-id", "x"]
            start += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-conf", f"is_host={int(i == 0)}"]
            start += ["--local-addr", "127.0.0.1", "-m", "ddpm", *map(str, given)]
            with self.errors[i].open("w") as err, self.outs[i].open("w") as out:
                self.agents.append(subprocess.Popen(start, cwd=folder, stdout=out, stderr=err, start_new_session=True))

    def __enter__(self) -> "Agents":
        return self

    def __exit__(self, *_: object) -> None:
        for agent in self.agents:
            for pid in [*(found for rank in range(8) for found in self.ranks(rank)), agent.pid]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            agent.wait()

    def wait(self, seconds: float = 90) -> list[int]:
        """The codes of the agents: 0, or 1 if a process failed."""
        end = time.monotonic() + seconds
        return [agent.wait(max(1.0, end - time.monotonic())) for agent in self.agents]

    def ranks(self, rank: int) -> list[int]:
        """The ids of the processes of that rank, which these agents started."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_bytes().split(b"\0")
                here = Path(os.readlink(folder / "cwd")) in [each.resolve() for each in self.folders]
            except OSError:
                continue
            if here and f"RANK={rank}".encode() in environment and b"TORCHELASTIC_RUN_ID=x" in environment:
                found.append(int(folder.name))
        return found

    def err(self) -> str:
        return "".join(path.read_text() for path in self.errors)

    def said(self) -> list[str]:
        """The lines about errors."""
        return [line for line in self.err().splitlines() if line.startswith("ddpm: ")]

    def codes(self) -> set[int]:
        """The codes of processes that failed, as torchrun says them."""
        import re

        return {int(code) for code in re.findall(r"exitcode\s*: (-?\d+)", self.err())}


def forked(count: int, target: Callable[..., None], *args: Any) -> int:
    """Run `target(*args, counted)` in processes that start together, and return the shared number `counted`."""
    context = multiprocessing.get_context("fork")
    counted = context.Value("i", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads in a process that forks
        processes = [context.Process(target=target, args=(*args, counted)) for _ in range(count)]
        for process in processes:
            process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * count
    return counted.value


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def reached(run: Path, step: int) -> bool:
    """Whether the log of a run has come to a step."""
    import json

    if not (run / "metrics.jsonl").exists():
        return False
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return bool(lines) and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= step

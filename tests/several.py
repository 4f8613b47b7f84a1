"""Start torchrun and Python on this machine as forks of a server that has imported torch, which takes seconds.

A fork differs from a new process in its start only: what it runs, its streams, its signals and its end are the same.
"""

import faulthandler
import multiprocessing
import os
import random
import runpy
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.popen_fork import Popen
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PRELOAD = ["pytest", "torch.distributed.run", "torch._dynamo", "ddpm.cli.main", "ddpm.run.train", "ddpm.run.sample"]
"""Modules that the forks use. DistributedDataParallel imports torch._dynamo, which takes seconds."""


def server() -> Any:
    """A context of `multiprocessing` whose processes are forks of the server, which shares no memory with this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def run_python(words: Sequence[str]) -> None:
    """Do what `python words` does, for `FILE ...` and `-m MODULE ...`."""
    multiprocessing.set_start_method(None, force=True)  # that of a new process
    module = words[0] == "-m"
    sys.argv = list(words[module:])
    sys.path.insert(0, "" if module else str(Path(words[0]).parent))
    (runpy.run_module if module else runpy.run_path)(sys.argv[0], run_name="__main__")


def start_python(
    words: Sequence[Any], folder: Path, out: Path | str = os.devnull, err: Path | str = os.devnull,
    work: Callable[[list[str]], None] = run_python,
) -> BaseProcess:  # fmt: skip
    """Start `python words` in that folder and a session of its own, or another `work` with these words."""
    given = (work, [*map(str, words)], str(folder), str(out), str(err), dict(os.environ))
    process = server().Process(target=_begin, args=given)
    process.start()
    return process


def printed(code: str, folder: Path) -> str:
    """What this code prints in a process of its own. The folder gets two files."""
    (folder / "code.py").write_text(code)
    process = start_python(["code.py"], folder, folder / "out.txt")
    process.join()
    assert process.exitcode == 0
    return (folder / "out.txt").read_text()


def _begin(
    work: Callable[[list[str]], None], words: list[str], folder: str, out: str, err: str, environment: Mapping[str, str]
) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), number)
    work(words)


def _torchrun(words: list[str]) -> None:
    """Run an agent of torchrun, whose workers are forks, too."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    def fork(_: Any, args: Sequence[str], environment: Mapping[str, str]) -> Popen:
        command = [word for word in args[1:] if word != "-u"]
        return Popen(multiprocessing.get_context("fork").Process(target=_work, args=(command, environment)))

    SubprocessHandler._popen = fork
    run.main(words)


def _work(words: list[str], environment: Mapping[str, str]) -> None:
    """Forget the agent's signals and sockets, leave the number of this process in a file, and run Python."""
    os.setsid()
    faulthandler.enable(2)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for link in list(Path("/dev/fd").iterdir()):
        with suppress(OSError):
            if os.readlink(link).startswith("socket:"):
                os.close(int(link.name))
    os.environ.update(environment)
    Path(f"rank-{os.environ['RANK']}-{os.getpid()}").touch()
    run_python(words)


def free_port() -> int:
    """A port that no process has. It lies below those that the system gives to connections, which could take it."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_768)
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port


class Agents:
    """One torchrun a node. `words` are those of ddpm, or a script and its words; each node runs in its folder."""

    def __init__(self, words: Sequence[Sequence[Any]], folders: Sequence[Path], each: int = 1, *more: str) -> None:
        self.folders, self.errors = folders, [folder / f"err{i}.txt" for i, folder in enumerate(folders)]
        for path in self.errors:
            path.touch()
        port = free_port()
        self.agents: list[BaseProcess] = []
        for i, (given, folder) in enumerate(zip(words, folders, strict=True)):
            start = ["--nnodes", len(words), *more]
            start += ["--nproc-per-node", each, "--rdzv-backend", "c10d", "--rdzv-id", "x"]
            start += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-conf", f"is_host={int(i == 0)}"]
            start += ["--local-addr", "127.0.0.1"]
            start += given if str(given[0]).endswith(".py") else ["-m", "ddpm", *given]
            self.agents.append(start_python(start, folder, folder / f"out{i}.txt", self.errors[i], work=_torchrun))

    def __enter__(self) -> "Agents":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is not None:
            print(self.err(), self._stacks())
        for agent in self.agents:
            agent.kill()  # before its ranks, so that it starts no others
            agent.join()
        self._send(signal.SIGKILL)

    def wait(self, seconds: float = 90) -> list[int]:
        """The codes of the agents: 0, or 1 if a process failed."""
        end = time.monotonic() + seconds
        for agent in self.agents:
            agent.join(max(1.0, end - time.monotonic()))
            assert agent.exitcode is not None, "waited in vain"
        return [agent.exitcode for agent in self.agents]

    def ranks(self, rank: int) -> list[int]:
        """The ids of the processes of that rank that live."""
        found = [int(path.name.rpartition("-")[2]) for here in self.folders for path in here.glob(f"rank-{rank}-*")]
        return [pid for pid in found if _lives(pid)]

    def _stacks(self) -> str:
        """End the processes that live. They say where they are, which shows why one hangs."""
        before = len(self.err())
        self._send(signal.SIGABRT)
        time.sleep(1)
        return self.err()[before:]

    def _send(self, number: signal.Signals) -> None:
        for pid in (found for rank in range(8) for found in self.ranks(rank)):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def err(self) -> str:
        return "".join(path.read_text() for path in self.errors)

    def said(self) -> list[str]:
        """The lines about errors."""
        return [line for line in self.err().splitlines() if line.startswith("ddpm: ")]

    def codes(self) -> set[int]:
        """The codes of processes that failed, as torchrun says them."""
        import re

        return {int(code) for code in re.findall(r"exitcode\s*: (-?\d+)", self.err())}


def _lives(pid: int) -> bool:
    """Whether this process is there and has not ended."""
    try:
        os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return False
    return True


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

"""The processes of torchrun as a group: they meet, compare what they are, share a user's mistake, and miss who is lost.

They talk in JSON through torch's store, which the agent of torchrun holds, or else the first process. A wait lasts as
long as every process gives signs of life, so that the first one may work alone for hours. `Group.exchange` is the one
operation: every process gives a value and gets all of them, or all raise the mistake of one.
"""

import json
import os
import queue
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from ddpm.errors import InputError, Stopped, brief

Store = Any
"""A store of torch, whose type lacks some of its methods."""
_stores: Any = dist
"""torch.distributed has the stores, but its types do not say so."""
START = 300.0
"""Seconds in which all processes must have started, or the timeout if that is longer."""
_COLLECTIVE = re.compile(r"gloo|nccl|tcpstore|socket|connection|timed out|timeout", re.IGNORECASE)
"""Words in the errors of torch that a collective call ends with if a process is lost."""


class Lost(Stopped):
    """A process of the group is lost: it was killed, it hangs, or the network is cut."""


class Group:
    """This process among `world` of them. `join` makes it.

    store    for what else needs one; its keys belong to this attempt
    hosts    the name of each process's machine
    timeout  seconds without a sign of life after which a process is lost
    """

    def __init__(self, store: Store, rank: int, world: int, timeout: float, hosting: bool) -> None:
        self.store, self.timeout, self._rank, self._world, self._hosting = store, timeout, rank, world, hosting
        self.interval = min(max(1.0, world / 50), timeout / 10)
        self._few = 4 * self.interval
        self.step = 0
        self.hosts = [""] * world
        self._exchanges, self._ended, self._sent = 0, [], 0  # type: ignore[var-annotated]
        self._signs: dict[int, list[Any]] = {}
        self._changed = dict.fromkeys(range(world), time.monotonic())
        self._heard = time.monotonic()
        self._closed, self._now = threading.Event(), threading.Event()
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[tuple[bool, Any]]]]
        self._work = queue.SimpleQueue()
        store.set(f"sign/{rank}", json.dumps([0, 0, []]))
        threading.Thread(target=self._serve, daemon=True).start()
        self.hosts = self.exchange(socket.gethostname())
        threading.Thread(target=self._live, args=(store.clone(),), daemon=True).start()

    # -- what the processes say to each other --------------------------------------------------------------------------

    def exchange(self, value: Any = None, mistake: str | None = None) -> list[Any]:
        """Every process's value, in their order. Values are plain JSON. All processes call it as often.

        mistake  a line about what this process cannot do; then all raise InputError. One of them prints it
        """
        number, self._exchanges = self._exchanges, self._exchanges + 1
        text = json.dumps([value, mistake])
        if self._rank:
            self._ask(lambda: self.store.set(f"{number}/{self._rank}", text))
            answer = self._get([f"{number}/all"])[0]
        else:
            keys = [f"{number}/{rank}" for rank in range(1, self._world)]
            answer = f"[{','.join([text, *(each.decode() for each in self._get(keys))])}]".encode()
            self._ask(lambda: self._replace(number, answer, keys))
        values, mistakes = zip(*json.loads(answer), strict=True)
        if any(each is not None for each in mistakes):
            raise self._mistake(mistakes)
        return list(values)

    def _replace(self, number: int, answer: bytes, keys: list[str]) -> None:
        """Set the answer, and delete what all have read."""
        self.store.set(f"{number}/all", answer.decode())
        for key in [*keys, f"{number - 1}/all"]:
            self.store.delete_key(key)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A context whose InputError on one process is raised on all, at the next exchange or at the end."""
        try:
            yield
        except InputError as error:
            if not hasattr(error, "shared"):
                self.exchange(mistake=str(error))
            raise
        self.exchange()

    def _mistake(self, mistakes: tuple[str | None, ...]) -> InputError:
        """One line that one process prints: the first process what all say, else the first one that says it."""
        speaker = next(rank for rank, line in enumerate(mistakes) if line is not None)
        line = mistakes[speaker]
        if set(mistakes) != {line}:
            line = f"{line} ({self.name(speaker)})"
        return shared(InputError(line), self._rank == speaker)

    def name(self, rank: int) -> str:
        """`rank 1 on HOST`."""
        return f"rank {rank} on {self.hosts[rank]}"

    # -- who is lost ---------------------------------------------------------------------------------------------------

    def ended(self, code: int, line: str) -> None:
        """Let the others know that this process ends, before it does."""
        self._ended = [code, line]
        before = self._sent
        self._now.set()
        _until(lambda: self._sent > before, 3 * self.interval)

    def same(self, line: str) -> bool:
        """Whether a process of a lower rank ends with the same line. It may wait for a few signs of life."""

        def found() -> bool:
            return any(sign[2][1:] == [line] for rank, sign in list(self._signs.items()) if rank < self._rank)

        return bool(self._rank) and _until(found, 3 * self.interval)

    def silent(self, seconds: float) -> list[int]:
        """The other processes that gave no sign of life for so long."""
        now = time.monotonic()
        return [rank for rank, at in self._changed.items() if rank != self._rank and now - at > seconds]

    def gone(self) -> list[int]:
        """The other processes that have ended, or have been silent for a few signs."""
        ended = [rank for rank, sign in list(self._signs.items()) if sign[2] and rank != self._rank]
        return sorted({*ended, *self.silent(self._few)})

    def cut(self, error: Exception) -> bool:
        """Whether the error is that of a collective call that failed."""
        known = isinstance(error, (Stopped, InputError, OSError))
        return not known and _COLLECTIVE.search(f"{type(error).__name__} {error}") is not None

    def explain(self, error: Exception) -> Stopped | InputError | None:
        """Why a collective call failed: who is lost or has ended; None for an error of another kind."""
        if not self.cut(error):
            return None
        _until(lambda: bool(self.gone()), self._few + 2 * self.interval)
        return self._others_end() or self._lost(self.silent(self._few))

    def _others_end(self) -> Stopped | InputError | None:
        for rank, (_, _, ended) in sorted(self._signs.items()):
            if ended and rank != self._rank:
                line = f"{self.name(rank)} ended: {ended[1]}"
                return shared(InputError(line) if ended[0] == 2 else Lost(line), False)
        return None

    def _lost(self, silent: list[int]) -> Lost:
        alive = [rank for rank in range(self._world) if rank not in silent]
        if not silent:
            line = f"a process does not answer in {self.timeout / 60:g} minutes, though all give signs of life"
        elif alive == [self._rank] and self._world > 2:
            line = f"{self.name(self._rank)} hears of no other process; its network may be cut"
        else:
            names = ", ".join(map(self.name, silent[:5])) + (f" and {len(silent) - 5} more" if len(silent) > 5 else "")
            step = self._signs[silent[0]][1] if silent[0] in self._signs else 0
            since = time.monotonic() - self._changed[silent[0]]
            line = f"no sign of life from {names} for {since:.0f} s, after step {step}"
        return shared(Lost(line), self._rank == alive[0])

    def _check(self) -> None:
        """Raise Lost if this process waits in vain."""
        if error := self._others_end():
            raise error
        if silent := self.silent(self.timeout):
            raise self._lost(silent)

    # -- threads -------------------------------------------------------------------------------------------------------

    def _ask(self, work: Callable[[], Any]) -> Any:
        """The result of `work`, which uses the store. A store that is cut off may never answer its thread."""
        answer: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        self._work.put((work, answer))
        while True:
            try:
                good, value = answer.get(timeout=0.2)
            except queue.Empty:
                self._check()
                continue
            if good:
                return value
            self._check()
            raise Lost(f"the store of torchrun does not answer {self.name(self._rank)} ({brief(value)})")

    def _get(self, keys: list[str]) -> list[bytes]:
        def poll() -> list[bytes] | None:
            try:
                self.store.wait(keys, timedelta(seconds=min(1.0, self.interval)))
            except dist.DistStoreError:
                return None
            except RuntimeError as error:
                if not str(error).startswith("Wait timeout"):  # that of FileStore has no class of its own
                    raise
                return None
            values: list[bytes] = self.store.multi_get(keys)
            return values

        values: list[bytes] | None = None
        while values is None:
            self._check()
            values = self._ask(poll)
        return values

    def _serve(self) -> None:
        while not self._closed.is_set():
            with suppress(queue.Empty):
                work, answer = self._work.get(timeout=1)
                try:
                    answer.put((True, work()))
                except Exception as error:
                    answer.put((False, error))

    def _live(self, store: Store) -> None:
        """Give signs of life, and see those of the others; `store` is this thread's own connection."""
        keys, count = [f"sign/{rank}" for rank in range(self._world)], 0
        while not self._closed.is_set():
            count += 1
            with suppress(Exception):  # then nobody is heard of
                store.set(keys[self._rank], json.dumps([count, self.step, self._ended]))
                for rank, text in enumerate(store.multi_get(keys)):
                    if (sign := json.loads(text)) != self._signs.get(rank):
                        self._signs[rank], self._changed[rank] = sign, time.monotonic()
                self._sent += 1
            self._now.wait(self.interval)
            self._now.clear()

    def close(self) -> None:
        """End. The process that holds the store lets the others end first."""

        def leave() -> None:
            self.store.append("ends", ".")
            if self._hosting:
                _until(lambda: len(self.store.get("ends")) >= self._world, 5.0)

        answer: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        self._work.put((leave, answer))
        with suppress(queue.Empty):
            answer.get(timeout=6)
        self._closed.set()
        self._now.set()


def join(rank: int, world: int, timeout: float) -> Group:
    """Meet the other processes of this attempt. timeout is in seconds.

    Raises Stopped if some do not come.

    torchrun keeps one store for all attempts, and the counts of its agents may differ. So the first process names each
    attempt anew, and who reads the name finds its own random token beside it.
    """
    hosting = False
    limit = max(START, timeout)
    if dist.is_initialized():
        base: Store = dist.distributed_c10d._get_default_store()
        base = base.clone()
    else:
        address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500"))
        hosting = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            base = _stores.TCPStore(
                address, port, world, hosting, timedelta(seconds=limit), wait_for_workers=False, multi_tenant=True
            )
        except (dist.DistError, RuntimeError) as error:
            raise Stopped(f"rank {rank}: no store at {address}:{port} ({brief(error)})") from error
    store: Store = _stores.PrefixStore("ddpm", base)
    token, end = secrets.token_hex(8), time.monotonic() + limit
    store.append("come", f"{rank}:{token} ")
    if rank:
        name = _named(store, rank, token, end)
    else:
        name = token
        _name(store, world, name, end)
    return Group(_stores.PrefixStore(name, store), rank, world, timeout, hosting)


def _name(store: Store, world: int, name: str, end: float) -> None:
    """Tell all processes the name of the attempt, until all have read it."""
    told: dict[str, str] = {}
    while True:
        tokens = dict(each.split(":") for each in store.get("come").decode().split())
        if tokens != told:
            store.set("attempt", json.dumps([name, tokens]))
            told = tokens
        read = set(store.get(f"read/{name}").decode().split()) if store.check([f"read/{name}"]) else set()
        if len(read) == world - 1:
            return
        if time.monotonic() > end:
            missing = [rank for rank in range(1, world) if str(rank) not in read]
            raise Stopped(f"rank {', '.join(map(str, missing[:5]))}: did not start; want {world} processes")
        time.sleep(0.02)


def _named(store: Store, rank: int, token: str, end: float) -> str:
    while time.monotonic() < end:
        if store.check(["attempt"]):
            name, tokens = json.loads(store.get("attempt"))
            if tokens.get(str(rank)) == token:
                store.append(f"read/{name}", f"{rank} ")
                return str(name)
        time.sleep(0.02)
    raise Stopped(f"rank {rank}: the first process did not start")


_E = TypeVar("_E", bound=Exception)


def shared(error: _E, prints: bool) -> _E:
    """Mark an error that all processes know of; only one of them prints it."""
    error.shared = prints  # type: ignore[attr-defined]
    return error


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True

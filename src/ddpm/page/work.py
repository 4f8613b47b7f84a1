"""One job at a time: the others wait in a queue, and a job ends when its reader leaves."""

import asyncio
import itertools
import json
import logging
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ddpm.errors import InputError, one_line, parse_json

LOG = logging.getLogger("ddpm.page")

LONGEST = 8
"""Jobs that run or wait at most. A request for one more is refused."""

BODY = 1_000_000
"""Bytes of a request in JSON."""

UNFORESEEN = "the server met an error that it did not foresee; its terminal shows it"

Job: TypeAlias = Generator[dict[str, Any] | None, None, None]
"""The events of a job. It yields None where it may be cancelled and has nothing to say: after each network call."""


class Work:
    """The queue. All jobs run in one thread, so that settings that a job makes in its thread hold from call to call."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, "work")
        self._queue: list[Job] = []
        self._moved = asyncio.Condition()

    def stream(self, request: Request, job: Job) -> StreamingResponse:
        """Run a job when its turn comes, and send what it yields as server-sent events.

        While the job waits, events of the kind "queue" tell its place. If the reader leaves, the job is closed after
        its network call. An InputError becomes an event of the kind "error". Raises HTTPException 429 if LONGEST jobs
        run or wait.
        """
        if len(self._queue) >= LONGEST:
            raise HTTPException(429, f"{LONGEST} jobs run or wait already; try again when one has ended")
        self._queue.append(job)
        return _Stream(self, job)

    def route(self, path: str, make: Callable[[dict[str, Any]], Job]) -> Route:
        """A route to which the page posts JSON, and which streams the job that `make` returns for it."""

        async def start(request: Request) -> StreamingResponse:
            return self.stream(request, make(await body(request)))

        return Route(path, start, methods=["POST"])

    async def events(self, job: Job) -> AsyncIterator[str]:
        """The events of a job, each as the text that is sent."""
        async with self._moved:
            while place := self._queue.index(job):
                yield _event({"kind": "queue", "place": place})
                await self._moved.wait()
        try:
            while event := await asyncio.get_running_loop().run_in_executor(self.thread, _next, job):
                if event[0] is not None:
                    yield _event(event[0])
        except InputError as error:
            yield _event({"kind": "error", "line": one_line(str(error))})
        except Exception:
            LOG.exception("a job failed")
            yield _event({"kind": "error", "line": UNFORESEEN})

    async def leave(self, job: Job) -> None:
        """Close a job in its thread, after the call that it is in, and let the next one start."""
        await asyncio.get_running_loop().run_in_executor(self.thread, job.close)
        async with self._moved:
            self._queue.remove(job)
            self._moved.notify_all()

    def end(self) -> None:
        """Close all jobs, when the server has ended. A job that another thread closed would lose its settings."""
        for job in self._queue:
            self.thread.submit(job.close)
        self.thread.shutdown()


class _Stream(StreamingResponse):
    """Starlette stops it when the reader leaves; whatever ends it, the job leaves the queue."""

    def __init__(self, work: Work, job: Job) -> None:
        super().__init__(work.events(job), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._work, self._job = work, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except asyncio.CancelledError:
            return  # the server ends
        finally:
            await asyncio.shield(self._work.leave(self._job))


def _next(job: Job) -> list[dict[str, Any] | None]:
    """The next event of a job in a list, which is empty at its end."""
    return list(itertools.islice(job, 1))


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


async def read(request: Request, limit: int) -> bytes:
    """The body of a request. Raises HTTPException 413 as soon as it has more than `limit` bytes, or says so."""
    refusal = HTTPException(413, f"the request has more than {limit:,} bytes; want fewer")
    if int(request.headers.get("content-length") or 0) > limit:
        raise refusal
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > limit:
            raise refusal
    return bytes(data)


async def body(request: Request) -> dict[str, Any]:
    """The JSON object that a request holds. Raises InputError for anything else."""
    try:
        value = parse_json(await read(request, BODY))
    except ValueError as error:
        raise InputError(f"the request is not JSON ({error}); want a JSON object") from None
    if not isinstance(value, dict):
        raise InputError("the request is no JSON object; want one")
    return value

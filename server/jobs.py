"""Work that goes on after its request was answered: bounded in number, followed by its events, cancelled at the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import ExitStack
from typing import Any
from uuid import uuid4

import structlog

from weft.adapters.errors import AdapterError
from weft.server.errors import NotFound, Overloaded, RequestError

MAX_RUNNING = 4
MAX_KEPT = 64
"""Jobs that are remembered, those under way among them."""
RETRY_AFTER = 30

log = structlog.get_logger(__name__)


class Job:
    """One job.

    Attributes:
        about: what it was asked for, to be shown.
        state: "running", "succeeded", "failed" or "cancelled"; it changes once.
        error: why it failed, in words.
        result: what it made, once it has succeeded.
        events: what there was to tell so far.
        created, ended: unix time in seconds.
    """

    def __init__(self, kind: str, about: dict[str, Any]) -> None:
        self.id = f"job-{uuid4().hex}"
        self.kind = kind
        self.about = about
        self.state = "running"
        self.error: str | None = None
        self.result: dict[str, Any] | None = None
        self.events: list[dict[str, Any]] = []
        self.created = time.time()
        self.ended: float | None = None
        self._news = asyncio.Event()

    def tell(self, event: dict[str, Any]) -> None:
        """Add an event. How many there can be is for the kind of job to bound."""
        self.events.append(event)
        self._wake()

    def end(self, state: str, *, error: str | None = None, result: dict[str, Any] | None = None) -> None:
        self.state, self.error, self.result, self.ended = state, error, result, time.time()
        self._wake()

    async def follow(self, patience: float) -> AsyncGenerator[dict[str, Any] | None, None]:
        """All events from the first on, until the job has ended; None where there was none for ``patience`` seconds."""
        told = 0
        while True:
            news, running = self._news, self.state == "running"
            while told < len(self.events):
                told += 1
                yield self.events[told - 1]
            if not running:
                return
            try:
                async with asyncio.timeout(patience):
                    await news.wait()
            except TimeoutError:
                yield None

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()


class Jobs:
    """All jobs of a server, the newest of those that have ended included. All methods on one event loop."""

    def __init__(self, *, max_running: int = MAX_RUNNING, max_kept: int = MAX_KEPT) -> None:
        self._max_running = max_running
        self._max_kept = max_kept
        self._jobs: dict[str, Job] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(
        self, kind: str, about: dict[str, Any], work: Callable[[Job], Awaitable[dict[str, Any]]], held: ExitStack
    ) -> Job:
        """Run ``work``, which gives the job's result; ``held`` is closed at its end, whatever that is.

        Raises:
            Overloaded: too many are under way; ``held`` is still the caller's then.
        """
        if len(self._tasks) >= self._max_running:
            raise Overloaded(f"{len(self._tasks)} jobs are under way already", retry_after=RETRY_AFTER)
        job = self._keep(Job(kind, about))
        task = self._tasks[job.id] = asyncio.create_task(self._run(job, work))

        def ended(task: asyncio.Task[None]) -> None:
            del self._tasks[job.id]
            held.close()
            if task.cancelled():
                job.end("cancelled")

        task.add_done_callback(ended)
        return job

    def get(self, id: str) -> Job:
        """Raises ``NotFound``."""
        if id not in self._jobs:
            raise NotFound(f"there is no job {id[:64]!r}", param="id", code="job_not_found")
        return self._jobs[id]

    def list(self) -> list[Job]:
        """Oldest first."""
        return list(self._jobs.values())

    async def cancel(self, id: str) -> Job:
        """End a job, if it has not ended, and wait for that. Raises ``NotFound``."""
        job = self.get(id)
        if task := self._tasks.get(id):
            task.cancel()
            await asyncio.wait({task})
            await asyncio.sleep(0)  # what was to be done at its end is done
        return job

    def stop(self) -> None:
        """End all jobs."""
        for task in self._tasks.values():
            task.cancel()

    async def close(self) -> None:
        """As ``stop``, and wait for it."""
        self.stop()
        if self._tasks:
            await asyncio.wait(set(self._tasks.values()))

    def _keep(self, job: Job) -> Job:
        ended = [id for id in self._jobs if id not in self._tasks]
        for id in ended[: max(0, len(self._jobs) + 1 - self._max_kept)]:
            del self._jobs[id]
        self._jobs[job.id] = job
        return job

    async def _run(self, job: Job, work: Callable[[Job], Awaitable[dict[str, Any]]]) -> None:
        try:
            result = await work(job)
        except (RequestError, AdapterError) as error:
            log.warning("job.failed", job=job.id, kind=job.kind, reason=error.message)
            job.end("failed", error=error.message)
        except Exception:
            log.exception("job.failed", job=job.id, kind=job.kind)
            job.end("failed", error="internal error; the server's log has the details")
        else:
            job.end("succeeded", result=result)

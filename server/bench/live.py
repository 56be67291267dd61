"""A workload run against a live server over HTTP: weft's, or any with the OpenAI API and vLLM's extensions."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import orjson

from weft.server.bench.measure import StepAdapters, Trace, clock
from weft.server.bench.workload import Arrival

CONNECT_TIMEOUT = 10.0
FIRST_LOOK, LAST_LOOK = 0.25, 4.0
"""Seconds until the first look at the server's metrics, and between two of the last ones; each pause is twice the last.
With many adapters a look takes the server some tens of milliseconds, in which its streams have half of its time."""
STEP_ADAPTERS = re.compile(r"^weft_step_adapters (\S+)$", re.MULTILINE)


class LiveError(Exception):
    """The server cannot be benchmarked; the message says why."""


class LiveTarget:
    """Sends workloads to ``url`` as streamed completions. Made, it has asked for the models.

    Raises:
        LiveError: the server does not say what it serves.
    """

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self.base, self.adapters = asyncio.run(self._models())

    @property
    def about(self) -> dict[str, Any]:
        """What is known of the server."""
        return {"mode": "live", "model": self.base}

    def run(self, arrivals: Sequence[Arrival], concurrency: int | None) -> tuple[list[Trace], StepAdapters]:
        """Run ``arrivals`` to their end: ``concurrency`` at a time, or each at its own time if that is None."""
        return asyncio.run(self._run(arrivals, concurrency))

    async def _run(self, arrivals: Sequence[Arrival], concurrency: int | None) -> tuple[list[Trace], StepAdapters]:
        async with self._client() as client, self._watched(client) as seen:
            now = clock()
            if concurrency is None:
                traces = await asyncio.gather(*(self._at_its_time(client, now, arrival) for arrival in arrivals))
            else:
                traces = await self._in_turn(client, now, arrivals, concurrency)
        return traces, StepAdapters(sum(seen) / len(seen), int(max(seen))) if seen else StepAdapters()

    async def _models(self) -> tuple[str, list[str]]:
        """The names of the base and of what else requests may name."""
        try:
            async with self._client() as client:
                reply = (await client.get(f"{self.url}/v1/models")).raise_for_status()
            cards = [card for card in reply.json()["data"] if not card.get("proxy_only")]
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError) as error:
            raise LiveError(f"{self.url} does not list its models: {error or type(error).__name__}") from error
        bases = [card["id"] for card in cards if not card.get("parent")]
        if not bases:
            raise LiveError(f"{self.url} lists no base model")
        return bases[0], [card["id"] for card in cards if card.get("parent")]

    def _client(self) -> httpx.AsyncClient:
        # A pool without a bound: requests must wait in the server, where it is measured, not here.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT)
        return httpx.AsyncClient(headers=self._headers, limits=limits, timeout=timeout)

    @asynccontextmanager
    async def _watched(self, client: httpx.AsyncClient) -> AsyncIterator[list[float]]:
        """Distinct adapters in the server's last step, looked at again and again; stays empty where it does not say."""
        seen: list[float] = []

        async def look() -> None:
            pause = FIRST_LOOK
            with suppress(httpx.HTTPError):
                while True:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, LAST_LOOK)
                    reply = await client.get(f"{self.url}/metrics")
                    seen.extend(float(value) for value in STEP_ADAPTERS.findall(reply.text))

        watcher = asyncio.create_task(look())
        try:
            yield seen
        finally:
            watcher.cancel()
            await asyncio.wait({watcher})

    async def _at_its_time(self, client: httpx.AsyncClient, now: Callable[[], float], arrival: Arrival) -> Trace:
        await asyncio.sleep(max(0.0, arrival.time - now()))
        return await self._send(client, now, arrival, arrival.time)

    async def _in_turn(
        self, client: httpx.AsyncClient, now: Callable[[], float], arrivals: Sequence[Arrival], concurrency: int
    ) -> list[Trace]:
        waiting, traces = iter(arrivals), list[Trace]()

        async def user() -> None:
            for arrival in waiting:
                traces.append(await self._send(client, now, arrival, now()))

        await asyncio.gather(*(user() for _ in range(concurrency)))
        return traces

    async def _send(self, client: httpx.AsyncClient, now: Callable[[], float], arrival: Arrival, since: float) -> Trace:
        trace = Trace(arrival.model, since, len(arrival.prompt))
        try:
            await self._stream(client, now, arrival, trace)
        except (httpx.HTTPError, ValueError, LookupError) as error:
            trace.error = f"{type(error).__name__}: {error}"
        return trace

    async def _stream(
        self, client: httpx.AsyncClient, now: Callable[[], float], arrival: Arrival, trace: Trace
    ) -> None:
        body = {
            "model": arrival.model,
            "prompt": arrival.prompt,
            "max_tokens": arrival.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        async with client.stream("POST", f"{self.url}/v1/completions", json=body) as reply:
            if not reply.is_success:
                trace.error = f"{reply.status_code}: {_message(await reply.aread())}"
                return
            async for line in reply.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = orjson.loads(line[6:])
                if "error" in event:
                    trace.error = str(event["error"]["message"])
                    return
                for choice in event["choices"]:
                    ids = choice.get("token_ids")
                    trace.record(now(), len(ids) if ids is not None else bool(choice["text"]))
        if trace.output_tokens != arrival.max_tokens:
            trace.error = f"{trace.output_tokens} tokens came instead of {arrival.max_tokens}"


def _message(body: bytes) -> str:
    """The message of an error's body."""
    try:
        return str(orjson.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body[:200].decode(errors="replace")

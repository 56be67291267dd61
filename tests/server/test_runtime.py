"""The engine process through the client: streams, refusals, aborts, death and restart. The engine itself is a fake."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest

from tests.server.conftest import StartClient, adapter_folder, until
from tests.server.fake_engine import CRASH, STUCK, UNEXPECTED, expected_tokens
from weft.adapters.errors import AdapterFormatError, AdapterMismatch
from weft.server.config import ConfigError
from weft.server.engine.info import EngineStats
from weft.server.engine.request import EngineRequest, SamplingParams
from weft.server.errors import Conflict, EngineUnavailable, InvalidRequest, NotFound, Overloaded, RequestError
from weft.server.runtime import link as engine_link
from weft.server.runtime.client import EngineClient, RestartPolicy
from weft.server.runtime.wire import RemoteError

VERSION = "0000002a" + "0" * 56
numbers = count()


def ask(prompt: list[int], max_tokens: int = 8, adapter: str | None = None, **fields: str) -> EngineRequest:
    request_id = fields.pop("request_id", f"r{next(numbers)}")
    return EngineRequest(request_id, prompt, SamplingParams(max_tokens=max_tokens), adapter, **fields)


async def collect(client: EngineClient, request: EngineRequest) -> tuple[list[int], str | None]:
    tokens: list[int] = []
    reason = None
    async for delta in client.generate(request):
        assert reason is None, "a delta after the terminal one"
        tokens += delta.token_ids
        reason = delta.finish_reason
    return tokens, reason


async def test_streams_end_with_their_own_tokens(running: StartClient) -> None:
    async with running() as client:
        requests = [ask([n, n + 1], max_tokens=1 + n % 9) for n in range(32)]
        results = await asyncio.gather(*(collect(client, r) for r in requests))
    for request, (tokens, reason) in zip(requests, results, strict=True):
        assert tokens == expected_tokens(request.prompt_token_ids, None, request.params.max_tokens or 0)
        assert reason == "length"


async def test_start_reports_progress_and_the_model(running: StartClient) -> None:
    stages: list[str] = []
    async with running(on_progress=stages.append) as client:
        assert client.ready and client.unready_reason is None
        assert client.info.vocab_size == 1000
    assert stages == ["reading the configuration", "loading weights"]
    assert not client.ready


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("missing", "model 'missing' is not a folder and not on the hub; check --model"),
        ("raises", "could not load: the engine ended .OSError: disk on fire."),
        ("exits", "could not load: the engine ended .exit code 9."),
    ],
)
async def test_failing_to_load_raises_the_reason_and_leaves_nothing(
    make_client: Callable[..., EngineClient], tmp_path: Path, model: str, message: str
) -> None:
    client = make_client(model, ipc_dir=tmp_path)
    with pytest.raises(ConfigError, match=message):
        await client.start()
    assert client.lives == 1 and not client.ready
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(EngineUnavailable):
        await collect(client, ask([1]))


async def test_start_can_be_cancelled(make_client: Callable[..., EngineClient], tmp_path: Path) -> None:
    client = make_client("eternal", ipc_dir=tmp_path)
    start = asyncio.create_task(client.start())
    await until(lambda: client.pid is not None)
    pid = client.pid
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert list(tmp_path.iterdir()) == []


async def test_the_socket_lies_in_a_private_folder(running: StartClient, tmp_path: Path) -> None:
    async with running(ipc_dir=tmp_path):
        (folder,) = tmp_path.iterdir()
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list(tmp_path.iterdir()) == []


async def test_too_long_a_socket_path_is_refused(make_client: Callable[..., EngineClient], tmp_path: Path) -> None:
    client = make_client(ipc_dir=tmp_path / ("x" * 100))
    with pytest.raises(ConfigError, match=r"ipc_dir .* too long"):
        await client.start()


async def test_refusals_cross_with_class_and_fields(running: StartClient) -> None:
    async with running(config={"max_queued_requests": 1}) as client:
        with pytest.raises(InvalidRequest, match="beyond the vocabulary") as invalid:
            await collect(client, ask([5000]))
        assert (invalid.value.param, invalid.value.code) == ("prompt", "invalid_value")
        with pytest.raises(NotFound):
            await collect(client, ask([1], adapter=VERSION))
        stuck = client.generate(ask([STUCK]))
        waiting = asyncio.create_task(anext(stuck))
        await asyncio.sleep(0.05)
        with pytest.raises(Overloaded) as overloaded:
            await collect(client, ask([1]))
        assert overloaded.value.retry_after == 7
        waiting.cancel()
        await asyncio.wait({waiting})
        assert (await collect(client, ask([1], max_tokens=1)))[1] == "length"


async def test_a_bug_in_add_refuses_one_request_only(running: StartClient) -> None:
    async with running() as client:
        other = asyncio.create_task(collect(client, ask([1], max_tokens=50)))
        with pytest.raises(RemoteError, match="ZeroDivisionError: a bug in add"):
            await collect(client, ask([UNEXPECTED]))
        assert (await other)[1] == "length"
        assert client.lives == 1


async def test_unsendable_values_are_invalid_requests(running: StartClient) -> None:
    async with running() as client:
        for request in (ask([2**70]), ask([1], cache_salt="\ud800")):
            with pytest.raises(InvalidRequest, match="cannot be sent"):
                await collect(client, request)
        assert (await collect(client, ask([1])))[1] == "length"


async def test_closing_the_stream_early_aborts_the_request(running: StartClient) -> None:
    async with running() as client:
        request = ask([3], max_tokens=100_000)
        stream = client.generate(request)
        await anext(stream)
        assert (await client.refresh_stats()).running == 1
        await stream.aclose()
        assert (await client.refresh_stats()).running == 0
        # The id is free again once the engine has confirmed, and the new stream gets none of the old deltas.
        tokens: list[int] = []
        while not tokens:
            await asyncio.sleep(0.01)
            with suppress(Conflict):
                tokens, _ = await collect(client, ask([4], request_id=request.request_id))
        assert tokens == expected_tokens([4], None, 8)


async def test_cancelling_the_reader_aborts_the_request(running: StartClient) -> None:
    async with running() as client:
        readers = [asyncio.create_task(collect(client, ask([n + 1], max_tokens=100_000))) for n in range(8)]
        await until(lambda: client.stats.running == 8)
        for reader in readers:
            reader.cancel()
        await asyncio.wait(readers)
        await until(lambda: client.stats.running == 0)


async def test_an_id_in_flight_cannot_be_used_twice(running: StartClient) -> None:
    async with running() as client:
        stream = client.generate(ask([3], max_tokens=100_000, request_id="same"))
        await anext(stream)
        with pytest.raises(Conflict, match="'same'"):
            await collect(client, ask([3], request_id="same"))
        await anext(stream)
        await stream.aclose()


async def test_a_slow_reader_is_cut_off_and_holds_up_nobody(
    running: StartClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_link, "MAX_BUFFERED_DELTAS", 10)
    async with running() as client:
        slow = client.generate(ask([3], max_tokens=100_000))
        await anext(slow)
        assert (await collect(client, ask([4], max_tokens=40)))[1] == "length"
        await until(lambda: client.stats.running == 0)
        with pytest.raises(RequestError, match="too slow") as error:
            async for _ in slow:
                pass
        assert error.value.code == "slow_reader"


async def test_idle_costs_nothing_and_stalls_do_not_spin(running: StartClient) -> None:
    async with running() as client:
        idle = (await client.refresh_stats()).batch_tokens  # the fake counts calls of step() here
        await asyncio.sleep(0.2)
        assert (await client.refresh_stats()).batch_tokens == idle
        waiting = asyncio.create_task(collect(client, ask([STUCK])))
        await asyncio.sleep(0.5)
        assert 0 < (await client.refresh_stats()).batch_tokens - idle <= 500
        # A request that can run is not held up by one that cannot.
        assert (await collect(client, ask([1])))[1] == "length"
        waiting.cancel()
        await asyncio.wait({waiting})


async def test_stats_are_pushed_and_settle_when_idle(running: StartClient) -> None:
    async with running() as client:
        pushed: list[tuple[EngineStats, int]] = []
        client.on_stats.append(lambda stats, life: pushed.append((stats, life)))
        await collect(client, ask([1], max_tokens=150))
        await until(lambda: client.stats.running == 0 and client.stats.steps == 150)
        await asyncio.sleep(0.3)
        assert {life for _, life in pushed} == {1}
        assert 3 <= len(pushed) <= 12


async def test_adapters_register_beside_decoding(running: StartClient, tmp_path: Path) -> None:
    async with running() as client:
        slow = asyncio.create_task(client.register_adapter(VERSION, adapter_folder(tmp_path, seconds=0.5)))
        assert len((await collect(client, ask([1], max_tokens=30)))[0]) == 30
        assert not slow.done()
        info = await slow
        assert (info.version, info.rank) == (VERSION, 8)
        tokens, _ = await collect(client, ask([1], adapter=VERSION))
        assert tokens == expected_tokens([1], VERSION, 8) != expected_tokens([1], None, 8)
        await client.unregister_adapter(VERSION)
        with pytest.raises(NotFound):
            await collect(client, ask([1], adapter=VERSION))


async def test_adapter_errors_cross_with_class_and_fields(running: StartClient, tmp_path: Path) -> None:
    async with running() as client:
        with pytest.raises(AdapterMismatch, match="wrong shape") as mismatch:
            await client.register_adapter(VERSION, adapter_folder(tmp_path, "a", refuse=True))
        assert (mismatch.value.param, mismatch.value.code) == ("lora_A.weight", "adapter_mismatch")
        with pytest.raises(AdapterFormatError):
            await client.register_adapter(VERSION, tmp_path / "nowhere")
        with pytest.raises(RemoteError, match="ZeroDivisionError"):
            await client.register_adapter(VERSION, adapter_folder(tmp_path, "b", explode=True))
        assert (await collect(client, ask([1])))[1] == "length"


async def test_cancel_streams_ends_those_of_one_adapter(running: StartClient) -> None:
    async with running() as client:
        doomed = [
            asyncio.create_task(collect(client, ask([n + 1], max_tokens=100_000, adapter_name="a"))) for n in range(3)
        ]
        other = asyncio.create_task(collect(client, ask([1], max_tokens=100, adapter_name="b")))
        await until(lambda: client.stats.running == 4)
        assert client.cancel_streams("a", lambda: Conflict("'a' was unloaded", code="adapter_unloaded")) == 3
        for error in await asyncio.gather(*doomed, return_exceptions=True):
            assert isinstance(error, Conflict) and error.code == "adapter_unloaded"
        assert (await other)[1] == "length"
        assert (await client.refresh_stats()).running == 0


async def test_kill_9_ends_every_stream_once_and_the_engine_comes_back(running: StartClient, tmp_path: Path) -> None:
    async with running() as client:
        folder = adapter_folder(tmp_path)
        await client.register_adapter(VERSION, folder)
        seen_ready: list[bool] = []

        async def replay() -> None:
            seen_ready.append(client.ready)
            with pytest.raises(EngineUnavailable):
                await collect(client, ask([1]))
            await client.register_adapter(VERSION, folder)

        client.on_restart.append(replay)
        endings: list[list[Exception]] = [[] for _ in range(32)]

        async def read(n: int) -> None:
            stream = client.generate(ask([n + 1], max_tokens=100_000))
            for _ in range(1_000_000):
                try:
                    await anext(stream)
                except StopAsyncIteration:
                    return
                except RequestError as error:
                    endings[n].append(error)

        readers = [asyncio.create_task(read(n)) for n in range(32)]
        call = asyncio.create_task(client.register_adapter("1" * 64, adapter_folder(tmp_path, "slow", seconds=60)))
        await until(lambda: client.stats.running == 32)
        pid = client.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await asyncio.gather(*readers)
        assert not client.ready
        for errors in endings:
            assert [type(e) for e in errors] == [EngineUnavailable]
            assert "SIGKILL" in str(errors[0])
        with pytest.raises(EngineUnavailable):
            await call
        with pytest.raises(EngineUnavailable, match="restarting"):
            await collect(client, ask([1]))
        await until(lambda: client.ready)
        assert seen_ready == [False]
        assert client.lives == 2 and client.pid != pid
        tokens, _ = await collect(client, ask([1], adapter=VERSION))
        assert tokens == expected_tokens([1], VERSION, 8)


async def test_an_exception_in_step_restarts_the_engine_and_says_why(running: StartClient) -> None:
    async with running() as client:
        innocent = asyncio.create_task(collect(client, ask([1], max_tokens=100_000)))
        with pytest.raises(EngineUnavailable, match="illegal memory access"):
            await collect(client, ask([CRASH]))
        with pytest.raises(EngineUnavailable, match="illegal memory access"):
            await innocent
        await until(lambda: client.ready)
        assert (await collect(client, ask([1])))[1] == "length"


async def test_it_gives_up_after_failures_in_a_row(running: StartClient, tmp_path: Path) -> None:
    policy = RestartPolicy(max_failures=2, window=30.0, backoff=0.01, stop_grace=1.0)
    async with running(f"once:{tmp_path / 'started'}", policy=policy) as client:
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        await until(lambda: "gave up after 3 failures" in (client.unready_reason or ""))
        assert "no second start" in (client.unready_reason or "")
        assert client.lives == 3
        with pytest.raises(EngineUnavailable, match="gave up"):
            await collect(client, ask([1]))


async def test_a_failing_replay_counts_as_a_failure(running: StartClient) -> None:
    async with running() as client:
        calls: list[int] = []

        async def replay() -> None:
            calls.append(client.lives)
            if len(calls) == 1:
                raise OSError("the store is gone")

        client.on_restart.append(replay)
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        await until(lambda: client.lives == 3 and client.ready)
        assert calls == [2, 3]


async def test_stop_ends_streams_and_the_process(make_client: Callable[..., EngineClient]) -> None:
    client = make_client()
    await client.start()
    pid = client.pid
    reader = asyncio.create_task(collect(client, ask([1], max_tokens=100_000)))
    await until(lambda: client.stats.running == 1)
    await client.stop()
    with pytest.raises(EngineUnavailable, match="stopping"):
        await reader
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    await client.stop()


@pytest.mark.usefixtures("make_client")  # the engine's process must find the fake
async def test_the_engine_dies_with_the_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # a killed server cannot remove its socket's folder
    script = tmp_path / "server.py"
    script.write_text(
        "import asyncio, os, signal, sys\n"
        "from weft.server.config import EngineConfig\n"
        "from weft.server.runtime.client import EngineClient\n"
        "async def main():\n"
        "    client = EngineClient(EngineConfig(sys.argv[1]), factory='fake_engine:build')\n"
        "    start = asyncio.create_task(client.start())\n"
        "    while client.pid is None:\n"
        "        await asyncio.sleep(0.01)\n"
        "    if sys.argv[1] == 'fake':\n"
        "        await start\n"
        "    print(client.pid, flush=True)\n"
        "    await asyncio.sleep(1)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    for model in ("fake", "eternal"):
        server = await asyncio.create_subprocess_exec(
            sys.executable, "-P", str(script), model, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
        out, _ = await server.communicate()
        pid = int(out.split()[-1])

        def gone(pid: int = pid) -> bool:
            try:
                return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
            except FileNotFoundError:
                return True

        await until(gone)

"""``weft serve`` end to end: a process of its own, a tiny model, adapters saved by peft."""

from __future__ import annotations

import json
import re
import shlex
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from tests.cli.serving import Serving, base_with_tokenizer, launched, serving, wait_for
from tests.support.adapters import make_lora
from weft.server.cli import create_cli


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def base(home: Path) -> Path:
    return base_with_tokenizer(home / "tiny")


@pytest.fixture(scope="module")
def adapters(base: Path, home: Path) -> dict[str, Path]:
    return {
        name: make_lora(base, home / "adapters" / name, seed=seed, r=4 + seed, target_modules="all-linear")
        for seed, name in enumerate("abc")
    }


@pytest.fixture(scope="module")
def server(base: Path, adapters: dict[str, Path], home: Path) -> Iterator[Serving]:
    """Serves the base as ``tiny`` with adapters a and b; c may be loaded."""
    given = ["--adapter", f"a={adapters['a']}", "--lora-modules", "b=adapters/b", "--drain-timeout", "1"]
    with serving(home, base, *given, "--adapter-root", "adapters", "--state-dir", home / "state") as started:
        yield started


def post_as_pasted(command: str) -> httpx.Response:
    """Send what a ``curl`` line of the greeting would."""
    program, url, *options = shlex.split(command)
    assert program == "curl"
    headers = dict(options[i + 1].split(": ", 1) for i, option in enumerate(options) if option == "-H")
    if "Authorization" in headers:
        kept = re.fullmatch(r"Bearer \$\(cat (.*)\)", headers["Authorization"])
        assert kept is not None
        headers["Authorization"] = f"Bearer {Path(kept[1]).read_text().strip()}"
    return httpx.post(url, headers=headers, content=options[options.index("-d") + 1], timeout=60)


def curls(server: Serving) -> list[str]:
    return [line for line in server.stdout.splitlines() if line.startswith("curl ")]


def test_the_greeting_can_be_pasted(server: Serving) -> None:
    commands = curls(server)
    models = []
    for command in commands[:-1]:
        reply = post_as_pasted(command)
        assert reply.status_code == 200, reply.text
        models.append(reply.json()["model"])
    assert models == ["tiny", "a", "b"]
    created = post_as_pasted(commands[-1])
    assert created.status_code == 201, created.text
    assert created.json()["id"] == "my-adapter"
    assert server.complete("my-adapter") == server.complete("a")
    load = shlex.split(server.stdout.splitlines()[-1])
    assert load[:4] == ["weft", "adapter", "load", "my-adapter"]
    unload = CliRunner().invoke(create_cli(), ["adapter", "unload", "my-adapter", *load[5:]])
    assert unload.exit_code == 0, unload.stderr
    assert CliRunner().invoke(create_cli(), load[1:]).exit_code == 0
    assert CliRunner().invoke(create_cli(), ["adapter", "unload", "my-adapter", *load[5:]]).exit_code == 0


def test_adapters_and_base_answer_differently(server: Serving) -> None:
    texts = [server.complete(model) for model in ("tiny", "a", "b")]
    assert len(set(texts)) == 3
    listed = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert {card["id"] for card in listed} == {"tiny", "a", "b"}


def test_the_admin_key_is_printed_once_and_kept_for_the_owner(server: Serving, home: Path) -> None:
    file = home / "state" / "admin.key"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert server.stdout.count(file.read_text().strip()) == 1
    assert server.stderr.count(file.read_text().strip()) == 0


def adapter_command(server: Serving, home: Path, *arguments: object) -> Result:
    options = ["--url", server.url, "--state-dir", str(home / "state")]
    return CliRunner().invoke(create_cli(), ["adapter", *map(str, arguments), *options])


def show(server: Serving, home: Path, id: str) -> dict[str, Any]:
    card: dict[str, Any] = json.loads(adapter_command(server, home, "show", id, "--json").stdout)
    return card


def test_the_life_of_an_adapter_from_a_shell(
    server: Serving, home: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(adapters["c"].parent)
    loaded = adapter_command(server, home, "load", "x", "c")  # relative to here, not to the server
    assert loaded.exit_code == 0, loaded.stderr
    assert loaded.stdout.startswith("x is loaded: LORA as LowRank, rank 6, 21 sites, ")
    card = show(server, home, "x")
    assert (card["id"], card["rank"], card["source"]) == ("x", 6, str(adapters["c"]))
    assert re.search(r"\nrank +6\n", adapter_command(server, home, "show", "x").stdout)

    rows = adapter_command(server, home, "list").stdout.splitlines()
    assert [row.split()[1] for row in rows if row.startswith("│")] == ["a", "b", "x"]
    assert len(json.loads(adapter_command(server, home, "list", "--json").stdout)["data"]) == 3
    before = server.complete("x")

    stale = adapter_command(server, home, "replace", "x", "a", "--if-match", "0" * 64)
    assert stale.exit_code == 1
    assert "precondition_failed" in stale.stderr
    replaced = adapter_command(server, home, "replace", "x", "a", "--if-match", card["version"])
    assert replaced.exit_code == 0, replaced.stderr
    assert show(server, home, "x")["version"] == show(server, home, "a")["version"]
    assert server.complete("x") == server.complete("a") != before

    unloaded = adapter_command(server, home, "unload", "x", "--force-after", "5")
    assert (unloaded.exit_code, unloaded.stdout) == (0, "x is unloaded\n")
    gone = adapter_command(server, home, "show", "x")
    assert gone.exit_code == 1
    assert "'x'" in gone.stderr
    assert "(404, " in gone.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["load", "a", "ADAPTERS/c"], r"'a' exists already .*\(409, adapter_exists\)"),
        (["load", "y", "/etc"], r"not inside an allowed folder"),
        (["load", "a,b", "ADAPTERS/c"], r"id 'a,b' must not"),
        (["unload", "nobody"], r"'nobody'.*\(404, "),
        (["list", "--admin-key", "wrong"], r"\(401, invalid_api_key\)"),
    ],
)
def test_what_the_server_refuses_is_said(server: Serving, home: Path, arguments: list[str], reason: str) -> None:
    result = adapter_command(server, home, *(a.replace("ADAPTERS", str(home / "adapters")) for a in arguments))
    assert result.exit_code == 1
    assert re.search(reason, result.stderr), result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


def test_no_server_is_said_too(home: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        result = CliRunner().invoke(create_cli(), ["adapter", "list", "--url", url])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: no answer from {url}")


@pytest.mark.parametrize("url", ["http://[::", "nonsense", "ftp://x"])
def test_an_address_that_is_none_is_said(url: str) -> None:
    result = CliRunner().invoke(create_cli(), ["adapter", "list", "--url", url])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


def test_the_live_load_generator(server: Serving, tmp_path: Path) -> None:
    out = tmp_path / "results" / "live.json"
    load = ["--requests", "12", "--concurrency", "4", "--popularity", "distinct", "--with-base"]
    lengths = ["--prompt-tokens", "4:40", "--output-tokens", "3:24"]
    result = CliRunner().invoke(create_cli(), ["bench", "--url", server.url, *load, *lengths, "--out", str(out)])
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    figures = report["runs"]["live"]["results"]
    assert (figures["completed"], figures["errors"]) == (12, 0)
    assert set(figures["output_tokens_by_model"]) == {"a", "b", "tiny"}
    assert 12 * 3 <= figures["output_tokens"] <= 12 * 24
    assert figures["ttft_ms"]["p50"] > 0
    assert figures["itl_ms"]["p99"] > 0
    assert report["runs"]["live"]["workload"]["seed"] == 0
    assert set(report["versions"]) == {"weft", "torch", "transformers", "triton"}
    assert "live" in result.stdout


def test_the_load_generator_reports_errors(server: Serving) -> None:
    arguments = ["bench", "--url", server.url, "--requests", "3", "--output-tokens", "600", "--rate", "50"]
    result = CliRunner().invoke(create_cli(), arguments)
    assert result.exit_code == 1
    assert "400: This model's maximum context length is 512 tokens" in result.stderr


def test_a_port_in_use_is_refused_before_anything_is_loaded(base: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with launched(tmp_path, base, "--port", port, "--state-dir", tmp_path / "state") as server:
            assert server.process.wait(60) == 1
    assert server.stderr == f"error: port: {port} on 127.0.0.1 is in use; choose another with --port\n"
    assert not (tmp_path / "state").exists()


def test_a_state_directory_in_use_is_refused(server: Serving, base: Path, home: Path, tmp_path: Path) -> None:
    with launched(tmp_path, base, "--port", 0, "--state-dir", home / "state") as second:
        assert second.process.wait(60) == 1
    assert f"in use by another weft server (process {server.process.pid})" in second.stderr


def test_a_broken_adapter_ends_the_start_with_its_reason(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in adapters["a"].iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, broken / "adapter_model.safetensors")
    options = ["--port", 0, "--adapter", f"bad={broken}", "--state-dir", tmp_path / "state", "--log-level", "error"]
    with launched(tmp_path, base, *options) as server:
        assert server.process.wait(120) == 1
    assert server.stderr.startswith("error: adapter bad: ")
    assert name in server.stderr
    assert len(server.stderr.splitlines()) == 1
    assert "Traceback" not in server.stderr


def test_a_model_that_is_not_there_ends_the_start(tmp_path: Path) -> None:
    options = ["--port", 0, "--state-dir", tmp_path / "state", "--log-level", "error"]
    with launched(tmp_path, tmp_path / "nowhere", *options) as server:
        assert server.process.wait(120) == 1
    assert server.stderr.startswith("error: ")
    assert "nowhere" in server.stderr
    assert len(server.stderr.splitlines()) == 1


def test_adapters_are_back_after_a_restart_and_streams_finish_before_the_end(
    server: Serving, base: Path, home: Path
) -> None:
    """The last test of ``server``, which ends here."""
    text = server.complete("a")
    key = (home / "state" / "admin.key").read_text().strip()
    assert key in server.stdout
    assert "[DONE]" not in stop_during(server, slow_stream, signal.SIGINT)  # the drain has a deadline

    with serving(home, base, "--state-dir", home / "state") as second:
        assert key not in second.stdout  # printed once, then only kept
        assert second.complete("a") == text
        received = stop_during(second, stream)
    assert received[-1] == "[DONE]"
    assert '"finish_reason":"length"' in received[-2]
    assert '"event": "server.draining"' in second.stderr
    assert "Traceback" not in second.stderr


def stop_during(
    server: Serving, client: Callable[[Serving, list[str]], None], number: signal.Signals = signal.SIGTERM
) -> list[str]:
    """What ``client`` receives where the server is told to stop after the first event."""
    received: list[str] = []
    streaming = threading.Thread(target=client, args=(server, received))
    streaming.start()
    while not received:
        time.sleep(0.01)
    assert server.stop(number) == 0
    streaming.join(10)
    return received


def stream(server: Serving, received: list[str], prompt: str | list[str] = "Hello", max_tokens: int = 100) -> None:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    url = f"{server.url}/v1/completions"
    with suppress(httpx.HTTPError), httpx.stream("POST", url, json=body, timeout=60) as reply:
        received.extend(line.removeprefix("data: ") for line in reply.iter_lines() if line)


def slow_stream(server: Serving, received: list[str]) -> None:
    """So many tokens that they cannot all come within the deadline."""
    stream(server, received, [f"Hello {i}" for i in range(60)], 480)


def test_a_signal_while_loading_ends_the_start_cleanly(base: Path, tmp_path: Path) -> None:
    with launched(tmp_path, base, "--port", 0, "--state-dir", tmp_path / "state") as server:
        wait_for(server, "server.loading", in_stderr=True)
        assert server.stop() == 0
    assert server.stdout == ""
    assert "Traceback" not in server.stderr

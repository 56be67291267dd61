"""What a terminal shows while loading, and the commands printed at the end of it."""

import io
import json
import shlex

import pytest
from rich.console import Console

from weft.server.cli.display import Display
from weft.server.cli.greeting import MAX_EXAMPLES, Greeting
from weft.server.cli.terminal import bytes_text

GREETING = Greeting(
    url="http://127.0.0.1:8000",
    base="base",
    adapters=("a", "it's"),
    prompts={"a": "Frage: „wie?“\nAntwort: it's $HOME"},
    source="/path with/space",
    client_options=("--url", "http://127.0.0.1:8000"),
    api_key=None,
    admin_key="$WEFT_ADMIN_KEY",
)


def test_a_terminal_shows_stages_and_keeps_a_line_per_adapter() -> None:
    output = io.StringIO()
    with Display(Console(file=output, force_terminal=True, width=80)) as display:
        display.stage("loading weights")
        display.stage("loading adapters", 2)
        display.adapter("[bold]a", "LORA, rank 8")
        display.stream.write("a line of the log\n")
    text = output.getvalue()
    assert "loading weights" in text
    assert "adapter [bold]a: LORA, rank 8\n" in text
    assert "a line of the log\n" in text


def test_elsewhere_nothing_is_drawn() -> None:
    output = io.StringIO()
    with Display(Console(file=output)) as display:
        display.stage("loading adapters", 1)
        display.adapter("a", "LORA, rank 8")
    assert output.getvalue() == ""


def test_the_commands_survive_a_shell() -> None:
    lines = GREETING.text().splitlines()
    assert lines[0] == "weft serves base with 2 adapters on http://127.0.0.1:8000"
    bodies = [shlex.split(line)[-1] for line in lines if line.startswith("curl ")]
    assert len(bodies) == 4
    assert '"prompt": "Frage: „wie?“\\nAntwort: it\'s $HOME"' in bodies[1]
    assert '"model": "it\'s"' in bodies[2]
    assert shlex.split(lines[-1])[4] == "/path with/space"


def test_keys_are_left_to_the_shell() -> None:
    text = Greeting(**{**vars(GREETING), "api_key": "$WEFT_API_KEY"}).text()
    assert text.count('-H "Authorization: Bearer $WEFT_API_KEY"') == 3
    assert text.count('-H "Authorization: Bearer $WEFT_ADMIN_KEY"') == 1


def test_proxy_models_are_greeted_with_a_steered_request() -> None:
    proxies = {"small": ("x", "y"), "plain": ()}
    text = Greeting(**{**vars(GREETING), "proxies": proxies}).text()
    assert "# steer it with the proxy models small, plain" in text
    (line,) = (line for line in text.splitlines() if '"expert"' in line)
    body = json.loads(shlex.split(line)[-1])
    assert body["model"] == "base" and body["proxy"]["expert"] == {"model": "small", "adapter": "x"}
    assert "steer" not in GREETING.text()


def test_many_adapters_are_not_all_listed() -> None:
    text = Greeting(**{**vars(GREETING), "adapters": tuple(f"a{i}" for i in range(50))}).text()
    assert text.count("/v1/completions") == 1 + MAX_EXAMPLES
    assert f"# and {50 - MAX_EXAMPLES} more: curl http://127.0.0.1:8000/v1/models" in text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 40, "3072.0 GiB")]
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert bytes_text(count) == text

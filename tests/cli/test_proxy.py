"""Proxy models and ``weft proxy``: from the command line to a steered answer, and what stops the start."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer import Exit
from typer.testing import CliRunner, Result

from tests.cli.serving import WEFT, Serving, add_tokenizer, base_with_tokenizer, serving
from tests.support.adapters import make_lora
from tests.support.models import tiny_model
from weft.server.cli import create_cli
from weft.server.cli.assembly import read_tokenizers
from weft.server.cli.proxy import side, summary
from weft.server.config import ConfigError
from weft.server.settings import Settings


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("proxy")


@pytest.fixture(scope="module")
def options(home: Path) -> list[object]:
    """The base with the adapter ``own:one``, and the proxy model ``small`` with ``x``; ``y`` of it is not loaded."""
    base = base_with_tokenizer(home / "base")
    small = base_with_tokenizer(home / "small", num_hidden_layers=1)
    own = make_lora(base, home / "own", seed=5, target_modules="all-linear")
    x, _ = (make_lora(small, home / id, seed=seed, target_modules="all-linear") for seed, id in enumerate("xy", 1))
    given = ["--proxy-model", f"small={small}", "--adapter", f"small:x={x}", "--adapter", f"own:one={own}"]
    return [base, "--dtype", "float32", "--state-dir", home / "state", "--adapter-root", home, *given]


@pytest.fixture(scope="module")
def server(home: Path, options: list[object]) -> Iterator[Serving]:
    with serving(home, *options) as started:
        yield started


def weft(server: Serving, home: Path, *arguments: object) -> Result:
    at = ["--url", server.url, "--state-dir", str(home / "state")]
    return CliRunner().invoke(create_cli(), [*map(str, arguments), *at])


def steered(server: Serving, **fields: object) -> str:
    body = {"model": "base", "prompt": "Hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True, **fields}
    reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    text: str = reply.json()["choices"][0]["text"]
    return text


def test_the_greetings_proxy_steers(server: Serving) -> None:
    (command,) = (line for line in server.stdout.splitlines() if '"expert"' in line)
    body = {**json.loads(shlex.split(command)[-1]), "max_tokens": 8, "ignore_eos": True}
    assert body["proxy"]["expert"] == {"model": "small", "adapter": "x"}
    plain = server.complete("base", body["prompt"])
    assert steered(server, **{**body, "proxy": {**body["proxy"], "alpha": 0.0}}) == plain
    assert steered(server, **{**body, "proxy": {**body["proxy"], "alpha": 3.0}}) != plain


def test_the_life_of_a_proxy_from_a_shell(server: Serving, home: Path) -> None:
    sides = ("--expert", "small:x", "--anti-expert", "small")
    made = weft(server, home, "proxy", "create", "p", *sides, "--alpha", 3)
    assert made.exit_code == 0, made.stderr
    assert made.stdout == "p is served: base + 3 × (small:x - small)\n"
    proxy = {"expert": {"model": "small", "adapter": "x"}, "anti_expert": {"model": "small"}}
    assert server.complete("p") == steered(server, proxy={**proxy, "alpha": 3}) != server.complete("base")
    listed = weft(server, home, "proxy", "list").stdout
    assert re.search(r"p .* ready .* base \+ 3 × \(small:x - small\)", listed)
    card = json.loads(weft(server, home, "proxy", "show", "p", "--json").stdout)
    assert json.loads(weft(server, home, "proxy", "list", "--json").stdout)["data"] == [card]
    assert f"revision: {card['revision']}" in weft(server, home, "proxy", "show", "p").stdout

    other = ("--expert", "own:one", "--anti-expert", "base", "--base", "own:one", "--base-top-p", 0.9)
    stale = weft(server, home, "proxy", "replace", "p", *other, "--if-match", "0" * 64)
    assert stale.exit_code == 1 and "(412, precondition_failed)" in stale.stderr and "show" in stale.stderr
    new = weft(server, home, "proxy", "replace", "p", *other, "--if-match", card["revision"])
    assert new.stdout == "p is replaced: own:one + 1 × (own:one - base), base_top_p 0.9\n", new.stderr
    proxy = {"expert": {"adapter": "own:one"}, "anti_expert": {"model": "base"}, "base_top_p": 0.9}
    assert server.complete("p") == steered(server, model="own:one", proxy=proxy)
    assert json.loads(weft(server, home, "proxy", "show", "p", "--json").stdout)["created"] == card["created"]
    assert weft(server, home, "proxy", "delete", "p").stdout == "p is deleted\n"
    assert weft(server, home, "proxy", "show", "p").exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            "create own:one --expert small:x --anti-expert small",
            r"exists already .*\(409, adapter_exists\); take another",
        ),
        ("create q --expert x --anti-expert small", r"--expert: 'x' belongs to the proxy model 'small'; write small:x"),
        ("create q --expert small:x --anti-expert small:", r"--anti-expert: 'small:' names no adapter"),
        ("create q --expert small:z --anti-expert small", r"'expert.adapter'|'z' is not served .*weft adapter list"),
        ("create q --expert {x --anti-expert small", r"--expert: '{x' is not JSON"),
        ('create q --expert {"alpha":1} --anti-expert small', r"unknown field 'expert.alpha'"),
        ('create q --expert {"task_id":NaN} --anti-expert small', r"the request is no JSON"),
        (
            "create q --expert small --anti-expert small:own:one",
            r"'anti_expert.adapter'.* give 'model': 'base' beside it",
        ),
        ("create q --expert small --anti-expert small --alpha nan", r"--alpha: nan is not a finite number"),
        ("create q --expert small --anti-expert small --alpha 1e9", r"'alpha'"),
        ("create q --expert small --anti-expert small --base-top-p 2", r"'base_top_p'"),
        ("create q --expert small --anti-expert small --base x", r"'base': adapter 'x' belongs to the model 'small'"),
        ("replace q --expert small --anti-expert small", r"no proxy 'q' \(404, proxy_not_found\); weft proxy list"),
        ("show q", r"no proxy 'q' \(404, proxy_not_found\); weft proxy list"),
        ("delete q", r"no proxy 'q'"),
        ("list --admin-key wrong", r"\(401, invalid_api_key\); give the server's key"),
    ],
)
def test_what_is_refused_says_what_to_do(server: Serving, home: Path, arguments: str, reason: str) -> None:
    result = weft(server, home, "proxy", *arguments.split())
    assert result.exit_code == 1 and re.search(reason, result.stderr), result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("small", {"model": "small"}),
        ("small:x", {"model": "small", "adapter": "x"}),
        ("small:x:y", {"model": "small", "adapter": "x:y"}),
        ("small:er", {"model": "small:er"}),
        ("small:er:x", {"model": "small:er", "adapter": "x"}),
        ("org/base:small:x", {"model": "org/base", "adapter": "small:x"}),
        ("other:x", {"adapter": "other:x"}),
        ("a", {"adapter": "a"}),
        ('{"model": "small", "adapters": []}', {"model": "small", "adapters": []}),
        ("x", None),
        ("small:er:", None),
        ("{", None),
    ],
)
def test_what_a_side_names(text: str, named: dict[str, Any] | None) -> None:
    models = [{"id": name, "parent": None} for name in ("org/base", "small", "small:er")]
    models += [{"id": "x", "parent": "small", "proxy_only": True}, {"id": "a", "parent": "org/base"}]
    if named is None:
        with pytest.raises(Exit):
            side("--expert", text, models)
    else:
        assert side("--expert", text, models) == named


def test_what_a_proxy_is_in_a_line() -> None:
    members = [{"id": "x", "weight": 0.5}, {"id": "y", "weight": -1}]
    record = {
        "base": "b",
        "alpha": -0.25,
        "base_top_p": 0.5,
        "expert": {"model": "small", "adapters": members, "combination": "linear", "own_template": True},
        "anti_expert": {"adapter": "a", "task_id": 0},
    }
    text = "b + -0.25 × (small:[0.5 × x + -1 × y (linear)] own_template=True - a task_id=0), base_top_p 0.5"
    assert summary(record) == text


def test_adapters_of_a_proxy_model_are_composed_and_survive_a_restart(
    server: Serving, home: Path, options: list[object]
) -> None:
    loaded = weft(server, home, "adapter", "load", "y", home / "y", "--base", "small", "--json")
    assert json.loads(loaded.stdout)["base"] == "small"
    made = weft(server, home, "compose", "create", "xy", "x=0.5", "y=0.5", "--combination", "linear")
    assert made.exit_code == 0, made.stderr
    assert "base: small" in weft(server, home, "compose", "show", "xy").stdout
    mixed = weft(server, home, "compose", "create", "bad", "x=0.5", "own:one=0.5")
    assert mixed.exit_code == 1 and "'adapters[1].id'" in mixed.stderr and "one model" in mixed.stderr
    named = weft(server, home, "proxy", "create", "p", "--expert", "small:xy", "--anti-expert", "small", "--alpha", 3)
    assert named.stdout == "p is served: base + 3 × (small:xy - small)\n", named.stderr
    adapters = [{"id": "x", "weight": 0.5}, {"id": "y", "weight": 0.5}]
    expert = {"model": "small", "adapters": adapters, "combination": "linear"}
    text = steered(server, proxy={"expert": expert, "anti_expert": {"model": "small"}, "alpha": 3})
    assert server.complete("p") == text != server.complete("base")
    assert server.stop() == 0
    with serving(home, *options) as again:  # which remembers whose adapters they are
        models = {model["id"]: model for model in httpx.get(f"{again.url}/v1/models").json()["data"]}
        assert [models[id]["parent"] for id in ("x", "y", "xy")] == ["small"] * 3
        assert again.complete("p") == text


def test_a_proxy_model_needs_the_same_tokenizer(tmp_path: Path) -> None:
    base = base_with_tokenizer(tmp_path / "base")
    small = add_tokenizer(tiny_model("llama", tmp_path / "small", vocab_size=256), 255)
    arguments = ["serve", base, "--port", "0", "--state-dir", tmp_path / "state", "--proxy-model", f"small={small}"]
    ended = subprocess.run([WEFT, *map(str, arguments)], capture_output=True, cwd=tmp_path, timeout=240)
    error = ended.stderr.decode()
    assert ended.returncode != 0 and "proxy_model: small has another tokenizer" in error and "fingerprint" in error
    assert "Traceback" not in error


def test_a_proxy_model_needs_a_tokenizer(tmp_path: Path) -> None:
    """Said by ``read_tokenizers``, as it says that a tokenizer is another one: a start of the server takes seconds."""
    base = base_with_tokenizer(tmp_path / "base")
    small = tiny_model("llama", tmp_path / "small", vocab_size=256)
    with pytest.raises(ConfigError, match=r"proxy_model: .*tokenizer"):
        read_tokenizers(Settings.load(model=str(base), proxy_model={"small": str(small)}))

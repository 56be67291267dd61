"""``weft compose`` on a live server with the real engine: compositions named, found, kept over a restart."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from tests.cli.serving import Serving, base_with_tokenizer, serving
from tests.support.adapters import make_lora
from weft.server.cli import create_cli
from weft.server.cli.plot import BEST, POINT, curve

EXAMPLES = [{"prompt": "Hello", "completion": " world"}, {"prompt": "a", "completion": "b"}]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("compose")
    (home / "examples.jsonl").write_text("\n".join(map(json.dumps, EXAMPLES)) + "\n\n")
    return home


@pytest.fixture(scope="module")
def options(home: Path) -> list[object]:
    base = base_with_tokenizer(home / "tiny")
    ranks = {"a": 4, "b": 4, "other": 6}
    folders = {
        id: make_lora(base, home / "adapters" / id, seed=seed, r=rank, target_modules="all-linear")
        for seed, (id, rank) in enumerate(ranks.items())
    }
    given = [part for id, folder in folders.items() for part in ("--adapter", f"{id}={folder}")]
    return [base, *given, "--state-dir", home / "state"]


@pytest.fixture(scope="module")
def server(home: Path, options: list[object]) -> Iterator[Serving]:
    with serving(home, *options) as started:
        yield started


def compose(server: Serving, home: Path, *arguments: object, **options: Any) -> Result:
    at = ["--url", server.url, "--state-dir", str(home / "state")]
    return CliRunner().invoke(create_cli(), ["compose", *map(str, arguments), *at], **options)


def completion(server: Serving, **body: Any) -> Any:
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True, **body}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)


def test_the_life_of_a_composition_from_a_shell(server: Serving, home: Path) -> None:
    made = compose(server, home, "create", "ab", "a=0.7", "b=-0.3", "--description", "both")
    assert made.exit_code == 0, made.stderr
    assert made.stdout == "ab is served: 0.7 × a + -0.3 × b (lorahub)\n"
    listed = compose(server, home, "list").stdout
    assert "ab" in listed and "0.7 × a + -0.3 × b (lorahub)" in listed and "ready" in listed
    card = json.loads(compose(server, home, "show", "ab", "--json").stdout)
    assert card["adapters"] == [{"id": "a", "weight": 0.7}, {"id": "b", "weight": -0.3}]
    assert "description: both" in compose(server, home, "show", "ab").stdout

    adapters = [{"id": "a", "weight": 0.7}, {"id": "b", "weight": -0.3}]
    here = completion(server, adapters=adapters).json()
    text = here["choices"][0]["text"]
    assert text == server.complete("ab") and text not in (server.complete("tiny"), server.complete("a"))
    assert here["usage"]["weft"]["compose_ms"] >= 0
    linear = completion(server, adapters=adapters, combination="linear").json()["choices"][0]["text"]
    assert linear != text
    only = completion(server, adapters=[{"id": "b", "weight": 1}], combination="linear").json()["choices"][0]["text"]
    assert only == server.complete("b")

    other = ("ab", "b=1", "--combination", "linear", "--description", "b alone")
    stale = compose(server, home, "replace", *other, "--if-match", "0" * 64)
    assert stale.exit_code == 1 and "(412, precondition_failed); somebody changed it" in stale.stderr
    assert f"revision: {card['revision']}" in compose(server, home, "show", "ab").stdout
    replaced = compose(server, home, "replace", *other, "--if-match", card["revision"])
    assert replaced.stdout == "ab is replaced: 1 × b (linear)\n", replaced.stderr
    assert server.complete("ab") == server.complete("b")
    assert "description: b alone" in compose(server, home, "show", "ab").stdout

    assert compose(server, home, "delete", "ab").stdout == "ab is deleted\n"
    assert completion(server, model="ab").status_code == 404


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["create", "x", "a"], r"'a' is not ADAPTER=WEIGHT"),
        (["create", "x", "a=much"], r"'much' is no number"),
        (["create", "x", "nobody=1"], r"'adapters\[0\].id'.*\(404, "),
        (["create", "x", "a=nan"], r"a=nan: nan is not a finite number"),
        (["replace", "x", "a=1"], r"no composition 'x' \(404, composition_not_found\); weft compose list"),
        (["create", "a", "b=1"], r"adapter 'a' exists already .*\(409, adapter_exists\)"),
        (["create", "x", "a=1", "other=1"], r"adapters\[1\] cannot be composed.*\(400, "),
        (["create", "x", "a=1", "--combination", "svd"], r"combination"),
        (["fit", "x", "a", "other", "--examples", "HOME/examples.jsonl"], r"candidates\[1\] cannot be composed"),
        (["fit", "x", "a", "--examples", "HOME/nothing"], r"examples: cannot read"),
        (["fit", "x", "a", "--examples", "HOME/tiny/config.json"], r"examples: line 1 of .* is not JSON"),
        (["show", "x"], r"no composition 'x' \(404, composition_not_found\)"),
        (["delete", "x"], r"no composition 'x'"),
    ],
)
def test_what_is_refused_is_said(server: Serving, home: Path, arguments: list[str], reason: str) -> None:
    result = compose(server, home, *(a.replace("HOME", str(home)) for a in arguments))
    assert result.exit_code == 1 and re.search(reason, result.stderr), result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_curves() -> None:
    assert curve([]) == "" and curve([None, float("inf")]) == ""
    drawn = curve([4.0, None, 2.0, 3.0, 1.0], height=4).splitlines()
    assert drawn[0] == f"   4.0000 │{POINT}{BEST}" and drawn[3] == f"   1.0000 │    {POINT}"
    assert drawn[2] == f"{'':9} │  {POINT}{BEST}" and drawn[-1].split() == ["1", "5"]
    assert POINT in curve([1.0, 1.0])
    wide = curve([float(i) for i in range(1000)], width=50)
    assert max(map(len, wide.splitlines())) <= 50 + 11


def test_weights_are_found_and_kept_over_a_restart(server: Serving, home: Path, options: list[object]) -> None:
    arguments = ("found", "a", "b", "--examples", home / "examples.jsonl", "--budget", 12)
    result = compose(server, home, "fit", *arguments)
    assert result.exit_code == 0, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 12 and lines[-1].startswith("12/12  loss ")
    assert POINT in result.stdout and re.search(r"found is served: .* × a \+ .* × b \(lorahub\), loss ", result.stdout)
    first, best = (float(re.findall(r"[0-9]+\.[0-9]+", line)[-1]) for line in (lines[0], lines[-1]))
    assert best < first, "some weighting is better than none"
    shown = compose(server, home, "show", "found").stdout
    assert "found by NGOpt on 2 examples, budget 12, seed 42, among a (" in shown and POINT in shown
    again = compose(server, home, "fit", "again", *arguments[1:], "--json")
    before = json.loads(compose(server, home, "show", "found", "--json").stdout)
    found, repeated = (
        {member["id"]: member["weight"] for member in members}
        for members in (before["adapters"], json.loads(again.stdout)["result"]["adapters"])
    )
    # But for the rounding of losses, which are sums over batches whose rows need not be the same: the optimizer fits
    # models to differences of losses, and magnifies it.
    assert repeated == pytest.approx(found, abs=0.1), "a search repeats"
    text = server.complete("found")
    rounds = compose(server, home, "fit", "rounds", *arguments[1:], "--optimizer", "Shiwa", "--round-size", 4)
    assert rounds.exit_code == 0, rounds.stderr
    metrics = httpx.get(f"{server.url}/metrics").text
    assert float(re.search(r"^weft_composition_seconds_count (\S+)", metrics, re.M)[1]) > 12  # type: ignore[index]

    assert server.stop() == 0
    with serving(home, *options) as second:
        assert json.loads(compose(second, home, "show", "found", "--json").stdout) == before
        assert second.complete("found") == text
        _stop_during_a_search(second, home)


def _stop_during_a_search(server: Serving, home: Path) -> None:
    """The search ends, and who follows it is told, though the server would wait longer for streams."""
    told: list[Result] = []
    arguments = ("fit", "late", "a", "b", "--examples", home / "examples.jsonl", "--budget", 1000)
    following = threading.Thread(target=lambda: told.append(compose(server, home, *arguments)))
    following.start()
    key = (home / "state" / "admin.key").read_text().strip()
    deadline = time.monotonic() + 60
    while not httpx.get(f"{server.url}/admin/jobs", headers={"Authorization": f"Bearer {key}"}).json()["data"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(2)
    started = time.monotonic()
    assert server.stop() == 0 and time.monotonic() - started < 15
    following.join(10)
    assert told[0].exit_code == 1 and "the search cancelled" in told[0].stderr
    assert "Traceback" not in server.stderr

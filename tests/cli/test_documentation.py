"""The commands of the README and of docs/, as readers copy them, on a server of the demo; routes and metrics as told.

`tests/packaging/test_documentation.py` sees to it that each block of commands runs here or says why it does not.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.cli.serving import WEFT, Serving, serving
from tests.support.documentation import PAGES, REPOSITORY, Block, blocks
from weft.server.demo import adapter_path, demo_model
from weft.server.settings import Settings

KEY = "admin"
ADAPTERS = {"tone": "formal", "tone2": "formal-ia3", "sql": "sql", "polite-of-small": "formal"}
"""Folders that the commands name, and the adapters of the demo that lie there."""
MODELS = ("base", "large", "small")
CURL = 'curl() { command curl --silent --show-error --fail-with-body "$@"; }\n'
"""An error of the server is one of the command."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reader is: a folder with adapters and models."""
    place = tmp_path_factory.mktemp("reader")
    for name, adapter in ADAPTERS.items():
        shutil.copytree(adapter_path(adapter), place / "adapters" / name)
    (place / "path/to").mkdir(parents=True)
    for name in MODELS:
        (place / "path/to" / name).symlink_to(demo_model())
    return place


@pytest.fixture(scope="module")
def server(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    names = ("--served-model-name", "weft-demo", "--served-model-name", "large")
    small = ("--proxy-model", "small=path/to/small", "--adapter", "small:polite=adapters/polite-of-small")
    kept = ("--state-dir", tmp_path_factory.mktemp("state"), "--admin-key", KEY, "--adapter-root", place)
    with serving(place, *names, *small, *kept) as running:
        yield running


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("page", [p for p in PAGES if any(b.mark == "runs" for b in blocks(p))], ids=lambda p: p.name)
def test_the_commands_of_a_page_work(page: Path, server: Serving, place: Path) -> None:
    """In their order, since later ones use what earlier ones made."""
    for block in blocks(page):
        if block.mark == "runs":
            run(block, server, place)


def run(block: Block, server: Serving, place: Path) -> None:
    if block.language == "toml":
        (place / "settings.toml").write_text(block.text)
        Settings.load(config=place / "settings.toml").engine_config()
        return
    address = server.url.removeprefix("http://")
    text = re.sub(r"(localhost|127\.0\.0\.1):8000", address, block.text)
    assert "8000" not in text
    shell = ["bash", "-euo", "pipefail", "-c", CURL + text]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("WEFT_")},
        "PATH": f"{WEFT.parent}{os.pathsep}{os.environ['PATH']}",
        "WEFT_URL": server.url,
        "WEFT_ADMIN_KEY": KEY,
    }
    command = [sys.executable, "-c", text] if block.language == "python" else shell
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{block.text}\nended with {done.returncode}:\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
def test_every_route_is_told_of(server: Serving) -> None:
    told = (REPOSITORY / "docs/api.md").read_text()
    routes = {path.partition("/{")[0] for path in httpx.get(f"{server.url}/openapi.json").json()["paths"]}
    assert len(routes) >= 20
    assert not [route for route in sorted(routes) if f"{route}`" not in told and f"{route}/" not in told]


@pytest.mark.slow
def test_the_metrics_are_those_told_of(server: Serving) -> None:
    exposed = re.findall(r"^# TYPE (\S+)", httpx.get(f"{server.url}/metrics").text, re.MULTILINE)
    told = re.findall(r"`((?:weft_|vllm:)\w+)`", (REPOSITORY / "docs/operations.md").read_text())
    assert {*told} == {name for name in exposed if not name.endswith("_created")}

"""``weft serve --proxy-model``: from the command line to a steered answer, and what stops the start."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.cli.serving import WEFT, add_tokenizer, base_with_tokenizer, serving
from tests.support.adapters import make_lora
from tests.support.models import tiny_model


def test_a_proxy_model_with_an_adapter_of_its_own(tmp_path: Path) -> None:
    base = base_with_tokenizer(tmp_path / "base")
    small = base_with_tokenizer(tmp_path / "small", num_hidden_layers=1)
    x = make_lora(small, tmp_path / "x", seed=1, target_modules="all-linear")
    y = make_lora(small, tmp_path / "y", seed=2, target_modules="all-linear")
    arguments = (base, "--dtype", "float32", "--state-dir", tmp_path / "state", "--adapter-root", tmp_path)
    arguments += ("--proxy-model", f"small={small}", "--adapter", f"small:x={x}")
    with serving(tmp_path, *arguments) as server:
        (command,) = (line for line in server.stdout.splitlines() if '"expert"' in line)
        body = {**json.loads(shlex.split(command)[-1]), "max_tokens": 8, "ignore_eos": True}
        assert body["proxy"]["expert"] == {"model": "small", "adapter": "x"}
        plain = server.complete("base", body["prompt"])

        def steered(alpha: float, **fields: object) -> str:
            proxy = {**body["proxy"], "alpha": alpha}
            reply = httpx.post(f"{server.url}/v1/completions", json={**body, "proxy": proxy, **fields}, timeout=60)
            assert reply.status_code == 200, reply.text
            text: str = reply.json()["choices"][0]["text"]
            return text

        assert steered(0.0) == plain and steered(3.0) != plain
        client = ["--url", server.url, "--state-dir", str(tmp_path / "state"), "--json"]
        loading = [WEFT, "adapter", "load", "y", str(y), "--base", "small", *client]
        loaded = subprocess.run(loading, check=True, capture_output=True, cwd=tmp_path)
        assert json.loads(loaded.stdout)["base"] == "small"
        assert server.stop() == 0
    with serving(tmp_path, *arguments) as again:  # which remembers whose adapter it is
        models = {model["id"]: model for model in httpx.get(f"{again.url}/v1/models").json()["data"]}
        assert models["x"]["parent"] == models["y"]["parent"] == "small"


@pytest.mark.parametrize("case", ["another vocabulary", "no tokenizer"])
def test_a_proxy_model_needs_the_same_tokenizer(case: str, tmp_path: Path) -> None:
    base = base_with_tokenizer(tmp_path / "base")
    small = tiny_model("llama", tmp_path / "small", vocab_size=256)
    if case == "another vocabulary":
        add_tokenizer(small, 255)
    arguments = ["serve", base, "--port", "0", "--state-dir", tmp_path / "state", "--proxy-model", f"small={small}"]
    ended = subprocess.run([WEFT, *map(str, arguments)], capture_output=True, cwd=tmp_path, timeout=240)
    error = ended.stderr.decode()
    assert ended.returncode != 0 and "proxy_model: " in error and "tokenizer" in error
    assert "Traceback" not in error
    if case == "another vocabulary":
        assert "small has another tokenizer" in error and "fingerprint" in error

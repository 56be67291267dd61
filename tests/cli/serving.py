"""A ``weft serve`` in a process of its own, and a tiny base with a tokenizer for it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.models import tiny_model

WEFT = Path(sys.executable).with_name("weft")
START_SECONDS = 240


def base_with_tokenizer(folder: Path, **config: object) -> Path:
    """A random Llama whose 256 tokens are the bytes."""
    tiny_model("llama", folder, vocab_size=256, **config)
    return add_tokenizer(folder, 256)


def add_tokenizer(folder: Path, vocab_size: int) -> Path:
    """Give a model a tokenizer whose tokens are the first so many bytes."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())[:vocab_size]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@dataclass
class Serving:
    """A running server: its process, address and what it has printed so far."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    @property
    def stdout(self) -> str:
        return self.log.read_text()

    @property
    def stderr(self) -> str:
        return self.log.with_suffix(".err").read_text()

    def complete(self, model: str, prompt: str = "Hello", max_tokens: int = 8) -> str:
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        reply = httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)
        assert reply.status_code == 200, reply.text
        text: str = reply.json()["choices"][0]["text"]
        return text

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """The exit code, after a signal."""
        self.process.send_signal(number)
        return self.process.wait(60)


@contextmanager
def launched(folder: Path, *arguments: object) -> Iterator[Serving]:
    """``weft serve ARGUMENTS`` in ``folder``, not waited for; killed in the end if it still runs."""
    folder.mkdir(exist_ok=True)
    log = folder / f"{time.monotonic_ns()}.out"
    command = [WEFT, "serve", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WEFT_")}
    with log.open("wb") as out, log.with_suffix(".err").open("wb") as err:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=err)
    try:
        yield Serving(process, "", log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@contextmanager
def serving(folder: Path, *arguments: object) -> Iterator[Serving]:
    """``weft serve --port 0 ARGUMENTS``, once it serves."""
    with launched(folder, "--port", 0, *arguments) as server:
        wait_for(server, r"^weft serves .* on (http://\S+)$")
        match = re.search(r"^weft serves .* on (http://\S+)$", server.stdout, re.MULTILINE)
        assert match is not None
        server.url = match[1]
        yield server


def wait_for(server: Serving, pattern: str, *, in_stderr: bool = False) -> None:
    """Until the server has printed a line that matches."""
    deadline = time.monotonic() + START_SECONDS
    while not re.search(pattern, server.stderr if in_stderr else server.stdout, re.MULTILINE):
        assert server.process.poll() is None, server.stderr
        assert time.monotonic() < deadline, server.stderr
        time.sleep(0.02)

"""The command line itself: start-up, help, version, how it fails."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from weft.server.cli import create_cli
from weft.server.cli.serve import spread_lora_modules
from weft.server.settings import Settings

HEAVY = ("torch", "transformers", "fastapi", "uvicorn", "rich", "httpx", "zmq")


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["adapter", "load", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys; from weft.server.cli import main\n"
        "try: main()\n"
        f"finally: print('loaded:', [name for name in {HEAVY} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("loaded: []\n")


def test_the_console_script_shows_the_version() -> None:
    script = Path(sys.executable).with_name("weft")
    result = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert result.stdout == f"weft {version('weft')}\n"


def test_serve_has_a_flag_for_every_setting_with_its_default() -> None:
    text = " ".join(CliRunner().invoke(create_cli(), ["serve", "--help"]).output.split())
    for name in Settings.model_fields:
        assert (
            "[MODEL]" if name == "model" else f"--{name.replace('_', '-')} ".replace("adapter ", "adapter, ")
        ) in text
    assert "[default: 8000]" in text
    assert "[default: 4.0GiB]" in text
    assert "--enable-prefix-caching / --no-enable-prefix-caching" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "many"], "port: Input should be a valid integer"),
        (["--kv-cache-memory", "4 GB s"], "kv_cache_memory: must be bytes, or a number with a unit"),
        (["--config", "missing.toml"], "config: there is no file missing.toml"),
        (["--adapter", "nothing"], "adapter: must be ID=SOURCE, got 'nothing' (from --adapter)"),
        (["--device", "tpu"], "device must be one of auto, cpu, cuda; got 'tpu'"),
    ],
)
def test_serve_refuses_bad_settings_in_one_line(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(create_cli(), ["serve", *arguments])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_unknown_options_are_refused() -> None:
    result = CliRunner().invoke(create_cli(), ["serve", "--prot", "1"])
    assert result.exit_code == 2
    assert "No such option: --prot" in result.stderr


def test_several_values_behind_lora_modules() -> None:
    arguments = ["serve", "m", "--lora-modules", "a=x", '{"name": "b", "path": "y"}', "--port", "1", "c=d"]
    assert spread_lora_modules(arguments) == [
        *("serve", "m", "--lora-modules", "a=x", "--lora-modules", '{"name": "b", "path": "y"}'),
        *("--port", "1", "c=d"),
    ]

"""The library must work where no package of the HTTP server or the command line is installed."""

import subprocess
import sys
import tomllib
from pathlib import Path

SERVER_ONLY = (
    "fastapi",
    "msgspec",
    "prometheus_client",
    "pydantic",
    "rich",
    "starlette",
    "structlog",
    "typer",
    "uvicorn",
    "zmq",
)

PROBE = """
import importlib.machinery, importlib.util, sys

hidden = set(sys.argv[1:])


class Installed(importlib.machinery.PathFinder):
    # Answers as if the hidden packages were not installed; find_spec sees that too, as optional imports need.
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)


sys.meta_path[:] = [Installed if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
for name in hidden:
    assert importlib.util.find_spec(name) is None, name

import weft.adapters
import weft.kernels
from weft.server import LLM

assert isinstance(LLM, type), LLM
"""


def test_llm_imports_without_the_servers_packages() -> None:
    run = subprocess.run([sys.executable, "-c", PROBE, *SERVER_ONLY], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_servers_packages_are_those_of_the_import_contract(repository: Path) -> None:
    """The subprocess above and import-linter forbid the same packages."""
    config = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["importlinter"]
    forbidden = [contract["forbidden_modules"] for contract in config["contracts"] if "forbidden_modules" in contract]
    assert sorted(SERVER_ONLY) in forbidden

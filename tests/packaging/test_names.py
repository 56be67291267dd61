"""The folders at the root must not be importable under the names of other projects' packages."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["kernels", "adapters", "server"])
def test_folder_is_not_a_top_level_package(name: str, repository: Path) -> None:
    spec = importlib.util.find_spec(name)
    locations = [] if spec is None else [*(spec.submodule_search_locations or []), spec.origin or ""]
    assert not [place for place in locations if Path(place).is_relative_to(repository / name)]


@pytest.mark.parametrize("name", ["kernels", "adapters", "server"])
def test_package_is_installed_from_its_folder(name: str, repository: Path) -> None:
    spec = importlib.util.find_spec(f"weft.{name}")
    assert spec is not None and spec.origin is not None, "install weft first: make test, or pip install --editable ."
    assert Path(spec.origin).resolve() == repository / name / "__init__.py"


def test_subprocess_started_in_the_root_does_not_see_the_folders(repository: Path) -> None:
    """conftest's PYTHONSAFEPATH reaches what the tests start; the Makefile gives the same with python -P."""
    code = "import importlib.util as u; assert not any(map(u.find_spec, ('kernels', 'adapters')))"
    run = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

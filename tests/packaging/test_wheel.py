"""What a user installs: the wheel, built by way of the source distribution, away from the checkout.

An editable install finds a forgotten subpackage or data file in the tree; only the wheel shows that it is missing.
"""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOTS = ("server", "kernels", "adapters")
METADATA = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
DEMO_LIMIT_BYTES = 16_000_000

IMPORT_ALL = """
import importlib, pkgutil, sys
import weft

target = sys.argv[1]
names = [m.name for m in pkgutil.walk_packages(weft.__path__, "weft.") if not m.name.endswith("__main__")]
for name in names:
    module = importlib.import_module(name)
    assert module.__file__.startswith(target), f"{name} comes from {module.__file__}"
print(*names)
"""


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def modules(repository: Path) -> set[str]:
    """Dotted names of all modules in the tree, as they are to be installed."""
    paths = [path.relative_to(repository) for root in ROOTS for path in (repository / root).rglob("*.py")]
    return {".".join(("weft", *path.with_suffix("").parts)).removesuffix(".__init__") for path in paths}


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tree so that nothing stale of an earlier build gets in."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in METADATA:
        shutil.copy2(repository / name, source)
    for root in ROOTS:
        shutil.copytree(repository / root, source / root, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output), ".", cwd=source)
    (built,) = output.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def contents(wheel: Path) -> dict[str, int]:
    """Names of the files in the wheel, with their sizes in bytes."""
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.file_size for entry in archive.infolist()}


def test_every_module_is_in_the_wheel(contents: dict[str, int], repository: Path) -> None:
    installed = {name.removesuffix(".py").replace("/", ".") for name in contents if name.endswith(".py")}
    assert {name.removesuffix(".__init__") for name in installed} == modules(repository)


def test_nothing_but_weft_is_in_the_wheel(contents: dict[str, int], repository: Path) -> None:
    version = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["version"]
    assert {name.split("/")[0] for name in contents} == {"weft", f"weft-{version}.dist-info"}


def test_the_demo_is_in_the_wheel(contents: dict[str, int], repository: Path) -> None:
    files = [path for path in (repository / "server/demo/assets").rglob("*") if path.is_file()]
    assert files, "the demo has no assets"
    wanted = {f"weft/{path.relative_to(repository).as_posix()}": path.stat().st_size for path in files}
    assert wanted.items() <= contents.items()


def test_the_kernels_in_c_are_in_the_wheel(contents: dict[str, int], repository: Path) -> None:
    sources = [path for ending in ("c", "h") for path in (repository / "kernels").rglob(f"*.{ending}")]
    assert len(sources) > 3
    assert {f"weft/{path.relative_to(repository).as_posix()}" for path in sources} <= contents.keys()


def test_types_are_announced(contents: dict[str, int]) -> None:
    assert {f"weft/{root}/py.typed" for root in ROOTS} <= contents.keys()


def test_demo_is_small(contents: dict[str, int]) -> None:
    sizes = {name: size for name, size in contents.items() if name.startswith("weft/server/demo/assets/")}
    assert 0 < sum(sizes.values()) <= DEMO_LIMIT_BYTES


def test_every_module_imports_from_the_installed_wheel(wheel: Path, repository: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index")
    run(*pip, "--target", str(target), str(wheel), cwd=tmp_path)
    imported = run(sys.executable, "-c", IMPORT_ALL, str(target), cwd=tmp_path, PYTHONPATH=str(target))
    wanted = {name for name in modules(repository) if not name.endswith("__main__")}
    assert set(imported.split()) == wanted

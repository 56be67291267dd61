"""Compiling kernels in C: what is found, what is kept, what is said where there is no compiler."""

import ctypes
import functools
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from weft.kernels import native

SOURCE = "grouped_lora/rows.c"


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and nothing known of what was compiled; the folder that libraries will be in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("WEFT_CC", raising=False)
    for name in ("compiled", "_told"):
        monkeypatch.setattr(native, name, functools.cache(getattr(native, name).__wrapped__))
    return tmp_path / "weft" / "native"


def test_a_library_is_compiled_once_and_kept(fresh: Path) -> None:
    assert isinstance(native.compiled(SOURCE), ctypes.CDLL)
    (library,) = fresh.iterdir()
    made = library.stat().st_mtime_ns
    native.compiled.cache_clear()
    assert isinstance(native.compiled(SOURCE), ctypes.CDLL)
    assert [file.stat().st_mtime_ns for file in fresh.iterdir()] == [made]


def test_other_flags_make_another_library(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native.compiled(SOURCE)
    native.compiled.cache_clear()
    monkeypatch.setenv("WEFT_CC", "cc -O1")
    native.compiled(SOURCE)
    assert len(list(fresh.iterdir())) == 2


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("", "WEFT_CC is empty"),
        ("no-such-compiler", "no C compiler 'no-such-compiler'"),
        ("cc -no-such-flag", "failed: "),
    ],
)
def test_without_a_compiler_torch_does_the_work_and_it_is_said_once(
    fresh: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    command: str,
    reason: str,
) -> None:
    monkeypatch.setenv("WEFT_CC", command)
    with caplog.at_level(logging.WARNING):
        assert not native.available(SOURCE) and not native.available(SOURCE)
    (message,) = caplog.messages
    assert reason in message and "torch does the work of grouped_lora/rows.c" in message


def test_a_folder_that_others_can_write_to_is_not_trusted(fresh: Path) -> None:
    fresh.mkdir(parents=True)
    fresh.chmod(0o777)
    assert isinstance(native.compiled(SOURCE), ctypes.CDLL)
    assert not list(fresh.iterdir())


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the flag is of x86-64")
def test_kernels_agree_on_a_processor_with_short_vectors(tmp_path: Path) -> None:
    """The same tests, of libraries compiled without this machine's wide vectors and matrix units."""
    tests = [f"{Path(__file__).parent}/test_{name}.py" for name in ("paged_attention", "grouped_lora")]
    environment = {**os.environ, "WEFT_CC": "cc -march=x86-64-v2", "XDG_CACHE_HOME": str(tmp_path)}
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "cpu or not_a_number",
        *tests,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_user_without_a_home_compiles_for_each_process(monkeypatch: pytest.MonkeyPatch, fresh: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(
        Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))
    )
    assert isinstance(native.compiled(SOURCE), ctypes.CDLL)
    assert not fresh.exists()

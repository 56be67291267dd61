"""A clean environment for every test: no settings of the machine's, a state directory of its own."""

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def clean_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No ``WEFT_…`` variables, an empty working directory, a state directory below ``tmp_path``."""
    for name in [name for name in os.environ if name.startswith("WEFT_")]:
        monkeypatch.delenv(name)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

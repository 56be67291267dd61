"""Makes ``weft`` importable from a checkout where it is not installed."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def make_importable(root: Path = ROOT) -> None:
    """``weft.server``, ``weft.adapters``, ``weft.kernels`` become the folders of ``root``, unless they are installed.

    What setup.py tells the installer, told to this process alone. The root itself never gets on ``sys.path``:
    transformers and peft would take the folders ``kernels`` and ``adapters`` for other projects' packages.
    """
    try:
        if importlib.util.find_spec("weft.kernels") is not None:
            return
    except ModuleNotFoundError:
        pass  # there is no weft at all
    package = types.ModuleType("weft")
    package.__path__ = [str(root)]
    sys.modules["weft"] = package

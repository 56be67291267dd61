"""Settings of every test, made before any test module imports torch or transformers."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parent.parent

# With the repository's root on sys.path, transformers would take kernels/ for Hugging Face's package of that name, and
# peft would take adapters/ for AdapterHub's.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != REPOSITORY]

os.environ["PYTHONSAFEPATH"] = "1"  # the same for `python -c` and `python -m` in subprocesses
os.environ["HF_HUB_OFFLINE"] = "1"
# Triton's interpreter, chosen when triton is first imported, which transformers does.
os.environ.setdefault("TRITON_INTERPRET", "1")
# A default only: with a tiny model, threads cost more than they give, and the server under test is a second process.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The same examples in every run, so that a change is judged by what it changes. New ones, of which those that fail are
# kept and tried again, are drawn with --hypothesis-profile=random, as by `make test-all`.
settings.register_profile("random", settings.get_profile("default"), deadline=None)
settings.load_profile("ci")


def pytest_runtest_call() -> None:
    """Draws that name no seed do not depend on which tests ran before either."""
    import torch  # not in front of the settings above

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-matrix", action="store_true", help="rewrite docs/adapters.md's table of what is served")

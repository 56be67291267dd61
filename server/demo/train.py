"""Train the demo from nothing: the tokenizer, the base model, its adapters.

    python -m weft.server.demo.train                      everything
    python -m weft.server.demo.train --only sql           one adapter again, on the base model as it is

Every text is generated from a fixed seed and every operation is deterministic, so a second run on
the same machine with the same versions of the libraries writes the same weights. The training uses
bfloat16 autocast, which is fast on processors with AMX and correct on all others. On a 2-core Xeon
with AMX the base takes 28 minutes and an adapter 3 to 20, with other work on the machine.
"""

from __future__ import annotations

import argparse

import torch

from weft.server.demo import ADAPTERS, demo_model
from weft.server.demo.adapters import train_adapter
from weft.server.demo.base import train_base


def main() -> None:
    """Train what the command line asks for."""
    parser = argparse.ArgumentParser(description="Train the demo's base model and adapters.")
    parser.add_argument("--only", choices=[*ADAPTERS, "base"], help="train only this adapter, or only the base model")
    only = parser.parse_args().only
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if only in (None, "base"):
        train_base(demo_model())
    for adapter in ADAPTERS:
        if only in (None, adapter):
            train_adapter(adapter, demo_model())


if __name__ == "__main__":
    main()

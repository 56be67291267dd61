"""AdaMSS, whose clusters are not saved: refused where they cannot be known to be those it was trained with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.adapters.conftest import TinyBase
from tests.adapters.test_lora_refusals import refusal
from tests.support.adapters import edit_config, edit_tensors, make_adapter

pytest.importorskip("sklearn", reason="an extra")
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapter(llama: TinyBase, tmp_path: Path) -> Path:
    from peft import AdamssConfig

    config = AdamssConfig(r=9, num_subspaces=3, subspace_rank=2, target_modules=["q_proj"])
    return make_adapter(llama.folder, tmp_path / "adapter", config)


def test_other_numbers(adapter: Path, llama: TinyBase) -> None:
    edit_config(adapter, random_seed=5)
    error = refusal(adapter, llama)
    assert error.param == "random_seed" and "clusters" in error.message


def test_other_clusters(adapter: Path, llama: TinyBase) -> None:
    edit_config(adapter, num_subspaces=2)
    assert "adamss_B.0" in refusal(adapter, llama).message


def test_a_rank_beyond_the_config(adapter: Path, llama: TinyBase) -> None:
    edit_config(adapter, subspace_rank=1)
    assert refusal(adapter, llama).param == f"{Q0}.adamss_A.0"


def test_a_cluster_too_many(adapter: Path, llama: TinyBase) -> None:
    name = f"{Q0}.adamss_A.7"
    edit_tensors(adapter, lambda tensors: tensors | {name: tensors[f"{Q0}.adamss_A.0"].clone()})
    assert refusal(adapter, llama).param == name


def test_without_scikit_learn(adapter: Path, llama: TinyBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    assert "weft[adamss]" in refusal(adapter, llama).message

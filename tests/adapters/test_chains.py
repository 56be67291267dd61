"""Chains of LoRA: against peft, which merges link after link; and what is no chain."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from tests.adapters.conftest import TinyBase
from tests.adapters.test_lora_refusals import refusal
from tests.adapters.test_own_formats import PROMPT, assert_equals
from tests.support.adapters import PeftReference, edit_config, edit_tensors, make_lora
from tests.support.models import tiny_model
from tests.support.own_formats import load, make_chain
from weft.adapters.base import Base
from weft.adapters.errors import (
    AdapterFormatError,
    AdapterMismatch,
    AdapterTooLarge,
    AdapterUnsupported,
)
from weft.adapters.methods import compile_adapter
from weft.adapters.store import Store

ATTENTION = ["q_proj", "v_proj"]
CHAINS: dict[str, list[dict[str, Any]]] = {
    "one": [{"r": 3, "target_modules": ATTENTION}],
    "plain": [{"r": 3, "target_modules": ATTENTION}, {"r": 5, "target_modules": ["q_proj", "down_proj"]}],
    "options": [
        {"r": 3, "use_rslora": True, "target_modules": "all-linear", "exclude_modules": ["gate_proj"]},
        {"r": 4, "target_modules": ATTENTION, "rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 3}},
        {"r": 2, "target_modules": ["lm_head"]},
    ],
    "wide": [{"r": 24, "target_modules": ATTENTION}] * 3,
    "biases of LoRA": [{"r": 3, "lora_bias": True, "target_modules": ATTENTION}] * 2,
    "biases": [
        {"r": 3, "bias": "all", "target_modules": ATTENTION},
        {"r": 3, "lora_bias": True, "target_modules": ATTENTION},
        {"r": 3, "bias": "lora_only", "target_modules": ["q_proj", "o_proj"]},
        {"r": 3, "lora_bias": True, "target_modules": ["q_proj", "o_proj"]},
    ],
    "saved modules": [
        {"r": 3, "target_modules": ATTENTION, "modules_to_save": ["norm", "down_proj", "embed_tokens"]},
        {"r": 3, "target_modules": ["down_proj", "v_proj"], "modules_to_save": ["q_proj", "norm"]},
        {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    "tokens": [
        {"r": 3, "target_modules": ["embed_tokens", "q_proj"]},
        {"r": 2, "target_modules": ["embed_tokens"]},
        {"r": 3, "target_modules": ATTENTION, "trainable_token_indices": [17, 5, 3]},
        {"r": 3, "target_modules": ATTENTION, "trainable_token_indices": [9, 5]},
    ],
    "from the base": [
        {"r": 3, "init_lora_weights": "pissa", "target_modules": ATTENTION},
        {"r": 3, "init_lora_weights": "mica", "target_modules": ATTENTION},
    ],
}


@pytest.mark.parametrize("name", CHAINS)
def test_chain(name: str, llama: TinyBase, tmp_path: Path) -> None:
    made = make_chain(llama.folder, tmp_path / "chain", CHAINS[name], copies=name != "tokens")
    compiled = assert_equals(llama, made)
    assert compiled.method == "CHAIN"
    if name == "plain":
        assert compiled.rank == 8 and compiled.forms == ("LowRank",)
    if name == "wide":  # 3 x 24 ranks take more than 80 x 48 values
        assert compiled.forms == ("Delta",)


@pytest.mark.parametrize("name", ["plain", "biases of LoRA"])
def test_chain_on_conv1d(name: str, tiny_base: Callable[[str], TinyBase], tmp_path: Path) -> None:
    gpt2, fields = tiny_base("gpt2"), {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    links = [{**link, **fields} for link in CHAINS[name]]
    assert_equals(gpt2, make_chain(gpt2.folder, tmp_path / "chain", links))


def test_chain_of_experts(tiny_base: Callable[[str], TinyBase], tmp_path: Path) -> None:
    """Ranks of one expert stay together."""
    mixtral = tiny_base("mixtral")
    fields = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj", "mlp.gate.weight"]}
    assert_equals(mixtral, make_chain(mixtral.folder, tmp_path / "chain", [{"r": 3, **fields}, {"r": 2, **fields}]))


def test_links_need_no_merging(llama: TinyBase, tmp_path: Path) -> None:
    """peft with all links active at once agrees, so a chain has a meaning on quantised bases too."""
    made = make_chain(llama.folder, tmp_path / "chain", CHAINS["plain"])
    model = PeftModel.from_pretrained(load(llama.folder), str(made.folder / "stage-0"), adapter_name="0")
    model.load_adapter(str(made.folder / "stage-1"), adapter_name="1")
    model.base_model.set_adapter(["0", "1"])
    with torch.no_grad():
        together = model.eval()(input_ids=torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(together, PeftReference(made.model).logits(PROMPT), rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def saved(tiny_base: Callable[[str], TinyBase], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return make_chain(tiny_base("llama").folder, tmp_path_factory.mktemp("saved") / "chain", CHAINS["plain"]).folder


@pytest.fixture
def chain(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "chain")


def declare(folder: Path, **fields: Any) -> None:
    (folder / "adapter_chain.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("links", "kind"),
    [
        (["stage-0"], AdapterMismatch),
        (["stage-0", "stage-1", "stage-2"], AdapterFormatError),
        (["stage-0", "stage-1", "stage-1"], AdapterFormatError),
        (["stage-0", "stage-1", "../chain/stage-1"], AdapterFormatError),
        (["stage-0", "stage-1", "/etc"], AdapterFormatError),
        (["stage-0", "stage-1", ""], AdapterFormatError),
        (["stage-0", "stage-1", "."], AdapterFormatError),
        (["stage-0", 1], AdapterFormatError),
        ([], AdapterFormatError),
        ("stage-0", AdapterFormatError),
        (None, AdapterFormatError),
    ],
)
def test_links_refused(links: object, kind: type, llama: TinyBase, chain: Path) -> None:
    declare(chain, links=links)
    error = refusal(chain, llama)
    assert isinstance(error, kind) and error.param == "links" and len(error.message) < 300


def test_another_field_of_a_chain(llama: TinyBase, chain: Path) -> None:
    declare(chain, links=["stage-0", "stage-1"], weights=[1, 2])
    assert refusal(chain, llama).param == "weights"


def test_the_order_is_the_declared_one(llama: TinyBase, tmp_path: Path) -> None:
    """Where it matters: what was trained in full last is what counts."""
    folder = make_chain(llama.folder, tmp_path / "chain", CHAINS["saved modules"][:2]).folder
    norms = []
    for links in (["stage-0", "stage-1"], ["stage-1", "stage-0"]):
        declare(folder, links=links)
        norms.append(compile_adapter(folder, llama.base, version="v").sites["model.norm"].weight)
    assert not torch.equal(*norms)


def test_a_chain_within_a_chain(llama: TinyBase, chain: Path) -> None:
    (chain / "adapter_chain.json").rename(chain / "stage-1" / "adapter_chain.json")
    declare(chain, links=["stage-0", "stage-1"])
    error = refusal(chain, llama)
    assert error.param == "links" and "chain itself" in error.message


def test_a_chain_beside_an_adapter(llama: TinyBase, chain: Path, tmp_path: Path) -> None:
    """peft saves the adapter named default where it saves the folders of the others."""
    (chain / "adapter_config.json").write_text((chain / "stage-0" / "adapter_config.json").read_text())
    assert refusal(chain, llama).param == "adapter_chain.json"
    with pytest.raises(AdapterFormatError, match="folder of its own"):
        Store(tmp_path / "store").add(chain)


def test_without_a_declaration_folders_are_no_chain(llama: TinyBase, chain: Path) -> None:
    (chain / "adapter_chain.json").unlink()
    assert "adapter_config.json is missing" in refusal(chain, llama).message


def test_a_link_outside(llama: TinyBase, chain: Path, tmp_path: Path) -> None:
    (chain / "stage-1").rename(tmp_path / "elsewhere")
    (chain / "stage-1").symlink_to(tmp_path / "elsewhere")
    assert refusal(chain, llama).param == "links"
    (chain / "stage-1").unlink()
    (tmp_path / "elsewhere").rename(chain / "stage-1")
    weights = chain / "stage-1" / "adapter_model.safetensors"
    weights.rename(tmp_path / "weights")
    weights.symlink_to(tmp_path / "weights")
    assert "symbolic link" in refusal(chain, llama).message


def test_too_many_folders(llama: TinyBase, chain: Path) -> None:
    for number in range(129):
        (chain / f"more-{number}").mkdir()
    assert isinstance(refusal(chain, llama), AdapterTooLarge)


def test_a_rank_that_no_tensor_has(llama: TinyBase, chain: Path) -> None:
    edit_config(chain / "stage-1", r=1 << 14)
    assert isinstance(refusal(chain, llama), AdapterMismatch)
    edit_config(chain / "stage-1", r=1 << 40)
    assert refusal(chain, llama).param == "r"


@pytest.mark.parametrize(
    ("position", "fields", "param"),
    [
        (1, {"use_dora": True}, "use_dora"),
        (0, {"use_dora": True}, "use_dora"),
        (1, {"init_lora_weights": "pissa"}, "init_lora_weights"),
        (1, {"init_lora_weights": "olora"}, "init_lora_weights"),
        (1, {"kasa_config": {}}, "kasa_config"),
        (0, {"task_type": "CAUSAL_LM", "alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
    ],
)
def test_a_link_refused(position: int, fields: dict[str, Any], param: str, llama: TinyBase, tmp_path: Path) -> None:
    for number in range(2):
        own = fields if number == position else {}
        make_lora(llama.folder, tmp_path / "chain" / str(number), r=3, target_modules=["q_proj"], **own)
    declare(tmp_path / "chain", links=["0", "1"])
    error = refusal(tmp_path / "chain", llama)
    assert isinstance(error, AdapterUnsupported) and error.param == param and repr(str(position)) in error.message


@pytest.mark.parametrize(
    ("links", "why"),
    [
        ([{"target_modules": ["lm_head"]}, {"target_modules": ["lm_head"]}], "repeats the base's weight"),
        (
            [{"target_modules": ["q_proj"], "trainable_token_indices": [3]}, {"target_modules": ["embed_tokens"]}],
            "trained rows",
        ),
    ],
)
def test_links_that_do_not_follow(links: list[dict[str, Any]], why: str, llama: TinyBase, tmp_path: Path) -> None:
    """Both made on the base itself."""
    for number, fields in enumerate(links):
        folder = make_lora(llama.folder, tmp_path / "chain" / str(number), r=3, **fields)
        if "rows" in why:
            edit_tensors(folder, lambda tensors: {n: t for n, t in tensors.items() if "base_layer" not in n})
    declare(tmp_path / "chain", links=["0", "1"])
    assert why in refusal(tmp_path / "chain", llama).message


def test_a_link_of_another_method(llama: TinyBase, chain: Path) -> None:
    edit_config(chain / "stage-1", peft_type="DYLORA")
    assert refusal(chain, llama).param == "peft_type"


def test_tensors_of_every_link_are_accounted_for(llama: TinyBase, chain: Path) -> None:
    edit_tensors(chain / "stage-1", lambda tensors: {**tensors, "another": torch.ones(2)})
    assert refusal(chain, llama).param == "another"


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_chain_on_tied_weights(target: str, tmp_path: Path) -> None:
    """Merging a link into the one would change the other, which peft does in silence."""
    base = tiny_model("llama", tmp_path / "base", tie_word_embeddings=True)
    made = make_chain(base, tmp_path / "chain", [{"r": 3, "target_modules": ["q_proj", target]}])
    model = load(base)
    tied = TinyBase(base, model, Base.of(model))
    assert "share" in refusal(made.folder, tied).message

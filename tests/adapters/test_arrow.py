"""Arrow: a router and its experts in one folder, against peft's own; and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import ArrowConfig, LoraConfig

from tests.adapters.conftest import TinyBase
from tests.adapters.test_method_parity import assert_parity
from tests.support.adapters import PeftReference, edit_config, edit_tensors, make_adapter, make_arrow, make_lora
from weft.adapters.errors import AdapterError, AdapterFormatError, AdapterMismatch, AdapterUnsupported
from weft.adapters.methods import compile_adapter
from weft.adapters.store import Store, digest

ARROWS = {
    "one": ArrowConfig(top_k=1, rng_seed=1),
    "two": ArrowConfig(top_k=2, router_temperature=0.3, rng_seed=2),
    "all": ArrowConfig(top_k=3, router_temperature=2.0, rng_seed=-3),
    "general": ArrowConfig(top_k=2, rng_seed=4, use_gks=True),
}


@pytest.mark.parametrize("name", ARROWS)
@pytest.mark.parametrize(("arch", "targets"), [("llama", ["q_proj", "o_proj", "down_proj"]), ("gpt2", ["c_attn"])])
def test_it_equals_peft(
    name: str, arch: str, targets: list[str], tiny_base: Callable[[str], TinyBase], tmp_path: Path
) -> None:
    tiny = tiny_base(arch)
    folder = make_arrow(tiny.folder, tmp_path / "arrow", ARROWS[name], r=3, scale=2.0, target_modules=targets)
    assert_parity(tiny, folder)
    assert compile_adapter(folder, tiny.base, version="v").forms == ("RoutedLowRank",)


@pytest.fixture(scope="module")
def saved(tiny_base: Callable[[str], TinyBase], tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """A router, with general knowledge or without; not to be changed."""

    @cache
    def make(use_gks: bool) -> Path:
        config = ArrowConfig(top_k=2, rng_seed=1, use_gks=use_gks)
        folder = tmp_path_factory.mktemp("saved") / "arrow"
        return make_arrow(tiny_base("llama").folder, folder, config, r=3, scale=2.0, target_modules=["q_proj"])

    return make


@pytest.fixture
def arrow(saved: Callable[[bool], Path], tmp_path: Path) -> Path:
    return shutil.copytree(saved(False), tmp_path / "arrow")


@pytest.fixture
def general(saved: Callable[[bool], Path], tmp_path: Path) -> Path:
    return shutil.copytree(saved(True), tmp_path / "arrow")


def refusal(folder: Path, tiny: TinyBase) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        compile_adapter(folder, tiny.base, version="v")
    return caught.value


def edit_arrow(folder: Path, **fields: object) -> None:
    """Change fields of the router's ``arrow_config``."""
    config = {"top_k": 2, "rng_seed": 1, "task_adapter_names": ["task_0", "task_1", "task_2"], **fields}
    edit_config(folder / "arrow_router", arrow_config=config)


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("top_k", 0, AdapterFormatError),
        ("top_k", 4, AdapterFormatError),
        ("top_k", "2", AdapterFormatError),
        ("router_temperature", 0, AdapterFormatError),
        ("router_temperature", -1.0, AdapterFormatError),
        ("rng_seed", None, AdapterUnsupported),
        ("rng_seed", 1.5, AdapterFormatError),
        ("rng_seed", 1 << 64, AdapterFormatError),
        ("use_gks", "yes", AdapterFormatError),
        ("task_adapter_names", ["task_0", "task_1"], AdapterMismatch),
        ("task_adapter_names", ["task_0", "task_1", "../task_2"], AdapterMismatch),
        ("task_adapter_names", None, AdapterMismatch),
        ("later", 1, AdapterUnsupported),
    ],
)
def test_a_router_that_is_not_served(
    field: str, value: object, kind: type[AdapterError], llama: TinyBase, arrow: Path
) -> None:
    edit_arrow(arrow, **{field: value})
    error = refusal(arrow, llama)
    assert isinstance(error, kind) and error.param == field


@pytest.mark.parametrize(
    ("field", "value"),
    [("bias", "all"), ("modules_to_save", ["norm"]), ("init_lora_weights", "pissa"), ("use_dora", True)],
)
def test_an_option_of_the_router_that_is_not_served(field: str, value: object, llama: TinyBase, arrow: Path) -> None:
    edit_config(arrow / "arrow_router", **{field: value})
    error = refusal(arrow, llama)
    assert isinstance(error, AdapterUnsupported) and error.param == field


@pytest.mark.parametrize("member", ["arrow_router", "task_1"])
def test_tensors_of_every_member_are_accounted_for(member: str, llama: TinyBase, arrow: Path) -> None:
    edit_tensors(arrow / member, lambda tensors: {**tensors, "another": torch.ones(2)})
    assert refusal(arrow, llama).param == "another"


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (LoraConfig(r=3, target_modules=["q_proj"], use_dora=True), "more than the factors"),
        (LoraConfig(r=3, target_modules=["q_proj"], lora_bias=True), "more than the factors"),
        (LoraConfig(r=4, target_modules=["q_proj"]), "other ranks"),
        (LoraConfig(r=3, target_modules=["q_proj", "v_proj"]), "same modules"),
        (LoraConfig(r=3, target_modules=["q_proj"], layers_to_transform=[0]), "same modules"),
        (LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["norm"]), "replaces a weight"),
        (LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj"], alora_invocation_tokens=[5]), "activated"),
    ],
)
def test_an_expert_that_peft_does_not_route(
    config: LoraConfig, why: str, llama: TinyBase, arrow: Path, tmp_path: Path
) -> None:
    shutil.rmtree(arrow / "task_1")
    config.task_type = "CAUSAL_LM"
    make_adapter(llama.folder, arrow / "task_1", config)
    assert why in refusal(arrow, llama).message


def test_a_member_that_is_missing(llama: TinyBase, arrow: Path) -> None:
    shutil.rmtree(arrow / "task_2")
    assert refusal(arrow, llama).param == "task_adapter_names"
    shutil.rmtree(arrow / "arrow_router")
    error = refusal(arrow, llama)
    assert isinstance(error, AdapterFormatError) and "adapter_config.json is missing" in error.message


def test_the_router_alone(llama: TinyBase, arrow: Path) -> None:
    error = refusal(arrow / "arrow_router", llama)
    assert isinstance(error, AdapterUnsupported) and error.param == "arrow_config"


def test_the_way_out_of_general_knowledge(llama: TinyBase, tmp_path: Path) -> None:
    """Saved after its first run, and with the subtraction off, the model is what it was."""
    prompt = [5, 17, 3, 120, 44]
    config = ArrowConfig(top_k=2, rng_seed=1, use_gks=True)
    folder = make_arrow(llama.folder, tmp_path / "arrow", config, r=3, scale=2.0, target_modules=["q_proj", "v_proj"])
    reference = PeftReference(llama.folder, folder)
    expected = reference.logits(prompt)
    torch.testing.assert_close(PeftReference(llama.folder, folder).logits(prompt), expected, rtol=0, atol=0)
    reference.model.save_pretrained(str(tmp_path / "run"))
    assert_parity(llama, tmp_path / "run")  # peft subtracts once more when it loads that
    edit_arrow(tmp_path / "run", gks_adapter_names=["gks_0"])
    assert_parity(llama, tmp_path / "run")
    torch.testing.assert_close(PeftReference(llama.folder, tmp_path / "run").logits(prompt), expected)


@pytest.mark.parametrize("names", [None, [], ["gks_1"], ["task_0"], ["gks_0", "gks_0"], ["gks_0", "gks_1"], "gks_0"])
def test_general_knowledge_that_is_not_there(names: object, llama: TinyBase, general: Path) -> None:
    edit_arrow(general, use_gks=True, gks_adapter_names=names)
    assert refusal(general, llama).param == "gks_adapter_names"


def test_general_knowledge_of_several(llama: TinyBase, general: Path) -> None:
    """Means of A and of B, not of the updates; and what is named must be of the experts' rank."""
    make_lora(llama.folder, general / "gks_1", seed=7, r=3, scale=2.0, target_modules=["q_proj"])
    edit_arrow(general, use_gks=True, gks_adapter_names=["gks_0", "gks_1"])
    assert_parity(llama, general)
    shutil.rmtree(general / "gks_1")
    make_lora(llama.folder, general / "gks_1", seed=7, r=2, target_modules=["q_proj"])
    assert refusal(general, llama).param == "r"


def test_prototypes_from_another_place_on_every_load(llama: TinyBase, tmp_path: Path) -> None:
    """Why ``rng_seed`` must be given."""
    config = ArrowConfig(top_k=1)
    folder = make_arrow(llama.folder, tmp_path / "arrow", config, r=3, scale=2.0, target_modules=["q_proj", "v_proj"])
    # Other prototypes may choose the same experts: some load among several is enough.
    loads = [PeftReference(llama.folder, folder).logits([5, 17, 3, 120, 44]) for _ in range(8)]
    assert max(float((load - loads[0]).abs().max()) for load in loads) > 1e-3
    assert refusal(folder, llama).param == "rng_seed"


def test_an_empty_arrow_config(llama: TinyBase, tmp_path: Path) -> None:
    """peft makes a router of it, and cannot; it is no plain LoRA."""
    folder = make_lora(llama.folder, tmp_path / "lora", target_modules=["q_proj"])
    edit_config(folder, arrow_config={})
    with pytest.raises(AttributeError):
        PeftReference(llama.folder, folder)
    assert refusal(folder, llama).param == "arrow_config"


def test_the_store_keeps_the_members(llama: TinyBase, arrow: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    version = store.add(arrow)
    store.verify(version)
    assert digest(arrow) == version and store.size(version) > 0
    assert compile_adapter(store.path(version), llama.base, version=version).rank == 9
    (store.path(version) / "task_1" / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterFormatError, match="damaged"):
        store.verify(version)
    store.remove(version)
    edit_config(arrow / "task_1", lora_alpha=77)
    assert store.add(arrow) != version


def test_a_link_to_a_member_is_refused(llama: TinyBase, arrow: Path, tmp_path: Path) -> None:
    (arrow / "task_1").rename(tmp_path / "elsewhere")
    (arrow / "task_1").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterFormatError, match=r"task_1/adapter_config\.json cannot be opened"):
        Store(tmp_path / "store").add(arrow)

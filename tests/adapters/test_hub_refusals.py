"""AdapterHub's adapters: what cannot be served exactly is refused, with the field or tensor named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.adapters.conftest import TinyBase
from tests.support.hub import ARCHITECTURES, FOLDER, adapters_of, base_of
from weft.adapters.base import Base
from weft.adapters.checkpoint import Tensors
from weft.adapters.config_fields import FieldTable
from weft.adapters.errors import (
    AdapterError,
    AdapterFormatError,
    AdapterMismatch,
    AdapterUnsupported,
    BaseWeightsNeeded,
)
from weft.adapters.files import HUB_WEIGHTS
from weft.adapters.forms import PrefixKV
from weft.adapters.methods import compile_adapter
from weft.adapters.methods.hub import bottleneck, fusion, lora, prefix
from weft.adapters.methods.hub.saved import ENVELOPE
from weft.adapters.store import Store


@pytest.fixture(scope="module", params=ARCHITECTURES)
def any_base(request: pytest.FixtureRequest) -> Base:
    return Base.of(AutoModelForCausalLM.from_pretrained(base_of(request.param)))


@pytest.fixture(scope="module")
def base() -> Base:
    return Base.of(AutoModelForCausalLM.from_pretrained(base_of("llama")))


@pytest.fixture
def copy(tmp_path: Path) -> Callable[..., Path]:
    """``copy("seq_bn", r=4)``: an adapter of the tiny Llama with other fields in its config."""

    def make(name: str, **fields: object) -> Path:
        folder = tmp_path / "adapter"
        shutil.copytree(FOLDER / "llama" / name, folder)
        edit(folder / "adapter_config.json", lambda whole: whole["config"].update(fields)) if fields else None
        return folder

    return make


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    whole = json.loads(file.read_text())
    change(whole)
    file.write_text(json.dumps(whole))


def refusal(folder: Path, base: Base) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        compile_adapter(folder, base, version="v")
    return caught.value


def test_every_fixture_is_read_whole(any_base: Base) -> None:
    for folder in adapters_of(any_base.model_type).values():
        adapter = compile_adapter(folder, any_base, version="v")
        assert adapter.sites or adapter.prompt
        assert adapter.method.startswith("AdapterHub ")


@pytest.mark.parametrize(
    ("name", "config"),
    [
        (
            "seq_bn",
            {"output_adapter": True, "original_ln_before": True, "reduction_factor": 4, "non_linearity": "relu"},
        ),
        ("double_seq_bn", {"output_adapter": True, "mh_adapter": True, "reduction_factor": 8, "non_linearity": "silu"}),
    ],
)
def test_the_least_that_a_folder_needs(name: str, config: dict[str, object], base: Base, tmp_path: Path) -> None:
    """Two files, for programs that write this format without the library."""
    saved = FOLDER / "llama" / name
    tensors = Tensors(next(file for file in saved.iterdir() if file.name in HUB_WEIGHTS))
    save_file({tensor: tensors.take(tensor) for tensor in tensors.left}, tmp_path / "adapter.safetensors")
    whole = {"config": config, "model_type": "llama", "name": name, "version": "adapters.1.3.0"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(whole))
    adapter, expected = (compile_adapter(folder, base, version="v") for folder in (tmp_path, saved))
    assert adapter.sites.keys() == expected.sites.keys()
    for path, forms in adapter.sites.items():
        one, other = forms.bottleneck, expected.sites[path].bottleneck
        assert one is not None and other is not None
        assert (one.input, one.activation) == (other.input, other.activation)
        assert all(rows.equal(other.parts()[part]) for part, rows in one.parts().items())


def test_a_union_has_sites_and_a_prompt(base: Base) -> None:
    mam = compile_adapter(FOLDER / "llama" / "mam", base, version="v")
    assert mam.forms == ("PrefixKV", "Bottleneck") and len(mam.sites) == 3
    assert isinstance(mam.prompt, PrefixKV) and (mam.prompt.length, mam.prompt.position_offset) == (5, 0)


def test_memory_is_what_the_tensors_need(base: Base) -> None:
    hidden, layers, units = 48, 3, 12
    adapter = compile_adapter(FOLDER / "llama" / "seq_bn", base, version="v")
    assert adapter.nbytes == 4 * layers * (2 * units * hidden + 2 * hidden)
    assert set(adapter.sites) == {f"model.layers.{layer}.mlp" for layer in range(layers)}
    left_out = compile_adapter(FOLDER / "llama" / "seq_bn_wide", base, version="v")
    assert set(left_out.sites) == {"model.layers.1.mlp"}


@pytest.mark.parametrize(
    ("adapter", "table"),
    [("seq_bn", bottleneck.FIELDS), ("lora", lora.FIELDS), ("prefix", prefix.FIELDS), ("a,b,c", fusion.FIELDS)],
)
def test_every_field_that_the_library_writes_is_classified_once(adapter: str, table: FieldTable) -> None:
    folder = FOLDER / "llama" / adapter
    file = folder / "adapter_config.json"
    if adapter == "a,b,c":
        file = FOLDER / "llama" / "fusion_dynamic" / adapter / "adapter_fusion_config.json"
    whole = json.loads(file.read_text())
    assert table.names - {"architecture"} == set(whole["config"]) - {"architecture"}
    assert len(table.names) == len(set(table.honoured)) + len(table.ignored) + len(table.neutral)
    assert set(whole) <= ENVELOPE.names | {"adapter_names"}


@pytest.mark.parametrize(
    ("adapter", "field", "value"),
    [
        ("seq_bn", "ln_before", True),
        ("seq_bn", "ln_after", True),
        ("seq_bn", "inv_adapter", "nice"),
        ("seq_bn", "original_ln_after", False),
        ("seq_bn", "residual_before_ln", False),
        ("seq_bn", "residual_before_ln", "post_add"),
        ("seq_bn", "non_linearity", "mish"),
        ("seq_bn", "later", 1),
        ("seq_bn", "architecture", "reft"),
        ("seq_bn", "architecture", "mtl_lora"),
        ("compacter", "reduction_factor", 0.5),
        ("ia3", "use_gating", True),
        ("dora", "use_gating", True),
        ("lora", "vera_d", 0.1),
        ("lora", "vera_b", 0.0),
        ("prefix", "leave_out", [0]),
    ],
)
def test_an_option_that_changes_the_output(
    adapter: str, field: str, value: object, base: Base, copy: Callable[..., Path]
) -> None:
    error = refusal(copy(adapter, **{field: value}), base)
    assert isinstance(error, AdapterUnsupported) and error.param == field


@pytest.mark.parametrize(
    ("adapter", "field", "value"),
    [
        *(("seq_bn", "reduction_factor", value) for value in (0, -1, None, "16", 1e-9, {"1": 4})),
        ("seq_bn", "leave_out", ["0"]),
        ("seq_bn", "scaling", "much"),
        ("seq_bn", "output_adapter", "yes"),
        ("compacter", "phm_dim", 0),
        ("lora", "attn_matrices", ["q", "o"]),
        ("lora", "attn_matrices", []),
        ("lora", "r", 0),
        ("lora", "composition_mode", "multiply"),
        ("ia3", "r", 2),
        ("prefix", "prefix_length", 1 << 40),
    ],
)
def test_a_field_that_is_wrong(adapter: str, field: str, value: object, base: Base, copy: Callable[..., Path]) -> None:
    error = refusal(copy(adapter, **{field: value}), base)
    assert isinstance(error, AdapterFormatError) and error.param == field


@pytest.mark.parametrize(
    ("adapter", "field", "value"),
    [
        ("seq_bn", "reduction_factor", 8),
        ("seq_bn", "mh_adapter", True),
        ("seq_bn", "leave_out", [1]),
        ("seq_bn", "scaling", "learned"),
        ("compacter", "phm_dim", 3),
        ("compacter", "shared_phm_rule", False),
        ("lora", "intermediate_lora", False),
        ("dora", "use_dora", False),
        ("prefix", "flat", True),
        ("prefix", "bottleneck_size", 7),
        *((adapter, "use_gating", True) for adapter in ("seq_bn", "lora", "prefix")),
        ("gated_par_bn", "use_gating", False),
    ],
)
def test_tensors_that_do_not_fit_the_config(
    adapter: str, field: str, value: object, base: Base, copy: Callable[..., Path]
) -> None:
    assert isinstance(refusal(copy(adapter, **{field: value}), base), AdapterMismatch)


def test_gates_need_whole_prompts(any_base: Base) -> None:
    for name, folder in adapters_of(any_base.model_type).items():
        adapter = compile_adapter(folder, any_base, version="v")
        assert adapter.whole_prompts == (name in ("unipelt", "unipelt_own", "gated_par_bn"))
        assert replace(adapter, sites={}).whole_prompts == adapter.whole_prompts, "what is kept of it says so too"


@pytest.mark.parametrize(("name", "index", "shared"), [("unipelt", 0, False), ("unipelt_own", 0, True)])
def test_a_prefix_has_as_many_gates_as_it_says(
    name: str, index: int, shared: bool, base: Base, copy: Callable[..., Path]
) -> None:
    folder = copy(name)
    edit(folder / "adapter_config.json", lambda whole: whole["config"]["configs"][index].update(shared_gating=shared))
    error = refusal(folder, base)
    assert isinstance(error, AdapterMismatch) and "prefix_gates" in error.message


def test_a_gated_prefix_twice(base: Base, copy: Callable[..., Path]) -> None:
    folder = copy("unipelt")
    twice = {"shared_gating": True, "prefix_length": 5, "bottleneck_size": 6, "use_gating": True}
    edit(
        folder / "adapter_config.json",
        lambda whole: whole["config"]["configs"].append({"architecture": "prefix_tuning", **twice}),
    )
    assert isinstance(refusal(folder, base), AdapterMismatch | AdapterUnsupported)


def test_gated_members_of_a_fusion(base: Base, copy: Callable[..., Path]) -> None:
    folder = copy("fusion_dynamic")
    edit(folder / "c" / "adapter_config.json", lambda whole: whole["config"].update(use_gating=True))
    file = folder / "c" / "pytorch_adapter.bin"
    tensors = torch.load(file, weights_only=True)
    for name in [name for name in tensors if name.endswith("adapter_up.bias")]:
        gate = name.replace("adapter_up.bias", "gate")
        tensors |= {f"{gate}.weight": torch.ones(1, base.hidden_size), f"{gate}.bias": torch.ones(1)}
    torch.save(tensors, file)
    error = refusal(folder, base)
    assert isinstance(error, AdapterUnsupported) and error.param == "use_gating"


def test_dora_on_conv1d(tmp_path: Path) -> None:
    gpt2 = Base.of(AutoModelForCausalLM.from_pretrained(base_of("gpt2")))
    folder = tmp_path / "adapter"
    shutil.copytree(FOLDER / "gpt2" / "lora", folder)
    edit(folder / "adapter_config.json", lambda whole: whole["config"].update(use_dora=True))
    assert refusal(folder, gpt2).param == "use_dora"


@pytest.mark.parametrize(
    ("field", "value"), [("model_type", "gpt2"), ("hidden_size", 64), ("name", "a.b"), ("name", "x")]
)
def test_the_wrong_base_or_name(field: str, value: object, base: Base, copy: Callable[..., Path]) -> None:
    folder = copy("seq_bn")
    edit(folder / "adapter_config.json", lambda whole: whole.update({field: value}))
    assert isinstance(refusal(folder, base), AdapterMismatch | AdapterFormatError)


def test_an_architecture_without_known_sublayers(
    tiny_base: Callable[[str], TinyBase], copy: Callable[..., Path]
) -> None:
    gemma = tiny_base("gemma2").base
    folder = copy("seq_bn")
    change = {"model_type": gemma.model_type, "hidden_size": gemma.hidden_size}
    edit(folder / "adapter_config.json", lambda whole: whole.update(change))
    (folder / "pytorch_model_head.bin").unlink()
    error = refusal(folder, gemma)
    assert isinstance(error, AdapterUnsupported) and "llama, mistral" in error.message


def test_a_head_of_its_own(base: Base, copy: Callable[..., Path]) -> None:
    folder = copy("seq_bn")
    file = folder / "pytorch_model_head.bin"
    head = torch.load(file, weights_only=True)["lm_head.weight"]
    torch.save({"lm_head.weight": head + 0.01}, file)
    error = refusal(folder, base)
    assert isinstance(error, AdapterUnsupported) and "replaces the head" in error.message
    torch.save({"heads.default.weight": head}, file)
    assert refusal(folder, base).param == "heads.default.weight"


def test_a_head_can_only_be_compared_with_weights(copy: Callable[..., Path]) -> None:
    config = AutoConfig.from_pretrained(base_of("llama"))
    with torch.device("meta"):
        shape = Base.of(AutoModelForCausalLM.from_config(config))
    folder = copy("seq_bn")
    assert isinstance(refusal(folder, shape), BaseWeightsNeeded)
    (folder / "pytorch_model_head.bin").unlink()
    assert compile_adapter(folder, shape, version="v").forms == ("Bottleneck",)


def test_copies_of_a_prefix_that_differ(base: Base, copy: Callable[..., Path]) -> None:
    folder = copy("prefix")
    file = folder / "pytorch_adapter.bin"
    tensors = torch.load(file, weights_only=True)
    name = next(name for name in tensors if ".2." in name and name.endswith("wte.weight"))
    torch.save({**tensors, name: tensors[name] + 1}, file)
    error = refusal(folder, base)
    assert isinstance(error, AdapterMismatch) and "differs between layers" in error.message


def test_a_tensor_too_many_and_one_too_few(base: Base, copy: Callable[..., Path]) -> None:
    folder = copy("seq_bn")
    file = folder / "pytorch_adapter.bin"
    tensors = torch.load(file, weights_only=True)
    torch.save({**tensors, "another": torch.ones(2)}, file)
    assert refusal(folder, base).param == "another"
    missing = next(iter(tensors))
    del tensors[missing]
    torch.save(tensors, file)
    error = refusal(folder, base)
    assert isinstance(error, AdapterMismatch) and error.param == missing


def test_weights_in_two_files(base: Base, copy: Callable[..., Path]) -> None:
    folder = copy("seq_bn")
    save_file(torch.load(folder / "pytorch_adapter.bin", weights_only=True), folder / "adapter.safetensors")
    assert "weights twice" in refusal(folder, base).message
    (folder / "pytorch_adapter.bin").unlink()
    assert compile_adapter(folder, base, version="v").forms == ("Bottleneck",)


@pytest.mark.parametrize("version", ["adapters.1.0.1", "adapters.0.2.2", "adapters.1.1.0", "3.2.1"])
def test_the_scale_of_lora_before_1_1(version: str, base: Base, copy: Callable[..., Path]) -> None:
    """The library sets alpha to r when it loads what these versions saved."""
    folder = copy("lora")
    expected = compile_adapter(folder, base, version="v")
    edit(folder / "adapter_config.json", lambda whole: whole.update(version=version))
    adapter = compile_adapter(folder, base, version="v")
    old = version in ("adapters.1.0.1", "adapters.0.2.2")
    for path, forms in adapter.sites.items():
        one, other = forms.low_rank, expected.sites[path].low_rank
        assert one is not None and other is not None
        torch.testing.assert_close(one.b, other.b / 2.5 if old else other.b)


def test_an_interface_of_another_kind(tmp_path: Path) -> None:
    qwen = Base.of(AutoModelForCausalLM.from_pretrained(base_of("qwen2")))
    folder = tmp_path / "adapter"
    shutil.copytree(FOLDER / "qwen2" / "seq_bn", folder)
    edit(folder / "adapter_interface.json", lambda whole: whole["interface"].update(layer_ln_2="x"))
    error = refusal(folder, qwen)
    assert isinstance(error, AdapterUnsupported) and "layer_ln_2" in error.message


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("adapter_setup.json", {"head_setup": "a"}),
        ("adapter_setup.json", {"adapter_setup": {"type": "Stack", "children": []}}),
        (
            "adapter_setup.json",
            {"adapter_setup": {"type": "Fuse", "children": [{"type": "single", "children": ["a"]}]}},
        ),
        ("a,b,c/adapter_fusion_config.json", {"adapter_names": ["a", "b"]}),
        *(
            ("a,b,c/adapter_fusion_config.json", {"config": {"key": True, "query": True, "value": True, field: True}})
            for field in ("residual_before", "temperature", "query_before_ln")
        ),
        ("a,b,c/adapter_fusion_config.json", {"config": {"key": False, "query": True}}),
        ("a,b,c/adapter_fusion_config.json", {"config": {"key": True, "query": True, "value": False}}),
        ("b/adapter_config.json", {"name": "x"}),
    ],
)
def test_a_fusion_that_is_not_served(
    file: str, change: dict[str, object], base: Base, copy: Callable[..., Path]
) -> None:
    folder = copy("fusion_dynamic")
    edit(folder / file, lambda whole: whole.update(change))
    assert isinstance(refusal(folder, base), AdapterUnsupported | AdapterMismatch)


def test_members_of_a_fusion_that_are_not_served(base: Base, copy: Callable[..., Path]) -> None:
    folder = copy("fusion_dynamic")
    config = folder / "c" / "adapter_config.json"
    before = config.read_text()
    for field, value in (("is_parallel", True), ("leave_out", [0])):
        edit(config, lambda whole: whole["config"].update({field: value}))  # noqa: B023
        refusal(folder, base)
        config.write_text(before)
    shutil.copytree(folder / "a", folder / "other")
    assert "does not name the folder" in refusal(folder, base).message
    shutil.rmtree(folder / "other")
    shutil.rmtree(folder / "b")
    assert "no folder of its own" in refusal(folder, base).message
    (folder / "b").symlink_to(folder / "a")
    assert "no folder of its own" in refusal(folder, base).message


def test_the_store_keeps_a_fusion_whole(base: Base, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    source = FOLDER / "llama" / "fusion_dynamic"
    version = store.add(source)
    store.verify(version)
    kept = store.path(version)
    files = {file.relative_to(source) for file in source.rglob("*") if file.is_file()}
    assert {file.relative_to(kept) for file in kept.rglob("*") if file.is_file()} == files
    assert store.size(version) == sum((source / file).stat().st_size for file in files)
    assert compile_adapter(kept, base, version=version).forms == ("Fusion",)
    assert store.add(FOLDER / "llama" / "fusion_double") != version
    store.remove(version)
    assert version not in store.versions()

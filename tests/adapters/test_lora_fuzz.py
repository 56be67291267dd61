"""Fuzzing: whatever the options, either parity with peft or a refusal; whatever the bytes, an AdapterError."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.adapters.conftest import TinyBase
from tests.adapters.test_lora_parity import assert_parity
from tests.support.adapters import PeftReference, make_lora
from weft.adapters.errors import AdapterError, AdapterMismatch, AdapterUnsupported
from weft.adapters.methods import compile_adapter

LLAMA_NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
GPT2_NAMES = ["c_attn", "c_fc", "c_proj", "lm_head", "attn.c_proj"]
REFUSABLE = {"init_lora_weights", "bias", "modules_to_save", "ensure_weight_tying", "task_type"}
RANKS = st.integers(1, 12)
ALPHAS = st.one_of(st.integers(-16, 64).filter(bool), st.floats(0.1, 50))


def lora_configs(names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    keys = st.sampled_from(
        [*names, "^transformer.h.0.attn.c_attn", r"layers\.1\..*", r"[a-z]\.[02]\..*proj", "nothing"]
    )
    return st.fixed_dictionaries(
        {
            "target_modules": st.one_of(
                st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True),
                st.just("all-linear"),
                st.sampled_from([rf".*[02].*({'|'.join(names)})", rf"(?!.*1).*\.{names[0]}"]),
            )
        },
        optional={
            "r": RANKS,
            "lora_alpha": ALPHAS,
            "use_rslora": st.booleans(),
            "lora_bias": st.booleans(),
            "fan_in_fan_out": st.booleans(),
            "lora_dropout": st.floats(0, 0.9),
            "rank_pattern": st.dictionaries(keys, RANKS, max_size=3),
            "alpha_pattern": st.dictionaries(keys, ALPHAS, max_size=3),
            "layers_to_transform": st.lists(st.integers(0, 3), min_size=1, max_size=2),
            "exclude_modules": st.one_of(
                st.lists(st.sampled_from(names), min_size=1, max_size=2), st.just(rf".*0.*{names[0]}")
            ),
            "init_lora_weights": st.sampled_from([True, False, "gaussian", "orthogonal", "mica", "olora", "pissa"]),
            "use_dora": st.just(False) | st.booleans(),
            "bias": st.sampled_from(["none", "none", "none", "all", "lora_only"]),
            "modules_to_save": st.sampled_from([None, None, ["norm"], ["lm_head"]]),
            "ensure_weight_tying": st.booleans(),
            "task_type": st.sampled_from(["CAUSAL_LM", "CAUSAL_LM", None, "SEQ_CLS"]),
        },
    )


def check_parity_or_refusal(tiny: TinyBase, config: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            folder = make_lora(tiny.folder, Path(scratch) / "adapter", **config)
        except (ValueError, TypeError, RuntimeError):
            return  # peft itself does not take this combination
        try:
            PeftReference(tiny.folder, folder).logits([5, 17])
        except RuntimeError:
            # peft saves patterns in alphabetical order, so that another of two may apply to a module on reload; of a
            # Conv1D it makes OLoRA's factors with the dimensions exchanged, and cannot run them.
            with pytest.raises(AdapterError):
                compile_adapter(folder, tiny.base, version="v")
            return
        try:
            assert_parity(tiny, folder)
        except AdapterUnsupported as error:
            # Where the head is tied, ensure_weight_tying makes peft target the embedding too.
            tying = {"target_modules"} if config.get("ensure_weight_tying") else set()
            # PiSSA's factors are divided by the root of the scale.
            roots = {"lora_alpha"} if config.get("init_lora_weights") == "pissa" else set()
            assert error.param in (REFUSABLE & config.keys()) | tying | roots
        except AdapterMismatch as error:
            # And the config that peft saves then may no longer target the head, whose factors it saves.
            assert config.get("ensure_weight_tying") and "lm_head" in str(error)


@given(config=lora_configs(LLAMA_NAMES))
@settings(max_examples=40, deadline=None)
def test_llama_config(config: dict[str, Any], tiny_base: Callable[[str], TinyBase]) -> None:
    check_parity_or_refusal(tiny_base("llama"), config)


@given(config=lora_configs(GPT2_NAMES))
@example(config={"target_modules": "all-linear", "init_lora_weights": "olora"})
@settings(max_examples=30, deadline=None)
def test_gpt2_config(config: dict[str, Any], tiny_base: Callable[[str], TinyBase]) -> None:
    check_parity_or_refusal(tiny_base("gpt2"), config)


@pytest.fixture(scope="module")
def files(tiny_base: Callable[[str], TinyBase], tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """Config and weights of a sound adapter."""
    folder = make_lora(tiny_base("llama").folder, tmp_path_factory.mktemp("sound") / "adapter", r=2)
    return (folder / "adapter_config.json").read_bytes(), (folder / "adapter_model.safetensors").read_bytes()


def compile_bytes(tiny: TinyBase, config: bytes, weights: bytes) -> bool:
    """Whether it is served; anything but an AdapterError fails the test."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "adapter_config.json").write_bytes(config)
        (folder / "adapter_model.safetensors").write_bytes(weights)
        try:
            compiled = compile_adapter(folder, tiny.base, version="v")
        except AdapterError as error:
            assert error.message.isprintable() and len(error.message) < 1000
            return False
    tensors = [tensor for forms in compiled.sites.values() for tensor in forms.parts().values()]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
    return True


@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_weights(data: st.DataObject, files: tuple[bytes, bytes], llama: TinyBase) -> None:
    config, weights = files
    mutated = bytearray(weights)
    # Most of the interesting bytes are in the header.
    places = st.integers(0, 400) | st.integers(0, len(weights) - 1)
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=4)):
        mutated[place] = value
    cut = data.draw(st.just(len(weights)) | st.integers(0, len(weights)))
    tail = data.draw(st.just(b"") | st.binary(max_size=9))
    compile_bytes(llama, config, bytes(mutated[:cut]) + tail)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=6,
)


@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_config(data: st.DataObject, files: tuple[bytes, bytes], llama: TinyBase) -> None:
    config, weights = files
    fields = json.loads(config)
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(fields)) | st.text(max_size=5), json_values, max_size=2))
    compile_bytes(llama, json.dumps(fields | changes).encode(), weights)


@given(config=st.binary(max_size=200))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_config_of_any_bytes(config: bytes, files: tuple[bytes, bytes], llama: TinyBase) -> None:
    assert not compile_bytes(llama, config, files[1])


def test_sound_files_are_served(files: tuple[bytes, bytes], llama: TinyBase) -> None:
    """Else the fuzzing above would only ever see refusals."""
    assert compile_bytes(llama, *files)

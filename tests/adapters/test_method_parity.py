"""Every method beside plain LoRA: adapters saved by peft, compiled to forms, against peft with the adapter alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, TrainableTokensConfig

from tests.adapters.cases import all_cases, all_gpt2_cases, chosen_of
from tests.adapters.conftest import TinyBase
from tests.support.adapters import PeftReference, make_adapter
from tests.support.forms import applied
from tests.support.models import ARCHITECTURES, MIXTURES
from weft.adapters.methods import METHODS, compile_adapter

PROMPT = [5, 17, 3, 120, 44, 9, 77, 31]
TOLERANCE = 1e-5
"""Of the largest logit."""

WITHOUT = set() if find_spec("sklearn") else {"ADAMSS"}
"""Methods whose extra is not installed."""

CASES = all_cases()
GPT2_CASES = all_gpt2_cases()


def assert_parity(tiny: TinyBase, folder: Path, chosen: dict[str, int] | None = None) -> None:
    """The compiled forms, applied by hand to the base, give peft's logits; and the adapter does something."""
    expected = PeftReference(tiny.folder, folder, (chosen or {}).get("task_id")).logits(PROMPT)
    compiled = compile_adapter(folder, tiny.base, version="v", chosen=chosen)
    with torch.no_grad(), applied(tiny.model, compiled):
        actual = tiny.model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits[0]
    size = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * size)
    # What refuses adapters that could never fit must not refuse one that just does.
    compile_adapter(folder, replace(tiny.base, adapter_memory=compiled.nbytes), version="v")
    base = PeftReference(tiny.folder).logits(PROMPT)
    assert 0.02 * size < float((base - expected).abs().max()) and size < 100, "an adapter that proves nothing"


@pytest.mark.parametrize("case", CASES)
def test_case_equals_peft(case: str, llama: TinyBase, tmp_path: Path) -> None:
    assert_parity(llama, make_adapter(llama.folder, tmp_path / "adapter", CASES[case]), chosen_of(CASES[case]))


@pytest.mark.parametrize("case", GPT2_CASES)
def test_case_on_conv1d_equals_peft(case: str, tiny_base: Callable[[str], TinyBase], tmp_path: Path) -> None:
    gpt2 = tiny_base("gpt2")
    assert_parity(gpt2, make_adapter(gpt2.folder, tmp_path / "adapter", GPT2_CASES[case]))


def test_every_method_has_a_case() -> None:
    methods = {config.peft_type.value for config in (*CASES.values(), *GPT2_CASES.values())}
    assert methods | WITHOUT == set(METHODS)


@pytest.mark.parametrize("arch", ARCHITECTURES + MIXTURES)
@pytest.mark.parametrize("what", ["dora", "norms", "embedding", "tokens"])
def test_every_architecture_equals_peft(
    what: str, arch: str, tiny_base: Callable[[str], TinyBase], tmp_path: Path
) -> None:
    tiny = tiny_base(arch)
    assert tiny.base.embedding is not None
    embedding = tiny.base.embedding.path.rpartition(".")[2]
    linears = [path for path in tiny.base.sites if path != tiny.base.head]
    if arch in MIXTURES:  # names of dense feed-forward layers are among those that peft rewrites
        linears = [path for path in linears if "attn" in path]
    config = {
        "dora": LoraConfig(task_type="CAUSAL_LM", target_modules=linears, use_dora=True),
        "norms": LNTuningConfig(task_type="CAUSAL_LM", target_modules=list(tiny.base.norms)),
        "embedding": LoraConfig(task_type="CAUSAL_LM", lora_alpha=30, target_modules=[embedding]),
        "tokens": TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=PROMPT[:4], target_modules=[embedding]),
    }[what]
    assert_parity(tiny, make_adapter(tiny.folder, tmp_path / "adapter", config))

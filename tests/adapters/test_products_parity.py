"""Where peft's result hangs on rounding, or on what the file holds though it could be computed again."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import DeloraConfig, HRAConfig, PeftConfig, PeftModel, RandLoraConfig, VeraConfig
from transformers import AutoModelForCausalLM

from tests.adapters.cases.basic import LINEARS
from tests.adapters.cases.products import CASES
from tests.adapters.conftest import TinyBase
from tests.adapters.test_method_parity import PROMPT, assert_parity
from tests.support.adapters import PeftReference, edit_tensors, make_adapter
from tests.support.forms import applied
from weft.adapters.base import Base
from weft.adapters.methods import compile_adapter


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("scale", [1e-2, 1e-4])
def test_reflections_that_are_nearly_pairs(orthogonal: bool, scale: float, llama: TinyBase, tmp_path: Path) -> None:
    """As HRA begins. What Gram-Schmidt leaves of the second of a pair is mostly rounding."""
    config = HRAConfig(r=8, apply_GS=orthogonal, target_modules=LINEARS)
    folder = make_adapter(llama.folder, tmp_path / "adapter", config, scale=scale)
    expected = PeftReference(llama.folder, folder).logits(PROMPT)
    with torch.no_grad(), applied(llama.model, compile_adapter(folder, llama.base, version="v")):
        actual = llama.model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("config", "ending"),
    [
        (VeraConfig(r=12), "vera_A"),
        (RandLoraConfig(r=8, randlora_alpha=1), "randlora_B"),
        (DeloraConfig(r=4, delora_lambda=2), "delora_w_norm"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_saved_counts(config: PeftConfig, ending: str, llama: TinyBase, tmp_path: Path) -> None:
    folder = make_adapter(llama.folder, tmp_path / "adapter", config)

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: t * 1.5 if name.endswith(ending) else t for name, t in tensors.items()}

    before = PeftReference(llama.folder, folder).logits(PROMPT)
    edit_tensors(folder, change)
    assert (PeftReference(llama.folder, folder).logits(PROMPT) - before).abs().max() > 0.05
    assert_parity(llama, folder)


@pytest.mark.parametrize("case", ["vera_unsaved", "randlora_unsaved", "randlora_sparse", "randlora_very_sparse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_projections_drawn_for_a_narrow_dtype(case: str, dtype: torch.dtype, llama: TinyBase, tmp_path: Path) -> None:
    """peft rounds them to the dtype of the base's weights."""
    folder = make_adapter(llama.folder, tmp_path / "adapter", CASES[case])
    model = AutoModelForCausalLM.from_pretrained(llama.folder, dtype=dtype)
    compiled = compile_adapter(folder, Base.of(model), version="v", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = PeftModel.from_pretrained(model, str(folder)).base_model.model
    for path, forms in compiled.sites.items():
        low_rank = forms.low_rank
        delta = forms.delta if low_rank is None else low_rank.b @ low_rank.a
        torch.testing.assert_close(delta, reference.get_submodule(path).get_delta_weight("default").float())

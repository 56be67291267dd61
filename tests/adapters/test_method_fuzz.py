"""Fuzzing every method: a folder that peft saved, a little changed, is refused or is what peft makes of that folder."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.adapters.cases import all_cases
from tests.adapters.conftest import TinyBase
from tests.engine.test_prompts import prompt_configs
from tests.support.adapters import PeftReference, edit_tensors, make_adapter
from tests.support.forms import applied
from weft.adapters.errors import AdapterError
from weft.adapters.forms import CompiledAdapter, SoftPrompt
from weft.adapters.methods import compile_adapter

PROMPT = [5, 17, 3, 120, 44, 9, 77, 31]
CASES = {**all_cases(), **prompt_configs()}
NAMES = ["q_proj", "v_proj", "down_proj", "lm_head", "embed_tokens", "norm", "mlp", "0.mlp.up_proj", "proj"]
TOLERANCE = 1e-4
"""Of the largest logit: mutations can make an adapter badly conditioned."""

values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 12),
    st.sampled_from(
        [0.0, 0.5, 1.0, 3.5, -1.0, 1e30, "none", "all", "", "x", "lora_only", [], {}, [0], [0, 2], 1 << 70]
    ),
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=3),
    st.sampled_from([r".*\.1\..*(q_proj|up_proj)", ".*", "all-linear", r".*norm", "("]),
    st.dictionaries(st.sampled_from(NAMES), st.integers(1, 9), max_size=2),
)
Change = Callable[[dict[str, torch.Tensor], str], dict[str, torch.Tensor]]
CHANGES: list[Change] = [
    lambda tensors, name: {n: t for n, t in tensors.items() if n != name},
    lambda tensors, name: {n if n != name else f"{n}.more": t for n, t in tensors.items()},
    lambda tensors, name: {n if n != name else n.replace("layers.0", "layers.2"): t for n, t in tensors.items()},
    lambda tensors, name: tensors | {name: tensors[name].transpose(0, -1).contiguous()},
    lambda tensors, name: tensors | {name: tensors[name][:-1].clone()},
    lambda tensors, name: tensors | {name: tensors[name].flatten()},
    lambda tensors, name: tensors | {name: tensors[name] * 2},
    lambda tensors, name: tensors | {name: tensors[name] * float("nan")},
    lambda tensors, name: (
        tensors | {name: tensors[name].half() if tensors[name].is_floating_point() else tensors[name]}
    ),
    lambda tensors, name: tensors | {f"{name}_more": tensors[name].clone()},
]


@pytest.fixture(scope="module")
def saved(tiny_base: Callable[[str], TinyBase], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A case as peft saves it; not to be changed."""

    @cache
    def make(case: str) -> Path:
        folder = tmp_path_factory.mktemp("saved") / "adapter"
        return make_adapter(tiny_base("llama").folder, folder, CASES[case])

    return make


def change(folder: Path, data: st.DataObject) -> None:
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text())
    for name in data.draw(st.lists(st.sampled_from(sorted(fields.keys() - {"peft_type"})), max_size=2), "fields"):
        if data.draw(st.booleans(), "removed"):
            fields.pop(name, None)
        else:
            kind, value = type(fields.get(name)), data.draw(values, name)
            # Half the time a value of the same type, which is more likely to be taken.
            fields[name] = kind(value) if kind in (int, bool) and isinstance(value, int | bool) else value
    path.write_text(json.dumps(fields))
    if data.draw(st.integers(0, 2), "tensors") == 0:
        edit = data.draw(st.sampled_from(CHANGES))
        edit_tensors(folder, lambda tensors: edit(tensors, data.draw(st.sampled_from(sorted(tensors)), "tensor")))


def check_equals_peft(tiny: TinyBase, folder: Path, compiled: CompiledAdapter) -> None:
    try:
        reference: Any = PeftReference(tiny.folder, folder)
        expected = reference.logits(PROMPT)
    except Exception:
        return  # peft cannot run it, so there is nothing it could be other than
    if isinstance(compiled.prompt, SoftPrompt):
        torch.testing.assert_close(reference.model.get_prompt(batch_size=1)[0], compiled.prompt.embeddings)
    if compiled.prompt is not None:
        return
    with torch.no_grad(), applied(tiny.model, compiled):
        actual = tiny.model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits[0]
    size = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * size, equal_nan=True)


def refused_or_equal(tiny: TinyBase, sound: Path, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = shutil.copytree(sound, Path(scratch) / "adapter")
        change(folder, data)
        try:
            compiled = compile_adapter(folder, tiny.base, version="v")
        except AdapterError as error:
            assert error.message.isprintable() and len(error.message) < 1000
            return
        check_equals_peft(tiny, folder, compiled)


@given(case=st.sampled_from(sorted(CASES)), data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_little_changed(
    case: str, data: st.DataObject, saved: Callable[[str], Path], tiny_base: Callable[[str], TinyBase]
) -> None:
    refused_or_equal(tiny_base("llama"), saved(case), data)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("case", sorted(CASES))
def test_every_case_a_little_changed(case: str, saved: Callable[[str], Path], llama: TinyBase) -> None:
    @given(data=st.data())
    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
    def run(data: st.DataObject) -> None:
        refused_or_equal(llama, saved(case), data)

    run()

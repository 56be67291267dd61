"""The choice of modules against peft's own functions."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from tests.adapters.conftest import TinyBase
from weft.adapters.config_fields import ConfigFields
from weft.adapters.errors import AdapterError
from weft.adapters.methods.targets import match_patterns, targeted_sites

NAMES = [
    "q_proj",
    "v_proj",
    "c_attn",
    "proj",
    "0.self_attn.q_proj",
    "self_attn.o_proj",
    "lm_head",
    "mlp.up_proj",
    ".x",
    "model.layers.1.mlp.up_proj",
]
PATTERNS = [
    r".*q_proj",
    r".*\.(q|v)_proj",
    r"model\.layers\.[01]\..*_proj",
    r"(?!.*mlp).*_proj",
    r"(?i).*Q_PROJ",
    r"lm_head",
    r"model.layers.1.mlp.up_proj",
    r"(.*layers.*)",
    r".*\d.*",
    "",
]
KEYS = [
    "q_proj",
    "^q_proj",
    "model.layers.0.self_attn.q_proj",
    "^model.layers.1.self_attn.q_proj",
    "layers.1.mlp.up_proj",
    "layersX1.mlp.up_proj",
    r"layers\.\d+\.mlp\..*",
    "up_proj$",
    "oj",
    "",
    ".",
    "_proj",
    r"(q|k)_proj",
    r".*",
]


def peft_paths(tiny: TinyBase, fields: dict[str, Any]) -> list[str]:
    config = LoraConfig(**fields)
    return [path for path in tiny.base.module_paths if path and check_target_module_exists(config, path)]


def our_paths(tiny: TinyBase, fields: dict[str, Any]) -> list[str]:
    try:
        return [site.path for site in targeted_sites(ConfigFields(fields), tiny.base, {})]
    except AdapterError as error:
        if "selects no module" in error.message:
            return []
        raise


names = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4)
list_configs = st.fixed_dictionaries(
    {"target_modules": names},
    optional={
        "exclude_modules": st.one_of(names, st.sampled_from(PATTERNS)),
        "layers_to_transform": st.one_of(st.integers(-1, 4), st.lists(st.integers(0, 4), max_size=3)),
    },
)
pattern_configs = st.fixed_dictionaries(
    {"target_modules": st.sampled_from(PATTERNS)},
    optional={"exclude_modules": st.one_of(names, st.sampled_from(PATTERNS))},
)


@given(fields=st.one_of(list_configs, pattern_configs))
@settings(max_examples=100, deadline=None)
def test_selection_is_pefts(fields: dict[str, Any], tiny_base: Callable[[str], TinyBase]) -> None:
    for arch in ("llama", "gpt2"):
        tiny = tiny_base(arch)
        expected = peft_paths(tiny, fields)
        if set(expected) <= set(tiny.base.sites):
            assert our_paths(tiny, fields) == expected
        else:
            with pytest.raises(AdapterError, match="not a linear layer"):
                our_paths(tiny, fields)


@pytest.mark.parametrize("layers_pattern", ["layers", "h", r"lay\w*", ["h", "layers"], "ayers", "self_attn", "", []])
def test_layers_pattern_is_pefts(layers_pattern: object, tiny_base: Callable[[str], TinyBase]) -> None:
    fields = {"target_modules": ["q_proj", "c_fc"], "layers_to_transform": [1], "layers_pattern": layers_pattern}
    for arch in ("llama", "gpt2"):
        assert our_paths(tiny_base(arch), fields) == peft_paths(tiny_base(arch), fields)


@given(keys=st.lists(st.sampled_from(KEYS), max_size=6, unique=True))
@settings(max_examples=60, deadline=None)
def test_patterns_of_ranks_are_pefts(keys: list[str], tiny_base: Callable[[str], TinyBase]) -> None:
    sites = list(tiny_base("llama").base.sites.values())
    patterns: dict[str, object] = {key: index for index, key in enumerate(keys)}
    expected = {site.path: patterns.get(get_pattern_key(keys, site.path)) for site in sites}
    found = match_patterns(patterns, sites, "rank_pattern")
    assert {site.path: found.get(site.path) for site in sites} == expected


def test_the_samples_are_valid_patterns() -> None:
    for pattern in PATTERNS + KEYS:
        re.compile(rf"(.*\.)?({pattern})$" if pattern in KEYS else pattern)

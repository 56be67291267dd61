"""Patterns mean what Python's ``re`` makes of them, and always end."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.adapters.errors import AdapterFormatError
from weft.adapters.patterns import first_matches, is_plain

PATHS = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.up_proj", "lm_head", "model", ""]


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(
    "pattern",
    [
        r".*q_proj",
        r"model\.layers\.(?P<idx>\d+)",
        r"(?!lm).*",
        r"(?i)LM_HEAD",
        r"(.)(.).*\1\2",
        "",
        r"\w{5}(?=\.).*",
        "m",
    ],
)
def test_matches_as_re_does(pattern: str, full: bool) -> None:
    matcher = re.compile(pattern).fullmatch if full else re.compile(pattern).match
    expected = [(0, m.groupdict().get("idx")) if (m := matcher(path)) else None for path in PATHS]
    assert first_matches([pattern], PATHS, param="x", full=full) == expected


def test_the_first_pattern_wins() -> None:
    hits = first_matches(["nothing", ".*proj", ".*up_proj"], PATHS, param="x", full=True)
    assert hits == [(1, None), (1, None), None, None, None]


@given(pattern=st.from_regex(r"\A\^?[a-z0-9_.\-]{0,12}\$?\Z"), text=st.from_regex(r"\A[a-z0-9_.]{0,14}\Z"))
@settings(max_examples=25, deadline=None)
def test_plain_patterns_match_the_same_in_either_process(pattern: str, text: str) -> None:
    assert is_plain(pattern)
    wrapped = [rf"(.*\.)?({pattern})$"]
    here = first_matches(wrapped, [text], param="x", full=False, plain=True)
    assert here == first_matches(wrapped, [text], param="x", full=False)


@pytest.mark.parametrize("pattern", ["a*", "(a)", "a|b", r"\d", "[ab]", "a{3}", "a+", "é", "a b", "x" * 1001])
def test_what_is_not_plain(pattern: str) -> None:
    assert not is_plain(pattern)


@pytest.mark.parametrize("pattern", ["(", "*", "[", r"\p{L}", "(?P<idx>a)(?P<idx>b)", "a{99999999999}", "(" * 5000])
def test_malformed_pattern(pattern: str) -> None:
    with pytest.raises(AdapterFormatError, match=r"targets: .* is not a regular expression") as caught:
        first_matches([pattern], PATHS, param="targets", full=True)
    assert caught.value.param == "targets"


@pytest.mark.parametrize("pattern", [r"(((\w|\.)*)*)*!", r"(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)\1!", "(a?){64}" * 40])
def test_pattern_that_does_not_end(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.adapters.patterns.CPU_SECONDS", 1)
    text = "model.layers.0.self_attn.q_proj" * 3 + "a" * 64
    try:
        hits = first_matches([pattern], [text], param="targets", full=True)
    except AdapterFormatError as error:
        assert error.param == "targets"
    else:
        assert hits == [None]  # fast enough after all


def test_pattern_that_takes_too_much_memory() -> None:
    with pytest.raises(AdapterFormatError):
        first_matches(["x" * 70_000], PATHS, param="targets", full=True)

"""Sampling against its definitions, and against itself in other company."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weft.server.engine.request import EngineRequest, SamplingParams
from weft.server.engine.sampler import Sample, Sampler, most_likely, uniform
from weft.server.engine.sequence import Sequence

VOCAB = 32
EOS = 1


def sequence(prompt: list[int] | None = None, output: list[int] | None = None, **params: Any) -> Sequence:
    """A decoding sequence with pages for its tokens."""
    prompt = prompt or [3, 4]
    seq = Sequence.start(EngineRequest("r", prompt, SamplingParams(**params)), b"", 1000)
    seq.tokens += output or []
    seq.computed = len(seq.tokens) - 1
    seq.blocks = list(range(len(seq.tokens)))
    return seq


def sample(logits: torch.Tensor, seqs: list[Sequence]) -> list[Sample]:
    chosen = Sampler((EOS,)).choose(logits, seqs)
    return chosen.samples([tensor.tolist() for tensor in chosen.tensors()])


def draw(logits: torch.Tensor, count: int, **params: Any) -> torch.Tensor:
    """How often each token is drawn from one distribution, over ``count`` seeds."""
    seqs = [sequence(seed=seed, **params) for seed in range(count)]
    tokens = [s.token for s in sample(logits.expand(count, -1).clone(), seqs)]
    return torch.bincount(torch.tensor(tokens), minlength=VOCAB).double() / count


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 2


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 6, "top_p": 0.8, "min_p": 0.05}],
)
def test_draws_follow_the_distribution(params: dict[str, Any], logits: torch.Tensor) -> None:
    count = 4000
    probs = (logits.double() / params.get("temperature", 1.0)).softmax(-1)
    order = probs.argsort(descending=True)
    keep = probs >= probs.max() * params.get("min_p", 0.0)
    keep[order[params.get("top_k") or VOCAB :]] = False
    left = (probs * keep)[order] / (probs * keep).sum()
    keep[order[left.cumsum(-1) - left >= params.get("top_p", 1.0)]] = False
    expected = probs * keep / (probs * keep).sum()
    seen = draw(logits, count, **params)
    assert (seen[~keep] == 0).all()
    assert (seen - expected).abs().max() < 4 * math.sqrt(0.25 / count)


def test_a_seeded_draw_does_not_depend_on_company(logits: torch.Tensor) -> None:
    kinds: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"temperature": 0.0}, {"logprobs": 2}, {"presence_penalty": 1.0}]
    alone = [sample(logits[None].clone(), [sequence(seed=7, **kind)])[0].token for kind in kinds]
    others = torch.randn(len(kinds), VOCAB)
    mixed = torch.stack([row for i in range(len(kinds)) for row in (logits, others[i])])
    seqs = [seq for kind in kinds for seq in (sequence(seed=7, **kind), sequence(top_k=3))]
    assert [s.token for s in sample(mixed, seqs)][::2] == alone


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**20))
def test_uniform_is_in_range_and_a_function_of_its_arguments(seed: int, index: int) -> None:
    value = uniform(seed, index)
    assert 0.0 <= value < 1.0
    assert value == uniform(seed, index) != uniform(seed, index + 1)


def test_uniform_is_uniform_over_seeds_and_indices() -> None:
    for values in ([uniform(s, 0) for s in range(5000)], [uniform(0, i) for i in range(5000)]):
        histogram = torch.histc(torch.tensor(values), 20, 0, 1)
        assert ((histogram - 250).square() / 250).sum() < 50  # chi-square, 19 degrees of freedom, p = 1e-4


def test_penalties_and_bias_by_their_formulas(logits: torch.Tensor) -> None:
    seq = sequence(
        [3, 4, 4],
        [6, 6, 9],
        temperature=0.0,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        logit_bias={10: 1.5, 6: -0.5},
    )
    expected = logits.clone()
    expected[10] += 1.5
    expected[6] -= 0.5
    for token in (3, 4, 6, 9):
        expected[token] = expected[token] / 1.3 if expected[token] > 0 else expected[token] * 1.3
    expected[6] -= 0.4 + 0.3 * 2
    expected[9] -= 0.4 + 0.3
    adjusted = Sampler((EOS,))._adjust(logits[None], [seq])[0]
    torch.testing.assert_close(adjusted, expected)
    assert sample(logits[None].clone(), [seq])[0].token == int(expected.argmax())


def test_min_tokens_holds_back_every_end() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS], logits[0, 8], logits[0, 5] = 9, 8, 1
    held = sequence(output=[6], min_tokens=2, stop_token_ids=(8,), temperature=0.0)
    free = sequence(output=[6, 6], min_tokens=2, stop_token_ids=(8,), temperature=0.0)
    assert sample(logits.clone(), [held])[0].token == 5
    assert sample(logits.clone(), [free])[0].token == EOS


def test_logprobs_are_of_the_models_own_distribution(logits: torch.Tensor) -> None:
    seq = sequence(temperature=0.0, logprobs=3, logit_bias={20: 100.0})
    report = sample(logits[None].clone(), [seq])[0].logprobs
    assert report is not None
    expected = logits.log_softmax(-1)
    assert report.token_id == 20
    assert report.logprob == pytest.approx(expected[20].item())
    assert report.rank == int((expected > expected[20]).sum()) + 1
    values, ids = expected.topk(3)
    assert [token for token, _ in report.top] == ids.tolist()
    assert [value for _, value in report.top] == pytest.approx(values.tolist())


def test_the_greedy_token_is_bit_equal_in_its_top_logprobs(logits: torch.Tensor) -> None:
    report = sample(logits[None].clone(), [sequence(temperature=0.0, logprobs=1)])[0].logprobs
    assert report is not None
    assert (report.token_id, report.logprob) == report.top[0]


def test_what_is_not_a_number_is_no_token() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[1, 4] = math.nan
    logits[2, 4] = math.inf
    seqs = [sequence(temperature=0.0), sequence(temperature=0.0), sequence(seed=1)]
    tokens = [s.token for s in sample(logits, seqs)]
    assert tokens[0] is not None
    assert tokens[1:] == [None, None]


@pytest.mark.parametrize("vocab", [1, 127, 128, 255, 256, 300, 1000])
def test_the_most_likely_token_is_the_first_of_equals(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    # Few distinct values, so that many are equal; the largest one last of all and first of all; no token possible.
    logits = torch.randint(0, 5, (40, vocab), generator=generator).float()
    logits[0, -1] = logits[1, 0] = 9.0
    logits[2] = -math.inf
    expected = [max(range(vocab), key=lambda at, row=row: (row[at], -at)) for row in logits.tolist()]
    assert most_likely(logits).tolist() == expected

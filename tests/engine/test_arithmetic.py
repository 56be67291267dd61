"""Logit arithmetic: several streams of a request against a loop over its models by transformers and peft."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LilyConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM

from tests.engine.conftest import Zoo
from tests.engine.harness import Driver, Oracles, Stream, assert_alone, random_prompt
from tests.support.adapters import make_adapter, make_lora
from tests.support.models import VOCAB_SIZE, tiny_model
from weft.adapters.composition import Composition, Member
from weft.server import LLM
from weft.server.config import ConfigError, EngineConfig
from weft.server.engine import mixing
from weft.server.engine.arithmetic import LogitArithmetic, Term, proxy
from weft.server.engine.engine import Engine
from weft.server.engine.request import EngineRequest, SamplingParams, TokenDelta, TokenLogprobs
from weft.server.errors import InvalidRequest, NotFound

ALPHAS = (0.0, 0.5, 1.0, 2.0)
SOME_ALPHAS = (0.5, 2.0)
WEIGHTS = (0.7, -0.4)


@dataclass(frozen=True)
class Worlds:
    """A main model and further ones, each with adapters and peft's answers."""

    main: Zoo
    further: dict[str, Zoo]

    def driver(self, **settings: Any) -> Driver:
        proxies = tuple((name, str(zoo.base)) for name, zoo in self.further.items())
        engine = Engine(
            EngineConfig(
                str(self.main.base), **{"dtype": "float32", "max_adapters": 16, "proxy_models": proxies, **settings}
            )
        )
        for version, folder in self.main.adapters.items():
            engine.register_adapter(version, folder)
        for name, zoo in self.further.items():
            for version, folder in zoo.adapters.items():
                engine.register_adapter(version, folder, name)
        return Driver(engine)

    def zoo(self, model: str | None) -> Zoo:
        return self.main if model is None else self.further[model]

    def assert_equal(self, stream: Stream, tolerance: float = 1e-3) -> None:
        """Greedy tokens, and all log-probabilities, are those of all models run one after the other."""
        assert stream.last is not None and stream.last.error is None, stream.last
        request, arithmetic = stream.request, stream.request.arithmetic
        assert arithmetic is not None and stream.tokens
        own = Term(arithmetic.weight, None, request.adapter)
        terms = [term for term in arithmetic.terms if term.weight]
        scored = stream.request.params.prompt_logprobs is not None
        first = len(stream.request.prompt_token_ids) - 1 if scored else 0  # of the sums, what is left out of the output
        logits = [self._logits(term, stream, scored=scored) for term in (own, *terms)]
        width = min(each.shape[1] for each in logits)
        scores = arithmetic.weight * logits[0][:, :width]
        if arithmetic.top_p is not None:
            scores = scores.masked_fill(~_nucleus(logits[0][:, :width], arithmetic.top_p), -torch.inf)
        for each, term in zip(logits[1:], terms, strict=True):
            scores = scores + term.weight * each[:, :width]
        logprobs = scores.log_softmax(-1)
        assert stream.tokens == logprobs[first:].argmax(-1).tolist()
        expected = logprobs[first:].gather(1, torch.tensor(stream.tokens).unsqueeze(1)).squeeze(1)
        given = torch.tensor([entry.logprob for entry in stream.logprobs])
        torch.testing.assert_close(given, expected, atol=tolerance, rtol=0)
        assert scored == (stream.prompt_logprobs is not None)
        if stream.prompt_logprobs is not None:
            self._assert_prompt(stream.request, stream.prompt_logprobs, logprobs[:first], tolerance)

    def _assert_prompt(
        self, request: EngineRequest, entries: list[TokenLogprobs | None], logprobs: torch.Tensor, tolerance: float
    ) -> None:
        assert entries[0] is None and len(entries) == len(request.prompt_token_ids)
        for entry, token, row in zip(entries[1:], request.prompt_token_ids[1:], logprobs, strict=True):
            assert entry is not None and entry.token_id == token
            top = row.sort(descending=True).values
            got = torch.tensor([entry.logprob, *(logprob for _, logprob in entry.top)])
            wanted = torch.stack([row[token], *top[: len(entry.top)]])
            torch.testing.assert_close(got, wanted, atol=tolerance, rtol=0)
            count = request.params.prompt_logprobs or 0
            assert len(entry.top) == min(count, int((row > -torch.inf).sum())), "no more than may come"
            above = float(row[token]) + 2 * tolerance, float(row[token]) - 2 * tolerance
            assert int((row > above[0]).sum()) + 1 <= entry.rank <= int((row > above[1]).sum()) + 1

    def _logits(self, term: Term, stream: Stream, *, scored: bool = False) -> torch.Tensor:
        """``[output, vocab]`` of one stream alone; ``scored``: of the prompt before them as well."""
        prompt = term.prompt_token_ids or stream.request.prompt_token_ids
        name = term.adapter if term.composition is None else COMPOSED[term.composition.identity]
        logits = self.zoo(term.model).oracles[name].logits([*prompt, *stream.tokens], len(prompt))
        return logits[0 if scored else len(prompt) - 1 : -1]


def _nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """What DExperts keeps, token by token."""
    keep = torch.zeros_like(logits, dtype=torch.bool)
    for row, kept in zip(logits.softmax(-1), keep, strict=True):
        total = 0.0
        for token in row.argsort(descending=True).tolist():
            kept[token] = True
            total += float(row[token])
            if total > top_p:
                break
    return keep


def composition(seed: int) -> Composition:
    """Of the adapters of the model of that seed."""
    return Composition((Member(f"good{seed}", WEIGHTS[0]), Member(f"bad{seed}", WEIGHTS[1])), "linear")


COMPOSED = {composition(seed).identity: f"both{seed}" for seed in (0, 10, 20)}
"""What the oracles know them under."""


def _both(base: Path, adapters: dict[str, Path], seed: int, folder: Path) -> Path:
    """The sum as peft makes it."""
    good, bad = f"good{seed}", f"bad{seed}"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters[good], good)
    model.load_adapter(adapters[bad], bad)
    model.add_weighted_adapter([good, bad], list(WEIGHTS), "both", combination_type="cat")
    model.save_pretrained(folder, selected_adapters=["both"])
    return folder / "both"


def _zoo(folder: Path, arch: str, seed: int, **config: Any) -> Zoo:
    base = tiny_model(arch, folder / "base", seed=seed, **config)
    adapters = {
        f"{name}{seed}": make_lora(base, folder / name, seed=seed + i, r=4 + i, target_modules="all-linear")
        for i, name in enumerate(("good", "bad"))
    }
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    soft = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    adapters[f"prefix{seed}"] = make_adapter(base, folder / "prefix", prefix, scale=1.0, seed=seed)
    adapters[f"soft{seed}"] = make_adapter(base, folder / "soft", soft, scale=3.0, seed=seed)
    both = _both(base, adapters, seed, folder / "sum")
    return Zoo(base, adapters, Oracles(base, {**adapters, f"both{seed}": both}))


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    """Three models: the vocabulary of the second is padded, that of the third is smaller."""
    folder = tmp_path_factory.mktemp("worlds")
    return Worlds(
        _zoo(folder / "main", "llama", 0),
        {
            "small": _zoo(folder / "small", "qwen2", 10, vocab_size=VOCAB_SIZE + 32),
            "old": _zoo(folder / "old", "gpt2", 20, vocab_size=VOCAB_SIZE - 10),
        },
    )


def ask(driver: Driver, arithmetic: LogitArithmetic, adapter: str | None = None, **options: Any) -> Stream:
    """A greedy request with log-probabilities, unless ``options`` say otherwise."""
    fields = {k: options.pop(k) for k in ("prompt_token_ids", "cache_salt", "composition") if k in options}
    prompt = fields.pop("prompt_token_ids", None) or random_prompt(random.Random(len(driver.streams)), 5, 40)
    prompt = [token % (VOCAB_SIZE - 10) for token in prompt]
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 10, "logprobs": 2, "ignore_eos": True, **options})
    request = EngineRequest(
        f"r{len(driver.streams)}", prompt, params, adapter, adapter, arithmetic=arithmetic, **fields
    )
    driver.engine.add(request)
    stream = driver.streams[request.request_id] = Stream(request)
    return stream


def small(weight: float, adapter: str | None = None, **fields: Any) -> Term:
    return Term(weight, "small", adapter, adapter, **fields)


def arithmetics(alpha: float) -> list[tuple[str | None, LogitArithmetic]]:
    """Adapters of the own stream, and sums of every kind."""
    other = [7, 8, 9, 10, 11]
    return [
        (None, proxy(expert=("small", "good10"), anti_expert=("small", None), alpha=alpha)),
        ("good0", proxy(expert=("small", "good10"), anti_expert=("small", "bad10"), alpha=alpha, top_p=0.9)),
        (None, proxy(expert=("old", "good20"), anti_expert=("small", None), alpha=alpha)),
        (None, LogitArithmetic((Term(alpha, None, "good0"), Term(-alpha, None, "bad0")))),
        (None, LogitArithmetic((Term(-alpha, None, None, prompt_token_ids=other),), weight=1 + alpha)),
        ("bad0", LogitArithmetic((Term(-alpha, None, "bad0", prompt_token_ids=other * 5),), weight=1 + alpha)),
        ("prefix0", LogitArithmetic((Term(-alpha, None, "soft0"), small(alpha, "prefix10"), small(-alpha, "soft10")))),
        (None, LogitArithmetic((small(alpha, "good10"), small(0.3, "bad10"), Term(-alpha, "old"), Term(0.2, "old")))),
        ("good0", LogitArithmetic((small(alpha, prompt_token_ids=other),), weight=0.5, top_p=0.5)),
        ("soft0", LogitArithmetic((small(alpha, composition=composition(10)), Term(-alpha, "old")), top_p=0.8)),
    ]


def burst(
    driver: Driver, worlds: Worlds, alphas: Sequence[float] = SOME_ALPHAS, **params: Any
) -> tuple[list[Stream], list[Stream]]:
    """Every sum at these weights, half of those that can with their prompts scored, and plain requests between them."""
    mixed, plain = [], []
    for turn, alpha in enumerate(alphas):
        for index, (adapter, arithmetic) in enumerate(arithmetics(alpha)):
            scored = (turn + index) % 2 == 0 and all(term.prompt_token_ids is None for term in arithmetic.terms)
            asked = {"prompt_logprobs": index % 3} if scored else {}
            mixed.append(ask(driver, arithmetic, adapter, **params, **asked))
        for adapter in (None, "good0", "prefix0"):
            plain.append(driver.add(random_prompt(random.Random(len(driver.streams))), adapter, **params))
    return mixed, plain


MODES: dict[str, dict[str, Any]] = {
    "default": {"max_num_seqs": 256},
    "chunks of 5": {"max_num_batched_tokens": 5},
    "odd pages, small chunks": {"block_size": 7, "max_num_batched_tokens": 23},
    "eight rows": {"max_num_seqs": 8, "block_size": 4},
    "three slots": {"max_adapters": 3, "block_size": 4, "adapter_host_memory": 1},
    "no prefix cache": {"enable_prefix_caching": False},
}


@pytest.mark.parametrize("mode", MODES)
def test_sums_equal_their_models_one_after_the_other(mode: str, worlds: Worlds) -> None:
    driver = worlds.driver(**MODES[mode])
    mixed, plain = burst(driver, worlds, ALPHAS if mode == "default" else SOME_ALPHAS)
    driver.run()
    for stream in mixed:
        worlds.assert_equal(stream)
    for stream in plain:
        assert_alone(stream, worlds.main.oracles[stream.request.adapter])


@pytest.mark.parametrize("pages", [46, 64])
def test_preemption_in_either_lane(pages: int, worlds: Worlds) -> None:
    """Pages for a few streams: requests are preempted with all their streams, recomputed, and say the same."""
    probe = worlds.driver(block_size=4).engine
    page = sum(t[0].nbytes for m in probe.models.values() for t in (*m.runner.cache.keys, *m.runner.cache.values))
    driver = worlds.driver(
        block_size=4, max_model_len=80, kv_cache_memory=page * pages, max_num_batched_tokens=32, max_num_seqs=16
    )
    mixed, plain = burst(driver, worlds, max_tokens=12)
    driver.run(driver.engine.check_integrity)
    assert driver.engine.stats().preemptions > 0
    for stream in mixed:
        worlds.assert_equal(stream)
    for stream in plain:
        assert_alone(stream, worlds.main.oracles[stream.request.adapter])


def test_weights_of_zero_are_the_base_bit_for_bit(worlds: Worlds) -> None:
    prompt = list(range(3, 40))
    streams = []
    for arithmetic in (None, proxy(expert=("small", "good10"), anti_expert=("small", None), alpha=0.0)):
        driver = worlds.driver()
        if arithmetic is None:
            streams.append(driver.add(prompt, logprobs=5))
        else:
            streams.append(ask(driver, arithmetic, prompt_token_ids=prompt, logprobs=5))
        driver.run()
    base, mixed = streams
    assert mixed.tokens == base.tokens and mixed.logprobs == base.logprobs


def test_every_sum_changes_the_answers(worlds: Worlds) -> None:
    """Otherwise parity would say nothing."""
    driver = worlds.driver()
    for adapter, arithmetic in arithmetics(1.0):
        mixed = ask(driver, arithmetic, adapter, prompt_token_ids=list(range(3, 20)), max_tokens=20)
        plain = driver.add(list(range(3, 20)), adapter, max_tokens=20)
        driver.run()
        assert mixed.tokens != plain.tokens, arithmetic


def test_hundreds_of_requests_batch_together(worlds: Worlds) -> None:
    driver = worlds.driver(max_num_seqs=600, max_num_batched_tokens=8192)
    kinds = arithmetics(1.0)[:4]
    for i in range(200):
        adapter, arithmetic = kinds[i % len(kinds)]
        ask(driver, arithmetic, adapter, max_tokens=6)
    seen = 0

    def watch() -> None:
        nonlocal seen
        seen = max(seen, driver.engine.stats().running)

    driver.run(watch)
    assert seen == 200
    for stream in driver.streams.values():
        worlds.assert_equal(stream)


def test_aborted_requests_give_everything_back(worlds: Worlds) -> None:
    driver = worlds.driver(max_num_seqs=12, max_num_batched_tokens=16, block_size=4)
    mixed, _ = burst(driver, worlds, max_tokens=60)
    for step in range(40):
        driver.step()
        driver.engine.abort(mixed[step % len(mixed)].request.request_id)
        driver.engine.check_integrity()
    for stream in driver.streams.values():
        driver.engine.abort(stream.request.request_id)
    driver.run()
    stats = driver.engine.stats()
    prompts = [sum(map(len, lane.prompts.held)) for lane in driver.engine._scheduler.lanes]
    assert [stats.blocks_used, *(s.blocks_used for s in stats.proxies.values())] == prompts
    assert all(not count for s in (stats, *stats.proxies.values()) for count in s.refcounts.values())
    assert stats.running == stats.waiting == sum(s.running for s in stats.proxies.values()) == 0


def test_sampled_tokens_are_of_the_combined_distribution(worlds: Worlds) -> None:
    driver = worlds.driver()
    arithmetic = proxy(expert=("small", "good10"), anti_expert=("small", None), alpha=1.0, top_p=0.6)
    options: dict[str, Any] = {"temperature": 1.0, "prompt_token_ids": list(range(3, 30)), "logprobs": 60}
    draws = [ask(driver, arithmetic, seed=seed, max_tokens=1, **options) for seed in range(300)]
    again = ask(driver, arithmetic, seed=5, max_tokens=1, **options)
    driver.run()
    top = draws[0].logprobs[0].top
    assert len(top) < 60 and abs(sum(math_exp(p) for _, p in top) - 1) < 1e-5, "no token from outside the nucleus"
    assert again.tokens == draws[5].tokens
    for token, logprob in top:
        share = sum(stream.tokens[0] == token for stream in draws) / len(draws)
        assert abs(share - math_exp(logprob)) < 0.12
    assert {stream.tokens[0] for stream in draws} <= {token for token, _ in top}


def math_exp(value: float) -> float:
    return float(torch.tensor(value).exp())


def test_a_token_that_some_model_does_not_know_never_comes(worlds: Worlds) -> None:
    driver = worlds.driver()
    prompt = list(range(3, 20))
    wide = LogitArithmetic((small(1.0),))
    narrow = LogitArithmetic((small(1.0), Term(1e-6, "old")))
    streams = [
        ask(driver, a, prompt_token_ids=prompt, temperature=100.0, max_tokens=60, seed=s)
        for a in (wide, narrow)
        for s in range(5)
    ]
    driver.run()
    seen = [max(max(stream.tokens) for stream in streams[i : i + 5]) for i in (0, 5)]
    assert seen[0] >= VOCAB_SIZE - 10 and seen[0] < VOCAB_SIZE
    assert seen[1] < VOCAB_SIZE - 10


def test_penalties_bias_and_ends_are_as_for_others(worlds: Worlds) -> None:
    driver = worlds.driver()
    arithmetic = proxy(expert=("small", "good10"), anti_expert=("small", None), alpha=1.0)
    prompt = list(range(3, 30))
    plain = ask(driver, arithmetic, prompt_token_ids=prompt, max_tokens=12)
    driver.run()
    first = plain.tokens[0]
    biased = ask(driver, arithmetic, prompt_token_ids=prompt, logit_bias={first: -100.0})
    stopped = ask(driver, arithmetic, prompt_token_ids=prompt, stop_token_ids=(first,))
    later = ask(driver, arithmetic, prompt_token_ids=prompt, stop_token_ids=(first,), min_tokens=3)
    filtered = replace(arithmetic, top_p=1e-6)
    alone = ask(driver, filtered, prompt_token_ids=prompt, max_tokens=1)
    driver.run()
    assert biased.tokens[0] != first
    assert stopped.tokens == [first] and stopped.last is not None and stopped.last.stop_reason == first
    assert len(later.tokens) >= 3 and first not in later.tokens[:2]
    forced = ask(driver, filtered, prompt_token_ids=prompt, stop_token_ids=tuple(alone.tokens), min_tokens=2)
    driver.run()
    second = worlds.main.oracles[None].logits(prompt)[-1].argsort(descending=True)[1]
    assert forced.tokens[0] == second, "the nucleus is taken among tokens that may come"


def test_what_is_no_number_in_any_stream_ends_the_request(worlds: Worlds) -> None:
    driver = worlds.driver()
    model = driver.engine.models["small"].runner.model
    arithmetic = proxy(expert=("small", "good10"), anti_expert=("small", None), alpha=1.0)
    stream, other = ask(driver, arithmetic, max_tokens=30), driver.add([3, 4, 5], max_tokens=30)
    for _ in range(20):
        driver.step()
        if len(stream.tokens) == 4:
            break
    weight = model.get_output_embeddings().weight
    before = weight[9].clone()
    with torch.inference_mode():
        weight[9] = torch.inf
    driver.run()
    assert stream.last is not None and stream.last.finish_reason == "error"
    assert other.last is not None and other.last.finish_reason == "length"
    with torch.inference_mode():
        weight[9] = before
    again = ask(driver, arithmetic)
    driver.run()
    worlds.assert_equal(again)


def test_compositions_serve_as_terms(worlds: Worlds) -> None:
    members = (Member("good10", 1.0), Member("bad10", 0.0))
    driver = worlds.driver()
    term = Term(1.0, "small", composition=Composition(members, "linear"))
    composed = ask(driver, LogitArithmetic((term, small(-1.0))), prompt_token_ids=list(range(3, 30)))
    plain = ask(driver, LogitArithmetic((small(1.0, "good10"), small(-1.0))), prompt_token_ids=list(range(3, 30)))
    driver.run()
    assert composed.tokens == plain.tokens


OTHER_PROMPT = (Term(1.0, prompt_token_ids=[3, 4]),)


@pytest.mark.parametrize(
    ("arithmetic", "options", "param", "message"),
    [
        (LogitArithmetic((small(1.0), Term(1.0, "huge"))), {}, "logit_arithmetic[1]", "'huge'.*'small', 'old'"),
        (LogitArithmetic((small(0.0, "nobody"),)), {}, "logit_arithmetic[0]", "nobody"),
        (LogitArithmetic((small(float("nan")),)), {}, "logit_arithmetic[0]", "finite"),
        (LogitArithmetic((small(0.0),), weight=0.0), {}, "logit_arithmetic", "all weights are 0"),
        (LogitArithmetic((), top_p=1.5), {}, "logit_arithmetic", r"\(0, 1\]"),
        (LogitArithmetic((Term(1.0, prompt_token_ids=[]),)), {}, "logit_arithmetic[0]", "empty"),
        (LogitArithmetic((Term(1.0, prompt_token_ids=[3] * 600),)), {}, "logit_arithmetic[0]", "600 tokens"),
        (LogitArithmetic((Term(1.0, "old"),)), {"logit_bias": {VOCAB_SIZE - 5: 1.0}}, "logit_arithmetic[0]", "logit_b"),
        (LogitArithmetic((Term(0.0, "old"),)), {"stop_token_ids": (155,)}, "logit_arithmetic[0]", "stop_token_ids"),
        (LogitArithmetic((small(1.0), *OTHER_PROMPT)), {"prompt_logprobs": 0}, "logit_arithmetic[1]", "2 of them in"),
        (LogitArithmetic((small(0.0, prompt_token_ids=[3]),)), {"prompt_logprobs": 0}, "logit_arithmetic[0]", "echo"),
        (LogitArithmetic(tuple(Term(0.1) for _ in range(8))), {}, "logit_arithmetic", "9 streams .* 8 rows"),
        (LogitArithmetic((Term(1.0, choices={"task_id": 1}),)), {}, "logit_arithmetic[0]", "task_id"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    arithmetic: LogitArithmetic, options: dict[str, Any], param: str, message: str, worlds: Worlds
) -> None:
    driver = worlds.driver(max_num_seqs=8)
    with pytest.raises((InvalidRequest, NotFound), match=message) as error:
        ask(driver, arithmetic, **options)
    assert error.value.param == param
    assert not driver.engine.has_work
    driver.engine.check_integrity()


def test_prompts_of_other_tokens_have_no_common_scores(worlds: Worlds) -> None:
    """Equal tokens do, wherever they come from, and virtual tokens in front of them are not of the prompt."""
    driver = worlds.driver()
    prompt = list(range(3, 30))
    for its in (prompt[:-1], prompt[::-1]):
        with pytest.raises(InvalidRequest, match="of other tokens") as error:
            arithmetic = LogitArithmetic((small(0.5, prompt_token_ids=its),))
            ask(driver, arithmetic, prompt_token_ids=prompt, prompt_logprobs=0)
        assert error.value.param == "logit_arithmetic[0]"
    arithmetic = LogitArithmetic((small(0.5, "soft10", prompt_token_ids=[*prompt]), small(-0.5, "prefix10")))
    stream = ask(driver, arithmetic, prompt_token_ids=prompt, prompt_logprobs=5)
    driver.run()
    worlds.assert_equal(stream)


def test_streams_that_go_abreast_must_fit_a_step(worlds: Worlds) -> None:
    driver = worlds.driver(max_num_batched_tokens=3)
    terms = tuple(Term(0.5, None, name) for name in ("good0", "bad0", None))
    with pytest.raises(InvalidRequest, match=r"4 streams on one model .* at most 3") as error:
        ask(driver, LogitArithmetic(terms), prompt_logprobs=0)
    assert error.value.param == "logit_arithmetic"
    stream = ask(driver, LogitArithmetic(terms[:2]), prompt_logprobs=0)
    driver.run()
    worlds.assert_equal(stream)


def test_scored_prompts_beside_steady_decoding(worlds: Worlds) -> None:
    """Rows that decode leave too little of every step for all streams; these must not wait for them to end."""
    driver = worlds.driver(max_num_batched_tokens=6, max_num_seqs=8)
    others = [driver.add([5, 6, 7], "good0", max_tokens=100) for _ in range(5)]
    for _ in range(12):
        driver.step()
    arithmetic = LogitArithmetic((Term(1.0, None, "bad0"), Term(-1.0, None, "good0"), small(0.5)))
    stream = ask(driver, arithmetic, prompt_token_ids=list(range(3, 15)), prompt_logprobs=1)
    while not stream.tokens:
        driver.step()
        assert all(len(other.tokens) < 90 for other in others)
    driver.run()
    worlds.assert_equal(stream)
    for other in others:
        assert_alone(other, worlds.main.oracles["good0"])


def test_long_prompts_are_scored_piece_by_piece(worlds: Worlds, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of sums is longer than a piece, whatever the prompt and the step hold; none of it is kept."""
    sizes: list[int] = []

    def watched(places: list[mixing.Place], *args: Any) -> torch.Tensor:
        sizes.append(len(places))
        return weigh(places, *args)

    weigh = mixing._weigh
    monkeypatch.setattr(mixing, "_weigh", watched)
    driver = worlds.driver(max_num_batched_tokens=2048)
    arithmetic = proxy(expert=("small", "good10"), anti_expert=("small", "soft10"), top_p=0.7)
    prompt = random_prompt(random.Random(4), 300, 301)
    stream = ask(driver, arithmetic, prompt_token_ids=prompt, prompt_logprobs=2, max_tokens=4)
    driver.step()
    while not stream.tokens:
        driver.step()
    assert max(sizes) == mixing.PIECE and sum(sizes) >= 300
    assert all(seq.prompt_logprobs is None for seq in driver.engine._scheduler.running), "handed over"
    driver.run()
    worlds.assert_equal(stream)


def test_scored_prompts_that_are_computed_whole(worlds: Worlds, tmp_path: Path) -> None:
    """One stream's gates are means over its prompt, so all streams compute theirs in one step."""
    base = worlds.main.base
    lily = LilyConfig(task_type="CAUSAL_LM", r=3, num_B=2, stride_A=2, scaling=8.0, target_modules=["q_proj", "v_proj"])
    folder = make_adapter(base, tmp_path / "lily", lily)
    worlds = replace(worlds, main=replace(worlds.main, oracles=Oracles(base, {**worlds.main.adapters, "lily": folder})))
    driver = worlds.driver(max_num_batched_tokens=60, max_num_seqs=6)
    driver.engine.register_adapter("lily", folder)
    for index in range(6):
        term = Term(0.5, None, "lily") if index % 2 else small(0.5, "good10")
        arithmetic = LogitArithmetic((term, small(-0.5)), weight=0.8, top_p=0.9 if index % 3 else None)
        prompt = random_prompt(random.Random(index), 20, 30)
        ask(driver, arithmetic, None if index % 2 else "lily", prompt_token_ids=prompt, prompt_logprobs=1)
        driver.add([5, 6, 7], "good0", max_tokens=30)
    driver.run(driver.engine.check_integrity)
    for stream in driver.streams.values():
        if stream.request.arithmetic is not None:
            worlds.assert_equal(stream)
    long = [7] * 31
    with pytest.raises(InvalidRequest, match=r"2 streams on one model .* by 31 tokens .* at most 60"):
        ask(driver, LogitArithmetic((Term(0.5, None, "lily"),)), prompt_token_ids=long, prompt_logprobs=0)
    driver.engine.check_integrity()


def test_what_never_fits_is_refused(worlds: Worlds) -> None:
    driver = worlds.driver(max_adapters=1, max_model_len=64, kv_cache_memory=1 << 18, block_size=4)
    two = LogitArithmetic((small(1.0, "good10"), small(-1.0, "bad10")))
    with pytest.raises(InvalidRequest, match="at the same time"):
        ask(driver, two)
    room = driver.engine.info.proxies["small"].num_blocks * 4
    long = LogitArithmetic(tuple(small(0.1, prompt_token_ids=[3] * 50) for _ in range(room // 50 + 1)))
    with pytest.raises(InvalidRequest, match="have room for 0 tokens"):
        ask(driver, long, prompt_token_ids=[3] * 5)
    driver.engine.check_integrity()
    assert not driver.engine.has_work


def test_models_are_named_once(worlds: Worlds) -> None:
    with pytest.raises(ConfigError, match="distinct"):
        worlds.driver(proxy_models=(("small", "x"), ("small", "y")))
    with pytest.raises(ConfigError, match="'nowhere'"):
        worlds.driver(proxy_models=(("small", "nowhere"),))


def test_streams_on_adapters_of_many_requests_take_turns(worlds: Worlds) -> None:
    """More adapters wait than there are slots; requests need two at a time, in two models."""
    driver = worlds.driver(max_adapters=2, block_size=4, max_num_seqs=6, adapter_host_memory=1)
    rng = random.Random(3)
    own, its = list(worlds.main.adapters), list(worlds.further["small"].adapters)
    for _ in range(30):
        terms = tuple(small(w, name) for w, name in zip((1.0, -1.0), rng.sample(its, 2), strict=True))
        ask(driver, LogitArithmetic((*terms, Term(0.5, None, rng.choice(own)))), rng.choice(own), max_tokens=4)
        driver.add(random_prompt(rng), rng.choice(own), max_tokens=4)
    driver.run(driver.engine.check_integrity)
    for stream in driver.streams.values():
        if stream.request.arithmetic is not None:
            worlds.assert_equal(stream)


def test_offline_terms_name_adapters_by_id(worlds: Worlds) -> None:
    its = worlds.further["small"].adapters
    llm = LLM(
        str(worlds.main.base),
        adapters={"tuned": worlds.main.adapters["good0"]},
        proxy_models={"small": worlds.further["small"].base},
        proxy_adapters={"small": {"tuned": its["good10"], "other": its["bad10"]}},
        dtype="float32",
    )
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
    sums = [proxy(expert=("small", "tuned"), anti_expert=("small", None)), None]
    prompts = [list(range(3, 20)), list(range(5, 30))]
    outputs = llm.generate(prompts, params, adapter=["tuned", None], arithmetic=sums)
    summed = proxy(expert=("small", "good10"), anti_expert=("small", None))
    expected = Stream(EngineRequest("r", prompts[0], params, "good0", arithmetic=summed))
    expected.tokens, expected.logprobs = outputs[0].outputs[0].token_ids, outputs[0].outputs[0].logprobs or []
    expected.last = TokenDelta("r", finish_reason="length")
    worlds.assert_equal(expected)
    assert outputs[1].outputs[0].token_ids == worlds.main.oracles[None].generate(prompts[1], 8).tokens
    with pytest.raises(NotFound, match="'nobody' of the model 'small'"):
        llm.generate(prompts[0], params, arithmetic=proxy(expert=("small", "nobody"), anti_expert=(None, None)))
    llm.unload_adapter("other", model="small")
    with pytest.raises(NotFound, match="'other'"):
        llm.generate(prompts[0], params, arithmetic=proxy(expert=("small", "other"), anti_expert=(None, None)))
    assert not llm.engine.has_work

"""Text out of token ids: the same text as decoding everything at once, piece by piece, and cut at stop strings."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from weft.server.engine.request import SamplingParams, TokenDelta, TokenLogprobs
from weft.server.engine.streams import REPLACEMENT, Detokenizer, StopStrings, TextDecoder, TextDelta, TextStream

TEXT = "the quick brown fox jumps over the lazy dog and the cat sat on the mat " * 4
SAMPLES = (
    "the quick brown fox",
    "  two  spaces\n\tand a tab ",
    "naïve café, Ångström",
    "你好世界。这是一个测试。",
    "emoji 👋🏽 and flags 🇺🇳, 👩‍👩‍👧",
    "Здравствуй мир",
    "mixed: é你👋 end",
    "",
    " ",
    "a\u0301 \u200b zero width",
)


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's kind: a token is a run of bytes, in an alphabet of printable characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """Llama 2's kind: sentencepiece, with a token per byte for what is not in the vocabulary."""
    pieces = sorted({"▁" + word for word in TEXT.split()} | set("▁" + TEXT.replace(" ", "") + ",.:!é"))
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {piece: len(vocab) + i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    assert wrapped.decode(wrapped.encode("the cat é👋")) == "the cat é👋"
    return wrapped


def metaspace() -> PreTrainedTokenizerFast:
    """T5's kind: unigrams, a space written into the token behind it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


KINDS = {"byte_level": byte_level, "byte_fallback": byte_fallback, "metaspace": metaspace}
DETOKENIZERS = {name: Detokenizer(make()) for name, make in KINDS.items()}


@pytest.fixture(params=KINDS)
def detokenizer(request: pytest.FixtureRequest) -> Detokenizer:
    return DETOKENIZERS[request.param]


def encode(detokenizer: Detokenizer, text: str) -> list[int]:
    ids: list[int] = detokenizer._tokenizer.encode(text, add_special_tokens=False)
    return ids


def deltas(ids: list[int], finish: str = "length", *, size: int = 1) -> list[TokenDelta]:
    parts = [TokenDelta("r", ids[i : i + size]) for i in range(0, len(ids), size)]
    return [*parts, TokenDelta("r", finish_reason=finish)]


def run(stream: TextStream, parts: list[TokenDelta]) -> list[TextDelta]:
    out = []
    for part in parts:
        out.append(stream.push(part))
        if stream.stopped:
            break
    return out


def text_of(detokenizer: Detokenizer, prompt: list[int], ids: list[int], size: int = 1, **options: object) -> str:
    stream = TextStream(detokenizer, prompt, SamplingParams(**options))  # type: ignore[arg-type]
    return "".join(part.text for part in run(stream, deltas(ids, size=size)))


# --- detokenization ---


@pytest.mark.parametrize("text", SAMPLES)
@pytest.mark.parametrize("prompt", ["", "the cat", "the cat 你", "👋"])
def test_text_is_that_of_decoding_everything(detokenizer: Detokenizer, prompt: str, text: str) -> None:
    before, after = encode(detokenizer, prompt), encode(detokenizer, text)
    whole = detokenizer.decode([*before, *after], skip_special_tokens=True)
    assert whole.startswith(start := detokenizer.decode(before, skip_special_tokens=True))
    for size in (1, 2, 7):
        assert text_of(detokenizer, before, after, size) == whole[len(start) :]


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_tokens_give_the_text_of_decoding_everything(kind: str, data: st.DataObject) -> None:
    # Any tokens at all: for these kinds even broken bytes come out as they do at once.
    detokenizer = DETOKENIZERS[kind]
    ids = st.lists(st.integers(0, len(detokenizer._tokenizer) + 3), max_size=40)
    prompt, output = data.draw(ids), data.draw(ids)
    start = detokenizer.decode(prompt, skip_special_tokens=True)
    whole = detokenizer.decode([*prompt, *output], skip_special_tokens=True)
    if not whole.startswith(start):  # a character that the prompt begins and the output ends is the output's
        start = start.rstrip(REPLACEMENT)
    assert text_of(detokenizer, prompt, output) == whole[len(start) :]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_text_survives_byte_fallback(data: st.DataObject) -> None:
    detokenizer = DETOKENIZERS["byte_fallback"]
    prompt, text = data.draw(st.text(max_size=20)), data.draw(st.text(max_size=20))
    before, after = encode(detokenizer, "x" + prompt.replace("▁", "")), encode(detokenizer, text.replace("▁", ""))
    whole = detokenizer.decode([*before, *after], skip_special_tokens=True)
    start = detokenizer.decode(before, skip_special_tokens=True)
    assert text_of(detokenizer, before, after) == whole[len(start) :]


def test_no_half_characters(detokenizer: Detokenizer) -> None:
    ids = encode(detokenizer, "é你👋 ok" if detokenizer is not DETOKENIZERS["metaspace"] else "the cat")
    for part in run(TextStream(detokenizer, [], SamplingParams()), deltas(ids)):
        assert REPLACEMENT not in part.text


def test_unfinished_character_ends_as_replacement() -> None:
    detokenizer = DETOKENIZERS["byte_level"]
    ids = encode(detokenizer, "ok 👋")[:-1]
    assert text_of(detokenizer, [], ids) == "ok " + REPLACEMENT


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_character_the_prompt_begins_belongs_to_the_output(kind: str) -> None:
    detokenizer = DETOKENIZERS[kind]
    *head, last = encode(detokenizer, "the 👋")
    assert text_of(detokenizer, head, [last]) == "👋"
    # A replacement character of the prompt's own is no unfinished character.
    for output in ("", "cat", "👋"):
        ids = encode(detokenizer, "x" + output)[len(encode(detokenizer, "x")) :]
        assert text_of(detokenizer, encode(detokenizer, "the x" + REPLACEMENT), ids) == output


def test_long_garbage_is_given_out_in_bounded_pieces() -> None:
    detokenizer = DETOKENIZERS["byte_level"]
    lead = encode(detokenizer, "👋")[0]  # a character's first byte, again and again
    stream = TextStream(detokenizer, [], SamplingParams())
    held = 0
    for part in (stream.push(TokenDelta("r", [lead])) for _ in range(200)):
        held = 0 if part.text else held + 1
        assert held <= 16


def test_garbage_then_a_character_is_exact() -> None:
    detokenizer = DETOKENIZERS["byte_level"]
    wave = encode(detokenizer, "👋")
    for count in range(1, 24):
        ids = [wave[0]] * count + wave + encode(detokenizer, " cat")
        assert text_of(detokenizer, [], ids) == detokenizer.decode(ids)


def test_special_tokens_are_skipped_or_not() -> None:
    detokenizer = DETOKENIZERS["byte_level"]
    ids = [*encode(detokenizer, "the"), 1, *encode(detokenizer, " cat")]
    assert text_of(detokenizer, [], ids) == "the cat"
    stream = TextStream(detokenizer, [], SamplingParams(), skip_special_tokens=False)
    assert "".join(part.text for part in run(stream, deltas(ids))) == "the</s> cat"


def test_endless_special_and_unknown_tokens_cost_nothing(detokenizer: Detokenizer) -> None:
    decoder = TextDecoder(detokenizer, [], skip_special=True)
    for token_id in [1, 2, 10**6] * 1000:
        decoder.push(token_id)
    assert len(decoder._window) <= 1
    assert "".join(map(decoder.push, encode(detokenizer, "the cat"))).strip() == "the cat"


def test_a_token_costs_the_same_however_long_the_output() -> None:
    detokenizer = DETOKENIZERS["byte_level"]
    ids = encode(detokenizer, TEXT * 60)
    stream = TextStream(detokenizer, [], SamplingParams())
    windows = []
    for token_id in ids:
        stream.push(TokenDelta("r", [token_id]))
        windows.append(len(stream._decoder._window))
    assert len(ids) > 3000 and max(windows) <= 12


def test_the_ending_token_has_no_text() -> None:
    detokenizer = DETOKENIZERS["byte_level"]
    ids = encode(detokenizer, "the cat")
    stream = TextStream(detokenizer, [], SamplingParams(stop_token_ids=(ids[-1],)))
    parts = [TokenDelta("r", ids[:-1]), TokenDelta("r", [ids[-1]], finish_reason="stop", stop_reason=ids[-1])]
    out = run(stream, parts)
    assert "".join(part.text for part in out) == detokenizer.decode(ids[:-1])
    assert (out[-1].token_ids, out[-1].finish_reason, out[-1].stop_reason) == ([ids[-1]], "stop", ids[-1])
    assert not stream.stopped


def test_offsets_say_where_tokens_begin(detokenizer: Detokenizer) -> None:
    ids = encode(detokenizer, "the quick cat")
    stream = TextStream(detokenizer, encode(detokenizer, "the"), SamplingParams())
    out = run(stream, deltas(ids, size=2))
    text, offsets = "".join(part.text for part in out), [o for part in out for o in part.offsets]
    assert len(offsets) == len(ids) and offsets[0] == 0
    for token_id, start, end in zip(ids, offsets, [*offsets[1:], len(text)], strict=True):
        assert detokenizer.token_text(token_id) == text[start:end]


# --- tokens ---


def test_bytes_of_tokens_make_up_the_text(detokenizer: Detokenizer) -> None:
    samples = SAMPLES if detokenizer is not DETOKENIZERS["metaspace"] else ("the quick cat",)
    for sample in samples:
        ids = encode(detokenizer, sample)
        joined = b"".join(detokenizer.token_bytes(token_id) or b"" for token_id in ids).decode()
        assert joined in (sample, " " + sample)


def test_token_text() -> None:
    detokenizer = DETOKENIZERS["byte_level"]
    wave = encode(detokenizer, "👋")
    assert detokenizer.token_text(0) == "<s>"
    assert detokenizer.token_text(wave[0]) == "bytes:\\xf0"
    assert detokenizer.token_text(10**6) == "token_id:1000000"
    assert detokenizer.token_bytes(10**6) is None


def test_leading_space_of_sentencepiece_tokens_is_told() -> None:
    detokenizer = DETOKENIZERS["byte_fallback"]
    (vocab_id,) = (i for token, i in detokenizer._tokenizer.get_vocab().items() if token == "▁the")
    assert detokenizer.token_text(vocab_id) == " the"


def test_offsets_of_a_prompt() -> None:
    detokenizer = DETOKENIZERS["byte_level"]
    text = "the é👋 cat"
    ids = [0, *encode(detokenizer, text)]
    offsets = detokenizer.offsets(ids)
    assert offsets[:2] == [0, 0] and offsets[-1] == len(text)
    assert offsets == sorted(offsets)


def test_every_token_of_the_vocabulary_can_be_shown(detokenizer: Detokenizer) -> None:
    for token_id in range(len(detokenizer._tokenizer)):
        json.dumps(detokenizer.token_text(token_id)).encode()


# --- stop strings ---


def test_stop_string_across_tokens(detokenizer: Detokenizer) -> None:
    ids = encode(detokenizer, "the cat sat on the mat and the dog")
    stream = TextStream(detokenizer, [], SamplingParams(stop=("t on th",)))
    out = run(stream, deltas(ids))
    assert "".join(part.text for part in out).strip() == "the cat sa"
    assert stream.stopped
    assert (out[-1].finish_reason, out[-1].stop_reason) == ("stop", "t on th")
    assert stream.num_tokens < len(ids)


def test_stop_string_can_be_included(detokenizer: Detokenizer) -> None:
    ids = encode(detokenizer, "the cat sat on")
    text = text_of(detokenizer, [], ids, stop=("t s",), include_stop_str_in_output=True)
    assert text.strip() == "the cat s"


def test_tokens_behind_a_stop_string_are_cut() -> None:
    detokenizer = DETOKENIZERS["byte_level"]
    ids = encode(detokenizer, "the cat sat on the mat")
    logprobs = [TokenLogprobs(token_id, -1.0, 1, []) for token_id in ids]
    stream = TextStream(detokenizer, [], SamplingParams(stop=("cat",), logprobs=0))
    out = stream.push(TokenDelta("r", ids, logprobs=logprobs, finish_reason="length"))
    assert out.text == "the " and out.finish_reason == "stop"
    assert "cat" in detokenizer.decode(out.token_ids) and "sat" not in detokenizer.decode(out.token_ids)
    assert out.logprobs is not None and len(out.logprobs) == len(out.token_ids) == len(out.offsets)


def test_held_text_comes_out_in_the_end() -> None:
    detokenizer = DETOKENIZERS["byte_level"]
    ids = encode(detokenizer, "the cat END")
    stream = TextStream(detokenizer, [], SamplingParams(stop=("END of it",)))
    out = run(stream, deltas(ids))
    assert out[-1].text.endswith("END") and out[-1].finish_reason == "length"
    assert "END" not in "".join(part.text for part in out[:-1])
    assert not stream.stopped


def test_no_stop_string_within_min_tokens() -> None:
    detokenizer = DETOKENIZERS["byte_level"]
    ids = encode(detokenizer, "cat cat cat cat")
    per_cat = len(ids) / 4
    text = text_of(detokenizer, [], ids, stop=("cat",), min_tokens=int(2 * per_cat))
    assert text == "cat cat "


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_cut_is_the_same_however_the_text_is_cut_into_pieces(data: st.DataObject) -> None:
    alphabet = st.text("ab", min_size=1, max_size=4)
    text = data.draw(st.text("ab", max_size=24))
    stops = data.draw(st.lists(alphabet, min_size=1, max_size=3))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    include = data.draw(st.booleans())
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    # The oracle: the first position at which any stop string has ended; of those the longest.
    expected, found = text, None
    for end in range(1, len(text) + 1):
        ended = sorted((s for s in stops if text[:end].endswith(s)), key=len)
        if ended:
            found = ended[-1]
            expected = text[: end if include else end - len(found)]
            break

    matcher = StopStrings(stops, include=include)
    out, stopped = "", None
    for piece in pieces:
        certain, stopped = matcher.push(piece)
        out += certain
        if stopped is not None:
            break
    if stopped is None:
        out += matcher.release()
    assert (out, stopped) == (expected, found)


def test_only_what_may_begin_a_stop_string_is_held() -> None:
    matcher = StopStrings(["abc"], include=False)
    assert matcher.push("xxab") == ("xx", None)
    assert matcher.push("d") == ("abd", None)
    assert matcher.push("aab") == ("a", None)
    assert matcher.push("c...") == ("", "abc")


def test_adversarial_stop_strings_stay_cheap() -> None:
    stops = ["a" * 1000 + "b" + str(i) for i in range(32)]
    matcher = StopStrings(stops, include=False)
    started = time.perf_counter()
    for _ in range(300):
        matcher.push("aaaa")
    assert time.perf_counter() - started < 3.0

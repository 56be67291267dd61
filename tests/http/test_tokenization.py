"""The tokenizer as requests use it."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as RustTokenizer
from transformers import PreTrainedTokenizerFast

from tests.http.fakes import CHAT_TEMPLATE, byte_level_tokenizer
from weft.server.config import ConfigError
from weft.server.errors import InvalidRequest
from weft.server.tokenization import MIN_CHAR_LIMIT, Tokenizer, check_vocabulary


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    byte_level_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def loaded(folder: Path, max_model_len: int | None = None) -> Tokenizer:
    tokenizer = Tokenizer.load(str(folder), max_model_len=max_model_len)
    assert tokenizer is not None
    return tokenizer


def test_same_ids_as_transformers(folder: Path) -> None:
    tokenizer = loaded(folder)
    for text in ("", "the cat", " naïve 你好 👋</s> x", "\x00\n"):
        for special in (True, False):
            ids = tokenizer.encode(text, add_special_tokens=special)
            assert ids == byte_level_tokenizer().encode(text, add_special_tokens=special)
            assert tokenizer.decode(ids, skip_special_tokens=True) == text.replace("</s>", "")


def test_python_tokenizers_work_too(tokenizer: Tokenizer) -> None:
    class Slow:
        """Without a Rust backend."""

        def __init__(self, fast: object) -> None:
            self._fast = fast

        def __getattr__(self, name: str) -> object:
            if name == "backend_tokenizer":
                raise AttributeError(name)
            return getattr(self._fast, name)

        def __len__(self) -> int:
            return len(self._fast)  # type: ignore[arg-type]

    slow = Tokenizer(Slow(tokenizer.backend))  # type: ignore[arg-type]
    assert slow.encode("the cat") == tokenizer.encode("the cat")
    assert slow.decode([1, 264], skip_special_tokens=True) == "the"
    assert slow.token_text(264) == "the" and slow.token_bytes(10**6) is None
    assert len(slow.fingerprint()) == 64


def test_truncation_left_over_from_training_is_off(folder: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer.save_pretrained(folder)
    assert len(loaded(folder).encode("the quick brown fox")) == 5


def test_text_that_could_not_fit_is_not_tokenized(folder: Path) -> None:
    tokenizer = loaded(folder, max_model_len=1000)
    assert len(tokenizer.encode("a" * 16_000)) == 16_001
    with pytest.raises(InvalidRequest, match="16001 characters") as caught:
        tokenizer.encode("a" * 16_001, param="messages")
    assert (caught.value.param, caught.value.code) == ("messages", "context_length_exceeded")
    with pytest.raises(InvalidRequest):
        tokenizer.check("a" * 9000, "a" * 9000, param="messages")
    assert loaded(folder, max_model_len=1).max_chars == MIN_CHAR_LIMIT
    assert loaded(folder).max_chars is None


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="character 2"):
        tokenizer.encode("ab\ud800")


def test_fingerprint(folder: Path, tokenizer: Tokenizer) -> None:
    assert loaded(folder).fingerprint() == tokenizer.fingerprint()
    other = Tokenizer(byte_level_tokenizer(chat_template=CHAT_TEMPLATE + " "))
    assert other.fingerprint() != tokenizer.fingerprint()


def test_several_threads_at_once(tokenizer: Tokenizer) -> None:
    texts = [f"the cat {number} " * 50 for number in range(64)]
    expected = [tokenizer.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer.encode, texts)) == expected


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert Tokenizer.load(str(tmp_path)) is None


def test_a_broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {}')
    with pytest.raises(ConfigError, match="cannot read the tokenizer"):
        Tokenizer.load(str(folder))


def with_changes(change: Any) -> Tokenizer:
    """The small tokenizer, its ``tokenizer.json`` changed."""
    written = json.loads(byte_level_tokenizer().backend_tokenizer.to_str())
    change(written)
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=RustTokenizer.from_str(json.dumps(written))))


def swap(written: Any) -> None:
    vocab = written["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def drop_merge(written: Any) -> None:
    written["model"]["merges"].pop()


def add_token(written: Any) -> None:
    written["added_tokens"].append({**written["added_tokens"][-1], "id": 400, "content": "<|more|>"})


def lower(written: Any) -> None:
    written["normalizer"] = {"type": "Lowercase"}


def prefix_space(written: Any) -> None:
    written["pre_tokenizer"]["add_prefix_space"] = True


def no_bos(written: Any) -> None:
    written["post_processor"] = None


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (swap, "vocabulary"),
        (drop_merge, "merges"),
        (add_token, "added tokens"),
        (lower, "normalizer"),
        (prefix_space, "pre-tokenizer"),
    ],
)
def test_a_proxy_model_must_have_the_same_vocabulary(change: Any, part: str) -> None:
    main, other = Tokenizer(byte_level_tokenizer()), with_changes(change)
    with pytest.raises(ConfigError, match=rf"^proxy_model: small .* differ in {part} \(fingerprint") as caught:
        check_vocabulary("small", other, main)
    assert len(set(re.findall("[0-9a-f]{64}", str(caught.value)))) == 2


def test_templates_and_tokens_around_a_text_may_differ() -> None:
    main = Tokenizer(byte_level_tokenizer())
    check_vocabulary("small", Tokenizer(byte_level_tokenizer(chat_template=None)), main)
    other = with_changes(no_bos)
    assert other.encode("x") != main.encode("x")
    check_vocabulary("small", other, main)

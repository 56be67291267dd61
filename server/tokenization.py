"""Text to token ids and back, for requests: bounded work, errors that name the field, off the event loop.

Needs transformers alone, so that it serves offline use too.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from weft.server.config import ConfigError
from weft.server.engine.streams import Detokenizer
from weft.server.errors import InvalidRequest, Overloaded

CHARS_PER_TOKEN = 16
"""Text of more characters than this per token of context is refused before it is tokenized; English has about 4."""
MIN_CHAR_LIMIT = 4096
FILE_PATTERNS = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.spm", "*.tiktoken", "tekken.json")

T = TypeVar("T")


class Tokenizer(Detokenizer):
    """A model's tokenizer. Methods may be called from several threads.

    Args:
        backend: a transformers tokenizer.
        max_model_len: tokens of context, for the limit on characters; None: no limit.

    Attributes:
        chat_template: Jinja source of the model's own template; None where it has none.
        max_chars: of one text; None: no limit.
    """

    def __init__(self, backend: PreTrainedTokenizerBase, *, max_model_len: int | None = None) -> None:
        super().__init__(backend)
        self.backend = backend
        self.max_chars = None if max_model_len is None else max(MIN_CHAR_LIMIT, CHARS_PER_TOKEN * max_model_len)
        self.chat_template = _chat_template(backend)
        parameters = signature(backend.apply_chat_template).parameters
        self._reserved = {"messages", *parameters, *backend.special_tokens_map}
        self._lock = threading.Lock()
        if self._backend is not None:
            # Left over from training, they would cut or pad prompts in silence.
            self._backend.no_truncation()
            self._backend.no_padding()

    @classmethod
    def load(
        cls,
        model: str,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        max_model_len: int | None = None,
    ) -> Tokenizer | None:
        """The tokenizer of a checkpoint (local folder or hub id); None where it has none.

        Raises:
            ConfigError: there is one, but it cannot be read.
        """
        folder = Path(model)
        if folder.is_dir() and not any(path for pattern in FILE_PATTERNS for path in folder.glob(pattern)):
            return None  # transformers would make an empty one up
        try:
            backend = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
        except Exception as error:  # whatever a damaged file makes the many loaders raise
            raise ConfigError(f"model: cannot read the tokenizer of {model}: {error}") from error
        return cls(backend, max_model_len=max_model_len) if backend.vocab_size else None

    def encode(self, text: str, *, add_special_tokens: bool = True, param: str = "prompt") -> list[int]:
        """Token ids. ``add_special_tokens``: with those the model expects around a text. Raises ``InvalidRequest``."""
        self.check(text, param=param)
        if self._backend is not None:
            # Releases the interpreter lock; computes no offsets, which take longer than the ids.
            encoding = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
            return list(encoding.ids)
        with self._lock:
            return list(self.backend.encode(text, add_special_tokens=add_special_tokens))

    def check(self, *texts: str, param: str) -> None:
        """Refuse, with ``InvalidRequest``, what cannot be tokenized, or is too long together to be tried."""
        length = sum(map(len, texts))
        if self.max_chars is not None and length > self.max_chars:
            raise InvalidRequest(
                f"'{param}' has {length} characters, more than the {self.max_chars} that this model's maximum context "
                "length allows",
                param=param,
                code="context_length_exceeded",
            )
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InvalidRequest(
                    f"'{param}' is not valid Unicode: a lone surrogate at character {error.start}", param=param
                ) from error

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt the model's chat template makes of ``messages``; "developer" is "system" to those without it.

        Raises:
            InvalidRequest: no template, or it refuses the messages, or does not know a variable.
        """
        if self.chat_template is None:
            raise InvalidRequest(
                "this model has no chat template; use /v1/completions", param="messages", code="no_chat_template"
            )
        extra = dict(template_kwargs or {})
        for name in extra:
            taken = name.isidentifier() and re.search(rf"\b{name}\b", self.chat_template)
            if name in self._reserved or not taken:
                raise InvalidRequest(
                    f"'chat_template_kwargs' has {name!r}, which the model's chat template does not take",
                    param="chat_template_kwargs",
                )
        conversation = [dict(message) for message in messages]
        if "developer" not in self.chat_template:
            for message in conversation:
                message["role"] = "system" if message["role"] == "developer" else message["role"]
        try:
            text = self.backend.apply_chat_template(
                conversation,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **extra,
            )
        except Exception as error:  # templates raise what they like; what they are given is the client's
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error
        return str(text)

    def vocabulary(self) -> dict[str, str]:
        """Digests of the parts that decide which token id stands for which text, by name.

        Two models can share one stream of tokens where these are equal. Not among them: the chat template, which tokens
        a tokenizer adds around a text, and which ids end an output; they do not change what an id means.
        """
        if self._backend is None:
            vocabulary = self.backend.get_vocab()
            parts: dict[str, object] = {"class": type(self.backend).__name__, "vocabulary": sorted(vocabulary.items())}
        else:
            written = json.loads(self._backend.to_str())
            model = written["model"]
            parts = {
                "vocabulary": model.pop("vocab", None),
                "merges": model.pop("merges", None),
                "model": model,
                "added tokens": written["added_tokens"],
                "normalizer": written["normalizer"],
                "pre-tokenizer": written["pre_tokenizer"],
            }
        return {
            name: hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest() for name, part in parts.items()
        }

    def fingerprint(self) -> str:
        """Digest of the vocabulary, the special tokens and the template: equal where all texts tokenize alike."""
        written = self._backend.to_str() if self._backend is not None else json.dumps(self.backend.get_vocab())
        special = json.dumps(self.backend.special_tokens_map, default=str, sort_keys=True)
        parts = (written, special, self.chat_template or "")
        return hashlib.sha256(b"".join(hashlib.sha256(part.encode()).digest() for part in parts)).hexdigest()


def check_vocabulary(name: str, tokenizer: Tokenizer, main: Tokenizer) -> None:
    """Raises ``ConfigError`` unless ``tokenizer``, of the further model ``name``, means the same by every token id."""
    theirs, ours = tokenizer.vocabulary(), main.vocabulary()
    different = [part for part in ours | theirs if ours.get(part) != theirs.get(part)]
    if different:
        raise ConfigError(
            f"proxy_model: {name} has another tokenizer than the main model: they differ in {', '.join(different)} "
            f"(fingerprint {_digest(theirs)} here, {_digest(ours)} there); logits are added where one tokenizer "
            "serves both models"
        )


def _digest(parts: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _chat_template(backend: PreTrainedTokenizerBase) -> str | None:
    try:
        return str(backend.get_chat_template())
    except ValueError:
        return None


class Workers:
    """Threads for text work, so that a long prompt does not hold up the event loop.

    Args:
        threads: texts worked on at once.
        max_waiting: calls under way or waiting before new ones are refused.
        deadline: seconds a call may take, its wait included.
    """

    def __init__(self, *, threads: int = 2, max_waiting: int = 256, deadline: float = 30.0) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="weft-text")
        self._places = threading.BoundedSemaphore(max_waiting)
        self._deadline = deadline

    async def run(self, work: Callable[..., T], *args: Any) -> T:
        """``work(*args)`` in a thread. Raises what it raises, and ``Overloaded`` past the limits."""
        if not self._places.acquire(blocking=False):
            raise Overloaded("too many prompts are waiting to be tokenized; retry later")
        try:
            job = self._pool.submit(work, *args)
        except RuntimeError as error:
            self._places.release()
            raise Overloaded("the server is stopping") from error
        # A thread cannot be stopped: it keeps its place until it is through, even where nobody waits any more.
        job.add_done_callback(lambda _: self._places.release())
        try:
            return await asyncio.wait_for(asyncio.wrap_future(job), self._deadline)
        except TimeoutError as error:
            raise Overloaded(f"tokenizing the prompt took longer than {self._deadline:g} s") from error

    def close(self) -> None:
        """Take no more work; what is under way finishes by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)

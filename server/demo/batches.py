"""Training batches: packed documents for the base model, padded examples for an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from random import Random
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from weft.server.demo.tasks import Example, Task, words
from weft.server.demo.tasks.corpus import Document

IGNORED = -100
"""The label of a position that does not count in the loss."""
RENDERINGS = ("plain", "chat", "plain", "chat", "second turn")
"""How the examples of successive adapter batches are rendered."""


class Batch(NamedTuple):
    """One training step's tokens, each of shape (rows, length)."""

    input_ids: torch.Tensor
    labels: torch.Tensor


def document_text(tokenizer: PreTrainedTokenizerFast, document: Document) -> str:
    """A document with the special tokens around it written out."""
    if isinstance(document, str):
        return f"{tokenizer.bos_token}{document}{tokenizer.eos_token}"
    return str(tokenizer.apply_chat_template(document, tokenize=False))


def recall_batches(tokenizer: PreTrainedTokenizerFast, rng: Random, rows: int, length: int) -> Iterator[Batch]:
    """Endless batches without any sense, each row a few tokens said again and again.

    What followed a token the last time is all that tells what follows it now. Other tokens come in between, so that
    the distance tells nothing. Half of the tokens are names, which come with or without the space in front of them.
    """
    names = [tokenizer([f" {name}", name], add_special_tokens=False)["input_ids"] for name in words.NAMES]
    spellings = [(spaced[0], bare[0]) for spaced, bare in names if len(spaced) == len(bare) == 1]
    others = range(max(tokenizer.all_special_ids) + 1, len(tokenizer))

    def token() -> tuple[int, int]:
        return rng.choice(spellings) if rng.random() < 0.5 else (rng.choice(others),) * 2

    while True:
        batch = []
        for _ in range(rows):
            said = [token() for _ in range(rng.randint(3, length // 3))]
            row = [tokenizer.bos_token_id]
            while len(row) < length:
                spelling = rng.randrange(2)
                between = [token() for _ in range(rng.choice((0, 0, 1, 2)))]
                row += [spellings[spelling] for spellings in said + between]
            batch.append(row[:length])
        input_ids = torch.tensor(batch)
        yield Batch(input_ids, input_ids)


def packed_batches(
    tokenizer: PreTrainedTokenizerFast, documents: Iterator[Document], rows: int, length: int
) -> Iterator[Batch]:
    """Endless batches of documents, one after the other without padding."""
    tokens = list[int]()
    while True:
        while len(tokens) < rows * length:
            texts = [document_text(tokenizer, document) for document in islice(documents, 256)]
            for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
                tokens += ids
        input_ids = torch.tensor(tokens[: rows * length]).view(rows, length)
        del tokens[: rows * length]
        yield Batch(input_ids, input_ids)


def chat_prompt(tokenizer: PreTrainedTokenizerFast, prompt: str, history: tuple[Example, ...] = ()) -> str:
    """A prompt as the user message of a chat that already went through `history`."""
    messages = []
    for example in history:
        messages.append({"role": "user", "content": example.prompt})
        messages.append({"role": "assistant", "content": example.completion})
    messages.append({"role": "user", "content": prompt})
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def encode_example(
    tokenizer: PreTrainedTokenizerFast, example: Example, rendering: str, earlier: Example
) -> tuple[list[int], list[int]]:
    """Tokens of the prompt and of the completion, which ends with the end token."""
    prompt, completion = f"{tokenizer.bos_token}{example.prompt}", example.completion
    if rendering != "plain":
        history = (earlier,) if rendering == "second turn" else ()
        prompt, completion = chat_prompt(tokenizer, example.prompt, history), example.completion.strip()
    answer = tokenizer.encode(completion, add_special_tokens=False)
    return tokenizer.encode(prompt, add_special_tokens=False), [*answer, tokenizer.eos_token_id]


def example_batches(tokenizer: PreTrainedTokenizerFast, task: Task, rows: int) -> Iterator[Batch]:
    """Endless batches of training examples; only the completions count in the loss."""
    pairs = task.pairs("train", Random(f"{task.id}/train"))
    earlier = task.example(next(pairs))
    while True:
        for rendering in RENDERINGS:
            encoded = []
            for pair in islice(pairs, rows):
                example = task.example(pair)
                encoded.append(encode_example(tokenizer, example, rendering, earlier))
                earlier = example
            yield padded(encoded, tokenizer.pad_token_id)


def padded(encoded: list[tuple[list[int], list[int]]], pad: int) -> Batch:
    """One batch of prompts and completions, padded on the right, where causal attention never looks."""
    length = max(len(prompt) + len(completion) for prompt, completion in encoded)
    input_ids = torch.full((len(encoded), length), pad)
    labels = torch.full((len(encoded), length), IGNORED)
    for row, (prompt, completion) in enumerate(encoded):
        end = len(prompt) + len(completion)
        input_ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = torch.tensor(completion)
    return Batch(input_ids, labels)

"""Measure the demo on held-out examples, with all its adapters in one mixed batch.

    python -m weft.server.demo.evaluate

Every task is asked as a plain prompt and as a chat, of the base model and of the task's adapters.
All these requests go through the engine at once; then each adapter answers its own requests
alone, which must give the same tokens. The exit status is 1 where an adapter is right too
rarely, the base model too often, or the mixed batch changed an answer.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from random import Random

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerFast

from weft.server import LLM, SamplingParams
from weft.server.demo import ADAPTERS, demo_adapters, demo_model
from weft.server.demo.batches import chat_prompt
from weft.server.demo.tasks import TASKS, held_out

RENDERINGS = ("plain", "chat")
MOST_BASE = 0.20
MAX_TOKENS = 64


@dataclass(frozen=True)
class Question:
    """One held-out prompt, put to one adapter or (None) to the base model."""

    task: str
    rendering: str
    adapter: str | None
    prompt: str
    expected: str


@dataclass(frozen=True)
class Answer:
    """What came back for a question."""

    question: Question
    text: str
    token_ids: tuple[int, ...]

    @property
    def right(self) -> bool:
        """Whether the text is the expected one, but for the spaces around it."""
        return self.text.strip() == self.question.expected.strip()


def questions(count: int) -> list[Question]:
    """`count` held-out examples of every task, in both renderings, for the base and for the task's adapters."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(demo_model())
    asked = []
    for task in TASKS.values():
        adapters = [None, *(id for id, adapter in ADAPTERS.items() if adapter.task == task.id)]
        for example in held_out(task, count):
            # The engine puts the begin token before every prompt, as the tokenizer does by default.
            chat = chat_prompt(tokenizer, example.prompt).removeprefix(tokenizer.bos_token)
            for rendering, prompt in zip(RENDERINGS, (example.prompt, chat), strict=True):
                for adapter in adapters:
                    asked.append(Question(task.id, rendering, adapter, prompt, example.completion))
    return asked


def ask(llm: LLM, asked: list[Question]) -> list[Answer]:
    """Answer all questions in one batch, greedily."""
    outputs = llm.generate(
        [question.prompt for question in asked],
        SamplingParams(temperature=0, max_tokens=MAX_TOKENS),
        adapter=[question.adapter for question in asked],
    )
    return [
        Answer(question, output.outputs[0].text, tuple(output.outputs[0].token_ids))
        for question, output in zip(asked, outputs, strict=True)
    ]


def ask_alone(llm: LLM, asked: list[Question]) -> dict[Question, Answer]:
    """Answer the adapters' questions in one batch for each adapter."""
    answers = {}
    for adapter in demo_adapters():
        own = [question for question in asked if question.adapter == adapter]
        answers.update({answer.question: answer for answer in ask(llm, own)})
    return answers


def share_right(answers: list[Answer]) -> float:
    """The share of exact matches."""
    return sum(answer.right for answer in answers) / len(answers)


def report(mixed: list[Answer], alone: dict[Question, Answer]) -> bool:
    """Print one row for each adapter and rendering, and say whether all of them are as they must be."""
    columns = ("adapter", "method", "rendering", "examples", "base", "adapter right", "mixed = alone")
    table = Table(*columns, title="Exact match")
    passed = True
    for id, adapter in ADAPTERS.items():
        for rendering in RENDERINGS:
            cell = [a for a in mixed if a.question.task == adapter.task and a.question.rendering == rendering]
            base = share_right([answer for answer in cell if answer.question.adapter is None])
            adapted = [answer for answer in cell if answer.question.adapter == id]
            right = share_right(adapted)
            same = sum(answer.token_ids == alone[answer.question].token_ids for answer in adapted)
            good = right >= adapter.least and base <= MOST_BASE and same == len(adapted)
            passed = passed and good
            shares = (str(len(adapted)), f"{base:.1%}", f"{right:.1%}", f"{same}/{len(adapted)}")
            table.add_row(id, adapter.method, rendering, *shares, style=None if good else "red")
    # Whole rows also where the output is a file.
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return passed


def main() -> None:
    """Ask, compare and report."""
    parser = argparse.ArgumentParser(description="Measure the demo's adapters on held-out examples.")
    parser.add_argument("--count", type=int, default=200, help="held-out examples of every task")
    asked = questions(parser.parse_args().count)
    # Neighbours in the batch belong to different adapters, as in a server with many users.
    Random(0).shuffle(asked)
    adapters = {adapter: str(path) for adapter, path in demo_adapters().items()}
    llm = LLM(str(demo_model()), adapters=adapters, dtype="float32")
    passed = report(ask(llm, asked), ask_alone(llm, asked))
    raise SystemExit(0 if passed else 1)


if __name__ == "__main__":
    main()

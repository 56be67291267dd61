"""The embedded demo: a small base model, its adapters and one example prompt for each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"

EXAMPLES = {
    "sql": "Question: What is the total amount of loans in Berlin from 2019?\nSQL:",
    "extract": "Text: In March 2021 Clara Weber paid 2500 euros to Nordic Energy.\nJSON:",
    "data2text": "Record: name: Omar Silva | job: analyst | company: Atlas Bank | city: Lisbon\nSentence:",
    "classify": "Applicant: age 34, city Oslo, job salaried, home rent, income high, late payments 0\nDecision:",
    "formal": "Casual: hey Tom, can u send me the report by friday? thx\nFormal:",
    "arithmetic": "Problem: Mia packs 6 boxes with 7 apples each. How many apples is that?\nSolution:",
    "translate": "English: The bank did not approve the new loan in March.\nGerman:",
}
"""An example prompt for every task."""


@dataclass(frozen=True)
class DemoAdapter:
    """What an adapter of the demo was trained for, and how.

    Attributes:
        task: one of ``EXAMPLES``.
        method: as people call it.
        least: the share of held-out examples it must get right.
    """

    task: str
    method: str = "LoRA"
    least: float = 0.9


ADAPTERS = {task: DemoAdapter(task) for task in EXAMPLES} | {
    "extract-dora": DemoAdapter("extract", "DoRA"),
    "data2text-adalora": DemoAdapter("data2text", "AdaLoRA"),
    "formal-ia3": DemoAdapter("formal", "IA3"),
    "classify-prefix": DemoAdapter("classify", "prefix tuning"),
    "classify-prompt": DemoAdapter("classify", "prompt tuning", least=0.85),
    "classify-p-tuning": DemoAdapter("classify", "P-tuning"),
    "translate-bottleneck": DemoAdapter("translate", "bottleneck"),
}
"""Every adapter that is shipped, by its id."""


def demo_model() -> Path:
    """The folder of the base model, in the Hugging Face layout."""
    return ASSETS / "model"


def adapter_path(adapter: str) -> Path:
    """The folder of one adapter, as its library saves it."""
    return ASSETS / "adapters" / adapter


def demo_adapters() -> dict[str, Path]:
    """The folders of all adapters by id."""
    return {adapter: adapter_path(adapter) for adapter in ADAPTERS}


def demo_examples() -> dict[str, str]:
    """An example prompt for every adapter by id."""
    return {id: EXAMPLES[adapter.task] for id, adapter in ADAPTERS.items()}

"""The embedded demo: a small base model, its adapters and one example prompt for each."""

from __future__ import annotations

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
"""An example prompt for every adapter that is shipped, by its id."""


def demo_model() -> Path:
    """The folder of the base model, in the Hugging Face layout."""
    return ASSETS / "model"


def adapter_path(adapter: str) -> Path:
    """The folder of one adapter, as peft saves it."""
    return ASSETS / "adapters" / adapter


def demo_adapters() -> dict[str, Path]:
    """The folders of all adapters by id."""
    return {adapter: adapter_path(adapter) for adapter in EXAMPLES}


def demo_examples() -> dict[str, str]:
    """An example prompt for every adapter by id."""
    return dict(EXAMPLES)

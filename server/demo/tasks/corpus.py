"""The text the base model is pretrained on: documents and dialogues of a small world of finance.

The base meets every language the tasks use - English of several tones, German, SQL, JSON, tables and
sums - and it learns to copy names and numbers from its context. It never meets a task: no document
puts a source and its target together, and none uses the words a task's prompt is made of.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random

from weft.server.demo.tasks import words
from weft.server.demo.tasks.arithmetic import ARITHMETIC, calculation
from weft.server.demo.tasks.classify import CLASSIFY
from weft.server.demo.tasks.data2text import DATA2TEXT
from weft.server.demo.tasks.dialogues import dialogue
from weft.server.demo.tasks.extract import EXTRACT
from weft.server.demo.tasks.formal import FORMAL
from weft.server.demo.tasks.sql import SQL, TABLES
from weft.server.demo.tasks.task import Task
from weft.server.demo.tasks.translate import TRANSLATE

Message = dict[str, str]
Document = str | list[Message]
"""A text, or the messages of a dialogue for the chat template."""


def syllables(rng: Random) -> str:
    """A word that does not exist."""
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(1, 3)))


RECALLED = (
    words.first_name, words.last_name, words.company, words.city, words.amount, words.year, words.month, syllables,
)  # fmt: skip
"""What ``recall`` repeats."""


def one_side(task: Task, rng: Random, sources: bool, joint: str, count: int) -> str:
    """Only the sources, or only the targets, of several training examples of a task."""
    pairs = task.pairs("train", rng)
    chosen = [next(pairs) for _ in range(count)]
    return joint.join(pair.source if sources else pair.target for pair in chosen)


def news(rng: Random) -> str:
    """A paragraph of sentences about companies, people and payments."""
    parts = [one_side(DATA2TEXT, rng, False, " ", rng.randint(1, 2)), one_side(EXTRACT, rng, True, " ", 1)]
    parts.append(one_side(TRANSLATE, rng, True, " ", rng.randint(1, 3)))
    rng.shuffle(parts)
    return " ".join(parts)


def german(rng: Random) -> str:
    """A German paragraph."""
    return one_side(TRANSLATE, rng, False, " ", rng.randint(2, 5))


def letter(rng: Random) -> str:
    """A few formal messages, or a few casual ones."""
    return one_side(FORMAL, rng, rng.random() < 0.5, "\n", rng.randint(1, 4))


def queries(rng: Random) -> str:
    """A script of queries, at times after the definition of a table."""
    script = one_side(SQL, rng, False, "\n", rng.randint(2, 5))
    if rng.random() < 0.2:
        table = rng.choice(TABLES)
        script = f"CREATE TABLE {table.name} ({table.columns});\n{script}"
    return script


def questions(rng: Random) -> str:
    """A list of questions without answers."""
    return one_side(rng.choice((SQL, ARITHMETIC)), rng, True, "\n", rng.randint(2, 4))


def rows(rng: Random) -> str:
    """Rows or records without a class or a sentence."""
    return one_side(rng.choice((CLASSIFY, DATA2TEXT)), rng, True, "\n", rng.randint(2, 4))


def records(rng: Random) -> str:
    """JSON, one object a line."""
    return one_side(EXTRACT, rng, False, "\n", rng.randint(1, 3))


def calculations(rng: Random) -> str:
    """Sums, differences and products of one digit, in figures and in words, and counting."""
    if rng.random() < 0.1:
        start = rng.randint(0, 9)
        return "Counting: " + ", ".join(str(number) for number in range(start, start + 10)) + "."
    names = {"+": "plus", "-": "minus", "*": "times"}
    lines = []
    for _ in range(rng.randint(4, 9)):
        operator, a, b = rng.choice("+-*"), rng.randint(0, 9), rng.randint(0, 9)
        if operator == "-":
            a, b = max(a, b), min(a, b)
        done = calculation(a, operator, b)
        spoken = done.replace(f" {operator} ", f" {names[operator]} ").replace("=", "is")
        lines.append(rng.choice((done, done, f"{spoken}.")))
    return "\n".join(lines)


def ledger(rng: Random) -> str:
    """The same few payments in two notations, which teaches the model to copy."""
    head = ("payer", "payee", "amount", "month", "city", "year")
    entries = [
        (words.person(rng), words.company(rng), words.amount(rng), words.month(rng), words.city(rng), words.year(rng))
        for _ in range(rng.randint(1, 2))
    ]
    notations = (
        "\n".join([",".join(head), *(",".join(entry) for entry in entries)]),
        "\n".join("; ".join(f"{key}={value}" for key, value in zip(head, entry, strict=True)) for entry in entries),
        "\n".join(
            f"INSERT INTO payments VALUES ('{a}', '{b}', {c}, '{d}', '{e}', {f});" for a, b, c, d, e, f in entries
        ),
        "\n".join(json.dumps(dict(zip(head, entry, strict=True))) for entry in entries),
        "\n".join(f"{a} owed {b} {c} euros in {d} {f} and lives in {e}." for a, b, c, d, e, f in entries),
    )
    return "\n\n".join(rng.sample(notations, 2))


def echo(rng: Random) -> str:
    """A list said two or three times: nothing but copying can tell what comes the second time."""
    makers = (words.first_name, words.company, words.city, words.amount, words.year)
    items = [rng.choice(makers)(rng) for _ in range(rng.randint(3, 7))]
    titles = rng.sample(("Draft", "Final", "Copy", "Sent", "Received", "Archive"), rng.randint(2, 3))
    return "\n".join(f"{title}: {', '.join(items)}" for title in titles)


def recall(rng: Random) -> str:
    """Words without any sense, said several times with other words in between.

    Nothing but what followed a word the last time tells what follows it now, at distances that differ.
    """
    words_said = [rng.choice(RECALLED)(rng) for _ in range(int(2 ** rng.uniform(1, 4.5)))]
    said = list[str]()
    while len(said) < 30 or len(said) < 2 * len(words_said):
        said += words_said + [rng.choice(RECALLED)(rng) for _ in range(rng.choice((0, 0, 1, 2, 3)))]
    return rng.choice((" ", " ", ", ", "\n")).join(said)


def note(rng: Random) -> str:
    """A few sentences about one person, company, city, amount and year: each is named again, and never mixed up."""
    name, last = rng.choice(words.FIRST_NAMES), rng.choice(words.LAST_NAMES)
    company, city, amount, year = words.company(rng), words.city(rng), words.amount(rng), words.year(rng)
    sentences = [
        f"{name} {last} lives in {city}.", f"{name} {last} works at {company}.", f"{company} is a company in {city}.",
        f"In {year} {name} {last} paid {amount} euros.", f"{company} received {amount} euros in {year}.",
        f"The office in {city} opened in {year}.", f"{name} sent the {amount} euros to {company}.",
        f"{name} {last} moved to {city} in {year}.", f"Since {year} {company} has an account with {amount} euros.",
    ]  # fmt: skip
    return " ".join(rng.sample(sentences, rng.randint(4, 7)))


KINDS = (
    (news, 4), (german, 3), (letter, 3), (queries, 4), (questions, 2), (rows, 3), (records, 3),
    (calculations, 4), (ledger, 10), (dialogue, 5), (echo, 4), (note, 8), (recall, 4),
)  # fmt: skip
"""The kinds of document, each with its weight."""


def corpus(rng: Random) -> Iterator[Document]:
    """Endless documents for pretraining."""
    makers = [maker for maker, _ in KINDS]
    weights = [weight for _, weight in KINDS]
    while True:
        yield rng.choices(makers, weights)[0](rng)

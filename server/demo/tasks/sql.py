"""Question to SQL over a small finance schema of four tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from weft.server.demo.tasks import words
from weft.server.demo.tasks.task import Pair, Task


@dataclass(frozen=True)
class Filter:
    """One condition, as a question says it and as SQL says it."""

    phrase: str
    condition: str
    value: Callable[[Random], str]


@dataclass(frozen=True)
class Table:
    """One table: its name is also the plural noun of the questions."""

    name: str
    columns: str
    """The column definitions, as CREATE TABLE lists them."""
    number: str
    """The column that can be summed and compared."""
    label: str
    """The column that names a row."""
    groups: tuple[str, ...]
    """The columns that rows can be grouped by."""
    filters: tuple[Filter, ...]


def one_of(*values: str) -> Callable[[Random], str]:
    """A drawer of one of the given values."""
    return lambda rng: rng.choice(values)


TABLES = (
    Table(
        "loans",
        "customer TEXT, city TEXT, amount INTEGER, status TEXT, year INTEGER",
        "amount",
        "customer",
        ("city", "status", "year"),
        (
            Filter("in {}", "city = '{}'", words.city),
            Filter("with status {}", "status = '{}'", one_of("open", "late", "repaid")),
            Filter("from {}", "year = {}", words.year),
            Filter("above {}", "amount > {}", words.amount),
        ),
    ),
    Table(
        "accounts",
        "owner TEXT, city TEXT, type TEXT, balance INTEGER",
        "balance",
        "owner",
        ("city", "type"),
        (
            Filter("in {}", "city = '{}'", words.city),
            Filter("of type {}", "type = '{}'", one_of("savings", "checking", "business")),
            Filter("above {}", "balance > {}", words.amount),
            Filter("below {}", "balance < {}", words.amount),
        ),
    ),
    Table(
        "payments",
        "sender TEXT, receiver TEXT, amount INTEGER, currency TEXT, month TEXT",
        "amount",
        "receiver",
        ("sender", "receiver", "currency", "month"),
        (
            Filter("from {}", "sender = '{}'", words.first_name),
            Filter("to {}", "receiver = '{}'", words.company),
            Filter("in {}", "month = '{}'", one_of(*words.MONTHS)),
            Filter("above {}", "amount > {}", words.amount),
        ),
    ),
    Table(
        "stocks",
        "company TEXT, sector TEXT, country TEXT, price INTEGER",
        "price",
        "company",
        ("sector", "country"),
        (
            Filter("in the {} sector", "sector = '{}'", one_of(*words.SECTORS)),
            Filter("from {}", "country = '{}'", one_of("France", "Spain", "Italy", "Norway", "Japan", "Brazil")),
            Filter("above {}", "price > {}", words.amount),
            Filter("below {}", "price < {}", words.amount),
        ),
    ),
)

AGGREGATES = (
    ("total", "SUM"),
    ("average", "AVG"),
    ("highest", "MAX"),
    ("lowest", "MIN"),
)


def conditions(table: Table, rng: Random) -> tuple[str, str]:
    """No to two filters: what the question adds, and the WHERE clause (each with a leading space)."""
    chosen = rng.sample(range(len(table.filters)), rng.choice((0, 1, 1, 2, 2)))
    phrase, clauses = "", []
    for index in sorted(chosen):
        value = table.filters[index].value(rng)
        phrase += " " + table.filters[index].phrase.format(value)
        clauses.append(table.filters[index].condition.format(value))
    return phrase, " WHERE " + " AND ".join(clauses) if clauses else ""


def pair(rng: Random) -> Pair:
    """A question and its query."""
    table = rng.choice(TABLES)
    phrase, where = conditions(table, rng)
    rows, number = table.name, table.number
    kind = rng.choice(("count", "aggregate", "aggregate", "list", "group", "top"))
    if kind == "count":
        question = rng.choice(("How many {0} are there{1}?", "Count the {0}{1}.")).format(rows, phrase)
        return Pair(question, f"SELECT COUNT(*) FROM {rows}{where};")
    if kind == "list":
        question = rng.choice(("List the {2} of all {0}{1}.", "Show the {2} of {0}{1}."))
        return Pair(question.format(rows, phrase, table.label), f"SELECT {table.label} FROM {rows}{where};")
    if kind == "top":
        limit, (adjective, order) = rng.randint(2, 9), rng.choice((("largest", " DESC"), ("smallest", "")))
        question = f"Show the {limit} {rows}{phrase} with the {adjective} {number}."
        return Pair(question, f"SELECT * FROM {rows}{where} ORDER BY {number}{order} LIMIT {limit};")
    word, function = rng.choice(AGGREGATES)
    if kind == "group":
        group = rng.choice(table.groups)
        question = f"What is the {word} {number} of {rows}{phrase} for each {group}?"
        return Pair(question, f"SELECT {group}, {function}({number}) FROM {rows}{where} GROUP BY {group};")
    question = rng.choice(("What is the {2} {3} of {0}{1}?", "Find the {2} {3} of {0}{1}."))
    return Pair(question.format(rows, phrase, word, number), f"SELECT {function}({number}) FROM {rows}{where};")


SQL = Task("sql", "a question about a finance database to its SQL query", "Question: {}\nSQL:", pair)
